"""Transformers in transformers: sizes, windows, fusion, timm's weights, what does not fit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from medformer.tnt import TNT, TNTConfig, TNTLevel, tnt_base, tnt_from_timm, tnt_small
from medformer.tnt.windows import windows

FINE: dict[str, Any] = {"width": 12, "depth": 2, "heads": 2, "kernel": 3, "stride": 2, "padding": 1}
MIDDLE: dict[str, Any] = {"width": 24, "depth": 2, "heads": 4, "kernel": 2, "stride": 2}
COARSE: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "kernel": 2, "stride": 1}


def build(*levels: dict[str, Any], **overrides: Any) -> TNT:
    torch.manual_seed(0)
    options = {"attention": "softmax", "dims": 3, "norm_eps": 1e-5} | overrides
    model = TNT(TNTConfig(levels=tuple(TNTLevel(**level) for level in levels), **options)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def scan(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("make", "count"), [(tnt_small, 23_755_336), (tnt_base, 65_406_600)])
def test_parameter_counts_are_those_published(make, count: int) -> None:
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("attention", ["softmax", "performer", "nystrom", "disentangled"])
def test_three_levels_train_a_step_in_3d(attention: str) -> None:
    torch.manual_seed(0)
    levels = tuple(TNTLevel(**level) for level in (FINE, MIDDLE, COARSE))
    model = TNT(TNTConfig(levels=levels, attention=attention, classes=3, num_landmarks=4, dropout=0.1, drop_path=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, labels = scan(2, 1, 12, 13, 16).float(), torch.tensor([0, 2])
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (17, 8)])
def test_any_size_that_holds_a_window(size: tuple[int, int]) -> None:
    model = build(FINE, MIDDLE, dims=2, in_channels=2)
    features = model.forward_features(scan(2, 2, *size))
    assert features.grid == model.grid_of(size) == tuple(((n - 1) // 2 + 1) // 2 for n in size)
    assert features.patches.shape == (2, features.grid[0] * features.grid[1], 24)
    assert features.cls.shape == (2, 24)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [((2, 3), (2, 3), (0, 0), (1, 1)), ((3, 2), (2, 1), (1, 0), (1, 2))]
)
def test_windows_are_those_of_a_convolution(kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    x = scan(2, 7, 8, 5)  # (B, gy, gx, P)
    found = windows(x, kernel, stride, padding, dilation)
    expected = torch.nn.functional.unfold(x.movedim(-1, 1), kernel, dilation, padding, stride)  # (B, P n, L)
    expected = expected.unflatten(1, (5, -1)).permute(0, 3, 2, 1).flatten(2)
    torch.testing.assert_close(found.flatten(1, -2), expected)


def by_loops(model: TNT, x: Tensor) -> Tensor:
    """The last level's patch tokens of a two-level 2D model, window by window."""
    config = model.config
    fine = model.conv(x)[0]  # (c, gy, gx)
    grid = model.grid_of(x.shape[2:])
    k, s, p, d = (config.axes(1, name)[0] for name in ("kernel", "stride", "padding", "dilation"))
    fine = torch.nn.functional.pad(fine, (p, p, p, p))
    reach = d * (k - 1) + 1
    inner, outer = [], []
    for row, column in itertools.product(*map(range, grid)):
        window = fine[:, row * s : row * s + reach : d, column * s : column * s + reach : d]
        tokens = window.flatten(1).t() + model.positions[0]
        inner.append(tokens[None])
        stem = model.stems[0]
        start = (
            stem(tokens[None])[0] if config.levels[1].fusion != "replace" else tokens.new_zeros(config.levels[1].width)
        )
        outer.append(start)
    last = torch.stack(outer)[None] + model.position(grid)
    last = torch.cat([(model.class_token + model.position.cls).expand(1, 1, -1), last], 1)  # type: ignore[operator]
    for stage in model.stages:
        inner = [stage.inner[0][0](tokens) for tokens in inner]
        taken = torch.cat([stage.fusions[0](tokens) for tokens in inner])
        last = torch.cat([last[:, :1], last[:, 1:] + taken], 1)
        last = stage.outer(last, grid=grid)
    return model.norm(last)[:, 1:]


@pytest.mark.parametrize("projection", ["token", "window"])
@pytest.mark.parametrize("fusion", ["add", "replace", "raw"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_model_is_its_windows_one_by_one(dilation: int, fusion: str, projection: str) -> None:
    window = {"kernel": 2, "stride": 1, "padding": dilation - 1, "dilation": dilation}
    coarse = {"width": 48, "depth": 2, "heads": 2, "fusion": fusion, **window}
    model = build(FINE, coarse, dims=2, projection=projection).eval()
    x = scan(1, 1, 7, 9)
    torch.testing.assert_close(model.forward_features(x).patches, by_loops(model, x))


def test_raw_fusion_has_no_linear_layer_and_replace_no_embedding() -> None:
    def count(fusion: str) -> int:
        coarse = {"width": 48, "depth": 2, "heads": 2, "kernel": 2, "stride": 1, "fusion": fusion}
        return sum(parameter.numel() for parameter in build(FINE, coarse, dims=2).parameters())

    linear = 48 * 48 + 48
    assert count("add") - count("replace") == 2 * 48 + linear + 2 * 48  # the stem: norm, linear, norm
    assert count("add") - count("raw") == 3 * linear + 4 * 48 - 2 * 12


@pytest.mark.parametrize("dims", [2, 3])
def test_four_levels_each_with_its_own_window_and_fusion(dims: int) -> None:
    levels = (
        {"width": 6, "depth": 1, "heads": 1, "kernel": 3, "stride": 1, "padding": 2, "dilation": 2},
        {"width": 12, "depth": 2, "heads": 2, "kernel": 2, "stride": 2, "fusion": "replace"},
        {"width": 24, "depth": 1, "heads": 4, "kernel": 2, "stride": 1, "dilation": 3},
        {"width": 24 * 2**dims, "depth": 2, "heads": 2, "kernel": 2, "stride": 1, "padding": 1, "fusion": "raw"},
    )
    model = build(*levels, dims=dims)
    out = model.forward_features(scan(1, 1, *[9] * dims))
    assert out.grid == (2,) * dims
    out.patches.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_depths_may_differ_and_are_interleaved_evenly() -> None:
    model = build(FINE | {"depth": 1}, MIDDLE | {"depth": 5}, COARSE | {"depth": 3})
    depths = [[len(blocks) for blocks in stage.inner] for stage in model.stages]  # type: ignore[union-attr]
    assert depths == [[0, 1], [0, 2], [1, 2]]
    out = model(scan(1, 1, 12, 12, 12))
    out.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters())


def test_a_voxel_reaches_the_tokens_whose_windows_see_it() -> None:
    model = build(FINE | {"kernel": 2, "stride": 2, "padding": 0}, COARSE | {"kernel": 2, "stride": 2}, dims=2).eval()
    x = scan(1, 1, 12, 12)
    levels = model._embed(x)
    x[0, 0, 5, 5] += 1.0
    changed = model._embed(x)
    assert (levels[0] != changed[0]).any((1, 2)).nonzero().flatten().tolist() == [4]  # window (1, 1) of 3 x 3
    assert (levels[1] != changed[1])[0].any(1).nonzero().flatten().tolist() == [5]  # behind the class token


def test_checkpointing_changes_no_gradient() -> None:
    model = build(FINE, MIDDLE, COARSE).train()
    x = scan(1, 1, 12, 12, 12)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.checkpoint_activations = True
    again = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention", ["softmax", "performer", "nystrom", "disentangled"])
def test_padding_never_changes_the_rest(attention: str) -> None:
    model = build(FINE | {"padding": 0}, MIDDLE, dims=2, attention=attention, num_landmarks=3, class_token=False).eval()
    torch.nn.init.zeros_(model.position.patches)  # those of the whole grid would differ from those of a part
    x = scan(2, 1, 17, 17)
    mask = torch.zeros(2, *model.grid_of((17, 17)), dtype=torch.bool)
    mask[0, :2, :3] = mask[1] = True
    padded = model.forward_features(x, key_padding_mask=mask.flatten(1))
    alone = model.forward_features(x[:1, :, :9, :13])
    assert alone.grid == (2, 3)
    torch.testing.assert_close(padded.cls[0], alone.cls[0])
    torch.testing.assert_close(padded.patches[0][mask[0].flatten()], alone.patches[0])
    with pytest.raises(ValueError, match=r"TNT: key_padding_mask of shape \(2, 3\).*must be bool of shape \(2, 16\)"):
        model.forward_features(x, key_padding_mask=mask[:, 0, :3])


def test_maps_are_the_rows_of_the_last_level() -> None:
    model = build(FINE, COARSE, dims=2).eval()
    x = scan(2, 1, 9, 11)
    seen: list[Tensor] = []
    outer = model.stages[1].outer
    outer.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    grid = model.forward_features(x).grid
    rows = outer.attention.attention_rows(seen[0], [0, 3], grid=grid)[..., 1:].unflatten(-1, grid)
    torch.testing.assert_close(model.attention_map(x), rows[:, :, 0])
    torch.testing.assert_close(model.attention_map(x, layer=1, queries=[2]), rows[:, :, 1:])
    assert not torch.equal(model.attention_map(x, layer=0), rows[:, :, 0])
    with pytest.raises(IndexError, match=r"TNT\.attention_map: layer=2 must be from -2 to 1"):
        model.attention_map(x, layer=2)


def test_intermediate_layers_are_the_ends_of_shorter_models() -> None:
    model = build(FINE, COARSE, dims=2).eval()
    x = scan(1, 1, 9, 11)
    first, last = model.get_intermediate_layers(x, 2)
    torch.testing.assert_close(last.patches, model.forward_features(x).patches)
    del model.stages[1]
    torch.testing.assert_close(first.cls, model(x))


@pytest.mark.parametrize("name", ["tnt_s_legacy_patch16_224", "tnt_s_patch16_224", "tnt_b_patch16_224"])
def test_timm_weights_load_and_outputs_agree(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=10).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = theirs.double()
    ours = tnt_from_timm(theirs.state_dict()).double().eval()
    x = scan(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        assert ours(x[:, :, :130, :64]).shape == (1, 10)


def test_weights_of_another_model_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"tnt_from_timm: patch_pos, pixel_pos, .* missing; give state_dict\(\)"):
        tnt_from_timm({"pixel_embed.proj.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "mix"}, "level 1: fusion='mix' must be one of add, replace, raw"),
        ({"heads": 5}, "level 1: heads=5 must divide width=24; use 4 or 6"),
        ({"kernel": (2, 2)}, r"level 1: kernel=\(2, 2\) must be one number or 3"),
        ({"kernel": 2.0}, r"level 1: kernel=2.0 must be one number or 3"),
        ({"stride": 0}, "level 1: stride=0 must be a whole number of at least 1"),
        ({"padding": 2}, "level 1: padding=2 must be below the window's reach of 2"),
        ({"fusion": "raw"}, "level 1: width=24 must be 96 with fusion='raw': 8 tokens of 12 channels"),
        ({"mlp_ratio": 0.0}, "level 1: mlp_ratio=0.0 must leave"),
    ],
)
def test_impossible_levels_are_refused_by_number(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TNTConfig(levels=(TNTLevel(**FINE), TNTLevel(**(MIDDLE | change))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": (TNTLevel(**FINE),)}, "levels has 1 entries; it must have at least 2"),
        (
            {"levels": (FINE, MIDDLE | {"fusions": "raw"})},
            "level 1: fusions is unknown; a level has width, depth, heads",
        ),
        ({"levels": (FINE, {"depth": 2})}, "level 1: width is missing"),
        ({"levels": (FINE, 24)}, "level 1: 24 must be a TNTLevel"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0"),
        ({"position_grid": (8, 8)}, r"position_grid=\(8, 8\) must be one number of at least 1, or 3"),
        ({"dims": 4}, "dims=4 must be 2 or 3"),
        ({"attention": "linear"}, "attention='linear' must be one of performer, nystrom, softmax, disentangled"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"levels": ({"width": 12, "fusion": "raw"}, MIDDLE)}, "level 0: fusion='raw' has no level below"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"TNTConfig: {message}"):
        TNTConfig(**({"levels": (TNTLevel(**FINE), TNTLevel(**MIDDLE))} | change))


def test_inputs_that_do_not_fit_are_refused_by_level() -> None:
    model = build(FINE, MIDDLE, COARSE)
    with pytest.raises(
        ValueError, match=r"level 2: a window reaching over 2 tokens of level 1 does not fit the grid \(1, 4, 4\)"
    ):
        model(scan(1, 1, 5, 16, 16))
    with pytest.raises(ValueError, match=r"size=\(8, 8\) must have 3 axes"):
        model.grid_of((8, 8))
    with pytest.raises(ValueError, match=r"x of shape \(1, 2, 8, 8, 8\).*\(B, 1, Z, Y, X\)"):
        model(scan(1, 2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"must be floating point \(B, 1, Z, Y, X\)"):
        model(scan(1, 8, 8, 8))
