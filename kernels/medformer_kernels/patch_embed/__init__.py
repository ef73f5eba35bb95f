"""Overlapping patches of scans to tokens, and back: one fused pass from raw voxels to normalised tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels._dispatch import resolve_backend
from medformer_kernels._operators import followed
from medformer_kernels._tracing import standard
from medformer_kernels.patch_embed import ops
from medformer_kernels.patch_embed.choice import Choice, choose
from medformer_kernels.patch_embed.geometry import (
    Geometry,
    Padding,
    PatchVoxels,
    PerAxis,
    Window,
    coefficients,
    hu_window,
    patch_voxels,
    resample_positions,
    resolve,
    token_centres_mm,
    token_coverage,
    token_grid,
    unembed_size,
    z_score,
)
from medformer_kernels.patch_embed.paths import PATHS, library, library_takes
from medformer_kernels.patch_embed.reference import apply_windows, patch_embed_reference, patch_unembed_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

__all__ = [
    "Choice",
    "PatchVoxels",
    "Window",
    "hu_window",
    "patch_embed",
    "patch_embed_choice",
    "patch_embed_reference",
    "patch_unembed",
    "patch_unembed_reference",
    "patch_voxels",
    "token_centres_mm",
    "token_coverage",
    "token_grid",
    "z_score",
]

_RAW = (torch.int16, torch.uint16, torch.uint8)
_FLOAT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def patch_embed(
    x: Shaped[Tensor, "B C *size"],
    weight: Float[Tensor, "E Cin *kernel"],
    bias: Tensor | None = None,
    *,
    stride: PerAxis,
    padding: Padding = 0,
    padding_mode: str = "zeros",
    dilation: PerAxis = 1,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    position: Tensor | Sequence[Tensor] | None = None,
    prefix: Float[Tensor, "R E"] | None = None,
    windows: Sequence[Window | tuple[float, float]] | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    backend: str = "auto",
    path: str | None = None,
) -> Float[Tensor, "B R+N E"]:
    """Tokens of overlapping patches, x fastest: norm(conv(windows(x)) + bias) + position, after `prefix`.

    Args:
        x: volume or image in the dtype of `weight`, or the scan itself (int16, uint16, uint8), which is rescaled and
            windowed while it is read: its float copy never exists.
        weight: as of `nn.Conv3d` or `nn.Conv2d`; Cin = C * number of windows, the window index fastest.
        stride: voxels between patches, one number or one an axis.
        padding: voxels on both ends of each axis; (before, after) pairs; or 'cover', just enough after the last voxel
            for every voxel to be seen.
        padding_mode: 'zeros' (after windowing), 'replicate' or 'reflect'.
        dilation: voxels between the taps of one patch.
        norm: None, 'layer' or 'rms', over E, with optional `norm_weight` and `norm_bias`.
        position: a table (*base grid, E), or one table (length, E) an axis, whose sum is added; each is stretched
            linearly to the token grid.
        prefix: rows in front of the patches of every sample (class and register tokens): no concatenation later.
        windows: 1 to 8 of `hu_window`, `z_score`, `Window` or (low, high) pairs, in units of slope * x + intercept.
        backend: 'auto', 'triton' or 'torch'.
        path: one of the torch paths ('conv', 'conv_channels_last', 'im2col', 'matmul') instead of the measured choice.

    NaN voxels propagate to every token whose patch holds them. Raises ValueError with one line for anything wrong.
    """
    x, geometry, flat, backend = _prepare(
        "patch_embed", x, weight, stride, padding, padding_mode, dilation, windows, slope, intercept, backend, path
    )
    _check_rows(weight, bias, norm, norm_weight, norm_bias, norm_eps, prefix)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype) if x.is_floating_point() else x
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    tables = _position(position, geometry, weight)
    if flat and x.is_floating_point() and followed(x):
        x, flat = apply_windows(x, flat, weight.dtype), []  # the only case that needs the windows' own gradient
    if x.ndim == 4:
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
    geometry = geometry.in_3d()
    rows = (x, weight, bias, norm_weight, norm_bias)
    save = norm is not None and followed(*rows)
    path = path or _path(geometry, backend, x, weight, bool(flat), save)
    if not torch.compiler.is_compiling() and library_takes(path, x, geometry, padding_mode, flat, weight.dtype):
        # what autograd knows already needs no operator of ours, whose call costs as much as a small convolution
        return library(x, weight, bias, norm_weight, norm_bias, tables, prefix, geometry, norm or "", norm_eps, path)[0]
    model = (x, weight, bias, norm_weight, norm_bias, *tables, prefix)
    patches = (list(geometry.stride), geometry.flat_padding, list(geometry.dilation))
    tokens, _ = ops.patch_embed(*model, flat, *patches, padding_mode, norm or "", norm_eps, save, path)
    return tokens


def patch_embed_choice(
    x: Tensor,
    weight: Tensor,
    *,
    stride: PerAxis,
    padding: Padding = 0,
    padding_mode: str = "zeros",
    dilation: PerAxis = 1,
    windows: Sequence[Window | tuple[float, float]] | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    backend: str = "auto",
) -> Choice:
    """The path `patch_embed` takes with these arguments, and the reason."""
    patches = (stride, padding, padding_mode, dilation)
    x, geometry, flat, backend = _prepare(
        "patch_embed_choice", x, weight, *patches, windows, slope, intercept, backend, None
    )
    raw = bool(flat) or not x.is_floating_point()
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
    model = {"channels": weight.shape[1], "width": weight.shape[0], "dtype": dtype, "raw": raw}
    call = {"device": ops.device_name(x), "training": followed(weight), "channels_last": _last(x)}
    return choose(geometry, **model, **call, backend=backend)


def _path(geometry: Geometry, backend: str, x: Tensor, weight: Tensor, windowed: bool, training: bool) -> str:
    """As `choose`, but in a compiled graph the measured choice is left to the operator, where sizes are numbers."""
    raw = windowed or not x.is_floating_point()
    if torch.compiler.is_compiling() and backend != "triton" and not (raw and backend == "auto"):
        return "measured" if backend == "auto" or x.device.type == "cpu" else "conv"
    model = {"channels": weight.shape[1], "width": weight.shape[0], "dtype": weight.dtype, "raw": raw}
    call = {"device": ops.device_name(x), "training": training, "channels_last": _last(x)}
    return choose(geometry, **model, **call, backend=backend).path


def _last(x: Tensor) -> bool:
    """Channels are the fastest axis of a volume, and not also the slowest."""
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return not x.is_contiguous() and x.is_contiguous(memory_format=layout)


def patch_unembed(
    tokens: Float[Tensor, "B N E"],
    weight: Float[Tensor, "E C *kernel"],
    bias: Tensor | None = None,
    *,
    grid: Sequence[int],
    size: Sequence[int] | None = None,
    stride: PerAxis,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    backend: str = "auto",
) -> Float[Tensor, "B C *size"]:
    """Tokens back to voxels, overlapping patches summed: <patch_embed(x), t> = <x, patch_unembed(t)> for one weight.

    `grid` is the token grid and `size` the volume wanted, any whose token grid is `grid` (default: the smallest).
    It is also the transposed-convolution embedding of a volume v (B, E, *grid): `tokens=v.flatten(2).transpose(1, 2)`.
    """
    dims = weight.ndim - 2

    def fail(message: str) -> None:
        raise ValueError(f"patch_unembed: {message}")

    if dims not in (2, 3):
        fail(f"weight has shape {tuple(weight.shape)}; it must be (E, C, *kernel) with 2 or 3 axes")
    if len(grid) != dims:
        fail(f"grid={tuple(grid)} must have the {dims} axes of the kernel")
    if tokens.ndim != 3 or tokens.shape[2] != weight.shape[0]:
        fail(f"tokens has shape {tuple(tokens.shape)}; it must be (B, N, {weight.shape[0]})")
    if size is None:
        size = unembed_size(grid, weight.shape[2:], stride=stride, padding=padding, dilation=dilation)
    geometry = resolve(
        size, weight.shape[2:], stride=stride, padding=padding, dilation=dilation, function="patch_unembed"
    )
    if geometry.grid != tuple(grid):
        fail(f"size={tuple(size)} has the token grid {geometry.grid}, not grid={tuple(grid)}")
    if tokens.shape[1] != geometry.tokens:
        fail(f"tokens has N={tokens.shape[1]} rows; grid={tuple(grid)} has {geometry.tokens}")
    _check_float("patch_unembed", tokens, weight, "tokens")
    if bias is not None and (bias.shape != weight.shape[1:2] or bias.dtype != weight.dtype):
        fail(f"bias is {bias.dtype} of shape {tuple(bias.shape)}; it must be {weight.dtype} ({weight.shape[1]},)")
    if torch.is_autocast_enabled(tokens.device.type):
        dtype = torch.get_autocast_dtype(tokens.device.type)
        tokens, weight, bias = tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if standard():
        return patch_unembed_reference(
            tokens, weight, bias, grid=grid, size=size, stride=stride, padding=padding, dilation=dilation
        )
    backend = resolve_backend("patch_unembed", backend, tokens)
    path = "fused" if backend == "triton" else "measured" if tokens.device.type == "cpu" else "conv"
    weight = weight if dims == 3 else weight.unsqueeze(2)
    flat = geometry.in_3d()
    out = ops.patch_unembed(
        tokens, weight, bias, list(flat.size), list(flat.stride), flat.flat_padding, list(flat.dilation), path
    )
    return out if dims == 3 else out.squeeze(2)


def _check_float(function: str, x: Tensor, weight: Tensor, name: str) -> None:
    if x.device != weight.device:
        raise ValueError(f"{function}: {name} is on {x.device} but weight is on {weight.device}; move one")
    if weight.dtype not in _FLOAT:
        raise ValueError(f"{function}: weight is {weight.dtype}; it must be a floating-point tensor")
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype not in _FLOAT or (x.dtype != weight.dtype and not autocast):
        raise ValueError(f"{function}: {name} is {x.dtype} but weight is {weight.dtype}; they must agree")


def _prepare(
    function: str,
    x: Tensor,
    weight: Tensor,
    stride: PerAxis,
    padding: Padding,
    mode: str,
    dilation: PerAxis,
    windows: Sequence[Window | tuple[float, float]] | None,
    slope: float,
    intercept: float,
    backend: str,
    path: str | None,
) -> tuple[Tensor, Geometry, list[float], str]:
    """Checked: (x, geometry, window coefficients, backend: 'auto' where both could run and none was asked for)."""

    def fail(message: str) -> None:
        raise ValueError(f"{function}: {message}")

    if weight.ndim not in (4, 5) or x.ndim != weight.ndim:
        fail(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be (B, C, Z, Y, X) with "
            "(E, Cin, kz, ky, kx), or (B, C, Y, X) with (E, Cin, ky, kx)"
        )
    if x.dtype not in _FLOAT + _RAW:
        fail(f"x is {x.dtype}; it must be floating point, int16, uint16 or uint8")
    raw = x.dtype in _RAW
    if raw:
        _check_float(function, weight, weight, "weight")
        if x.device != weight.device:
            fail(f"x is on {x.device} but weight is on {weight.device}; move one")
    else:
        _check_float(function, x, weight, "x")
    flat = coefficients(windows, slope, intercept)
    per_channel = max(1, len(flat) // 4)
    if x.shape[1] * per_channel != weight.shape[1]:
        fail(f"weight takes {weight.shape[1]} channels but x has {x.shape[1]} channels of {per_channel} window(s) each")
    if mode not in ("zeros", "replicate", "reflect"):
        fail(f"padding_mode={mode!r} must be 'zeros', 'replicate' or 'reflect'")
    geometry = resolve(
        x.shape[2:], weight.shape[2:], stride=stride, padding=padding, dilation=dilation, function=function
    )
    if mode == "reflect":
        for n, pair in zip(geometry.size, geometry.padding, strict=True):
            if max(pair) >= n and max(pair):
                fail(f"padding_mode='reflect' needs padding {pair} below the {n} voxels of its axis")
    if path is not None:
        if path not in PATHS:
            fail(f"path={path!r} must be one of {', '.join(PATHS)}")
        if path == "matmul" and not geometry.tiles:
            fail("path='matmul' needs kernel == stride, dilation 1 and no padding; use 'im2col'")
        if backend == "triton":
            fail(f"path={path!r} is a torch path; leave backend='auto' or 'torch'")
        return x, geometry, flat, "torch"
    like = weight if raw else x
    if torch.is_autocast_enabled(x.device.type):
        like = like.new_empty(0, dtype=torch.get_autocast_dtype(x.device.type))
    resolved = resolve_backend(function, backend, like)
    return x, geometry, flat, "auto" if backend == "auto" and resolved == "triton" else resolved


def _check_rows(
    weight: Tensor,
    bias: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    prefix: Tensor | None,
) -> None:
    width = weight.shape[0]
    if norm not in (None, "layer", "rms"):
        raise ValueError(f"patch_embed: norm={norm!r} must be None, 'layer' or 'rms'")
    for name, row in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if row is not None and (row.shape != (width,) or not row.is_floating_point()):
            raise ValueError(f"patch_embed: {name} is {row.dtype} of shape {tuple(row.shape)}; it must be ({width},)")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"patch_embed: bias is {bias.dtype} but weight is {weight.dtype}; they must agree")
    if norm is None and (norm_weight is not None or norm_bias is not None):
        raise ValueError("patch_embed: norm_weight or norm_bias is given without norm='layer' or 'rms'")
    if not norm_eps >= 0:
        raise ValueError(f"patch_embed: norm_eps={norm_eps} must be at least 0")
    if prefix is not None and (prefix.ndim != 2 or prefix.shape[1] != width):
        raise ValueError(f"patch_embed: prefix has shape {tuple(prefix.shape)}; it must be (rows, {width})")


def _position(
    position: Tensor | Sequence[Tensor] | None, geometry: Geometry, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(table of all tokens, None, None) or one table for each of three axes, at the token grid."""
    if position is None:
        return None, None, None
    dims, width = len(geometry.grid), weight.shape[0]
    if isinstance(position, Tensor):
        if position.ndim != dims + 1 or position.shape[-1] != width:
            raise ValueError(
                f"patch_embed: position has shape {tuple(position.shape)}; it must be (*base grid, {width}) with "
                f"{dims} grid axes, or a sequence of {dims} tables (length, {width})"
            )
        return resample_positions(position, geometry.grid).flatten(0, -2), None, None
    if len(position) != dims or any(table.ndim != 2 or table.shape[1] != width for table in position):
        raise ValueError(f"patch_embed: position must be one table (length, {width}) for each of the {dims} axes")
    tables = [resample_positions(table, (wanted,)) for table, wanted in zip(position, geometry.grid, strict=True)]
    if dims == 2:
        tables.insert(0, torch.zeros_like(tables[0][:1]))
    return tables[0], tables[1], tables[2]
