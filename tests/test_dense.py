"""Heads of segmentation: where tokens are put, what reaches full resolution, and prediction by tiles."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import medformer
from medformer import BackboneConfig, ResNetConfig
from medformer.evaluation import dense, tuning
from medformer.evaluation.fitting import Budget
from medformer.footprint import Footprint
from medformer.slices import SliceEncoderConfig
from medformer.tnt import TNTConfig, TNTLevel
from medformer.windows import starts_of, tile_weight

small: dict[str, Any] = {"width": 24, "depth": 3, "heads": 2}
LEVELS = (
    TNTLevel(width=12, depth=2, heads=2, kernel=3, stride=2, padding=1),
    TNTLevel(width=24, depth=2, heads=2, kernel=2, stride=2),
)
BACKBONES = {
    "plain": BackboneConfig(**small, patch_size=4, patch_stride=4, patch_padding=0),
    "overlapping": BackboneConfig(**small, patch_size=8, patch_stride=6, patch_padding=1),
    "thick slices": BackboneConfig(**small, patch_size=(1, 8, 6), patch_stride=(1, 8, 3), patch_padding=(0, 0, 2)),
    "one voxel a step": BackboneConfig(**small, patch_size=3, patch_stride=1, patch_padding=1, attention="nystrom"),
    "stem": BackboneConfig(**small, stem="resnet18", stem_stages=1, patch_size=1, patch_stride=1, patch_padding=0),
    "one block": BackboneConfig(width=24, depth=1, heads=2, class_token=False),
    "images": BackboneConfig(**small, dims=2, patch_size=16, patch_stride=8, patch_padding=4),
    "resnet": ResNetConfig(depth=10, base_width=32, output_stride=8),
    "bottlenecks": ResNetConfig(dims=2, depth=50, base_width=32, stages=3),
    "tnt": TNTConfig(levels=LEVELS),
    "slices": SliceEncoderConfig(encoder=BackboneConfig(**small, dims=2, patch_size=4, patch_stride=4), slice_step=2),
    "slices of a resnet": SliceEncoderConfig(encoder=ResNetConfig(dims=2, depth=10, base_width=32)),
}
DEPTHS = {"one block": 1, "resnet": 4, "bottlenecks": 3, "slices of a resnet": 4}  # of the others two


def head_of(name: str) -> tuple[Any, tuple[int, ...]]:
    torch.manual_seed(0)
    config = BACKBONES[name]
    size = (13, 10, 17) if config.dims == 3 else (18, 25)
    return tuning.Network(medformer.build(config), "finetune", 2, dense=True), size


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_reaches_every_voxel_and_is_read_at_every_depth(name: str) -> None:
    network, size = head_of(name)
    x = torch.randn(2, 1, *size)
    logits = network(x)
    assert logits.shape == (2, 3, *size)
    assert (logits.detach().flatten(2).std(-1) > 0).all()
    layers = network.backbone.get_intermediate_layers(x, network.head.layers)
    assert len(layers) == DEPTHS.get(name, 2)
    kept = [layer.patches.detach().requires_grad_() for layer in layers]
    known = [medformer.Features(cls=f.cls, registers=f.registers, patches=p, grid=f.grid)
             for f, p in zip(layers, kept, strict=True)]  # fmt: skip
    network.head(x, known).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kept)


@pytest.mark.parametrize("name", ["plain", "thick slices", "images", "resnet"])
def test_two_voxels_of_one_patch_get_answers_of_their_own(name: str) -> None:
    """With tokens that say nothing, the answer still follows the voxels: there is a path at full resolution."""
    network, size = head_of(name)
    x = torch.zeros(1, 1, *size)
    layers = network.backbone.get_intermediate_layers(x, network.head.layers)
    spot = x.clone()
    spot[(0, 0, *(n // 2 for n in size))] = 3.0
    change = (network.head(spot, layers) - network.head(x, layers)).detach()[0].norm(dim=0)
    top = tuple(int(v) for v in torch.unravel_index(change.argmax(), change.shape))
    assert max(abs(a - n // 2) for a, n in zip(top, size, strict=True)) <= 3
    neighbour = change[tuple(n // 2 + (axis == len(size) - 1) for axis, n in enumerate(size))]
    assert abs(neighbour - change[tuple(n // 2 for n in size)]) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    reach=st.integers(1, 17), stride=st.integers(1, 9), padding=st.integers(0, 4), step=st.sampled_from((1, 2, 4)),
    tokens=st.integers(1, 7),
)  # fmt: skip
def test_tokens_are_interpolated_from_their_middles(
    reach: int, stride: int, padding: int, step: int, tokens: int
) -> None:
    seen = Footprint(reach=(reach, 1), stride=(stride, 1), padding=(padding, 0))
    middle = torch.arange(tokens, dtype=torch.float64) * stride - padding + (reach - 1) / 2
    count = 9
    found = dense._at_places(middle.view(1, 1, tokens, 1).expand(1, 1, tokens, 3), seen, (step, 1), (count, 3))
    places = torch.arange(count, dtype=torch.float64) * step + (step - 1) / 2
    wanted = places.clamp(middle[0].item(), middle[-1].item())
    torch.testing.assert_close(found[0, 0], wanted[:, None].expand(count, 3))


def test_frozen_backbones_get_no_gradient_and_heads_do() -> None:
    for method in ("linear", "decoder"):
        network = tuning.Network(medformer.build(BACKBONES["plain"]), method, 2, dense=True).train()
        network(torch.randn(1, 1, 8, 8, 8)).square().mean().backward()
        assert all(p.grad is None for p in network.backbone.parameters())
        assert all(p.grad is not None for p in network.head.parameters())


def test_the_peer_is_the_plain_u_net() -> None:
    for dims, millions in ((3, 0.34), (2, 0.12)):
        peer = tuning.peer("unet", dims, 2)
        assert round(sum(p.numel() for p in peer.parameters()) / 1e6, 2) == millions
        assert peer(torch.randn(2, 1, *(9, 7, 6)[-dims:])).shape == (2, 3, *(9, 7, 6)[-dims:])


class Pointwise(nn.Module):
    """Says of every voxel what it is, whatever lies around."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


@pytest.mark.parametrize("shape", [(5, 9, 30), (8, 8, 8), (8, 13, 9)])
def test_tiles_blend_to_what_each_of_them_says(shape: tuple[int, ...]) -> None:
    image = torch.randn(1, *shape)
    found = dense.blended_logits(Pointwise(), image, (8, 8, 8), 3, torch.enable_grad)
    inside = found[(slice(None), *(slice(0, n) for n in shape))]
    torch.testing.assert_close(inside, torch.stack([image[0], -image[0]]))


def test_the_middle_of_a_tile_counts_most() -> None:
    weight = tile_weight((8, 6, 5))
    assert weight.shape == (8, 6, 5)
    assert weight[3, 2, 2] == weight[4, 3, 2] == weight.max() == 1
    torch.testing.assert_close(weight, weight.flip(0, 1, 2))
    assert weight[0, 0, 0] == weight.min() == pytest.approx(1e-3)


def test_predictions_do_not_depend_on_how_many_tiles_go_at_once() -> None:
    network = tuning.Network(medformer.build(BACKBONES["overlapping"]), "finetune", 2, dense=True).eval()
    image = torch.randn(1, 12, 9, 21)
    one, several = (dense.blended_logits(network, image, (8, 8, 8), n, torch.no_grad) for n in (1, 7))
    torch.testing.assert_close(one, several, atol=1e-5, rtol=1e-4)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 40), more=st.integers(0, 200))
def test_tiles_reach_from_end_to_end_and_overlap(size: int, more: int) -> None:
    starts = starts_of(size + more, size)
    assert starts[0] == 0
    assert starts[-1] == more
    gaps = [b - a for a, b in pairwise(starts)]
    assert all(0 < gap <= max(1, 0.625 * size + 1) for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_heads_trained_together_are_those_trained_alone() -> None:
    images = [torch.randn(1, 12, 12, 12) for _ in range(3)]
    masks = [(image[0] > 0.5).byte() for image in images]
    budget, rates = Budget(steps=3, batch=2), [1e-2, 1e-3]

    def fresh() -> tuning.Network:
        torch.manual_seed(1)
        return tuning.Network(medformer.build(BACKBONES["plain"]), "linear", 1, dense=True)

    alone = [fresh() for _ in rates]
    for network, lr in zip(alone, rates, strict=True):
        dense.train_dense(network, images, masks, (8, 8, 8), budget, lr, 5, torch.enable_grad, list)
    together = [fresh() for _ in rates]
    together[1].backbone = together[0].backbone
    shared = together[0].layers
    dense.train_dense_together(together, images, masks, (8, 8, 8), budget, rates, 5, torch.enable_grad, list, shared)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.head.state_dict(), other.head.state_dict())
    x = torch.randn(1, 1, 8, 8, 8)
    every = tuning.Together(together)(x)
    torch.testing.assert_close(every, torch.cat([network(x) for network in alone], 1))
