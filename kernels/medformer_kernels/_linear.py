"""Linear layers in float32 on a CPU through oneDNN: `_products` says why. They have gradients, of any order.

Shapes: m rows, k channels in, n out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from medformer_kernels._products import ONEDNN, worth_a_call

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["linear"]


def linear(
    x: Float[Tensor, "*rows k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "*rows n"]:
    """`torch.nn.functional.linear`; in float32 on a CPU through oneDNN where that pays. Sums have another order."""
    if (
        x.device.type != "cpu"
        or x.ndim < 2
        or any(tensor is not None and tensor.dtype != torch.float32 for tensor in (x, weight, bias))
        or not worth_a_call(math.prod(x.shape[:-1]), *weight.shape)
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()  # whatever compiles or exports knows the usual operator better
    ):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """x (m, k), weight (n, k), bias (n,) to (m, n); its gradients are linear layers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert ONEDNN is not None
        return ONEDNN(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = ctx.needs_input_grad
        return (
            linear(dout, weight.t()) if dx else None,
            linear(dout.t(), x.t()) if dweight else None,
            dout.sum(0) if dbias else None,
        )

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        parts = (
            None if x_t is None else linear(x_t, weight),
            None if weight_t is None else linear(x, weight_t),
            bias_t,
        )
        tangent = sum(part for part in parts if part is not None)
        assert isinstance(tangent, Tensor)
        return tangent.expand(x.shape[0], -1)


if ONEDNN is not None and ONEDNN not in flop_registry:  # another build of this package may be loaded

    @register_flop_formula(ONEDNN)
    def _flop(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: object, **__: object) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]
