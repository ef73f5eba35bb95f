"""Launches of the Nystrom kernels: the forward pass, and what it shares with `backward`.

Cost, forward: 8 B H N L D FLOP in attention, 24 B H 2 L^3 in six steps of the inverse and 2 B H N L exponentials; q
passes through memory twice (its means are read first), k and v once (v twice with the convolution), out once.
Backward: 28 B H N L D FLOP; see `backward`.

Tested in Triton's interpreter (float32, float16) and compiled ahead of time for every tile shipped. Not yet run on a
GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels._dispatch import AttentionPlan, Plan, block, chip_of, precision
from medformer_kernels._triton import constexprs, mask_rows, rows
from medformer_kernels.nystrom import products
from medformer_kernels.nystrom.forward_kernels import (
    CONV_PAD,
    Meta,
    nystrom_merge_kernel,
    nystrom_pool_kernel,
    nystrom_pool_values_fwd_kernel,
    nystrom_read_fwd_kernel,
    nystrom_values_fwd_kernel,
)
from medformer_kernels.nystrom.inverse import inverse_times
from medformer_kernels.nystrom.landmarks import Cells, ranked_tokens
from medformer_kernels.nystrom.plans import key_walk, launch_plan, one_program
from medformer_kernels.nystrom.reference import masked_softmax

__all__ = ["Forward", "Head", "forward"]

# Tokens of one step of the convolution's banded product, and of the memory-bound kernels.
BLOCK_J = 32
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Forward:
    """What one forward pass makes; all but `out` and `out_lse` are small."""

    out: Tensor
    q_landmarks: Tensor
    k_landmarks: Tensor
    total: Tensor
    """Weight of the real tokens of each mean (B, H, L); empty with given landmarks."""
    valid: Tensor
    """Which landmarks are landmarks (B, P + L) as bytes; empty where all are."""
    values: Tensor
    lse: Tensor
    solved: Tensor
    out_lse: Tensor


class Head:
    """What the launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cells: Cells, mask: Tensor | None, pooled: bool) -> None:
        self.q, self.k, self.v, self.cells, self.pooled = q, k, v, cells, pooled
        self.batch, self.heads, _, self.width = q.shape
        self.batch_heads = self.batch * self.heads
        self.width_v = v.shape[3]
        self.scale = self.width**-0.5
        self.chip = chip_of(q)
        self.precision = precision(q)
        # Three tf32 products of wider heads do not fit in the registers.
        self.backward_precision = self.precision if max(self.width, self.width_v) <= 64 else "ieee"
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.inner_mask = None if self.mask is None or not pooled else self.mask[:, cells.prefix :]
        self.conv_grid = cells.conv_grid or cells.grid
        self.conv_volume = self.conv_grid[:2] != (1, 1)
        self.order = self.rank = self.count = None
        if pooled and cells.sequence and mask is not None:
            inner = mask[:, cells.prefix :]
            order, count = ranked_tokens(inner)
            self.order, self.count = order.int(), count.int()
            self.rank = (inner.cumsum(1) - 1).clamp_min(0).int()

    def extents(self, tokens: int, landmarks: int) -> dict[str, Any]:
        """What a launch plan needs to know."""
        widths = {"width": max(self.width, self.width_v), "itemsize": self.q.element_size()}
        return {"chip": self.chip, "landmarks": landmarks, "tokens": tokens, "batch_heads": self.batch_heads, **widths}

    def plan(self, kernel: str, tokens: int, landmarks: int) -> AttentionPlan:
        return launch_plan(kernel, **self.extents(tokens, landmarks))

    def meta(self, plan: AttentionPlan, precision: str, **flags: Any) -> Meta:
        blocks = (plan.block_m, plan.block_n, block(self.width), block(self.width_v))
        return Meta(*blocks, PRECISION=precision, **flags)

    def conv_flags(self, has_conv: bool) -> dict[str, Any]:
        """Constants of kernels whose epilogue is the convolution."""
        has_mask = self.inner_mask is not None
        return {"BLOCK_J": BLOCK_J, "HAS_MASK": has_mask, "HAS_CONV": has_conv, "CONV_VOLUME": self.conv_volume}

    @property
    def grid_arguments(self) -> tuple[int, ...]:
        return (self.cells.prefix, *self.cells.grid, *self.cells.landmark_grid)


def or_else(x: Tensor | None, unused: Tensor) -> Tensor:
    return unused if x is None else x


def _pool(head: Head, x: Tensor) -> tuple[Tensor, Tensor]:
    """(landmarks, the prefix first; weight of each mean)."""
    cells = head.cells
    out = x.new_empty((head.batch, head.heads, cells.prefix + cells.count, head.width))
    out[:, :, : cells.prefix] = _own(head, x)
    total = x.new_empty((head.batch, head.heads, cells.count), dtype=torch.float32)
    ranked = head.order is not None
    inputs = (rows(x), or_else(head.order, x), or_else(head.count, x), mask_rows(None if ranked else head.mask, x))
    sizes = (head.heads, x.shape[2] - cells.prefix, head.width, *head.grid_arguments)
    has_mask = head.mask is not None and not ranked
    constants = Meta(BLOCK_N=BLOCK_TOKENS, BLOCK_D=block(head.width), RANKED=ranked, HAS_MASK=has_mask)
    warps = 8 if head.width * x.element_size() > 256 else 4  # four spill a float32 tile of wide heads on sm_80
    programs = head.batch_heads * cells.count
    plan = Plan(num_warps=warps, num_stages=3, max_registers=255 if chip_of(x).arch.startswith("sm_") else None)
    nystrom_pool_kernel[(programs,)](*inputs, out, total, *sizes, META=constexprs(constants), **plan.launch)
    return out, total


def _query_landmarks(head: Head, q_landmarks: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q_landmarks, weights of the means, which are valid)."""
    prefix = head.cells.prefix
    own = None if head.mask is None else head.mask[:, :prefix]
    if q_landmarks is None:
        q_landmarks, total = _pool(head, head.q)
        return q_landmarks, total, None if own is None else torch.cat((own, (total[:, 0] > 0).to(torch.uint8)), 1)
    none = head.q.new_empty(0, dtype=torch.float32)
    if prefix == 0:
        return q_landmarks.contiguous(), none, None
    valid = None if own is None else F.pad(own, (0, q_landmarks.shape[2]), value=1)
    return torch.cat((head.q[:, :, :prefix], q_landmarks), 2), none, valid


def _own(head: Head, x: Tensor) -> Tensor:
    """The prefix tokens, masked ones as 0."""
    own = x[:, :, : head.cells.prefix]
    return own if head.mask is None else own.masked_fill(head.mask[:, None, : head.cells.prefix, None] == 0, 0)


def _values(
    head: Head, q_landmarks: Tensor, k_landmarks: Tensor | None, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax(Q~ K^T) V and its log-sum-exp, both float32; K~), the last from the same read of K where it can be."""
    k, v, cells = head.k, head.v, head.cells
    tokens, number, ranked = k.shape[2], q_landmarks.shape[2], head.order is not None
    walk = key_walk(cells, ranked=ranked, **head.extents(tokens, number)) if head.pooled else None
    plan = head.plan("values_fwd", tokens, number) if walk is None else walk.plan
    slices = plan.slices if walk is None else walk.slices
    part_values = k.new_empty((head.batch, head.heads, slices, number, head.width_v), dtype=torch.float32)
    part_lse = k.new_empty((head.batch, head.heads, slices, number), dtype=torch.float32)
    programs = head.batch_heads * slices * -(-number // plan.block_m)
    inputs, mask = (rows(k), rows(v), q_landmarks), mask_rows(head.mask, k)
    flags = {"HAS_MASK": head.mask is not None}
    if walk is not None:
        k_landmarks = torch.empty_like(q_landmarks)
        k_landmarks[:, :, : cells.prefix] = _own(head, k)
        inputs = (*inputs, or_else(head.order, k), or_else(head.count, k), mask, total)
        sizes = (head.heads, tokens - cells.prefix, number, head.width, head.width_v, *head.grid_arguments)
        sizes = (*sizes, walk.group, walk.length, walk.cell_size, walk.slice_length, slices, head.scale)
        constants = head.meta(plan, head.precision, VOLUME=not cells.sequence, RANKED=ranked, **flags)
        arguments = (*inputs, part_values, part_lse, k_landmarks, *sizes)
        launch = plan.launch
        if head.mask is not None and not cells.sequence:
            launch["num_stages"] = 1  # addresses of volume and mask leave no registers for more
        nystrom_pool_values_fwd_kernel[(programs,)](*arguments, META=constexprs(constants), **launch)
    else:
        if k_landmarks is None:
            k_landmarks, _ = _pool(head, k)
        elif cells.prefix:
            k_landmarks = torch.cat((_own(head, k), k_landmarks), 2)
        else:
            k_landmarks = k_landmarks.contiguous()
        sizes = (head.heads, tokens, number, head.width, head.width_v, plan.slice_length, slices, head.scale)
        constants = head.meta(plan, head.precision, **flags)
        arguments = (*inputs, mask, part_values, part_lse, *sizes)
        nystrom_values_fwd_kernel[(programs,)](*arguments, META=constexprs(constants), **plan.launch)
    if slices == 1:
        return part_values.squeeze(2), part_lse.squeeze(2), k_landmarks
    values, lse = torch.empty_like(part_values[:, :, 0]), torch.empty_like(part_lse[:, :, 0])
    arguments = (part_values, part_lse, values, lse, number, head.width_v, slices)
    constants = Meta(BLOCK_M=32, BLOCK_DV=block(head.width_v))
    nystrom_merge_kernel[(head.batch_heads * -(-number // 32),)](*arguments, META=constexprs(constants), num_warps=4)
    return values, lse, k_landmarks


def _solve(head: Head, a: Tensor, values: Tensor, iterations: int, tolerance: float | None) -> Tensor:
    """pinv(a) values, float32."""
    if tolerance is None and one_program(head.chip, a.shape[-1], head.batch_heads):
        return products.solve(head.chip, a, values, iterations)
    return inverse_times(a, values, iterations, tolerance)


def small_matrix(head: Head, q_landmarks: Tensor, k_landmarks: Tensor, valid: Tensor | None) -> Tensor:
    scores = (q_landmarks.float() * head.scale) @ k_landmarks.float().mT
    if valid is None:
        return scores.softmax(-1)
    pair = valid.bool()[:, None, None]
    return masked_softmax(scores, pair & pair.mT)


def units(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / its largest value in the head, in `dtype`; that value): so that float16 holds it."""
    unit = x.abs().amax((-1, -2))
    unit = unit.masked_fill(unit == 0, 1)
    return (x / unit[..., None, None]).to(dtype).contiguous(), unit.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Cells,
    q_landmarks: Tensor | None,
    k_landmarks: Tensor | None,
    conv_weight: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    tolerance: float | None,
) -> Forward:
    """See `ops.nystrom_forward`."""
    head = Head(q, k, v, cells, mask, q_landmarks is None)
    q_landmarks, total, valid = _query_landmarks(head, q_landmarks)
    values, lse, k_landmarks = _values(head, q_landmarks, k_landmarks, total)
    solved = _solve(head, small_matrix(head, q_landmarks, k_landmarks, valid), values, iterations, tolerance)
    prefix, number = cells.prefix, k_landmarks.shape[2]
    out = q.new_empty((*q.shape[:3], head.width_v))
    out[:, :, :prefix] = values[:, :, :prefix]
    queries, inner = q[:, :, prefix:], out[:, :, prefix:]
    tokens = queries.shape[2]
    out_lse = q.new_empty((head.batch, head.heads, tokens), dtype=torch.float32)
    scaled, unit = units(solved, q.dtype)
    plan = head.plan("read_fwd", tokens, number)
    inner_mask, weight = mask_rows(head.inner_mask, q), padded_weight(conv_weight, q)
    inputs = (rows(queries), k_landmarks, or_else(valid, q), scaled, unit, inner_mask, rows(v[:, :, prefix:]), weight)
    sizes = (head.heads, tokens, number, head.width, head.width_v, *head.conv_grid[1:], *taps_of(conv_weight))
    flags = {"HAS_VALID": valid is not None, **head.conv_flags(conv_weight is not None)}
    constants = head.meta(plan, head.precision, **flags)
    programs = head.batch_heads * -(-tokens // plan.block_n)
    arguments = (*inputs, rows(inner), out_lse, *sizes, head.scale)
    nystrom_read_fwd_kernel[(programs,)](*arguments, META=constexprs(constants), **plan.launch)
    none = q.new_empty(0, dtype=torch.uint8)
    return Forward(out, q_landmarks, k_landmarks, total, or_else(valid, none), values, lse, solved, out_lse)


def padded_weight(conv_weight: Tensor | None, unused: Tensor) -> Tensor:
    """Each row of taps with zeros around it."""
    return unused if conv_weight is None else F.pad(conv_weight.float(), (CONV_PAD, CONV_PAD)).contiguous()


def taps_of(conv_weight: Tensor | None) -> tuple[int, ...]:
    return (1, 1, 1) if conv_weight is None else tuple(conv_weight.shape[1:])
