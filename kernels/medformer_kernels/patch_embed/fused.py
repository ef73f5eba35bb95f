"""Launches of the patch embedding kernels: tiles and slices.

Cost, forward: 2 N K E FLOP with K = C * taps; the volume and the weight are read, the tokens written, once each (a
voxel that several patches share is read again from the cache), and y too where the backward pass will need it.
The same for dweight, plus its float32 partial sums; the same for dx. benchmarks/compile_cases counts.

Tiles come from configs/patch_embed.json, chosen by hand and checked entry by entry by
`benchmarks/compile_report.py --family patch_embed`. Tested in Triton's interpreter (float32, float16). Not yet run on
a GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, Plan, block, chip_of, cut, parts_for, precision
from medformer_kernels._operators import constants
from medformer_kernels._triton import constexprs
from medformer_kernels.patch_embed.geometry import Geometry
from medformer_kernels.patch_embed.kernels import (
    Meta,
    patch_embed_dw_kernel,
    patch_embed_dx_kernel,
    patch_embed_fwd_kernel,
    patch_embed_norm_bwd_kernel,
    patch_embed_norm_kernel,
)
from medformer_kernels.patch_embed.paths import fold_padding

__all__ = ["backward", "forward", "launch_plan", "unembed"]

# Widest row of tokens that a program of the first kernel holds whole, to normalise it on chip.
_NORM_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class PatchPlan(Plan):
    """Tiles of one launch; slices cut the tokens of one sample where they are summed over."""

    block_n: int
    block_k: int
    block_e: int
    """Columns of the product: widths, or channels in 'dx'."""


def launch_plan(
    kernel: str, *, chip: Chip, channels: int, taps: int, width: int, itemsize: int, tokens: int, batch: int
) -> PatchPlan:
    """How `kernel` ('fwd', 'dw', 'dx') is launched for one model and volume. Deterministic.

    Few channels have tiles of their own ('fwd_narrow', 'dw_narrow'): there every element has an address of its own to
    hold in registers.
    """
    narrow = kernel != "dx" and not is_wide(channels)
    entries = _dispatch.tiles("patch_embed", f"{kernel}_narrow" if narrow else kernel, chip)
    columns = block(channels if kernel == "dx" else width)
    fitting = [e for e in entries if e["itemsize"] == itemsize]
    entry = min((e for e in fitting if e["width"] >= columns), key=lambda e: e["width"], default=fitting[-1])
    block_e = min(columns, entry["width"])
    block_n, block_k = entry["block_n"], entry["block_k"]
    if kernel == "dx":
        block_k = min(block_k, block(width))
    elif is_wide(channels):
        block_k = min(block_k, block(channels))
    elif kernel == "fwd":
        block_k = min(block_k, block(channels * taps))
    plan = PatchPlan(
        block_n=block_n,
        block_k=block_k,
        block_e=block_e,
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
    )
    if kernel != "dw":
        return plan
    programs = batch * _k_blocks(channels, taps, block_k) * -(-width // block_e)
    slice_length, slices = cut(tokens, block_n, parts_for(chip, programs))
    return replace(plan, slice_length=slice_length, slices=slices)


def is_wide(channels: int) -> bool:
    """Enough channels to fill a tile at one tap."""
    return channels == 16 or channels >= 32


def _k_blocks(channels: int, taps: int, block_k: int) -> int:
    return taps * -(-channels // block_k) if is_wide(channels) else -(-channels * taps // block_k)


def _device_coefficients(coefficients: Sequence[float], device: torch.device) -> Tensor | None:
    return constants(coefficients, torch.float32, device) if coefficients else None


def _model(geometry: Geometry, padding: Sequence[int]) -> dict[str, int]:
    """Kernel, stride, padding and dilation as constants."""
    names = [f"{letter}{axis}" for letter in "KSPD" for axis in "ZYX"]
    values = (*geometry.kernel, *geometry.stride, *padding, *geometry.dilation)
    return dict(zip(names, values, strict=True))


def _volume(x: Tensor, coefficients: Sequence[float]) -> tuple[list[int], dict[str, Any]]:
    """(strides in units of the alignment, what the compiler may know of the layout)."""
    unit = "c" if x.stride(1) == 1 and x.shape[1] > 1 else "x" if x.stride(4) == 1 or x.shape[4] == 1 else ""
    others = [x.stride(axis) for axis in range(5) if axis != {"c": 1, "x": 4}.get(unit)]
    vector = 16 // x.element_size()
    alignment = vector if unit == "c" and all(stride % vector == 0 for stride in others) else 1
    strides = [stride // alignment for stride in x.stride()]
    return strides, {"X_UNIT": unit, "ALIGNMENT": alignment, "WINDOWS": max(1, len(coefficients) // 4)}


def _rows(dy: Tensor) -> tuple[list[int], dict[str, Any]]:
    """(strides of tokens in units of the alignment, what the compiler may know of them)."""
    vector = 16 // dy.element_size()
    unit = dy.stride(2) == 1
    alignment = vector if unit and dy.stride(0) % vector == 0 and dy.stride(1) % vector == 0 else 1
    strides = [dy.stride(0) // alignment, dy.stride(1) // alignment, dy.stride(2)]
    return strides, {"DY_UNIT": unit, "DY_ALIGNMENT": alignment}


def _padded(geometry: Geometry) -> list[int]:
    return [before for before, _ in geometry.padding]


def _plan(kernel: str, like: Tensor, geometry: Geometry, channels: int, width: int, batch: int) -> PatchPlan:
    return launch_plan(
        kernel,
        chip=chip_of(like),
        channels=channels,
        taps=math.prod(geometry.kernel),
        width=width,
        itemsize=like.element_size(),
        tokens=geometry.tokens,
        batch=batch,
    )


def _warps(columns: int) -> int:
    """Of the kernels that hold whole rows."""
    return 4 if columns <= 1024 else 8


def _product(weight: Tensor, geometry: Geometry, plan: PatchPlan) -> dict[str, Any]:
    """Constants of the product of patches and weight (E, C, ...)."""
    width, channels = weight.shape[:2]
    flags = {"PADDED": any(geometry.flat_padding), "WIDE": is_wide(channels), "PRECISION": precision(weight)}
    return {"C": channels, "E": width, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, **flags}


def _optional(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _by_tap_and_width(weight: Tensor) -> Tensor:
    """(patch elements, E) in the order in which the kernels walk them; a copy of the weight costs nothing."""
    width, channels = weight.shape[:2]
    if is_wide(channels):
        return weight.permute(2, 3, 4, 1, 0).reshape(-1, width).contiguous()
    return weight.reshape(width, -1).t().contiguous()


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
    batch, (width, channels, *_), offset = x.shape[0], weight.shape, 0 if prefix is None else prefix.shape[0]
    plan = _plan("fwd", weight, geometry, channels, width, batch)
    tokens = weight.new_empty((batch, offset + geometry.tokens, width))
    if prefix is not None:
        tokens[:, :offset] = prefix
    on_chip = not norm or width <= min(plan.block_e, _NORM_WIDTH)
    y = weight.new_empty((batch, geometry.tokens, width)) if save or not on_chip else None
    strides, layout = _volume(x, coefficients)
    tables = tuple(_optional(table) for table in position)
    rows = (_optional(norm_weight), _optional(norm_bias))
    blocks = -(-geometry.tokens // plan.block_n) * -(-width // plan.block_e)
    inputs = (x, _device_coefficients(coefficients, x.device), _by_tap_and_width(weight), _optional(bias))
    epilogue = (rows, tables, tokens) if on_chip else ((None, None), (None, None, None), None)
    sizes = (*strides, *geometry.size, *geometry.grid, offset, eps)
    flags = {"MODE": mode, "NORM": norm, **_product(weight, geometry, plan)}
    constants = Meta(BLOCK_E=plan.block_e, **_model(geometry, _padded(geometry)), **layout, **flags)
    patch_embed_fwd_kernel[(batch * blocks,)](*inputs, *epilogue, y, *sizes, META=constexprs(constants), **plan.launch)
    if not on_chip:
        block_e = block(width)
        block_n = max(1, 4096 // block_e)
        constants = Meta(E=width, NORM=norm, BLOCK_N=block_n, BLOCK_E=block_e)
        patch_embed_norm_kernel[(batch * -(-geometry.tokens // block_n),)](
            y,
            rows,
            tables,
            tokens,
            *geometry.grid,
            offset,
            eps,
            META=constexprs(constants),
            num_warps=4 if block_e <= 1024 else 8,
        )
    return tokens, y if save and y is not None else tokens.new_empty(0)


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
    tokens = geometry.tokens
    need_dx, need_dw, need_db, need_dnw, need_dnb = needs
    offset = dtokens.shape[1] - tokens
    empty = weight.new_empty(0)
    dy, dnorm_weight, dnorm_bias, dbias = dtokens, empty, empty.clone(), empty.clone()
    if norm:
        dy, sums = _norm_backward(dtokens, y, norm_weight, norm, eps)
        dnorm_weight, dnorm_bias, dbias = (row.to(weight.dtype, copy=True) for row in sums)
        offset = 0
    elif need_db:
        dbias = dtokens[:, offset:].sum((0, 1), dtype=torch.float32).to(weight.dtype)
    dweight = _dweight(x, dy, weight, coefficients, geometry, mode, offset) if need_dw else empty.clone()
    dx = x.new_empty(0)
    if need_dx:
        seen = geometry
        if mode != "zeros" and any(geometry.flat_padding):
            room = tuple(n + sum(pair) for n, pair in zip(geometry.size, geometry.padding, strict=True))
            seen = replace(geometry, size=room, padding=((0, 0),) * 3)
        dx = _transposed(dy, weight, None, seen, offset)
        if seen is not geometry:
            dx = fold_padding(dx, geometry, mode).contiguous()
    return (
        dx,
        dweight,
        dbias if need_db else empty.clone(),
        dnorm_weight if need_dnw else empty.clone(),
        dnorm_bias if need_dnb else empty.clone(),
    )


def _norm_backward(
    dtokens: Tensor, y: Tensor, norm_weight: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """(dy, sums (3, E) of dtokens xhat, dtokens and dy)."""
    batch, tokens, width = y.shape
    block_e = block(width)
    block_n = max(1, 2048 // block_e)
    slice_length, slices = cut(tokens, block_n, -(-4 * chip_of(y).units // batch))
    dy = torch.empty_like(y)
    partial = y.new_empty((batch * slices, 3, width), dtype=torch.float32)
    tensors = (dtokens, y, _optional(norm_weight), dy, partial)
    sizes = (*dtokens.stride(), tokens, dtokens.shape[1] - tokens, slice_length, slices, eps)
    constants = Meta(E=width, NORM=norm, BLOCK_N=block_n, BLOCK_E=block_e)
    launch = {"META": constexprs(constants), "num_warps": _warps(block_e)}
    patch_embed_norm_bwd_kernel[(batch * slices,)](*tensors, *sizes, **launch)
    return dy, partial.sum(0)


def _dweight(
    x: Tensor, dy: Tensor, weight: Tensor, coefficients: Sequence[float], geometry: Geometry, mode: str, offset: int
) -> Tensor:
    batch, (width, channels, *kernel) = x.shape[0], weight.shape
    plan = _plan("dw", weight, geometry, channels, width, batch)
    strides, layout = _volume(x, coefficients)
    dy_strides, dy_layout = _rows(dy)
    patch = channels * math.prod(kernel)
    partial = weight.new_empty((batch * plan.slices, patch, width), dtype=torch.float32)
    programs = _k_blocks(channels, math.prod(kernel), plan.block_k) * -(-width // plan.block_e)
    tensors = (x, _device_coefficients(coefficients, x.device), dy, partial)
    sizes = (*strides, *geometry.size, *geometry.grid, *dy_strides, offset, plan.slice_length, plan.slices)
    flags = {"MODE": mode, "BLOCK_E": plan.block_e, **dy_layout, **_product(weight, geometry, plan)}
    constants = Meta(**_model(geometry, _padded(geometry)), **layout, **flags)
    patch_embed_dw_kernel[(batch * plan.slices * programs,)](
        *tensors, *sizes, META=constexprs(constants), **plan.launch
    )
    total = partial.sum(0).to(weight.dtype)
    if is_wide(channels):
        return total.view(*kernel, channels, width).permute(4, 3, 0, 1, 2).contiguous()
    return total.t().reshape(weight.shape).contiguous()


def _transposed(tokens: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, offset: int) -> Tensor:
    batch, (width, channels, *_) = tokens.shape[0], weight.shape
    plan = _plan("dx", tokens, geometry, channels, width, batch)
    out = tokens.new_empty((batch, channels, *geometry.size))
    padding = _padded(geometry)
    strides, layout = _rows(tokens)
    cells = math.prod(-(-(n + p) // s) for n, p, s in zip(geometry.size, padding, geometry.stride, strict=True))
    programs = math.prod(geometry.stride) * -(-cells // plan.block_n) * -(-channels // plan.block_e)
    tensors = (tokens, weight.permute(2, 3, 4, 0, 1).contiguous(), _optional(bias), out)
    blocks = {"BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "BLOCK_C": plan.block_e}
    flags = {"PRECISION": precision(tokens), **layout, **blocks}
    constants = Meta(C=channels, E=width, **_model(geometry, padding), **flags)
    sizes = (*strides, offset, *geometry.size, *geometry.grid)
    patch_embed_dx_kernel[(batch * programs,)](*tensors, *sizes, META=constexprs(constants), **plan.launch)
    return out


def unembed(tokens: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, path: str) -> Tensor:
    """(B, C, Z, Y, X) in the dtype of `tokens`: see `ops.patch_unembed`."""
    return _transposed(tokens, weight, bias, geometry, 0)
