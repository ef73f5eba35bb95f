"""Residual networks: published counts, shapes, gradients, and their place among the backbones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import medformer
from medformer import ResNet, ResNetConfig

SMALL: dict[str, Any] = {"depth": 10, "base_width": 32}


def build(**options: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(ResNetConfig(**{**SMALL, **options})).double()


def volume(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)])
def test_parameters_are_those_of_torchvision(depth: Any, count: int) -> None:
    with torch.device("meta"):
        model = ResNet(ResNetConfig(dims=2, in_channels=3, depth=depth, norm="batch", classes=1000))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("depth", "millions"), [(10, 14.36), (18, 32.99), (50, 46.21)])
def test_sizes_are_those_of_medicalnet(depth: Any, millions: float) -> None:
    """Its table counts the running statistics too."""
    shortcut: Any = "pad" if depth == 18 else "conv"
    with torch.device("meta"):
        model = ResNet(ResNetConfig(depth=depth, norm="batch", shortcut=shortcut, output_stride=8))
    count = sum(t.numel() for name, t in model.state_dict().items() if "num_batches" not in name)
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("more", [{}, {"output_stride": 8}, {"shortcut": "pad"}, {"depth": 50, "stages": 3}])
def test_maps_and_every_gradient_at_odd_sizes(norm: str, dims: int, more: dict[str, Any]) -> None:
    model = build(norm=norm, dims=dims, in_channels=2, **more)
    x = volume(2, 2, *(37, 34, 33)[:dims]).requires_grad_()
    features = model.forward_features(x)
    assert features.grid == model.grid_of(x.shape[2:])
    assert features.patches.shape == (2, torch.Size(features.grid).numel(), model.config.width)
    assert features.registers.shape == (2, 0, model.config.width)
    torch.testing.assert_close(features.cls, model(x))
    (features.patches * volume(*features.patches.shape)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_dilated_stages_see_as_far_as_stepping_ones() -> None:
    """The field of a place, by the gradient: the weights of both forms are the same, so is what they look at."""
    reach = []
    for output_stride in (32, 8):
        model = build(dims=2, base_width=8, norm="batch", output_stride=output_stride).eval()
        x = volume(1, 1, 512, 512).requires_grad_()
        last = model.stage_maps(x)[-1]
        last[0, :, last.shape[2] // 2, last.shape[3] // 2].sum().backward()
        assert x.grad is not None
        seen = x.grad[0, 0].abs().sum(0).nonzero().flatten()
        reach.append(int(seen.max() - seen.min()) + 1)
    assert 1.0 <= reach[1] / reach[0] < 1.25


def test_standardised_weights_ignore_scale_and_offset() -> None:
    model, x = build(dims=2), volume(2, 1, 40, 40)
    out = model(x)
    model.conv1.weight.data.mul_(7.0).add_(3.0)  # type: ignore[union-attr]
    torch.testing.assert_close(model(x), out, atol=1e-6, rtol=1e-6)


def test_group_norm_keeps_batch_mates_apart() -> None:
    model, x = build(), volume(2, 1, 33, 20, 24)
    loud = torch.cat([x[:1], 50 * x[1:]])
    torch.testing.assert_close(model(loud)[0], model(x)[0])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_checkpointed_activations_change_nothing(norm: str) -> None:
    x, results = volume(2, 1, 40, 40), []
    for checkpointed in (False, True):
        model = build(dims=2, norm=norm)
        model.checkpoint_activations = checkpointed
        model(x).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])  # statistics count a batch once
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dims", [2, 3])
def test_compiled_without_graph_breaks(dims: int) -> None:
    model, x = build(dims=dims).eval(), volume(2, 1, *(40, 33, 36)[:dims])
    mask = None if dims == 2 else torch.rand(2, math.prod(model.grid_of(x.shape[2:]))) < 0.8
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    expected = model.forward_features(x, key_padding_mask=mask)
    torch.testing.assert_close(compiled(x, key_padding_mask=mask).patches, expected.patches)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("more", [{}, {"output_stride": 8, "shortcut": "pad"}, {"depth": 50, "stages": 3}])
def test_padding_never_changes_the_rest(dims: int, norm: str, more: dict[str, Any]) -> None:
    model = build(dims=dims, norm=norm, **more)
    if norm == "batch":
        model(volume(4, 1, *(48,) * dims))  # moves the statistics
        model.eval()
    step = model.config.step
    x = volume(2, 1, *(3 * step, 2 * step, 2 * step)[:dims])
    mask = torch.zeros(2, *model.grid_of(x.shape[2:]), dtype=torch.bool)
    mask[0, :2, :1] = mask[1] = True
    padded = model.get_intermediate_layers(x, model.config.stages, key_padding_mask=mask.flatten(1))
    alone = model.get_intermediate_layers(x[:1, :, : 2 * step, :step], model.config.stages)
    for together, by_itself in zip(padded, alone, strict=True):
        torch.testing.assert_close(together.cls[0], by_itself.cls[0])
    torch.testing.assert_close(padded[-1].patches[0][mask[0].flatten()], alone[-1].patches[0])
    torch.testing.assert_close(padded[-1].cls[1], model(x)[1])


def test_padded_batches_train_group_norms_and_no_batch_norms() -> None:
    x, mask = volume(2, 1, 64, 32), torch.tensor([[True, False], [True, True]])
    model = build(dims=2)
    model.forward_features(x, key_padding_mask=mask).cls.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    with pytest.raises(ValueError, match="key_padding_mask in training needs norm='group'"):
        build(dims=2, norm="batch").forward_features(x, key_padding_mask=mask)
    with pytest.raises(ValueError, match=r"ResNet: key_padding_mask of shape \(2, 1\).*must be bool of shape \(2, 2\)"):
        model.forward_features(x, key_padding_mask=mask[:, :1])


def test_intermediate_layers_are_the_stages() -> None:
    model, x = build(), volume(2, 1, 40, 33, 36)
    found = model.get_intermediate_layers(x, [0, -1])
    maps = model.stage_maps(x)
    assert [f.grid for f in found] == [tuple(m.shape[2:]) for m in (maps[0], maps[-1])]
    torch.testing.assert_close(found[0].patches, maps[0].flatten(2).mT)
    torch.testing.assert_close(found[1].cls, model(x))
    with pytest.raises(IndexError, match="layers=5 must name some of 4 blocks"):
        model.get_intermediate_layers(x, 5)


def test_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = build(dims=2, norm="batch", classes=3), volume(1, 1, 40, 40)
    model(x)  # moves the statistics
    medformer.save(model, tmp_path / "model.safetensors")
    loaded = medformer.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, ResNet)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, "depth=20 must be one of 10, 18, 34, 50, 101"),
        ({"dims": 1}, "dims=1 must be one of 2, 3"),
        ({"base_width": 48}, "base_width=48 must be a multiple of 32 with norm='group'"),
        ({"classes": 2, "stages": 3}, "classes=2 needs stages=4"),
        ({"output_stride": 4}, "output_stride=4 must be one of 8, 16, 32"),
    ],
)
def test_impossible_config_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^ResNetConfig: {message}"):
        ResNetConfig(**options)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(batch, 1, Z, Y, X\)"):
        build()(volume(1, 1, 8, 8))
    with pytest.raises(TypeError, match="must be floating point"):
        build()(torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16))
    with pytest.raises(ValueError, match="has no mask token"):
        build().forward_features(volume(1, 1, 8, 8, 8), mask=torch.ones(1, 1).bool())  # type: ignore[arg-type]
