"""Resampling, on request only: a sheared stack (tilted gantry) made upright, a scan onto another's grid, an image to a
size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume

if TYPE_CHECKING:  # which takes a second and more to load, and processes that read headers need none of it
    from torch import Tensor

__all__ = ["deskew", "on_grid", "onto", "resize"]

_OFF = 0.5  # voxels that a corner may lie off before two grids count as different


def deskew(volume: Volume) -> Volume:
    """Shift each slice in its plane (linear interpolation) until z stands square on x and y.

    Rows and columns keep their directions and spacing, z gets the distance of the slices along their normal, and the
    field of view grows to hold every slice. What no slice covers is marked in `valid` and holds the lowest value.
    Integer voxels are rounded back to integers. A volume without shear comes back as it is. Raises ScanError where
    rows and columns are not perpendicular.
    """
    affine = volume.affine
    x_mm, y_mm = np.linalg.norm(affine[:3, 0]), np.linalg.norm(affine[:3, 1])
    row, col = affine[:3, 0] / x_mm, affine[:3, 1] / y_mm
    if abs(row @ col) > 1e-4:
        raise ScanError("deskew: rows and columns are not perpendicular; only a shear between slices can be undone")
    step = affine[:3, 2]
    drift = np.array([step @ col / y_mm, step @ row / x_mm])  # pixels a slice, (y, x)
    if np.abs(drift).max() * (volume.shape[0] - 1) < 1e-3:
        return volume
    normal = np.cross(row, col)
    normal = normal * np.sign(step @ normal)
    places = np.arange(volume.shape[0])[:, None] * drift
    low = np.floor(places.min(axis=0)).astype(int)
    grow = np.ceil(places.max(axis=0)).astype(int) - low
    shape = (volume.shape[0], volume.shape[1] + int(grow[0]), volume.shape[2] + int(grow[1]))
    if int(np.prod(shape, dtype=object)) * 4 > MAX_VOLUME_BYTES:
        raise ScanError(f"deskew: the upright grid of {shape} is above {MAX_VOLUME_BYTES:,} bytes; crop the scan first")
    source = np.ones(volume.shape, bool) if volume.valid is None else volume.valid
    lowest = volume.voxels[source].min() if source.any() else volume.voxels.min()
    voxels = np.full(shape, lowest, volume.voxels.dtype)
    valid = np.zeros(shape, bool)
    for z, place in enumerate(places):
        y0, x0 = np.floor(place - low + 1e-9).astype(int)
        fy, fx = np.clip(place - low - (y0, x0), 0, 1)
        plane = volume.voxels[z].astype(np.float64)
        inside = source[z]
        for axis, part in ((0, fy), (1, fx)):
            plane, inside = _shift(plane, inside, axis, float(part), float(lowest))
        plane = np.round(plane) if voxels.dtype.kind in "iu" else plane
        rows, columns = slice(y0, min(y0 + plane.shape[0], shape[1])), slice(x0, min(x0 + plane.shape[1], shape[2]))
        inside = inside[: rows.stop - y0, : columns.stop - x0]
        plane = plane[: rows.stop - y0, : columns.stop - x0]
        voxels[z, rows, columns] = np.where(inside, plane, lowest).astype(voxels.dtype)
        valid[z, rows, columns] = inside
    upright = affine.copy()
    upright[:3, 2] = normal * abs(step @ normal)
    upright[:3, 3] = affine[:3, 3] + low[0] * affine[:3, 1] + low[1] * affine[:3, 0]
    notes = tuple(n for n in volume.notes if not n.startswith("gantry tilt"))
    notes += ("slices shifted onto an upright grid by linear interpolation (deskew)",)
    return replace(volume, voxels=voxels, affine=upright, valid=valid, notes=notes)


def _shift(plane: np.ndarray, inside: np.ndarray, axis: int, part: float, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """Move by 0 <= part < 1 pixels along `axis`, one pixel longer; a pixel is inside where both its sources are."""
    after = [(0, 1) if a == axis else (0, 0) for a in range(2)]
    before = [(1, 0) if a == axis else (0, 0) for a in range(2)]
    if part < 1e-6:
        return np.pad(plane, after, constant_values=fill), np.pad(inside, after)
    moved = (1 - part) * np.pad(plane, after, constant_values=fill) + part * np.pad(plane, before, constant_values=fill)
    return moved, np.pad(inside, after) & np.pad(inside, before)


def on_grid(volume: Volume, grid: Volume) -> bool:
    """Whether both have the same voxels: equal shapes, and corners less than half a voxel apart."""
    if volume.shape != grid.shape:
        return False
    ends = np.array([[x, y, z, 1] for z in (0, 1) for y in (0, 1) for x in (0, 1)], float)
    corners = (ends * [*(n - 1 for n in grid.shape[::-1]), 1]).T
    off = np.linalg.solve(grid.affine, volume.affine @ corners) - corners
    return bool(np.abs(off).max() < _OFF)


def onto(volume: Volume, grid: Volume) -> Volume:
    """The volume on another's grid, by trilinear interpolation; unchanged where it is on it already.

    What it does not cover is marked in `valid` and holds its lowest value. Raises ScanError where the two do not
    overlap, as scans of two patients do not.
    """
    if on_grid(volume, grid):
        return volume
    import torch
    import torch.nn.functional as F

    name, other = (v.source.rstrip("/").rpartition("/")[2] for v in (volume, grid))
    if "none" in (volume.geometry, grid.geometry):
        raise ScanError(
            f"{name}: {volume.shape} voxels, {other} has {grid.shape}, and no place in the patient to align"
        )
    source = torch.from_numpy(np.array(volume.voxels, np.float32))
    measured = torch.ones(volume.shape) if volume.valid is None else torch.from_numpy(volume.valid).float()
    stack = torch.stack([source, measured])[None]
    to_source = np.linalg.solve(volume.affine, grid.affine)  # voxels (x, y, z, 1) of the grid to those of the volume
    rows = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape[:0:-1]), indexing="xy"), -1).astype(np.float64)
    last = np.maximum(np.array(volume.shape[::-1]) - 1, 1)
    lowest = float(volume.voxels.min() if volume.valid is None else volume.voxels[volume.valid].min())
    voxels, valid = np.empty(grid.shape, np.float32), np.empty(grid.shape, bool)
    for z in range(grid.shape[0]):  # a plane at a time: places are three times the voxels
        places = rows @ to_source[:3, :2].T + (to_source[:3, 2] * z + to_source[:3, 3])
        inside = ((places > -_OFF) & (places < np.array(volume.shape[::-1]) - _OFF)).all(-1)
        at = torch.from_numpy((2 * places / last - 1).astype(np.float32))[None, None]
        found = F.grid_sample(stack, at, mode="bilinear", padding_mode="border", align_corners=True)[0, :, 0].numpy()
        valid[z] = inside & (found[1] > _OFF)
        voxels[z] = np.where(valid[z], found[0], lowest)
    if not valid.any():
        raise ScanError(f"{name} and {other} do not overlap; are they of one patient and session?")
    note = f"resampled onto the grid of {other} by linear interpolation"
    return replace(volume, voxels=voxels, affine=grid.affine.copy(), valid=None if valid.all() else valid,
                   notes=(*volume.notes, note))  # fmt: skip


def resize(image: Tensor, size: tuple[int, ...]) -> Tensor:
    import torch.nn.functional as F

    if tuple(image.shape[1:]) == size:
        return image
    x = image[None].float()
    for _ in range(8):  # halve first: interpolation alone would skip voxels
        halve = [n >= 2 * s for n, s in zip(x.shape[2:], size, strict=True)]
        if not any(halve):
            break
        pool = F.avg_pool3d if len(size) == 3 else F.avg_pool2d
        x = pool(x, [2 if h else 1 for h in halve])
    mode = "trilinear" if len(size) == 3 else "bilinear"
    return F.interpolate(x, size=size, mode=mode, align_corners=False)[0].half()
