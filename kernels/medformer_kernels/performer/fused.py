"""Launches of the FAVOR+ kernels: tiles and slices.

Cost, forward: 8 B H N M D FLOP and 2 B H N M exponentials; q, k, v and out pass through memory once, plus a float32 a
query and the partial states of `Plan.slices`. Backward: 18 B H N M D FLOP, 4 B H N M exponentials
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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import AttentionPlan, Chip, block, chip_of, precision
from medformer_kernels._triton import Rows, constexprs, mask_rows, rows
from medformer_kernels.performer.backward_kernels import (
    performer_omega_kernel,
    performer_read_dq_kernel,
    performer_read_dstate_kernel,
    performer_state_bwd_kernel,
)
from medformer_kernels.performer.kernels import (
    Meta,
    performer_merge_kernel,
    performer_read_fwd_kernel,
    performer_state_fwd_kernel,
)

__all__ = ["launch_plan", "read", "read_backward", "state", "state_backward"]


def launch_plan(
    kernel: str,
    *,
    chip: Chip,
    num_features: int,
    width: int,
    itemsize: int,
    tokens: int,
    batch_heads: int,
    with_max: bool = False,
) -> AttentionPlan:
    """How `kernel` ('state_fwd', 'read_fwd', 'read_dq', 'read_dstate', 'state_bwd', 'omega') is launched.

    `width` is the larger of D and Dv; `with_max` halves the features of a program, because the second maximum takes
    the registers. Deterministic; the tiles come from configs/performer.json, which the compile report checks entry by
    entry.
    """
    entry = _dispatch.tile("performer", kernel, chip, width, itemsize)
    if with_max:
        entry = entry | {"block_m": max(16, entry["block_m"] // 2)}
    return _dispatch.launch_plan(
        entry, chip=chip, rows=num_features, tokens=tokens, batch_heads=batch_heads,
        sliced=kernel in ("state_fwd", "read_dstate", "omega"),
    )  # fmt: skip


def _plan(kernel: str, x: Tensor, omega: Tensor, width_v: int, with_max: bool = False) -> AttentionPlan:
    batch, heads, tokens, width = x.shape
    return launch_plan(
        kernel,
        chip=chip_of(x),
        num_features=omega.shape[-2],
        width=max(width, width_v),
        itemsize=x.element_size(),
        tokens=tokens,
        batch_heads=batch * heads,
        with_max=with_max,
    )


@dataclass(frozen=True, kw_only=True)
class Slices:
    """The tokens of a call cut into slices, none of which crosses the end of a document."""

    count: int
    documents: int
    """States that the kernels keep apart: 1 where there is one document from end to end."""
    table: Tensor
    """(count, 5): start, end, whether it begins a document, whether it ends one, which; not read of one document."""
    ends: Tensor
    """(documents + 1): the first slice of each document, and their number; not read of one document."""
    whole: bool
    """Each document is one slice."""

    @property
    def varlen(self) -> bool:
        return self.documents > 1

    def sums(self, parts: Tensor) -> Tensor:
        """(B, H, ...), or (B, H, documents, ...): `parts` (B, H, slices, ...) summed in order."""
        if not self.varlen:
            return parts.sum(2)
        if self.whole:
            return parts
        lengths = self.ends.diff().long().expand(*parts.shape[:2], -1).contiguous()
        return torch.segment_reduce(parts, "sum", lengths=lengths, axis=2, initial=0, unsafe=True)


def cut(boundaries: Sequence[int] | None, length: int, x: Tensor) -> Slices:
    """Slices of at most `length` tokens of x (B, H, tokens, width)."""
    if boundaries is None or len(boundaries) <= 2:
        count = max(1, -(-x.shape[2] // length))
        return Slices(count=count, documents=1, table=x, ends=x, whole=count == 1)
    rows, ends = [], [0]
    for document, (start, end) in enumerate(pairwise(boundaries)):
        starts = range(start, end, length)
        rows += [(s, min(s + length, end), s == start, s == starts[-1], document) for s in starts]
        ends.append(len(rows))
    whole = ends == list(range(len(boundaries)))
    table, ends = (
        torch.tensor(part, dtype=torch.int32, pin_memory=x.is_cuda).to(x.device, non_blocking=True)
        for part in (rows, ends)
    )
    return Slices(count=len(rows), documents=len(boundaries) - 1, table=table, ends=ends, whole=whole)


def meta(x: Tensor, width_v: int, plan: AttentionPlan, **flags: Any) -> Meta:
    width = x.shape[-1]
    return Meta(
        D=width,
        DV=width_v,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_D=min(block(width), plan.columns),
        BLOCK_DV=min(block(width_v), plan.columns),
        **{"PRECISION": precision(x), **flags},
    )


def omega_rows(omega: Tensor) -> Rows:
    return Rows(omega, h=omega.stride(0) if omega.ndim == 3 else 0, n=omega.stride(-2))


def column_blocks(width: int, plan: AttentionPlan) -> int:
    """Programs that share out the columns of an output."""
    return -(-width // min(block(width), plan.columns))


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The M rows of a head as the matrix units take them; M x D numbers, so the copy costs nothing."""
    return x.to(dtype).contiguous()


def state(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    with_max: bool,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Key pass; see `ops.performer_state`."""
    omega = packed(omega, k.dtype)
    (batch, heads, tokens, width), width_v, num_features = k.shape, v.shape[-1], omega.shape[-2]
    plan = _plan("state_fwd", k, omega, width_v, with_max)
    slices = cut(boundaries, plan.slice_length, k)
    m_blocks = -(-num_features // plan.block_m)
    part_values = k.new_empty((batch, heads, slices.count, num_features, width_v), dtype=torch.float32)
    part_lse = k.new_empty((batch, heads, slices.count, num_features), dtype=torch.float32)
    part_top = k.new_full((batch, heads, slices.count, m_blocks), -math.inf, dtype=torch.float32)
    inputs = (rows(k), rows(v), omega_rows(omega), mask_rows(key_padding_mask, k), slices.table)
    outputs = ((part_lse, part_lse), (part_values, part_lse, part_top))
    sizes = (heads, 1, tokens, num_features, plan.slice_length, slices.count, width**-0.25)
    constants = meta(k, width_v, plan, HAS_MASK=key_padding_mask is not None, WITH_MAX=with_max, VARLEN=slices.varlen)
    programs = batch * heads * slices.count * m_blocks * column_blocks(width_v, plan)
    performer_state_fwd_kernel[(programs,)](*inputs, *outputs, *sizes, META=constexprs(constants), **plan.launch)
    top = part_top.amax((-1, -2))
    if slices.whole:
        return (part_values, part_lse, top) if slices.varlen else (part_values.squeeze(2), part_lse.squeeze(2), top)
    documents = (slices.documents,) if slices.varlen else ()
    values = part_values.new_empty((batch, heads, *documents, num_features, width_v))
    lse = part_lse.new_empty((batch, heads, *documents, num_features))
    merged = merged_rows(width_v)
    arguments = (part_values, part_lse, slices.ends, values, lse, num_features, slices.count, slices.documents)
    constants = Meta(DV=width_v, BLOCK_M=merged, BLOCK_DV=block(width_v), VARLEN=slices.varlen)
    performer_merge_kernel[(batch * heads * slices.documents * -(-num_features // merged),)](
        *arguments, META=constexprs(constants), num_warps=4
    )
    return values, lse, top


def merged_rows(width_v: int) -> int:
    """Features of a program that merges states, which holds all columns of them."""
    return min(32, 4096 // block(width_v))


def read(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_values: Tensor | None,
    extra_lse: Tensor | None,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Query pass; see `ops.performer_read`."""
    omega, values, lse = packed(omega, q.dtype), packed(values, q.dtype), lse.contiguous()
    (batch, heads, tokens, width), width_v = q.shape, values.shape[-1]
    plan = _plan("read_fwd", q, omega, width_v)
    blocks = cut(boundaries, plan.block_n, q)
    out = q.new_empty((batch, heads, tokens, width_v))
    out_lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    inputs = (rows(q), omega_rows(omega), blocks.table, values, lse, _extra(extra_values, extra_lse, lse))
    sizes = (heads, tokens, omega.shape[-2], blocks.count, blocks.documents, width**-0.25)
    constants = meta(q, width_v, plan, HAS_EXTRA=extra_lse is not None, VARLEN=blocks.varlen)
    programs = batch * heads * blocks.count * column_blocks(width_v, plan)
    launch = plan.launch
    if extra_lse is not None and q.element_size() == 2:
        launch["num_stages"] = 1  # what epsilon adds leaves no registers for more
    performer_read_fwd_kernel[(programs,)](*inputs, out, out_lse, *sizes, META=constexprs(constants), **launch)
    return out, out_lse


def _extra(extra_values: Tensor | None, extra_lse: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    if extra_values is None or extra_lse is None:
        return unused, unused
    return extra_values.contiguous(), extra_lse.contiguous()


def read_backward(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_values: Tensor | None,
    extra_lse: Tensor | None,
    out: Tensor,
    out_lse: Tensor,
    dout: Tensor,
    with_omega: bool,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dvalues, dlse, dextra_values, dextra_lse, domega); see `ops.performer_read_backward`."""
    omega, lse = packed(omega, q.dtype), lse.contiguous()
    (batch, heads, tokens, width), width_v, num_features = q.shape, values.shape[-1], omega.shape[-2]
    dq, delta = torch.empty_like(q), torch.empty_like(out_lse)
    extra_weight = torch.empty_like(out_lse) if extra_lse is not None else delta
    plan = _plan("read_dq", q, omega, width_v)
    blocks = cut(boundaries, plan.block_n, q)
    inputs = (rows(q), omega_rows(omega), blocks.table, (packed(values, q.dtype), lse))
    outputs = (_extra(extra_values, extra_lse, lse), (out, out_lse), (rows(dout), rows(dq), delta, extra_weight))
    sizes = (heads, tokens, num_features, blocks.count, blocks.documents, width**-0.25)
    constants = meta(q, width_v, plan, HAS_EXTRA=extra_lse is not None, VARLEN=blocks.varlen)
    programs = batch * heads * blocks.count * column_blocks(width, plan)
    performer_read_dq_kernel[(programs,)](*inputs, *outputs, *sizes, META=constexprs(constants), **plan.launch)
    plan = _plan("read_dstate", q, omega, width_v)
    slices = cut(boundaries, plan.slice_length, q)
    part_dvalues = values.new_empty((batch, heads, slices.count, num_features, width_v))
    part_pdelta = values.new_empty((batch, heads, slices.count, num_features))
    programs = batch * heads * slices.count * -(-num_features // plan.block_m) * column_blocks(width_v, plan)
    gradients = (rows(dout), delta, part_dvalues, part_pdelta)
    arguments = (rows(q), omega_rows(omega), slices.table, lse, out_lse, gradients)
    sizes = (heads, tokens, num_features, plan.slice_length, slices.count, slices.documents, width**-0.25)
    constants = meta(q, width_v, plan, VARLEN=slices.varlen)
    performer_read_dstate_kernel[(programs,)](*arguments, *sizes, META=constexprs(constants), **plan.launch)
    dvalues = slices.sums(part_dvalues)
    dlse = (dvalues * values).sum(-1) - slices.sums(part_pdelta)
    if extra_values is None:
        dextra_values, dextra_lse = values.new_zeros((batch, heads, width_v)), lse.new_zeros((batch, heads))
    else:
        weighted = (extra_weight.to(dout.dtype).unsqueeze(-2) @ dout).squeeze(-2).float()
        dextra_values = weighted
        dextra_lse = (weighted * extra_values).sum(-1) - (extra_weight * delta).sum(-1)
    domega = values.new_empty(0)
    if with_omega:
        domega = _omega_gradient(
            q, dout, omega, None, packed(values, q.dtype), lse, boundaries, out_lse=out_lse, delta=delta
        )
    return dq, dvalues, dlse, dextra_values, dextra_lse, domega


def _omega_gradient(
    x: Tensor,
    y: Tensor,
    omega: Tensor,
    mask: Tensor | None,
    values: Tensor,
    lse: Tensor,
    boundaries: Sequence[int] | None,
    *,
    out_lse: Tensor | None = None,
    delta: Tensor | None = None,
    shift: Tensor | None = None,
    unit: Tensor | None = None,
    bits: float = 0.0,
) -> Tensor:
    """(B, H, M, D), of the queries (`out_lse`, `delta`) or of the keys (`shift`, `unit`)."""
    (batch, heads, tokens, width), width_v, num_features = x.shape, y.shape[-1], omega.shape[-2]
    plan = _plan("omega", x, omega, width_v)
    slices = cut(boundaries, plan.slice_length, x)
    part = lse.new_empty((batch, heads, slices.count, num_features, width))
    shift, out_lse, delta, unit = (lse if given is None else given for given in (shift, out_lse, delta, unit))
    programs = batch * heads * slices.count * -(-num_features // plan.block_m) * column_blocks(width, plan)
    inputs = (rows(x), rows(y), omega_rows(omega), mask_rows(mask, x), slices.table)
    outputs = ((values, lse, shift, unit, out_lse, delta), part)
    sizes = (heads, tokens, num_features, plan.slice_length, slices.count, slices.documents, width**-0.25, bits)
    constants = meta(x, width_v, plan, KEYS=unit is not lse, HAS_MASK=mask is not None, VARLEN=slices.varlen)
    performer_omega_kernel[(programs,)](*inputs, *outputs, *sizes, META=constexprs(constants), **plan.launch)
    return part.sum(2)


def state_backward(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    values: Tensor,
    lse: Tensor,
    dvalues: Tensor,
    dlse: Tensor,
    with_omega: bool,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk, dv, domega); see `ops.performer_state_backward`."""
    omega, lse = packed(omega, k.dtype), lse.contiguous()
    (batch, heads, tokens, width), width_v = k.shape, v.shape[-1]
    shift = dlse - (dvalues * values).sum(-1)
    unit = torch.maximum(dvalues.abs().amax((-1, -2)), shift.abs().amax(-1))
    unit = unit.masked_fill(unit == 0, 1).contiguous()
    dvalues = packed(dvalues / unit[..., None, None], k.dtype)
    shift = (shift / unit.unsqueeze(-1)).contiguous()
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    plan = _plan("state_bwd", k, omega, width_v)
    blocks = cut(boundaries, plan.block_n, k)
    programs = batch * heads * blocks.count * max(column_blocks(width, plan), column_blocks(width_v, plan))
    bits = float(min(8, max(0, tokens.bit_length() - 1)))
    inputs = (rows(k), rows(v), omega_rows(omega), mask_rows(key_padding_mask, k), blocks.table)
    outputs = ((lse, dvalues, shift, unit), rows(dk), rows(dv))
    sizes = (heads, tokens, omega.shape[-2], blocks.count, blocks.documents, width**-0.25, bits)
    constants = meta(k, width_v, plan, HAS_MASK=key_padding_mask is not None, VARLEN=blocks.varlen)
    performer_state_bwd_kernel[(programs,)](*inputs, *outputs, *sizes, META=constexprs(constants), **plan.launch)
    domega = lse.new_empty(0)
    if with_omega:
        domega = _omega_gradient(
            k, v, omega, key_padding_mask, dvalues, lse, boundaries, shift=shift, unit=unit, bits=bits
        )
    return dk, dv, domega
