"""PerformerAttention beyond plain use: redraws, training the features, causal order, and swaps into other models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from medformer import PerformerAttention
from medformer.swap import swap_attention


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


class TimmAttention(nn.Module):
    """The attention of timm's ViT: its parts and its call."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_norm, self.k_norm, self.norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal
        )
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


def swapped(model: nn.Module, **kwargs) -> nn.Module:
    with pytest.warns(UserWarning, match="attention layers now estimate softmax"):
        return swap_attention(copy.deepcopy(model), **kwargs)


def test_redraws_follow_the_seed_and_go_on_after_loading():
    first, again = PerformerAttention(24, 3, seed=5), PerformerAttention(24, 3, seed=5)
    seen = [first.omega.clone()]
    for _ in range(2):
        first.redraw()
        seen.append(first.omega.clone())
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert int(first.state_dict()["draws"]) == 2
    again.redraw()
    assert torch.equal(again.omega, seen[1])
    resumed = PerformerAttention(24, 3, seed=5)
    resumed.load_state_dict(again.state_dict())
    resumed.redraw()
    assert torch.equal(resumed.omega, seen[2])


def test_layers_of_neighbouring_seeds_never_share_a_draw():
    draws = []
    for seed in range(3):
        module = PerformerAttention(24, 3, seed=seed)
        for _ in range(3):
            draws.append(module.omega.clone())
            module.redraw()
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_trained_features_get_gradients_and_are_never_redrawn():
    module = PerformerAttention(24, 3, train_features=True).double()
    module(tokens(2, 9, 24)).sum().backward()
    assert module.omega.grad is not None
    assert module.omega.grad.abs().sum() > 0
    assert dict(module.named_parameters())["omega"] is module.omega
    with pytest.raises(ValueError, match=r"PerformerAttention.redraw: train_features=True"):
        module.redraw()


def test_causal_module_never_reads_ahead():
    module, x = PerformerAttention(24, 3, causal=True).double(), tokens(2, 20, 24)
    out = module(x)
    changed = x.clone()
    changed[:, 12:] += 3
    torch.testing.assert_close(module(changed)[:, :12], out[:, :12])
    torch.testing.assert_close(module(x[:, :7]), out[:, :7])


@pytest.mark.parametrize("query", [0, 8, -1])
def test_causal_attention_row_gives_the_output(query):
    module, x = PerformerAttention(24, 3, causal=True).double(), tokens(2, 20, 24)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, 0] = True
    row = module.attention_rows(x, [query], key_padding_mask=mask)[:, :, 0]
    v = module._split(x)[2]
    out = module.proj((row.unsqueeze(-2) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out.squeeze(1), module(x, key_padding_mask=mask)[:, query])
    assert not row[:, :, range(20)[query] + 1 :].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_swapped_timm_attention_estimates_the_original(causal, masked):
    """At many features and small scores the swap approaches what it replaced: weights, norms and heads are in place."""
    torch.manual_seed(0)
    model = nn.Sequential(TimmAttention()).double()
    with torch.no_grad():
        for norm in (model[0].q_norm, model[0].k_norm):
            norm.weight.fill_(0.5)
    x, mask = tokens(2, 15, 24), None
    if masked:
        mask = (torch.arange(15) < torch.tensor([[15], [9]]))[:, None, None]
    allowed = torch.ones(15, 15, dtype=torch.bool).tril() if causal else torch.ones(15, 15, dtype=torch.bool)
    exact = model[0](x, attn_mask=allowed if mask is None else allowed & mask)
    estimate = swapped(model, num_features=8192)[0](x, attn_mask=mask, is_causal=causal)
    assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_swap_keeps_weights_names_mode_and_dtype():
    model = nn.ModuleList([TimmAttention(), TimmAttention()]).double().eval()
    new = swapped(model, num_features=32, seed=4)
    old_state, state = model.state_dict(), new.state_dict()
    assert all(torch.equal(state[name], value) for name, value in old_state.items())
    assert {name.split(".")[-1] for name in state.keys() - old_state.keys()} == {"omega", "draws"}
    assert not torch.equal(new[0].omega, new[1].omega)
    assert new[0].omega.dtype == torch.float64
    assert not new[0].training
    assert isinstance(new[0], PerformerAttention)


def test_swap_warns_once_for_all_layers():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swap_attention(nn.ModuleList([TimmAttention() for _ in range(3)]), num_features=32)
    assert len(caught) == 1
    assert "3 attention layers now estimate softmax with [32] random features" in str(caught[0].message)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_swapped_multihead_attention_estimates_the_original(batch_first, bias):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(24, 3, batch_first=batch_first, bias=bias)]).double()
    x, memory = tokens(2, 11, 24) / 2, tokens(2, 15, 24) / 2 + 0.5
    ignored = torch.arange(15) >= torch.tensor([[15], [9]])
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    new = swapped(model, num_features=8192)
    exact = model[0](x, memory, memory, key_padding_mask=ignored)[0]
    estimate, weights = new[0](x, memory, memory, key_padding_mask=ignored)
    assert weights is None
    assert (estimate - exact).norm() < 0.05 * exact.norm()
    square = torch.ones(11, 11, dtype=torch.bool).triu(1)
    exact = model[0](x, x, x, attn_mask=square, is_causal=True, need_weights=False)[0]
    estimate = new[0](x, x, x, attn_mask=square, is_causal=True, need_weights=False)[0]
    assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_swapped_transformer_encoder_never_takes_torch_fast_path():
    """In evaluation torch.nn.TransformerEncoderLayer calls exact attention past its own submodule."""
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    encoder = swapped(nn.TransformerEncoder(layer, 2), num_features=16).eval()
    x, ignored = tokens(2, 9, 24, dtype=torch.float32), torch.arange(9) >= torch.tensor([[9], [6]])
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=ignored)
    slow = encoder(x.requires_grad_(), src_key_padding_mask=ignored)
    torch.testing.assert_close(fast[~ignored], slow[~ignored])


def test_swap_works_on_a_timm_vit():
    timm = pytest.importorskip("timm", reason="pip install timm")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    new = swapped(vit, num_features=1024)
    image = tokens(1, 3, 224, 224, dtype=torch.float32)
    with torch.no_grad():
        exact, estimate = vit(image), new(image)
    assert estimate.shape == (1, 5)
    assert (estimate - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(3, 3), "Linear holds no timm or torch.nn attention"),
        (lambda: nn.ModuleList([nn.MultiheadAttention(24, 3, kdim=8)]), "with kdim, vdim"),
        (lambda: nn.ModuleList([gated()]), "gated timm attention"),
    ],
)
def test_models_that_cannot_be_swapped_are_refused_whole(build, message):
    with pytest.raises(ValueError, match=message):
        swap_attention(build())


def gated() -> nn.Module:
    attention = TimmAttention()
    attention.gate = nn.Linear(24, 24)
    return attention


def test_tokens_of_another_width_are_refused_by_name():
    with pytest.raises(ValueError, match=r"PerformerAttention: x has shape \(2, 5, 16\); it must be \(B, N, 24\)"):
        PerformerAttention(24, 3)(torch.zeros(2, 5, 16))


def test_masks_that_favor_cannot_take_are_refused():
    model = swapped(nn.ModuleList([TimmAttention(), nn.MultiheadAttention(24, 3)]), num_features=16)
    x = tokens(2, 5, 24, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"attn_mask is torch.bool of shape \(5, 5\)"):
        model[0](x, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="takes no attn_mask but a causal one"):
        model[1](x, x, x, attn_mask=torch.ones(2, 2, dtype=torch.bool))
