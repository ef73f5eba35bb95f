"""Launches of the kernels of the inner block: tiles and slices.

Cost, forward, of S n = R rows: 2 R (4 c^2 + 2 c f) FLOP in the linear layers, 4 R n c in attention, R n H exponentials;
x and out pass through memory once, and the middle of the block too where a gradient will be wanted. Backward: four
kernels (benchmarks/compile_cases counts), which read x, the middle and dout and keep nothing of size n x n or n x f.

Right in Triton's interpreter (tests/test_tnt_kernel.py, float32, float16 and bfloat16). The tiles of configs/tnt.json
were chosen to compile without spills (`benchmarks/choose_tnt_configs.py`; misc/docs/unverified.md has the exceptions).
A shape without a tile raises ValueError, and 'auto' takes PyTorch. Never run on a GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medformer_kernels._dispatch import block, chip_of
from medformer_kernels._dropout import threshold
from medformer_kernels._triton import Rows, constexprs
from medformer_kernels.tnt.kernels import (
    Meta,
    tnt_attn_dw_kernel,
    tnt_attn_dx_kernel,
    tnt_fwd_kernel,
    tnt_mlp_dw_kernel,
    tnt_mlp_dx_kernel,
)
from medformer_kernels.tnt.plans import TilePlan, launch_plan
from medformer_kernels.tnt.weights import TNTInnerWeights

__all__ = ["backward", "forward", "halves"]


def _plan(kernel: str, x: Tensor, w: TNTInnerWeights, num_heads: int, parts: int = 1) -> TilePlan:
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


def _meta(x: Tensor, plan: TilePlan, dropout: float, drop_path: float, **constants: Any) -> Meta:
    shared = {"C": x.shape[2], "BLOCK_R": plan.block_r, "BLOCK_C": block(x.shape[2]), "DENSE": x.is_contiguous()}
    return Meta(**shared, DROP=dropout > 0, PATH=drop_path > 0, **constants)


def _rows(x: Tensor) -> Rows:
    return Rows(x, b=x.stride(0), n=x.stride(1), d=x.stride(2))


def _dropping(dropout: float, drop_path: float) -> tuple[int, int, tuple[float, float]]:
    return threshold(dropout), threshold(drop_path), (1.0 / (1.0 - dropout), 1.0 / (1.0 - drop_path))


def halves(plan: TilePlan) -> tuple[tuple[bool, bool], ...]:
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
    attn = (*qkv, w.proj_weight.contiguous(), _packed(w.proj_bias))
    mlp = (*fc1, w.fc2_weight.contiguous(), _packed(w.fc2_bias))
    sizes = (sequences, tokens, plan.per_tile, plan.tiles, eps, (width // num_heads) ** -0.5)
    widths = {"H": num_heads, "F": w.fc1_weight.shape[0], "BLOCK_D": block(width // num_heads), "BLOCK_F": plan.block_f}
    flags = {"PROJ_BIAS": w.proj_bias is not None, "FC2_BIAS": w.fc2_bias is not None, "SAVE": middle is not None}
    arguments = (_rows(x), attn, mlp, seed, out, middle, *sizes, *_dropping(dropout, drop_path))
    for first, second in halves(plan):
        constants = _meta(x, plan, dropout, drop_path, ATTENTION=first, MLP=second, **widths, **flags)
        tnt_fwd_kernel[(plan.programs,)](*arguments, META=constexprs(constants), **plan.launch)
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
    """(dx, float32 gradients of the weights, name by name): see `ops.tnt_inner_block_backward`."""
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
    mlp = (*fc1, w.fc2_weight.contiguous())
    attn = (*qkv, w.proj_weight.contiguous())
    heads = {"H": num_heads, "BLOCK_D": block(width // num_heads)}

    plan = _plan("mlp_dx", x, w, num_heads)
    dmiddle = x.new_empty(x.shape)
    arguments = (_rows(dout), middle, mlp, seed, dmiddle, sequences, tokens, plan.tiles, eps, *dropping)
    constants = _meta(dout, plan, **drop, F=hidden, BLOCK_F=plan.block_f)
    tnt_mlp_dx_kernel[(plan.programs,)](*arguments, META=constexprs(constants), **plan.launch)
    plan = _plan("attn_dx", x, w, num_heads)
    dx = x.new_empty(x.shape)
    sizes = (sequences, tokens, plan.per_tile, plan.tiles, eps, scale)
    for values, scores in halves(plan):
        constants = _meta(x, plan, **drop, VALUES=values, SCORES=scores, **heads)
        arguments = (dmiddle, _rows(x), attn, seed, dx, *sizes, *dropping)
        tnt_attn_dx_kernel[(plan.programs,)](*arguments, META=constexprs(constants), **plan.launch)
    if not with_weights:
        return dx, {}

    plan = _plan("mlp_dw", x, w, num_heads, hidden)
    dfc1 = torch.empty(plan.slices, hidden, width, **small)
    dfc1_bias, dfc2 = torch.empty(plan.slices, hidden, **small), torch.empty_like(dfc1)
    dfc2_bias = torch.empty(plan.slices, width, **small)
    inputs, gradients = (_rows(dout), middle, mlp, seed), (dfc1, dfc1_bias, dfc2, dfc2_bias)
    arguments = (*inputs, gradients, sequences, tokens, plan.tiles, plan.slice_length, eps, *dropping)
    constants = _meta(dout, plan, **drop, F=hidden, BLOCK_F=plan.block_f)
    programs = plan.slices * -(-hidden // plan.block_f)
    tnt_mlp_dw_kernel[(programs,)](*arguments, META=constexprs(constants), **plan.launch)
    plan = _plan("attn_dw", x, w, num_heads, num_heads)
    dqkv = torch.empty(plan.slices, 3 * width, width, **small)
    dqkv_bias, dproj = torch.empty(plan.slices, 3 * width, **small), torch.empty(plan.slices, width, width, **small)
    dproj_bias = torch.empty(plan.slices, width, **small)
    sizes = (sequences, tokens, plan.per_tile, plan.tiles, plan.slice_length, eps, scale)
    for values, scores in halves(plan):
        constants = _meta(x, plan, **drop, VALUES=values, SCORES=scores, **heads)
        arguments = (dmiddle, _rows(x), attn, seed, (dqkv, dqkv_bias, dproj, dproj_bias), *sizes, *dropping)
        tnt_attn_dw_kernel[(plan.slices * num_heads,)](*arguments, META=constexprs(constants), **plan.launch)
    sums = {"qkv_bias": dqkv_bias.sum(0), "proj_weight": dproj.sum(0), "proj_bias": dproj_bias.sum(0)}
    sums |= {"fc1_bias": dfc1_bias.sum(0), "fc2_weight": dfc2.sum(0).t().contiguous(), "fc2_bias": dfc2_bias.sum(0)}
    for linear, norm, folded in (("qkv", "norm1", dqkv), ("fc1", "norm2", dfc1)):
        gain, shift = getattr(w, f"{norm}_weight"), getattr(w, f"{norm}_bias")
        weight = getattr(w, f"{linear}_weight")
        sums[f"{linear}_weight"], sums[f"{norm}_weight"], sums[f"{norm}_bias"] = unfold(
            folded.sum(0), sums[f"{linear}_bias"], weight, gain, shift
        )
    return dx, sums
