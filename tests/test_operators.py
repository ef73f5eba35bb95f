"""Every operator that is registered as `medformer::...`, with tiny calls of each: those of a new one must be added."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import medformer_kernels  # registers the operators
import medformer_kernels.tnt.outer
from medformer_kernels import _products
from medformer_kernels._dispatch import Chip, assume_chip
from medformer_kernels.disentangled import ops as disentangled
from medformer_kernels.nystrom import attend
from medformer_kernels.nystrom import ops as nystrom
from medformer_kernels.patch_embed import ops as patch_embed
from medformer_kernels.performer import ops as performer
from medformer_kernels.tnt import ops as tnt
from tests import launches

outer = medformer_kernels.tnt.outer
B, H, N, D, M = 2, 2, 5, 8, 6
pytestmark = launches.mixed


def _random(*shape: int) -> Tensor:
    return torch.randn(shape)


def _heads(transposed: bool = False) -> list[Tensor]:
    """q, k, v; `transposed`: as modules make them, (B, N, H, D) in memory."""
    return [_random(B, N, H, D).transpose(1, 2) if transposed else _random(B, H, N, D) for _ in range(3)]


def _mask() -> Tensor:
    return torch.tensor([[True] * 3 + [False] * 2, [True] * 5])


def _state(backend: str, boundaries: list[int] | None, transposed: bool) -> tuple[Any, ...]:
    _, k, v = _heads(transposed)
    return k, v, _random(M, D), _mask(), True, backend, boundaries


def _state_backward(*variant: Any) -> tuple[Any, ...]:
    k, v, omega, mask, _, *rest = _state(*variant)
    values, lse, _ = performer.performer_state(k, v, omega, mask, True, *rest)
    return k, v, omega, mask, values, lse, torch.randn_like(values), torch.randn_like(lse), True, *rest


def _read(backend: str, boundaries: list[int] | None, transposed: bool) -> tuple[Any, ...]:
    k, v, omega, mask, *rest = _state(backend, boundaries, transposed)
    values, lse, _ = performer.performer_state(k, v, omega, mask, *rest)
    extra = (None, None) if boundaries else (_random(B, H, D), _random(B, H))
    return _heads(transposed)[0], omega, values, lse, *extra, backend, boundaries


def _read_backward(*variant: Any) -> tuple[Any, ...]:
    *tensors, backend, boundaries = _read(*variant)
    out, out_lse = performer.performer_read(*tensors, backend, boundaries)
    return *tensors, out, out_lse, torch.randn_like(out), True, backend, boundaries


def _causal(backend: str, transposed: bool) -> tuple[Any, ...]:
    return *_heads(transposed), _random(M, D), _mask(), [0, 2, N], backend


def _causal_backward(*variant: Any) -> tuple[Any, ...]:
    *inputs, backend = _causal(*variant)
    made = performer.performer_causal(*inputs, backend)
    return *inputs, *made, torch.randn_like(made[0]), True, backend


def _disentangled(backend: str, dropout: float, transposed: bool) -> tuple[Any, ...]:
    columns, seed = 1 + 1 + N, torch.tensor(3) if dropout else None
    tables = _random(B, H, N, columns), _random(B, H, N, columns)
    return *_heads(transposed), *tables, None, _mask(), seed, [0, 1, 1, N], 0.3, True, dropout, 0, backend


def _disentangled_backward(*variant: Any) -> tuple[Any, ...]:
    inputs = _disentangled(*variant)
    out, lse = disentangled.disentangled_forward(*inputs)
    return *inputs[:8], out, lse, torch.randn_like(out), torch.randn_like(lse), *inputs[8:]


def _one_head(transposed: bool = False) -> list[Tensor]:
    """The interpreter takes seconds for the pseudo-inverse of a head."""
    return [x[:, :1] for x in _heads(transposed)]


def _nystrom(prefix: int, transposed: bool) -> tuple[Any, ...]:
    grid = [1, 1, N - prefix]
    none = (None, None)
    return *_one_head(transposed), *none, _random(1, 1, 1, 3), None, grid, [1, 1, 3], grid, prefix, 1, None


def _nystrom_given() -> tuple[Any, ...]:
    landmarks = _random(B, 1, 3, D), _random(B, 1, 3, D)
    return *_one_head(), *landmarks, None, _mask(), [1, 1, N], [1, 1, 1], [1, 1, N], 0, 1, 1e-3


def _nystrom_backward(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    q, k, v, given, _, conv_weight, mask, *settings = inputs
    made = nystrom.nystrom_forward(*inputs)
    return torch.randn_like(made[0]), q, k, v, conv_weight, mask, list(made), given is None, *settings


def _attend(transposed: bool) -> tuple[Any, ...]:
    return *_heads(transposed), _mask()


def _attend_backward(transposed: bool) -> tuple[Any, ...]:
    inputs = _attend(transposed)
    out, lse = attend.attend_by_head(*inputs)
    return *inputs, out, lse, torch.randn_like(out)


def _embed(path: str, norm: str, image: bool = False) -> tuple[Any, ...]:
    size, kernel = ((1, 6, 6), (1, 3, 3)) if image else ((4, 6, 6), (3, 3, 3))
    stride, padding, tokens = [1 if image else 2, 2, 2], [0, 0] * image + [1, 1] * (3 - image), 9 if image else 18
    rows = [_random(8) for _ in range(2)] if norm else [None] * 2
    return (
        _random(B, 1, *size), _random(8, 1, *kernel), _random(8), *rows, _random(tokens, 8), None, None, _random(1, 8),
        [], stride, padding, [1, 1, 1], "zeros", norm, 1e-6, bool(norm), path,
    )  # fmt: skip


def _embed_backward(path: str, norm: str, weights: bool = True) -> tuple[Any, ...]:
    inputs = _embed(path, norm)
    x, weight, _, norm_weight, *_ = inputs
    tokens, y = patch_embed.patch_embed(*inputs)
    settings, needs = inputs[9:16], [True, weights, weights, *[weights and bool(norm)] * 2]
    return torch.randn_like(tokens), x, weight, y, norm_weight, *settings, needs, path


def _unembed(path: str) -> tuple[Any, ...]:
    return _random(B, 18, 8), _random(8, 1, 3, 3, 3), _random(1), [4, 6, 6], [2] * 3, [1] * 6, [1] * 3, path


def _inner(backend: str, dropout: float) -> tuple[Any, ...]:
    c, f, seed = 16, 32, torch.tensor(5) if dropout else None
    weights = [
        _random(*shape) / 4
        for shape in ((c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (f, c), (f,), (c, f))
    ]
    return _random(3, 4, c), *weights, None, seed, 2, 1e-6, dropout, 0.0, True, backend


def _inner_backward(backend: str, dropout: float, with_weights: bool) -> tuple[Any, ...]:
    x, *rest = _inner(backend, dropout)
    *tensors, heads, eps, dropped, path, _, _ = rest
    out, *kept = tnt.tnt_inner_block(x, *rest)
    return torch.randn_like(out), x, *kept, *tensors, heads, eps, dropped, path, with_weights, backend


def _outer() -> tuple[Any, ...]:
    return _random(3, 4, 16), _random(3, 24), _random(24, 64), _random(24), 1e-6


_STATES = [("torch", None, False), ("torch", None, True), ("triton", None, True), ("triton", [0, 2, N], False)]
_CAUSAL = [("torch", False), ("torch", True), ("triton", True)]
_DISENTANGLED = [("torch", 0.0, True), ("torch", 0.2, False), ("triton", 0.2, False), ("triton", 0.0, True)]
# By operator: calls as functions without arguments.
CALLS: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    name: [lambda make=make, variant=variant: make(*variant) for variant in variants]
    for name, make, variants in (
        ("performer_state", _state, _STATES),
        ("performer_state_backward", _state_backward, _STATES),
        ("performer_read", _read, _STATES),
        ("performer_read_backward", _read_backward, _STATES),
        ("performer_causal", _causal, _CAUSAL),
        ("performer_causal_backward", _causal_backward, _CAUSAL),
        ("disentangled_forward", _disentangled, _DISENTANGLED),
        ("disentangled_backward", _disentangled_backward, _DISENTANGLED),
        ("attend_by_head", _attend, [(False,), (True,)]),
        ("attend_by_head_backward", _attend_backward, [(False,), (True,)]),
        ("patch_embed", _embed, [("im2col", ""), ("conv", "layer"), ("fused", "layer"), ("fused", "", True)]),
        ("patch_embed_backward", _embed_backward, [("im2col", "rms"), ("im2col", "", False), ("fused", "layer")]),
        ("patch_unembed", _unembed, [("im2col",), ("conv",), ("fused",)]),
        ("tnt_inner_block", _inner, [("torch", 0.0), ("torch", 0.2), ("triton", 0.2)]),
        (
            "tnt_inner_block_backward",
            _inner_backward,
            [("torch", 0.2, True), ("triton", 0.0, True), ("triton", 0.0, False)],
        ),
    )
}
CALLS |= {
    "nystrom_forward": [lambda: _nystrom(0, True), lambda: _nystrom(1, False), _nystrom_given],
    "nystrom_backward": [
        lambda: _nystrom_backward(_nystrom(0, True)),
        lambda: _nystrom_backward(_nystrom_given()),
    ],
    "tnt_inner_to_outer": [_outer],
    "tnt_inner_to_outer_backward": [lambda: (_random(3, 24), *(_outer()[i] for i in (0, 2)), 1e-6)],
    "product": [lambda: (_random(3, 4, 5), _random(3, 5, 2)), lambda: (_random(3, 5, 4).mT, _random(3, 2, 5).mT)],
}
_TRITON_ONLY = ("nystrom_", "tnt_inner_to_outer")  # PyTorch composes them without an operator
EACH = [pytest.param(name, make, id=f"{name}-{i}") for name, makes in CALLS.items() for i, make in enumerate(makes)]
each_call = pytest.mark.parametrize(("name", "make"), EACH)


def _registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("medformer::") for name in names if name.startswith("medformer::")}


def _operator(name: str) -> Any:
    return getattr(torch.ops.medformer, name).default


def _leaf(x: Any) -> Any:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())


def _with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map_only(Tensor, _leaf, args)


def _tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """On a chip that has a tile for each kernel in float32."""
    torch.manual_seed(0)
    with assume_chip(Chip(arch="sm_90", units=4)):
        yield


def test_each_registered_operator_is_in_the_table() -> None:
    assert _registered() == set(CALLS)


@each_call
def test_calls_of_triton_launch_kernels_and_others_none(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    args = make()
    launches.launched.clear()
    _operator(name)(*args)
    in_triton = {"triton", "fused"} & {x for x in args if isinstance(x, str)} or name.startswith(_TRITON_ONLY)
    assert bool(launches.launched) == bool(in_triton)


@pytest.mark.parametrize("name", [name for name in CALLS if not name.endswith("_backward") and name != "product"])
def test_there_are_as_many_gradients_as_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = OPDEFS[f"medformer::{name}"]
    handed: list[tuple[Any, ...]] = []
    inner = definition._backward_fn

    def counted(ctx: Any, *grads: Any) -> Any:
        handed.append(inner(ctx, *grads))
        return handed[-1]

    monkeypatch.setattr(definition, "_backward_fn", counted)
    for make in CALLS[name]:
        args = _with_gradients(make())
        outputs = [x for x in _tensors(_operator(name)(*args)) if x.requires_grad]
        torch.autograd.backward([x.sum() for x in outputs])
        gradients = handed.pop()
        wanted = [x.shape if isinstance(x, Tensor) and x.requires_grad else None for x in args]
        given = [None if x is None else x.shape for x in gradients]
        assert len(gradients) == len(_operator(name)._schema.arguments)
        assert given == wanted


@pytest.mark.parametrize("name", [name for name in CALLS if name.endswith("_backward")])
def test_gradients_of_gradients_raise(name: str) -> None:
    outputs = _tensors(_operator(name)(*_with_gradients(CALLS[name][0]())))
    with pytest.raises(
        NotImplementedError, match=r"^\w+( or \w+)?: double backward is not implemented; use \w+_reference"
    ):
        sum(x.sum() for x in outputs).backward()


@each_call
def test_fake_outputs_are_laid_out_as_real_ones(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    args = make()
    real = _tensors(_operator(name)(*args))
    with FakeTensorMode() as mode:
        fake = _tensors(_operator(name)(*tree_map_only(Tensor, mode.from_tensor, args)))
    laid_out = [[(x.shape, x.dtype, x.stride()) for x in outputs] for outputs in (fake, real)]
    assert laid_out[0] == laid_out[1]


@pytest.mark.parametrize("name", CALLS)
def test_passes_opcheck(name: str) -> None:
    args = CALLS[name][0]()
    gradient = name.endswith("_backward") or name == "product"
    torch.library.opcheck(_operator(name), args if gradient else _with_gradients(args))


@each_call
def test_empty_batches_give_empty_outputs_and_gradients_of_zero(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    args, names = make(), [argument.name for argument in _operator(name)._schema.arguments]
    samples = _samples(name)
    empty = [
        tree_map_only(Tensor, lambda x: x[:0], x) if key in samples else x for key, x in zip(names, args, strict=True)
    ]
    whole, outputs = _tensors(_operator(name)(*args)), _tensors(_operator(name)(*empty))
    assert [x.shape[1:] for x in outputs] == [x.shape[1:] for x in whole]
    assert not any(x.any() for x in outputs)


def _samples(name: str) -> tuple[str, ...]:
    """The arguments that the operator's own batching rule takes for batches."""
    rule = OPDEFS[f"medformer::{name}"]._vmap_fn
    return inspect.getclosurevars(rule).nonlocals["samples"]


# Of gradients, which transforms alone call, those in which all samples or all tensors are batched.
@pytest.mark.parametrize(
    ("batched", "name", "make"),
    [
        pytest.param(batched, *call.values, id=f"{batched}-{call.id}")
        for batched in ("first", "samples", "all")
        for call in EACH
        if batched != "first" or not str(call.values[0]).endswith("_backward")
    ],
)
def test_vmap_is_a_call_for_each(name: str, make: Callable[[], tuple[Any, ...]], batched: str) -> None:
    calls = [make() for _ in range(2)]
    names = [argument.name for argument in _operator(name)._schema.arguments]
    chosen = {"first": names[:1], "samples": _samples(name), "all": names}[batched]
    dims = [
        tree_map(lambda x, key=key: 1 if isinstance(x, Tensor) and x.ndim > 1 and key in chosen else None, x)
        for key, x in zip(names, calls[0], strict=True)
    ]
    own = [
        tuple(
            mine if any(dim is not None for dim in tree_leaves(dim)) else first
            for mine, first, dim in zip(call, calls[0], dims, strict=True)
        )
        for call in calls
    ]
    stacked = [
        tree_map(lambda dim, x, y: x if dim is None else torch.stack((x, y), dim), dim, *pair)
        for dim, *pair in zip(dims, *own, strict=True)
    ]
    tensors = [
        (i, x)
        for i, x in enumerate(stacked)
        if isinstance(x, Tensor) or (isinstance(x, list) and any(isinstance(y, Tensor) for y in x))
    ]

    def call(*given: Any) -> tuple[Tensor, ...]:
        args = list(own[0])
        for (i, _), x in zip(tensors, given, strict=True):
            args[i] = x
        return tuple(_tensors(_operator(name)(*args)))

    got = torch.vmap(call, in_dims=tuple(dims[i] for i, _ in tensors))(*(x for _, x in tensors))
    expected = [
        torch.stack(outputs) for outputs in zip(*(_tensors(_operator(name)(*args)) for args in own), strict=True)
    ]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _jvp(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return torch.func.jvp(function, (x,), (x,))


def _dual(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [_jvp, _dual])
def test_forward_mode_raises(name: str, mode: Callable[..., Any]) -> None:
    x, *args = CALLS[name][0]()
    with pytest.raises(NotImplementedError, match=r"^\w+( or \w+)?: forward mode .* is not implemented; use "):
        mode(lambda x: _operator(name)(x, *args), x)


class _Entered(Exception):
    pass


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Devices that code makes current, which stops there."""
    seen: list[Any] = []

    def current(device: Any) -> Any:
        seen.append(device)
        guard = mock.MagicMock()
        guard.__enter__.side_effect = _Entered
        return guard

    monkeypatch.setattr(torch.cuda, "device", current)
    return seen


@pytest.mark.parametrize("name", CALLS)
def test_runs_with_the_device_of_its_tensors_current(name: str, devices: list[Any]) -> None:
    args = CALLS[name][0]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = [torch.empty(x.shape, device="cuda:1") if isinstance(x, Tensor) else x for x in args]
    with pytest.raises(_Entered):
        OPDEFS[f"medformer::{name}"]._init_fn(*moved)
    assert devices == [torch.device("cuda:1")]


def test_product_is_a_matrix_product() -> None:
    x, y = _random(3, 4, 5), _random(3, 5, 2)
    torch.testing.assert_close(_products._product(x, y), x @ y)
