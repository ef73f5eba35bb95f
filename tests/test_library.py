"""Every attention x MLP x embedding x dimension: forward, backward, saved, padded, compiled, at odd sizes."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from beartype.door import is_bearable
from torch import Tensor

import medformer
from medformer import Backbone, BackboneConfig, ImageGPTConfig, ResNetConfig, TNTConfig, TNTLevel
from medformer.attention import SelfAttention

ATTENTIONS: dict[str, dict[str, Any]] = {
    "performer": {"num_features": 16},
    "softmax": {},
    "nystrom": {"num_landmarks": 6},
    "hopfield": {"hopfield_steps": 2},
    "disentangled": {},
}
MLPS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gated": {},
    "moe": {"experts": 3, "moe_every": 1, "capacity_factor": 1.0},
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "overlapping": {"patch_size": 4, "patch_stride": 2, "patch_padding": 1},
    "dilated": {"patch_size": 2, "patch_stride": 3, "patch_padding": 0, "patch_dilation": 2},
    "transposed": {"patch_size": 3, "patch_stride": 1, "patch_padding": 2, "patch_transposed": True},
    "stem": {"stem": "resnet18", "stem_stages": 1, "patch_size": 1, "patch_stride": 1, "patch_padding": 0},
}
SIZES = {"overlapping": (9, 7, 6), "dilated": (10, 9, 7), "transposed": (5, 6, 4), "stem": (13, 9, 11)}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
every_mlp = pytest.mark.parametrize("mlp", MLPS)
every_embedding = pytest.mark.parametrize("embedding", EMBEDDINGS)
every_dimension = pytest.mark.parametrize("dims", [2, 3])


def build(attention: str, mlp: str = "dense", embedding: str = "overlapping", dims: int = 3, **more: Any) -> Backbone:
    """In float64, with weights so loud that every token is visible in every output."""
    torch.manual_seed(0)
    options = {"width": 16, "depth": 1, "heads": 2, "registers": 1, "position_grid": 3, "mlp_ratio": 1.5}
    options |= {"attention": attention, "mlp": mlp, "dims": dims, **ATTENTIONS[attention], **MLPS[mlp]}
    options |= EMBEDDINGS[embedding] | more
    if options.get("position", "learned") != "learned":
        del options["position_grid"]
    model = Backbone(BackboneConfig(**options)).double()
    for name, parameter in model.named_parameters():
        if not name.startswith("stem.") and "log_beta" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def volume(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_dimension
@every_embedding
@every_mlp
@every_attention
def test_trains_and_is_saved_at_odd_sizes(attention: str, mlp: str, embedding: str, dims: int, tmp_path: Path) -> None:
    model = build(attention, mlp, embedding, dims)
    x = volume(2, 1, *SIZES[embedding][:dims]).requires_grad_()
    features = model.forward_features(x)
    assert features.grid == model.grid_of(x.shape[2:])
    assert features.patches.shape == (2, math.prod(features.grid), 16)
    outputs = (features.cls, features.registers, features.patches)
    loss = torch.stack([(t * volume(*t.shape)).sum() for t in outputs]).sum() + medformer.auxiliary_loss(model)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()
    medformer.save(model, tmp_path / "model.safetensors")
    loaded = medformer.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


@every_dimension
@every_mlp
@every_attention
@pytest.mark.parametrize("position", ["sincos", "rotary"])
def test_padding_never_changes_the_rest(attention: str, mlp: str, dims: int, position: str) -> None:
    if attention == "disentangled" and position == "rotary":
        position = "none"  # it has places of its own
    model = build(attention, mlp, dims=dims, position=position, patch_padding=0).eval()
    x = volume(3, 1, *(10, 10, 10)[:dims])
    sizes = [(10, 8, 6)[:dims], (4, 6, 8)[:dims], (10, 10, 10)[:dims]]
    grid = model.grid_of(x.shape[2:])
    mask = torch.zeros(3, *grid, dtype=torch.bool)
    for real, size in zip(mask, sizes, strict=True):
        real[tuple(slice(n) for n in model.grid_of(size))] = True
    padded = model.forward_features(x, key_padding_mask=mask.flatten(1))
    for i, size in enumerate(sizes):
        alone = model.forward_features(x[i : i + 1, :, *(slice(n) for n in size)])
        torch.testing.assert_close(padded.cls[i], alone.cls[0])
        torch.testing.assert_close(padded.registers[i], alone.registers[0])
        torch.testing.assert_close(padded.patches[i][mask[i].flatten()], alone.patches[0])


@every_dimension
@pytest.mark.parametrize("patches", [(1, 1, 0, 1), (4, 2, 1, 1), (4, 2, 0, 1), (2, 1, 1, 2)])
def test_padding_is_not_read_by_a_stem(dims: int, patches: tuple[int, ...]) -> None:
    size, stride, padding, dilation = patches
    more = {"patch_size": size, "patch_stride": stride, "patch_padding": padding, "patch_dilation": dilation}
    model = build("softmax", embedding="stem", dims=dims, position="none", **more)
    x, part = volume(2, 1, *(32, 24, 16)[:dims]), (slice(24), slice(16), slice(16))[:dims]
    mask = torch.zeros(2, *model.grid_of(x.shape[2:]), dtype=torch.bool)
    mask[0][tuple(slice(n) for n in model.grid_of([axis.stop for axis in part]))] = mask[1] = True
    padded = model.forward_features(x, key_padding_mask=mask.flatten(1))
    torch.testing.assert_close(padded.cls[0], model(x[:1, :, *part])[0])
    torch.testing.assert_close(padded.cls[1], model(x[1:])[0])


FOOTPRINTS: dict[str, Any] = {
    "overlapping": BackboneConfig(depth=1, heads=1, width=8, **EMBEDDINGS["overlapping"]),
    "dilated": BackboneConfig(depth=1, heads=1, width=8, **EMBEDDINGS["dilated"]),
    "tnt": TNTConfig(
        levels=(
            TNTLevel(width=8, depth=1, heads=1, kernel=3, stride=2, padding=1),
            TNTLevel(width=8, depth=1, heads=1, kernel=2, stride=2),
            TNTLevel(width=8, depth=1, heads=1, kernel=3, stride=1, padding=1, dilation=2),
        )
    ),
    "resnet": ResNetConfig(depth=10, base_width=32, output_stride=8),
    "stem": BackboneConfig(depth=1, heads=1, width=8, stem="resnet18", patch_size=3, patch_stride=2, patch_padding=1),
}


@pytest.mark.parametrize("kind", FOOTPRINTS)
def test_a_token_stands_for_its_footprint(kind: str) -> None:
    """Grids follow from it, and where a network has no more to see, so do the voxels that move a token."""
    model = medformer.build(FOOTPRINTS[kind]).double()
    seen = medformer.footprint(model)
    for size in ((40, 33, 29), (48, 21, 35)):
        axes = zip(size, seen.reach, seen.stride, seen.padding, strict=True)
        assert model.grid_of(size) == tuple((n + 2 * p - r) // s + 1 for n, r, s, p in axes)
    if kind in ("overlapping", "dilated"):
        x = volume(1, 1, 24, 24, 24).requires_grad_()
        model.patch_embed(x).unflatten(1, model.grid_of((24, 24, 24)))[0, 2, 1, 3].sum().backward()
        assert x.grad is not None
        for axis, token in enumerate((2, 1, 3)):
            start = token * seen.stride[axis] - seen.padding[axis]
            moved = x.grad[0, 0].abs().amax([a for a in range(3) if a != axis]).nonzero().flatten()
            assert (int(moved.min()), int(moved.max())) == (start, start + seen.reach[axis] - 1)


def test_a_transposed_embedding_has_no_footprint() -> None:
    with pytest.raises(ValueError, match="patch_transposed=True has several tokens a voxel"):
        medformer.footprint(build("softmax", embedding="transposed"))


@every_mlp
@every_attention
def test_output_does_not_depend_on_batch_mates(attention: str, mlp: str) -> None:
    model = build(attention, mlp, depth=2)
    x = volume(3, 1, 7, 9, 6)
    loud = torch.cat([x[:1], 50 * x[1:]])
    torch.testing.assert_close(model(loud)[0], model(x[:1])[0], atol=1e-10, rtol=1e-10)


@every_attention
def test_rows_are_what_the_output_is_made_of(attention: str) -> None:
    own = attention == "disentangled"
    model = build(attention, position="none" if own else "rotary", qk_norm=not own).eval()
    module = model.blocks[0].attention
    assert isinstance(module, SelfAttention)
    x, grid = volume(2, 3 * 4 * 2 + model.config.prefix, 16), (3, 4, 2)
    rotary = None if model.rotary is None else model.rotary(grid, prefix=model.config.prefix)
    context: dict[str, Any] = {"rotary": rotary, "grid": grid}
    context["key_padding_mask"] = torch.rand(2, x.shape[1], generator=torch.Generator().manual_seed(2)) > 0.2
    context["key_padding_mask"][:, 0] = True
    rows = module.attention_rows(x, range(x.shape[1]), **context)
    v = module._split(x)[2]
    mixed = module.proj((rows @ v).transpose(1, 2).flatten(2))
    real = context["key_padding_mask"]
    torch.testing.assert_close(mixed[real], module(x, **context)[real])
    assert not rows.transpose(-1, -2).masked_select(~real[:, None, :, None]).any()
    shares = torch.rand(2, 1, x.shape[1], dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(module.pull_back(x, shares, **context), shares[:, None] @ rows)


@every_attention
@pytest.mark.parametrize("class_token", [True, False])
def test_rollout_is_the_product_of_the_layers(attention: str, class_token: bool) -> None:
    model = build(attention, depth=3, class_token=class_token).eval()
    x, prefix = volume(2, 1, 6, 5, 7), model.config.prefix
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    for block in model.blocks:
        hook = lambda _, inputs, context: seen.append((inputs[0], context))  # noqa: E731
        block.attention.register_forward_pre_hook(hook, with_kwargs=True)
    model(x)
    product = torch.eye(seen[0][0].shape[1]).double()
    for block, (tokens, context) in zip(model.blocks, seen, strict=True):
        matrix = block.attention.attention_rows(tokens, range(tokens.shape[1]), **context).mean(1)
        product = (0.5 * matrix + 0.5 * torch.eye(tokens.shape[1])) @ product
    row = product[:, 0] if class_token else product[:, prefix:].mean(1)
    torch.testing.assert_close(model.rollout(x).flatten(1), row[:, prefix:])


def test_maps_of_chosen_patches_are_theirs() -> None:
    model = build("softmax").eval()
    x = volume(2, 1, 6, 6, 6)
    both = model.attention_map(x, queries=[3, -1])
    assert both.shape == (2, 2, 2, *model.grid_of((6, 6, 6)))
    torch.testing.assert_close(both[:, :, 1], model.attention_map(x, queries=[26])[:, :, 0])
    with torch.inference_mode():
        torch.testing.assert_close(model.attention_map(x, queries=[3]), both[:, :, :1])
    with pytest.raises(IndexError, match="must be patches of 27"):
        model.attention_map(x, queries=[27])


@every_attention
def test_intermediate_layers_are_the_ends_of_shorter_models(attention: str) -> None:
    model = build(attention, depth=3).eval()
    x = volume(1, 1, 6, 6, 6)
    last_two = model.get_intermediate_layers(x, 2)
    torch.testing.assert_close(last_two[1].patches, model.forward_features(x).patches)
    second = model.get_intermediate_layers(x, [1], norm=False)[0]
    del model.blocks[2]
    torch.testing.assert_close(last_two[0].cls, model(x))
    torch.testing.assert_close(model.norm(second.patches), last_two[0].patches)
    with pytest.raises(IndexError, match="layers=3 must name some of 2 blocks"):
        model.get_intermediate_layers(x, 3)


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [
        ("performer", "dense"),
        ("softmax", "moe"),
        ("nystrom", "gated"),
        ("hopfield", "dense"),
        ("disentangled", "dense"),
    ],
)
def test_one_graph_without_breaks_matches_eager(attention: str, mlp: str) -> None:
    model = build(attention, mlp, position="none" if attention == "disentangled" else "rotary").float().train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = volume(2, 1, 6, 5, 7).float()
    gradients = []
    for version in (compiled, model):
        out = version(x)
        model.zero_grad()
        (out.square().mean() + medformer.auxiliary_loss(model)).backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["tnt", "image_gpt"])
def test_other_networks_are_one_graph_too(kind: str) -> None:
    torch.manual_seed(0)
    levels = tuple(TNTLevel(width=8, depth=1, heads=2, kernel=2, stride=2) for _ in range(2))
    tnt: Any = TNTConfig(levels=levels, num_features=16)
    gpt: Any = ImageGPTConfig(vocabulary=8, grid=(3, 4), width=8, depth=1, heads=2, attention="performer")
    model = medformer.build(tnt if kind == "tnt" else gpt)
    if kind == "image_gpt":
        torch.nn.init.normal_(model.output)  # 0 at the start, which would hide all other gradients
    x = volume(2, 1, 9, 8, 7).float() if kind == "tnt" else torch.arange(24).view(2, 12) % 8
    torch._dynamo.reset()
    gradients = []
    for version in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        version(x).logsumexp(-1).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_experts_compile_to_machine_code() -> None:
    model = build("softmax", "moe").float().eval()
    x = volume(1, 1, 5, 5, 5).float()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)


@every_attention
def test_checkpointed_activations_change_nothing(attention: str) -> None:
    model = build(attention, "moe", "stem", depth=2, drop_path=0.3, router_jitter=0.1, expert_dropout=0.2).train()
    x, results = volume(2, 1, *SIZES["stem"]), []
    kept: dict[bool, int] = {False: 0, True: 0}

    def keep(tensor: Tensor) -> Tensor:
        kept[model.checkpoint_activations] += tensor.numel()
        return tensor

    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x).square().sum() + medformer.auxiliary_loss(model)
        loss.backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)
    assert kept[True] < kept[False] / 3  # in the stem too, which holds most


@pytest.mark.parametrize("head_width", [6, 8, 64])
def test_rotary_scores_depend_on_the_offset_only(head_width: int) -> None:
    from medformer.position import RotaryPosition, rotate

    rotary = RotaryPosition(head_width, 3)((4, 5, 6)).double()
    q, k = volume(1, 1, 1, head_width), volume(2, 1, 1, head_width)[1:]
    turned = [rotate(t.expand(1, 1, 120, -1), rotary)[0, 0].unflatten(0, (4, 5, 6)) for t in (q, k)]
    score = lambda a, b: (turned[0][a] * turned[1][b]).sum()  # noqa: E731
    torch.testing.assert_close(score((0, 1, 2), (2, 0, 5)), score((1, 4, 0), (3, 3, 3)), atol=1e-5, rtol=1e-5)
    assert (score((0, 1, 2), (2, 0, 5)) - score((0, 1, 2), (2, 1, 5))).abs() > 1e-3
    passing = head_width - 2 * (head_width // 6) * 3
    assert torch.equal(turned[0][3, 4, 5][head_width - passing :], q[0, 0, 0][head_width - passing :])


def test_rotary_leaves_class_and_register_tokens_alone() -> None:
    from medformer.position import RotaryPosition, rotate

    x = volume(1, 1, 14, 8)
    turned = rotate(x, RotaryPosition(8, 2)((3, 4), prefix=2).double())
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    assert not torch.isclose(turned[:, :, 3:], x[:, :, 3:]).all(-1).any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_landmarks": 3}, "num_landmarks=3 needs attention='nystrom', not 'performer'"),
        ({"attention": "nystrom", "num_landmarks": 0}, "num_landmarks=0 must be a whole number of at least 1"),
        ({"hopfield_steps": 1}, "hopfield_steps=1 needs attention='hopfield'"),
        ({"experts": 4}, "experts=4 needs mlp='moe', not 'dense'"),
        ({"mlp": "moe", "experts": 1}, "experts=1 must be a whole number of at least 2"),
        ({"mlp": "moe", "depth": 1}, "moe_every=2 must be at most depth=1"),
        ({"mlp": "moe", "capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0"),
        ({"mlp": "gated", "router_jitter": 0.1}, "router_jitter=0.1 needs mlp='moe', not 'gated'"),
        ({"mlp": "moe", "expert_dropout": 1.0}, "expert_dropout=1.0 must be at least 0 and below 1"),
        ({"stem": "vgg"}, "stem='vgg' must be one of resnet18, resnet34, resnet50, resnet101"),
        ({"stem_stages": 2}, "stem_stages=2 needs a stem"),
        ({"stem": "resnet18", "stem_stages": 5}, "stem_stages=5 must be at most 4"),
        ({"position": "rotary", "heads": 96}, "heads=96 leaves 4 channels to a head; position='rotary' needs 6"),
        ({"position": "rotary", "attention": "disentangled"}, "position='rotary' has no place in attention='dis"),
        ({"qk_norm": True, "attention": "disentangled"}, "qk_norm=True has no place in attention='disentangled'"),
        ({"classes": -1}, "classes=-1 must be a whole number of at least 0"),
    ],
)
def test_impossible_config_is_refused_when_built(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^BackboneConfig: .*{message}"):
        BackboneConfig(**overrides)


BASES: list[tuple[type, dict[str, Any]]] = [
    (BackboneConfig, {"width": 24, "depth": 2, "heads": 2}),
    (ResNetConfig, {}),
    (ImageGPTConfig, {"grid": (4, 4), "patch": (1, 1)}),
]
MOE = ("experts", "moe_every", "capacity_factor", "expert_dropout", "router_jitter")
OWNERS = {
    "num_landmarks": {"attention": "nystrom"}, "hopfield_steps": {"attention": "hopfield"},
    "max_span": {"attention": "expire_span"}, "num_features": {"attention": "performer"},
    "stem_stages": {"stem": "resnet18"}, **{name: {"mlp": "moe"} for name in MOE},
}  # fmt: skip
WRONG = (None, "x", -1, 0, 1.5, 2.0, math.nan, math.inf, True, (), [], (1,), [2, 2, 2, 2], ("a", "b", "c"), {}, b"a")


@pytest.mark.parametrize(("kind", "field"), [(k, f.name) for k, _ in BASES for f in dataclasses.fields(k)])
def test_no_field_takes_what_it_cannot_use(kind: type, field: str) -> None:
    hint = get_type_hints(kind)[field]
    fits = lambda value: is_bearable(value, hint | int if is_bearable(0.5, hint) else hint)  # noqa: E731
    taken, refusals = [], []
    for value in WRONG:
        options = dict(BASES)[kind] | OWNERS.get(field, {}) | {field: value}
        try:
            kind(**options)
            taken.append(value)
        except ValueError as error:
            refusals.append(str(error))
    assert [value for value in taken if not fits(value) or (value is True and hint is not bool)] == []
    assert len(refusals) >= len(WRONG) // 2
    assert [r for r in refusals if not r.startswith(f"{kind.__name__}: ") or field not in r or "\n" in r] == []


def test_numbers_may_be_written_whole() -> None:
    assert build("softmax", layer_scale=1, mlp_ratio=2, drop_path=0)(volume(1, 1, 4, 4, 4)).isfinite().all()


def test_looking_at_files_needs_no_pytorch() -> None:
    """Processes that read headers take 0.4 s of processor time and 54 MiB without it, 2.6 s and 740 MiB with it."""
    code = "import sys, medformer.commands, medformer.data.inspect_folder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["embed", "describe", "footprint"])
def test_a_function_outranks_the_module_of_its_name(name: str) -> None:
    code = f"import medformer.{name}, medformer; assert callable(medformer.{name}); medformer.Backbone"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_offers_what_its_list_says_and_nothing_else() -> None:
    assert set(medformer.api.__all__) <= set(dir(medformer))
    assert all(getattr(medformer, name) is getattr(medformer.api, name) for name in medformer.api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = medformer.nothing
    assert not hasattr(medformer, "__wrapped__")
