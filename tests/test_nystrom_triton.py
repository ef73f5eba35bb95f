"""The Triton kernels of Nystrom attention, in the interpreter where there is no GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels.nystrom import nystrom_attention, nystrom_attention_reference, products
from medformer_kernels.nystrom.inverse import inverse_times, inverse_times_backward
from medformer_kernels.nystrom.landmarks import Cells
from medformer_kernels.nystrom.ops import nystrom_forward
from medformer_kernels.nystrom.plans import key_walk, launch_plan, one_program
from tests import launches
from tests.rule import assert_as_good_as_pytorch

pytestmark = launches.nystrom
L = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES: dict[str, dict[str, Any]] = {
    "sequence": {"tokens": 30, "num_landmarks": L},
    "masked sequence, convolution": {"tokens": 30, "real": (23, 5), "num_landmarks": L, "conv": (7,)},
    "prefix": {"tokens": 33, "real": (28, 33), "num_landmarks": L, "prefix_tokens": 3, "conv": (33,)},
    "whole segments": {"tokens": 64, "num_landmarks": L, "pinv_iterations": 2},
    "uneven segments": {"tokens": 131, "real": (131, 6), "num_landmarks": L, "prefix_tokens": 1, "pinv_iterations": 2},
    "whole blocks": {
        "tokens": 98, "real": (98, 41), "grid": (2, 8, 6), "landmark_grid": (1, 2, 2), "prefix_tokens": 2,
        "conv": (1, 3, 3), "pinv_iterations": 2,
    },
    "grid": {"tokens": 60, "grid": (3, 4, 5), "landmark_grid": (2, 3, 2), "pinv_iterations": 2},
    "masked grid, convolution": {
        "tokens": 31, "real": (17, 31), "grid": (2, 3, 5), "landmark_grid": (2, 2, 2), "prefix_tokens": 1,
        "conv": (3, 1, 3),
    },
    "one token": {"tokens": 1, "num_landmarks": L, "conv": (3,)},
    "given landmarks": {"tokens": 30, "real": (17, 30), "given": 5, "prefix_tokens": 1, "pinv_tolerance": 0.05},
}  # fmt: skip


def tensors(name: str, *, heads: int = 1, width: int = 8, width_v: int = 8) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(differentiable inputs by name, the other arguments) in float64."""
    options = dict(CASES[name])
    tokens, conv, given = options.pop("tokens"), options.pop("conv", None), options.pop("given", None)
    real = options.pop("real", None)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE)

    inputs = {"q": normal(2, heads, tokens, width), "k": normal(2, heads, tokens, width)}
    inputs["v"] = normal(2, heads, tokens, width_v)
    if conv is not None:
        inputs["conv_weight"] = normal(heads, *conv)
    if given is not None:
        inputs |= {key: normal(2, heads, given, width) for key in ("q_landmarks", "k_landmarks")}
    if real is not None:
        options["key_padding_mask"] = (torch.arange(tokens) < torch.tensor(real).unsqueeze(1)).to(DEVICE)
    return inputs, options


def run(function, inputs: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Output, then the gradient of every input."""
    leaves = {key: x.detach().to(dtype).requires_grad_() for key, x in inputs.items()}
    out = function(**leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout.to(DEVICE, dtype))]


def triton(**arguments: Any) -> Tensor:
    return nystrom_attention(**arguments, backend="triton")


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_match_reference(name: str) -> None:
    inputs, options = tensors(name)
    results = run(triton, inputs, options, torch.float32)
    exact = run(nystrom_attention_reference, inputs, options, torch.float64)
    plain = run(nystrom_attention_reference, inputs, options, torch.float32)
    assert_as_good_as_pytorch(results, plain, exact, ["out", *inputs])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("masked sequence, convolution", torch.float16),
        *((name, torch.bfloat16) for name in CASES if name not in ("sequence", "whole segments", "grid", "one token")),
    ],
    ids=lambda x: x if isinstance(x, str) else str(x)[6:],
)
def test_low_precision_error_is_at_most_twice_that_of_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    inputs, options = tensors(name, width=16, width_v=16)
    inputs = {key: x.to(dtype) for key, x in inputs.items()}
    results = run(triton, inputs, options, dtype)
    exact = run(nystrom_attention_reference, inputs, options, torch.float64)
    plain = run(nystrom_attention_reference, inputs, options, dtype)
    assert_as_good_as_pytorch(results, plain, exact, ["out", *inputs])


def test_one_token_in_bfloat16_keeps_the_rule_and_hardly_moves_q_and_k() -> None:
    """Their gradients are 0: terms of size 1 that cancel, one of them from the rounded output."""
    inputs, options = tensors("one token", width=16, width_v=16)
    inputs = {key: x.bfloat16() for key, x in inputs.items()}
    out, dq, dk, *rest = run(triton, inputs, options, torch.bfloat16)
    exact = run(nystrom_attention_reference, inputs, options, torch.float64)
    plain = run(nystrom_attention_reference, inputs, options, torch.bfloat16)
    assert_as_good_as_pytorch([out, *rest], [plain[0], *plain[3:]], [exact[0], *exact[3:]], ["out", "v", "conv"])
    assert max(dq.abs().max(), dk.abs().max()) <= torch.finfo(torch.bfloat16).eps


@launches.nystrom_forward
@pytest.mark.parametrize("tokens", [1, L - 1, L, L + 1, 130])
def test_takes_any_length(tokens: int) -> None:
    q, k, v = torch.randn(3, 1, 1, tokens, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    expected = nystrom_attention_reference(q.double(), k.double(), v.double(), num_landmarks=L)
    out = nystrom_attention(q, k, v, num_landmarks=L, backend="triton")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_slices_of_a_long_sequence_merge() -> None:
    q = torch.empty(1, device=DEVICE)
    plan = functools.partial(
        launch_plan, "values_fwd", chip=_dispatch.chip_of(q), landmarks=4, width=8, itemsize=4, batch_heads=1
    )
    tokens = 2 * 8 * plan(tokens=1).block_n + 1
    assert plan(tokens=tokens).slices > 1
    q, k, v = torch.randn(3, 1, 1, tokens, 8, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    inputs = {"q": q.double(), "k": k.double(), "v": v.double()}
    results = run(triton, inputs, {"num_landmarks": 4}, torch.float32)
    exact = run(nystrom_attention_reference, inputs, {"num_landmarks": 4}, torch.float64)
    for result, right in zip(results, exact, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=1e-4, atol=1e-5)


@launches.nystrom_forward
def test_strides_are_honoured() -> None:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(1, 20, 3, 2, 8, generator=generator).to(DEVICE)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    out = nystrom_attention(q, k, v, num_landmarks=4, backend="triton")
    packed = nystrom_attention(q.contiguous(), k.contiguous(), v.contiguous(), num_landmarks=4, backend="triton")
    torch.testing.assert_close(out, packed, rtol=0, atol=0)


def test_equal_inputs_give_equal_bits() -> None:
    inputs, options = tensors("given landmarks")
    first, second = (run(triton, inputs, options, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_masked_tokens_hold_is_never_read() -> None:
    inputs, options = tensors("masked sequence, convolution")
    padding = ~options["key_padding_mask"][:, None, :, None]
    dirty = {key: x.masked_fill(padding, torch.nan) if x.ndim == 4 else x for key, x in inputs.items()}
    clean = run(triton, inputs, options, torch.float32)
    for a, b in zip(clean, run(triton, dirty, options, torch.float32), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_sample_without_a_key_gives_zeros_and_finite_gradients() -> None:
    inputs, options = tensors("sequence")
    options["key_padding_mask"] = torch.tensor([[True], [False]], device=DEVICE).expand(2, 30)
    out, *gradients = run(triton, inputs, options, torch.float32)
    torch.testing.assert_close(out[1], torch.zeros_like(out[1]))
    assert all(x.isfinite().all() for x in gradients)


@launches.none
@pytest.mark.parametrize("name", ["whole segments", "uneven segments", "whole blocks"])
def test_keys_are_read_once_where_cells_fill_tiles(name: str) -> None:
    options = CASES[name]
    prefix, tokens = options.get("prefix_tokens", 0), options["tokens"]
    cells = Cells(
        grid=options.get("grid", (1, 1, tokens - prefix)),
        landmark_grid=options.get("landmark_grid", (1, 1, L)),
        prefix=prefix,
    )
    chip = _dispatch.chip_of(torch.empty(1, device=DEVICE))
    ranked = "real" in options and cells.sequence
    assert key_walk(
        cells,
        ranked=ranked,
        chip=chip,
        landmarks=cells.count + prefix,
        width=8,
        itemsize=4,
        tokens=tokens,
        batch_heads=2,
    )


@pytest.mark.launches("nystrom_products_kernel")
@pytest.mark.parametrize("iterations", [0, 2])
def test_one_program_inverts_in_blocks(iterations: int) -> None:
    a = (3 * torch.randn(1, 1, 70, 70, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).softmax(-1)
    x, dout = torch.randn(2, 1, 1, 70, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exact = [inverse_times(a, x, iterations, None), *inverse_times_backward(a, x, dout, iterations, None)]
    a, x, dout = (t.to(DEVICE, torch.float32) for t in (a, x, dout))
    plain = [inverse_times(a, x, iterations, None), *inverse_times_backward(a, x, dout, iterations, None)]
    chip = _dispatch.chip_of(x)
    made = [products.solve(chip, a, x, iterations), *products.solve_backward(chip, a, x, dout, iterations)]
    for result, usual, right in zip(made, plain, exact, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * right.norm()
        assert (result.cpu() - right).norm() <= 2 * (usual.cpu() - right).norm() + floor


@launches.nystrom_forward
def test_few_heads_of_many_landmarks_take_batched_products() -> None:
    q, k, v = torch.randn(3, 1, 1, 150, 8, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    number = 140
    assert not one_program(_dispatch.chip_of(q), number, 1)
    landmarks: dict[str, Any] = {"q_landmarks": q[:, :, :number], "k_landmarks": k[:, :, :number]}
    wide: dict[str, Any] = {key: x.double() for key, x in landmarks.items()}
    exact = nystrom_attention_reference(q.double(), k.double(), v.double(), **wide)
    plain = nystrom_attention_reference(q, k, v, **landmarks)
    out = nystrom_attention(q, k, v, backend="triton", **landmarks)
    assert (out - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("name", ["masked sequence, convolution", "given landmarks"])
def test_operator_passes_opcheck(name: str) -> None:
    inputs, options = tensors(name)
    inputs = {key: x[:1, :, :9] if key in "qkv" else x[:1] for key, x in inputs.items()}
    options["key_padding_mask"] = options["key_padding_mask"][:1, :9]
    x = {key: value.float().requires_grad_() for key, value in inputs.items()}
    weight = x.get("conv_weight")
    given = "q_landmarks" in x
    prefix = options.get("prefix_tokens", 0)
    inner = x["q"].shape[2] - prefix
    arguments = (
        x["q"], x["k"], x["v"], x.get("q_landmarks"), x.get("k_landmarks"),
        None if weight is None else weight[:, None, None].detach().requires_grad_(), options["key_padding_mask"],
        [1, 1, inner], [1, 1, 1 if given else 4], [1, 1, inner], prefix, 1, None,
    )  # fmt: skip
    torch.library.opcheck(nystrom_forward, arguments)


def test_compiles_as_one_graph() -> None:
    q, k, v = torch.randn(3, 1, 1, 20, 8, generator=torch.Generator().manual_seed(5)).to(DEVICE).requires_grad_()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, num_landmarks=4, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v), q), torch.autograd.grad(loss(q, k, v), q))


def test_double_backward_is_refused() -> None:
    q, k, v = torch.randn(3, 1, 1, 8, 8).to(DEVICE).requires_grad_()
    out = nystrom_attention(q, k, v, num_landmarks=2, backend="triton")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        dq.sum().backward()


@launches.none
def test_heads_wider_than_any_tile_are_refused() -> None:
    q, k, v = torch.randn(3, 1, 1, 8, 130).to(DEVICE)
    with pytest.raises(ValueError, match="has no kernel for heads wider than 128"):
        nystrom_attention(q, k, v, num_landmarks=2, backend="triton")
