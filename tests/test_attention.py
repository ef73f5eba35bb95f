"""Softmax and performer attention modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medformer import PerformerAttention, SoftmaxAttention
from medformer import attention as attention_module
from medformer_kernels import performer_features

KINDS = [SoftmaxAttention, PerformerAttention]
both = pytest.mark.parametrize("kind", KINDS)
Attention = SoftmaxAttention | PerformerAttention


def tokens(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def build(kind: type[Attention], *, qk_norm: bool = False, width: int = 24, heads: int = 3) -> Attention:
    torch.manual_seed(0)
    return kind(width, heads, qk_norm=qk_norm).double()


def brute_force(module: Attention, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(output, (B, H, N, N) weights), with every score held."""
    batch, n, width = x.shape
    heads = module.heads
    q, k, v = (t.view(batch, n, heads, -1).transpose(1, 2) for t in module.qkv(x).chunk(3, dim=-1))
    if module.q_norm is not None and module.k_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if isinstance(module, PerformerAttention):
        weights = performer_features(q, module.omega).exp() @ performer_features(k, module.omega).exp().mT
    else:
        weights = (q @ k.mT / (width // heads) ** 0.5).exp()
    if mask is not None:
        weights = weights * mask[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True)
    return module.proj((weights @ v).transpose(1, 2).reshape(batch, n, width)), weights


@both
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("n", [1, 63])
def test_output_matches_brute_force(kind: type[Attention], n: int, qk_norm: bool) -> None:
    module, x = build(kind, qk_norm=qk_norm), tokens(2, n, 24)
    torch.testing.assert_close(module(x), brute_force(module, x)[0])


@both
def test_padding_never_changes_the_rest(kind: type[Attention]) -> None:
    module, x = build(kind), tokens(2, 37, 24)
    mask = torch.arange(37)[None] < torch.tensor([[20], [37]])
    out = module(x, key_padding_mask=mask)
    torch.testing.assert_close(out, brute_force(module, x, mask)[0])
    torch.testing.assert_close(out[0, :20], module(x[:1, :20])[0])


@both
def test_sample_without_tokens_mixes_to_zero(kind: type[Attention]) -> None:
    module, x = build(kind), tokens(2, 9, 24)
    mask = torch.tensor([[False] * 9, [True] * 9])
    out = module(x, key_padding_mask=mask)
    torch.testing.assert_close(out[0], module.proj.bias.expand(9, -1))
    torch.testing.assert_close(out[1], module(x)[1])
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@both
def test_attention_rows_match_brute_force(kind: type[Attention]) -> None:
    module, x = build(kind), tokens(2, 37, 24)
    weights = brute_force(module, x)[1]
    torch.testing.assert_close(module.attention_rows(x), weights[:, :, :1])
    chosen = [5, -1, *range(20)]  # more than a head is wide
    torch.testing.assert_close(module.attention_rows(x, chosen), weights[:, :, chosen])
    shares = torch.rand(2, 3, 37, dtype=x.dtype)
    torch.testing.assert_close(module.pull_back(x, shares), shares[:, None] @ weights)
    mask = torch.arange(37)[None] < torch.tensor([[20], [37]])
    rows = module.attention_rows(x, key_padding_mask=mask)
    torch.testing.assert_close(rows, brute_force(module, x, mask)[1][:, :, :1])
    assert not module.attention_rows(x, key_padding_mask=torch.zeros_like(mask)).any()


@both
def test_every_gradient_matches_brute_force(kind: type[Attention]) -> None:
    module, x = build(kind, qk_norm=True), tokens(2, 13, 24).requires_grad_()
    probe = tokens(2, 13, 24)
    inputs = [x, *module.parameters()]
    gradients = torch.autograd.grad((module(x) * probe).sum(), inputs)
    expected = torch.autograd.grad((brute_force(module, x)[0] * probe).sum(), inputs)
    torch.testing.assert_close(gradients, expected)


@both
def test_output_does_not_depend_on_batch_mates(kind: type[Attention]) -> None:
    module, x = build(kind), tokens(3, 21, 24)
    loud = torch.cat([x[:1], 20 * x[1:]])
    torch.testing.assert_close(module(loud)[0], module(x)[0], atol=1e-12, rtol=1e-12)


@both
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_modules_stay_near_double(kind: type[Attention], dtype: torch.dtype, qk_norm: bool) -> None:
    module, x = build(kind, qk_norm=qk_norm), tokens(1, 65, 24, scale=1.0)
    module = module.to(dtype)
    out = module(x.to(dtype))
    exact = module.double()(x.to(dtype).double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


@both
@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast_stays_near_double(kind: type[Attention], qk_norm: bool) -> None:
    module, x = build(kind, qk_norm=qk_norm), tokens(1, 65, 24, scale=1.0)
    exact = module(x)
    single = module.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = single(x.float())
        row = single.attention_rows(x.float())
    assert out.dtype == torch.bfloat16
    assert row.dtype == torch.float32
    assert (out.double() - exact).abs().max() < 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_short_gradients_of_a_cpu_are_those_of_float32(causal: bool) -> None:
    q, k, v = (tokens(2, 3, 40, 8, dtype=torch.bfloat16, scale=1.0).roll(i, 2).requires_grad_() for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_module.exact_attention(q, k, v, causal=causal)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    single = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    wanted = torch.autograd.grad(single, (q, k, v), torch.ones_like(single))
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.equal(exact)
    narrow = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    others = torch.autograd.grad(narrow, (q, k, v), torch.ones_like(narrow))
    assert not all(ours.equal(other) for ours, other in zip(found, others, strict=True)), "nothing was told apart"


def test_random_features_follow_the_seed_and_are_saved() -> None:
    first, again, other = (PerformerAttention(24, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.omega, again.omega)
    assert not torch.equal(first.omega, other.omega)
    assert "omega" in first.state_dict()
    assert PerformerAttention(24, 3, num_features=48).omega.shape == (3, 48, 8)


def test_xformers_is_chosen_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        is_cuda = True
        dtype = torch.float16

    chosen = attention_module._use_xformers
    monkeypatch.setattr(attention_module, "HAS_XFORMERS", True)
    q: Tensor = OnCuda()  # type: ignore[assignment]
    assert chosen(q, None)
    assert not chosen(q, torch.ones(1, 1, dtype=torch.bool))
    assert not chosen(torch.zeros(1), None)
    OnCuda.dtype = torch.float64
    assert not chosen(q, None)
    OnCuda.dtype = torch.float16
    monkeypatch.setattr(attention_module, "HAS_XFORMERS", False)
    assert not chosen(q, None)


@pytest.mark.gpu
@pytest.mark.skipif(not attention_module.HAS_XFORMERS, reason="xformers is not installed")
def test_xformers_matches_double() -> None:
    module, x = build(SoftmaxAttention, width=128, heads=2), tokens(2, 63, 128, scale=1.0)
    exact = module(x)
    out = module.half().cuda()(x.half().cuda()).cpu().double()
    assert (out - exact).abs().max() < 16 * torch.finfo(torch.float16).eps * exact.abs().max()


@both
def test_wrong_arguments_are_refused(kind: type[Attention]) -> None:
    with pytest.raises(ValueError, match="heads=5 must divide width=24"):
        kind(24, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 8\).*bool of shape \(2, 9\)"):
        build(kind)(tokens(2, 9, 24), key_padding_mask=torch.ones(2, 8, dtype=torch.bool))


def test_what_padded_keys_and_values_hold_never_reaches_the_output() -> None:
    """Weight 0 is not enough: 0 times NaN is NaN."""
    q, k, v = torch.randn(3, 2, 2, 7, 4)
    mask = torch.arange(7) < torch.tensor([[4], [0]])
    expected = attention_module.masked_attention(q, k, v, mask)
    assert expected[0].isfinite().all()
    assert not expected[1].any()
    for fill in (float("nan"), float("inf")):
        padded = [x.masked_fill(~mask[:, None, :, None], fill) for x in (k, v)]
        assert torch.equal(attention_module.masked_attention(q, *padded, mask), expected)
