"""The step from inner to outer tokens: its definition, its kernels (in the interpreter without a GPU), bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, assume_chip
from medformer_kernels.tnt import outer as step
from medformer_kernels.tnt import tnt_inner_to_outer, tnt_inner_to_outer_reference
from medformer_kernels.tnt.plans import OUTER_KERNELS
from tests import launches
from tests.rule import assert_as_good_as_pytorch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"width": 128, "head": 0, "block_r": 16, "block_f": 32, "num_warps": 4, "num_stages": 1}
    entries = [tile | {"itemsize": itemsize} for itemsize in (2, 4)]
    monkeypatch.setattr(_dispatch, "load_configs", lambda _: {kernel: {"sm_80": entries} for kernel in OUTER_KERNELS})


def make(sequences: int, tokens: int, width: int, channels: int, *, add: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE)

    tensors = {
        "x": normal(sequences, tokens, width),
        "norm_weight": normal(width) + 1,
        "norm_bias": normal(width),
        "weight": normal(channels, tokens * width, scale=(tokens * width) ** -0.5),
        "bias": normal(channels),
    }
    return tensors | ({"outer": normal(sequences, channels)} if add else {})


def run(function, tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Output, then every gradient."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("x", "outer")}
    out = function(leaves["x"], leaves.get("outer"), **rest, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout.to(out))]


@launches.none
def test_reference_is_the_formula() -> None:
    t = make(3, 4, 5, 6)
    out = tnt_inner_to_outer_reference(t["x"], t["outer"], **{k: t[k] for k in t if k not in ("x", "outer")})
    for window, token, result in zip(t["x"], t["outer"], out, strict=True):
        centred = window - window.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * t["norm_weight"] + t["norm_bias"]
        torch.testing.assert_close(result, token + t["weight"] @ normed.flatten() + t["bias"])


@launches.outer
@pytest.mark.parametrize("add", [True, False], ids=["add", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("sequences", "tokens", "width", "channels"), [(1, 1, 12, 8), (37, 4, 24, 50), (300, 3, 20, 33)]
)
def test_kernels_are_as_good_as_pytorch(
    sequences: int, tokens: int, width: int, channels: int, dtype: torch.dtype, add: bool
) -> None:
    """Output and every gradient: at most twice the error of plain PyTorch in the same dtype."""
    tensors = make(sequences, tokens, width, channels, add=add)
    exact = run(tnt_inner_to_outer_reference, tensors, torch.float64)
    plain = run(tnt_inner_to_outer_reference, tensors, dtype)
    with assume_chip(Chip(arch="sm_80", units=1)):
        fused = run(tnt_inner_to_outer, tensors, dtype, backend="triton")
    assert_as_good_as_pytorch(fused, plain, exact, ["out", *tensors])


@launches.outer_forward
def test_strides_are_honoured() -> None:
    tensors = {name: tensor.float() for name, tensor in make(20, 3, 12, 10).items()}
    x, outer = tensors.pop("x"), tensors.pop("outer")
    turned, wide = x.transpose(0, 2).contiguous().transpose(0, 2), torch.stack([outer, outer], 2)[:, :, 0]
    expected = tnt_inner_to_outer(x, outer, **tensors, backend="triton")
    assert torch.equal(tnt_inner_to_outer(turned, wide, **tensors, backend="triton"), expected)


@launches.outer
def test_operator_passes_opcheck() -> None:
    t = {name: tensor.float().requires_grad_() for name, tensor in make(5, 2, 12, 10).items()}
    torch.library.opcheck(step._project, (t["x"], t["outer"], t["weight"], t["bias"], 1e-6))
    torch.library.opcheck(step._project, (t["x"], None, t["weight"], t["bias"], 1e-6))


@launches.outer
def test_compiles_as_one_graph() -> None:
    t = {name: tensor.float().requires_grad_() for name, tensor in make(5, 2, 12, 10).items()}

    def loss(x: Tensor) -> Tensor:
        rest = {name: tensor for name, tensor in t.items() if name not in ("x", "outer")}
        return tnt_inner_to_outer(x, t["outer"], **rest, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(t["x"]), t["norm_weight"])
    torch.testing.assert_close(torch.autograd.grad(compiled(t["x"]), t["norm_weight"]), expected)


@launches.outer
def test_double_backward_is_refused() -> None:
    t = {name: tensor.float().requires_grad_() for name, tensor in make(5, 2, 12, 10).items()}
    rest = {name: tensor for name, tensor in t.items() if name not in ("x", "outer")}
    out = tnt_inner_to_outer(t["x"], t["outer"], **rest, backend="triton")
    (dx,) = torch.autograd.grad(out.square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="tnt_inner_to_outer: double backward is not implemented"):
        dx.sum().backward()


@launches.none
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x has shape \(3, 4\)"),
        ({"weight": torch.zeros(6, 7)}, r"weight has shape \(6, 7\).*it must be \(6, 20\)"),
        ({"outer": torch.zeros(3, 5)}, r"outer has shape \(3, 5\).*it must be \(3, 6\)"),
        ({"backend": "cuda"}, "backend='cuda' must be"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    t = {name: tensor.float().cpu() for name, tensor in make(3, 4, 5, 6).items()} | change
    with pytest.raises(ValueError, match=f"tnt_inner_to_outer: .*{message}") as error:
        tnt_inner_to_outer(t.pop("x"), t.pop("outer"), **t)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
