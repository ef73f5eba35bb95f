"""Patch embedding on any device in plain PyTorch, by four paths that give the same tokens.

    conv, conv_channels_last   the library's convolution
    im2col                     patches gathered into a matrix, slab by slab, then a matrix product
    matmul                     the same where patches tile the volume (kernel = stride): every voxel is gathered once

All but a plain convolution work on slabs of whole token rows: padding, intensity windows, the gathered matrix, the
normalisation and the position exist for one slab at a time, while it is in the cache. So the float copy of an int16
scan, and its windows, never exist whole, forward or backward. A weight gradient is summed over slabs in float32.

Volumes here always have three axes; (Z=1) stands for an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.patch_embed.geometry import Geometry
from medformer_kernels.patch_embed.reference import apply_windows

__all__ = ["PATHS", "backward", "forward", "library", "library_takes", "unembed"]

PATHS = ("conv", "conv_channels_last", "im2col", "matmul")

# What one slab may take: little enough to stay in the cache, and more for a convolution, whose calls cost more.
_SLAB_BYTES = {"im2col": 8 << 20, "matmul": 8 << 20, "conv": 32 << 20, "conv_channels_last": 32 << 20}
# Kernels at least this long along x are gathered patch by patch, shorter ones tap by tap.
_LONG_KERNEL = 8


@dataclass(frozen=True, kw_only=True)
class Slab:
    """Token planes z0..z1 by token rows y0..y1: consecutive tokens."""

    z0: int
    z1: int
    y0: int
    y1: int
    rows: slice
    grid: tuple[int, int, int]

    def span(self, geometry: Geometry) -> tuple[tuple[int, int], ...]:
        """First and last + 1 voxel of each axis, counted from the first padded voxel."""
        starts, stops = (self.z0, self.y0, 0), (self.z1, self.y1, self.grid[2])
        return tuple(
            (start * s, (stop - 1) * s + r)
            for start, stop, s, r in zip(starts, stops, geometry.stride, geometry.reach, strict=True)
        )


def slabs(geometry: Geometry, channels: int, width: int, itemsize: int, path: str) -> Iterator[Slab]:
    gz, gy, gx = geometry.grid
    patch = channels * math.prod(geometry.kernel)
    tokens = max(1, _SLAB_BYTES[path] // (itemsize * (patch + 2 * width)))
    planes = max(1, tokens // (gy * gx))
    lines = gy if planes > 1 else min(gy, max(1, tokens // gx))
    for z0 in range(0, gz, planes):
        z1 = min(z0 + planes, gz)
        for y0 in range(0, gy, lines):
            y1 = min(y0 + lines, gy)
            first = (z0 * gy + y0) * gx
            grid = (z1 - z0, y1 - y0, gx)
            yield Slab(z0=z0, z1=z1, y0=y0, y1=y1, rows=slice(first, first + math.prod(grid)), grid=grid)


def padded_indices(first: int, stop: int, before: int, size: int, mode: str) -> tuple[int, int, Tensor]:
    """(first voxel, last + 1, index into them) of the padded voxels first..stop-1 under 'replicate' or 'reflect'."""
    index = torch.arange(first, stop) - before
    if mode == "reflect":
        index = index.abs()
        index = size - 1 - (size - 1 - index).abs()
    index = index.clamp(0, size - 1)
    low, high = int(index.min()), int(index.max()) + 1
    return low, high, index - low


def load_slab(
    x: Tensor, slab: Slab, geometry: Geometry, mode: str, coefficients: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """(C * windows, z, y, x) of a slab of one sample (C, Z, Y, X): windowed, padded, in `dtype`."""
    amounts: list[int] = []
    gathers: list[tuple[int, Tensor]] = []
    for axis, (first, stop) in enumerate(slab.span(geometry)):
        size, before = geometry.size[axis], geometry.padding[axis][0]
        inside = first >= before and stop <= before + size
        if inside or mode == "zeros":
            low, high = min(max(first - before, 0), size), max(min(stop - before, size), 0)
            high = max(low, high)
            head = min(max(before - first, 0), stop - first)
            amounts = [head, stop - first - head - (high - low), *amounts]
        else:
            low, high, index = padded_indices(first, stop, before, size, mode)
            gathers.append((axis + 1, index.to(x.device)))
            amounts = [0, 0, *amounts]
        x = x.narrow(axis + 1, low, high - low)
    if coefficients or x.dtype != dtype:
        x = apply_windows(x[None], coefficients, dtype)[0]
    if any(amounts):
        x = F.pad(x, amounts)
    for axis, index in gathers:
        x = x.index_select(axis, index)
    return x


def _taps(slab: Tensor, grid: Sequence[int], geometry: Geometry) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """((kz, ky, kx), view (C, gz, gy, gx) of the voxels under that tap of every patch)."""
    (kz, ky, kx), strides, dilations = geometry.kernel, geometry.stride, geometry.dilation
    ends = [(g - 1) * s + 1 for g, s in zip(grid, strides, strict=True)]
    for tap in ((a, b, c) for a in range(kz) for b in range(ky) for c in range(kx)):
        view = slab
        for axis, (k, d, end, s) in enumerate(zip(tap, dilations, ends, strides, strict=True), start=1):
            view = view[(slice(None),) * axis + (slice(k * d, k * d + end, s),)]
        yield tap, view


def im2col(slab: Tensor, grid: Sequence[int], geometry: Geometry, buffer: Tensor | None = None) -> Tensor:
    """Patches (rows, C * kz * ky * kx) of a slab (C, z, y, x); with a `buffer` to write to, one more column of ones."""
    channels, kernel, rows = slab.shape[0], geometry.kernel, math.prod(grid)
    patch = channels * math.prod(kernel)
    if gathers_patches(geometry):
        steps = slab.stride()
        outer = [step * s for step, s in zip(steps[1:], geometry.stride, strict=True)]
        inner = [step * d for step, d in zip(steps[1:], geometry.dilation, strict=True)]
        strides = (*outer, steps[0], *inner)
        return slab.as_strided((*grid, channels, *kernel), strides, slab.storage_offset()).reshape(rows, patch)
    if buffer is None:
        columns = slab.new_empty((patch, rows))
    else:
        columns = buffer[: (patch + 1) * rows].view(patch + 1, rows)
        columns[patch] = 1
    by_tap = columns[:patch].view(channels, *kernel, *grid)
    for (a, b, c), view in _taps(slab, grid, geometry):
        by_tap[:, a, b, c].copy_(view)
    return columns.t()


def gathers_patches(geometry: Geometry) -> bool:
    """Patch by patch, the x axis of the kernel being the inner loop; else tap by tap, that of the grid."""
    return geometry.tiles or geometry.kernel[2] >= _LONG_KERNEL


def col2im(dcolumns: Tensor, dslab: Tensor, grid: Sequence[int], geometry: Geometry) -> None:
    """Add the rows of `dcolumns` (C * kz * ky * kx, rows) to the voxels that they were gathered from."""
    dcolumns = dcolumns.view(dslab.shape[0], *geometry.kernel, *grid)
    for (a, b, c), view in _taps(dslab, grid, geometry):
        view += dcolumns[:, a, b, c]


def _convolve(slab: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], geometry: Geometry) -> Tensor:
    """(B, E, *grid) of (B, C, Z, Y, X); an image runs as one."""
    if geometry.kernel[0] == 1 and geometry.stride[0] == 1 and slab.shape[2] == 1 and padding[0] == 0:
        stride, dilation = geometry.stride[1:], geometry.dilation[1:]
        return F.conv2d(slab[:, :, 0], weight[:, :, 0], bias, stride, padding[1:], dilation).unsqueeze(2)
    return F.conv3d(slab, weight, bias, geometry.stride, padding, geometry.dilation)


def library_takes(
    path: str, x: Tensor, geometry: Geometry, mode: str, coefficients: Sequence[float], dtype: torch.dtype
) -> bool:
    """The library's own convolution takes the volume as it is."""
    symmetric = all(before == after for before, after in geometry.padding)
    as_it_is = x.dtype == dtype and not coefficients and symmetric
    return path.startswith("conv") and as_it_is and (mode == "zeros" or not any(geometry.flat_padding))


def _project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    mode: str,
    coefficients: Sequence[float],
    path: str,
) -> Iterator[tuple[int, slice, Tensor]]:
    """(sample, token rows, y (rows, E), valid until the next) until all tokens are done."""
    width, channels, *_ = weight.shape
    size = weight.element_size()
    if path.startswith("conv"):
        layout = _layout(path)
        weight = weight.contiguous(memory_format=layout)
        for b in range(x.shape[0]):
            for slab in slabs(geometry, channels, width, size, path):
                voxels = load_slab(x[b], slab, geometry, mode, coefficients, weight.dtype)
                voxels = voxels[None].contiguous(memory_format=layout)
                yield b, slab.rows, _convolve(voxels, weight, bias, [0, 0, 0], geometry)[0].flatten(1).t()
        return
    work = list(slabs(geometry, channels, width, size, path))
    rows = max(slab.rows.stop - slab.rows.start for slab in work)
    # one buffer for all slabs: fresh memory costs more than what is written to it
    y_buffer = weight.new_empty((rows, width))
    columns, patch_buffer = weight.reshape(width, -1).t(), None
    if not gathers_patches(geometry):
        patch_buffer = weight.new_empty(rows * (columns.shape[0] + 1))
        columns = torch.cat([columns, (weight.new_zeros(width) if bias is None else bias)[None]])  # meets the ones
        bias = None
    for b in range(x.shape[0]):
        for slab in work:
            voxels = load_slab(x[b], slab, geometry, mode, coefficients, weight.dtype)
            patches = im2col(voxels, slab.grid, geometry, patch_buffer)
            y = y_buffer[: patches.shape[0]]
            if bias is None:
                torch.mm(patches, columns, out=y)
            else:
                torch.addmm(bias, patches, columns, out=y)
            yield b, slab.rows, y


def _layout(path: str) -> torch.memory_format:
    return torch.channels_last_3d if path == "conv_channels_last" else torch.contiguous_format


def _normalise(y: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight = None if weight is None else weight.to(y.dtype)
    bias = None if bias is None else bias.to(y.dtype)
    if norm == "layer":
        return F.layer_norm(y, (y.shape[-1],), weight, bias, eps)
    y = F.rms_norm(y, (y.shape[-1],), weight, eps)
    return y if bias is None else y + bias


def position_rows(position: Sequence[Tensor | None], grid: Sequence[int], rows: slice, like: Tensor) -> Tensor | None:
    """Position (rows, E) of some tokens: from the table of all tokens, or the sum of one table an axis."""
    first, *others = position
    if first is None:
        return None
    if others[0] is None or others[1] is None:
        return first[rows].to(like.dtype)
    n = torch.arange(rows.start, rows.stop, device=like.device)
    z, y, x = n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]
    return (first[z] + others[0][y] + others[1][x]).to(like.dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    position: Sequence[Tensor | None],
    prefix: Tensor | None,
    coefficients: Sequence[float],
    geometry: Geometry,
    mode: str,
    norm: str,
    eps: float,
    save: bool,
    path: str,
) -> tuple[Tensor, Tensor]:
    """(tokens, y): see `ops.patch_embed`."""
    if library_takes(path, x, geometry, mode, coefficients, weight.dtype):
        tokens, y = library(x, weight, bias, norm_weight, norm_bias, position, prefix, geometry, norm, eps, path)
        return tokens.contiguous(), y.contiguous() if save else y.new_empty(0)
    batch, width, offset = x.shape[0], weight.shape[0], 0 if prefix is None else prefix.shape[0]
    tokens = weight.new_empty((batch, offset + geometry.tokens, width))
    saved = weight.new_empty((batch, geometry.tokens, width) if save else (0,))
    if prefix is not None:
        tokens[:, :offset] = prefix
    for b, rows, y in _project(x, weight, bias, geometry, mode, coefficients, path):
        if save:
            saved[b, rows] = y
        if norm:
            y = _normalise(y, norm, norm_weight, norm_bias, eps)
        out = tokens[b, offset + rows.start : offset + rows.stop]
        rows_position = position_rows(position, geometry.grid, rows, tokens)
        if rows_position is None:
            out.copy_(y)
        else:
            torch.add(y, rows_position, out=out)
    return tokens, saved


def library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    position: Sequence[Tensor | None],
    prefix: Tensor | None,
    geometry: Geometry,
    norm: str,
    eps: float,
    path: str,
) -> tuple[Tensor, Tensor]:
    """(tokens, y before the norm) by the library's own convolution, in operations that autograd knows."""
    padding = [before for before, _ in geometry.padding]
    if path == "conv_channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    y = _convolve(x, weight, bias, padding, geometry).flatten(2).transpose(1, 2)
    tokens = _normalise(y, norm, norm_weight, norm_bias, eps) if norm else y
    rows = position_rows(position, geometry.grid, slice(0, geometry.tokens), tokens)
    if rows is not None:
        tokens = tokens + rows
    if prefix is not None:
        tokens = torch.cat([prefix.to(tokens.dtype).expand(x.shape[0], -1, -1), tokens], 1)
    return tokens, y


def norm_backward(
    dout: Tensor, y: Tensor, weight: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, dweight, dbias) of rows (n, E), in the compute dtype (float32 or float64)."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    y, dout = y.to(dtype), dout.to(dtype)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * scale
    g = dout if weight is None else dout * weight.to(dtype)
    dy = g - y * (g * y).mean(-1, keepdim=True)
    if norm == "layer":
        dy = dy - g.mean(-1, keepdim=True)
    return dy * scale, (dout * y).sum(0), dout.sum(0)


def backward(
    dtokens: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    coefficients: Sequence[float],
    geometry: Geometry,
    mode: str,
    norm: str,
    eps: float,
    needs: Sequence[bool],
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dnorm_weight, dnorm_bias): see `ops.patch_embed_backward`."""
    batch, (width, channels, *_) = x.shape[0], weight.shape
    need_dx, need_dw, need_db, *_ = needs
    exact = torch.promote_types(weight.dtype, torch.float32)
    offset = dtokens.shape[1] - geometry.tokens
    sums = torch.zeros(3, width, dtype=exact, device=x.device)  # dbias, dnorm_weight, dnorm_bias
    dweight = torch.zeros(width, weight[0].numel() if need_dw else 0, dtype=exact, device=x.device)
    columns = weight.reshape(width, -1)
    dx = x.new_empty(x.shape if need_dx else (0,))
    room = [n + sum(pair) for n, pair in zip(geometry.size, geometry.padding, strict=True)]
    gather = "matmul" if geometry.tiles else "im2col"
    by_library = library_takes(path, x, geometry, mode, coefficients, weight.dtype)
    whole_dy = dtokens[:, offset:] if not norm else torch.empty_like(y) if by_library else None
    for b in range(batch if norm or not by_library else 0):
        dpadded = torch.zeros((channels, *room), dtype=exact, device=x.device) if need_dx and not by_library else None
        for slab in slabs(geometry, channels, width, weight.element_size(), gather):
            dy = dtokens[b, offset + slab.rows.start : offset + slab.rows.stop]
            if norm:
                dy, dnorm_weight, dnorm_bias = norm_backward(dy, y[b, slab.rows], norm_weight, norm, eps)
                sums[1] += dnorm_weight
                sums[2] += dnorm_bias
            if by_library and whole_dy is not None:
                whole_dy[b, slab.rows] = dy
                continue
            if need_db:
                sums[0] += dy.sum(0, dtype=exact)
            dy = dy.to(weight.dtype)
            if need_dw:
                voxels = load_slab(x[b], slab, geometry, mode, coefficients, weight.dtype)
                dweight += dy.t() @ im2col(voxels, slab.grid, geometry)
            if dpadded is not None:
                at = (slice(None), *(slice(first, stop) for first, stop in slab.span(geometry)))
                col2im((columns.t() @ dy.t()).to(exact), dpadded[at], slab.grid, geometry)
        if dpadded is not None:
            dx[b] = fold_padding(dpadded, geometry, mode)
    if by_library and whole_dy is not None and (need_dx or need_dw or need_db):
        padding = [before for before, _ in geometry.padding]
        dy = whole_dy.transpose(1, 2).unflatten(2, geometry.grid)
        results = torch.ops.aten.convolution_backward(
            dy, x, weight, [width], geometry.stride, padding, geometry.dilation, False, [0, 0, 0], 1, needs[:3]
        )
        if need_dx:
            dx.copy_(results[0])
        if need_dw:
            dweight = results[1]
        if need_db:
            sums[0] = results[2]
    dtype = weight.dtype
    return (
        dx,
        dweight.view(weight.shape).to(dtype) if need_dw else dweight.new_empty(0, dtype=dtype),
        *((total if need else total[:0]).to(dtype, copy=True) for total, need in zip(sums, needs[2:], strict=True)),
    )  # type: ignore[return-value]


def fold_padding(padded: Tensor, geometry: Geometry, mode: str) -> Tensor:
    """Gradient (..., Z, Y, X) of a volume from that of the padded one: what padding copied is added back."""
    for axis, (before, after) in zip((-3, -2, -1), geometry.padding, strict=True):
        size = geometry.size[axis]
        inner = padded.narrow(axis, before, size)
        if mode != "zeros" and (before or after):
            inner = inner.clone()
            head, tail = padded.narrow(axis, 0, before), padded.narrow(axis, before + size, after)
            if mode == "replicate":
                inner.narrow(axis, 0, 1).add_(head.sum(axis, keepdim=True))
                inner.narrow(axis, size - 1, 1).add_(tail.sum(axis, keepdim=True))
            else:
                inner.narrow(axis, 1, before).add_(head.flip(axis))
                inner.narrow(axis, size - 1 - after, after).add_(tail.flip(axis))
        padded = inner
    return padded


def unembed(tokens: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, path: str) -> Tensor:
    """(B, C, Z, Y, X) in the dtype of `tokens`: see `ops.patch_unembed`."""
    batch, (width, channels, *_) = tokens.shape[0], weight.shape
    exact = torch.promote_types(tokens.dtype, torch.float32)
    room = [n + sum(pair) for n, pair in zip(geometry.size, geometry.padding, strict=True)]
    columns = weight.reshape(width, -1).t()
    out = tokens.new_empty((batch, channels, *geometry.size))
    for b in range(batch):
        if path.startswith("conv"):
            volume = tokens[b].t().reshape(1, width, *geometry.grid)
            seen = F.conv_transpose3d(volume, weight, None, geometry.stride, 0, 0, 1, geometry.dilation)[0]
            padded = F.pad(seen, [v for n, m in zip(room[::-1], seen.shape[:0:-1], strict=True) for v in (0, n - m)])
        else:
            padded = torch.zeros((channels, *room), dtype=exact, device=tokens.device)
            for slab in slabs(geometry, channels, width, tokens.element_size(), path):
                at = (slice(None), *(slice(first, stop) for first, stop in slab.span(geometry)))
                col2im((columns @ tokens[b, slab.rows].t()).to(exact), padded[at], slab.grid, geometry)
        volume = fold_padding(padded, geometry, "zeros")
        out[b] = volume if bias is None else volume + bias.view(-1, 1, 1, 1)
    return out
