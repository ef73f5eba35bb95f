"""Linear layers through oneDNN: the same numbers, gradients and counted FLOP as PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from medformer.linear import Linear
from medformer_kernels import _linear, linear

pytestmark = pytest.mark.skipif(_linear.ONEDNN is None, reason="this PyTorch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every product that oneDNN makes."""
    found: list[tuple[int, ...]] = []
    onednn = _linear.ONEDNN
    assert onednn is not None

    def watched(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        found.append((*x.shape, weight.shape[0]))
        return onednn(x, weight, *rest)

    monkeypatch.setattr(_linear, "ONEDNN", watched)
    return found


def make(*rows: int, channels: int = 192, out: int = 96, bias: bool = True, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, channels), (out, channels), *([(out,)] if bias else [])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rows", [(130,), (2, 65)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_output_and_gradients_are_those_of_a_linear_layer(calls, rows, bias) -> None:
    tensors = make(*rows, bias=bias)
    dout = torch.randn(*rows, 96, generator=torch.Generator().manual_seed(1))

    def run(function, leaves: list[Tensor]) -> list[Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    exact = run(F.linear, [tensor.detach().double().requires_grad_() for tensor in tensors])
    plain, found = run(F.linear, tensors), run(linear, tensors)
    assert calls == [(130, 192, 96), (130, 96, 192), (96, 130, 192)]
    for result, usual, right in zip(found, plain, exact, strict=True):
        assert result.shape == usual.shape
        assert (result - right).norm() <= 2 * (usual - right).norm() + 1e-7 * right.norm()


def test_gradients_have_gradients(calls) -> None:
    x, weight = make(130, bias=False)

    def second(function) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    for found, right in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-2)
    assert len(calls) > 3


def test_what_onednn_does_not_serve_is_left_to_pytorch(calls) -> None:
    for tensors in (make(130, dtype=torch.float64), make(130, dtype=torch.bfloat16), make(4)):
        assert torch.equal(linear(*tensors), F.linear(*tensors))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(*make(130)).dtype == torch.bfloat16
    vector = make(channels=2048, out=2048)
    assert torch.equal(linear(*vector), F.linear(*vector))
    assert calls == []


def test_flop_are_counted(calls) -> None:
    tensors = make(2, 65)
    counted = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(function(*tensors).sum(), tensors)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 2 * 130 * 192 * 96
    assert len(calls) == 3


def test_compiles_as_one_graph(calls) -> None:
    layer, x = Linear(192, 96), make(130)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    assert len(calls) == 1
