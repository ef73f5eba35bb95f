"""Nystrom attention: definition, landmarks, pseudo-inverse and the PyTorch path."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from medformer_kernels.nystrom import (
    Cells,
    landmark_weights,
    nystrom_attention,
    nystrom_attention_reference,
    nystrom_matrices,
    nystrom_pinv,
    nystrom_residual,
)
from medformer_kernels.nystrom.composed import _convolution
from medformer_kernels.nystrom.inverse import inverse_times, inverse_times_backward
from medformer_kernels.nystrom.landmarks import pool
from medformer_kernels.nystrom.reference import depthwise_convolution

L = 8


def qkv(*shape: int, width_v: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = (shape[-1], shape[-1], width_v or shape[-1])
    return [torch.randn(*shape[:-1], width, dtype=dtype, generator=generator) for width in widths]


def right_padding(real: list[int], tokens: int) -> Tensor:
    return torch.arange(tokens) < torch.tensor(real).unsqueeze(1)


CASES: dict[str, dict[str, Any]] = {
    "sequence": {"tokens": 30, "num_landmarks": L},
    "sequence conv": {"tokens": 30, "num_landmarks": L, "conv": (33,)},
    "grid": {"tokens": 60, "grid": (3, 4, 5), "landmark_grid": (2, 2, 2)},
    "grid conv": {"tokens": 60, "grid": (3, 4, 5), "landmark_grid": (3, 2, 5), "conv": (3, 1, 5)},
    "flat grid, sequence landmarks": {"tokens": 20, "grid": (4, 5), "num_landmarks": 6, "conv": (1, 3, 3)},
    "prefix": {"tokens": 34, "num_landmarks": L, "prefix_tokens": 4, "conv": (5,)},
    "grid prefix": {"tokens": 62, "grid": (3, 4, 5), "landmark_grid": (2, 2, 1), "prefix_tokens": 2, "conv": (3, 3, 3)},
    "given": {"tokens": 30, "given": 5, "prefix_tokens": 1},
}
cases = pytest.mark.parametrize("name", CASES)


def build(name: str, *, batch: int = 2, heads: int = 3, width: int = 8, width_v: int | None = None):
    """(q, k, v, keyword arguments) of a case, in float64."""
    options = dict(CASES[name])
    tokens, conv, landmarks = options.pop("tokens"), options.pop("conv", None), options.pop("given", None)
    generator = torch.Generator().manual_seed(1)
    if conv is not None:
        options["conv_weight"] = torch.randn(heads, *conv, dtype=torch.float64, generator=generator)
    if landmarks is not None:
        for key in ("q_landmarks", "k_landmarks"):
            options[key] = torch.randn(batch, heads, landmarks, width, dtype=torch.float64, generator=generator)
    return *qkv(batch, heads, tokens, width, width_v=width_v), options


def as_dtype(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in options.items()}


# --- the definition


def test_reference_is_attention_where_every_token_is_a_landmark() -> None:
    q, k, v = qkv(1, 2, 6, 8)
    out = nystrom_attention_reference(q, k, v, num_landmarks=6, pinv_iterations=None)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_iteration_converges_to_the_exact_inverse() -> None:
    q, k, v = qkv(1, 2, 30, 8)
    exact = nystrom_attention_reference(q, k, v, num_landmarks=4, pinv_iterations=None)
    torch.testing.assert_close(nystrom_attention_reference(q, k, v, num_landmarks=4, pinv_iterations=30), exact)


@pytest.mark.parametrize("tokens", [1, L - 1, L, L + 1, 16, 130])
def test_sequence_landmarks_are_equal_segments(tokens: int) -> None:
    cells = Cells(grid=(1, 1, tokens), landmark_grid=(1, 1, min(L, tokens)))
    weights = landmark_weights(cells)[0]
    number = min(L, tokens)
    torch.testing.assert_close(weights.sum(1), torch.ones(number, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(0), torch.full((tokens,), number / tokens, dtype=torch.float64))
    assert ((weights > 0).sum(1) <= math.ceil(tokens / number) + 1).all()


def test_grid_landmarks_are_adaptive_means_where_blocks_divide() -> None:
    q, *_ = qkv(1, 1, 4 * 6 * 2, 3)
    weights = landmark_weights(Cells(grid=(4, 6, 2), landmark_grid=(2, 3, 1)))
    expected = F.adaptive_avg_pool3d(q[0].mT.reshape(1, 3, 4, 6, 2), (2, 3, 1)).flatten(2).mT
    torch.testing.assert_close(weights @ q[0], expected)


# --- landmarks


@cases
@pytest.mark.parametrize("masked", [False, True])
def test_pool_matches_its_definition(name: str, masked: bool) -> None:
    q, _, _, options = build(name)
    prefix = options.get("prefix_tokens", 0)
    inner = q.shape[2] - prefix
    blocks = options.get("landmark_grid", (1, 1, L))
    grid = options["grid"] if "landmark_grid" in options else (1, 1, inner)
    cells = Cells(grid=grid, landmark_grid=blocks, prefix=prefix)
    mask = torch.rand(q.shape[:1] + q.shape[2:3], generator=torch.Generator().manual_seed(2)) < 0.3 if masked else None
    means, valid = pool(q, cells, mask)
    weights = landmark_weights(cells, key_padding_mask=mask)
    torch.testing.assert_close(means, weights.unsqueeze(1) @ q)
    expected = (weights > 0).any(-1).expand(q.shape[0], -1)
    torch.testing.assert_close(torch.ones_like(expected) if valid is None else valid, expected)


@pytest.mark.parametrize("tokens", [1, L - 1, L, L + 1, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_any_length_pools(tokens: int, dtype: torch.dtype) -> None:
    q = qkv(2, 1, tokens, 4)[0].to(dtype)
    cells = Cells(grid=(1, 1, tokens), landmark_grid=(1, 1, min(L, tokens)))
    expected = (landmark_weights(cells).unsqueeze(1) @ q.double()).to(dtype)
    torch.testing.assert_close(pool(q, cells, None)[0], expected)


# --- the pseudo-inverse


def softmax_matrices(*shape: int, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).softmax(-1)


def test_pinv_satisfies_the_penrose_equation() -> None:
    a = softmax_matrices(2, 3, 6, 6)
    z, residual = nystrom_pinv(a, iterations=25)
    torch.testing.assert_close(z, torch.linalg.pinv(a))
    assert (residual < 1e-12).all()


def test_pinv_of_a_matrix_without_rank_is_the_moore_penrose_inverse() -> None:
    a = softmax_matrices(5, 5)
    a[1] = a[0]
    a[:, 4] = 0
    torch.testing.assert_close(nystrom_pinv(a, iterations=25)[0], torch.linalg.pinv(a))


def test_residual_is_what_the_iteration_leaves() -> None:
    q, k, _ = qkv(2, 3, 30, 8)
    _, a, _ = nystrom_matrices(q, k, Cells(grid=(1, 1, 30), landmark_grid=(1, 1, L)))
    z, _ = nystrom_pinv(a, iterations=4)
    expected = (a @ z @ a - a).norm(dim=(-1, -2)) / a.norm(dim=(-1, -2))
    torch.testing.assert_close(nystrom_residual(q, k, num_landmarks=L, pinv_iterations=4), expected)


def test_tolerance_stops_each_matrix_on_its_own() -> None:
    a = softmax_matrices(6, 5, 5)
    z, residual = nystrom_pinv(a, iterations=40, tolerance=1e-3)
    assert (residual <= 1e-3).all()
    assert (residual > 1e-9).any()
    torch.testing.assert_close(z[2:3], nystrom_pinv(a[2:3], iterations=40, tolerance=1e-3)[0])


def test_more_iterations_than_a_tolerance_needs_change_nothing() -> None:
    a = softmax_matrices(6, 5, 5)
    torch.testing.assert_close(
        nystrom_pinv(a, iterations=40, tolerance=1e-3)[0], nystrom_pinv(a, iterations=60, tolerance=1e-3)[0]
    )


@pytest.mark.parametrize(("iterations", "tolerance"), [(0, None), (1, None), (2, None), (6, None), (9, 1e-2)])
def test_inverse_gradient_matches_autograd(iterations: int, tolerance: float | None) -> None:
    scores = softmax_matrices(2, 5, 5).log().requires_grad_()
    x = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    a = scores.softmax(-1)
    a.retain_grad()
    plain = nystrom_pinv(a, iterations=iterations, tolerance=tolerance)[0] @ x
    dout = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (scores, x), dout, retain_graph=True)
    out = inverse_times(a, x, iterations, tolerance)
    torch.testing.assert_close(torch.autograd.grad(out, (scores, x), dout, retain_graph=True), expected)
    da, dx = inverse_times_backward(a.detach(), x.detach(), dout, iterations, tolerance)
    torch.testing.assert_close((a * (da - (da * a).sum(-1, keepdim=True)), dx), expected)


# --- the PyTorch path


@cases
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width_v", [8, 5])
def test_torch_path_matches_reference(name: str, masked: bool, width_v: int) -> None:
    q, k, v, options = build(name, width_v=width_v)
    tensors = [q, k, v] + [x for x in options.values() if isinstance(x, Tensor)]
    for x in tensors:
        x.requires_grad_()
    if masked:
        options["key_padding_mask"] = right_padding([q.shape[2] - 7, 5], q.shape[2])
    out = nystrom_attention(q, k, v, backend="torch", **options)
    expected = nystrom_attention_reference(q, k, v, **options)
    torch.testing.assert_close(out, expected)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(torch.autograd.grad(out, tensors, dout), torch.autograd.grad(expected, tensors, dout))


@pytest.mark.parametrize("tokens", [1, L - 1, L, L + 1, 130])
def test_torch_path_takes_any_length(tokens: int) -> None:
    q, k, v = qkv(1, 2, tokens, 8)
    out = nystrom_attention(q, k, v, num_landmarks=L, backend="torch")
    torch.testing.assert_close(out, nystrom_attention_reference(q, k, v, num_landmarks=L))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype, scale: float) -> None:
    q, k, v = (scale * x for x in qkv(1, 2, 256, 32))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    exact = nystrom_attention_reference(q.double(), k.double(), v.double(), num_landmarks=16)
    plain = nystrom_attention_reference(q, k, v, num_landmarks=16)
    out = nystrom_attention(q, k, v, num_landmarks=16, backend="torch")
    assert (out - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradient_error_is_at_most_twice_that_of_plain_pytorch(scale: float) -> None:
    tensors = [scale * x for x in qkv(1, 2, 512, 32)]
    weight = torch.randn(2, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dout = qkv(1, 2, 512, 32, seed=1)[0]

    def gradients(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v, conv = (x.to(dtype).requires_grad_() for x in (*tensors, weight))
        out = function(q, k, v, num_landmarks=64, conv_weight=conv)
        return torch.autograd.grad(out, (q, k, v, conv), dout.to(dtype))

    exact = gradients(nystrom_attention_reference, torch.float64)
    plain = gradients(nystrom_attention_reference, torch.float32)
    for x, usual, right in zip(gradients(nystrom_attention, torch.float32), plain, exact, strict=True):
        assert (x - right).norm() <= 2 * (usual - right).norm()


def test_torch_path_compiles_as_one_graph() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 40, 8))
    weight = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, num_landmarks=4, conv_weight=weight).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, v), (q, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v), (q, weight)), expected)


def test_convolution_along_more_tokens_than_its_gradient_takes_at_once() -> None:
    v = qkv(2, 3, 1101, 4)[0].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weight = torch.randn(3, 1, 1, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grid = (1, 1, 1101)
    out, expected = _convolution(v, weight, grid), depthwise_convolution(v, weight, grid)
    torch.testing.assert_close(out, expected)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        torch.autograd.grad(out, (v, weight), dout), torch.autograd.grad(expected, (v, weight), dout)
    )


def test_matches_the_composition_of_two_attentions_in_float32() -> None:
    q, k, v = (x.float() for x in qkv(1, 2, 256, 32))
    q_landmarks, k_landmarks = (x.view(1, 2, 16, 16, 32).mean(3) for x in (q, k))
    a = (q_landmarks @ k_landmarks.mT * 32**-0.5).softmax(-1)
    values = nystrom_pinv(a)[0] @ F.scaled_dot_product_attention(q_landmarks, k, v)
    expected = F.scaled_dot_product_attention(q, k_landmarks, values)
    out = nystrom_attention(q, k, v, num_landmarks=16, backend="torch")
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_gradients_of_the_definition_are_right() -> None:
    q, k, v, options = build("grid prefix", batch=1, heads=1, width=4)
    options = {**options, "grid": (2, 2, 3), "landmark_grid": (1, 2, 2), "prefix_tokens": 1, "pinv_iterations": 3}
    q, k, v = (x[:, :, :13].clone().requires_grad_() for x in (q, k, v))
    weight = options.pop("conv_weight").requires_grad_()
    mask = right_padding([11], 13)

    def function(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return nystrom_attention_reference(q, k, v, conv_weight=weight, key_padding_mask=mask, **options)[:, :, :11]

    assert torch.autograd.gradcheck(function, (q, k, v, weight), fast_mode=True)


@cases
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    q, k, v, options = build(name)
    out = nystrom_attention(q, k, v, **options)
    single: dict[str, Any] = {
        key: x[:1] if key.endswith("landmarks") and isinstance(x, Tensor) else x for key, x in options.items()
    }
    torch.testing.assert_close(nystrom_attention(q[:1], k[:1], v[:1], **single), out[:1])


@settings(deadline=None, max_examples=25)
@given(real=st.integers(1, 40), padding=st.integers(0, 30), number=st.integers(1, 12), conv=st.sampled_from([0, 3, 33]))
def test_right_padding_never_changes_the_rest(real: int, padding: int, number: int, conv: int) -> None:
    q, k, v = qkv(1, 2, real + padding, 4)
    for x in (q, k, v):
        x[:, :, real:] = torch.nan
    weight = torch.randn(2, conv, dtype=torch.float64) if conv else None
    mask = right_padding([real], real + padding)
    out = nystrom_attention(q, k, v, num_landmarks=number, conv_weight=weight, key_padding_mask=mask)
    alone = nystrom_attention(*(x[:, :, :real] for x in (q, k, v)), num_landmarks=number, conv_weight=weight)
    torch.testing.assert_close(out[:, :, :real], alone)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**16), name=st.sampled_from(["sequence", "grid conv", "grid prefix"]))
def test_masked_tokens_are_never_read(seed: int, name: str) -> None:
    q, k, v, options = build(name)
    mask = torch.rand(2, q.shape[2], generator=torch.Generator().manual_seed(seed)) < 0.6
    first = nystrom_attention(q, k, v, key_padding_mask=mask, **options)
    for x in (q, k, v):
        x.masked_fill_(~mask[:, None, :, None], torch.inf)
    second = nystrom_attention(q, k, v, key_padding_mask=mask, **options)
    rows = mask[:, None, :, None].expand_as(first)
    torch.testing.assert_close(first[rows], second[rows])


@cases
def test_a_sample_without_a_key_gives_zeros_and_finite_gradients(name: str) -> None:
    q, k, v, options = build(name)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    mask = right_padding([q.shape[2], 0], q.shape[2])
    out = nystrom_attention(q, k, v, key_padding_mask=mask, **options)
    torch.testing.assert_close(out[1], torch.zeros_like(out[1]))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), tensors))


def test_class_tokens_attend_exactly() -> None:
    q, k, v = qkv(2, 3, 34, 8)
    out = nystrom_attention(q, k, v, num_landmarks=L, prefix_tokens=2)
    torch.testing.assert_close(out[:, :, :2], F.scaled_dot_product_attention(q[:, :, :2], k, v))


def test_given_landmarks_allow_other_queries_than_keys() -> None:
    q, k, v = qkv(1, 2, 12, 8)
    landmarks: dict[str, Any] = {"q_landmarks": q[:, :, :4], "k_landmarks": k[:, :, 4:8]}
    out = nystrom_attention(q[:, :, :5], k, v, **landmarks)
    torch.testing.assert_close(out, nystrom_attention_reference(q[:, :, :5], k, v, **landmarks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pure_low_precision_stays_finite(dtype: torch.dtype) -> None:
    q, k, v = ((10 * x).to(dtype).requires_grad_() for x in qkv(1, 2, 130, 16))
    out = nystrom_attention(q, k, v, num_landmarks=L, conv_weight=torch.randn(2, 33), pinv_iterations=12)
    assert out.dtype == dtype
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


def test_autocast_takes_its_dtype_and_keeps_the_inverse_in_float32() -> None:
    q, k, v = (x.float() for x in qkv(1, 2, 64, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = nystrom_attention(q, k, v, num_landmarks=L)
    torch.testing.assert_close(out, nystrom_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), num_landmarks=L))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no landmarks": ({"num_landmarks": 0}, "num_landmarks=0 must be at least 1"),
    "half a landmark": ({"num_landmarks": 2.5}, "num_landmarks=2.5 must be at least 1, and whole"),
    "integer convolution": (
        {"num_landmarks": 2, "conv_weight": torch.ones(3, 3, dtype=torch.int64)},
        "conv_weight is torch.int64; it must be a floating-point tensor",
    ),
    "negative landmarks": ({"num_landmarks": -3}, "num_landmarks=-3 must be at least 1"),
    "nothing chosen": ({}, "exactly one of num_landmarks"),
    "two choices": ({"num_landmarks": 2, "grid": (3, 4), "landmark_grid": (1, 2)}, "exactly one of num_landmarks"),
    "grid does not multiply": ({"grid": (5, 3), "landmark_grid": (1, 2)}, r"grid=\(5, 3\) must be .* of 12 tokens"),
    "landmark grid without grid": ({"landmark_grid": (1, 2)}, "landmark_grid needs grid"),
    "landmark grid of other axes": ({"grid": (1, 3, 4), "landmark_grid": (1, 2)}, r"each axis of grid=\(1, 3, 4\)"),
    "landmark grid of nothing": ({"grid": (3, 4), "landmark_grid": (0, 2)}, "at least 1 block"),
    "half the landmarks": ({"q_landmarks": torch.zeros(2, 3, 2, 8)}, "must be given together"),
    "wrong landmarks": (
        {"q_landmarks": torch.zeros(2, 3, 2, 7), "k_landmarks": torch.zeros(2, 3, 2, 7)},
        r"q_landmarks has shape \(2, 3, 2, 7\)",
    ),
    "mask of the wrong shape": (
        {"num_landmarks": 2, "key_padding_mask": torch.ones(2, 11) > 0},
        r"\(B, S\) = \(2, 12\)",
    ),
    "mask of the wrong dtype": ({"num_landmarks": 2, "key_padding_mask": torch.ones(2, 12)}, "must be bool"),
    "even convolution": ({"num_landmarks": 2, "conv_weight": torch.ones(3, 4)}, "must be odd"),
    "convolution of other heads": ({"num_landmarks": 2, "conv_weight": torch.ones(2, 3)}, r"must be \(3, K\)"),
    "3D convolution without grid": ({"num_landmarks": 2, "conv_weight": torch.ones(3, 3, 3, 3)}, "needs grid"),
    "prefix of everything": ({"num_landmarks": 2, "prefix_tokens": 12}, "prefix_tokens=12"),
    "negative iterations": ({"num_landmarks": 2, "pinv_iterations": -1}, "pinv_iterations=-1"),
    "negative tolerance": ({"num_landmarks": 2, "pinv_tolerance": -1.0}, "pinv_tolerance=-1.0"),
    "unknown backend": ({"num_landmarks": 2, "backend": "cuda"}, "backend='cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_rule(name: str) -> None:
    options, message = BAD[name]
    q, k, v = qkv(2, 3, 12, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        nystrom_attention(q, k, v, **options)


def test_tensors_that_disagree_are_refused() -> None:
    q, k, v = qkv(2, 3, 12, 8)
    with pytest.raises(ValueError, match=r"k is torch\.float32"):
        nystrom_attention(q, k.float(), v, num_landmarks=2)
    with pytest.raises(ValueError, match="v has shape"):
        nystrom_attention(q, k, v[:, :, 1:], num_landmarks=2)
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 12, 0\); its width must be at least 1"):
        nystrom_attention(q[..., :0], k[..., :0], v, num_landmarks=2)
    with pytest.raises(ValueError, match="k has 11 tokens and q has 12"):
        nystrom_attention(q, k[:, :, 1:], v[:, :, 1:], num_landmarks=2)
