"""Launches of the causal FAVOR+ kernels: slices that fill the chip, the states between them, their bytes and FLOP.

Tokens are cut into slices, one program each. Three passes, forward: the state of each slice alone (k, v), of all before
each (small), and the outputs (q, k, v, out); with a slice for each document, or enough heads to fill the chip, the
first two fall away. Backward walks twice, in order for dq and in reverse for dk and dv
(counted in benchmarks/compile_cases).

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
from medformer_kernels._dispatch import AttentionPlan, Chip, block, chip_of
from medformer_kernels._triton import constexprs, mask_rows, rows
from medformer_kernels.performer.causal_kernels import (
    performer_causal_dkv_kernel,
    performer_causal_dq_kernel,
    performer_causal_fwd_kernel,
    performer_scan_kernel,
)
from medformer_kernels.performer.fused import Slices, column_blocks, cut, merged_rows, meta, omega_rows, packed
from medformer_kernels.performer.kernels import Meta, performer_state_fwd_kernel

__all__ = ["backward", "forward", "launch_plan"]


def launch_plan(
    kernel: str, *, chip: Chip, num_features: int, width: int, itemsize: int, tokens: int, batch_heads: int
) -> AttentionPlan:
    """How `kernel` ('causal_fwd', 'causal_dq', 'causal_dkv') is launched: one program a slice walks all features."""
    return _dispatch.launch_plan(
        _dispatch.tile("performer", kernel, chip, width, itemsize), chip=chip, rows=num_features, tokens=tokens,
        batch_heads=batch_heads, sliced=True, rows_per_program=num_features,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, boundaries: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, H, N, Dv), log of its denominator (B, H, N), tops (B, 3, H, N)); see `ops.performer_causal`."""
    call = _Call(q, k, v, omega, key_padding_mask)
    walk = call.walk("causal_fwd", boundaries)
    values, lse, _ = _states(call, walk)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    out_lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tops = out_lse.new_empty((3, *out_lse.shape))
    arguments = (*call.inputs(walk), (values, lse), (tops.unbind(), out, out_lse), *call.sizes(walk))
    performer_causal_fwd_kernel[(call.batch_heads * walk.slices.count,)](*arguments, **call.options(walk))
    return out, out_lse, tops.transpose(0, 1)


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
    tops = tops.transpose(0, 1).contiguous()
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
        made, gradients = (tops.unbind(), out, out_lse), (delta, rows(dout), rows(dq), part)
        arguments = (*call.inputs(walk), (values, lse), made, gradients)
        performer_causal_dq_kernel[(call.batch_heads * walk.slices.count,)](
            *arguments, *call.sizes(walk), **call.options(walk, of_omega)
        )
        if of_omega:
            domega += part.sum(2)

        walk = call.walk("causal_dkv", boundaries)
        values, lse, extra = _states(call, walk, (out_lse, delta, dout))
        part = call.omega_parts(walk, of_omega)
        made, gradients = (tops.unbind(), out_lse), (delta, rows(dout), rows(dk), rows(dv), part)
        arguments = (*call.inputs(walk), (values, lse, extra), made, gradients)
        performer_causal_dkv_kernel[(call.batch_heads * walk.slices.count,)](
            *arguments, *call.sizes(walk), **call.options(walk, of_omega)
        )
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

    plan: AttentionPlan
    slices: Slices


class _Call:
    """What the launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None) -> None:
        self.q, self.k, self.v = q, k, v
        self.omega = packed(omega, q.dtype)
        self.has_mask = key_padding_mask is not None
        self.mask = mask_rows(key_padding_mask, q)
        self.groups = q.shape[1] // k.shape[1]
        self.batch_heads, self.tokens = q.shape[0] * q.shape[1], q.shape[2]
        self.num_features, self.width, self.width_v = omega.shape[-2], q.shape[-1], v.shape[-1]
        self.chip = chip_of(q)

    def inputs(self, walk: _Walk) -> tuple[Any, ...]:
        inputs = (rows(self.q), rows(self.k), rows(self.v), omega_rows(self.omega), self.mask)
        return inputs, walk.slices.table

    def sizes(self, walk: _Walk) -> tuple[Any, ...]:
        heads, plan = self.q.shape[1], walk.plan
        sizes = (heads, self.groups, self.tokens, self.num_features, plan.slice_length, walk.slices.count)
        return (*sizes, self.width**-0.25)

    def options(self, walk: _Walk, of_omega: bool = False) -> dict[str, Any]:
        flags: dict[str, Any] = {"HAS_MASK": self.has_mask, "VARLEN": walk.slices.varlen, "OF_OMEGA": of_omega}
        if self.q.dtype == torch.float32:
            flags["PRECISION"] = "ieee"  # three tf32 products do not fit in the registers
        elif self.q.dtype == torch.float16 and self.chip.arch.startswith("sm_"):
            flags["RANGED_PRECISION"] = "tf32"  # as many bits as float16, with the range of float32
        return {"META": constexprs(meta(self.q, self.width_v, walk.plan, **flags)), **walk.plan.launch}

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
    mask = call.mask
    if queries:
        row_lse, delta, y = queries
        x, groups, mask = call.q, 1, mask_rows(None, call.q)
    tile = _dispatch.tile("performer", "state_fwd", call.chip, max(call.width, call.width_v), x.element_size())
    block_m = min(tile["block_m"], block(call.num_features))
    plan = AttentionPlan(
        block_m=block_m, block_n=tile["block_n"], num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        slice_length=walk.plan.slice_length, slices=slices.count, columns=tile.get("columns", tile["width"]),
    )  # fmt: skip
    programs = call.batch_heads * slices.count * -(-call.num_features // block_m) * column_blocks(call.width_v, plan)
    flags = {"HAS_MASK": call.has_mask and not queries, "QUERIES": queries is not None, "VARLEN": slices.varlen}
    arguments = (rows(x), rows(y), omega_rows(call.omega), mask, slices.table, (row_lse, delta), (values, lse, extra))
    sizes = (call.q.shape[1], groups, *call.sizes(walk)[2:])
    constants = meta(x, call.width_v, plan, CARRIED=True, **flags)
    performer_state_fwd_kernel[(programs,)](*arguments, *sizes, META=constexprs(constants), **plan.launch)
    merged = merged_rows(call.width_v)
    arguments = (values, lse, extra, slices.table, call.num_features, slices.count)
    constants = Meta(
        DV=call.width_v, BLOCK_M=merged, BLOCK_DV=block(call.width_v), REVERSE=bool(queries), VARLEN=slices.varlen
    )
    programs = call.batch_heads * -(-call.num_features // merged)
    performer_scan_kernel[(programs,)](*arguments, META=constexprs(constants), num_warps=4)
    return values, lse, extra
