"""The inner block as a `torch.library` operator, and its gradient.

    y   = x + f1 proj(attention(LN1(x)))
    out = y + f2 fc2(GELU(fc1(LN2(y))))         f1, f2: what each branch drops, `dropping`

Where a gradient will be wanted (`save`) forward keeps y for it and, in PyTorch, what goes into the projection
(`chunked.Kept`); from these and from x, backward computes everything again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medformer_kernels._operators import operator
from medformer_kernels.tnt import chunked
from medformer_kernels.tnt.weights import NAMES, TNTInnerWeights

__all__ = ["tnt_inner_block", "tnt_inner_block_backward"]

_KEPT = len(chunked.Kept._fields)


def _fused():
    from medformer_kernels.tnt import fused  # Triton decides at import whether it interprets

    return fused


def _weights(*tensors: Tensor | None) -> TNTInnerWeights:
    return TNTInnerWeights(**dict(zip(NAMES, tensors, strict=True)))  # type: ignore[arg-type]


def _inner_fake(x, *arguments):
    w, (save, backend) = _weights(*arguments[: len(NAMES)]), arguments[-2:]
    return x.new_empty(x.shape), *_kept(x, w.qkv_weight, save, backend)


@operator(
    "tnt_inner_block",
    _inner_fake,
    public="tnt_inner_block",
    samples=("x",),
    per_sample=lambda call: call["seed"] is not None,
)
def tnt_inner_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (S, n, c), then what is kept for backward, in the order of `chunked.Kept`; empty unless `save`."""
    w = _weights(
        norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    settings = (seed, num_heads, eps, dropout, drop_path)
    kept = _kept(x, qkv_weight, save, backend)
    if backend == "torch":
        out = chunked.forward(x, w, *settings, chunked.Kept(*kept) if save else None)
    else:
        out = _fused().forward(x, w, *settings, kept[0] if save else None)
    return out, *kept


def _kept(x: Tensor, qkv_weight: Tensor, save: bool, backend: str) -> tuple[Tensor, Tensor]:
    if save and backend == "torch":
        return chunked.Kept.empty(x, qkv_weight.dtype)
    return x.new_empty(x.shape if save else (0,)), x.new_empty(0)


def _inner_backward_fake(dout, x, *arguments):
    tensors, with_weights = arguments[_KEPT : _KEPT + len(NAMES)], arguments[-2]
    return x.new_empty(x.shape), *(
        x.new_empty(0) if tensor is None or not with_weights else torch.empty_like(tensor) for tensor in tensors
    )


@operator(
    "tnt_inner_block_backward",
    _inner_backward_fake,
    public="tnt_inner_block",
    gradient=True,
    samples=("dout", "x", "middle", "mixed"),
    per_sample=lambda call: call["seed"] is not None or call["with_weights"],
)
def tnt_inner_block_backward(
    dout: Tensor,
    x: Tensor,
    middle: Tensor,
    mixed: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
    with_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, then the gradient of each weight; empty where it is absent, and all of them unless `with_weights`."""
    w = _weights(
        norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    settings = (seed, num_heads, eps, dropout, drop_path)
    if backend == "torch":
        dx, sums = chunked.backward(dout, x, w, *settings, chunked.Kept(middle, mixed))
    else:
        dx, sums = _fused().backward(dout, x, middle, w, *settings, with_weights)
    gradients = [
        x.new_empty(0) if tensor is None or not with_weights else sums[name].to(tensor.dtype)
        for name, tensor in zip(NAMES, w.tensors(), strict=True)
    ]
    return dx, *gradients  # type: ignore[return-value]


def _setup(ctx, inputs, output):
    x, *tensors = inputs[: 1 + len(NAMES)]
    seed, *ctx.settings, _, ctx.backend = inputs[1 + len(NAMES) :]
    ctx.save_for_backward(x, *output[1:], *tensors, seed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else what is kept would get gradients of its size, full of zeros


def _autograd(ctx, dout, *_):
    x, *saved, seed = ctx.saved_tensors
    kept, tensors = saved[:_KEPT], saved[_KEPT:]
    with_weights = any(ctx.needs_input_grad[1 : 1 + len(NAMES)])
    dx, *gradients = tnt_inner_block_backward(dout, x, *kept, *tensors, seed, *ctx.settings, with_weights, ctx.backend)
    given = [
        None if tensor is None or not with_weights else gradient
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]
    return dx, *given, *[None] * 7


tnt_inner_block.register_autograd(_autograd, setup_context=_setup)
