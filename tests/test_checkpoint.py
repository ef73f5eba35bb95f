"""Saving and loading."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import medformer
from medformer import Backbone, BackboneConfig

SMALL: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3, "patch_size": (4, 4, 2), "patch_padding": 1}


def build(**overrides: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**{**SMALL, **overrides}))


def rewrite(path: Path, *, config: object = None, **changes: torch.Tensor | None) -> None:
    """Replace tensors (None removes one; `__` stands for a dot) or the config of a saved file."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(path.read_bytes())
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    if config is not None:
        metadata["medformer_config"] = config if isinstance(config, str) else json.dumps(config)
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    medformer.save(build(), path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("overrides", [{}, {"attention": "softmax", "dims": 2, "patch_size": 4, "position": "sincos"}])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    model = build(**overrides, registers=2, mask_token=True, layer_scale=0.1, seed=7).to(dtype)
    medformer.save(model, tmp_path / "model.safetensors")
    loaded = medformer.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    states = model.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*map(dict.values, states), strict=True))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(2, 1, *(9, 8, 7)[: model.config.dims]).to(dtype)
    # Equal weights at another alignment in memory may take another vector path: the last bit is the library's.
    torch.testing.assert_close(model.eval()(x), loaded.eval()(x))


def test_compiled_model_is_saved_under_the_plain_names(tmp_path: Path) -> None:
    medformer.save(torch.compile(build()), tmp_path / "model.safetensors")  # type: ignore[arg-type]
    assert medformer.load(tmp_path / "model.safetensors").config == build().config


def test_loading_leaves_the_random_generator_alone(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    medformer.load(saved)
    assert torch.equal(torch.rand(1), expected)


def test_failed_save_keeps_the_previous_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*model\.safetensors"):
        medformer.save(build(seed=1), saved)
    assert saved.read_bytes() == before
    assert sorted(saved.parent.iterdir()) == [saved.with_suffix(".md"), saved]


def test_saving_into_a_missing_folder_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/model\.safetensors"):
        medformer.save(build(), tmp_path / "none" / "model.safetensors")


def test_card_says_what_is_known_and_keeps_what_was_filled_in(saved: Path) -> None:
    card = saved.with_suffix(".md")
    text = card.read_text()
    for part in ("Backbone of", "| width | 24 |", 'medformer.load("model.safetensors")', "Not a medical device"):
        assert part in text
    assert "patch_stride" not in text  # a default
    card.write_text("mine")
    medformer.save(build(), saved)
    assert card.read_text() == "mine"
    medformer.save(build(), saved.parent / "bare.safetensors", card=False)
    assert not (saved.parent / "bare.md").exists()


def test_hub_names_are_fetched_by_their_package_and_only_when_asked(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(saved)

    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = fetch  # type: ignore[attr-defined]
    hub.__spec__ = importlib.machinery.ModuleSpec("huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert medformer.load("hf:clinic/ct").config == build().config
    medformer.load("hf:clinic/ct/small.safetensors")
    assert asked == [("clinic/ct", "model.safetensors"), ("clinic/ct", "small.safetensors")]
    with pytest.raises(FileNotFoundError, match="clinic/ct is not a file; a model of the Hugging Face hub is"):
        medformer.load("clinic/ct")
    assert len(asked) == 2
    with pytest.raises(ValueError, match=r"hf:clinic must be hf:owner/name"):
        medformer.load("hf:clinic")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the huggingface_hub package; pip install"):
        medformer.load("hf:clinic/ct")


def test_files_of_before_there_was_another_model_are_backbones(saved: Path) -> None:
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "medformer_model"}
    tensors = safetensors.torch.load(saved.read_bytes())
    saved.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    assert isinstance(medformer.load(saved), Backbone)
    metadata["medformer_model"] = "UNet"
    saved.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    with pytest.raises(ValueError, match=r"holds a UNet; medformer\.load reads Backbone, ResNet, TNT, ImageGPT"):
        medformer.load(saved)


LEVELS = ({"width": 12, "heads": 2, "depth": 1}, {"width": 24, "heads": 2, "depth": 1, "kernel": 2, "stride": 2})


@pytest.mark.parametrize(
    ("config", "x"),
    [
        (medformer.ResNetConfig(dims=2, depth=18, base_width=32), torch.ones(1, 1, 20, 20)),
        (medformer.TNTConfig(levels=LEVELS, dims=3), torch.ones(1, 1, 9, 8, 10)),  # type: ignore[arg-type]
        (
            medformer.ImageGPTConfig(vocabulary=8, grid=(2, 3), width=8, depth=1, heads=2, scale="z-score"),
            torch.arange(6)[None],
        ),
    ],
    ids=["resnet", "tnt", "image_gpt"],
)
def test_every_model_has_its_config_and_its_report_in_the_file(tmp_path: Path, config: Any, x: torch.Tensor) -> None:
    model, path = medformer.build(config).eval(), tmp_path / "model.safetensors"
    medformer.save(model, path)
    loaded: Any = medformer.load(path)
    assert loaded.config == config
    torch.testing.assert_close(loaded.eval()(x), model(x))
    text = path.with_suffix(".md").read_text()
    assert type(model).__name__ in text
    assert ("codebook.encode" in text) == hasattr(model, "codebook")
    name = list(model.state_dict())[-1]
    rewrite(path, **{name.replace(".", "__"): None})
    with pytest.raises(ValueError, match=rf"{name.replace('.', '[.]')} is missing. strict=False loads the rest"):
        medformer.load(path)


def test_an_image_gpt_of_before_one_mechanism_still_loads(tmp_path: Path) -> None:
    config = medformer.ImageGPTConfig(vocabulary=8, grid=(2, 3), width=8, depth=1, heads=2)
    model = medformer.ImageGPT(config)
    metadata = {"medformer_image_gpt": json.dumps(dataclasses.asdict(config))}
    (tmp_path / "old.safetensors").write_bytes(safetensors.torch.save(model.state_dict(), metadata=metadata))
    loaded: Any = medformer.load(tmp_path / "old.safetensors")
    assert loaded.config == config
    assert torch.equal(loaded.token_embed, model.token_embed)


def test_only_backbones_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear is not a Backbone or ResNet or TNT or ImageGPT"):
        medformer.save(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")  # type: ignore[arg-type]


def test_every_tensor_that_does_not_fit_is_listed(saved: Path) -> None:
    rewrite(saved, norm__weight=None, class_token=torch.zeros(25), head__weight=torch.zeros(3))
    with pytest.raises(ValueError, match="does not fit its config") as error:
        medformer.load(saved)
    for part in (
        "norm.weight is missing",
        "head.weight is unknown",
        "class_token has shape (25,) instead of (24,)",
        "strict=False loads the rest",
    ):
        assert part in str(error.value)


def test_loading_not_strictly_warns_and_keeps_the_rest(saved: Path) -> None:
    rewrite(saved, norm__weight=None, class_token=torch.zeros(25), norm__bias=torch.full((24,), 3.0))
    with pytest.warns(UserWarning, match=r"class_token has shape.*norm\.weight is missing"):
        model = medformer.load(saved, strict=False)
    assert torch.equal(model.norm.bias, torch.full((24,), 3.0))
    assert torch.equal(model.norm.weight, torch.ones(24))
    assert model(torch.randn(1, 1, 8, 8, 8)).shape == (1, 24)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ({"width": 24, "wings": 2}, "unknown fields wings"),
        ({"width": 24, "heads": 5}, "impossible: BackboneConfig: heads=5"),
        ({"width": "wide"}, "impossible: BackboneConfig: width='wide'"),
        ({"drop_path": "much"}, "impossible: "),
    ],
)
def test_bad_config_is_refused_by_file_and_reason(saved: Path, config: object, message: str) -> None:
    rewrite(saved, config=config)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*{message}"):
        medformer.load(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a safetensors file"):
        medformer.load(saved)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not a file"):
        medformer.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        medformer.load(tmp_path)
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="not a safetensors file") as error:
        medformer.load(tmp_path / "pickle.pt")
    assert "\n" not in str(error.value)
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="without a medformer config"):
        medformer.load(tmp_path / "foreign.safetensors")


def test_config_in_the_file_is_complete(saved: Path) -> None:
    with safetensors.safe_open(saved, framework="pt") as file:
        config = json.loads(file.metadata()["medformer_config"])
    assert set(config) == {field.name for field in dataclasses.fields(BackboneConfig)}
