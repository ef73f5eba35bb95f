"""Patch embedding by its definition: window, pad, convolve, normalise, add the position, token-major.

    y_n = bias + sum_{c, k} weight_ck window(x)_{c, n * stride - padding + k * dilation}
    tokens_n = norm(y_n) * norm_weight + norm_bias + position_n

`window` makes one channel of each intensity window: clamp((x * slope + intercept) * scale + shift, low, high), the
window index fastest; padding comes after it. NaN voxels propagate to every token whose patch holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.patch_embed.geometry import (
    Padding,
    PerAxis,
    Window,
    coefficients,
    resample_positions,
    resolve,
    unembed_size,
)

__all__ = ["apply_windows", "patch_embed_reference", "patch_unembed_reference"]


def apply_windows(x: Tensor, flat: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(B, C, *size) stored voxels to (B, C * windows, *size) in `dtype`; arithmetic in float32 at least."""
    x = x.to(torch.promote_types(dtype, torch.float32))
    if not flat:
        return x.to(dtype)
    channels = [(x * scale + shift).clamp(low, high) for scale, shift, low, high in zip(*[iter(flat)] * 4, strict=True)]
    return torch.stack(channels, 2).flatten(1, 2).to(dtype)


def pad(x: Tensor, padding: Sequence[tuple[int, int]], mode: str) -> Tensor:
    amounts = [voxels for pair in reversed(padding) for voxels in pair]
    if not any(amounts):
        return x
    return F.pad(x, amounts) if mode == "zeros" else F.pad(x, amounts, mode=mode)


def patch_embed_reference(
    x: Tensor,
    weight: Tensor,
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
    prefix: Tensor | None = None,
    windows: Sequence[Window | tuple[float, float]] | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> Tensor:
    """Tokens (B, prefix + N, E) of `x` (B, C, *size) in the dtype of `weight` (E, C * windows, *kernel)."""
    geometry = resolve(x.shape[2:], weight.shape[2:], stride=stride, padding=padding, dilation=dilation)
    x = pad(apply_windows(x, coefficients(windows, slope, intercept), weight.dtype), geometry.padding, padding_mode)
    conv = F.conv3d if x.ndim == 5 else F.conv2d
    y = conv(x, weight, bias, geometry.stride, 0, geometry.dilation).flatten(2).transpose(1, 2)
    width = (weight.shape[0],)
    if norm == "layer":
        y = F.layer_norm(y, width, norm_weight, norm_bias, norm_eps)
    elif norm == "rms":
        y = F.rms_norm(y, width, norm_weight, norm_eps)
        y = y if norm_bias is None else y + norm_bias
    if isinstance(position, Tensor):
        y = y + resample_positions(position, geometry.grid).flatten(0, -2).to(y.dtype)
    elif position is not None:
        for axis, table in enumerate(position):
            table = resample_positions(table, geometry.grid[axis : axis + 1]).to(y.dtype)
            shape = [1] * len(geometry.grid) + list(width)
            shape[axis] = geometry.grid[axis]
            y = y + table.view(shape).expand(*geometry.grid, *width).flatten(0, -2)
    return y if prefix is None else torch.cat([prefix.to(y.dtype).expand(x.shape[0], -1, -1), y], 1)


def patch_unembed_reference(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Sequence[int],
    size: Sequence[int] | None = None,
    stride: PerAxis,
    padding: Padding = 0,
    dilation: PerAxis = 1,
) -> Tensor:
    """Voxels (B, C, *size) of `tokens` (B, N, E): the transpose of `patch_embed` with the same weight, plus a bias."""
    kernel = weight.shape[2:]
    if size is None:
        size = unembed_size(grid, kernel, stride=stride, padding=padding, dilation=dilation)
    geometry = resolve(size, kernel, stride=stride, padding=padding, dilation=dilation)
    x = tokens.transpose(1, 2).unflatten(2, tuple(grid))
    conv = F.conv_transpose3d if x.ndim == 5 else F.conv_transpose2d
    out = conv(x, weight, None, geometry.stride, 0, 0, 1, geometry.dilation)
    for axis, ((before, _), wanted) in enumerate(zip(geometry.padding, geometry.size, strict=True), start=2):
        seen = out.shape[axis]
        out = out.narrow(axis, before, min(seen - before, wanted))
        if out.shape[axis] < wanted:  # voxels past the last whole patch
            shape = list(out.shape)
            shape[axis] = wanted - out.shape[axis]
            out = torch.cat([out, out.new_zeros(shape)], axis)
    return out if bias is None else out + bias.view(-1, *[1] * len(geometry.size))
