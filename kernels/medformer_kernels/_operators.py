"""What every operator of this package has, so that no family can forget it.

device           it runs with the device of its first tensor current: Triton launches on the current one
empty batch      its outputs are empty, and gradients of what the samples share are 0; nothing is launched
vmap             a batch of calls is one call of a larger batch where samples alone are batched, else one call each
forward mode     raises; PyTorch would return tangents of 0
double backward  raises, as the gradient operators say (`gradient=True`)

Compositions of PyTorch's operators that are differentiable once raise the same errors through `first_order`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

__all__ = ["constants", "first_order", "followed", "operator", "transformed"]

_LIBRARY = torch.library.Library("medformer", "IMPL")


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active, which autograd functions must support."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def followed(*tensors: Tensor | None) -> bool:
    """Whether autograd, in either mode, or a transform of torch.func may follow what is made of these tensors.

    Under a transform `requires_grad` does not say so: that of a vmapped tensor is False.
    """
    if not torch.compiler.is_compiling() and (transformed() or forward_ad._current_level >= 0):
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def operator(
    name: str,
    fake: Callable[..., Any],
    *,
    public: str,
    definition: str = "",
    samples: Sequence[str] = (),
    per_sample: Callable[[dict[str, Any]], bool] | None = None,
    gradient: bool = False,
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Defines the operator `medformer::<name>`, whose first argument is a tensor with the batch in front.

    Args:
        fake: outputs of the right shapes and strides, without values. A 1-D tensor without elements is no output.
        public: the function that errors name.
        definition: what they recommend in its place; by default `<public>_reference`.
        samples: arguments (tensors, or lists of them) with the batch in front, as all outputs have it.
        per_sample: calls, by their arguments, whose outputs depend on more than each sample alone (sums over the batch,
            dropout by place): vmap makes one call a sample of them.
        gradient: it is the gradient of another operator, and has none.
    """

    definition = definition or f"{public}_reference"

    def define(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(
            f"medformer::{name}",
            _on_device(function, fake),
            mutates_args=(),
            schema=torch.library.infer_schema(function, mutates_args=()),
        )
        op.register_fake(fake)
        op.register_vmap(_vmap_rule(op, tuple(inspect.signature(function).parameters), samples, per_sample))
        if gradient:
            op.register_autograd(lambda ctx, *_: _refuse_double_backward(public, definition))
        call = _differentiable(op)

        def autograd(keyset: Any, *args: Any) -> Any:
            # Here, below each transform of torch.func: a function that is called sees the innermost alone.
            if forward_ad._current_level >= 0:
                _refuse_tangents(public, definition, args)
            return call(keyset, args)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True, allow_override=True)
        return op

    return define


def _on_device(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(x: Tensor, *args: Any) -> Any:
        if x.shape[0] == 0:
            outputs = fake(x, *args)
            return outputs.zero_() if isinstance(outputs, Tensor) else tuple(output.zero_() for output in outputs)
        if x.is_cuda:
            with torch.cuda.device(x.device):
                return function(x, *args)
        return function(x, *args)

    return run


def _differentiable(op: CustomOpDef) -> Callable[[Any, tuple[Any, ...]], Any]:
    """As PyTorch's own kernel for autograd, but one that the transforms of torch.func take, and that counts gradients.

    `_SingleLevelFunction` is what torch.func itself makes of an autograd function at each of its levels.
    """
    overload = op._opoverload
    defaults = [argument.default_value for argument in overload._schema.arguments]

    def below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Call(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args_keyset: Any) -> Any:
            *args, keyset = args_keyset
            if torch._C._are_functorch_transforms_active():
                # An autograd function runs without gradients, which the levels below this one may still need.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = below(keyset, args)
            else:
                output = below(keyset, args)
            if op._setup_context_fn is not None:
                with torch._C._AutoDispatchBelowAutograd():
                    op._setup_context_fn(ctx, (*args, *defaults[len(args) :]), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if op._backward_fn is None:
                raise NotImplementedError(f"{overload}: the operator has no gradient")
            gradients = op._backward_fn(ctx, *grads)
            if len(gradients) != len(defaults):
                raise RuntimeError(f"{overload}: {len(gradients)} gradients for {len(defaults)} inputs")
            # Of trailing inputs left at their defaults there is none, and one of the keyset.
            return *gradients[: len(ctx.needs_input_grad) - 1], None

    apply: Any = Call.apply  # pyright: ignore[reportAttributeAccessIssue]

    def call(keyset: Any, args: tuple[Any, ...]) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, args)
        args = unwrap_dead_wrappers(args)
        if not torch._C._are_functorch_transforms_active():
            return apply(*args, keyset)
        with enable_single_level_autograd_function():
            return apply(*args, keyset)

    return call


def _refuse_tangents(public: str, definition: str, args: Sequence[Any]) -> None:
    for x in args:
        if isinstance(x, list | tuple):
            _refuse_tangents(public, definition, x)
        elif isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            _refuse_forward_mode(public, definition)


def _refuse_forward_mode(public: str, definition: str) -> NoReturn:
    raise NotImplementedError(
        f"{public}: forward mode (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad) is not implemented; use "
        f"{definition}, or reverse mode (torch.func.vjp, jacrev)"
    )


def _refuse_double_backward(public: str, definition: str) -> NoReturn:
    raise NotImplementedError(
        f"{public}: double backward is not implemented; use {definition}, or torch.no_grad around the first gradient"
    )


def _vmap_rule(
    op: CustomOpDef,
    names: Sequence[str],
    samples: Sequence[str],
    per_sample: Callable[[dict[str, Any]], bool] | None,
) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        size, named = info.batch_size, dict(zip(names, args, strict=False))
        shared = any(_batched(dim) for name, dim in zip(names, in_dims, strict=False) if name not in samples)
        if shared or (per_sample is not None and per_sample(named)):
            calls = [
                op(*(_each(_chosen, x, dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in range(size)
            ]
            if isinstance(calls[0], Tensor):
                return torch.stack(calls), 0
            return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])
        folded = [
            _each(_folded, x, dim, size) if name in samples else x
            for name, x, dim in zip(named, args, in_dims, strict=True)
        ]
        outputs = op(*folded)
        if isinstance(outputs, Tensor):
            return _unfolded(outputs, size), 0
        nothing = [_is_nothing(x) for x in outputs]
        unfolded = [x if no else _unfolded(x, size) for x, no in zip(outputs, nothing, strict=True)]
        return tuple(unfolded), tuple(None if no else 0 for no in nothing)

    return rule


def _batched(dim: Any) -> bool:
    return any(map(_batched, dim)) if isinstance(dim, list | tuple) else dim is not None


def _each(function: Callable[..., Any], x: Any, dim: Any, number: int) -> Any:
    """`function` of each tensor of an argument, and of the axis that vmap added to it."""
    if isinstance(x, list | tuple) and any(isinstance(item, Tensor) for item in x):
        return [_each(function, *pair, number) for pair in zip(x, dim, strict=True)]
    return function(x, dim, number) if isinstance(x, Tensor) else x


def _chosen(x: Tensor, dim: int | None, index: int) -> Tensor:
    """One of a batch; laid out as one that was never in a batch, since kernels take what operators made as dense."""
    if dim is None:
        return x
    return x.select(dim, index) if dim == 0 else x.select(dim, index).contiguous()


def _folded(x: Tensor, dim: int | None, size: int) -> Tensor:
    if dim is None:
        return x if _is_nothing(x) else x.expand(size, *x.shape).flatten(0, 1)
    return x.movedim(dim, 0).flatten(0, 1)


def _unfolded(x: Tensor, size: int) -> Tensor:
    return x.view(size, x.shape[0] // size, *x.shape[1:])


def _is_nothing(x: Tensor) -> bool:
    return x.ndim == 1 and x.shape[0] == 0


def first_order(public: str, definition: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """`tensors`, whose gradients have none: double backward and forward mode raise as those of operators do."""
    if torch.compiler.is_compiling() or not followed(*tensors):
        return tensors
    return _once((public, definition), False, tensors)


def _once(names: tuple[str, str], gradient: bool, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    given = iter(_FirstOrder.apply(names, gradient, *(x for x in tensors if x is not None)))
    return tuple(None if x is None else next(given) for x in tensors)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(names: tuple[str, str], gradient: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.names, ctx.gradient, *_ = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.gradient:
            _refuse_double_backward(*ctx.names)
        return None, None, *(_once(ctx.names, True, grads) if torch.is_grad_enabled() else grads)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_forward_mode(*ctx.names)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], names: Any, gradient: bool, *tensors: Tensor) -> tuple[Any, Any]:
        return _FirstOrder.apply(names, gradient, *tensors), tuple(in_dims[2:])


def constants(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that are known on the host, on the device, without waiting for it.

    Nothing on the device is kept: memory that a CUDA graph has captured is its own. Kept is where the copy comes from,
    which a graph reads again at each replay: pinned memory of the host.
    """
    return _pinned(tuple(values), dtype, device.type == "cuda").to(device, non_blocking=True)


@functools.lru_cache(maxsize=1 << 16)
def _pinned(values: tuple[Any, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    return torch.tensor(values, dtype=dtype, pin_memory=pinned)
