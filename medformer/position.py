"""Positions that follow any token grid: added to tokens (learned, sine-cosine) or turning queries and keys (rotary).

Shape legend: B batch, H heads, C model width, D head width, N tokens, g tokens along one axis; grids are zyx.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from medformer.layout import without_layout
from medformer_kernels._tracing import certain

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["LearnedPosition", "RotaryPosition", "SinCosPosition", "rotate"]


class LearnedPosition(nn.Module):
    """A learned table over a base grid, stretched linearly to the grid at hand; exact at the base grid.

    The resampling is separable and written as one small matrix product an axis, so that it is the same in 2D
    and 3D, deterministic on every device, and averages (instead of skipping rows) when the grid shrinks.

    Args:
        width: channels of a token.
        grid: base grid in tokens, zyx.
        class_token: also hold one vector for the class token.
    """

    def __init__(self, width: int, grid: tuple[int, ...], *, class_token: bool) -> None:
        super().__init__()
        self.grid = grid
        self.patches = nn.Parameter(torch.empty(*grid, width))
        self.cls = nn.Parameter(torch.empty(width)) if class_token else None
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, grid: tuple[int, ...]) -> Float[Tensor, "N C"]:
        table = self.patches
        for axis, (base, wanted) in enumerate(zip(self.grid, grid, strict=True)):
            # A graph that leaves the size open resamples always: at the base grid that changes no bit.
            if not certain(base == wanted):
                weights = _linear_resampling(base, wanted, like=table)
                with torch.autocast(table.device.type, enabled=False):
                    table = (weights @ table.movedim(axis, -2)).movedim(-2, axis)
        return table.reshape(-1, table.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(without_layout(fn), recurse)


class SinCosPosition(nn.Module):
    """Fixed sines and cosines of the token index, one equal share of the channels per axis; the rest stays 0.

    Always float32, so that a model keeps its positions when its dtype changes.
    Source: Vaswani et al. 2017, section 3.5, applied to each axis. Differs: sines first, then cosines.

    Args:
        width: channels of a token, at least 2 per axis.
        dims: axes of the grid.
        period: longest period divided by 2 pi, in tokens.
    """

    cls: None = None

    def __init__(self, width: int, dims: int, *, period: float = 10_000.0) -> None:
        super().__init__()
        self.width = width
        self.per_axis = width // (2 * dims)
        self.period = period
        # Follows the device of the model; holds nothing, so it is not saved.
        self.anchor: Tensor
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def forward(self, grid: tuple[int, ...]) -> Float[Tensor, "N C"]:
        device = self.anchor.device
        exponent = torch.arange(self.per_axis, device=device, dtype=torch.float32) / self.per_axis
        frequency = torch.exp(-math.log(self.period) * exponent)
        parts = []
        for axis, tokens in enumerate(grid):
            angle = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequency
            waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
            shape = [1] * len(grid) + [waves.shape[-1]]
            shape[axis] = tokens
            parts.append(waves.reshape(shape).expand(*grid, -1))
        unused = self.width - 2 * self.per_axis * len(grid)
        parts.append(torch.zeros(*grid, unused, device=device))
        return torch.cat(parts, dim=-1).reshape(-1, self.width)


class RotaryPosition(nn.Module):
    """Angles that turn pairs of channels of queries and keys: a score then depends on the offset of its two tokens.

    Each axis has an equal share of the pairs. A head width that 2 * dims does not divide leaves channels over, and
    those pass as they are; so do class and register tokens.
    Source: Su et al. 2021, section 3.2, by axis as in Heo et al. 2024 (whose period, 100 tokens, is the default here);
    unit coordinates as in Simeoni et al. 2025 (DINOv3).

    Args:
        head_width: channels of a head, at least 2 per axis.
        dims: axes of the grid.
        periods: of the pairs of an axis, n of them: a number p for p^(i / n) with i from 0, or all of them.
        coordinates: index turns token i by i / period; unit by 2 pi / period times the centre of its cell, with the
            grid from -1 to 1.
    """

    def __init__(
        self, head_width: int, dims: int, *, periods: float | tuple[float, ...] = 100.0,
        coordinates: Literal["index", "unit"] = "index",
    ) -> None:  # fmt: skip
        super().__init__()
        self.per_axis = head_width // (2 * dims)
        if self.per_axis == 0:
            raise ValueError(f"RotaryPosition: head_width={head_width} must be at least {2 * dims} for {dims} axes")
        self.periods, self.coordinates = periods, coordinates
        # As in SinCosPosition.
        self.anchor: Tensor
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def forward(self, grid: tuple[int, ...], *, prefix: int = 0) -> Float[Tensor, "2 N W"]:
        """Cosines and sines, float32, for `prefix` tokens without a place and then those of the grid."""
        device = self.anchor.device
        if isinstance(self.periods, tuple):
            frequency = 1 / torch.tensor(self.periods, device=device, dtype=torch.float32)
        else:
            exponent = torch.arange(self.per_axis, device=device, dtype=torch.float32) / self.per_axis
            frequency = torch.exp(-math.log(self.periods) * exponent)
        parts = []
        for axis, tokens in enumerate(grid):
            place = torch.arange(tokens, device=device, dtype=torch.float32)
            if self.coordinates == "unit":
                place = 2 * math.pi * ((place + 0.5) / tokens * 2 - 1)
            angle = place[:, None] * frequency
            shape = [1] * len(grid) + [self.per_axis]
            shape[axis] = tokens
            parts.append(angle.reshape(shape).expand(*grid, -1))
        angles = torch.cat(parts, dim=-1).reshape(-1, self.per_axis * len(grid))
        angles = torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Float[Tensor, "B H N D"], rotary: Float[Tensor, "2 N W"]) -> Float[Tensor, "B H N D"]:
    """Turn the first W pairs of neighbouring channels by the angles of `RotaryPosition`."""
    cos, sin = rotary.to(x.dtype)
    turned = 2 * cos.shape[-1]
    a, b = x[..., 0:turned:2], x[..., 1:turned:2]
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return pairs if turned == x.shape[-1] else torch.cat([pairs, x[..., turned:]], dim=-1)


def _linear_resampling(base: int, wanted: int, *, like: Tensor) -> Float[Tensor, "wanted base"]:
    """Rows of triangle weights between cell centres, widened when `wanted < base`, each row summing to 1."""
    exact = torch.promote_types(like.dtype, torch.float32)
    # Tensors, not numbers: a graph that leaves `wanted` open has no branch on it.
    step = base / torch.full((), wanted, device=like.device, dtype=exact)
    # At the ends the nearest base cell is repeated; where the step is wider than a cell no centre is there.
    centre = ((torch.arange(wanted, device=like.device, dtype=exact) + 0.5) * step - 0.5).clamp(0, base - 1)
    distance = (centre[:, None] - torch.arange(base, device=like.device, dtype=exact)).abs()
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)
