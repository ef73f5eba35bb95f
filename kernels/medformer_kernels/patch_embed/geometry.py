"""Places of patches: token grids, centres in millimetres, sizes given in millimetres, intensity windows.

Axes are zyx (3D) or yx (2D). Along one axis token i sees the voxels `i * stride - before` to
`i * stride - before + reach - 1` with `reach = dilation * (kernel - 1) + 1`; voxels past the last whole window are not
seen, except with `padding="cover"`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Geometry",
    "PatchVoxels",
    "Window",
    "hu_window",
    "patch_voxels",
    "resample_positions",
    "token_centres_mm",
    "token_coverage",
    "token_grid",
    "unembed_size",
    "z_score",
]

PerAxis = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Kernel, stride, padding and dilation resolved for one volume size; all tuples have one entry an axis."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Voxels before and after, per axis."""
    dilation: tuple[int, ...]
    grid: tuple[int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """Voxels from the first to the last of one patch."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tiles(self) -> bool:
        """Patches touch without overlap and without padding (voxels after the last are dropped)."""
        undilated = all(d == 1 or k == 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        return self.kernel == self.stride and undilated and all(pad == (0, 0) for pad in self.padding)

    def in_3d(self) -> Geometry:
        """The same patches with a z axis of one voxel in front if there is none."""
        if len(self.size) == 3:
            return self
        names = ("size", "kernel", "stride", "dilation", "grid")
        flat = {name: (1, *getattr(self, name)) for name in names}
        return Geometry(**flat, padding=((0, 0), *self.padding))

    @property
    def flat_padding(self) -> list[int]:
        return [voxels for pair in self.padding for voxels in pair]


def _axes(name: str, value: PerAxis, dims: int, at_least: int, function: str) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or not all(isinstance(v, int) and v >= at_least for v in values):
        raise ValueError(f"{function}: {name}={value} must be an integer of at least {at_least}, or {dims} of them")
    return values


def _padding(
    padding: Padding, size: Sequence[int], reach: Sequence[int], stride: Sequence[int], function: str
) -> tuple[tuple[int, int], ...]:
    dims, asked = len(size), padding
    if padding == "cover":
        return tuple(
            (0, max(r - n, (-(n - r)) % s if n >= r else 0)) for n, r, s in zip(size, reach, stride, strict=True)
        )
    if isinstance(padding, int):
        padding = (padding,) * dims
    if not isinstance(padding, str) and len(padding) == dims:
        pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
        if all(len(pair) == 2 and all(isinstance(v, int) and v >= 0 for v in pair) for pair in pairs):
            return pairs  # type: ignore[return-value]
    raise ValueError(
        f"{function}: padding={asked!r} must be 'cover', or an integer or a (before, after) pair of at least 0 for "
        f"each of the {dims} axes"
    )


def resolve(
    size: Sequence[int],
    kernel: PerAxis,
    *,
    stride: PerAxis,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    function: str = "token_grid",
) -> Geometry:
    """Check everything and count the tokens.

    Raises:
        ValueError: a number is out of range, or the kernel is larger than the padded volume.
    """
    given: Any = (tuple(size), _frozen(kernel), _frozen(stride), _frozen(padding), _frozen(dilation), function)
    if torch.compiler.is_compiling():  # sizes may be symbols
        return _resolve(*given)
    return _resolved(*given)


def _frozen(value: object) -> object:
    return tuple(_frozen(v) for v in value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _resolve(
    size: tuple[int, ...], kernel: PerAxis, stride: PerAxis, padding: Padding, dilation: PerAxis, function: str
) -> Geometry:
    dims = len(size)
    kernel = _axes("kernel", kernel, dims, 1, function)
    stride = _axes("stride", stride, dims, 1, function)
    dilation = _axes("dilation", dilation, dims, 1, function)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    pairs = _padding(padding, size, reach, stride, function)
    room = tuple(n + before + after for n, (before, after) in zip(size, pairs, strict=True))
    if any(n < r or n < 1 for n, r in zip(room, reach, strict=True)):
        raise ValueError(
            f"{function}: a kernel reaching {_times(reach)} voxels is larger than the padded volume {_times(room)}; "
            "pad the volume or take a smaller kernel"
        )
    grid = tuple((n - r) // s + 1 for n, r, s in zip(room, reach, stride, strict=True))
    return Geometry(size=size, kernel=kernel, stride=stride, padding=pairs, dilation=dilation, grid=grid)


_resolved = functools.lru_cache(maxsize=4096)(_resolve)  # the checks cost as much as a small convolution


def _times(numbers: Sequence[int]) -> str:
    return "x".join(str(n) for n in numbers)


def token_grid(
    size: Sequence[int], kernel: PerAxis, *, stride: PerAxis, padding: Padding = 0, dilation: PerAxis = 1
) -> tuple[int, ...]:
    """Tokens per axis of `patch_embed` over a volume of `size` voxels."""
    return resolve(size, kernel, stride=stride, padding=padding, dilation=dilation).grid


def token_centres_mm(
    size: Sequence[int],
    kernel: PerAxis,
    *,
    stride: PerAxis,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    spacing_mm: Sequence[float],
) -> Tensor:
    """Centre of each token's patch, (N, axes) float64 millimetres zyx, from the centre of voxel 0; x fastest."""
    _check_spacing("token_centres_mm", spacing_mm, len(size))
    geometry = resolve(size, kernel, stride=stride, padding=padding, dilation=dilation, function="token_centres_mm")
    axes = []
    for axis, tokens in enumerate(geometry.grid):
        first = (geometry.reach[axis] - 1) / 2 - geometry.padding[axis][0]
        axes.append((torch.arange(tokens, dtype=torch.float64) * geometry.stride[axis] + first) * spacing_mm[axis])
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def token_coverage(
    size: Sequence[int], kernel: PerAxis, *, stride: PerAxis, padding: Padding = 0, dilation: PerAxis = 1
) -> Tensor:
    """Share of each token's patch that is inside the volume, (N,) float32: mask edge patches by a threshold."""
    geometry = resolve(size, kernel, stride=stride, padding=padding, dilation=dilation, function="token_coverage")
    share = torch.ones(())
    for axis, tokens in enumerate(geometry.grid):
        first = torch.arange(tokens)[:, None] * geometry.stride[axis] - geometry.padding[axis][0]
        voxel = first + torch.arange(geometry.kernel[axis]) * geometry.dilation[axis]
        inside = ((voxel >= 0) & (voxel < geometry.size[axis])).float().mean(1)
        share = share[..., None] * inside
    return share.reshape(-1)


def unembed_size(
    grid: Sequence[int], kernel: PerAxis, *, stride: PerAxis, padding: Padding = 0, dilation: PerAxis = 1
) -> tuple[int, ...]:
    """The smallest volume whose token grid is `grid`: what `patch_unembed` returns if no size is given."""
    dims, function = len(grid), "unembed_size"
    kernel, stride = _axes("kernel", kernel, dims, 1, function), _axes("stride", stride, dims, 1, function)
    dilation, grid = _axes("dilation", dilation, dims, 1, function), _axes("grid", grid, dims, 1, function)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    pairs = ((0, 0),) * dims if padding == "cover" else _padding(padding, grid, reach, stride, function)
    return tuple((g - 1) * s + r - sum(pad) for g, s, r, pad in zip(grid, stride, reach, pairs, strict=True))


class PatchVoxels(NamedTuple):
    """A patch in voxels, as `patch_embed` takes it."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]


def patch_voxels(
    kernel_mm: float | Sequence[float], stride_mm: float | Sequence[float], spacing_mm: Sequence[float]
) -> PatchVoxels:
    """Kernel and stride in voxels for a patch given in millimetres: the nearest whole number, at least 1."""
    dims = len(spacing_mm)
    _check_spacing("patch_voxels", spacing_mm, dims)
    voxels = []
    for name, value in (("kernel_mm", kernel_mm), ("stride_mm", stride_mm)):
        lengths = (value,) * dims if isinstance(value, int | float) else tuple(value)
        if len(lengths) != dims or not all(math.isfinite(length) and length > 0 for length in lengths):
            raise ValueError(f"patch_voxels: {name}={value} must be a length above 0, or {dims} of them")
        pairs = zip(lengths, spacing_mm, strict=True)
        voxels.append(tuple(max(1, math.floor(length / step + 0.5)) for length, step in pairs))
    return PatchVoxels(*voxels)


def _check_spacing(function: str, spacing_mm: Sequence[float], dims: int) -> None:
    if len(spacing_mm) != dims or not all(math.isfinite(step) and step > 0 for step in spacing_mm):
        raise ValueError(f"{function}: spacing_mm={tuple(spacing_mm)} must be {dims} finite numbers above 0")


class Window(NamedTuple):
    """One input channel made from an intensity: clamp(intensity * scale + shift, low, high); NaN stays NaN."""

    scale: float
    shift: float
    low: float = -math.inf
    high: float = math.inf


def hu_window(low: float, high: float) -> Window:
    """`low` to 0 and `high` to 1, clamped: a display window, in the units of the rescaled scan."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"hu_window: low={low} must be below high={high}, both finite")
    return Window(1 / (high - low), -low / (high - low), 0.0, 1.0)


def z_score(mean: float, std: float, *, clip: float = math.inf) -> Window:
    """(intensity - mean) / std, clamped to [-clip, clip]."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0 and clip > 0):
        raise ValueError(f"z_score: mean={mean} must be finite, std={std} and clip={clip} above 0")
    return Window(1 / std, -mean / std, -clip, clip)


def coefficients(windows: Sequence[Window | tuple[float, float]] | None, slope: float, intercept: float) -> list[float]:
    """(scale, shift, low, high) of each window in units of the stored voxel, flat; empty if nothing is to be done."""
    if windows is None:
        return [] if slope == 1 and intercept == 0 else [float(slope), float(intercept), -math.inf, math.inf]
    if not 1 <= len(windows) <= 8:
        raise ValueError(f"patch_embed: windows has {len(windows)} entries; it must have 1 to 8")
    flat: list[float] = []
    for window in windows:
        if not isinstance(window, Window):
            if len(window) != 2:
                raise ValueError(f"patch_embed: windows holds {window}; it must be a Window or a (low, high) pair")
            window = hu_window(*window)
        flat += [window.scale * slope, window.scale * intercept + window.shift, window.low, window.high]
    return flat


def resample_positions(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table (*base grid, E) stretched linearly to (*grid, E); exact, and the same tensor, at the base grid.

    An axis that shrinks is averaged over its new step. One small matrix product an axis: deterministic everywhere.
    """
    for axis, wanted in enumerate(grid):
        base = table.shape[axis]
        if base != wanted:
            step = base / wanted
            centres = (torch.arange(wanted, device=table.device, dtype=torch.float64) + 0.5) * step - 0.5
            distance = (torch.arange(base, device=table.device) - centres.clamp(0, base - 1)[:, None]).abs()
            weights = (1 - distance / max(1.0, step)).clamp_min(0)
            weights = (weights / weights.sum(1, keepdim=True)).to(table.dtype)
            with torch.autocast(table.device.type, enabled=False):
                table = (weights @ table.movedim(axis, -2)).movedim(-2, axis)
    return table
