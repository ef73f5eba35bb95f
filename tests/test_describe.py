"""Counted costs against measured ones, published parameter counts, and what is frozen for transfer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import medformer
from medformer import TNT, Backbone, BackboneConfig, ImageGPT, ImageGPTConfig, ResNetConfig, TNTConfig, TNTLevel

VIT: dict[str, Any] = {"patch_size": 16, "patch_stride": 16, "patch_padding": 0, "registers": 0, "attention": "softmax"}
TINY: dict[str, Any] = {"width": 24, "depth": 2, "heads": 2, "patch_size": 4, "patch_stride": 2, "patch_padding": 1}


@pytest.mark.parametrize(
    ("width", "depth", "heads", "count"),
    [(192, 12, 3, 5_717_416), (384, 12, 6, 22_050_664), (768, 12, 12, 86_567_656), (1024, 24, 16, 304_326_632)],
)
def test_vits_in_2d_have_the_published_parameters(width: int, depth: int, heads: int, count: int) -> None:
    options = {**VIT, "dims": 2, "in_channels": 3, "position_grid": 14, "classes": 1000}
    with torch.device("meta"):
        model = Backbone(BackboneConfig(width=width, depth=depth, heads=heads, **options))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("width", "depth", "heads", "count"),
    [(384, 12, 6, 22_951_296), (768, 12, 12, 88_369_920), (1024, 24, 16, 306_729_984)],
)
def test_vits_in_3d_have_the_known_parameters(width: int, depth: int, heads: int, count: int) -> None:
    with torch.device("meta"):
        model = Backbone(BackboneConfig(width=width, depth=depth, heads=heads, **VIT, position_grid=6))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "softmax"},
        {"attention": "softmax", "mlp": "moe", "experts": 2},
        {"attention": "nystrom", "num_landmarks": 8},
        {"attention": "disentangled", "position": "none"},
        {"attention": "softmax", "stem": "resnet18", "dims": 2, "mlp": "gated"},
    ],
)
def test_counts_are_those_of_a_real_pass(options: dict[str, Any]) -> None:
    model = Backbone(BackboneConfig(**{**TINY, **options}))
    size = (34, 31, 33)[: model.config.dims] if model.stem else (9, 8, 7)
    found = medformer.describe(model, size, batch=2)
    kept: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.train()(torch.randn(2, 1, *size))
    assert found.saved_bytes == sum(t.untyped_storage().nbytes() for t in kept.values())
    assert found.flops >= counter.get_total_flops() > 0  # the attention of a CPU is not in torch's list
    assert found.grid == model.grid_of(size)
    assert found.parameters == found.trainable == sum(p.numel() for p in model.parameters())


def test_a_tnt_is_counted_as_it_runs() -> None:
    fine, coarse = TNTLevel(width=12, depth=1, heads=2), TNTLevel(width=24, depth=1, heads=2, kernel=2, stride=2)
    model = TNT(TNTConfig(levels=(fine, coarse), dims=2, attention="softmax", position_grid=2))
    found = medformer.describe(model, 16)
    assert found.grid == (2, 2)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    inner, outer = 16 * (12 * 12**2 + 2 * 4 * 12), 5 * (12 * 24**2 + 2 * 5 * 24)
    assert found.flops == 2 * (inner + outer + 16 * 16 * 12 + 2 * 4 * 48 * 24)  # blocks, pixels, embedding and fusion
    assert found.saved_bytes > 0


@pytest.mark.parametrize("attention", ["softmax", "performer", "expire_span"])
def test_an_image_gpt_is_counted_at_its_own_size(attention: Any) -> None:
    model = ImageGPT(
        ImageGPTConfig(vocabulary=16, grid=(8, 8), patch=(2, 2), width=24, depth=2, heads=2, attention=attention)
    )
    found = medformer.describe(model, 16)
    assert found.grid == (8, 8)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model.train()(torch.zeros(1, 64, dtype=torch.int64))
    linear = 2 * 64 * (2 * 12 * 24**2 + 24 * 16)
    assert counter.get_total_flops() >= linear
    assert found.flops - linear >= 2 * 64 * 24 * 2  # and attention, which on a CPU is not in torch's list
    with pytest.raises(ValueError, match=r"ImageGPT: size=\(8, 8\) must be \(16, 16\)"):
        medformer.describe(model, 8)


def test_operations_of_known_networks() -> None:
    """Published: 4.6 G multiplications for ViT-S-16 and 4.1 G for ResNet-50 at 224 x 224."""
    options = {**VIT, "dims": 2, "in_channels": 3, "position_grid": 14, "width": 384, "heads": 6, "classes": 1000}
    assert medformer.describe(Backbone(BackboneConfig(**options)), 224).flops / 2e9 == pytest.approx(4.6, abs=0.05)
    resnet = medformer.ResNet(medformer.ResNetConfig(dims=2, in_channels=3, norm="batch", classes=1000))
    assert medformer.describe(resnet, 224).flops / 2e9 == pytest.approx(4.1, abs=0.05)


@pytest.mark.parametrize("options", [{"attention": "performer"}, {"attention": "nystrom", "num_landmarks": 8}])
def test_linear_attentions_grow_with_the_tokens(options: dict[str, Any]) -> None:
    """Few landmarks, whose pseudo-inverse costs the same over any number of tokens."""
    model = Backbone(BackboneConfig(**{**TINY, **options}))
    small, large = medformer.describe(model, 64), medformer.describe(model, (64, 64, 128))
    for cost in ("flops", "saved_bytes"):
        assert getattr(large, cost) / getattr(small, cost) == pytest.approx(2, rel=0.02)


def test_describing_takes_no_memory_and_leaves_the_model_alone() -> None:
    model = medformer.tiny_3d(mlp="moe", attention="hopfield").eval()
    model.train()(torch.zeros(1, 1, 8, 8, 8))  # leaves a loss that holds a graph
    model.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    text = str(medformer.describe(model, 256))
    assert "6,12" in text
    assert "256x256x256 voxels, 64x64x64 patches" in text
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model.training
    assert medformer.auxiliary_loss(model) > 0


def test_wrong_sizes_are_refused() -> None:
    model = Backbone(BackboneConfig(**TINY))
    with pytest.raises(ValueError, match=r"size=\(8, 8\) and batch=1 must be 3 numbers"):
        medformer.describe(model, (8, 8))
    with pytest.raises(ValueError, match="smaller than the patch kernel"):
        medformer.describe(model, 2)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_only_norms_positions_input_and_output_learn(position: str) -> None:
    torch.manual_seed(0)
    options = {
        **TINY,
        "classes": 3,
        "qk_norm": True,
        "layer_scale": 0.1,
        "position": position,
        "mlp": "moe",
        "experts": 2,
    }
    model = Backbone(BackboneConfig(**options))
    before = {name: p.clone() for name, p in model.named_parameters()}
    learns = medformer.freeze_for_transfer(model)
    kernel = model.patch_embed.conv.weight.detach().flatten(1)
    torch.testing.assert_close(kernel @ kernel.T, 1.41**2 * torch.eye(24), atol=1e-4, rtol=1e-4)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(2, 1, 8, 8, 8)).square().sum().backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(learns)
    parts = ("norm", "patch_embed", "position", "head")
    assert moved == {name for name in before if any(part in name for part in parts)}


NETWORKS: dict[str, Any] = {
    "tnt": TNTConfig(
        levels=(TNTLevel(width=12, depth=2, heads=2), TNTLevel(width=24, depth=2, heads=2, kernel=2, stride=2)),
        attention="disentangled",
        classes=3,
    ),
    "resnet": ResNetConfig(depth=10, base_width=32, classes=3),
    "batch_norm": ResNetConfig(depth=10, base_width=32, norm="batch", classes=3),
    "stem": BackboneConfig(**TINY, stem="resnet18", stem_stages=1, classes=3),
}
PARTS = ("norm", "bn", "downsample.1", "tables", "attention.prefix", "position", "head", "fc.")


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_same_rule_freezes_every_network(kind: str) -> None:
    torch.manual_seed(0)
    model = medformer.build(NETWORKS[kind])
    learns = set(medformer.freeze_for_transfer(model))
    kernel = (model.patch_embed.conv if kind == "stem" else model.conv if kind == "tnt" else model.conv1).weight
    rows = kernel.detach().flatten(1)
    torch.testing.assert_close(rows @ rows.T, 1.41**2 * torch.eye(len(rows)), atol=1e-4, rtol=1e-4)
    x = torch.randn(2, 1, 32, 32, 32)
    (model(x).square().sum() + model.forward_features(x).patches.square().sum()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == learns
    inputs = ("conv.", "conv1.", "stem.", "patch_embed.")
    names = [name for name, _ in model.named_parameters()]
    assert learns == {n for n in names if n.startswith(inputs) or any(part in n for part in PARTS)}


def test_an_image_gpt_keeps_attention_and_mlps() -> None:
    model = ImageGPT(ImageGPTConfig(vocabulary=16, grid=(4, 4), width=24, depth=1, heads=2))
    assert set(medformer.freeze_for_transfer(model)) == {
        "token_embed", "position", "output", "norm.gain", "blocks.0.norm1.gain", "blocks.0.norm2.gain",
    }  # fmt: skip


def test_the_input_may_stay_pretrained() -> None:
    model = Backbone(BackboneConfig(**TINY))
    before = model.patch_embed.conv.weight.clone()
    medformer.freeze_for_transfer(model, new_input=False)
    assert torch.equal(model.patch_embed.conv.weight, before)
    assert model.patch_embed.conv.weight.requires_grad
