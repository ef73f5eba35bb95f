"""The step from inner to outer tokens: LayerNorm of each inner token, flatten, projection, add.

    out = outer + W flatten(LN(x)) + b

Source: Han et al. 2021, eq. (5). Fused, the normalised tokens never reach memory; gain and shift of the LayerNorm are
folded into W and b in PyTorch, whose autograd takes their gradients apart again. The kernels are right in Triton's
interpreter; every tile of configs/tnt.json compiles without spills. No GPU has run them.
Shapes: S windows of n tokens of width c, E width of the outer token.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels._dispatch import block, chip_of, resolve_backend
from medformer_kernels._linear import linear
from medformer_kernels.tnt.plans import OUTER_KERNELS, Plan, fits, launch_plan

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["backward", "forward", "tnt_inner_to_outer", "tnt_inner_to_outer_reference"]


def tnt_inner_to_outer(
    x: Float[Tensor, "S n c"],
    outer: Float[Tensor, "S E"] | None,
    *,
    norm_weight: Float[Tensor, " c"],
    norm_bias: Float[Tensor, " c"],
    weight: Float[Tensor, "E nc"],
    bias: Float[Tensor, " E"] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Float[Tensor, "S E"]:
    """What the inner tokens of each window add to its outer token, added to it.

    Args:
        x: inner tokens; any strides.
        outer: outer tokens, or None for what is added alone; any strides.
        norm_weight: of the LayerNorm over each token.
        norm_bias: of the same.
        weight: of the projection; products run in its dtype, LayerNorm and sums in float32.
        bias: of the projection.
        eps: of the LayerNorm.
        backend: 'auto', 'triton' or 'torch'. The kernels take what `configs/tnt.json` has a tile for.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    _check("tnt_inner_to_outer", x, outer, norm_weight, norm_bias, weight, bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    unsupported = _unsupported(x, weight) if backend == "triton" or (backend == "auto" and x.is_cuda) else None
    backend = resolve_backend("tnt_inner_to_outer", backend, weight, unsupported)
    with torch.autocast(device, enabled=False):
        if backend == "torch":
            return _reference(x, outer, norm_weight, norm_bias, weight, bias, eps)
        exact, tokens = weight.float(), x.shape[1]
        folded_bias = exact @ norm_bias.float().repeat(tokens)
        folded = (exact * norm_weight.float().repeat(tokens)).to(weight.dtype)
        folded_bias = folded_bias if bias is None else folded_bias + bias.float()
        return _project(x, outer, folded, folded_bias, eps)


def tnt_inner_to_outer_reference(
    x: Float[Tensor, "S n c"],
    outer: Float[Tensor, "S E"] | None,
    *,
    norm_weight: Float[Tensor, " c"],
    norm_bias: Float[Tensor, " c"],
    weight: Float[Tensor, "E nc"],
    bias: Float[Tensor, " E"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "S E"]:
    """The definition of `tnt_inner_to_outer`."""
    _check("tnt_inner_to_outer_reference", x, outer, norm_weight, norm_bias, weight, bias)
    return _reference(x, outer, norm_weight, norm_bias, weight, bias, eps)


def _reference(
    x: Tensor, outer: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    taken = linear(normed.flatten(1).to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    return taken if outer is None else outer + taken


def _check(
    function: str, x: Tensor, outer: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor,
    bias: Tensor | None,
) -> None:  # fmt: skip
    if x.ndim != 3 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(
            f"{function}: x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating point (S, n, c)"
        )
    sequences, tokens, width = x.shape
    channels = weight.shape[0] if weight.ndim else 0
    shapes = {
        "outer": (outer, (sequences, channels)), "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)), "weight": (weight, (channels, tokens * width)), "bias": (bias, (channels,)),
    }  # fmt: skip
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}; with x of {tuple(x.shape)} and weight of "
                f"{tuple(weight.shape)} it must be {expected}"
            )


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    if not _holds(x.device, x.shape[2], weight.element_size()):
        return f"c={x.shape[2]} in {weight.dtype}: no tile of it fits on chip"
    return None


@torch.compiler.assume_constant_result
def _holds(device: torch.device, width: int, itemsize: int) -> bool:
    return fits(chip_of(torch.empty(0, device=device)), 1, width, 1, itemsize, kernels=OUTER_KERNELS)


def _plan(kernel: str, x: Tensor, w: Tensor, parts: int = 1) -> Plan:
    return launch_plan(
        kernel, chip=chip_of(x), sequences=x.shape[0], tokens=1, width=x.shape[2], head=1, parts=parts,
        itemsize=w.element_size(),
    )  # fmt: skip


def _constants(x: Tensor, w: Tensor, plan: Plan) -> dict[str, int]:
    return {
        "C": x.shape[2], "E": w.shape[0], "BLOCK_R": plan.block_r, "BLOCK_C": block(x.shape[2]),
        "BLOCK_E": plan.block_f, "num_warps": plan.num_warps, "num_stages": plan.num_stages,
    }  # fmt: skip


def _kernels():
    from medformer_kernels.tnt import outer_kernels  # Triton decides at import whether it interprets

    return outer_kernels


def forward(x: Tensor, outer: Tensor | None, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """outer + xhat w^T + b: w (E, n c), b (E,) float32, with gain and shift of the LayerNorm folded in."""
    w, b, channels = w.contiguous(), b.contiguous(), w.shape[0]
    out = x.new_empty((x.shape[0], channels), dtype=_result(outer, w))
    if x.shape[0] == 0:
        return out
    plan = _plan("outer_fwd", x, w)
    _kernels().tnt_outer_fwd_kernel[(plan.tiles * -(-channels // plan.block_f),)](
        x, w, b, outer, out, *x.stride(), *((0, 0) if outer is None else outer.stride()), x.shape[0], x.shape[1],
        plan.tiles, eps, ADD=outer is not None, **_constants(x, w, plan),
    )  # fmt: skip
    return out


def _result(outer: Tensor | None, w: Tensor) -> torch.dtype:
    return w.dtype if outer is None else torch.promote_types(w.dtype, outer.dtype)


_project = torch.library.custom_op("medformer::tnt_inner_to_outer", forward, mutates_args=())


@_project.register_fake
def _(x, outer, w, b, eps):
    return x.new_empty((x.shape[0], w.shape[0]), dtype=_result(outer, w))


def backward(dout: Tensor, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db): see `forward`."""
    sequences, tokens, _ = x.shape
    channels = w.shape[0]
    w, dout = w.contiguous(), dout.to(w.dtype).contiguous()
    dx, dw, db = x.new_empty(x.shape), w.new_zeros(w.shape), w.new_zeros(channels, dtype=torch.float32)
    if sequences == 0:
        return dx, dw, db
    plan = _plan("outer_dx", x, w)
    _kernels().tnt_outer_dx_kernel[(plan.tiles * tokens,)](
        dout, x, w, dx, *x.stride(), sequences, tokens, plan.tiles, eps, **_constants(x, w, plan)
    )
    plan = _plan("outer_dw", x, w, channels)
    parts = -(-channels // plan.block_f) * tokens
    small = {"dtype": torch.float32, "device": x.device}
    dws, dbs = torch.empty(plan.slices, *w.shape, **small), torch.empty(plan.slices, channels, **small)
    _kernels().tnt_outer_dw_kernel[(plan.slices * parts,)](
        dout, x, dws, dbs, *x.stride(), sequences, tokens, plan.tiles, plan.slice_length, eps, **_constants(x, w, plan)
    )
    return dx, dws.sum(0).to(w.dtype), dbs.sum(0)


_project_backward = torch.library.custom_op("medformer::tnt_inner_to_outer_backward", backward, mutates_args=())


@_project_backward.register_fake
def _(dout, x, w, eps):
    return x.new_empty(x.shape), w.new_empty(w.shape), w.new_empty(w.shape[0], dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, outer, w, _, ctx.eps = inputs
    ctx.save_for_backward(x, w)
    ctx.outer = None if outer is None else outer.dtype


def _autograd(ctx, dout):
    x, w = ctx.saved_tensors
    dx, dw, db = _project_backward(dout, x, w, ctx.eps)
    return dx, None if ctx.outer is None else dout.to(ctx.outer), dw, db, None


_project.register_autograd(_autograd, setup_context=_setup)


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "tnt_inner_to_outer: double backward is not implemented; use tnt_inner_to_outer_reference, or torch.no_grad "
        "around the first gradient"
    )


_project_backward.register_autograd(_refuse_double_backward)
