"""What is done to views after they are cut: warps, and changes of intensity. Batched, on the training device.

Everything random was decided before, by `views.draw` (one row of numbers a view) and by the sample's own noise: a view
looks the same in any batch. Axes: N views of one size, Z, Y, X voxels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["BLUR_RADIUS", "CHANGES", "CONTROL", "change", "warp"]

# Columns of a view's row.
CHANGES = (
    "contrast", "brightness", "gamma", "noise", "blur", "rician", "bias", "window_low", "window_high", "coarse",
    "elastic",
)  # fmt: skip
BLUR_RADIUS = 3  # voxels either side
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
        at = at + elastic[:, None, None] * moves
    # grid_sample wants x first, -1 and 1 at the outer faces. An axis of one voxel has nothing to sample between.
    half = torch.tensor([n / 2 for n in size], device=x.device, dtype=x.dtype)
    grid = at / half[:, None]
    grid = torch.where(half[:, None] > 0.5, grid, torch.zeros_like(grid))
    grid = grid.flip(1).transpose(1, 2).reshape(len(x), *size, 3)
    return F.grid_sample(x[:, None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)[:, 0]


def change(
    x: Float[Tensor, "N Z Y X"], rows: Float[Tensor, "N P"], grain: Tensor, second_grain: Tensor | None, knots: Tensor
) -> Float[Tensor, "N Z Y X"]:
    """Window, coarsen, blur, bias field, gamma, contrast, brightness, noise; a row of zeros and ones changes nothing.

    `second_grain` is the imaginary part of Rician noise (Gudbjartsson and Patz 1995), used where `rician` is set.
    """
    row = {name: rows[:, i, None, None, None] for i, name in enumerate(CHANGES)}
    if bool((row["window_high"] > row["window_low"]).any()):
        used = row["window_high"] > row["window_low"]
        x = torch.where(used, x.clamp(row["window_low"], row["window_high"]), x)
    if bool((row["coarse"] > 1).any()):
        x = _coarsen(x, row["coarse"].flatten())
    x = _blur(x, row["blur"])
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    if bool((row["bias"] > 0).any()):
        field = _field(knots[:, None, 3 * _KNOTS :], x.shape[1:])[:, 0]
        x = (low + (x - low) * torch.exp(row["bias"] * field)).clamp(max=high + span)
        high = x.amax((1, 2, 3), keepdim=True)
        span = (high - low).clamp_min(1e-6)
    x = low + span * ((x - low) / span).clamp(0, 1) ** row["gamma"]
    mean = x.mean((1, 2, 3), keepdim=True)
    spread = x.std((1, 2, 3), correction=0, keepdim=True)
    noisy = x + spread * row["noise"] * grain / row["contrast"]
    if second_grain is not None:
        other = spread * row["noise"] * second_grain / row["contrast"]
        magnitude = low + torch.sqrt((noisy - low).square() + other.square())
        noisy = torch.where(row["rician"] > 0, magnitude, noisy)
    return mean + (noisy - mean) * row["contrast"] + spread * row["brightness"]


def _coarsen(x: Tensor, factor: Float[Tensor, " N"]) -> Tensor:
    """Mean over cells of `factor` voxels along each axis (at least 1): a scan of lower resolution."""
    for axis, letter in ((1, "z"), (2, "y"), (3, "x")):
        cell = torch.floor(torch.arange(x.shape[axis], device=x.device) / factor.clamp_min(1)[:, None])
        same = (cell[:, :, None] == cell[:, None, :]).to(x.dtype)
        same = same / same.sum(-1, keepdim=True)
        x = torch.einsum(f"nzyx,no{letter}->n{'zyx'.replace(letter, 'o')}", x, same)
    return x


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian along each axis with the sample's own width, as a sum of shifted copies; sigma 0 changes nothing."""
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (taps / sigma.flatten(1).clamp_min(1e-3)) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    for axis in (1, 2, 3):
        length = x.shape[axis]
        if length == 1:
            continue
        at = torch.arange(-BLUR_RADIUS, length + BLUR_RADIUS, device=x.device).clamp(0, length - 1)
        padded = x.index_select(axis, at)
        x = sum(weights[:, k, None, None, None] * padded.narrow(axis, k, length) for k in range(2 * BLUR_RADIUS + 1))  # type: ignore[assignment]
    return x


def rotation(degrees: tuple[float, float, float]) -> list[list[float]]:
    """Turn about z, then y, then x; acts on zyx vectors."""
    a, b, c = (math.radians(d) for d in degrees)
    about_z = torch.tensor([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_y = torch.tensor([[math.cos(b), 0, -math.sin(b)], [0, 1, 0], [math.sin(b), 0, math.cos(b)]])
    about_x = torch.tensor([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return (about_x @ about_y @ about_z).tolist()
