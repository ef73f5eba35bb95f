"""Attention on a CPU, a head and a tile at a time: that of PyTorch, whatever is masked, strided or wide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medformer_kernels import _products, nystrom_attention, nystrom_attention_reference
from medformer_kernels.nystrom import attend
from medformer_kernels.nystrom.attend import attend_by_head, attends_by_head
from medformer_kernels.nystrom.inverse import inverse_times, inverse_times_backward


@pytest.fixture(autouse=True)
def _whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_products, "_LEAST_OF_MANY", _products._LEAST)


def inputs(queries: int, keys: int, width_v: int) -> list[Tensor]:
    """(q, k, v, dout), q and v as a projection lays them out: heads behind tokens."""
    torch.manual_seed(0)
    q, k = torch.randn(2, queries, 3, 16).transpose(1, 2), torch.randn(2, 3, keys, 16)
    v = torch.randn(2, keys, 3, width_v).transpose(1, 2)
    return [q, k, v, torch.randn(2, 3, queries, width_v)]


@pytest.mark.parametrize(("queries", "keys"), [(1, 700), (600, 5), (300, 300), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_matches_attention_in_float64(monkeypatch, queries: int, keys: int, masked: bool, tile: int) -> None:
    monkeypatch.setattr(attend, "_TILE_VALUES", tile)
    *tensors, dout = inputs(queries, keys, 9)
    mask = None
    if masked:
        mask = torch.rand(2, keys) < 0.7
        mask[1] = False  # a sample without a key
    for x in tensors:
        x.requires_grad_()
    out = attend_by_head(*tensors, mask)[0]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    scores = exact[0] @ exact[1].mT / 4
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ exact[2]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    right = torch.autograd.grad(expected, exact, dout.double())
    for x, y in zip(torch.autograd.grad(out, tensors, dout), right, strict=True):
        torch.testing.assert_close(x.double(), y.nan_to_num(0), atol=1e-5, rtol=1e-5)


def test_a_nan_stays_in_its_sample() -> None:
    q, k, v, _ = inputs(20, 30, 4)
    k[0, 0, 3, 0] = torch.nan
    out = attend_by_head(q, k, v, None)[0]
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


def test_operator_passes_opcheck() -> None:
    *tensors, _ = inputs(20, 30, 4)
    mask = torch.rand(2, 30) < 0.7
    torch.library.opcheck(attend_by_head, (*(x.requires_grad_() for x in tensors), mask))


def test_double_backward_is_refused() -> None:
    *tensors, _ = inputs(3, 4, 5)
    q = tensors[0].requires_grad_()
    out = attend_by_head(*tensors, None)[0]
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize(
    "options", [{"num_landmarks": 256}, {"grid": (7, 11, 13), "landmark_grid": (4, 8, 8)}], ids=str
)
def test_large_heads_take_this_way_and_match_the_definition(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (0.5 * torch.randn(1, 2, 1001, 64) for _ in range(3))
    mask = (torch.arange(1001) < 990).unsqueeze(0)
    assert attends_by_head(q, k[:, :, :256])

    def gradients(function: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = tuple(x.detach().requires_grad_() for x in tensors)
        out = function(*tensors, key_padding_mask=mask, **options)[:, :, :990]
        return out.detach(), *torch.autograd.grad(out.square().sum(), tensors)

    exact = gradients(nystrom_attention_reference, q.double(), k.double(), v.double())
    plain = gradients(nystrom_attention_reference, q, k, v)
    for x, usual, right in zip(gradients(nystrom_attention, q, k, v), plain, exact, strict=True):
        assert (x - right).norm() <= 2 * (usual - right).norm()


def test_large_inverse_matches_float64() -> None:
    torch.manual_seed(0)
    a = torch.randn(1, 2, 160, 160, dtype=torch.float64).softmax(-1)
    x, dout = (torch.randn(1, 2, 160, 64, dtype=torch.float64) for _ in range(2))
    exact = inverse_times(a, x, 6, None), *inverse_times_backward(a, x, dout, 6, None)
    a, x, dout = a.float(), x.float(), dout.float()
    for made, right in zip(
        (inverse_times(a, x, 6, None), *inverse_times_backward(a, x, dout, 6, None)), exact, strict=True
    ):
        assert (made - right).norm() <= 1e-5 * right.norm()


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 64).requires_grad_() for _ in range(3))

    def loss(q: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, num_landmarks=150).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q), torch.autograd.grad(loss(q), q))
