"""The backbone, its config and its presets."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import shutil
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from torch import Tensor

import medformer
from medformer import Backbone, BackboneConfig
from medformer.attention import PerformerAttention, SoftmaxAttention
from medformer.blocks import Block
from medformer.mlp import MLP
from medformer.patch_embed import PatchEmbed
from medformer.position import LearnedPosition, SinCosPosition

SMALL: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3, "patch_size": 4, "patch_stride": 2, "patch_padding": 1}
VIT: dict[str, Any] = {"patch_size": 16, "patch_stride": 16, "patch_padding": 0, "registers": 0, "attention": "softmax"}
both = pytest.mark.parametrize("attention", ["performer", "softmax"])


def build(*, loud: bool = False, **overrides: Any) -> Backbone:
    """A small backbone in float64; `loud` weights make every token visible in every output."""
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(**{**SMALL, **overrides})).double()
    if loud:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def volume(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({**VIT, "dims": 3, "position_grid": 6}, 22_951_296),
        ({**VIT, "dims": 3, "position_grid": 6, "width": 768, "heads": 12}, 88_369_920),
        ({**VIT, "dims": 2, "position_grid": 14, "in_channels": 3}, 22_050_664 - (384 * 1000 + 1000)),
    ],
)
def test_parameter_count_is_that_of_vit(overrides: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = Backbone(BackboneConfig(**overrides))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@both
@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        ((4, 4, 4), {}),
        ((5, 9, 7), {}),
        ((7, 11, 5), {"in_channels": 2, "registers": 0}),
        ((9, 5, 6), {"class_token": False, "position": "sincos"}),
        (
            (6, 8, 7),
            {"patch_size": (2, 4, 3), "patch_stride": (1, 3, 2), "patch_padding": 0},
        ),
        ((9, 9, 8), {"patch_dilation": 2, "qk_norm": True, "layer_scale": 1e-5, "mlp_ratio": 1.7}),
        ((13, 6), {"dims": 2, "position": "sincos"}),
        ((13, 7), {"dims": 2, "class_token": False, "registers": 0}),
    ],
)
def test_shapes_hold_at_odd_sizes(attention: str, size: tuple[int, ...], overrides: dict[str, Any]) -> None:
    model = build(attention=attention, **overrides)
    config = model.config
    x = volume(2, config.in_channels, *size)
    features = model.forward_features(x)
    assert features.grid == model.grid_of(size)
    assert features.cls.shape == (2, 24)
    assert features.registers.shape == (2, config.registers, 24)
    assert features.patches.shape == (2, torch.Size(features.grid).numel(), 24)
    assert torch.equal(model(x), features.cls)


@both
@pytest.mark.parametrize(
    "overrides",
    [
        {"mask_token": True, "qk_norm": True, "layer_scale": 0.1},
        {"class_token": False, "position": "sincos", "mask_token": True},
        {"dims": 2, "in_channels": 3, "mask_token": True},
    ],
)
def test_every_gradient_flows(attention: str, overrides: dict[str, Any]) -> None:
    model = build(attention=attention, loud=True, **overrides)
    x = volume(2, model.config.in_channels, *(7, 6, 5)[: model.config.dims]).requires_grad_()
    mask = torch.arange(torch.Size(model.grid_of(x.shape[2:])).numel()).expand(2, -1) % 3 == 0
    features = model.forward_features(x, mask=mask)
    outputs = (features.cls, features.registers, features.patches)
    torch.stack([(t * volume(*t.shape)).sum() for t in outputs]).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert x.grad is not None
    assert x.grad.any()


@both
def test_output_does_not_depend_on_batch_mates(attention: str) -> None:
    model = build(attention=attention, loud=True)
    x = volume(3, 1, 7, 9, 6)
    loud = torch.cat([x[:1], 50 * x[1:]])
    torch.testing.assert_close(model(loud)[0], model(x[:1])[0], atol=1e-11, rtol=1e-11)


@both
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_map_is_the_class_row_of_the_layer(attention: str, layer: int) -> None:
    model = build(attention=attention, loud=True).eval()
    x = volume(2, 1, 7, 9, 6)
    seen = {}
    block = model.blocks[layer]
    block.attention.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))  # type: ignore[union-attr]
    model(x)
    row = block.attention.attention_rows(seen["tokens"])[:, :, 0]  # type: ignore[union-attr,operator]
    heat = model.attention_map(x, layer)
    prefix = 1 + model.config.registers
    assert heat.shape == (2, 3, *model.grid_of(x.shape[2:]))
    torch.testing.assert_close(heat.flatten(2), row[:, :, prefix:])
    torch.testing.assert_close(heat.flatten(2).sum(-1) + row[:, :, :prefix].sum(-1), torch.ones(2, 3).double())
    assert not heat.requires_grad


def test_masked_patches_are_never_read() -> None:
    model = build(loud=True, mask_token=True, patch_size=2, patch_padding=0)
    x = volume(1, 1, 6, 6, 6)
    mask = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
    mask[:, 1] = True
    changed = x.clone()
    changed[:, :, 2:4] = 7.0
    a = model.forward_features(x, mask=mask.flatten(1))
    b = model.forward_features(changed, mask=mask.flatten(1))
    assert torch.equal(a.patches, b.patches)
    assert not torch.allclose(a.patches, model.forward_features(x).patches)


@both
def test_checkpointed_activations_change_nothing(attention: str) -> None:
    model = build(attention=attention, loud=True, drop_path=0.3, depth=3).train()
    x = volume(4, 1, 7, 6, 5)
    results = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_keeps_fewer_activations() -> None:
    model = build(depth=3).train()
    x = volume(1, 1, 9, 9, 9)
    counts = []
    for model.checkpoint_activations in (False, True):
        kept: list[int] = []

        def pack(t: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        counts.append(sum(kept))
    assert counts[1] < counts[0] / 4


def test_drop_path_skips_whole_samples_and_keeps_the_mean() -> None:
    block = Block(8, SoftmaxAttention(8, 2), MLP(8, 8), drop_path=0.25)
    branch = torch.ones(4000, 2, 8)
    torch.manual_seed(0)
    dropped = block._regularise(branch, None)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert abs(dropped.mean() - 1) < 0.05
    assert block.eval()._regularise(branch, None) is branch


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    model = build(depth=4, drop_path=0.3)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_models_stay_near_double(attention: str, dtype: torch.dtype) -> None:
    model = build(attention=attention).eval().to(dtype)
    x = volume(2, 1, 9, 8, 7).to(dtype)
    out = model(x)
    exact = model.double()(x.double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() < 32 * torch.finfo(dtype).eps * exact.abs().max()


@both
def test_autocast_keeps_the_residual_stream_in_float32(attention: str) -> None:
    model = build(attention=attention)
    x = volume(2, 1, 9, 8, 7)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.float()(x.float())
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() < 32 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_one_graph_serves_every_size() -> None:
    model = build(depth=1, loud=True)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for size in ((7, 9, 6), (8, 5, 11), (12, 12, 13)):
        x = volume(2, 1, *size)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_model_matches_eager() -> None:
    model = build(depth=1, position_grid=4).float().eval()
    x = volume(2, 1, 8, 8, 8, dtype=torch.float32)
    with torch.no_grad():  # the backward graph would double the time to compile
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)


def test_state_of_the_features_follows_seed_and_layer() -> None:
    first, again, other = (build(seed=seed).state_dict() for seed in (3, 3, 4))
    names = [f"blocks.{layer}.attention.omega" for layer in range(2)]
    assert all(torch.equal(first[name], again[name]) for name in names)
    draws = [state[name] for state in (first, other) for name in names]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 5, "width": 384}, "heads=5 must divide width=384; use 4 or 6"),
        ({"heads": 500, "width": 384}, "heads=500 must divide width=384; use 384"),
        ({"dims": 4}, "dims=4 must be 2 or 3"),
        ({"depth": 0}, "depth=0 must be a whole number of at least 1"),
        ({"width": 24.0}, "width=24.0 must be a whole number"),
        ({"registers": -1}, "registers=-1 must be a whole number of at least 0"),
        ({"in_channels": True}, "in_channels=True must be a whole number"),
        ({"patch_size": (4, 4)}, r"patch_size=\(4, 4\) must be one number or 3 numbers, one per axis"),
        ({"patch_stride": (2, 0, 2)}, "patch_stride=0 must be a whole number of at least 1"),
        ({"patch_padding": 4}, "patch_padding=4 must be below the patch kernel"),
        ({"position_grid": 0}, "position_grid=0 must be a whole number of at least 1"),
        ({"position_grid": 4, "position": "sincos"}, "position_grid=4 needs position='learned'"),
        ({"position": "alibi"}, "position='alibi' must be one of learned, sincos, rotary, none"),
        ({"attention": "linear"}, "attention='linear' must be one of performer, softmax, nystrom, hopfield"),
        ({"attention": "softmax", "num_features": 64}, "num_features=64 needs attention='performer'"),
        ({"width": 4, "heads": 1, "position": "sincos"}, "width=4 must be at least 6"),
        ({"drop_path": 1.0}, "drop_path=1.0 must be at least 0 and below 1"),
        ({"layer_scale": 0.0}, "layer_scale=0.0 must be above 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio=nan must leave at least one hidden channel"),
        ({"seed": 2**31}, r"must be below 2\*\*31"),
    ],
)
def test_impossible_config_is_refused_when_built(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^BackboneConfig: .*{message}"):
        BackboneConfig(**{**SMALL, **overrides})


def test_config_takes_lists_from_json_as_tuples() -> None:
    assert BackboneConfig(patch_size=[8, 4, 4]) == BackboneConfig(patch_size=(8, 4, 4))  # type: ignore[arg-type]


def test_every_config_field_has_a_docstring() -> None:
    body = ast.parse(inspect.getsource(BackboneConfig)).body[0].body  # type: ignore[attr-defined]
    documented = {
        node.target.id  # type: ignore[union-attr]
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(BackboneConfig)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(1, 1, 3, 8, 8).double()), ValueError, "3x8x8 voxels is smaller than"),
        (lambda m: m(torch.zeros(1, 8, 8, 8).double()), ValueError, "must be"),
        (lambda m: m.attention_map(torch.zeros(1, 1, 8, 8, 8).double(), 2), IndexError, "from -2 to 1"),
        (
            lambda m: m.forward_features(torch.zeros(1, 1, 8, 8, 8).double(), mask=torch.ones(1, 64).bool()),
            ValueError,
            "build it with mask_token=True",
        ),
    ],
)
def test_wrong_call_is_refused(call: Callable[[Backbone], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(build())


def test_wrong_mask_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be bool of shape \(1, 64\).*grid \(4, 4, 4\)"):
        build(mask_token=True).forward_features(torch.zeros(1, 1, 8, 8, 8).double(), mask=torch.ones(1, 4).bool())


def test_attention_map_needs_a_class_token() -> None:
    with pytest.raises(ValueError, match="build it with class_token=True"):
        build(class_token=False).attention_map(torch.zeros(1, 1, 8, 8, 8).double())


@pytest.mark.parametrize(
    ("preset", "width", "depth", "heads"),
    [
        ("tiny_3d", 192, 4, 6),
        ("small_3d", 384, 12, 6),
        ("base_3d", 768, 12, 12),
        ("large_3d", 1024, 24, 16),
        ("large_2d", 1024, 24, 16),
        ("tiny_2d", 192, 4, 6),
        ("small_2d", 384, 12, 6),
        ("base_2d", 768, 12, 12),
    ],
)
def test_presets_overlap_and_take_overrides(preset: str, width: int, depth: int, heads: int) -> None:
    with torch.device("meta"):
        config = getattr(medformer, preset)(in_channels=2).config
    assert (config.width, config.depth, config.heads, config.in_channels) == (width, depth, heads, 2)
    assert config.dims == int(preset[-2])
    assert all(stride < kernel for stride, kernel in zip(config.stride, config.kernel, strict=True))


@both
def test_type_hints_hold(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = [Backbone, Block, MLP, PatchEmbed, LearnedPosition, SinCosPosition]
    names = ["forward", "forward_features", "attention_map", "attention_rows", "rollout", "_intermediate"]
    for owner in [*owners, PerformerAttention, SoftmaxAttention, SoftmaxAttention.__base__]:
        for name in set(names) & set(vars(owner)):
            method = vars(owner)[name]
            monkeypatch.setitem(method.__globals__, "Float", jaxtyping.Float)
            monkeypatch.setitem(method.__globals__, "Bool", jaxtyping.Bool)
            monkeypatch.setattr(owner, name, jaxtyping.jaxtyped(typechecker=beartype)(method))
    for position in ("learned", "sincos"):
        model = build(attention=attention, position=position)
        model(volume(2, 1, 7, 5, 6))
        model.attention_map(volume(2, 1, 7, 5, 6))
