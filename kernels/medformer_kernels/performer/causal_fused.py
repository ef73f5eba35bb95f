"""Launches of the causal FAVOR+ kernels: slices that fill the chip, the states between them, their bytes and FLOP.

Tokens are cut into slices, one program each. Three passes, forward: the state of each slice alone (k, v), of all before
each (small), and the outputs (q, k, v, out); with a slice for each document, or enough heads to fill the chip, the
first two fall away. Backward walks twice, in order for dq and in reverse for dk and dv (`costs` counts).

Tested in Triton's interpreter (float32, float16) and compiled ahead of time for every tile shipped
(`benchmarks/compile_report.py`). Not yet run on a GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, Plan, block, chip_of, mask_arguments
from medformer_kernels.performer.causal_kernels import (
    performer_causal_dkv_kernel,
    performer_causal_dq_kernel,
    performer_causal_fwd_kernel,
    performer_scan_kernel,
)
from medformer_kernels.performer.fused import (
    Cost,
    Slices,
    column_blocks,
    common,
    cut,
    merged_rows,
    omega_strides,
    packed,
)
from medformer_kernels.performer.kernels import performer_state_fwd_kernel

__all__ = ["backward", "costs", "forward", "launch_plan"]


def launch_plan(
    kernel: str, *, chip: Chip, num_features: int, width: int, itemsize: int, tokens: int, batch_heads: int
) -> Plan:
    """How `kernel` ('causal_fwd', 'causal_dq', 'causal_dkv') is launched: one program a slice walks all features."""
    return _dispatch.launch_plan(
        _dispatch.tile("performer", kernel, chip, width, itemsize), chip=chip, rows=num_features, tokens=tokens,
        batch_heads=batch_heads, sliced=True, rows_per_program=num_features,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, boundaries: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, H, N, Dv), log of its denominator (B, H, N), tops (3, B, H, N)); see `ops.performer_causal`."""
    call = _Call(q, k, v, omega, key_padding_mask)
    walk = call.walk("causal_fwd", boundaries)
    values, lse, _ = _states(call, walk)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    out_lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tops = out_lse.new_empty((3, *out_lse.shape))
    performer_causal_fwd_kernel[(call.batch_heads * walk.slices.count,)](
        q, k, v, call.omega, call.mask, walk.slices.table, values, lse, out, out_lse, *tops.unbind(),
        *call.strides, *call.sizes(walk), **call.options(walk),
    )  # fmt: skip
    return out, out_lse, tops


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    boundaries: Sequence[int],
    out: Tensor,
    out_lse: Tensor,
    tops: Tensor,
    dout: Tensor,
    with_omega: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, domega (B, H, M, D), empty unless `with_omega`); see `ops.performer_causal_backward`."""
    call = _Call(q, k, v, omega, key_padding_mask)
    dq, delta = torch.empty_like(q), torch.empty_like(out_lse)
    # Heads that share a key head each have their part of dk and dv, in float32.
    shared = {"dtype": torch.float32} if call.groups > 1 else {}
    dk = torch.empty_like(k) if call.groups == 1 else k.new_empty((*q.shape[:3], k.shape[3]), **shared)
    dv = torch.empty_like(v) if call.groups == 1 else v.new_empty((*q.shape[:3], v.shape[3]), **shared)
    domega = out_lse.new_zeros((*q.shape[:2], *omega.shape[-2:]) if with_omega else (0,))
    for of_omega in (False, True) if with_omega else (False,):
        walk = call.walk("causal_dq", boundaries)
        values, lse, _ = _states(call, walk)
        part = call.omega_parts(walk, of_omega)
        performer_causal_dq_kernel[(call.batch_heads * walk.slices.count,)](
            q, k, v, call.omega, call.mask, walk.slices.table, values, lse, *tops.unbind(), out, out_lse, delta, dout,
            dq, part, *call.strides, *dout.stride(), *dq.stride(), *call.sizes(walk), OF_OMEGA=of_omega,
            **call.options(walk),
        )  # fmt: skip
        if of_omega:
            domega += part.sum(2)

        walk = call.walk("causal_dkv", boundaries)
        values, lse, extra = _states(call, walk, (out_lse, delta, dout))
        part = call.omega_parts(walk, of_omega)
        performer_causal_dkv_kernel[(call.batch_heads * walk.slices.count,)](
            q, k, v, call.omega, call.mask, walk.slices.table, values, lse, extra, *tops.unbind(), out_lse, delta, dout,
            dk, dv, part, *call.strides, *dout.stride(), *dk.stride(), *dv.stride(), *call.sizes(walk),
            OF_OMEGA=of_omega, **call.options(walk),
        )  # fmt: skip
        if of_omega:
            domega = (domega + part.sum(2)) * q.shape[-1] ** -0.25
    if call.groups > 1:
        dk, dv = (
            torch.empty_like(like).copy_(x.unflatten(1, (-1, call.groups)).sum(2)) for x, like in ((dk, k), (dv, v))
        )
    return dq, dk, dv, domega


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """The slices of one launch."""

    plan: Plan
    slices: Slices


class _Call:
    """What the launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None) -> None:
        self.q, self.k, self.v = q, k, v
        self.omega = packed(omega, q.dtype)
        self.has_mask = key_padding_mask is not None
        self.mask, *self.mask_strides = mask_arguments(key_padding_mask, q)
        self.groups = q.shape[1] // k.shape[1]
        self.batch_heads, self.tokens = q.shape[0] * q.shape[1], q.shape[2]
        self.num_features, self.width, self.width_v = omega.shape[-2], q.shape[-1], v.shape[-1]
        self.chip = chip_of(q)

    @property
    def strides(self) -> tuple[int, ...]:
        inputs = (*self.q.stride(), *self.k.stride(), *self.v.stride())
        return (*inputs, *omega_strides(self.omega), *self.mask_strides)

    def sizes(self, walk: _Walk) -> tuple[Any, ...]:
        return (
            self.q.shape[1], self.groups, self.tokens, self.num_features, self.width, self.width_v,
            walk.plan.slice_length, walk.slices.count, self.width**-0.25,
        )  # fmt: skip

    def options(self, walk: _Walk) -> dict[str, Any]:
        options = common(self.q, self.width_v, walk.plan)
        ranged = "ieee"
        if self.q.dtype == torch.float32:
            options["PRECISION"] = "ieee"  # three tf32 products do not fit in the registers
        elif self.q.dtype == torch.float16 and self.chip.arch.startswith("sm_"):
            ranged = "tf32"  # as many bits as float16, with the range of float32
        return options | {
            "BLOCK_N": walk.plan.block_n, "HAS_MASK": self.has_mask, "VARLEN": walk.slices.varlen,
            "RANGED_PRECISION": ranged,
        }  # fmt: skip

    def walk(self, kernel: str, boundaries: Sequence[int]) -> _Walk:
        plan = launch_plan(
            kernel, chip=self.chip, num_features=self.num_features, width=max(self.width, self.width_v),
            itemsize=self.q.element_size(), tokens=self.tokens, batch_heads=self.batch_heads,
        )  # fmt: skip
        return _Walk(plan=plan, slices=cut(boundaries, plan.slice_length, self.q))

    def omega_parts(self, walk: _Walk, with_omega: bool) -> Tensor:
        shape = (*self.q.shape[:2], walk.slices.count, self.num_features, self.width)
        return self.q.new_zeros(shape if with_omega else (0,), dtype=torch.float32)


def _states(
    call: _Call, walk: _Walk, queries: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, lse in base 2, extra) before each slice: of keys; or after it, of `queries` (out_lse, delta, dout)."""
    slices = walk.slices
    shape = (*call.q.shape[:2], slices.count, call.num_features)
    if slices.whole:
        values = call.q.new_zeros((*shape, call.width_v), dtype=torch.float32)
        return values, values.new_full(shape, -math.inf), values.new_zeros(shape)
    values = call.q.new_empty((*shape, call.width_v), dtype=torch.float32)
    lse = values.new_empty(shape)
    extra = values.new_empty(shape) if queries else lse
    x, y, groups, row_lse, delta = call.k, call.v, call.groups, lse, lse
    mask, mask_strides = call.mask, call.mask_strides
    if queries:
        row_lse, delta, y = queries
        x, groups, mask, mask_strides = call.q, 1, call.q, (0, 0)
    tile = _dispatch.tile("performer", "state_fwd", call.chip, max(call.width, call.width_v), x.element_size())
    block_m = min(tile["block_m"], block(call.num_features))
    plan = Plan(
        block_m=block_m, block_n=tile["block_n"], num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        slice_length=walk.plan.slice_length, slices=slices.count, columns=tile.get("columns", tile["width"]),
    )  # fmt: skip
    programs = call.batch_heads * slices.count * -(-call.num_features // block_m) * column_blocks(call.width_v, plan)
    performer_state_fwd_kernel[(programs,)](
        x, y, call.omega, mask, slices.table, row_lse, delta, values, lse, extra,
        *x.stride(), *y.stride(), *omega_strides(call.omega), *mask_strides,
        call.q.shape[1], groups, call.tokens, call.num_features, call.width, call.width_v, plan.slice_length,
        plan.slices, call.width**-0.25,
        BLOCK_S=plan.block_n, HAS_MASK=call.has_mask and not queries, WITH_MAX=False, CARRIED=True,
        QUERIES=queries is not None, VARLEN=slices.varlen, **common(x, call.width_v, plan),
    )  # fmt: skip
    rows = merged_rows(call.width_v)
    performer_scan_kernel[(call.batch_heads * -(-call.num_features // rows),)](
        values, lse, extra, slices.table, call.num_features, call.width_v, slices.count,
        BLOCK_M=rows, BLOCK_DV=block(call.width_v), REVERSE=queries is not None, VARLEN=slices.varlen, num_warps=4,
    )  # fmt: skip
    return values, lse, extra


def costs(
    *, chip: Chip, batch_heads: int, tokens: int, num_features: int, width: int, width_v: int, itemsize: int
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass, from the launch plans themselves; of heads no wider than a tile.

    A program's own state is not counted: read and written once a chunk, it stays in the cache (2 programs a
    multiprocessor x M (Dv + 1) float32 numbers, 18 MB on an H200 with M=256 and Dv=64).
    """
    rows, result = batch_heads * tokens, {}
    partial = batch_heads * num_features * (width_v + 1) * 4
    pair = (width + width_v) * itemsize
    state = _dispatch.tile("performer", "state_fwd", chip, max(width, width_v), itemsize)
    state_passes = -(-num_features // state["block_m"])
    passes = {
        # kernel: (widths of its products with the features, exponentials a feature, products of a chunk's features and
        # of its values, bytes a token)
        "causal_fwd": (2 * (width + width_v), 4, 1, 1, 2 * pair + 16),
        "causal_dq": (3 * width + 2 * width_v, 4, 1, 1, 3 * pair + width_v * itemsize + 20),
        "causal_dkv": (5 * width + 3 * width_v, 7, 2, 2, 3 * pair + 20),
    }
    for kernel, (widths, exponentials, products, small, moved) in passes.items():
        plan = launch_plan(
            kernel, chip=chip, num_features=num_features, width=max(width, width_v), itemsize=itemsize, tokens=tokens,
            batch_heads=batch_heads,
        )  # fmt: skip
        if plan.slices > 1:
            read = rows * (plan.slices - 1) // plan.slices  # nobody reads the state of the last slice
            result[f"{kernel} states"] = Cost(
                flop=2 * read * num_features * (width + width_v), exponentials=read * num_features,
                bytes=state_passes * read * (pair + 8 * (kernel == "causal_dkv")) + 3 * plan.slices * partial,
            )  # fmt: skip
        result[kernel] = Cost(
            flop=2 * rows * (num_features * (widths + products * plan.block_n) + small * plan.block_n * width_v),
            exponentials=rows * (num_features * exponentials + plan.block_n),
            bytes=rows * moved + plan.slices * partial,
        )
    return result
