"""Launches of the kernels of the inner block: tiles, slices, and the bytes and FLOP they come to.

Cost, forward, of S n = R rows: 2 R (4 c^2 + 2 c f) FLOP in the linear layers, 4 R n c in attention, R n H exponentials;
x and out pass through memory once, and the middle of the block too where a gradient will be wanted. Backward: four
kernels (`costs` counts), which read x, the middle and dout and keep nothing of size n x n or n x f.

Right in Triton's interpreter (tests/test_tnt_kernel.py, float32 and float16); every tile of configs/tnt.json compiles
without spills (`benchmarks/choose_tnt_configs.py`, `benchmarks/compile_report.py`), and a shape without one is refused
by name. Never run on a GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medformer_kernels._dispatch import Chip, block, chip_of
from medformer_kernels.tnt.dropping import threshold
from medformer_kernels.tnt.kernels import (
    tnt_attn_dw_kernel,
    tnt_attn_dx_kernel,
    tnt_fwd_kernel,
    tnt_mlp_dw_kernel,
    tnt_mlp_dx_kernel,
)
from medformer_kernels.tnt.plans import Plan, launch_plan
from medformer_kernels.tnt.weights import TNTInnerWeights

__all__ = ["Cost", "backward", "costs", "forward"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one launch does: operations, exponentials (of the softmax), and bytes to and from memory (the weights not
    counted: every program finds them in the cache; partial sums are)."""

    flop: int
    exponentials: int
    bytes: int


def costs(
    *, chip: Chip, sequences: int, tokens: int, width: int, hidden: int, num_heads: int, itemsize: int
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass, from the launch plans themselves."""
    rows = sequences * tokens
    tensor = rows * width * itemsize

    def plan(kernel: str) -> Plan:
        parts = {"attn_dw": num_heads, "mlp_dw": hidden}.get(kernel, 1)
        return launch_plan(
            kernel, chip=chip, sequences=sequences, tokens=tokens, width=width, head=width // num_heads, parts=parts,
            itemsize=itemsize,
        )  # fmt: skip

    linear, mlp, scores = 2 * rows * width * width, 2 * rows * width * hidden, 2 * rows * tokens * width
    exponentials = rows * tokens * num_heads
    fwd, attn_dx, attn_dw, mlp_dw = (plan(kernel) for kernel in ("fwd", "attn_dx", "attn_dw", "mlp_dw"))
    mlp_passes, attn_passes = -(-hidden // mlp_dw.block_f), num_heads * len(_halves(attn_dw))
    mlp_partial, attn_partial = 2 * 4 * (2 * hidden * width) * mlp_dw.slices, 2 * 4 * (4 * width**2) * attn_dw.slices
    return {
        "fwd": Cost(
            flop=4 * linear + 2 * mlp + 2 * scores, exponentials=exponentials, bytes=(4 if fwd.split else 3) * tensor
        ),
        "mlp_dx": Cost(flop=3 * mlp, exponentials=0, bytes=3 * tensor),
        "mlp_dw": Cost(flop=4 * mlp, exponentials=0, bytes=2 * mlp_passes * tensor + mlp_partial),
        # Two launches compute queries, keys, the gradient of o and scores twice.
        "attn_dx": Cost(
            flop=(10 * linear + 6 * scores) if attn_dx.split else (7 * linear + 5 * scores),
            exponentials=len(_halves(attn_dx)) * exponentials,
            bytes=(7 if attn_dx.split else 3) * tensor,
        ),
        "attn_dw": Cost(
            flop=(12 * linear + 7 * scores) if attn_dw.split else (8 * linear + 6 * scores),
            exponentials=len(_halves(attn_dw)) * exponentials,
            bytes=2 * attn_passes * tensor + attn_partial,
        ),
    }


def _plan(kernel: str, x: Tensor, w: TNTInnerWeights, num_heads: int, parts: int = 1) -> Plan:
    sequences, tokens, width = x.shape
    return launch_plan(
        kernel,
        chip=chip_of(x),
        sequences=sequences,
        tokens=tokens,
        width=width,
        head=width // num_heads,
        parts=parts,
        itemsize=w.qkv_weight.element_size(),
    )


def _constants(x: Tensor, plan: Plan, dropout: float, drop_path: float) -> dict[str, Any]:
    return {
        "C": x.shape[2],
        "DROP": dropout > 0,
        "PATH": drop_path > 0,
        "DENSE": x.is_contiguous(),
        "BLOCK_R": plan.block_r,
        "BLOCK_C": block(x.shape[2]),
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }


def _dropping(dropout: float, drop_path: float) -> tuple[int, int, float, float]:
    return threshold(dropout), threshold(drop_path), 1.0 / (1.0 - dropout), 1.0 / (1.0 - drop_path)


def _halves(plan: Plan) -> tuple[tuple[bool, bool], ...]:
    """Which halves of a kernel each of its launches computes."""
    return ((True, False), (False, True)) if plan.split else ((True, True),)


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def fold(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """W (xhat gain + shift) + b as W' xhat + b': W' in the dtype of W, b' in float32. A few thousand numbers."""
    exact = weight.float()
    folded = exact @ shift.float()
    return (exact * gain.float()).to(weight.dtype), folded if bias is None else folded + bias.float()


def unfold(
    dfolded: Tensor, dbias: Tensor, weight: Tensor, gain: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dW, dgain, dshift) from the gradients of what `fold` gave: d(W') = sum dy^T xhat, d(b') = sum dy."""
    exact = weight.float()
    dweight = dfolded * gain.float() + dbias[:, None] * shift.float()
    return dweight, (exact * dfolded).sum(0), dbias @ exact


def forward(
    x: Tensor,
    w: TNTInnerWeights,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
    middle: Tensor | None,
) -> Tensor:
    """See `ops.tnt_inner_block`; fills `middle` where there is one."""
    sequences, tokens, width = x.shape
    out = x.new_empty(x.shape)
    if sequences == 0:
        return out
    qkv = fold(w.qkv_weight, w.qkv_bias, w.norm1_weight, w.norm1_bias)
    fc1 = fold(w.fc1_weight, w.fc1_bias, w.norm2_weight, w.norm2_bias)
    plan = _plan("fwd", x, w, num_heads)
    if plan.split and middle is None:
        middle = torch.empty_like(out)
    for attention, mlp in _halves(plan):
        tnt_fwd_kernel[(plan.programs,)](
            x, *qkv, w.proj_weight.contiguous(), _packed(w.proj_bias), *fc1, w.fc2_weight.contiguous(),
            _packed(w.fc2_bias), seed, out, middle, *x.stride(), sequences, tokens, plan.per_tile, plan.tiles, eps,
            (width // num_heads) ** -0.5, *_dropping(dropout, drop_path), H=num_heads, F=w.fc1_weight.shape[0],
            PROJ_BIAS=w.proj_bias is not None, FC2_BIAS=w.fc2_bias is not None, SAVE=middle is not None,
            ATTENTION=attention, MLP=mlp,
            BLOCK_D=block(width // num_heads), BLOCK_F=plan.block_f, **_constants(x, plan, dropout, drop_path),
        )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    middle: Tensor,
    w: TNTInnerWeights,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
    with_weights: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(dx, float32 gradients of the weights by name): see `ops.tnt_inner_block_backward`."""
    sequences, tokens, width = x.shape
    hidden = w.fc1_weight.shape[0]
    if sequences == 0:
        empty = {name: torch.zeros_like(tensor) for name, tensor in vars(w).items() if tensor is not None}
        return x.new_empty(x.shape), empty
    qkv = fold(w.qkv_weight, w.qkv_bias, w.norm1_weight, w.norm1_bias)
    fc1 = fold(w.fc1_weight, w.fc1_bias, w.norm2_weight, w.norm2_bias)
    dropping = _dropping(dropout, drop_path)
    drop = {"dropout": dropout, "drop_path": drop_path}
    small = {"dtype": torch.float32, "device": x.device}
    scale = (width // num_heads) ** -0.5
    mlp = (*fc1, w.fc2_weight.contiguous(), seed)
    attention = (*qkv, w.proj_weight.contiguous(), seed)
    attention_constants = {"H": num_heads, "BLOCK_D": block(width // num_heads)}

    plan = _plan("mlp_dx", x, w, num_heads)
    dmiddle = x.new_empty(x.shape)
    tnt_mlp_dx_kernel[(plan.programs,)](
        dout, middle, *mlp, dmiddle, *dout.stride(), sequences, tokens, plan.tiles, eps, *dropping,
        F=hidden, BLOCK_F=plan.block_f, **_constants(dout, plan, **drop),
    )  # fmt: skip
    plan = _plan("attn_dx", x, w, num_heads)
    dx = x.new_empty(x.shape)
    for values, scores in _halves(plan):
        tnt_attn_dx_kernel[(plan.programs,)](
            dmiddle, x, *attention, dx, *x.stride(), sequences, tokens, plan.per_tile, plan.tiles, eps, scale,
            *dropping, VALUES=values, SCORES=scores, **attention_constants, **_constants(x, plan, **drop),
        )  # fmt: skip
    if not with_weights:
        return dx, {}

    plan = _plan("mlp_dw", x, w, num_heads, hidden)
    dfc1 = torch.empty(plan.slices, hidden, width, **small)
    dfc1_bias, dfc2 = torch.empty(plan.slices, hidden, **small), torch.empty_like(dfc1)
    dfc2_bias = torch.empty(plan.slices, width, **small)
    tnt_mlp_dw_kernel[(plan.slices * -(-hidden // plan.block_f),)](
        dout, middle, *mlp, dfc1, dfc1_bias, dfc2, dfc2_bias, *dout.stride(), sequences, tokens, plan.tiles,
        plan.slice_length, eps, *dropping, F=hidden, BLOCK_F=plan.block_f, **_constants(dout, plan, **drop),
    )  # fmt: skip
    plan = _plan("attn_dw", x, w, num_heads, num_heads)
    dqkv = torch.empty(plan.slices, 3 * width, width, **small)
    dqkv_bias, dproj = torch.empty(plan.slices, 3 * width, **small), torch.empty(plan.slices, width, width, **small)
    dproj_bias = torch.empty(plan.slices, width, **small)
    for values, scores in _halves(plan):
        tnt_attn_dw_kernel[(plan.slices * num_heads,)](
            dmiddle, x, *attention, dqkv, dqkv_bias, dproj, dproj_bias, *x.stride(), sequences, tokens, plan.per_tile,
            plan.tiles, plan.slice_length, eps, scale, *dropping, VALUES=values, SCORES=scores, **attention_constants,
            **_constants(x, plan, **drop),
        )  # fmt: skip
    sums = {
        "qkv_bias": dqkv_bias.sum(0), "proj_weight": dproj.sum(0), "proj_bias": dproj_bias.sum(0),
        "fc1_bias": dfc1_bias.sum(0), "fc2_weight": dfc2.sum(0).t().contiguous(), "fc2_bias": dfc2_bias.sum(0),
    }  # fmt: skip
    for linear, norm, folded in (("qkv", "norm1", dqkv), ("fc1", "norm2", dfc1)):
        gain, shift = getattr(w, f"{norm}_weight"), getattr(w, f"{norm}_bias")
        weight = getattr(w, f"{linear}_weight")
        sums[f"{linear}_weight"], sums[f"{norm}_weight"], sums[f"{norm}_bias"] = unfold(
            folded.sum(0), sums[f"{linear}_bias"], weight, gain, shift
        )
    return dx, sums
