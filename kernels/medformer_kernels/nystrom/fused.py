"""Launches of the Nystrom kernels: tiles, slices, and the order of the passes.

Cost, forward: 8 B H N L D FLOP in attention, 24 B H 2 L^3 in six steps of the inverse and 2 B H N L exponentials; q and
k pass through memory twice (their means are read first), v once, or twice with the convolution, out once. Backward:
28 B H N L D FLOP; see `backward`.

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

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, Plan, block, chip_of, mask_arguments, nearest_arch
from medformer_kernels.nystrom.inverse import inverse_times, inverse_times_backward
from medformer_kernels.nystrom.kernels import (
    CONV_PAD,
    nystrom_conv_weight_kernel,
    nystrom_core_kernel,
    nystrom_delta_kernel,
    nystrom_landmark_bwd_kernel,
    nystrom_pool_kernel,
    nystrom_read_fwd_kernel,
    nystrom_token_bwd_kernel,
    nystrom_values_fwd_kernel,
)
from medformer_kernels.nystrom.landmarks import Cells, ranked_tokens
from medformer_kernels.nystrom.reference import masked_softmax
from medformer_kernels.performer.kernels import performer_merge_kernel

__all__ = ["Forward", "backward", "core_landmarks", "costs", "forward", "launch_plan"]

# Tokens of one step of the convolution's banded product, and of the memory-bound kernels.
_BLOCK_J = 32
_BLOCK_TOKENS = 64


def launch_plan(
    kernel: str, *, chip: Chip, landmarks: int, width: int, itemsize: int, tokens: int, batch_heads: int
) -> Plan:
    """How `kernel` ('values_fwd', 'read_fwd', 'landmark_bwd', 'token_bwd') is launched.

    `width` is the larger of D and Dv. Deterministic; the tiles come from configs/nystrom.json.
    """
    return _dispatch.launch_plan(
        _dispatch.tile("nystrom", kernel, chip, width, itemsize), chip=chip, rows=landmarks, tokens=tokens,
        batch_heads=batch_heads, sliced=kernel in ("values_fwd", "landmark_bwd"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one launch does: operations, exponentials, and bytes to and from memory (rows of landmarks not counted:
    every program finds them in the cache)."""

    flop: int
    exponentials: int
    bytes: int


def costs(
    *, chip: Chip, batch_heads: int, tokens: int, landmarks: int, width: int, itemsize: int, iterations: int = 6
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass over N = S = `tokens`, Dv = D, without a convolution."""

    def plan(kernel: str) -> Plan:
        return launch_plan(
            kernel, chip=chip, landmarks=landmarks, width=width, itemsize=itemsize, tokens=tokens,
            batch_heads=batch_heads,
        )  # fmt: skip

    rows = batch_heads * tokens
    tensor, product = rows * width * itemsize, 2 * rows * landmarks * width
    partial = batch_heads * landmarks * (width + 1) * 4
    small = batch_heads * landmarks * landmarks * 4
    values_plan, landmark_plan = plan("values_fwd"), plan("landmark_bwd")
    values_passes, landmark_passes = (-(-landmarks // p.block_m) for p in (values_plan, landmark_plan))
    values_slices = values_plan.slices * 2 + 1 if values_plan.slices > 1 else 1
    exponentials = rows * landmarks
    return {
        "pool": Cost(flop=4 * rows * width, exponentials=0, bytes=2 * tensor),
        "values_fwd": Cost(
            flop=2 * product, exponentials=exponentials, bytes=values_passes * 2 * tensor + values_slices * partial
        ),
        "core": Cost(flop=8 * iterations * batch_heads * landmarks**3, exponentials=0, bytes=12 * iterations * small),
        "read_fwd": Cost(flop=2 * product, exponentials=exponentials, bytes=2 * tensor + rows * 4),
        "delta": Cost(flop=2 * rows * width, exponentials=0, bytes=2 * tensor + rows * 4),
        "landmark_bwd": Cost(
            flop=7 * product,
            exponentials=2 * exponentials,
            bytes=landmark_passes * (4 * tensor + 8 * rows) + 6 * landmark_plan.slices * partial,
        ),
        "token_bwd": Cost(flop=7 * product, exponentials=2 * exponentials, bytes=7 * tensor + 8 * rows),
    }


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


class _Head:
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

    def plan(self, kernel: str, tokens: int, landmarks: int) -> Plan:
        return launch_plan(
            kernel, chip=self.chip, landmarks=landmarks, width=max(self.width, self.width_v),
            itemsize=self.q.element_size(), tokens=tokens, batch_heads=self.batch * self.heads,
        )  # fmt: skip

    def options(self, plan: Plan, precision: str) -> dict[str, Any]:
        return {
            "BLOCK_M": plan.block_m, "BLOCK_D": block(self.width), "BLOCK_DV": block(self.width_v),
            "PRECISION": precision, "num_warps": plan.num_warps, "num_stages": plan.num_stages,
        }  # fmt: skip

    @property
    def grid_arguments(self) -> tuple[int, ...]:
        return (self.cells.prefix, *self.cells.grid, *self.cells.landmark_grid)


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    return unused if x is None else x


def _pool(head: _Head, x: Tensor) -> tuple[Tensor, Tensor]:
    """(landmarks, the prefix first; weight of each mean)."""
    cells = head.cells
    out = x.new_empty((head.batch, head.heads, cells.prefix + cells.count, head.width))
    if cells.prefix:
        own = x[:, :, : cells.prefix]
        if head.mask is not None:
            own = own.masked_fill(head.mask[:, None, : cells.prefix, None] == 0, 0)
        out[:, :, : cells.prefix] = own
    total = x.new_empty((head.batch, head.heads, cells.count), dtype=torch.float32)
    ranked = head.order is not None
    mask, *mask_strides = mask_arguments(None if ranked else head.mask, x)
    nystrom_pool_kernel[(head.batch * head.heads * cells.count,)](
        x, _or(head.order, x), _or(head.count, x), mask, out, total,
        *x.stride(), *mask_strides, head.heads, x.shape[2] - cells.prefix, head.width, *head.grid_arguments,
        BLOCK_S=_BLOCK_TOKENS, BLOCK_D=block(head.width), RANKED=ranked, HAS_MASK=head.mask is not None and not ranked,
        num_warps=8 if head.width * x.element_size() > 256 else 4,  # four spill a float32 tile of wide heads on sm_80
    )  # fmt: skip
    return out, total


def _landmarks(
    head: _Head, q_landmarks: Tensor | None, k_landmarks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(q_landmarks, k_landmarks, weights of the means, which are valid)."""
    prefix = head.cells.prefix
    own = None if head.mask is None else head.mask[:, :prefix]
    if q_landmarks is None or k_landmarks is None:
        q_landmarks, total = _pool(head, head.q)
        k_landmarks, _ = _pool(head, head.k)
        valid = None if own is None else torch.cat((own, (total[:, 0] > 0).to(torch.uint8)), 1)
        return q_landmarks, k_landmarks, total, valid
    none = head.q.new_empty(0, dtype=torch.float32)
    given = q_landmarks.shape[2]
    if prefix == 0:
        return q_landmarks.contiguous(), k_landmarks.contiguous(), none, None
    q_landmarks = torch.cat((head.q[:, :, :prefix], q_landmarks), 2)
    k_own = head.k[:, :, :prefix]
    if own is not None:
        k_own = k_own.masked_fill(own[:, None, :, None] == 0, 0)
    k_landmarks = torch.cat((k_own, k_landmarks), 2)
    valid = None if own is None else F.pad(own, (0, given), value=1)
    return q_landmarks, k_landmarks, none, valid


def _values(head: _Head, q_landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(Q~ K^T) V and its log-sum-exp, both float32."""
    k, v = head.k, head.v
    tokens, number = k.shape[2], q_landmarks.shape[2]
    plan = head.plan("values_fwd", tokens, number)
    part_values = k.new_empty((head.batch, head.heads, plan.slices, number, head.width_v), dtype=torch.float32)
    part_lse = k.new_empty((head.batch, head.heads, plan.slices, number), dtype=torch.float32)
    mask, *mask_strides = mask_arguments(head.mask, k)
    nystrom_values_fwd_kernel[(head.batch * head.heads * plan.slices * -(-number // plan.block_m),)](
        k, v, q_landmarks, mask, part_values, part_lse, *k.stride(), *v.stride(), *mask_strides,
        head.heads, tokens, number, head.width, head.width_v, plan.slice_length, plan.slices, head.scale,
        BLOCK_S=plan.block_n, HAS_MASK=head.mask is not None, **head.options(plan, head.precision),
    )  # fmt: skip
    if plan.slices == 1:
        return part_values.squeeze(2), part_lse.squeeze(2)
    values, lse = torch.empty_like(part_values[:, :, 0]), torch.empty_like(part_lse[:, :, 0])
    performer_merge_kernel[(head.batch * head.heads * -(-number // 32),)](
        part_values, part_lse, values, lse, number, head.width_v, plan.slices,
        BLOCK_M=32, BLOCK_DV=block(head.width_v), num_warps=4,
    )  # fmt: skip
    return values, lse


def core_landmarks(chip: Chip) -> int:
    """Most landmarks whose inverse one program keeps on chip; above it, batched matrix products do the same."""
    return _core_entry(chip)["block_m"]


def _core_entry(chip: Chip) -> dict[str, int]:
    table = _dispatch.load_configs("nystrom")["core"]
    return table[nearest_arch(chip.arch, tuple(table))][0]


def _core(
    head: _Head,
    q_landmarks: Tensor,
    k_landmarks: Tensor,
    valid: Tensor | None,
    values: Tensor,
    iterations: int,
    tolerance: float | None,
) -> Tensor:
    """pinv(softmax(Q~ K~^T)) values, float32."""
    number, entry = q_landmarks.shape[2], _core_entry(head.chip)
    if tolerance is not None or iterations == 0 or number > entry["block_m"]:
        return inverse_times(_small_matrix(head, q_landmarks, k_landmarks, valid), values, iterations, tolerance)
    solved = torch.empty_like(values)
    nystrom_core_kernel[(head.batch * head.heads,)](
        q_landmarks, k_landmarks, _or(valid, values), values, solved,
        head.heads, number, head.width, head.width_v, head.scale, iterations,
        BLOCK_L=block(number), BLOCK_D=min(32, block(head.width)), BLOCK_DV=min(32, block(head.width_v)),
        HAS_VALID=valid is not None, PRECISION=head.tf32x3, num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
    )  # fmt: skip
    return solved


def _small_matrix(head: _Head, q_landmarks: Tensor, k_landmarks: Tensor, valid: Tensor | None) -> Tensor:
    scores = (q_landmarks.float() * head.scale) @ k_landmarks.float().mT
    if valid is None:
        return scores.softmax(-1)
    pair = valid.bool()[:, None, None]
    return masked_softmax(scores, pair & pair.mT)


def _units(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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
    head = _Head(q, k, v, cells, mask, q_landmarks is None)
    q_landmarks, k_landmarks, total, valid = _landmarks(head, q_landmarks, k_landmarks)
    values, lse = _values(head, q_landmarks)
    solved = _core(head, q_landmarks, k_landmarks, valid, values, iterations, tolerance)
    prefix, number = cells.prefix, k_landmarks.shape[2]
    out = q.new_empty((*q.shape[:3], head.width_v))
    out[:, :, :prefix] = values[:, :, :prefix]
    queries, inner = q[:, :, prefix:], out[:, :, prefix:]
    tokens = queries.shape[2]
    out_lse = q.new_empty((head.batch, head.heads, tokens), dtype=torch.float32)
    scaled, unit = _units(solved, q.dtype)
    plan = head.plan("read_fwd", tokens, number)
    mask_inner, *mask_strides = mask_arguments(head.inner_mask, q)
    v_inner = v[:, :, prefix:]
    weight = _weight(conv_weight, q)
    nystrom_read_fwd_kernel[(head.batch * head.heads * -(-tokens // plan.block_n),)](
        queries, k_landmarks, _or(valid, q), scaled, unit, mask_inner, v_inner, weight, inner, out_lse,
        *queries.stride(), *v_inner.stride(), *inner.stride()[:3], *mask_strides,
        head.heads, tokens, number, head.width, head.width_v, *head.conv_grid[1:], *_taps(conv_weight), head.scale,
        BLOCK_N=plan.block_n, BLOCK_J=_BLOCK_J, HAS_VALID=valid is not None, HAS_MASK=head.inner_mask is not None,
        HAS_CONV=conv_weight is not None, CONV_VOLUME=head.conv_volume, **head.options(plan, head.precision),
    )  # fmt: skip
    none = q.new_empty(0, dtype=torch.uint8)
    return Forward(
        out=out, q_landmarks=q_landmarks, k_landmarks=k_landmarks, total=total, valid=_or(valid, none),
        values=values, lse=lse, solved=solved, out_lse=out_lse,
    )  # fmt: skip


def _weight(conv_weight: Tensor | None, unused: Tensor) -> Tensor:
    """Each row of taps with zeros around it."""
    return unused if conv_weight is None else F.pad(conv_weight.float(), (CONV_PAD, CONV_PAD)).contiguous()


def _taps(conv_weight: Tensor | None) -> tuple[int, ...]:
    return (1, 1, 1) if conv_weight is None else tuple(conv_weight.shape[1:])


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
    head = _Head(q, k, v, cells, mask, pooled)
    prefix = cells.prefix
    valid = made.valid if made.valid.numel() else None
    scaled, unit = _units(made.solved, q.dtype)
    queries, inner_dout, inner_out = q[:, :, prefix:], dout[:, :, prefix:], made.out[:, :, prefix:]
    tokens = queries.shape[2]
    weight = _weight(conv_weight, q)
    delta = torch.empty_like(made.out_lse)
    taps, has_conv = _taps(conv_weight), conv_weight is not None
    mask_inner, *inner_strides = mask_arguments(head.inner_mask, q)
    v_inner = v[:, :, prefix:]
    rows, warps = _delta_tile(head)
    nystrom_delta_kernel[(head.batch * head.heads * -(-tokens // rows),)](
        inner_out, inner_dout, v_inner, weight, mask_inner, delta,
        *inner_out.stride()[:3], *inner_dout.stride(), *v_inner.stride(), *inner_strides,
        head.heads, tokens, head.width_v, *head.conv_grid[1:], *taps,
        BLOCK_N=rows, BLOCK_DV=block(head.width_v), BLOCK_J=_BLOCK_J,
        HAS_MASK=head.inner_mask is not None, HAS_CONV=has_conv, CONV_VOLUME=head.conv_volume,
        PRECISION=head.backward_precision, num_warps=warps, num_stages=1,
    )  # fmt: skip
    dconv_weight = q.new_empty(0, dtype=torch.float32)
    if has_conv:
        blocks = -(-tokens // _BLOCK_TOKENS)
        part_dweight = q.new_empty((head.batch, head.heads, blocks, *taps), dtype=torch.float32)
        nystrom_conv_weight_kernel[(head.batch * head.heads * blocks,)](
            inner_dout, v_inner, mask_inner, part_dweight, *inner_dout.stride(), *v_inner.stride(), *inner_strides,
            head.heads, tokens, head.width_v, *head.conv_grid[1:], *taps,
            BLOCK_N=_BLOCK_TOKENS, BLOCK_DV=block(head.width_v), HAS_MASK=head.inner_mask is not None, num_warps=8,
        )  # fmt: skip
        dconv_weight = part_dweight.sum((0, 2))

    dk_read, dsolved = _landmark_backward(
        head, queries, inner_dout, made.k_landmarks, scaled, unit, valid, head.inner_mask, False,
        column_lse=made.out_lse, delta=delta,
    )  # fmt: skip
    a = _small_matrix(head, made.q_landmarks, made.k_landmarks, valid)
    da, dvalues = inverse_times_backward(a, made.values, dsolved, iterations, tolerance)
    dscores = a * (da - (da * a).sum(-1, keepdim=True)) * head.scale
    dvalues[:, :, :prefix] += dout[:, :, :prefix]

    shift = -(dvalues * made.values).sum(-1)
    scaled_dvalues, dvalues_unit = _units(torch.cat((dvalues, shift.unsqueeze(-1)), -1), torch.float32)
    shift = scaled_dvalues[..., -1].contiguous()
    scaled_dvalues = scaled_dvalues[..., :-1].to(q.dtype).contiguous()
    bits = float(min(8, max(0, k.shape[2].bit_length() - 1)))
    dq_landmarks, _ = _landmark_backward(
        head, k, v, made.q_landmarks, scaled_dvalues, dvalues_unit, valid, head.mask, True,
        row_lse=made.lse, shift=shift, bits=bits,
    )  # fmt: skip
    dq_landmarks += dscores @ made.k_landmarks.float()
    dk_landmarks = dk_read + dscores.mT @ made.q_landmarks.float()

    dk, dv, dq = torch.empty_like(k), torch.empty_like(v), torch.empty_like(q)
    flipped = weight.flip(1, 2, 3).contiguous() if has_conv else weight
    _token_backward(
        head, k, v, made.q_landmarks, scaled_dvalues, dvalues_unit, valid, head.mask, True, dk, dv, prefix,
        dmeans=dk_landmarks, total=made.total, row_lse=made.lse, shift=shift, bits=bits,
        dout=inner_dout if has_conv else None, weight=flipped, taps=taps,
    )  # fmt: skip
    inner_dq = dq[:, :, prefix:]
    _token_backward(
        head, queries, inner_dout, made.k_landmarks, scaled, unit, valid, head.inner_mask, False, inner_dq, inner_dq, 0,
        dmeans=dq_landmarks, total=made.total, column_lse=made.out_lse, delta=delta,
    )  # fmt: skip
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
    return (
        dq, dk, dv, dq_landmarks[:, :, given].to(q.dtype).contiguous(),
        dk_landmarks[:, :, given].to(q.dtype).contiguous(), dconv_weight,
    )  # fmt: skip


def _delta_tile(head: _Head) -> tuple[int, int]:
    """(rows, warps) of the delta kernel: what compiles without a spill; 64 rows where wgmma wants them."""
    if not head.chip.arch.startswith("sm_"):
        return 16, 4
    narrow = block(head.width_v) <= 64
    if head.q.element_size() == 2:
        return 64, 4 if narrow else 8
    return (32, 4) if narrow else (16, 8)


def _landmark_backward(
    head: _Head,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
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
    tokens, number = x.shape[2], rows.shape[2]
    plan = head.plan("landmark_bwd", tokens, number)
    lead = (head.batch, head.heads, plan.slices, number)
    part_drows = x.new_empty((*lead, head.width), dtype=torch.float32)
    part_dvalues = part_drows if keys else x.new_empty((*lead, head.width_v), dtype=torch.float32)
    mask, *mask_strides = mask_arguments(mask, x)
    nystrom_landmark_bwd_kernel[(head.batch * head.heads * plan.slices * -(-number // plan.block_m),)](
        x, y, rows, values, _or(row_lse, unit), _or(shift, unit), _or(valid, unit), _or(column_lse, unit),
        _or(delta, unit), unit, mask, part_drows, part_dvalues,
        *x.stride(), *y.stride(), *mask_strides, head.heads, tokens, number, head.width, head.width_v,
        plan.slice_length, plan.slices, head.scale, bits,
        BLOCK_N=plan.block_n, KEYS=keys, HAS_VALID=valid is not None, HAS_MASK=mask is not x,
        **head.options(plan, head.backward_precision),
    )  # fmt: skip
    return part_drows.sum(2), part_dvalues.sum(2)


def _token_backward(
    head: _Head,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
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
    tokens, number = x.shape[2], rows.shape[2]
    plan = head.plan("token_bwd", tokens, number)
    mask, *mask_strides = mask_arguments(mask, x)
    like_dout = x if dout is None else dout
    nystrom_token_bwd_kernel[(head.batch * head.heads * -(-tokens // plan.block_n),)](
        x, y, rows, values, _or(row_lse, unit), _or(shift, unit), _or(valid, unit), _or(column_lse, unit),
        _or(delta, unit), unit, mask, _or(head.rank, unit), _or(head.count, unit), dmeans, total,
        like_dout, _or(weight, unit), dx, dy,
        *x.stride(), *y.stride(), *dx.stride(), *dy.stride(), *like_dout.stride(), *mask_strides,
        head.heads, tokens, number, head.width, head.width_v, *head.grid_arguments, *head.conv_grid[1:], *taps,
        skipped, head.scale, bits,
        BLOCK_N=plan.block_n, BLOCK_J=_BLOCK_J, KEYS=keys, HAS_VALID=valid is not None, HAS_MASK=mask is not x,
        HAS_MEANS=head.pooled, RANKED=head.rank is not None, VOLUME=not head.cells.sequence,
        HAS_CONV=dout is not None, CONV_VOLUME=head.conv_volume, **head.options(plan, head.backward_precision),
    )  # fmt: skip
