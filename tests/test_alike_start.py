"""Queries and keys that start with the same projection."""

from __future__ import annotations

import pytest
import torch

import medformer


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
