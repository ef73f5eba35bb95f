"""Launches of the patch embedding kernels: tiles, slices, and the bytes and FLOP they come to.

Cost, forward: 2 N K E FLOP with K = C * taps; the volume and the weight are read, the tokens written, once each (a
voxel that several patches share is read again from the cache), and y too where the backward pass will need it.
The same for dweight, plus its float32 partial sums; the same for dx. `costs` counts.

Tiles come from configs/patch_embed.json, chosen by hand and checked entry by entry by
`benchmarks/compile_report.py --family patch_embed`. Tested in Triton's interpreter (float32, float16). Not yet run on
a GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, chip_of, nearest_arch
from medformer_kernels.patch_embed.geometry import Geometry
from medformer_kernels.patch_embed.kernels import (
    patch_embed_dw_kernel,
    patch_embed_dx_kernel,
    patch_embed_fwd_kernel,
    patch_embed_norm_bwd_kernel,
    patch_embed_norm_kernel,
)
from medformer_kernels.patch_embed.paths import fold_padding

__all__ = ["Cost", "Plan", "backward", "costs", "forward", "launch_plan", "unembed"]

# Widest row of tokens that a program of the first kernel holds whole, to normalise it on chip.
_NORM_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tiles of one launch; `slices` cut the tokens of one sample where they are summed over."""

    block_n: int
    block_k: int
    block_e: int
    """Columns of the product: widths, or channels in 'dx'."""
    num_warps: int
    num_stages: int
    slice_length: int = 0
    slices: int = 1

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def launch_plan(
    kernel: str, *, chip: Chip, channels: int, taps: int, width: int, itemsize: int, tokens: int, batch: int
) -> Plan:
    """How `kernel` ('fwd', 'dw', 'dx') is launched for one model and volume. Deterministic.

    Few channels have tiles of their own ('fwd_narrow', 'dw_narrow'): there every element has an address of its own to
    hold in registers.
    """
    narrow = kernel != "dx" and not is_wide(channels)
    table = _dispatch.load_configs("patch_embed")[f"{kernel}_narrow" if narrow else kernel]
    entries = table[nearest_arch(chip.arch, tuple(table))]
    columns = _block(channels if kernel == "dx" else width)
    fitting = [e for e in entries if e["itemsize"] == itemsize]
    entry = min((e for e in fitting if e["width"] >= columns), key=lambda e: e["width"], default=fitting[-1])
    block_e = min(columns, entry["width"])
    block_n, block_k = entry["block_n"], entry["block_k"]
    if kernel == "dx":
        block_k = min(block_k, _block(width))
    elif is_wide(channels):
        block_k = min(block_k, _block(channels))
    elif kernel == "fwd":
        block_k = min(block_k, max(16, triton.next_power_of_2(channels * taps)))
    plan = Plan(
        block_n=block_n,
        block_k=block_k,
        block_e=block_e,
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
    )
    if kernel != "dw":
        return plan
    programs = batch * _k_blocks(channels, taps, block_k) * -(-width // block_e)
    return _sliced(plan, tokens, -(-2 * chip.units // programs))


def _sliced(plan: Plan, tokens: int, wanted: int) -> Plan:
    """`wanted` slices of the tokens, but none shorter than 8 tiles."""
    slices = max(1, min(wanted, tokens // (8 * plan.block_n)))
    length = -(-tokens // slices)
    length = -(-length // plan.block_n) * plan.block_n
    return replace(plan, slice_length=length, slices=max(1, -(-tokens // length)))


def is_wide(channels: int) -> bool:
    """Enough channels to fill a tile at one tap."""
    return channels == 16 or channels >= 32


def _k_blocks(channels: int, taps: int, block_k: int) -> int:
    return taps * -(-channels // block_k) if is_wide(channels) else -(-channels * taps // block_k)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one launch does: operations, and bytes to and from memory (the weight not counted: every program finds it
    in the cache)."""

    flop: int
    bytes: int


def costs(
    *, chip: Chip, geometry: Geometry, batch: int, channels: int, width: int, itemsize: int, voxel_bytes: int
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass with a norm, from the launch plans themselves."""
    taps, tokens = math.prod(geometry.kernel), geometry.tokens
    rows, patch = batch * tokens, channels * taps
    volume = batch * channels * math.prod(geometry.size) * voxel_bytes
    row_bytes = rows * width * itemsize
    flop = 2 * rows * patch * width
    plan = launch_plan(
        "dw", chip=chip, channels=channels, taps=taps, width=width, itemsize=itemsize, tokens=tokens, batch=batch
    )
    partial = 4 * patch * width * plan.slices * batch
    passes = -(-width // plan.block_e)
    return {
        "fwd": Cost(flop=flop, bytes=volume + row_bytes),
        "norm_bwd": Cost(flop=0, bytes=3 * row_bytes),
        "dw": Cost(flop=flop, bytes=passes * volume + row_bytes + 2 * partial),
        "dx": Cost(flop=flop, bytes=volume + row_bytes),
    }


def _precision(x: Tensor) -> str:
    """float32 products run as three tf32 products on NVIDIA (24 bits), exactly elsewhere."""
    return "tf32x3" if x.dtype == torch.float32 and chip_of(x).arch.startswith("sm_") else "ieee"


@functools.lru_cache(maxsize=64)
def _device_coefficients(coefficients: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: a copy from the host would stop a CUDA graph from being captured."""
    return torch.tensor(coefficients, dtype=torch.float32, device=device)


def _model(geometry: Geometry, padding: Sequence[int], prefix: str = "") -> dict[str, int]:
    """Kernel, stride, padding and dilation as constexpr arguments; `prefix` renames DY where a pointer has the name."""
    names = [f"{letter}{axis}" for letter in "KSPD" for axis in "ZYX"]
    values = (*geometry.kernel, *geometry.stride, *padding, *geometry.dilation)
    return {prefix if name == "DY" and prefix else name: v for name, v in zip(names, values, strict=True)}


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


def _plan(kernel: str, like: Tensor, geometry: Geometry, channels: int, width: int, batch: int) -> Plan:
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


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants)


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
    tables = [_optional(table) for table in position]
    rows = [_optional(row) for row in (norm_weight, norm_bias)]
    blocks = -(-geometry.tokens // plan.block_n) * -(-width // plan.block_e)
    _launch(
        patch_embed_fwd_kernel, batch * blocks,
        x, _device_coefficients(tuple(coefficients), x.device) if coefficients else None, _by_tap_and_width(weight),
        _optional(bias), *(rows if on_chip else (None, None)), *(tables if on_chip else [None] * 3),
        tokens if on_chip else None, y, *strides, *geometry.size, *geometry.grid, offset, eps,
        C=channels, E=width, **_model(geometry, _padded(geometry)), **layout, MODE=mode,
        PADDED=any(geometry.flat_padding), WIDE=is_wide(channels), NORM=norm, PRECISION=_precision(weight),
        BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, BLOCK_E=plan.block_e, **plan.launch,
    )  # fmt: skip
    if not on_chip:
        block_e = _block(width)
        block_n = max(1, 4096 // block_e)
        _launch(
            patch_embed_norm_kernel, batch * -(-geometry.tokens // block_n),
            y, *rows, *tables, tokens, *geometry.grid, offset, eps,
            E=width, NORM=norm, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=4 if block_e <= 1024 else 8,
        )  # fmt: skip
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
    block_e = _block(width)
    plan = Plan(block_n=max(1, 2048 // block_e), block_k=0, block_e=block_e, num_warps=4, num_stages=1)
    plan = _sliced(plan, tokens, -(-4 * chip_of(y).units // batch))
    dy = torch.empty_like(y)
    partial = y.new_empty((batch * plan.slices, 3, width), dtype=torch.float32)
    _launch(
        patch_embed_norm_bwd_kernel, batch * plan.slices,
        dtokens, y, _optional(norm_weight), dy, partial, *dtokens.stride(), tokens, dtokens.shape[1] - tokens,
        plan.slice_length, plan.slices, eps,
        E=width, NORM=norm, BLOCK_N=plan.block_n, BLOCK_E=block_e, num_warps=4 if block_e <= 1024 else 8,
    )  # fmt: skip
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
    _launch(
        patch_embed_dw_kernel, batch * plan.slices * programs,
        x, _device_coefficients(tuple(coefficients), x.device) if coefficients else None, dy, partial,
        *strides, *geometry.size, *geometry.grid, *dy_strides, offset, plan.slice_length, plan.slices,
        C=channels, E=width, **_model(geometry, _padded(geometry), "DY_"), **layout, MODE=mode,
        PADDED=any(geometry.flat_padding), WIDE=is_wide(channels), **dy_layout,
        PRECISION=_precision(weight), BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, BLOCK_E=plan.block_e, **plan.launch,
    )  # fmt: skip
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
    _launch(
        patch_embed_dx_kernel, batch * programs,
        tokens, weight.permute(2, 3, 4, 0, 1).contiguous(), _optional(bias), out,
        *strides, offset, *geometry.size, *geometry.grid,
        C=channels, E=width, **_model(geometry, padding, "DY_"), **layout,
        PRECISION=_precision(tokens), BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, BLOCK_C=plan.block_e, **plan.launch,
    )  # fmt: skip
    return out


def unembed(tokens: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, path: str) -> Tensor:
    """(B, C, Z, Y, X) in the dtype of `tokens`: see `ops.patch_unembed`."""
    return _transposed(tokens, weight, bias, geometry, 0)
