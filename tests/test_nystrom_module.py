"""NystromAttention and its agreement with transformers and nystrom-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medformer.nystrom_attention import NystromAttention
from medformer_kernels import nystrom_attention_reference

WIDTH, HEADS, L = 24, 3, 8


def tokens(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build(**options: Any) -> NystromAttention:
    torch.manual_seed(0)
    return NystromAttention(WIDTH, HEADS, **{"num_landmarks": L, **options}).double()


def test_is_the_kernel_between_two_projections() -> None:
    module, x = build(), tokens(2, 30, WIDTH)
    q, k, v = (part.view(2, 30, HEADS, 8).transpose(1, 2) for part in module.qkv(x).chunk(3, -1))
    inner = nystrom_attention_reference(q, k, v, num_landmarks=L, conv_weight=module.conv_weight)
    torch.testing.assert_close(module(x), module.proj(inner.transpose(1, 2).flatten(2)))


def test_landmarks_and_convolution_follow_a_grid() -> None:
    module, x = build(landmark_grid=(1, 2, 2), conv_kernel=(1, 3, 3), prefix_tokens=1), tokens(2, 25, WIDTH)
    q, k, v = module._split(x)
    inner = nystrom_attention_reference(
        q, k, v, grid=(2, 3, 4), landmark_grid=(1, 2, 2), conv_weight=module.conv_weight, prefix_tokens=1
    )
    torch.testing.assert_close(module(x, grid=(2, 3, 4)), module.proj(inner.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("real", [1, L - 1, L, 29])
def test_padding_never_changes_the_rest(real: int) -> None:
    module, x = build(), tokens(1, 40, WIDTH)
    out = module(x, key_padding_mask=torch.arange(40)[None] < real)
    torch.testing.assert_close(out[:, :real], module(x[:, :real]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_low_precision_modules_train(dtype: torch.dtype) -> None:
    module, x = build().to(dtype), tokens(2, 30, WIDTH).to(dtype)
    out = module(x)
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_residual_falls_with_the_iterations() -> None:
    x = tokens(2, 64, WIDTH)
    few, many = (build(pinv_iterations=n).residual(x) for n in (6, 20))
    assert few.shape == (2, HEADS)
    assert (many < few).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_landmarks": 0}, "num_landmarks=0 must be at least 1"),
        ({"conv_kernel": 4}, "conv_kernel=4 must be an odd size"),
        ({"conv_kernel": (3, 3)}, "or three of them"),
        ({"heads": 5}, "heads=5 must divide width=24"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NystromAttention(WIDTH, **{"heads": HEADS, **options})


def test_states_without_the_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has no to_qkv\.weight"):
        NystromAttention.from_nystrom_attention({"to_out.0.weight": torch.zeros(1)}, heads=1, num_landmarks=1)
    with pytest.raises(ValueError, match=r"has no query\.weight"):
        NystromAttention.from_transformers({}, heads=1, num_landmarks=1)


# --- peers. Both share the start value of the iteration over batch and heads: they agree for one sample and head.


def lucidrains(heads: int, conv: bool) -> Any:
    peer = pytest.importorskip("nystrom_attention", reason="pip install nystrom-attention, the peer compared with")
    torch.manual_seed(1)
    return peer.NystromAttention(
        WIDTH, dim_head=16, heads=heads, num_landmarks=L, residual=conv, residual_conv_kernel=5
    )


@pytest.mark.parametrize("conv", [False, True])
def test_matches_nystrom_attention(conv: bool) -> None:
    peer, x = lucidrains(1, conv), tokens(1, 4 * L, WIDTH).float()
    module = NystromAttention.from_nystrom_attention(peer.state_dict(), heads=1, num_landmarks=L)
    torch.testing.assert_close(module(x), peer(x), rtol=1e-4, atol=1e-5)


def test_matches_nystrom_attention_under_a_mask_that_keeps_its_segments() -> None:
    peer, x = lucidrains(1, True), tokens(1, 4 * L, WIDTH).float()
    module = NystromAttention.from_nystrom_attention(peer.state_dict(), heads=1, num_landmarks=L)
    mask = (torch.arange(4 * L) % 4 != 3)[None]  # one token of each segment: both cut the same segments
    out, expected = module(x, key_padding_mask=mask), peer(x, mask=mask)
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_several_heads_match_nystrom_attention_once_the_iteration_converges() -> None:
    peer, x = lucidrains(3, True), tokens(2, 4 * L, WIDTH).float()
    peer.pinv_iterations = 15
    module = NystromAttention.from_nystrom_attention(peer.state_dict(), heads=3, num_landmarks=L, pinv_iterations=15)
    torch.testing.assert_close(module(x), peer(x), rtol=1e-3, atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch_mates_where_nystrom_attention_does() -> None:
    peer, x = lucidrains(1, False), tokens(2, 4 * L, WIDTH).float()
    x[1] *= 3
    module = NystromAttention.from_nystrom_attention(peer.state_dict(), heads=1, num_landmarks=L)
    torch.testing.assert_close(module(x)[:1], module(x[:1]))
    assert (peer(x)[:1] - peer(x[:1])).abs().max() > 1e-4


def hugging_face(tokens: int, conv: bool) -> Any:
    pytest.importorskip("transformers", reason="pip install transformers, the peer compared with")
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    torch.manual_seed(1)
    config = NystromformerConfig(
        hidden_size=WIDTH, num_attention_heads=1, num_landmarks=L, segment_means_seq_len=tokens,
        conv_kernel_size=5, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    peer = NystromformerSelfAttention(config)
    if not conv:  # its code has the case, its configuration no longer takes None
        peer.conv_kernel_size = None
        del peer.conv
    return peer


@pytest.mark.parametrize("conv", [False, True])
def test_matches_transformers_nystromformer(conv: bool) -> None:
    peer, x = hugging_face(4 * L, conv), tokens(1, 4 * L, WIDTH).float()
    module = NystromAttention.from_transformers(peer.state_dict(), heads=1, num_landmarks=L)
    torch.testing.assert_close(module(x), peer(x)[0], rtol=1e-4, atol=1e-5)


def test_matches_exact_attention_of_transformers_once_the_iteration_converges() -> None:
    peer, x = hugging_face(L, False).double(), tokens(1, L, WIDTH)
    module = NystromAttention.from_transformers(peer.state_dict(), heads=1, num_landmarks=L)
    module.pinv_iterations = 30
    torch.testing.assert_close(module(x), peer(x)[0])


def test_reads_a_whole_attention_block_of_transformers() -> None:
    pytest.importorskip("transformers", reason="pip install transformers, the peer compared with")
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerAttention

    torch.manual_seed(1)
    config = NystromformerConfig(
        hidden_size=WIDTH, num_attention_heads=1, num_landmarks=L, segment_means_seq_len=4 * L,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    peer, x = NystromformerAttention(config), tokens(1, 4 * L, WIDTH).float()
    module = NystromAttention.from_transformers(peer.state_dict(), heads=1, num_landmarks=L)
    torch.testing.assert_close(peer.output.LayerNorm(module(x) + x), peer(x)[0], rtol=1e-4, atol=1e-5)
