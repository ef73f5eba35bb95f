"""The inner block as a `torch.library` operator, and its gradient.

    y   = x + f1 proj(attention(LN1(x)))
    out = y + f2 fc2(GELU(fc1(LN2(y))))         f1, f2: what each branch drops, `dropping`

Backward computes everything between x and out again, in PyTorch chunk by chunk; the kernels start from y too
(`middle`), which their forward pass writes where a gradient will be wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medformer_kernels.tnt import chunked
from medformer_kernels.tnt.weights import NAMES, TNTInnerWeights

__all__ = ["tnt_inner_block", "tnt_inner_block_backward"]


def _fused():
    from medformer_kernels.tnt import fused  # Triton decides at import whether it interprets

    return fused


def _weights(*tensors: Tensor | None) -> TNTInnerWeights:
    return TNTInnerWeights(**dict(zip(NAMES, tensors, strict=True)))  # type: ignore[arg-type]


@torch.library.custom_op("medformer::tnt_inner_block", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """(out, middle), both (S, n, c); `middle` is empty unless the kernels run and `save` it."""
    w = _weights(
        norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    if backend == "torch":
        return chunked.forward(x, w, seed, num_heads, eps, dropout, drop_path), x.new_empty(0)
    return _fused().forward(x, w, seed, num_heads, eps, dropout, drop_path, save)


@tnt_inner_block.register_fake
def _(x, *arguments):
    save, backend = arguments[-2:]
    return x.new_empty(x.shape), x.new_empty(x.shape if save and backend == "triton" else (0,))


@torch.library.custom_op("medformer::tnt_inner_block_backward", mutates_args=())
def tnt_inner_block_backward(
    dout: Tensor,
    x: Tensor,
    middle: Tensor,
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
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """dx, then the gradient of each weight; empty where it is absent, and all of them unless `with_weights`."""
    w = _weights(
        norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    settings = (seed, num_heads, eps, dropout, drop_path)
    if backend == "torch":
        dx, sums = chunked.backward(dout, x, w, *settings)
    else:
        dx, sums = _fused().backward(dout, x, middle, w, *settings, with_weights)
    gradients = [
        x.new_empty(0) if tensor is None or not with_weights else sums[name].to(tensor.dtype)
        for name, tensor in zip(NAMES, w.tensors(), strict=True)
    ]
    return dx, *gradients  # type: ignore[return-value]


@tnt_inner_block_backward.register_fake
def _(dout, x, middle, *arguments):
    tensors, with_weights = arguments[: len(NAMES)], arguments[-2]
    return x.new_empty(x.shape), *(
        x.new_empty(0) if tensor is None or not with_weights else torch.empty_like(tensor) for tensor in tensors
    )


def _setup(ctx, inputs, output):
    x, *tensors = inputs[: 1 + len(NAMES)]
    seed, *ctx.settings, _, ctx.backend = inputs[1 + len(NAMES) :]
    ctx.save_for_backward(x, output[1], *tensors, seed)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dout, _):
    x, middle, *tensors, seed = ctx.saved_tensors
    with_weights = any(ctx.needs_input_grad[1 : 1 + len(NAMES)])
    dx, *gradients = tnt_inner_block_backward(dout, x, middle, *tensors, seed, *ctx.settings, with_weights, ctx.backend)
    kept = [
        None if tensor is None or not with_weights else gradient
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]
    return dx, *kept, *[None] * 7


tnt_inner_block.register_autograd(_autograd, setup_context=_setup)


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "tnt_inner_block: double backward is not implemented; use tnt_inner_block_reference, or torch.no_grad around "
        "the first gradient"
    )


tnt_inner_block_backward.register_autograd(_refuse_double_backward)
