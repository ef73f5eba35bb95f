"""Parameter groups, LARS and gradient clipping of the trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medformer import Backbone, BackboneConfig, ResNet, ResNetConfig
from optim import Lars, OptimConfig, adaptive_clip, clip_per_tensor, make_optimiser, parameter_groups


def test_biases_and_norms_are_not_decayed_but_tables_are() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    model.register_parameter("table", nn.Parameter(torch.zeros(4, 2)))
    model.register_parameter("frozen", nn.Parameter(torch.zeros(4, 2), requires_grad=False))
    decayed, plain = parameter_groups(model)
    assert decayed["decay"]
    assert not plain["decay"]
    assert {id(p) for p in decayed["params"]} == {id(model["linear"].weight), id(model.table)}
    assert len(plain["params"]) == 3


def test_clipping_looks_at_each_tensor_for_itself() -> None:
    a, b, c = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    a.grad, b.grad = torch.full((4,), 5.0), torch.full((4,), 0.5)
    norm = clip_per_tensor([a, b, c], 3.0)
    assert norm.item() == pytest.approx(math.sqrt(101.0))
    assert a.grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(b.grad, torch.full((4,), 0.5))
    assert c.grad is None


def test_no_clipping_leaves_gradients_alone_and_still_tells_their_norm() -> None:
    a = nn.Parameter(torch.zeros(4))
    a.grad = torch.full((4,), 50.0)
    assert clip_per_tensor([a], 0.0).item() == pytest.approx(100.0)
    assert torch.equal(a.grad, torch.full((4,), 50.0))


def test_norm_of_a_gradient_with_nan_is_not_finite() -> None:
    a = nn.Parameter(torch.zeros(2))
    a.grad = torch.tensor([1.0, float("nan")])
    assert not math.isfinite(clip_per_tensor([a], 3.0).item())


@pytest.mark.parametrize(("name", "value"), [("lr", 0.0), ("clip", -1.0), ("warmup", 1.5), ("weight_decay", -0.1)])
def test_impossible_settings_name_their_flag(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--optim.{name} {value}"):
        OptimConfig(**{name: value})


def rates_of(model: nn.Module, **settings: Any) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["lr_scale"] for g in parameter_groups(model, **settings) for p in g["params"]}


def test_layer_decay_falls_from_the_last_block_to_the_input() -> None:
    model = nn.ModuleDict({"backbone": Backbone(BackboneConfig(width=24, depth=3, heads=2)), "head": nn.Linear(24, 4)})
    rates = rates_of(model, layer_decay=0.5, patch_lr=0.2)
    assert rates["head.weight"] == rates["backbone.norm.weight"] == 1.0
    assert [rates[f"backbone.blocks.{i}.mlp.fc1.weight"] for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert rates["backbone.class_token"] == rates["backbone.position.patches"] == 0.0625
    assert rates["backbone.patch_embed.conv.weight"] == pytest.approx(0.2 * 0.0625)
    assert set(rates_of(model).values()) == {1.0}
    assert len(rates) == len(list(model.parameters()))


def lars_by_hand(w: Tensor, grads: list[Tensor], *, adapt: bool) -> Tensor:
    m = torch.zeros_like(w)
    for g in grads:
        if adapt:
            g = g + 0.1 * w
            g = g * 1e-3 * w.norm() / g.norm()
        m = 0.9 * m + g
        w = w - 0.5 * m
    return w


def test_lars_matches_its_definition_and_leaves_biases_and_norms_out_of_both() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    nn.init.normal_(model[0].bias)
    optimiser = Lars(parameter_groups(model), lr=0.5, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: [torch.randn_like(p) for _ in range(3)] for name, p in start.items()}
    for i in range(3):
        for name, p in model.named_parameters():
            p.grad = grads[name][i].clone()
        optimiser.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), lars_by_hand(start[name], grads[name], adapt=name == "0.weight"))


def test_lars_survives_weights_and_gradients_of_zero() -> None:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    optimiser = Lars(parameter_groups(layer), lr=1.0)
    layer.weight.grad = torch.ones(2, 2)
    optimiser.step()
    torch.testing.assert_close(layer.weight.detach(), -torch.ones(2, 2))  # a ratio of 1, not 0 / x
    layer.weight.grad = torch.zeros(2, 2)
    optimiser.step()
    assert layer.weight.isfinite().all()


def test_both_optimisers_step_and_restore_their_state() -> None:
    for name in ("adamw", "lars"):
        config = OptimConfig(name=name, lr=0.1)
        models = [nn.Linear(3, 2), nn.Linear(3, 2)]
        models[1].load_state_dict(models[0].state_dict())
        first, second = (make_optimiser(model, config) for model in models)
        for model, optimiser, steps in ((models[0], first, 2), (models[1], second, 1)):
            for _ in range(steps):
                model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
                optimiser.step()
        third = make_optimiser(models[1], config)
        third.load_state_dict(second.state_dict())
        third.step()
        assert torch.equal(models[0].weight, models[1].weight), name


LAYERS = {
    "linear": (nn.Linear(5, 3), (3, 2)),
    "embedding": (nn.Embedding(4, 3), (4, 2)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2), (6, 2)),
    "conv3d": (nn.Conv3d(2, 3, 3), (3, 2)),
    "transposed2d": (nn.ConvTranspose2d(4, 3, 2), (3, 2)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), (6, 2)),
}


def units_by_hand(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Views of what feeds each output."""
    if isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d):
        inner, outer = x.shape[0] // layer.groups, x.shape[1]
        return [x[g * inner : (g + 1) * inner, o] for g in range(layer.groups) for o in range(outer)]
    return list(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_adaptive_clipping_is_unit_wise_in_every_layout(kind: str) -> None:
    torch.manual_seed(0)
    layer, (units, _) = LAYERS[kind]
    weight = layer.weight
    assert len(units_by_hand(layer, weight)) == units
    gradient = torch.randn_like(weight)
    scales = torch.logspace(-5, 1, units)
    for unit, scale in zip(units_by_hand(layer, gradient), scales, strict=True):
        unit.mul_(scale)
    weight.grad = gradient.clone()
    adaptive_clip(layer, 0.01)
    clipped = []
    for w, g, found in zip(*(units_by_hand(layer, x) for x in (weight, gradient, weight.grad)), strict=True):
        limit = 0.01 * max(float(w.detach().norm()), 1e-3)
        expected = g * min(1.0, limit / float(g.norm()))
        torch.testing.assert_close(found, expected)
        clipped.append(float(g.norm()) > limit)
    assert any(clipped)
    assert not all(clipped)


def test_adaptive_clipping_lets_zero_weights_move_and_leaves_the_head_alone() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2))})
    nn.init.zeros_(model["body"].weight)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adaptive_clip(model, 0.01, skip=("head",))
    found = torch.linalg.vector_norm(model["body"].weight.grad, dim=1)
    torch.testing.assert_close(found, torch.full((2,), 1e-5), rtol=1e-5, atol=0.0)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model["head"].parameters())


@pytest.mark.parametrize(("name", "value"), [("layer_decay", 0.0), ("patch_lr", -1.0), ("agc", -0.1)])
def test_impossible_new_settings_name_their_flag(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--optim.{name} {value}"):
        OptimConfig(**{name: value})


def test_layer_decay_counts_residual_blocks_and_takes_a_stem_for_input() -> None:
    def scales(model: nn.Module) -> dict[str, float]:
        groups = parameter_groups(model, layer_decay=0.5)
        found = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        return {name: found[id(p)] for name, p in model.named_parameters()}

    resnet = scales(nn.ModuleDict({"backbone": ResNet(ResNetConfig(dims=2, depth=10, base_width=32, stages=2))}))
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight")
    assert [resnet[f"backbone.{name}"] for name in names] == [0.125, 0.25, 0.5]
    config = BackboneConfig(stem="resnet18", stem_stages=1, width=24, depth=1, heads=2, patch_size=1, patch_padding=0)
    stemmed = scales(Backbone(config))
    assert [stemmed[name] for name in ("stem.layer1.0.conv1.weight", "blocks.0.mlp.fc1.weight")] == [0.25, 0.5]
