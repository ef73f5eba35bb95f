"""The gate of keys in FAVOR+ attention, and queries and keys that start alike."""

from __future__ import annotations

import pytest
import torch

import medformer
from medformer.attention import PerformerAttention
from medformer_kernels import performer_features


def gated(**options: object) -> PerformerAttention:
    """A module whose gate says something."""
    torch.manual_seed(0)
    module = PerformerAttention(12, 3, num_features=16, key_gate=True, **options).double()  # type: ignore[arg-type]
    assert module.key_gate is not None
    torch.nn.init.normal_(module.key_gate.weight)
    torch.nn.init.normal_(module.key_gate.bias)
    return module


@pytest.mark.parametrize("masked", [False, True])
def test_each_key_weighs_as_much_as_its_gate_says(masked: bool) -> None:
    module, x = gated(), torch.randn(2, 9, 12, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [5]]) if masked else None
    q, k, v = module.qkv(x).view(2, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
    phi_q, phi_k = (performer_features(t, module.omega).exp() for t in (q, k))
    weights = phi_q @ phi_k.mT * module.key_gate(x).exp().mT  # type: ignore[misc]
    if mask is not None:
        weights = weights * mask[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(module(x, key_padding_mask=mask), module.proj((weights @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(module.attention_rows(x, range(9), key_padding_mask=mask), weights, atol=1e-6, rtol=1e-6)


def test_a_gate_starts_as_none() -> None:
    config = {"width": 12, "depth": 2, "heads": 3, "patch_size": 4, "patch_stride": 4, "num_features": 16}
    plain = medformer.Backbone(medformer.BackboneConfig(**config))
    with_gate = medformer.Backbone(medformer.BackboneConfig(**config, key_gate=True))
    missing, unexpected = with_gate.load_state_dict(plain.state_dict(), strict=False)
    assert {name.rsplit(".", 2)[1] for name in missing} == {"key_gate"}
    assert not unexpected
    x = torch.randn(2, 1, 8, 8, 8)
    torch.testing.assert_close(with_gate(x), plain(x))


def test_a_gate_closes_on_what_it_is_told_to_leave() -> None:
    module, x = gated(), torch.randn(1, 6, 12, dtype=torch.float64)
    x[:, 3:] = x[:, 3:].abs() * 100
    assert module.key_gate is not None
    torch.nn.init.constant_(module.key_gate.weight, -1.0)
    mask = torch.arange(6)[None] < 3
    torch.testing.assert_close(module(x)[:, :3], module(x, key_padding_mask=mask)[:, :3])


def test_padding_with_a_heavy_gate_changes_nothing() -> None:
    module, x = gated(), torch.randn(1, 4, 12, dtype=torch.float64)
    padded = torch.cat([x, torch.full((1, 2, 12), 1e4, dtype=torch.float64)], 1)
    mask = torch.arange(6)[None] < 4
    torch.testing.assert_close(module(padded, key_padding_mask=mask)[:, :4], module(x))
    nothing = module(x, key_padding_mask=torch.zeros(1, 4, dtype=torch.bool))
    torch.testing.assert_close(nothing, module.proj.bias.expand_as(nothing))


def test_gradients_of_the_gate_are_those_of_the_definition() -> None:
    module, x = gated(), torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    assert module.key_gate is not None
    parameters = (module.key_gate.weight, module.key_gate.bias)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *parameters))


def test_the_gate_works_with_state_blocks_and_not_in_causal_order() -> None:
    module = gated(state_blocks=(2, 2, 2))
    torch.nn.init.zeros_(module.block_log_weights)  # all blocks alike: plain FAVOR+
    plain = gated()
    plain.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(2, 64, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x, grid=(4, 4, 4)), plain(x))
    with pytest.raises(ValueError, match="key_gate=True has no causal form"):
        gated(causal=True)
    with pytest.raises(ValueError, match="key_gate=True needs attention='performer', not 'softmax'"):
        medformer.BackboneConfig(attention="softmax", key_gate=True)


@pytest.mark.parametrize("attention", ["performer", "softmax", "nystrom", "hopfield", "disentangled"])
def test_queries_and_keys_start_alike(attention: str) -> None:
    torch.manual_seed(0)
    model = medformer.Backbone(
        medformer.BackboneConfig(width=96, depth=1, heads=3, attention=attention, alike_start=1.5)  # type: ignore[arg-type]
    )
    q, k, v = model.blocks[0].attention.qkv.weight.chunk(3)  # type: ignore[union-attr]
    assert torch.equal(q, k)
    assert not torch.equal(k, v)
    assert q.std().item() == pytest.approx(1.5 / 96**0.5, rel=0.05)
    with pytest.raises(ValueError, match=r"alike_start=0(\.0)? must be above 0, or None"):
        medformer.BackboneConfig(alike_start=0.0)
