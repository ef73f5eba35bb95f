"""What is done to views after they are cut: warps, and changes of intensity. Batched, on the training device.

Everything random was decided before, by `views.draw` (one row of numbers a view) and by the sample's own noise: a view
looks the same in any batch. Axes: N views of one size, Z, Y, X voxels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["BLUR_RADIUS", "CHANGES", "CONTROL", "change", "resample", "rotation", "smoothing", "warp"]

# Columns of a view's row.
CHANGES = (
    "contrast", "brightness", "gamma", "noise", "blur", "rician", "bias", "window_low", "window_high", "coarse",
    "elastic",
)  # fmt: skip
BLUR_RADIUS = 3  # voxels either side
_NEUTRAL = {"contrast": 1.0, "gamma": 1.0, "coarse": 1.0}  # changes nothing; all others: 0
CONTROL = 4  # points an axis that a smooth random field is stretched from
_KNOTS = CONTROL**3


def field_numbers() -> int:
    """Random numbers a view needs for its smooth fields: three of displacement, one of bias."""
    return 4 * _KNOTS


def _field(knots: Float[Tensor, "N F knots"], size: tuple[int, ...]) -> Float[Tensor, "N F Z Y X"]:
    """A smooth field of about unit deviation through CONTROL^3 random points."""
    knots = knots.unflatten(-1, (CONTROL,) * 3)
    return F.interpolate(knots, size=size, mode="trilinear", align_corners=True)


def warp(
    x: Float[Tensor, "N Z Y X"], matrix: Float[Tensor, "N 3 3"], elastic: Float[Tensor, " N"], knots: Tensor
) -> Float[Tensor, "N Z Y X"]:
    """Turn, shear and bend each view about its middle; beyond its edge the view is mirrored.

    Args:
        matrix: output voxel (zyx, from the middle) to input voxel.
        elastic: deviation of a smooth random displacement, in voxels.
        knots: standard normal, [N, field_numbers()].
    """
    size = x.shape[1:]
    axes = [torch.arange(n, device=x.device, dtype=x.dtype) - (n - 1) / 2 for n in size]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # [3, voxels], zyx
    at = matrix.to(x.dtype) @ at
    if bool((elastic > 0).any()):
        moves = _field(knots[:, : 3 * _KNOTS].unflatten(1, (3, _KNOTS)), size).flatten(2)
        at = at + elastic.to(x.device)[:, None, None] * moves
    # grid_sample takes x first, -1 and 1 at the outer faces. An axis of one voxel has nothing to sample between.
    half = torch.tensor([n / 2 for n in size], device=x.device, dtype=x.dtype)
    grid = at / half[:, None]
    grid = torch.where(half[:, None] > 0.5, grid, torch.zeros_like(grid))
    grid = grid.flip(1).transpose(1, 2).reshape(len(x), *size, 3)
    return F.grid_sample(x[:, None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)[:, 0]


def change(
    x: Float[Tensor, "N Z Y X"],
    rows: Float[Tensor, "N P"],
    grain: Tensor,
    second_grain: Tensor | None,
    knots: Tensor,
    *,
    smoothed: bool = False,
) -> Float[Tensor, "N Z Y X"]:
    """Window, coarsen, blur, bias field, gamma, contrast, brightness, noise; a row of zeros and ones changes nothing.

    What no row needs is not computed. `second_grain` is the imaginary part of Rician noise (Gudbjartsson and Patz
    1995), used where `rician` is set. `smoothed`: `smoothing` was part of how the views were cut.
    """
    size, used = x.shape[1:], asked(rows)
    row = {name: column[:, None] for name, column in zip(CHANGES, rows.to(x.device).unbind(1), strict=True)}
    if "window" in used:
        low, high = (row[name][..., None, None] for name in ("window_low", "window_high"))
        x = torch.where(high > low, x.clamp(low, high), x)
    if not smoothed and (matrices := smoothing(rows, size, x.device)):
        x = resample(x, [m[:, None] for m in matrices])[:, 0]
    if not used & {"bias", "gamma", "contrast", "brightness", "noise"}:
        return x
    x = x.flatten(1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    span = (high - low).clamp_min(1e-6)
    if "bias" in used:
        field = _field(knots[:, None, 3 * _KNOTS :], size).flatten(1)
        x = (low + (x - low) * torch.exp(row["bias"] * field)).clamp_(max=high + span)
        span = (x.amax(1, keepdim=True) - low).clamp_min(1e-6)
    # From here on 0 is a view's darkest and 1 its brightest voxel, and all is done in place.
    x = (x - low).div_(span)
    if "gamma" in used:
        x.pow_(row["gamma"])
    mean = x.mean(1, keepdim=True)
    x.sub_(mean)
    spread = torch.linalg.vector_norm(x, dim=1, keepdim=True) / math.sqrt(x.shape[1])
    if "noise" in used:
        deviation = spread * row["noise"] / row["contrast"]
        x.addcmul_(grain.reshape(x.shape), deviation)
        if second_grain is not None:
            magnitude = torch.hypot(x + mean, deviation * second_grain.reshape(x.shape)).sub_(mean)
            x = torch.where(row["rician"] > 0, magnitude, x)
    x.mul_(span * row["contrast"]).add_(low + span * (mean + spread * row["brightness"]))
    return x.unflatten(1, size)


def asked(rows: Float[Tensor, "N P"]) -> set[str]:
    """Names of the changes that any row needs, "window" for both its ends. Rows on the CPU make no GPU wait."""
    low, high = (CHANGES.index(name) for name in ("window_low", "window_high"))
    found = {"window"} if bool((rows[:, high] > rows[:, low]).any()) else set()
    differs = (rows != rows.new_tensor([_NEUTRAL.get(name, 0.0) for name in CHANGES])).any(0).tolist()
    return found | {name for name, differ in zip(CHANGES, differs, strict=True) if differ}


def resample(
    x: Float[Tensor, "B Z Y X"], matrices: Sequence[Float[Tensor, "B V out inner"]]
) -> Float[Tensor, "B V z y x"]:
    """V versions of each x: a matrix along each axis (z, y, x), from its voxels to those of the result.

    Each product takes the last axis away and puts the new one in front, so that nothing is ever copied.
    """
    along_z, along_y, along_x = matrices
    found = along_x.flatten(1, 2) @ x.flatten(1, 2).mT  # [B, V * x, Z * Y]
    found = found.unflatten(1, along_x.shape[1:3])
    for matrix in (along_y, along_z):  # to [B, V, y, x * Z], to [B, V, z, y * x]
        found = matrix @ found.unflatten(-1, (-1, matrix.shape[-1])).flatten(2, -2).mT
    return found.unflatten(-1, (along_y.shape[2], along_x.shape[2]))


def smoothing(rows: Float[Tensor, "N P"], size: Sequence[int], device: torch.device) -> list[Tensor] | None:
    """What `coarse` and `blur` do along each axis of `size` voxels, as matrices [N, n, n]; None where no row asks.

    Coarse: the mean over cells of so many voxels, a scan of lower resolution. Blur: a Gaussian; the edge repeats.
    """
    if not asked(rows) & {"coarse", "blur"}:
        return None
    coarse, sigma = (rows[:, CHANGES.index(name), None].to(device) for name in ("coarse", "blur"))
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp_min(1e-3)) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    found = {}
    for n in set(size):
        place = torch.arange(n, device=device)
        cell = torch.floor(place / coarse.clamp_min(1))
        same = (cell[:, :, None] == cell[:, None, :]).to(weights.dtype)
        reached = (place + taps[:, None]).clamp(0, n - 1)  # [taps, n]: by each tap of each voxel
        blur = (weights @ (reached[..., None] == place).to(weights.dtype).flatten(1)).unflatten(1, (n, n))
        found[n] = blur @ (same / same.sum(-1, keepdim=True))
    return [found[n] for n in size]


def rotation(degrees: Iterable[float]) -> np.ndarray:
    """Turn about z, then y, then x; acts on zyx vectors."""
    a, b, c = (math.radians(d) for d in degrees)
    about_z = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_y = np.array([[math.cos(b), 0, -math.sin(b)], [0, 1, 0], [math.sin(b), 0, math.cos(b)]])
    about_x = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return about_x @ about_y @ about_z
