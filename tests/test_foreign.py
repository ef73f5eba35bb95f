"""Published weights: names, wrappings, inflation to 3D, and what does not fit.

`layouts.json` holds, for each layout, names and shapes of a small network of its own code, and outputs of that code for
tensors that `made` fills; which code, and how far ours lie from it, is in misc/docs/weights.md. timm and transformers
are oracles here where they are installed.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import medformer
from medformer import ResNet, ResNetConfig

WIDTH, HIDDEN, DEPTH, PATCH, SIDE = 128, 64, 2, 4, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit_state(*, registers: int = 0, dino: bool = False, classes: int = 0, gated: bool = False) -> dict[str, Tensor]:
    """A small ViT under the names of timm (or DINOv2)."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + SIDE**2, WIDTH), "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        up, down = ("w12", "w3") if gated else ("fc1", "fc2")
        shapes |= {
            f"blocks.{i}.norm1.weight": (WIDTH,), f"blocks.{i}.norm1.bias": (WIDTH,),
            f"blocks.{i}.norm2.bias": (WIDTH,),
            f"blocks.{i}.norm2.weight": (WIDTH,), f"blocks.{i}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.qkv.bias": (3 * WIDTH,), f"blocks.{i}.attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{i}.attn.proj.bias": (WIDTH,), f"blocks.{i}.mlp.{up}.weight": (HIDDEN * (1 + gated), WIDTH),
            f"blocks.{i}.mlp.{up}.bias": (HIDDEN * (1 + gated),), f"blocks.{i}.mlp.{down}.weight": (WIDTH, HIDDEN),
            f"blocks.{i}.mlp.{down}.bias": (WIDTH,),
        }  # fmt: skip
        if dino:
            shapes |= {f"blocks.{i}.ls{j}.gamma": (WIDTH,) for j in (1, 2)}
    if dino:
        shapes["mask_token"] = (1, WIDTH)
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    if classes:
        shapes |= {"head.weight": (classes, WIDTH), "head.bias": (classes,)}
    return {name: 0.1 * random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def vit(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published forward pass, in functions: all tokens after the last norm."""
    tokens = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens.flatten(2).mT], 1) + state["pos_embed"]
    if "register_tokens" in state:
        tokens = torch.cat([tokens[:, :1], state["register_tokens"].expand(len(x), -1, -1), tokens[:, 1:]], 1)
    norm = lambda t, name: F.layer_norm(t, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)  # noqa: E731
    linear = lambda t, name: F.linear(t, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    for i in range(DEPTH):
        block = f"blocks.{i}"
        q, k, v = linear(norm(tokens, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, 2, 64)).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
        tokens = tokens + linear(mixed, f"{block}.attn.proj") * state.get(f"{block}.ls1.gamma", 1)
        normed = norm(tokens, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in state:
            gate, value = linear(normed, f"{block}.mlp.w12").chunk(2, -1)
            out = linear(F.silu(gate) * value, f"{block}.mlp.w3")
        else:
            out = linear(F.gelu(linear(normed, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        tokens = tokens + out * state.get(f"{block}.ls2.gamma", 1)
    return norm(tokens, "norm")


KINDS: list[dict[str, Any]] = [{}, {"dino": True, "registers": 4}, {"dino": True, "gated": True}]


@pytest.mark.parametrize("kind", KINDS)
def test_2d_features_are_those_of_the_original(kind: dict[str, Any]) -> None:
    state = vit_state(**kind)
    model = medformer.load_vit(state, heads=2).eval()
    x = random(2, 3, PATCH * SIDE, PATCH * SIDE, seed=99)
    features = model.forward_features(x)
    tokens = torch.cat([features.cls[:, None], features.registers, features.patches], 1)
    torch.testing.assert_close(tokens, vit(state, x), atol=1e-4, rtol=1e-4)
    assert model.config.heads == 2
    assert model.config.registers == kind.get("registers", 0)


def test_head_is_taken_over() -> None:
    state = vit_state(classes=5)
    x = random(2, 3, PATCH * SIDE, PATCH * SIDE, seed=99)
    logits = F.linear(vit(state, x)[:, 0], state["head.weight"], state["head.bias"])
    torch.testing.assert_close(medformer.load_vit(state, heads=2).eval()(x), logits, atol=1e-4, rtol=1e-4)


def test_a_volume_alike_along_z_gives_what_its_image_gives() -> None:
    """Inflated weights, on a volume one patch deep that repeats a grey image."""
    state = vit_state(dino=True, registers=4)
    model = medformer.load_vit(state, dims=3, heads=2).eval()
    assert model.config.in_channels == 1
    assert model.config.base_grid == (SIDE,) * 3
    image = random(2, 1, PATCH * SIDE, PATCH * SIDE, seed=99)
    tokens = vit(state, image.expand(-1, 3, -1, -1))
    features = model.forward_features(image[:, :, None].expand(-1, -1, PATCH, -1, -1))
    torch.testing.assert_close(features.cls, tokens[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.patches, tokens[:, 5:], atol=1e-4, rtol=1e-4)


def test_overrides_change_the_model_around_the_weights() -> None:
    model = medformer.load_vit(
        vit_state(), heads=2, dims=3, attention="performer", patch_stride=2, position="rotary", strict=True
    )
    assert model(torch.zeros(1, 1, 8, 9, 10)).shape == (1, WIDTH)


def test_files_and_wrappings_are_read(tmp_path: Path) -> None:
    state = vit_state()
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "vit.pth")
    x = random(1, 3, 12, 12)
    outs = [
        medformer.load_vit(source, heads=2).eval()(x)
        for source in (state, tmp_path / "vit.safetensors", tmp_path / "vit.pth")
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_every_tensor_without_a_place_is_named() -> None:
    state = vit_state() | {"extra.weight": torch.zeros(3), "norm.weight": torch.zeros(7)}
    del state["blocks.1.norm1.bias"]
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        medformer.load_vit(state, heads=2)
    for part in (
        "blocks.1.norm1.bias is missing",
        "extra.weight is unknown",
        "norm.weight has shape (7,) instead of",
    ):
        assert part in str(error.value)
    with pytest.warns(UserWarning, match=r"extra\.weight is unknown"):
        model = medformer.load_vit(state, heads=2, strict=False)
    assert torch.equal(model.norm.weight, torch.ones(WIDTH))


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_vit: the weights have none of patch_embed\.proj\.weight"):
        medformer.load_vit({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"load_resnet: the weights have no conv1\.weight"):
        medformer.load_resnet(vit_state())
    with pytest.raises(FileNotFoundError, match=r"none\.pth are not a file"):
        medformer.load_vit(tmp_path / "none.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match=r"broken\.safetensors are damaged"):
        medformer.load_vit(tmp_path / "broken.safetensors")


def small_resnet(**options: Any) -> ResNet:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(**{"norm": "batch", "base_width": 8, **options}))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
    return model.eval()


@pytest.mark.parametrize(
    ("depth", "shortcut", "dims"), [(18, "pad", 3), (34, "conv", 2), (50, "conv", 2), (10, "conv", 3)]
)
def test_depth_and_shortcuts_follow_from_the_weights(depth: int, shortcut: str, dims: int) -> None:
    model = small_resnet(depth=depth, shortcut=shortcut, dims=dims)
    state = {f"module.{k}": v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    loaded = medformer.load_resnet({"state_dict": state}).eval()  # type: ignore[dict-item]
    assert loaded.config == model.config
    x = random(1, 1, *(33, 30, 31)[:dims])
    torch.testing.assert_close(loaded(x), model(x))


def test_an_inflated_convolution_sees_a_volume_alike_along_z_as_its_image() -> None:
    flat = small_resnet(depth=18, dims=2, in_channels=3)
    deep = medformer.load_resnet(flat.state_dict(), dims=3, in_channels=1).eval()
    image = random(1, 1, 40, 40)
    wanted = flat.bn1(flat.conv1(image.expand(-1, 3, -1, -1)))
    found = deep.bn1(deep.conv1(image[:, :, None].expand(-1, -1, 15, -1, -1)))
    torch.testing.assert_close(found[:, :, 3], wanted, atol=1e-4, rtol=1e-4)


def test_a_segmentation_head_needs_strict_false() -> None:
    state = small_resnet(depth=10, output_stride=8).state_dict() | {"conv_seg.0.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"conv_seg\.0\.weight is unknown"):
        medformer.load_resnet(state)
    with pytest.warns(UserWarning, match="conv_seg"):
        model = medformer.load_resnet(state, strict=False, output_stride=8)
    assert model.grid_of((64, 64, 64)) == (8, 8, 8)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_matches_timm_vits(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is an oracle where it is installed")
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=10 if "dino" not in name else 0, img_size=56, depth=3).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    ours = medformer.load_vit(theirs.state_dict()).eval()
    x = random(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_matches_timm_resnets(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is an oracle where it is installed")
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=10).eval()
    ours = medformer.load_resnet(theirs.state_dict()).eval()
    x = random(1, 3, 65, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


LAYOUTS = json.loads((Path(__file__).parent / "layouts.json").read_text())


def made(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same numbers on every machine: a wave that starts by the name."""
    start = zlib.crc32(name.encode()) % 1000
    wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (0.7 + start / 1000) + start)
    wave = wave.float().reshape(shape)
    if len(shape) > 1:
        return 0.25 * wave
    gain = name.endswith(("weight", "gamma", "lambda1", "gamma_1", "gamma_2"))
    return 1 + 0.2 * wave if gain else 0.2 * wave


def state_of(layout: str) -> dict[str, Tensor]:
    about = LAYOUTS[layout]
    kept = {name: torch.tensor(values) for name, values in about["kept"].items()}
    return {name: kept.get(name, made(name, tuple(shape))) for name, shape in about["shapes"].items()}


def tokens_of(model: Any, x: Tensor) -> Tensor:
    features = model.forward_features(x)
    cls = [features.cls[:, None]] if model.config.class_token else []
    return torch.cat([*cls, features.registers, features.patches], 1)


def compared(layout: str, model: Any) -> float:
    """Largest difference from the numbers of the layout's own code."""
    about = LAYOUTS[layout]
    x = made("input", tuple(about["input"]))
    x = x[:, None] if x.ndim == 4 and model.config.dims == 3 else x  # VoxelFM takes volumes without channels
    with torch.no_grad():
        found = tokens_of(model.eval(), x)
    assert list(found.shape) == about["tokens"]
    flat = found.flatten()
    return (flat[:: max(1, flat.numel() // 40)] - torch.tensor(about["expected"])).abs().max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_that_of_the_layouts_own_code(layout: str) -> None:
    state, options = state_of(layout), {"axes": "as_saved", **LAYOUTS[layout]["options"]}
    if layout == "mocov3":
        state = {f"module.base_encoder.{name}": tensor for name, tensor in state.items()}
    model = medformer.load_pretrained(state, **options)
    assert model.origin.layout == layout.partition(" ")[0]
    assert compared(layout, model) < 1e-4
    if options.get("heads"):  # the number matters: nothing here passes by chance
        assert compared(layout, medformer.load_pretrained(state, **options | {"heads": 2})) > 1e-2


@pytest.mark.parametrize("layout", ["3dino", "spectre"])
def test_volumes_in_zyx_give_what_xyz_gave(layout: str) -> None:
    """Tables, kernels and rotary channels are turned together."""
    state, options = state_of(layout), LAYOUTS[layout]["options"]
    x = made("input", tuple(LAYOUTS[layout]["input"]))
    turned = medformer.load_pretrained(state, **options).eval().forward_features(x.permute(0, 1, 4, 3, 2))
    saved = medformer.load_pretrained(state, axes="as_saved", **options).eval().forward_features(x)
    assert turned.grid == saved.grid[::-1]
    torch.testing.assert_close(turned.cls, saved.cls, atol=1e-5, rtol=1e-5)
    back = turned.patches.unflatten(1, turned.grid).permute(0, 3, 2, 1, 4).flatten(1, 3)
    torch.testing.assert_close(back, saved.patches, atol=1e-5, rtol=1e-5)


WRAPPINGS: dict[str, Any] = {
    "torch.compile": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()},
    "DDP and compile": lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    "Lightning": lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}, "epoch": 3},
    "encoder": lambda s: {f"encoder.{n}": t for n, t in s.items()},
    "teacher and student": lambda s: {
        "model": {f"{who}.backbone.{n}": t + (who == "student") for n, t in s.items() for who in ("student", "teacher")}
    },
    "EMA": lambda s: {"model": {n: t + 1 for n, t in s.items()}, "model_ema": s},
    "a head of DINO": lambda s: {
        "teacher": {f"backbone.{n}": t for n, t in s.items()} | {"head.last_layer.weight_v": torch.zeros(2, 2)}
    },
    "a head next to the blocks": lambda s: s | {"head.mlp.0.weight": torch.zeros(2, 2), "dino_head.x": torch.zeros(1)},
    "chunks": lambda s: {
        (f"blocks.{int(n.split('.')[1]) // 2}.{n.removeprefix('blocks.')}" if n.startswith("blocks.") else n): t
        for n, t in s.items()
    },
    "FSDP": lambda s: {n.replace("blocks.", "blocks._fsdp_wrapped_module."): t for n, t in s.items()},
    "optimiser": lambda s: {"net": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "Lightly": lambda s: {f"backbone.vit.{n}": t for n, t in s.items()} | {"backbone.mask_token": torch.zeros(1, 1, 3)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_are_peeled(wrapping: str) -> None:
    layout = "vit (dino)"
    state = WRAPPINGS[wrapping](state_of(layout))
    model = medformer.load_pretrained(state, heads=4)
    assert compared(layout, model) < 1e-4
    assert ("left out" in str(model.origin)) == (
        wrapping
        in ("teacher and student", "EMA", "a head of DINO", "a head next to the blocks", "optimiser", "Lightly")
    )


def test_two_encoders_that_nothing_tells_apart_are_asked_about() -> None:
    state = {f"{half}.{n}": t for n, t in state_of("vit (dino)").items() for half in ("left", "right")}
    with pytest.raises(ValueError, match=r"several encoders, left\., right\.; choose with prefix="):
        medformer.load_pretrained(state, heads=4)
    assert compared("vit (dino)", medformer.load_pretrained(state, heads=4, prefix="right")) < 1e-4
    with pytest.raises(ValueError, match=r"prefix='middle\.' leads to no encoder"):
        medformer.load_pretrained(state, heads=4, prefix="middle")


def test_what_decides_numbers_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"layout vit, 48 wide, says heads; give heads= .*config="):
        medformer.load_pretrained(state_of("vit (dino)"))
    siglip = state_of("timm-siglip")
    with pytest.raises(ValueError, match=r"says heads, activation; give heads= .*; activation= "):
        medformer.load_pretrained(siglip)
    with pytest.raises(ValueError, match=r"heads=5 \(argument\) must divide the width 48"):
        medformer.load_pretrained(siglip, heads=5, activation="gelu")
    with pytest.raises(ValueError, match=r"pos_embed of 25 rows must be a square.*position_grid="):
        medformer.load_pretrained(state_of("vit (timm, 16 by 24)"), heads=4)
    volume = small_resnet(depth=10).state_dict()
    with pytest.raises(ValueError, match=r"step or dilate; give layout='medicalnet'"):
        medformer.load_pretrained(volume)
    assert medformer.load_pretrained(volume, "medicalnet").config.output_stride == 8
    assert medformer.load_pretrained(volume, output_stride=32).config.output_stride == 32


@pytest.mark.parametrize(
    ("width", "depth", "heads"),
    [(192, 12, 3), (384, 12, 6), (768, 12, 12), (1280, 32, 16), (768, 8, None), (96, 2, None)],
)
def test_heads_are_those_of_the_published_models(width: int, depth: int, heads: int | None) -> None:
    from medformer.weights.layouts import LAYOUTS as KNOWN
    from medformer.weights.reading import Weights
    from medformer.weights.vit import _settings

    layout = next(one for one in KNOWN if one.name == "vit")
    weights = Weights({}, {}, "")
    if heads is None:
        with pytest.raises(ValueError, match=f"{width} wide, says heads"):
            _settings("f", weights, layout, {}, width, depth, 2, False, {})
    else:
        assert _settings("f", weights, layout, {}, width, depth, 2, False, {})[0]["heads"] == heads


def test_fixed_positions_384_wide_may_be_mocos_12_heads() -> None:
    from medformer.weights.layouts import LAYOUTS as KNOWN
    from medformer.weights.reading import Weights
    from medformer.weights.vit import _settings

    layout = next(one for one in KNOWN if one.name == "vit")
    table = torch.ones(1, 5, 384)
    table[:, 0] = 0
    state = {"pos_embed": table, "class_token": torch.zeros(384)}
    with pytest.raises(ValueError, match="says heads"):
        _settings("f", Weights({}, {}, ""), layout, state, 384, 12, 2, False, {})


def test_a_config_next_to_the_file_says_heads_and_epsilon(tmp_path: Path) -> None:
    torch.save(state_of("vit (dino)"), tmp_path / "weights.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "layer_norm_eps": 1e-5}))
    for source in (tmp_path, tmp_path / "weights.pth"):
        model = medformer.load_pretrained(source)
        assert (model.config.heads, model.config.norm_eps) == (4, 1e-5)
        assert "4 (config)" in str(model.origin)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        medformer.load_pretrained(tmp_path)


def test_a_repository_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub needs pip install 'medformer[hub]'")

    def refuse(*args: Any) -> bool:
        raise ConnectionError("[Errno -2] Name or service\n not known")

    monkeypatch.setattr(hub, "file_exists", refuse)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    for load in (medformer.load_pretrained, medformer.load):
        with pytest.raises(ValueError, match=r"hf:no/thing cannot be fetched \(ConnectionError: .* not known\); check"):
            load("hf:no/thing")


def test_a_repository_of_the_hub_is_read_with_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub needs pip install 'medformer[hub]'")
    safetensors.torch.save_file(state_of("vit (dino)"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "file_exists", lambda repository, file: True)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert compared("vit (dino)", medformer.load_pretrained("hf:facebook/dino")) < 1e-4
    assert asked == [("facebook/dino", "config.json"), ("facebook/dino", "model.safetensors")]
    with pytest.raises(ValueError, match="hf:dino must be hf:owner/name"):
        medformer.load_pretrained("hf:dino")


def test_own_checkpoints_load_too(tmp_path: Path) -> None:
    model = medformer.load_pretrained(state_of("dinov3")).eval()
    medformer.save(model, tmp_path / "ours.safetensors")
    again = medformer.load_pretrained(tmp_path / "ours.safetensors")
    assert again.config == model.config
    assert compared("dinov3", again) < 1e-4


class Custom:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Custom(), r"hold objects of its own \(.*Custom\), and unpickling those runs code, which is refused"),
        ({"epoch": 3, "loss": [1.0]}, "holds no tensors"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, "none of patch_embed"),
        ({"features.0.0.conv1.weight": torch.zeros(1), "relative_position_bias_table": torch.zeros(1)}, "Swin"),
        ({"encoder.stages.0.blocks.0.conv1.conv.weight": torch.zeros(1)}, "ResEnc-L"),
        ({"eva.blocks.0.attn.q_proj.weight": torch.zeros(1)}, "Primus"),
        ({"model.1.weight": torch.zeros(1)}, "anatomix"),
    ],
)
def test_files_that_are_no_encoder_are_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as error:
        medformer.load_pretrained(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


def test_harmless_objects_next_to_tensors_are_read(tmp_path: Path) -> None:
    import numpy as np

    more = {"args": argparse.Namespace(lr=1.0), "best": np.float64(0.5), "curve": np.zeros(3)}
    torch.save({"teacher": state_of("vit (dino)"), **more}, tmp_path / "weights.pth")
    assert compared("vit (dino)", medformer.load_pretrained(tmp_path / "weights.pth", heads=4)) < 1e-4


def test_a_layout_that_is_named_must_fit() -> None:
    state = state_of("dinov3")
    with pytest.raises(ValueError, match=r"layout='transformers' does not fit the tensors; they look like 'dinov3'"):
        medformer.load_pretrained(state, "transformers")
    with pytest.raises(ValueError, match=r"layout='medicalnet' has layer4.*they look like 'dinov3'"):
        medformer.load_pretrained(state, "medicalnet")
    with pytest.raises(ValueError, match=r"layout='dino5' must be one of flexict"):
        medformer.load_pretrained(state, "dino5")
    with pytest.raises(ValueError, match="dims=3 has no place in layout dinov3"):
        medformer.load_pretrained(state, dims=3)
    with pytest.raises(ValueError, match="dims=2 must be 3"):
        medformer.load_vit(state_of("3dino"), heads=4)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [("norm_pre.weight", "CLIP"), ("blocks.0.mlp.norm.weight", "EVA-02"), ("patch_embed.norm.weight", "behind")],
)
def test_blocks_that_are_not_ours_are_refused(tensor: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        medformer.load_pretrained(state_of("vit (dino)") | {tensor: torch.ones(48)}, heads=4)


def test_networks_of_timm_that_turn_queries_in_secret_are_refused() -> None:
    """Eva with a table and rotary positions holds the names of a ViT, and buffers that no file has."""
    state = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in
             state_of("vit (timm deit3, positions of patches alone)").items()}  # fmt: skip
    with pytest.raises(ValueError, match="of no known layout"):
        medformer.load_pretrained(state, heads=4)


def test_biases_of_queries_and_values_alone_are_read() -> None:
    """As timm's Eva saves them: keys have none."""
    state = state_of("timm-dinov3")
    q, v = random(48, seed=1), random(48, seed=2)
    biased = {**state, "blocks.0.attn.q_bias": q, "blocks.0.attn.v_bias": v}
    plain = medformer.load_pretrained(state, heads=4)
    model = medformer.load_pretrained(biased, heads=4)
    found = model.blocks[0].attention.qkv.bias
    assert torch.equal(found[96:], v)
    assert torch.equal(found[48:96], torch.zeros(48))
    assert torch.equal(found[:48].sort().values, q.sort().values)  # in the order of our pairs
    assert torch.equal(model.blocks[0].attention.qkv.weight, plain.blocks[0].attention.qkv.weight)


def test_a_pooled_norm_is_refused_and_missing_tensors_have_a_hint() -> None:
    state = state_of("vit (dino)")
    pooled = {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: t for n, t in state.items()}
    with pytest.raises(ValueError, match="norm the mean of the tokens"):
        medformer.load_pretrained(pooled, heads=4)
    bare = {n: t for n, t in state.items() if not n.startswith("norm.")}
    with pytest.raises(ValueError, match=r"norm\.weight is missing.*take the file before it was fine-tuned"):
        medformer.load_pretrained(bare, heads=4)


def test_anti_aliased_networks_are_refused_where_their_config_says_so(tmp_path: Path) -> None:
    state = small_resnet(depth=50, dims=2, in_channels=3).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    for architecture in ("resnetblur50", "resnetaa50", "resnetaa101d"):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
        with pytest.raises(ValueError, match="blurs where it steps"):
            medformer.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
    assert medformer.load_pretrained(tmp_path).config.depth == 50


def test_numbered_children_of_lightly_are_a_resnet() -> None:
    model = small_resnet(depth=18, dims=2, in_channels=3)
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    state = {}
    for name, tensor in model.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"backbone.{numbers[first]}.{rest}"] = tensor
    loaded = medformer.load_pretrained(state | {"projection_head.layers.0.weight": torch.zeros(3)}).eval()
    x = random(1, 3, 40, 40)
    assert torch.equal(loaded(x), model(x))


TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("ViT", {}), ("DeiT", {}), ("Dinov2", {"mlp_ratio": 2}), ("Dinov2", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegisters", {}), ("DINOv3ViT", {"num_register_tokens": 2}),
    ("DINOv3ViT", {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 50.0}),
    ("SiglipVision", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), TRANSFORMERS)
def test_matches_transformers(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an oracle where it is installed")
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = getattr(transformers, f"{kind}Config")(**size, image_size=16, patch_size=4, **options)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    x = random(2, 3, 16, 16)
    for source in (theirs, tmp_path):
        with torch.no_grad():
            ours = medformer.load_pretrained(source).eval()
            torch.testing.assert_close(tokens_of(ours, x), theirs(x).last_hidden_state, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="says heads"):
        medformer.load_pretrained(theirs.state_dict())


def test_names_of_older_transformers_are_read() -> None:
    """Files on the hub have the names that transformers 4 gave."""
    transformers = pytest.importorskip("transformers", reason="transformers is an oracle where it is installed")
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.ViTConfig(**size, image_size=16, patch_size=4)
    theirs = transformers.ViTModel(config).eval()
    names = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
             "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("layers.", "encoder.layer.") if name.startswith("layers.") else name
        for new, old in names.items():
            name = name.replace(new, old)
        state[f"vit.{name}"] = tensor
    x = random(2, 3, 16, 16)
    with torch.no_grad():
        ours = medformer.load_pretrained(state, config=config.to_dict()).eval()
        torch.testing.assert_close(tokens_of(ours, x), theirs(x).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_a_bare_resnet_is_said_to_be_taken_for_a_plain_one() -> None:
    """timm's anti-aliased ones have the same tensors."""
    config = ResNetConfig(dims=2, in_channels=3, depth=18, base_width=8, norm="batch", shortcut="conv")
    state = ResNet(config).state_dict()
    with pytest.warns(UserWarning, match=r"taken for a plain ResNet.*layout='resnet' says that it is a plain one"):
        taken = medformer.load_pretrained(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = medformer.load_pretrained(state, layout="resnet")
    assert all(torch.equal(a, b) for a, b in zip(taken.state_dict().values(), said.state_dict().values(), strict=True))
