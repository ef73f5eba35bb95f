"""The inner block: its definition, its PyTorch path, what is dropped, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medformer_kernels.tnt import TNTInnerWeights, chunked, tnt_inner_block, tnt_inner_block_reference
from medformer_kernels.tnt.weights import NAMES


def make(
    sequences: int, tokens: int, width: int, *, hidden: int | None = None, dtype: torch.dtype = torch.float64,
    biases: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """(x, weights by name)."""
    generator = torch.Generator().manual_seed(0)
    hidden = hidden or 4 * width

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    weights = {
        "norm1_weight": normal(width, scale=0.1, shift=1.0), "norm1_bias": normal(width, scale=0.1),
        "qkv_weight": normal(3 * width, width, scale=width**-0.5), "qkv_bias": normal(3 * width, scale=0.1),
        "proj_weight": normal(width, width, scale=width**-0.5), "proj_bias": normal(width, scale=0.1),
        "norm2_weight": normal(width, scale=0.1, shift=1.0), "norm2_bias": normal(width, scale=0.1),
        "fc1_weight": normal(hidden, width, scale=width**-0.5), "fc1_bias": normal(hidden, scale=0.1),
        "fc2_weight": normal(width, hidden, scale=hidden**-0.5), "fc2_bias": normal(width, scale=0.1),
    }  # fmt: skip
    if not biases:
        weights = {name: w for name, w in weights.items() if name.startswith("norm") or not name.endswith("bias")}
    return normal(sequences, tokens, width), weights


def run(function, x: Tensor, weights: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Output, then the gradients of x and of every weight."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *weights.values())]
    out = function(leaves[0], TNTInnerWeights(**dict(zip(weights, leaves[1:], strict=True))), **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(x.device, out.dtype))]


def torch_path(x: Tensor, weights: TNTInnerWeights, **options: Any) -> Tensor:
    return tnt_inner_block(x, weights, backend="torch", **options)


def norm(row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = row - row.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * weight + bias


def test_reference_is_the_formula() -> None:
    x, w = make(2, 3, 6)
    out = tnt_inner_block_reference(x, TNTInnerWeights(**w), num_heads=2)
    for sequence, result in zip(x, out, strict=True):
        qkv = [w["qkv_weight"] @ norm(row, w["norm1_weight"], w["norm1_bias"]) + w["qkv_bias"] for row in sequence]
        for i, row in enumerate(sequence):
            mixed = []
            for head in range(2):
                d = slice(3 * head, 3 * head + 3)
                scores = torch.stack([(qkv[i][:6][d] * key[6:12][d]).sum() / math.sqrt(3) for key in qkv])
                p = scores.exp() / scores.exp().sum()
                mixed.append(sum(p[j] * qkv[j][12:][d] for j in range(3)))
            y = row + w["proj_weight"] @ torch.cat(mixed) + w["proj_bias"]
            u = w["fc1_weight"] @ norm(y, w["norm2_weight"], w["norm2_bias"]) + w["fc1_bias"]
            gelu = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
            torch.testing.assert_close(result[i], y + w["fc2_weight"] @ gelu + w["fc2_bias"])


@pytest.mark.parametrize("drop", [{}, {"dropout": 0.2, "drop_path": 0.3, "seed": 5}], ids=["plain", "dropping"])
def test_gradients_of_the_reference_are_right(drop: dict[str, Any]) -> None:
    x, weights = make(2, 3, 4, hidden=5)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights.values())]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        w = TNTInnerWeights(**dict(zip(weights, tensors, strict=True)))
        return tnt_inner_block_reference(x, w, num_heads=2, **drop)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@pytest.mark.parametrize(
    ("sequences", "tokens", "width", "heads"),
    [(1, 1, 12, 2), (5, 4, 12, 1), (3, 20, 24, 4), (2, 33, 40, 5), (2, 130, 8, 2)],
)
@pytest.mark.parametrize("drop", [{}, {"dropout": 0.2, "drop_path": 0.3, "seed": 5}], ids=["plain", "dropping"])
def test_torch_path_matches_reference(
    sequences: int, tokens: int, width: int, heads: int, drop: dict[str, Any], biases: bool
) -> None:
    x, weights = make(sequences, tokens, width, biases=biases)
    exact = run(tnt_inner_block_reference, x, weights, torch.float64, num_heads=heads, **drop)
    for result, right in zip(run(torch_path, x, weights, torch.float64, num_heads=heads, **drop), exact, strict=True):
        torch.testing.assert_close(result, right)


@pytest.mark.parametrize("tokens", [10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype, tokens: int) -> None:
    x, weights = make(3, tokens, 24, dtype=dtype)
    exact = run(tnt_inner_block_reference, x, weights, torch.float64, num_heads=4)
    plain = run(tnt_inner_block_reference, x, weights, dtype, num_heads=4)
    for result, right, usual in zip(run(torch_path, x, weights, dtype, num_heads=4), exact, plain, strict=True):
        # Where plain PyTorch happens to be nearly exact, a unit in the last place counts as nothing.
        assert (result - right).norm() <= 2 * (usual - right).norm() + torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("tokens", [5, 40])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    x, weights = make(7, tokens, 12)
    drop = {"dropout": 0.2, "drop_path": 0.3, "seed": 5}
    whole = run(tnt_inner_block_reference, x, weights, torch.float64, num_heads=2, **drop)
    threads = torch.get_num_threads()
    monkeypatch.setattr(chunked, "_CHUNK", 24 * tokens // (threads * min(2, threads)))  # two sequences a chunk
    for part, right in zip(run(torch_path, x, weights, torch.float64, num_heads=2, **drop), whole, strict=True):
        torch.testing.assert_close(part, right)


def test_a_sequence_never_sees_another() -> None:
    x, weights = make(6, 10, 12, dtype=torch.float32)
    w = TNTInnerWeights(**weights)
    before = torch_path(x, w, num_heads=2)
    changed = x.clone()
    changed[2] = 1e3 * torch.randn(10, 12, generator=torch.Generator().manual_seed(3))
    after = torch_path(changed, w, num_heads=2)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[2], after[2])


def test_any_strides_are_taken() -> None:
    x, weights = make(4, 12, 5)
    w = TNTInnerWeights(**weights)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(torch_path(turned, w, num_heads=1), torch_path(x, w, num_heads=1))
    assert torch_path(x[:0], w, num_heads=1).shape == (0, 12, 5)


def test_dropping_has_the_stated_rates_and_keeps_the_mean() -> None:
    from medformer_kernels.tnt.dropping import ATTENTION, MLP, factor

    seed = torch.tensor(2**40 + 17)
    for branch in (ATTENTION, MLP):
        elements = factor(seed, branch, 0, (500, 8, 12), 0.25, 0.0)
        whole = factor(seed, branch, 0, (4000, 8, 12), 0.0, 0.25)
        assert elements is not None
        assert whole is not None
        assert abs((elements == 0).double().mean() - 0.25) < 0.01
        assert abs(elements.double().mean() - 1) < 0.02
        assert abs((whole.flatten() == 0).double().mean() - 0.25) < 0.03
        # No pattern along sequences, tokens or channels.
        centred = (elements == 0).double() - 0.25
        for axis, length in ((0, 500), (1, 8), (2, 12)):
            rates = centred.transpose(0, axis).flatten(1).mean(1)
            assert rates.std() < 3 * (0.25 * 0.75 / (48000 / length)) ** 0.5
    first, second = (factor(seed, b, 0, (50, 8, 12), 0.5, 0.0) for b in (ATTENTION, MLP))
    assert abs(((first == 0) == (second == 0)).double().mean() - 0.5) < 0.03
    assert not torch.equal(first, factor(seed + 2**32, ATTENTION, 0, (50, 8, 12), 0.5, 0.0))


def test_the_seed_decides_and_none_follows_torch() -> None:
    x, weights = make(6, 4, 12)
    w = TNTInnerWeights(**weights)
    drop = {"num_heads": 2, "dropout": 0.5}
    torch.testing.assert_close(torch_path(x, w, seed=3, **drop), torch_path(x, w, seed=torch.tensor(3), **drop))
    assert not torch.equal(torch_path(x, w, seed=3, **drop), torch_path(x, w, seed=4, **drop))
    torch.manual_seed(0)
    first, second = torch_path(x, w, **drop), torch_path(x, w, **drop)
    torch.manual_seed(0)
    assert torch.equal(torch_path(x, w, **drop), first)
    assert not torch.equal(first, second)


def test_autocast_multiplies_in_low_precision_and_keeps_the_residual() -> None:
    x, weights = make(3, 6, 12, dtype=torch.float32)
    w = TNTInnerWeights(**weights)
    low = TNTInnerWeights(**{k: v if k.startswith("norm") else v.bfloat16() for k, v in weights.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tnt_inner_block(x, w, num_heads=2)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, tnt_inner_block(x, low, num_heads=2))
    assert (out - tnt_inner_block(x, w, num_heads=2)).abs().max() < 0.1


def test_operator_passes_opcheck() -> None:
    from medformer_kernels.tnt import ops

    x, weights = make(2, 3, 4, hidden=5, dtype=torch.float32)
    tensors = [weights[name].requires_grad_() for name in NAMES]
    arguments = (x.requires_grad_(), *tensors, torch.tensor(3), 2, 1e-6, 0.1, 0.1, True, "torch")
    torch.library.opcheck(ops.tnt_inner_block, arguments)
    tensors[3] = None
    torch.library.opcheck(ops.tnt_inner_block, (x, *tensors, None, 2, 1e-6, 0.0, 0.0, True, "torch"))


def test_compiles_as_one_graph() -> None:
    x, weights = make(3, 4, 12, dtype=torch.float32)
    w = TNTInnerWeights(**{name: tensor.requires_grad_() for name, tensor in weights.items()})

    def loss(x: Tensor) -> Tensor:
        return tnt_inner_block(x, w, num_heads=2, dropout=0.1, seed=2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for sequences in (3, 5):
        grown = torch.cat([x, x])[:sequences]
        expected = torch.autograd.grad(loss(grown), w.qkv_weight)
        torch.testing.assert_close(torch.autograd.grad(compiled(grown), w.qkv_weight), expected)


def test_frozen_weights_and_a_frozen_input_have_no_gradient() -> None:
    x, weights = make(2, 3, 4)
    tnt_inner_block(x.requires_grad_(), TNTInnerWeights(**weights), num_heads=2).sum().backward()
    assert x.grad is not None
    assert all(tensor.grad is None for tensor in weights.values())
    weights["fc1_bias"].requires_grad_()
    tnt_inner_block(x.detach(), TNTInnerWeights(**weights), num_heads=2).sum().backward()
    assert weights["fc1_bias"].grad is not None


def test_double_backward_is_refused() -> None:
    x, weights = make(2, 3, 4)
    out = tnt_inner_block(x.requires_grad_(), TNTInnerWeights(**weights), num_heads=2)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="tnt_inner_block: double backward is not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x has shape \(3, 4\)"),
        ({"num_heads": 5}, "num_heads=5 must divide the width c=12"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"drop_path": -0.1}, "drop_path=-0.1"),
        ({"dropout": 0.1, "seed": -1}, "seed=-1 must be at least 0"),
        ({"dropout": 0.1, "seed": torch.zeros(2)}, "a tensor must be int64 of one element"),
        ({"fc2_weight": torch.zeros(12, 7)}, r"weights.fc2_weight has shape \(12, 7\).*it must be \(12, 48\)"),
        ({"norm1_bias": torch.zeros(12, dtype=torch.int32)}, "weights.norm1_bias is torch.int32"),
        ({"proj_weight": torch.zeros(12, 12, dtype=torch.float16)}, "must share one dtype"),
        ({"x": torch.zeros(3, 4, 12, dtype=torch.float16)}, "x is torch.float16 but the matrices"),
        ({"backend": "cuda"}, "backend='cuda' must be"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    x, weights = make(3, 4, 12, dtype=torch.float32)
    options = {"num_heads": 2, "x": x} | {key: value for key, value in change.items() if key not in NAMES}
    w = dataclasses.replace(TNTInnerWeights(**weights), **{key: v for key, v in change.items() if key in NAMES})
    with pytest.raises(ValueError, match=f"tnt_inner_block: .*{message}") as error:
        tnt_inner_block(options.pop("x"), w, **options)
    assert "\n" not in str(error.value)
