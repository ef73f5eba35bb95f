"""The step from inner to outer tokens: LayerNorm of each inner token, flatten, projection, add.

    out = outer + W flatten(LN(x)) + b

Source: Han et al. 2021, eq. (5). Fused, the normalised tokens never reach memory; gain and shift of the LayerNorm are
folded into W and b in PyTorch, whose autograd takes their gradients apart again. The kernels are right in Triton's
interpreter; their tiles in configs/tnt.json compile without spills. No GPU has run them.
Shapes: S windows of n tokens of width c, E width of the outer token.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels._dispatch import block, chip_of, resolve_backend
from medformer_kernels._linear import linear
from medformer_kernels._operators import operator
from medformer_kernels._tracing import constant
from medformer_kernels.tnt.plans import OUTER_KERNELS, TilePlan, fits, launch_plan

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
    shapes = {"outer": (outer, (sequences, channels)), "weight": (weight, (channels, tokens * width))}
    shapes |= {"norm_weight": (norm_weight, (width,)), "norm_bias": (norm_bias, (width,)), "bias": (bias, (channels,))}
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


@constant
def _holds(device: torch.device, width: int, itemsize: int) -> bool:
    return fits(chip_of(torch.empty(0, device=device)), 1, width, 1, itemsize, kernels=OUTER_KERNELS)


def _plan(kernel: str, x: Tensor, w: Tensor, parts: int = 1) -> TilePlan:
    sizes = {"sequences": x.shape[0], "tokens": 1, "width": x.shape[2], "head": 1, "parts": parts}
    return launch_plan(kernel, chip=chip_of(x), itemsize=w.element_size(), **sizes)


def _meta(x: Tensor, w: Tensor, plan: TilePlan, add: bool = False) -> tuple[Any, ...]:
    """Of `outer_kernels`."""
    blocks = {"BLOCK_R": plan.block_r, "BLOCK_C": block(x.shape[2]), "BLOCK_E": plan.block_f}
    return _kernels().constexprs(_kernels().Meta(C=x.shape[2], E=w.shape[0], **blocks, ADD=add))


def _rows(x: Tensor) -> tuple[Any, ...]:
    return _kernels().Rows(x, b=x.stride(0), n=x.stride(1), d=x.stride(2))


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
    stride, column = (0, 0) if outer is None else outer.stride()
    arguments = (_rows(x), w, b, _kernels().Rows(outer, b=stride, d=column), out, x.shape[0], x.shape[1], eps)
    programs = plan.tiles * -(-channels // plan.block_f)
    _kernels().tnt_outer_fwd_kernel[(programs,)](*arguments, META=_meta(x, w, plan, outer is not None), **plan.launch)
    return out


def _result(outer: Tensor | None, w: Tensor) -> torch.dtype:
    return w.dtype if outer is None else torch.promote_types(w.dtype, outer.dtype)


def _fake(x, outer, w, b, eps):
    return x.new_empty((x.shape[0], w.shape[0]), dtype=_result(outer, w))


_project = operator("tnt_inner_to_outer", _fake, public="tnt_inner_to_outer", samples=("x", "outer"))(forward)


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
        dout, _rows(x), w, dx, sequences, tokens, eps, META=_meta(x, w, plan), **plan.launch
    )
    plan = _plan("outer_dw", x, w, channels)
    parts = -(-channels // plan.block_f) * tokens
    small = {"dtype": torch.float32, "device": x.device}
    dws, dbs = torch.empty(plan.slices, *w.shape, **small), torch.empty(plan.slices, channels, **small)
    arguments = (dout, _rows(x), dws, dbs, sequences, tokens, plan.tiles, plan.slice_length, eps)
    _kernels().tnt_outer_dw_kernel[(plan.slices * parts,)](*arguments, META=_meta(x, w, plan), **plan.launch)
    return dx, dws.sum(0).to(w.dtype), dbs.sum(0)


def _backward_fake(dout, x, w, eps):
    return x.new_empty(x.shape), w.new_empty(w.shape), w.new_empty(w.shape[0], dtype=torch.float32)


# Its weight gradients are sums over the batch.
_project_backward = operator(
    "tnt_inner_to_outer_backward",
    _backward_fake,
    public="tnt_inner_to_outer",
    gradient=True,
    samples=("dout", "x"),
    per_sample=lambda call: True,
)(backward)


def _setup(ctx, inputs, output):
    x, outer, w, _, ctx.eps = inputs
    ctx.save_for_backward(x, w)
    ctx.outer = None if outer is None else outer.dtype


def _autograd(ctx, dout):
    x, w = ctx.saved_tensors
    dx, dw, db = _project_backward(dout, x, w, ctx.eps)
    return dx, None if ctx.outer is None else dout.to(ctx.outer), dw, db, None


_project.register_autograd(_autograd, setup_context=_setup)
