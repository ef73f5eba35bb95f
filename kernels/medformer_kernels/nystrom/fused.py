"""Launches of the Nystrom kernels: the forward pass, and what it shares with `backward`.

Cost, forward: 8 B H N L D FLOP in attention, 24 B H 2 L^3 in six steps of the inverse and 2 B H N L exponentials; q
passes through memory twice (its means are read first), k and v once (v twice with the convolution), out once.
Backward: 28 B H N L D FLOP; see `backward`.

Tested in Triton's interpreter (float32, float16) and compiled ahead of time for every tile shipped. Not yet run on a
GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels._dispatch import Plan, block, chip_of, mask_arguments
from medformer_kernels.nystrom import products
from medformer_kernels.nystrom.forward_kernels import (
    CONV_PAD,
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


@dataclass(frozen=True, kw_only=True)
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
        self.width_v = v.shape[3]
        self.scale = self.width**-0.5
        self.chip = chip_of(q)
        # float32 products run as three tf32 products on NVIDIA (24 bits), exactly elsewhere and in the backward pass of
        # heads wider than 64, where the three do not fit in the registers.
        self.tf32x3 = "tf32x3" if self.chip.arch.startswith("sm_") else "ieee"
        self.precision = self.tf32x3 if q.dtype == torch.float32 else "ieee"
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
        return {
            "chip": self.chip, "landmarks": landmarks, "width": max(self.width, self.width_v),
            "itemsize": self.q.element_size(), "tokens": tokens, "batch_heads": self.batch * self.heads,
        }  # fmt: skip

    def plan(self, kernel: str, tokens: int, landmarks: int) -> Plan:
        return launch_plan(kernel, **self.extents(tokens, landmarks))

    def options(self, plan: Plan, precision: str) -> dict[str, Any]:
        return {
            "BLOCK_M": plan.block_m, "BLOCK_D": block(self.width), "BLOCK_DV": block(self.width_v),
            "PRECISION": precision, "num_warps": plan.num_warps, "num_stages": plan.num_stages,
        }  # fmt: skip

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
    mask, *mask_strides = mask_arguments(None if ranked else head.mask, x)
    nystrom_pool_kernel[(head.batch * head.heads * cells.count,)](
        x, or_else(head.order, x), or_else(head.count, x), mask, out, total,
        *x.stride(), *mask_strides, head.heads, x.shape[2] - cells.prefix, head.width, *head.grid_arguments,
        BLOCK_S=BLOCK_TOKENS, BLOCK_D=block(head.width), RANKED=ranked, HAS_MASK=head.mask is not None and not ranked,
        num_warps=8 if head.width * x.element_size() > 256 else 4,  # four spill a float32 tile of wide heads on sm_80
    )  # fmt: skip
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
    launch = (head.batch * head.heads * slices * -(-number // plan.block_m),)
    mask, *mask_strides = mask_arguments(head.mask, k)
    options = {"BLOCK_S": plan.block_n, "HAS_MASK": head.mask is not None, **head.options(plan, head.precision)}
    if walk is not None:
        k_landmarks = torch.empty_like(q_landmarks)
        k_landmarks[:, :, : cells.prefix] = _own(head, k)
        nystrom_pool_values_fwd_kernel[launch](
            k, v, q_landmarks, or_else(head.order, k), or_else(head.count, k), mask, total, part_values, part_lse,
            k_landmarks, *k.stride(), *v.stride(), *mask_strides, head.heads, tokens - cells.prefix, number,
            head.width, head.width_v, *head.grid_arguments, walk.group, walk.length, walk.cell_size,
            walk.slice_length, slices, head.scale, VOLUME=not cells.sequence, RANKED=ranked, **options,
        )  # fmt: skip
    else:
        if k_landmarks is None:
            k_landmarks, _ = _pool(head, k)
        elif cells.prefix:
            k_landmarks = torch.cat((_own(head, k), k_landmarks), 2)
        else:
            k_landmarks = k_landmarks.contiguous()
        nystrom_values_fwd_kernel[launch](
            k, v, q_landmarks, mask, part_values, part_lse, *k.stride(), *v.stride(), *mask_strides,
            head.heads, tokens, number, head.width, head.width_v, plan.slice_length, slices, head.scale, **options,
        )  # fmt: skip
    if slices == 1:
        return part_values.squeeze(2), part_lse.squeeze(2), k_landmarks
    values, lse = torch.empty_like(part_values[:, :, 0]), torch.empty_like(part_lse[:, :, 0])
    nystrom_merge_kernel[(head.batch * head.heads * -(-number // 32),)](
        part_values, part_lse, values, lse, number, head.width_v, slices,
        BLOCK_M=32, BLOCK_DV=block(head.width_v), num_warps=4,
    )  # fmt: skip
    return values, lse, k_landmarks


def _solve(head: Head, a: Tensor, values: Tensor, iterations: int, tolerance: float | None) -> Tensor:
    """pinv(a) values, float32."""
    if tolerance is None and one_program(head.chip, a.shape[-1], head.batch * head.heads):
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
    mask_inner, *mask_strides = mask_arguments(head.inner_mask, q)
    v_inner = v[:, :, prefix:]
    weight = padded_weight(conv_weight, q)
    nystrom_read_fwd_kernel[(head.batch * head.heads * -(-tokens // plan.block_n),)](
        queries, k_landmarks, or_else(valid, q), scaled, unit, mask_inner, v_inner, weight, inner, out_lse,
        *queries.stride(), *v_inner.stride(), *inner.stride()[:3], *mask_strides,
        head.heads, tokens, number, head.width, head.width_v, *head.conv_grid[1:], *taps_of(conv_weight), head.scale,
        BLOCK_N=plan.block_n, BLOCK_J=BLOCK_J, HAS_VALID=valid is not None, HAS_MASK=head.inner_mask is not None,
        HAS_CONV=conv_weight is not None, CONV_VOLUME=head.conv_volume, **head.options(plan, head.precision),
    )  # fmt: skip
    none = q.new_empty(0, dtype=torch.uint8)
    return Forward(
        out=out, q_landmarks=q_landmarks, k_landmarks=k_landmarks, total=total, valid=or_else(valid, none),
        values=values, lse=lse, solved=solved, out_lse=out_lse,
    )  # fmt: skip


def padded_weight(conv_weight: Tensor | None, unused: Tensor) -> Tensor:
    """Each row of taps with zeros around it."""
    return unused if conv_weight is None else F.pad(conv_weight.float(), (CONV_PAD, CONV_PAD)).contiguous()


def taps_of(conv_weight: Tensor | None) -> tuple[int, ...]:
    return (1, 1, 1) if conv_weight is None else tuple(conv_weight.shape[1:])
