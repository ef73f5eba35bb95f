"""Published weights: names, inflation to 3D, and what does not fit. timm is the oracle where it is installed."""

from __future__ import annotations

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
    model = medformer.load_vit(state).eval()
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
    torch.testing.assert_close(medformer.load_vit(state).eval()(x), logits, atol=1e-4, rtol=1e-4)


def test_a_volume_alike_along_z_gives_what_its_image_gives() -> None:
    """Inflated weights, on a volume one patch deep that repeats a grey image."""
    state = vit_state(dino=True, registers=4)
    model = medformer.load_vit(state, dims=3).eval()
    assert model.config.in_channels == 1
    assert model.config.base_grid == (SIDE,) * 3
    image = random(2, 1, PATCH * SIDE, PATCH * SIDE, seed=99)
    tokens = vit(state, image.expand(-1, 3, -1, -1))
    features = model.forward_features(image[:, :, None].expand(-1, -1, PATCH, -1, -1))
    torch.testing.assert_close(features.cls, tokens[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.patches, tokens[:, 5:], atol=1e-4, rtol=1e-4)


def test_overrides_change_the_model_around_the_weights() -> None:
    model = medformer.load_vit(
        vit_state(), dims=3, attention="performer", patch_stride=2, position="rotary", strict=True
    )
    assert model(torch.zeros(1, 1, 8, 9, 10)).shape == (1, WIDTH)


def test_files_and_wrappings_are_read(tmp_path: Path) -> None:
    state = vit_state()
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "vit.pth")
    x = random(1, 3, 12, 12)
    outs = [
        medformer.load_vit(source).eval()(x) for source in (state, tmp_path / "vit.safetensors", tmp_path / "vit.pth")
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_every_tensor_without_a_place_is_named() -> None:
    state = vit_state() | {"fc_norm.weight": torch.zeros(3), "norm.weight": torch.zeros(7)}
    del state["blocks.1.norm1.bias"]
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        medformer.load_vit(state)
    for part in (
        "blocks.1.norm1.bias is missing",
        "fc_norm.weight is unknown",
        "norm.weight has shape (7,) instead of",
    ):
        assert part in str(error.value)
    with pytest.warns(UserWarning, match=r"fc_norm\.weight is unknown"):
        model = medformer.load_vit(state, strict=False)
    assert torch.equal(model.norm.weight, torch.ones(WIDTH))


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_vit: the weights have no cls_token, pos_embed"):
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
