"""What leaves: folders of the hub, pyramids for the decoders of others; and encoders of images over volumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import medformer
from medformer import BackboneConfig, ResNetConfig, SliceEncoder, SliceEncoderConfig, TNTConfig, TNTLevel

IMAGE = {"dims": 2, "width": 24, "depth": 2, "heads": 2, "patch_size": 4, "patch_stride": 4, "patch_padding": 0}
FLAT = BackboneConfig(**IMAGE, in_channels=3, attention="softmax", position_grid=4)
PLAIN = ResNetConfig(dims=2, in_channels=3, depth=10, base_width=8, norm="batch")
LEVELS = (TNTLevel(width=12, depth=1, heads=2), TNTLevel(width=24, depth=1, heads=2, kernel=2, stride=2))


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return medformer.build(config)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [FLAT, PLAIN, TNTConfig(dims=2, levels=LEVELS), SliceEncoderConfig(encoder=PLAIN)])
def test_a_folder_of_the_hub_gives_the_model_back(config: Any, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the hub needs pip install 'medformer[hub]'")
    model = made(config).eval()
    medformer.save_pretrained(model, tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    again = medformer.from_pretrained(tmp_path / "model").eval()
    assert again.config == config
    x = random(1, config.in_channels, *(16,) * config.dims)
    assert torch.equal(again(x), model(x))
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    assert about["medformer_model"] == type(model).__name__
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: medformer" in card
    assert "Not a medical device" in card


def test_a_card_that_was_filled_in_stays(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the hub needs pip install 'medformer[hub]'")
    (tmp_path / "README.md").write_text("mine")
    medformer.save_pretrained(made(FLAT), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is not a file"):
        medformer.from_pretrained(tmp_path)


def test_pushing_uploads_what_a_folder_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub needs pip install 'medformer[hub]'")
    sent: dict[str, Any] = {}

    def upload_folder(self: Any, **options: Any) -> str:
        sent.update(options, files={file.name for file in Path(options["folder_path"]).iterdir()})
        return "sent"

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, **options: type("Repo", (), {"repo_id": "me/ours"}))
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    assert medformer.push_to_hub(made(FLAT), "me/ours", private=True) == "sent"
    assert sent["repo_id"] == "me/ours"
    assert sent["files"] == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("config", "shapes", "strides"),
    [
        (FLAT, [(24, 4, 6)] * 2, [(4, 4)] * 2),
        (PLAIN, [(8, 4, 6), (16, 2, 3), (32, 1, 2), (64, 1, 1)], [(4, 4), (8, 8), (16, 16), (32, 32)]),
        (SliceEncoderConfig(encoder=FLAT, slice_step=2), [(24, 3, 4, 6)] * 2, [(2, 4, 4)] * 2),
        (SliceEncoderConfig(encoder=PLAIN), [(8, 5, 4, 6), (16, 5, 2, 3), (32, 5, 1, 2), (64, 5, 1, 1)],
         [(1, 4, 4), (1, 8, 8), (1, 16, 16), (1, 32, 32)]),
        (TNTConfig(dims=2, in_channels=3, levels=LEVELS, class_token=True), [(24, 2, 3)], [(8, 8)]),
    ],
)  # fmt: skip
def test_a_pyramid_has_the_channels_and_strides_that_it_says(config: Any, shapes: Any, strides: Any) -> None:
    pyramid = medformer.features_only(made(config).eval())
    size = (5, 16, 24) if config.dims == 3 else (16, 24)
    maps = pyramid(random(2, config.in_channels, *size))
    assert [tuple(one.shape[1:]) for one in maps] == shapes
    assert list(pyramid.channels) == [shape[0] for shape in shapes]
    assert list(pyramid.strides) == strides


def test_layers_of_a_pyramid_are_spread_and_checked() -> None:
    model = made(BackboneConfig(**IMAGE | {"depth": 12}, attention="softmax"))
    assert medformer.features_only(model).layers == (2, 5, 8, 11)
    assert medformer.features_only(model, [1, -1]).layers == (1, 11)
    for layers in (0, 13, [], [3, 3], [5, 2], [12]):
        with pytest.raises(ValueError, match="features_only: layers="):
            medformer.features_only(model, layers)


@pytest.mark.parametrize("encoder", [FLAT, PLAIN])
def test_slices_start_as_the_mean_of_what_their_images_give(encoder: Any) -> None:
    images = made(encoder).eval()
    model = SliceEncoder.over(images).eval()
    x = random(2, 1, 5, 16, 24)
    features = model.forward_features(x)
    each = [images.forward_features(x[:, :, z].expand(-1, 3, -1, -1)) for z in range(5)]
    torch.testing.assert_close(features.cls, torch.stack([one.cls for one in each]).mean(0))
    torch.testing.assert_close(features.patches, torch.cat([one.patches for one in each], 1))
    assert features.grid == (5, *each[0].grid) == model.grid_of((5, 16, 24))
    assert features.patches.shape[1] == features.grid[0] * features.grid[1] * features.grid[2]


def test_a_frozen_encoder_learns_nothing_and_another_does() -> None:
    x = random(2, 1, 3, 16, 16)
    for frozen in (True, False):
        model = SliceEncoder.over(made(PLAIN), frozen=frozen, classes=2).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(x).square().sum().backward()
        optimiser.step()
        changed = {name.partition(".")[0] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
        assert ("encoder" in changed) == (not frozen)
        assert {"pool", "head"} <= changed


def test_padded_slices_are_left_out() -> None:
    model = SliceEncoder.over(made(FLAT), heads=2).eval()
    nn.init.normal_(model.pool.score.weight)
    x = random(1, 1, 3, 16, 16)
    longer = torch.cat([x, torch.full((1, 1, 2, 16, 16), torch.inf)], 2)
    mask = torch.zeros(1, 5, 16, dtype=torch.bool)
    mask[:, :3] = True
    padded = model.forward_features(torch.where(longer.isinf(), 0.0, longer), key_padding_mask=mask.flatten(1))
    torch.testing.assert_close(padded.cls, model.forward_features(x).cls)


def test_neighbours_fill_the_channels() -> None:
    model = SliceEncoder.over(made(FLAT), channels="neighbours", slice_step=2).eval()
    x = random(1, 1, 4, 16, 16)
    images = model._images(x)
    assert torch.equal(images, torch.stack([x[0, 0, [0, 0, 1]], x[0, 0, [1, 2, 3]]]))


def test_a_slice_encoder_is_saved_loaded_exported_and_described(tmp_path: Path) -> None:
    model = SliceEncoder.over(made(FLAT), classes=3).eval()
    medformer.save(model, tmp_path / "model.safetensors")
    again = medformer.load(tmp_path / "model.safetensors").eval()
    assert again.config == model.config
    x = random(2, 1, 40, 16, 16)  # more slices than are computed together
    torch.testing.assert_close(again(x), model(x))
    assert max(medformer.export(model, tmp_path / "model.pt2", size=(5, 16, 16)).values()) < 1e-5
    assert medformer.describe(model, (5, 16, 16)).parameters == sum(p.numel() for p in model.parameters())
    assert medformer.footprint(model).stride == (1, 4, 4)
    learns = medformer.freeze_for_transfer(model)
    assert {"head.weight", "pool.score.weight", "encoder.patch_embed.conv.weight"} <= set(learns)
    assert not any(".mlp." in name for name in learns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": BackboneConfig(width=48)}, "dims=2"),
        ({"encoder": BackboneConfig(**IMAGE, classes=3)}, "classes=3; build it with 0"),
        ({"encoder": BackboneConfig(**IMAGE, in_channels=2), "channels": "neighbours"}, "odd in_channels"),
        ({"encoder": FLAT, "heads": 5}, "heads=5 must divide the encoder's width 24"),
        ({"encoder": {"depth": 2, "colour": 1}}, "unknown fields colour"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SliceEncoderConfig(**options)


def test_a_decoder_of_monai_trains_on_a_pyramid() -> None:
    blocks = pytest.importorskip("monai.networks.blocks", reason="MONAI is an oracle where it is installed")
    torch.manual_seed(0)
    cube = {"width": 24, "depth": 3, "heads": 2, "patch_size": 4, "patch_stride": 4, "patch_padding": 0}
    pyramid = medformer.features_only(made(BackboneConfig(**cube, attention="softmax", position_grid=4)), 3)
    up = blocks.UnetrUpBlock(3, 24, 8, 3, 4, "instance", res_block=True)
    x, wanted = random(1, 1, 16, 16, 16), torch.zeros(1, 8, 16, 16, 16)
    skip = blocks.UnetrBasicBlock(3, 1, 8, 3, 1, "instance", res_block=True)
    parameters = [*pyramid.parameters(), *up.parameters(), *skip.parameters()]
    before = [p.clone() for p in pyramid.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    (up(pyramid(x)[-1], skip(x)) - wanted).square().mean().backward()
    optimiser.step()
    assert any(not torch.equal(p, b) for p, b in zip(pyramid.parameters(), before, strict=True))
