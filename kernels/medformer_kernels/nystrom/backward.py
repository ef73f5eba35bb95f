"""Launches of the Nystrom kernels: the backward pass."""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor

from medformer_kernels._dispatch import block
from medformer_kernels._triton import constexprs, mask_rows, rows
from medformer_kernels.nystrom import products
from medformer_kernels.nystrom.backward_kernels import (
    nystrom_conv_weight_kernel,
    nystrom_delta_kernel,
    nystrom_landmark_bwd_kernel,
    nystrom_token_bwd_kernel,
)
from medformer_kernels.nystrom.forward_kernels import Meta
from medformer_kernels.nystrom.fused import (
    BLOCK_TOKENS,
    Forward,
    Head,
    or_else,
    padded_weight,
    small_matrix,
    taps_of,
    units,
)
from medformer_kernels.nystrom.inverse import inverse_times_backward
from medformer_kernels.nystrom.landmarks import Cells
from medformer_kernels.nystrom.plans import one_program

__all__ = ["backward"]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Cells,
    pooled: bool,
    conv_weight: Tensor | None,
    mask: Tensor | None,
    made: Forward,
    iterations: int,
    tolerance: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dq_landmarks, dk_landmarks, dconv_weight); see `ops.nystrom_backward`.

    Five passes over the tokens: delta (and the convolution's weights), landmarks from the queries, landmarks from the
    keys, keys and values, queries. Between them the small matrices, in float32.
    """
    head = Head(q, k, v, cells, mask, pooled)
    prefix = cells.prefix
    valid = made.valid if made.valid.numel() else None
    scaled, unit = units(made.solved, q.dtype)
    queries, inner_dout, inner_out = q[:, :, prefix:], dout[:, :, prefix:], made.out[:, :, prefix:]
    tokens = queries.shape[2]
    weight = padded_weight(conv_weight, q)
    delta = torch.empty_like(made.out_lse)
    taps, has_conv = taps_of(conv_weight), conv_weight is not None
    mask_inner, v_inner = mask_rows(head.inner_mask, q), rows(v[:, :, prefix:])
    inputs = (rows(inner_out), rows(inner_dout), v_inner, weight, mask_inner)
    sizes = (head.heads, tokens, head.width_v, *head.conv_grid[1:], *taps)
    block_n, warps = _delta_tile(head)
    columns = block(head.width_v)
    flags = {"PRECISION": head.backward_precision, **head.conv_flags(has_conv)}
    constants = Meta(BLOCK_N=block_n, BLOCK_DV=columns, **flags)
    nystrom_delta_kernel[(head.batch_heads * -(-tokens // block_n),)](
        *inputs, delta, *sizes, META=constexprs(constants), num_warps=warps, num_stages=1
    )
    dconv_weight = q.new_empty(0, dtype=torch.float32)
    if has_conv:
        blocks = -(-tokens // BLOCK_TOKENS)
        part_dweight = q.new_empty((head.batch, head.heads, blocks, *taps), dtype=torch.float32)
        arguments = (rows(inner_dout), v_inner, mask_inner, part_dweight, *sizes)
        constants = Meta(BLOCK_N=BLOCK_TOKENS, BLOCK_DV=columns, HAS_MASK=head.inner_mask is not None)
        nystrom_conv_weight_kernel[(head.batch_heads * blocks,)](*arguments, META=constexprs(constants), num_warps=8)
        dconv_weight = part_dweight.sum((0, 2))

    of_queries = (made.k_landmarks, scaled, unit, valid, head.inner_mask, False)
    saved = {"column_lse": made.out_lse, "delta": delta}
    dk_read, dsolved = _landmark_backward(head, queries, inner_dout, *of_queries, **saved)
    a = small_matrix(head, made.q_landmarks, made.k_landmarks, valid)
    da, dvalues = _solve_backward(head, a, made.values, dsolved, iterations, tolerance)
    dscores = a * (da - (da * a).sum(-1, keepdim=True)) * head.scale
    dvalues[:, :, :prefix] += dout[:, :, :prefix]

    shift = -(dvalues * made.values).sum(-1)
    scaled_dvalues, dvalues_unit = units(torch.cat((dvalues, shift.unsqueeze(-1)), -1), torch.float32)
    shift = scaled_dvalues[..., -1].contiguous()
    scaled_dvalues = scaled_dvalues[..., :-1].to(q.dtype).contiguous()
    bits = float(min(8, max(0, k.shape[2].bit_length() - 1)))
    of_keys = (made.q_landmarks, scaled_dvalues, dvalues_unit, valid, head.mask, True)
    saved_keys = {"row_lse": made.lse, "shift": shift, "bits": bits}
    dq_landmarks, _ = _landmark_backward(head, k, v, *of_keys, **saved_keys)
    dq_landmarks += dscores @ made.k_landmarks.float()
    dk_landmarks = dk_read + dscores.mT @ made.q_landmarks.float()

    dk, dv, dq = torch.empty_like(k), torch.empty_like(v), torch.empty_like(q)
    flipped = weight.flip(1, 2, 3).contiguous() if has_conv else weight
    means = {"dmeans": dk_landmarks, "total": made.total}
    convolution = {"dout": inner_dout if has_conv else None, "weight": flipped, "taps": taps}
    _token_backward(head, k, v, *of_keys, dk, dv, prefix, **means, **saved_keys, **convolution)
    inner_dq, means = dq[:, :, prefix:], {"dmeans": dq_landmarks, "total": made.total}
    _token_backward(head, queries, inner_dout, *of_queries, inner_dq, inner_dq, 0, **means, **saved)
    if prefix:
        own = dk_landmarks[:, :, :prefix]
        dq_own = dq_landmarks[:, :, :prefix]
        if head.mask is not None:
            padding = head.mask[:, None, :prefix, None] == 0
            own = own.masked_fill(padding, 0)
            dq_own = dq_own.masked_fill(padding, 0) if pooled else dq_own
        dq[:, :, :prefix] = dq_own
        dk[:, :, :prefix] += own
    given = slice(prefix, prefix if pooled else None)
    dgiven = (x[:, :, given].to(q.dtype).contiguous() for x in (dq_landmarks, dk_landmarks))
    return dq, dk, dv, *dgiven, dconv_weight


def _solve_backward(
    head: Head, a: Tensor, values: Tensor, dsolved: Tensor, iterations: int, tolerance: float | None
) -> tuple[Tensor, Tensor]:
    """(da, dvalues) of pinv(a) values."""
    if tolerance is None and one_program(head.chip, a.shape[-1], head.batch_heads):
        return products.solve_backward(head.chip, a, values, dsolved, iterations)
    return inverse_times_backward(a, values, dsolved, iterations, tolerance)


def _delta_tile(head: Head) -> tuple[int, int]:
    """(block, warps) of the delta kernel: what compiles without a spill; 64 rows where wgmma needs them."""
    if not head.chip.arch.startswith("sm_"):
        return 16, 4
    narrow = block(head.width_v) <= 64
    if head.q.element_size() == 2:
        return 64, 4 if narrow else 8
    return (32, 4) if narrow else (16, 8)


def _landmark_backward(
    head: Head,
    x: Tensor,
    y: Tensor,
    landmarks: Tensor,
    values: Tensor,
    unit: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    keys: bool,
    *,
    row_lse: Tensor | None = None,
    shift: Tensor | None = None,
    column_lse: Tensor | None = None,
    delta: Tensor | None = None,
    bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(drows, dvalues), the latter not for keys; both float32."""
    tokens, number = x.shape[2], landmarks.shape[2]
    plan = head.plan("landmark_bwd", tokens, number)
    lead = (head.batch, head.heads, plan.slices, number)
    part_drows = x.new_empty((*lead, head.width), dtype=torch.float32)
    part_dvalues = part_drows if keys else x.new_empty((*lead, head.width_v), dtype=torch.float32)
    optional = [or_else(given, unit) for given in (row_lse, shift, valid, column_lse, delta)]
    sizes = (head.heads, tokens, number, head.width, head.width_v, plan.slice_length, plan.slices, head.scale, bits)
    arguments = (rows(x), rows(y), landmarks, values, *optional, unit, mask_rows(mask, x), part_drows, part_dvalues)
    flags = {"KEYS": keys, "HAS_VALID": valid is not None, "HAS_MASK": mask is not None}
    constants = head.meta(plan, head.backward_precision, **flags)
    programs = head.batch_heads * plan.slices * -(-number // plan.block_m)
    nystrom_landmark_bwd_kernel[(programs,)](*arguments, *sizes, META=constexprs(constants), **plan.launch)
    return part_drows.sum(2), part_dvalues.sum(2)


def _token_backward(
    head: Head,
    x: Tensor,
    y: Tensor,
    landmarks: Tensor,
    values: Tensor,
    unit: Tensor,
    valid: Tensor | None,
    mask: Tensor | None,
    keys: bool,
    dx: Tensor,
    dy: Tensor,
    skipped: int,
    *,
    dmeans: Tensor,
    total: Tensor,
    row_lse: Tensor | None = None,
    shift: Tensor | None = None,
    column_lse: Tensor | None = None,
    delta: Tensor | None = None,
    dout: Tensor | None = None,
    weight: Tensor | None = None,
    taps: tuple[int, ...] = (1, 1, 1),
    bits: float = 0.0,
) -> None:
    """Fills dx (and dy, for keys)."""
    tokens, number = x.shape[2], landmarks.shape[2]
    plan = head.plan("token_bwd", tokens, number)
    like_dout = x if dout is None else dout
    optional = [or_else(given, unit) for given in (row_lse, shift, valid, column_lse, delta)]
    inputs = (rows(x), rows(y), landmarks, values, *optional, unit, mask_rows(mask, x))
    means = (or_else(head.rank, unit), or_else(head.count, unit), dmeans, total)
    outputs = (rows(like_dout), or_else(weight, unit), rows(dx), rows(dy))
    sizes = (head.heads, tokens, number, head.width, head.width_v, *head.grid_arguments, *head.conv_grid[1:], *taps)
    flags = {"KEYS": keys, "HAS_VALID": valid is not None, "HAS_MEANS": head.pooled, "RANKED": head.rank is not None}
    flags |= head.conv_flags(dout is not None) | {"VOLUME": not head.cells.sequence, "HAS_MASK": mask is not None}
    constants = head.meta(plan, head.backward_precision, **flags)
    arguments = (*inputs, *means, *outputs, *sizes, skipped, head.scale, bits)
    programs = head.batch_heads * -(-tokens // plan.block_n)
    nystrom_token_bwd_kernel[(programs,)](*arguments, META=constexprs(constants), **plan.launch)
