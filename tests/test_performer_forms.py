"""What FAVOR+ attention takes beyond the plain call: shared key heads, documents, features, a trained omega."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medformer_kernels import (
    approximation_error,
    orthogonal_features,
    performer_attention,
    performer_attention_reference,
)
from medformer_kernels.performer import chunked, ops
from tests import launches

NAMES = ("out", "dq", "dk", "dv", "domega")
both_directions = pytest.mark.parametrize("causal", [False, True])


def inputs(
    tokens=40, batch=2, heads=4, kv_heads=4, width=8, width_v=6, dtype=torch.float64, std=1.0, seed=0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, tokens, width), (kv_heads, tokens, width), (kv_heads, tokens, width_v))
    drawn = (torch.randn(batch, *shape, generator=generator, dtype=torch.float64) * std for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in drawn]


def omega_for(width=8, features=20, heads=None, dtype=torch.float64) -> Tensor:
    return orthogonal_features(features, width, heads=heads, dtype=dtype).requires_grad_()


def outputs_and_gradients(function, *leaves, **kwargs) -> list[Tensor]:
    out = function(*leaves, **kwargs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout)]


def compare(leaves: list[Tensor], tolerance: float = 1e-9, **kwargs) -> None:
    expected = outputs_and_gradients(performer_attention_reference, *leaves, **kwargs)
    actual = outputs_and_gradients(performer_attention, *leaves, **kwargs)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@both_directions
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("per_head", [None, "key heads", "query heads"])
def test_shared_key_heads_equal_repeated_ones(causal, kv_heads, per_head):
    q, k, v = inputs(kv_heads=kv_heads)
    omega = omega_for(heads={None: None, "key heads": kv_heads, "query heads": 4}[per_head])
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    compare([q, k, v, omega], causal=causal, key_padding_mask=mask)
    groups = 4 // kv_heads
    wide = omega if per_head != "key heads" else omega.repeat_interleave(groups, 0)
    repeated = [x.repeat_interleave(groups, 1) for x in (k, v)]
    out = performer_attention(q, k, v, omega, causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(out, performer_attention(q, *repeated, wide, causal=causal, key_padding_mask=mask))


@launches.performer
def test_shared_key_heads_run_in_the_kernels_with_and_without_epsilon():
    q, k, v = inputs(kv_heads=2, width=16, width_v=16, dtype=torch.float32)
    omega = omega_for(16, 32, dtype=torch.float32).detach()
    for eps in (0.0, 1e-3):
        expected = outputs_and_gradients(performer_attention_reference, q, k, v, omega, eps=eps)
        actual = outputs_and_gradients(performer_attention, q, k, v, omega, eps=eps, backend="triton")
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_keys_with_an_omega_of_their_own_are_not_copied():
    q, k, v = inputs(kv_heads=1, tokens=256, dtype=torch.float32)
    seen: list[tuple[int, ...]] = []
    state = chunked.state

    def spy(k, *arguments):
        seen.append((k.shape, k.data_ptr()))
        return state(k, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "state", spy)
        performer_attention(q, k, v, omega_for(heads=1, dtype=torch.float32))
    assert seen == [(k.shape, k.data_ptr())]


@both_directions
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature", ["softmax", "relu"])
def test_documents_are_as_if_each_were_alone(causal, masked, feature):
    q, k, v = inputs()
    omega = omega_for()
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None
    boundaries = torch.tensor([0, 7, 7, 39, 40], dtype=torch.int32)
    kwargs = {"causal": causal, "feature": feature, "eps": 1e-3 if feature == "relu" else 0.0}
    compare([q, k, v, omega], cu_seqlens=boundaries, key_padding_mask=mask, **kwargs)
    out = performer_attention(q, k, v, omega, cu_seqlens=boundaries, key_padding_mask=mask, **kwargs)
    second = slice(7, 39)
    part = None if mask is None else mask[:, second]
    alone = performer_attention(*(x[:, :, second] for x in (q, k, v)), omega, key_padding_mask=part, **kwargs)
    torch.testing.assert_close(out[:, :, second], alone)


@launches.performer
@pytest.mark.parametrize(
    "ends",
    [[0, 1, 2, 2, 9, 10, 10, 10, 17, 23, 24, 31], [0, 0, 40], [0, 530, 540, 540, 560]],
    ids=["many short, empty, of one token", "one and an empty", "long, cut into slices"],
)
def test_documents_run_in_the_kernels_side_by_side(ends, monkeypatch):
    """However many there are: two launches' worth of calls, no more."""
    from medformer_kernels.performer import fused

    calls = []
    for name in ("state", "read"):
        function = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=function, name=name: calls.append(name) or f(*a))
    q, k, v = inputs(ends[-1], batch=1, heads=1, kv_heads=1, width=16, width_v=16, dtype=torch.float32)
    leaves = [q, k, v, omega_for(16, 20, dtype=torch.float32)]
    mask = torch.rand(1, ends[-1], generator=torch.Generator().manual_seed(3)) > 0.2
    kwargs = {"cu_seqlens": torch.tensor(ends), "key_padding_mask": mask}
    actual = outputs_and_gradients(performer_attention, *leaves, backend="triton", **kwargs)
    assert calls == ["state", "read"]
    expected = outputs_and_gradients(performer_attention_reference, *leaves, **kwargs)
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@launches.performer_forward
def test_documents_with_epsilon_run_in_the_kernels():
    q, k, v = (x.detach() for x in inputs(width=16, width_v=16, dtype=torch.float32))
    omega, boundaries = omega_for(16, 32, dtype=torch.float32).detach(), torch.tensor([0, 15, 40])
    expected = performer_attention_reference(q, k, v, omega, cu_seqlens=boundaries, eps=1e-3)
    actual = performer_attention(q, k, v, omega, cu_seqlens=boundaries, eps=1e-3, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("by_head", [False, True])
def test_gradient_of_omega_matches_reference(monkeypatch, eps, heads, by_head):
    monkeypatch.setattr(chunked, "_TILE_VALUES", 20 * (1 if by_head else 8) * 16)  # chunks of 16 tokens
    monkeypatch.setattr(chunked, "one_by_one", lambda *_: by_head)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    compare([*inputs(), omega_for(heads=heads)], eps=eps, key_padding_mask=mask)


def test_gradient_of_omega_matches_finite_differences():
    q, k, v = inputs(5, batch=1, heads=1, kv_heads=1, width=4, width_v=2)
    omega = omega_for(4, 6)
    assert torch.autograd.gradcheck(lambda omega: performer_attention(q.detach(), k.detach(), v.detach(), omega), omega)


def test_operators_with_a_trained_omega_pass_opcheck():
    q, k, v = inputs(9, dtype=torch.float32)
    omega = omega_for(dtype=torch.float32)
    torch.library.opcheck(ops.performer_state, (k, v, omega, None, False, "torch"))
    values, lse, _ = (x.detach().requires_grad_() for x in ops.performer_state(k, v, omega, None, False, "torch"))
    torch.library.opcheck(ops.performer_read, (q, omega, values, lse, None, None, "torch"))


@launches.performer_forward
def test_operators_on_documents_pass_opcheck():
    q, k, v = inputs(9, batch=1, heads=1, kv_heads=1, width=16, width_v=16, dtype=torch.float32)
    omega, ends = omega_for(16, dtype=torch.float32), [0, 3, 3, 9]
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (k, v, omega, None, False, "triton", ends)
    torch.library.opcheck(ops.performer_state, arguments, test_utils=utils)
    values, lse, _ = (x.detach() for x in ops.performer_state(*arguments))
    assert values.shape == (1, 1, 3, 20, 16)
    torch.library.opcheck(ops.performer_read, (q, omega, values, lse, None, None, "triton", ends), test_utils=utils)


@launches.none
def test_triton_names_what_it_has_no_kernel_for():
    q, k, v = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="performer_attention: backend='triton' has no kernel for feature='relu'"):
        performer_attention(q, k, v, omega_for(dtype=torch.float32), backend="triton", feature="relu")


@both_directions
@pytest.mark.parametrize("feature", ["relu", torch.nn.functional.softplus], ids=["relu", "softplus"])
def test_elementwise_features_match_reference(monkeypatch, causal, feature):
    monkeypatch.setattr(chunked, "_TILE_VALUES", 20 * 8 * 16)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[0, :3] = False
    leaves = [*inputs(kv_heads=2), omega_for()]
    compare(leaves, causal=causal, feature=feature, eps=1e-3, key_padding_mask=mask)
    compare(leaves, causal=causal, feature=feature)


@both_directions
def test_elementwise_features_reproduce_performer_pytorch(causal):
    peer_module = pytest.importorskip("performer_pytorch", reason="pip install performer-pytorch")
    q, k, v = inputs(dtype=torch.float32)
    peer = peer_module.FastAttention(8, nb_features=20, causal=causal, generalized_attention=True)
    omega = omega_for(dtype=torch.float32).detach()
    peer.projection_matrix.copy_(omega)
    expected = peer(q, k, v)
    actual = performer_attention(q, k, v, omega, causal=causal, feature="relu", eps=1e-3)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)  # the causal peer adds 1e-6 below


def test_rows_whose_features_are_all_zero_give_zero():
    q, k, v = inputs()
    out, *gradients = outputs_and_gradients(
        performer_attention, q, k, v, omega_for(), feature=lambda u: torch.zeros_like(u) * u
    )
    assert (out == 0).all()
    assert all(x.isfinite().all() for x in gradients)


@both_directions
def test_hyperbolic_features_match_reference(causal):
    compare([*inputs(), omega_for()], causal=causal, feature="hyperbolic")


def test_hyperbolic_features_have_less_variance_than_as_many_positive_ones():
    """M projections, two-sided, against 2M one-sided."""
    q, k, v = (x.detach() for x in inputs(64, batch=1, width=16, std=0.7))
    errors = {}
    for feature, features in (("softmax", 128), ("hyperbolic", 64)):
        errors[feature] = approximation_error(q, k, v, num_features=features, draws=16, feature=feature).mean()
    assert errors["hyperbolic"] < errors["softmax"]


@both_directions
def test_approximation_error_is_the_distance_to_exact_attention(causal):
    q, k, v = (x.detach() for x in inputs(30, kv_heads=2, width_v=8, std=0.5))
    omega = omega_for(features=64).detach()
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 20:] = False
    k_wide, v_wide = (x.repeat_interleave(2, 1) for x in (k, v))
    allowed = mask[:, None, None] & (torch.ones(30, 30, dtype=torch.bool).tril() if causal else True)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k_wide, v_wide, attn_mask=allowed)
    out = performer_attention(q, k, v, omega, causal=causal, key_padding_mask=mask)
    error = approximation_error(q, k, v, omega, causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(error, (out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1))
    assert error.shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 0}, "draws=0 must be at least 1"),
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"num_features": 0}, "num_features=0 must be at least 1"),
        ({"feature": "elu"}, "approximation_error: feature='elu' must be one of"),
        ({"v": torch.zeros(2, 4, 6, 8, dtype=torch.float64)}, "approximation_error: v has shape"),
    ],
)
def test_bad_arguments_of_approximation_error_are_named(change, message):
    q, k, v = (x.detach() for x in inputs(9, kv_heads=4, width_v=8))
    with pytest.raises(ValueError, match=message):
        approximation_error(**{"q": q, "k": k, "v": v, **change})


def test_approximation_error_falls_with_more_features_and_holds_few_queries():
    q, k, v = (x.detach() for x in inputs(300, batch=1, std=0.5, dtype=torch.float32))
    few, many = (approximation_error(q, k, v, num_features=m, queries=20).mean() for m in (16, 1024))
    assert 0 < many < few / 3
    assert math.isfinite(approximation_error(q, k, v).mean())
