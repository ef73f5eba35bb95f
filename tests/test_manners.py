"""What callers may expect of every public function: empty batches, lengths as lists, copies, the order of axes."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import medformer_kernels as mk
from medformer_kernels import _operators
from medformer_kernels._dispatch import Chip, assume_chip
from medformer_kernels.tnt.weights import NAMES, TNTInnerWeights
from tests import launches

H, N, D = 2, 6, 16
BACKENDS = ("torch", "triton")
pytestmark = launches.mixed
OMEGA = mk.orthogonal_features(8, D, seed=0)


def _heads(batch: int = 1, heads: int = H, tokens: int = N) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, tokens, D) for _ in range(3)]


def _weights() -> TNTInnerWeights:
    c, f = D, 2 * D
    shapes = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (f, c), (f,), (c, f), (c,)]
    return TNTInnerWeights(**{n: torch.randn(s).requires_grad_() for n, s in zip(NAMES, shapes, strict=True)})


WEIGHTS, KERNEL = _weights(), torch.randn(4, 1, 3, 3, 3).requires_grad_()
MASK = torch.ones(0, N, dtype=torch.bool)
ROWS = {"norm_weight": torch.ones(D), "norm_bias": torch.zeros(D), "weight": torch.randn(4, N * D)}

# Of an empty batch x (0, H, N, D) and a backend; parameters may be shared by samples.
EMPTY: dict[str, Callable[[Tensor, str], Any]] = {
    "performer_attention": lambda x, b: mk.performer_attention(x, x, x, OMEGA, key_padding_mask=MASK, backend=b),
    "performer_attention causal": lambda x, b: mk.performer_attention(x, x, x, OMEGA, causal=True, backend=b),
    "performer_attention eps": lambda x, b: mk.performer_attention(x, x, x, OMEGA, eps=1e-3, backend=b),
    "performer_attention packed": lambda x, b: mk.performer_attention(x, x, x, OMEGA, cu_seqlens=[0, 2, N], backend=b),
    "performer_prefill": lambda x, b: mk.performer_prefill(x, x, OMEGA, backend=b).values,
    "nystrom_attention": lambda x, b: mk.nystrom_attention(x, x, x, num_landmarks=3, key_padding_mask=MASK, backend=b),
    "nystrom_attention grid": lambda x, b: mk.nystrom_attention(
        x, x, x, grid=(2, 3), landmark_grid=(1, 2), conv_weight=torch.ones(H, 1, 3, 3), backend=b
    ),
    "disentangled_attention": lambda x, b: mk.disentangled_attention(
        x, x, x, grid=(2, 3), terms=("c2c", "c2p"), rel_k=[torch.ones(H, 3, D), torch.ones(H, 5, D)], backend=b
    ),
    "disentangled_attention prefix": lambda x, b: mk.disentangled_attention(
        x, x, x, grid=(1, 5), prefix_tokens=1, terms=("c2c", "c2p"), rel_k=[torch.ones(H, 1, D), torch.ones(H, 9, D)],
        key_padding_mask=MASK, dropout=0.1, seed=0, backend=b,
    ),
    "tnt_inner_block": lambda x, b: mk.tnt_inner_block(x[:, 0], WEIGHTS, num_heads=2, backend=b),
    "tnt_inner_block dropout": lambda x, b: mk.tnt_inner_block(
        x[:, 0], WEIGHTS, num_heads=2, dropout=0.1, drop_path=0.1, seed=1, backend=b
    ),
    "tnt_inner_to_outer": lambda x, b: mk.tnt_inner_to_outer(x[:, 0], x[:, 0, 0, :4], **ROWS, backend=b),
    "patch_embed": lambda x, b: mk.patch_embed(x[:, None], KERNEL, stride=2, padding=1, norm="layer", backend=b),
    "patch_unembed": lambda x, b: mk.patch_unembed(
        x[:, 0, :4, :4], KERNEL, grid=(1, 2, 2), stride=2, padding=1, backend=b
    ),
}  # fmt: skip
EMPTY_TORCH: dict[str, Callable[[Tensor], Any]] = {
    "performer_attention relu": lambda x: mk.performer_attention(x, x, x, OMEGA, feature="relu"),
    "performer_attention relu causal": lambda x: mk.performer_attention(x, x, x, OMEGA, feature="relu", causal=True),
    "performer_attention_reference": lambda x: mk.performer_attention_reference(x, x, x, OMEGA),
    "performer_features": lambda x: mk.performer_features(x, OMEGA),
    "performer_step": lambda x: mk.performer_step(None, x[:, :, :1], x[:, :, :1], x[:, :, :1], OMEGA)[0],
    "nystrom_attention_reference": lambda x: mk.nystrom_attention_reference(x, x, x, num_landmarks=3),
    "nystrom_pinv": lambda x: mk.nystrom_pinv(x[..., :N])[0],
    "nystrom_residual": lambda x: mk.nystrom_residual(x, x, num_landmarks=3) + x.sum((2, 3)),
    "disentangled_attention_reference": lambda x: mk.disentangled_attention_reference(x, x, x, terms=("c2c",)),
    "disentangled_maps": lambda x: mk.disentangled_maps(x, x, queries=torch.tensor([0]), terms=("c2c",)).weights,
    "tnt_inner_block_reference": lambda x: mk.tnt_inner_block_reference(x[:, 0], WEIGHTS, num_heads=2),
    "tnt_inner_to_outer_reference": lambda x: mk.tnt_inner_to_outer_reference(x[:, 0], None, **ROWS),
    "patch_embed im2col": lambda x: mk.patch_embed(x[:, None], KERNEL, stride=2, padding=1, path="im2col"),
    "patch_embed_reference": lambda x: mk.patch_embed_reference(x[:, None], KERNEL, stride=2, padding=1),
    "patch_unembed_reference": lambda x: mk.patch_unembed_reference(
        x[:, 0, :4, :4], KERNEL, grid=(1, 2, 2), stride=2, padding=1
    ),
    "linear": lambda x: mk.linear(x, torch.randn(4, D)),
}


@pytest.fixture(autouse=True)
def _chip() -> Iterator[None]:
    """One that has a tile for each kernel in float32."""
    with assume_chip(Chip(arch="sm_90", units=4)):
        yield


EACH = [
    *(pytest.param(lambda x, f=f, b=b: f(x, b), id=f"{name}-{b}") for name, f in EMPTY.items() for b in BACKENDS),
    *(pytest.param(function, id=name) for name, function in EMPTY_TORCH.items()),
]


@pytest.mark.parametrize("function", EACH)
def test_an_empty_batch_has_empty_outputs_and_gradients(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(0, H, N, D).requires_grad_()
    out = function(x)
    out.sum().backward()
    assert out.shape[0] == 0
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("function", [mk.tnt_inner_block, mk.patch_embed])
def test_an_empty_batch_gives_shared_weights_gradients_of_zero(function: Any) -> None:
    parameters = [KERNEL] if function is mk.patch_embed else [x for x in WEIGHTS.tensors() if x is not None]
    call = EMPTY[function.__name__]
    gradients = torch.autograd.grad(call(torch.randn(0, H, N, D), "triton").sum(), parameters)
    assert not any(gradient.any() for gradient in gradients)


PACKED: dict[str, Callable[..., Tensor]] = {
    "performer": lambda q, k, v, cu, b: mk.performer_attention(q, k, v, OMEGA, cu_seqlens=cu, backend=b),
    "performer causal": lambda q, k, v, cu, b: mk.performer_attention(
        q, k, v, OMEGA, causal=True, cu_seqlens=cu, backend=b
    ),
    "disentangled": lambda q, k, v, cu, b: mk.disentangled_attention(
        q, k, v, terms=("c2c", "c2p"), pos_k=torch.ones(H, N, D), cu_seqlens=cu, backend=b
    ),
}
READS = ("tolist", "item", "__int__", "__index__", "numpy", "cpu", "__bool__")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PACKED)
def test_lengths_may_be_numbers_which_no_tensor_is_read_for(name: str, backend: str) -> None:
    def reads(cu: Any) -> tuple[Tensor, int]:
        # Of int32 and int64 tensors alone: the interpreter reads those that kernels take, as no GPU does.
        count = 0

        class Watched(Tensor):
            pass

        for read in READS[:1]:

            def counted(self: Tensor, *args: Any, _read: str = read) -> Any:
                nonlocal count
                count += 1
                return getattr(self.as_subclass(Tensor), _read)(*args)

            setattr(Watched, read, counted)
        given = cu.as_subclass(Watched) if isinstance(cu, Tensor) else cu
        return PACKED[name](*_heads(), given, backend), count

    tensor, one = reads(torch.tensor([0, 2, N]))
    for numbers in ([0, 2, N], (0, 2, N)):
        out, none = reads(numbers)
        torch.testing.assert_close(out, tensor, rtol=0, atol=0)
        assert none == 0
    assert one == 1


@pytest.mark.parametrize("name", PACKED)
def test_numbers_leave_tensors_unread_on_the_way_to_the_operators(name: str) -> None:
    with (
        mock.patch.object(Tensor, "tolist", side_effect=AssertionError),
        mock.patch.object(Tensor, "item", side_effect=AssertionError),
    ):
        PACKED[name](*_heads(), [0, 2, N], "torch")


@pytest.mark.parametrize(
    "cu", [[0, 2.0, N], [0, True, N], "06", [0, 2, N - 1], [1, N], [0, 4, 2, N], [], torch.ones(2)]
)
@pytest.mark.parametrize("name", PACKED)
def test_wrong_lengths_name_the_function_and_the_value(name: str, cu: Any) -> None:
    with pytest.raises(ValueError, match=r"^(performer|disentangled)_attention: cu_seqlens"):
        PACKED[name](*_heads(), cu, "torch")


SWAPPED: dict[str, Callable[[], Any]] = {
    "q alone": lambda: mk.performer_attention(_heads(heads=12, tokens=4)[0], *_heads(heads=4, tokens=12)[1:], OMEGA),
    "k and v": lambda: mk.performer_attention(_heads(heads=4, tokens=12)[0], *_heads(heads=12, tokens=4)[1:], OMEGA),
    "omega of each head": lambda: mk.performer_attention(*_heads(heads=12, tokens=4), OMEGA.expand(4, -1, -1)),
    "mask, performer": lambda: mk.performer_attention(
        *_heads(heads=12, tokens=4), OMEGA, key_padding_mask=torch.ones(1, 12, dtype=torch.bool)
    ),
    "mask, nystrom": lambda: mk.nystrom_attention(
        *_heads(heads=12, tokens=4), num_landmarks=2, key_padding_mask=torch.ones(1, 12, dtype=torch.bool)
    ),
    "mask, disentangled": lambda: mk.disentangled_attention(
        *_heads(heads=12, tokens=4), terms=("c2c",), key_padding_mask=torch.ones(1, 12, dtype=torch.bool)
    ),
    "grid, nystrom": lambda: mk.nystrom_attention(*_heads(heads=12, tokens=4), grid=(3, 4), landmark_grid=(1, 2)),
    "grid, disentangled": lambda: mk.disentangled_attention(*_heads(heads=12, tokens=4), grid=(3, 4), terms=("c2c",)),
}


@pytest.mark.parametrize("call", SWAPPED.values(), ids=list(SWAPPED))
def test_heads_behind_tokens_are_refused_where_shapes_show_it(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"\(B, tokens, H, width\)|\(B, H, tokens, width\)"):
        call()


def test_grouped_heads_with_one_query_or_as_many_tokens_as_heads_are_taken() -> None:
    q, k, v = _heads(heads=8, tokens=1)[0], *_heads(heads=1, tokens=8)[1:]
    assert mk.performer_attention(q, k, v, OMEGA).shape == q.shape
    q, k, v = _heads(heads=4, tokens=4)
    assert mk.performer_attention(q, k, v, OMEGA).shape == q.shape


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_constants_keep_no_memory_on_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[dict[str, Any]] = []
    monkeypatch.setattr(
        _operators,
        "_pinned",
        lambda *key: mock.Mock(to=lambda *to, **how: copies.append({"key": key, "to": to, **how})),
    )
    _operators.constants([1, 2], torch.int32, torch.device(device))
    pinned = device != "cpu"
    assert copies == [{"key": ((1, 2), torch.int32, pinned), "to": (torch.device(device),), "non_blocking": True}]


def test_no_cached_function_returns_a_tensor_on_a_device() -> None:
    modules = ("nystrom.products", "patch_embed.fused", "_operators", "_dispatch")
    cached = [
        function
        for name in modules
        for function in vars(importlib.import_module(f"medformer_kernels.{name}")).values()
        if hasattr(function, "cache_info")
    ]
    returned = {f.__name__: inspect.signature(f).return_annotation for f in cached}
    assert [name for name, annotation in returned.items() if "Tensor" in str(annotation)] == ["_pinned"]  # of the host


def test_state_and_weights_can_be_copied() -> None:
    _, k, v = _heads()
    for value in (mk.performer_prefill(k, v, OMEGA), WEIGHTS, mk.hu_window(40, 400)):
        twin = copy.deepcopy(value)
        assert type(twin) is type(value)
        tensors = [(a, b) for a, b in zip(_parts(value), _parts(twin), strict=True)]
        assert all(torch.equal(a, b) and a is not b for a, b in tensors)


def _parts(value: Any) -> list[Tensor]:
    fields = value if isinstance(value, tuple) else vars(value).values()
    return [x for x in fields if isinstance(x, Tensor)]
