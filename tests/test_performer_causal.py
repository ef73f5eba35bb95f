"""Causal FAVOR+: the parallel form, decoding token by token, and documents laid end to end."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medformer_kernels import orthogonal_features, performer_attention, performer_attention_reference
from medformer_kernels.performer import PerformerState, causal, ops, performer_prefill, performer_step


def inputs(
    tokens=50, batch=2, heads=2, kv_heads=None, width=8, width_v=6, dtype=torch.float64, std=1.0, seed=0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kv_heads = kv_heads or heads
    shapes = ((heads, tokens, width), (kv_heads, tokens, width), (kv_heads, tokens, width_v))
    drawn = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64) * std for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in drawn]


def outputs_and_gradients(function, q, k, v, omega, **kwargs) -> list[Tensor]:
    out = function(q, k, v, omega, causal=True, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    leaves = [x for x in (q, k, v, omega) if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def padding(tokens: int, batch: int = 2) -> Tensor:
    """A first sample that begins with masked keys, holes in all."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0, : min(3, tokens)] = False
    return mask


def omega_for(width=8, features=20, heads=None, dtype=torch.float64) -> Tensor:
    return orthogonal_features(features, width, heads=heads, dtype=dtype)


def test_reference_is_the_bidirectional_form_of_each_prefix():
    q, k, v = inputs(9)
    mask = padding(9)
    out = performer_attention_reference(q, k, v, omega_for(), causal=True, key_padding_mask=mask)
    for i in range(9):
        prefix = (q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        row = performer_attention_reference(*prefix, omega_for(), key_padding_mask=mask[:, : i + 1])
        torch.testing.assert_close(out[:, :, i : i + 1], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_output_and_every_gradient_match_reference_in_float64(tokens, masked, std):
    q, k, v = inputs(tokens, std=std)
    omega = omega_for(heads=2).requires_grad_()
    mask = padding(tokens) if masked else None
    expected = outputs_and_gradients(performer_attention_reference, q, k, v, omega, key_padding_mask=mask)
    actual = outputs_and_gradients(performer_attention, q, k, v, omega, key_padding_mask=mask)
    for name, a, b in zip(("out", "dq", "dk", "dv", "domega"), actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_operator_passes_opcheck_on_strided_inputs():
    q, k, v = torch.randn(2, 100, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (q, k, v, omega_for(dtype=torch.float32), None, [0, 30, 100], "torch")
    torch.library.opcheck(ops.performer_causal, arguments, test_utils=utils)
    made = [x.detach() for x in ops.performer_causal(*arguments)]
    saved = [x.detach() if isinstance(x, Tensor) else x for x in arguments[:-1]]
    torch.library.opcheck(
        ops.performer_causal_backward, (*saved, *made, torch.ones_like(made[0]), True, "torch"), test_utils=utils
    )


def test_gradients_match_finite_differences(monkeypatch):
    monkeypatch.setattr(causal, "_CHUNK", 2)
    q, k, v = inputs(5, batch=1, width=4, width_v=3)
    omega = omega_for(4, 6).requires_grad_()
    mask = torch.tensor([[False, True, True, False, True]])

    def function(*arguments):
        return performer_attention(*arguments, causal=True, key_padding_mask=mask)

    assert torch.autograd.gradcheck(function, (q, k, v, omega))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("tokens", "width", "masked"), [(63, 16, False), (200, 54, True)])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, tokens, width, masked):
    q, k, v = inputs(tokens, width=width, dtype=dtype)
    omega = omega_for(width, 40, dtype=torch.float32)
    mask = padding(tokens) if masked else None
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = outputs_and_gradients(performer_attention_reference, *exact, omega.double(), key_padding_mask=mask)
    plain = outputs_and_gradients(performer_attention_reference, q, k, v, omega.to(dtype), key_padding_mask=mask)
    actual = outputs_and_gradients(performer_attention, q, k, v, omega, key_padding_mask=mask)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), actual, plain, expected, strict=True):
        allowed = 2 * (b - c).abs().max() + 2 * torch.finfo(dtype).eps * c.abs().max()
        assert (a - c).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("opposed", [False, True])
def test_large_inputs_stay_finite_and_right(dtype, opposed):
    """Std 10, and keys opposed to their queries: the best feature of a key is then the worst of its query."""
    q, k, v = inputs(100, heads=1, width=64, dtype=dtype, std=10.0)
    k = (-q.detach()).requires_grad_() if opposed else k
    omega = omega_for(64, 64, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = outputs_and_gradients(performer_attention_reference, *exact, omega.double())
    actual = outputs_and_gradients(performer_attention, q, k, v, omega)
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a[:, :, 0].double(), b[:, :, 0], rtol=2e-2, atol=2e-2 * b.abs().max().item())
    # In float32 the exponents, of some hundreds, are good to 1e-4: so is the output.
    bound = 2e-3 if dtype == torch.float32 else 0.1
    assert (actual[0] - expected[0]).norm() <= bound * expected[0].norm()


def test_a_later_key_changes_no_earlier_output():
    """Not even one so large that everything before it underflows beside it."""
    q, k, v = (x.detach() for x in inputs(40, dtype=torch.float32))
    omega = omega_for(dtype=torch.float32)
    out = performer_attention(q, k, v, omega, causal=True)
    k, v = k.clone(), v.clone()
    k[:, :, 20] = 30 * omega[3] / omega[3].norm()
    v[:, :, 20] = 1e6
    changed = performer_attention(q, k, v, omega, causal=True)
    torch.testing.assert_close(changed[:, :, :20], out[:, :, :20], rtol=0, atol=0)
    assert (changed[:, :, 20:] != out[:, :, 20:]).any()


def test_queries_before_the_first_key_give_zero_and_finite_gradients():
    q, k, v = inputs(30, dtype=torch.float32)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :7], mask[1] = False, False
    out, *gradients = outputs_and_gradients(
        performer_attention, q, k, v, omega_for(dtype=torch.float32), key_padding_mask=mask
    )
    assert (out[0, :, :7] == 0).all()
    assert (out[0, :, 7:] != 0).all()
    assert (out[1] == 0).all()
    assert all(x.isfinite().all() and (x[1] == 0).all() for x in gradients)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 80),
    features=st.integers(1, 40),
    pad=st.integers(0, 10),
)
def test_laws_of_causal_attention_hold(seed, batch, tokens, features, pad):
    """Convexity; masked tokens are as if they were not there; independence of the other samples."""
    q, k, v = (x.detach() for x in inputs(tokens, batch, seed=seed))
    omega = orthogonal_features(features, 8, seed=seed, dtype=torch.float64)
    out = performer_attention(q, k, v, omega, causal=True)
    assert (out <= v.cummax(2).values + 1e-9).all()
    assert (out >= v.cummin(2).values - 1e-9).all()
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
    at = seed % (tokens + 1)
    mask = torch.ones(batch, tokens + pad, dtype=torch.bool)
    mask[:, at : at + pad] = False
    q_pad, k_pad, v_pad = (
        torch.cat([x[:, :, :at], x.new_full((*x.shape[:2], pad, x.shape[3]), 7.0), x[:, :, at:]], 2) for x in (q, k, v)
    )
    padded = performer_attention(q_pad, k_pad, v_pad, omega, causal=True, key_padding_mask=mask)
    torch.testing.assert_close(padded[:, :, mask[0]], out)
    torch.testing.assert_close(performer_attention(q[:1], k[:1], v[:1], omega, causal=True), out[:1])


def test_nan_stays_in_its_own_sample_and_padding_may_hold_anything():
    q, k, v = (x.detach() for x in inputs(40, dtype=torch.float32))
    omega = omega_for(dtype=torch.float32)
    clean = performer_attention(q, k, v, omega, causal=True)
    k[0, 0, 3, 2] = math.nan
    out = performer_attention(q, k, v, omega, causal=True)
    assert torch.equal(out[1], clean[1])
    assert out[0, 0, 3:].isnan().all()
    v[0, :, 3] = math.inf
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 3] = False
    assert performer_attention(q, k, v, omega, causal=True, key_padding_mask=mask).isfinite().all()


class Largest(TorchDispatchMode):
    """Values in the largest tensor that any operation returned."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.values = max(self.values, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_is_flat_in_the_number_of_tokens():
    """Nothing larger than the inputs appears: no N x M features, no N x N weights, no state for each token."""
    q, k, v = inputs(1024, batch=1, heads=1, width=16, width_v=16, dtype=torch.float32)
    with Largest() as largest:
        outputs_and_gradients(performer_attention, q, k, v, omega_for(16, 64, dtype=torch.float32))
    assert largest.values == 1024 * 16


def test_operator_passes_opcheck():
    q, k, v = inputs(9, heads=4, kv_heads=2, dtype=torch.float32)
    omega = omega_for(dtype=torch.float32).requires_grad_()
    torch.library.opcheck(ops.performer_causal, (q, k, v, omega, padding(9), [0, 9], "torch"))


def test_compiles_to_one_graph_with_gradients():
    omega = omega_for(dtype=torch.float32)
    compiled = torch.compile(performer_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (8, 21):
        arguments = (*inputs(tokens, dtype=torch.float32), omega)
        eager = outputs_and_gradients(performer_attention, *arguments)
        for a, b in zip(outputs_and_gradients(compiled, *arguments), eager, strict=True):
            torch.testing.assert_close(a, b)


def test_double_backward_is_refused_clearly():
    q, k, v = inputs(5)
    out = performer_attention(q, k, v, omega_for(), causal=True)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="performer_attention: double backward is not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize("feature", ["softmax", "hyperbolic"])
@pytest.mark.parametrize(("kv_heads", "omega_heads"), [(4, None), (4, 4), (2, None), (2, 2), (2, 4)])
def test_decoding_equals_the_parallel_form_token_by_token(feature, kv_heads, omega_heads):
    q, k, v = (x.detach() for x in inputs(37, heads=4, kv_heads=kv_heads))
    omega = omega_for(heads=omega_heads)
    parallel = performer_attention(q, k, v, omega, causal=True, feature=feature)
    state, sizes = None, set()
    for i in range(37):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        out, state = performer_step(state, *token, omega, feature=feature)
        torch.testing.assert_close(out, parallel[:, :, i : i + 1], rtol=1e-10, atol=1e-10)
        sizes.add(tuple(x.numel() for x in state))
    assert len(sizes) == 1


def test_decoding_goes_on_from_a_padded_prompt():
    q, k, v = (x.detach() for x in inputs(30))
    mask = padding(30)
    mask[:, 20:] = True
    parallel = performer_attention(q, k, v, omega_for(), causal=True, key_padding_mask=mask)
    state = performer_prefill(k[:, :, :20], v[:, :, :20], omega_for(), key_padding_mask=mask[:, :20])
    for i in range(20, 30):
        out, state = performer_step(state, *(x[:, :, i : i + 1] for x in (q, k, v)), omega_for())
        torch.testing.assert_close(out, parallel[:, :, i : i + 1], rtol=1e-10, atol=1e-10)


def test_decoding_begins_a_new_document_where_told():
    q, k, v = (x.detach() for x in inputs(12))
    boundary = torch.tensor([0, 7, 12])
    parallel = performer_attention(q, k, v, omega_for(), causal=True, cu_seqlens=boundary)
    v[:, :, 6] = math.nan  # the end of the first document
    state = None
    for i in range(12):
        reset = torch.full((2,), i == 7)
        out, state = performer_step(state, *(x[:, :, i : i + 1] for x in (q, k, v)), omega_for(), reset=reset)
        if i != 6:
            torch.testing.assert_close(out, parallel[:, :, i : i + 1], rtol=1e-10, atol=1e-10)


def test_decoding_in_half_precision_keeps_its_state_in_float32():
    q, k, v = (x.detach() for x in inputs(60, width=64, dtype=torch.float16, std=10.0))
    omega = omega_for(64, 64, dtype=torch.float32)
    exact = performer_attention_reference(*(x.double() for x in (q, k, v)), omega.double(), causal=True)
    state = None
    for i in range(60):
        out, state = performer_step(state, *(x[:, :, i : i + 1] for x in (q, k, v)), omega)
        assert out.dtype == torch.float16
        torch.testing.assert_close(out[:, :, 0].double(), exact[:, :, i], rtol=0.05, atol=0.05)
    assert isinstance(state, PerformerState)
    assert state.values.dtype == state.lse.dtype == torch.float32


def test_autocast_never_rounds_the_state_of_decoding():
    q, k, v = (x.detach() for x in inputs(6, dtype=torch.float32))
    omega = omega_for(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state = performer_prefill(k[:, :, :5], v[:, :, :5], omega)
            out, state = performer_step(state, *(x[:, :, 5:] for x in (q, k, v)), omega)
        results.append((out, *state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 6)}, "causal=True needs as many queries as keys"),
        ({"eps": 1e-3}, "eps=0.001 needs a maximum over all keys"),
        ({"backend": "triton", "feature": "relu"}, "backend='triton' has no kernel for feature='relu'"),
        ({"feature": "cosine"}, "feature='cosine' must be one of 'softmax', 'hyperbolic', 'relu'"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens=\[0, 3\] must rise from 0 to the 4 tokens"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"cu_seqlens=\[0, 3, 2, 4\] must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens is torch.float32"),
        ({"k": torch.zeros(2, 3, 4, 8), "v": torch.zeros(2, 3, 4, 6)}, "k has 3 heads, which must divide the 2 of q"),
    ],
)
def test_bad_arguments_are_named_in_one_line(change, message):
    arguments = {
        "q": torch.zeros(2, 2, 4, 8),
        "k": torch.zeros(2, 2, 4, 8),
        "v": torch.zeros(2, 2, 4, 6),
        "omega": omega_for(dtype=torch.float32),
        "causal": True,
    }
    with pytest.raises(ValueError, match=message) as error:
        performer_attention(**(arguments | change))
    assert str(error.value).startswith("performer_attention: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, o: performer_step(None, x, x, x, o), "performer_step: q and k hold 3 and 3 tokens; a step takes 1"),
        (lambda x, o: performer_prefill(x, x, o, feature="relu"), "performer_prefill: feature='relu' has no decoding"),
        (
            lambda x, o: performer_prefill(torch.zeros(1, 1, 3, 300), x[:1, :1], omega_for(300), backend="triton"),
            r"performer_prefill: .* no kernel for heads wider than \d+ in torch.float32 on \w+ \(here 300\)",
        ),
        (lambda x, o: performer_prefill(x, x, o[:, :4]), r"performer_prefill: omega has shape \(20, 4\)"),
        (
            lambda x, o: performer_step(performer_prefill(x, x, o[:9]), *[x[:, :, :1]] * 3, o),
            r"performer_step: state.values has shape \(2, 2, 9, 8\); it must be \(2, 2, 20, 8\)",
        ),
    ],
)
def test_bad_arguments_of_decoding_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 2, 3, 8), omega_for(dtype=torch.float32))
