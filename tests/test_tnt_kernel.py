"""The Triton kernels of the inner block, in the interpreter where there is no GPU.

The tiles here take every shape at small cost; that those of configs/tnt.json compile is in test_tnt_compile.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import triton as triton_language
import triton.language as tl
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, assume_chip
from medformer_kernels.tnt import TNTInnerWeights, ops, tnt_inner_block, tnt_inner_block_reference
from medformer_kernels.tnt.device import gelu_slope, normal_cdf
from medformer_kernels.tnt.plans import KERNELS, launch_plan
from medformer_kernels.tnt.weights import NAMES
from tests import launches, rule
from tests.test_tnt import make, run

pytestmark = launches.inner
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DROP: dict[str, Any] = {"dropout": 0.2, "drop_path": 0.3, "seed": 2**33 + 5}


def use_tiles(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    tile = {"width": 128, "head": 128, "block_f": 32, "num_warps": 4, "num_stages": 1} | options
    entries = [tile | {"itemsize": i, "block_r": rows} for i, rows in itertools.product((2, 4), (64, 128))]
    monkeypatch.setattr(_dispatch, "load_configs", lambda _: {kernel: {"sm_80": entries} for kernel in KERNELS})


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch)


def triton(x: Tensor, weights: TNTInnerWeights, **options: Any) -> Tensor:
    return tnt_inner_block(x, weights, backend="triton", **options)


def inputs(*shape: int, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    x, weights = make(*shape, **options)
    return x.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in weights.items()}


def assert_as_good_as_pytorch(x: Tensor, weights: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    """Output and every gradient: at most twice the error of plain PyTorch in the same dtype."""
    exact = run(tnt_inner_block_reference, x, weights, torch.float64, **options)
    plain = run(tnt_inner_block_reference, x, weights, dtype, **options)
    made = run(triton, x, weights, dtype, **options)
    rule.assert_as_good_as_pytorch(made, plain, exact, ["out", "x", *weights])


@pytest.mark.parametrize(
    ("sequences", "tokens", "width", "heads"),
    [(3, 1, 12, 2), (9, 10, 24, 4), (20, 5, 12, 1), (2, 33, 40, 5), (3, 64, 48, 3), (3, 4, 128, 8), (2, 128, 12, 2)],
)
def test_output_and_gradients_match_reference(sequences: int, tokens: int, width: int, heads: int) -> None:
    x, weights = inputs(sequences, tokens, width)
    assert_as_good_as_pytorch(x, weights, torch.float32, num_heads=heads)


def test_long_sequences_fill_a_tile_of_128_rows() -> None:
    chip = Chip(arch="sm_80", units=4)
    shape = {"chip": chip, "sequences": 100, "width": 12, "head": 6, "parts": 1, "itemsize": 2}
    assert [launch_plan("fwd", tokens=n, **shape).block_r for n in (5, 16, 40, 64, 65, 100)] == [
        64,
        64,
        128,
        64,
        128,
        128,
    ]
    assert launch_plan("mlp_dx", tokens=100, **shape).block_r == 64
    x, weights = inputs(2, 100, 12)
    assert_as_good_as_pytorch(x, weights, torch.float16, num_heads=2)


@pytest.mark.parametrize("drop", [{}, DROP], ids=["plain", "dropping"])
def test_kernels_in_two_launches_match_reference(monkeypatch: pytest.MonkeyPatch, drop: dict[str, Any]) -> None:
    use_tiles(monkeypatch, split=True)
    x, weights = inputs(9, 10, 24)
    assert_as_good_as_pytorch(x, weights, torch.float32, num_heads=4, **drop)


def test_a_gain_of_zero_has_a_gradient() -> None:
    x, weights = inputs(5, 8, 12)
    weights["norm1_weight"][3] = weights["norm2_weight"][5] = 0.0
    assert_as_good_as_pytorch(x, weights, torch.float32, num_heads=2)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
def test_dropping_matches_reference(biases: bool) -> None:
    x, weights = inputs(9, 10, 24, biases=biases)
    assert_as_good_as_pytorch(x, weights, torch.float32, num_heads=4, **DROP)


@pytest.mark.parametrize(
    ("dtype", "shape", "heads", "options"),
    [
        (torch.float16, (5, 16, 24), 4, {}),
        (torch.bfloat16, (5, 16, 24), 4, {}),
        (torch.bfloat16, (1, 1, 12), 2, {}),
        (torch.bfloat16, (7, 33, 20), 5, DROP),
    ],
    ids=["fp16", "bf16", "bf16, one token", "bf16, dropping"],
)
def test_low_precision_error_is_at_most_twice_that_of_plain_pytorch(dtype, shape, heads, options) -> None:
    x, weights = inputs(*shape, dtype=dtype)
    assert_as_good_as_pytorch(x, weights, dtype, num_heads=heads, **options)


def test_a_program_walks_over_many_tiles_and_slices_sum_up() -> None:
    x, weights = inputs(170, 12, 12, hidden=20)
    with assume_chip(Chip(arch="sm_80", units=1)):
        assert_as_good_as_pytorch(x, weights, torch.float32, num_heads=2, **DROP)


def test_a_mlp_wider_than_its_tile_and_not_a_multiple_of_it() -> None:
    x, weights = inputs(3, 7, 20, hidden=77)
    assert_as_good_as_pytorch(x, weights, torch.float32, num_heads=2)


@launches.inner_forward
def test_float32_tokens_with_half_weights() -> None:
    x, weights = inputs(4, 6, 12)
    low = {name: w if name.startswith("norm") else w.half() for name, w in weights.items()}
    out = triton(x.float(), TNTInnerWeights(**low), num_heads=2)
    assert out.dtype == torch.float32
    exact = tnt_inner_block_reference(x, TNTInnerWeights(**{k: v.double() for k, v in low.items()}), num_heads=2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@launches.inner_dx
def test_perturbing_one_sequence_leaves_the_bits_of_the_others() -> None:
    x, weights = inputs(13, 5, 12, dtype=torch.float32)
    w = TNTInnerWeights(**weights)
    changed = x.clone()
    changed[4] = 1e4
    before, after = triton(x, w, num_heads=2), triton(changed, w, num_heads=2)
    others = [i for i in range(13) if i != 4]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[4], after[4])
    dx = [torch.autograd.grad(triton(y.requires_grad_(), w, num_heads=2).square().sum(), y)[0] for y in (x, changed)]
    assert torch.equal(dx[0][others], dx[1][others])


@launches.inner_dx
def test_strides_are_honoured() -> None:
    x, weights = inputs(4, 6, 12, dtype=torch.float32)
    w = TNTInnerWeights(**weights)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    out, packed = triton(turned, w, num_heads=2), triton(x.requires_grad_(), w, num_heads=2)
    assert torch.equal(out, packed)
    dout = torch.randn(12, 6, 4, generator=torch.Generator().manual_seed(2)).to(DEVICE).transpose(0, 2)
    dx, expected = torch.autograd.grad(out, turned, dout), torch.autograd.grad(packed, x, dout.contiguous())
    assert torch.equal(dx[0], expected[0])


@launches.inner_dx
@pytest.mark.skipif(DEVICE == "cuda", reason="takes 8 GB where untouched memory is taken too")
def test_places_beyond_2_31_numbers_are_reached() -> None:
    x, weights = inputs(3, 5, 12, dtype=torch.float16)
    w = TNTInnerWeights(**weights)
    shape, strides = x.shape, (2**30 + 7, 12, 1)
    # Never written but where the sequences lie: untouched pages take no memory.
    far, dout = (torch.from_numpy(np.empty(2**31 + 100, np.float16)).as_strided(shape, strides) for _ in range(2))
    far.copy_(x)
    dout.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(triton(far, w, num_heads=2), triton(x, w, num_heads=2))
    dx = [
        torch.autograd.grad(triton(tensor.requires_grad_(), w, num_heads=2), tensor, gradient)[0]
        for tensor, gradient in ((far, dout), (x, dout.contiguous()))
    ]
    assert torch.equal(*dx)


def test_equal_inputs_give_equal_bits() -> None:
    x, weights = inputs(9, 5, 12)
    first, second = (run(triton, x, weights, torch.float32, num_heads=2, **DROP) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@launches.none
def test_no_sequences_give_none() -> None:
    x, weights = inputs(1, 5, 12, dtype=torch.float32)
    w = TNTInnerWeights(**{name: tensor.requires_grad_() for name, tensor in weights.items()})
    out = triton(x[:0].requires_grad_(), w, num_heads=2)
    assert out.shape == (0, 5, 12)
    out.sum().backward()
    assert w.fc1_weight.grad is not None
    assert not w.fc1_weight.grad.any()


def test_operator_passes_opcheck() -> None:
    x, weights = inputs(3, 4, 12, hidden=5, dtype=torch.float32)
    tensors = [weights[name].requires_grad_() for name in NAMES]
    seed = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(ops.tnt_inner_block, (x.requires_grad_(), *tensors, seed, 2, 1e-6, 0.1, 0.1, True, "triton"))


def test_compiles_as_one_graph() -> None:
    x, weights = inputs(3, 4, 12, dtype=torch.float32)
    w = TNTInnerWeights(**{name: tensor.requires_grad_() for name, tensor in weights.items()})

    def loss(x: Tensor) -> Tensor:
        return triton(x, w, num_heads=2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x), w.qkv_weight)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), w.qkv_weight), expected)


@launches.inner_dx
def test_double_backward_is_refused() -> None:
    x, weights = inputs(2, 3, 12, dtype=torch.float32)
    out = triton(x.requires_grad_(), TNTInnerWeights(**weights), num_heads=2)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="tnt_inner_block: double backward is not implemented"):
        dx.sum().backward()


@launches.none
@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [((1, 129, 12), 2, "n above 128"), ((1, 4, 136), 8, "n=4, c=136, heads of 17 in torch.float32: no tile")],
)
def test_shapes_that_no_tile_holds_are_refused(shape: tuple[int, int, int], heads: int, message: str) -> None:
    x, weights = inputs(*shape, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"tnt_inner_block: backend='triton' has no kernel for {message}"):
        triton(x, TNTInnerWeights(**weights), num_heads=heads)
    assert (
        tnt_inner_block(x.cpu(), TNTInnerWeights(**{k: v.cpu() for k, v in weights.items()}), num_heads=heads)
        is not None
    )


@triton_language.jit
def cdf_kernel(U, OUT, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, COUNT)
    u = tl.load(U + at)
    cdf = normal_cdf(u, DTYPE)
    tl.store(OUT + at, cdf)
    tl.store(OUT + COUNT + at, gelu_slope(u, cdf))


@pytest.mark.launches("cdf_kernel")
@pytest.mark.parametrize(
    ("dtype", "probability", "gelu"),
    [(tl.bfloat16, 1.42e-5, 6e-5), (tl.float16, 1.42e-5, 6e-5), (tl.float32, 4e-7, 2e-6)],
)
def test_gelu_and_its_slope_are_within_what_is_stated(dtype: tl.dtype, probability: float, gelu: float) -> None:
    u = torch.cat((torch.linspace(-9, 9, 8190), torch.tensor([0.0, 300.0]))).to(DEVICE)
    out = u.new_empty(2, len(u))
    cdf_kernel[(1,)](u, out, COUNT=len(u), DTYPE=dtype)
    exact, x = torch.special.ndtr(u.double()), u.double()
    slope = exact + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    assert (out[0] - exact).abs().max() <= probability
    assert (out[1] - slope).abs().max() <= probability + 1e-6
    assert (x * (out[0] - exact)).abs().max() <= gelu
