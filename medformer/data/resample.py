"""The one resampling this package does: a sheared stack (tilted gantry) onto a rectangular grid, on request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume

__all__ = ["deskew"]


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
