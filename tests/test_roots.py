"""Images as training data, several roots in one run, and evaluation on labelled cases along the way."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import medformer
import online
import settings
import train
from crops import sample_scan
from medformer.data.datasets import adapter
from medformer.data.store.build import build
from medformer.data.store.entries import Stored, load
from medformer.errors import UserError
from medformer.evaluation.probes import load_model
from online import OnlineConfig, features, linear_accuracy, measure, read_labelled
from roots import DataConfig, Order, gather, prepare, prepare_images, voxel_scale
from views import ViewsConfig

FLAT = (
    "--model.dims=2", "--model.width=24", "--model.depth=1", "--model.heads=2", "--model.patch_stride=8",
    "--model.patch_padding=0", "--model.patch_size=8", "--model.stem=null", "--model.class_token=true",
    "--views.global_size=1x16x16", "--views.local_size=1x8x8",
    "--dino.prototypes=32", "--dino.hidden=16", "--dino.bottleneck=8", "--batch_size=2", "--device=cpu",
    "--byol.hidden=32", "--byol.projection=16", "--igpt.colours=16", "--igpt.patch=1x4x4", "--igpt.fit_steps=3",
)  # fmt: skip
VIEWS = ViewsConfig(global_size=(1, 16, 16), local_size=(1, 8, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey and colour images, a small one and a damaged one; and the same as a MedMNIST-style file of two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (root / "png" / "deep").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20, 24), np.uint8)).save(root / "png" / f"grey{i}.png")
    Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(root / "png" / "deep" / "colour.jpg")
    Image.fromarray(rng.integers(0, 60000, (20, 24)).astype(np.uint16)).save(root / "png" / "wide.png")
    Image.fromarray(rng.integers(0, 255, (8, 24), np.uint8)).save(root / "png" / "small.png")
    (root / "png" / "damaged.png").write_bytes(b"no image")
    (root / "png" / "notes.txt").write_text("no image either")
    labels = rng.integers(0, 2, 40)
    images = rng.integers(0, 80, (40, 20, 20)) + 160 * labels[:, None, None] * (np.arange(20) < 10)
    images = images.astype(np.uint8)
    np.savez(
        root / "set.npz", train_images=images[:28], train_labels=labels[:28, None], val_images=images[28:],
        val_labels=labels[28:, None],
    )  # fmt: skip
    return root


def test_images_become_scans_of_one_slice(folder: Path, tmp_path: Path) -> None:
    found = prepare_images(DataConfig(root=str(folder / "png"), held_out=1), VIEWS, tmp_path, 0)
    names = {scan.name for scan in [*found.train, *found.held_out]}
    assert names == {"grey0", "grey1", "grey2", "grey3", "deep/colour", "wide"}
    reasons = dict(found.skipped)
    assert "8x24 pixels (yx) is below --views.global_size 16x16" in reasons["small"]
    assert "damaged" in reasons["damaged"]
    for scan in found.train:
        voxels = load(scan.path)
        assert voxels.shape == scan.shape == (1, 20, 24)
        assert voxels.dtype == np.float16
        points = np.load(scan.points_path)
        assert (voxels[tuple(points.T)] > scan.threshold).all()
    again = prepare_images(DataConfig(root=str(folder / "png"), held_out=1), VIEWS, tmp_path, 0)
    assert again == found


def test_images_are_resized_to_one_side_when_asked_and_kept_apart_from_those_that_are_not(
    folder: Path, tmp_path: Path
) -> None:
    config = DataConfig(root=str(folder / "png"), held_out=0)
    plain = prepare_images(config, replace(VIEWS, local_views=0), tmp_path, 0)
    found = prepare_images(config, replace(VIEWS, image_side=40), tmp_path, 0)
    shapes = {scan.name: scan.shape for scan in found.train}
    assert shapes["grey0"] == (1, 40, 48)
    assert shapes["small"] == (1, 40, 120)  # too small no more
    assert prepare_images(config, replace(VIEWS, local_views=0), tmp_path, 0) == plain
    (grey,) = (scan for scan in found.train if scan.name == "grey0")
    (before,) = (scan for scan in plain.train if scan.name == "grey0")
    halved = load(grey.path).astype(np.float32)[0].reshape(20, 2, 24, 2).mean((1, 3))
    assert np.corrcoef(halved.ravel(), load(before.path).astype(np.float32).ravel())[0, 1] > 0.9


@pytest.mark.parametrize("size", ["mini", "tiny", "small", "base"])
@pytest.mark.parametrize("method", ["dino", "byol", "igpt"])
def test_defaults_for_images_fit_images_of_any_size(method: str, size: str) -> None:
    config = settings.parse([method, f"--size={size}", "--model.dims=2"])
    side = config.views.global_size[1]
    assert config.views.global_size == (1, side, side)
    assert config.views.image_side == 2 * side
    assert config.views.global_scale[0] < 2 <= config.views.global_scale[1]  # whole images, as probes see them


def test_what_holds_no_image_is_refused(folder: Path, tmp_path: Path) -> None:
    for root, words in (("nowhere", "must be a folder"), (str(tmp_path), "no image that can be used")):
        with pytest.raises(UserError, match=words):
            prepare_images(DataConfig(root=root), VIEWS, tmp_path / "cache", 0)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="train_images"):
        prepare_images(DataConfig(root=str(tmp_path / "other.npz")), VIEWS, tmp_path / "cache", 0)
    large = ViewsConfig(global_size=(1, 99, 99), local_views=0)
    with pytest.raises(UserError, match="20x24 pixels"):
        prepare_images(DataConfig(root=str(folder / "png")), large, tmp_path / "cache", 0)


@pytest.mark.parametrize("method", ["dino", "byol", "igpt"])
def test_all_methods_train_on_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    run, npz = tmp_path / "run", folder / "set.npz"
    flags = [method, *FLAT, f"--data.root={npz}", f"--online.task={npz}", "--online.every=2", f"--out={run}"]
    assert train.main([*flags, "--steps=3", "--picture_every=2", "--online.neighbours=5"]) == 0
    said = capsys.readouterr().out
    assert said.count("knn accuracy") == 3  # before, after 2, after 3
    lines = (run / "metrics.jsonl").read_text()
    assert "untrained_knn_accuracy" in lines
    (last,) = (run / "checkpoints").glob("step-*3.pt")
    if method == "igpt":
        with pytest.raises(UserError, match="of which only a finished run can be read"):
            load_model(last)
    else:  # as if the run had ended there
        model, file, settings = load_model(last)
        assert (file, settings["method"]) == (last, method)
        for name, value in medformer.load(run / "backbone.safetensors").state_dict().items():
            assert value.equal(model.state_dict()[name])
        damaged = last.with_name("damaged.pt")
        damaged.write_bytes(last.read_bytes()[:-1] + b"?")
        with pytest.raises(UserError, match="checksum does not match"):
            load_model(damaged)
    assert lines.count('"linear_accuracy"') == 2
    weights = run / ("image_gpt.safetensors" if method == "igpt" else "backbone.safetensors")
    if method == "igpt":
        assert medformer.load(weights).config.grid == (4, 4)
        assert (run / "completions.png").exists()
    else:
        assert medformer.load(weights)(torch.zeros(1, 1, 16, 16)).shape == (1, 24)
        assert (run / "attention.png").exists()
    assert (run / "pictures" / "step-00000002.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("scores", "step"), [((0.5, 0.25, 0.75, 0.5), 2), ((0.25, 0.5, 0.5, 0.75), None), ((0.75, 0.5, 0.75, 0.25), 0)]
)
def test_the_weights_that_scored_best_are_kept_beside_the_last(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    scores: tuple[float, ...], step: int | None,
) -> None:  # fmt: skip
    run, npz, left = tmp_path / "run", folder / "set.npz", iter(scores)
    monkeypatch.setattr(online, "measure", lambda *_: {"knn_accuracy": next(left)})
    flags = [f"--data.root={npz}", f"--online.task={npz}", "--online.every=1", f"--out={run}", "--steps=3", "--keep=9"]
    assert train.main(["byol", *FLAT, "--save_every=1", *flags]) == 0
    said = capsys.readouterr().out
    assert (run / "checkpoints" / "step-00000000.pt").exists()
    if step is None:  # the last is the best
        assert not (run / "best").exists()
        assert "best/" not in said
        return
    when = f"after step {step}" if step else "before training, which no step has bettered"
    assert f"best/                 the weights {when}: highest kNN accuracy (0.750)" in said
    saved = torch.load(run / "checkpoints" / f"step-0000000{step}.pt", weights_only=True)["method"]
    model, file, settings = load_model(run / "best")
    assert file == run / "best" / "backbone.safetensors"
    assert settings["method"] == "byol"
    for name, value in model.state_dict().items():
        assert value.equal(saved[f"student.backbone.{name}"])
    last = medformer.load(run / "backbone.safetensors").state_dict()
    assert any(not value.equal(last[name]) for name, value in model.state_dict().items())


def test_scans_that_are_too_thin_are_said_loudly(trainer: Any, tmp_path: Path) -> None:
    (root := tmp_path / "scans").mkdir()
    for name, slices in (("thin", 4), ("thick", 16)):
        voxels = np.random.default_rng(slices).normal(0, 30, (20, 20, slices)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / f"{name}.nii")
    views, found = ViewsConfig(global_size=(8, 8, 8), local_views=0), {}
    for small in ("auto", "skip", "pad"):
        config = DataConfig(root=str(root), small=small)
        found[small] = gather(config, views, 3, tmp_path / "cache", 0)[0]
    loud = [line for line in found["auto"].notices if line.startswith("WARNING: 1 of 2 scans (down to 4 slices)")]
    assert len(loud) == 1
    assert "--data.small pad" in loud[0]
    assert not any("WARNING" in line for name in ("skip", "pad") for line in found[name].notices)
    assert [len(found[name].skipped) for name in ("auto", "skip", "pad")] == [1, 1, 0]


@pytest.mark.parametrize("names", ["files", "ids"])
def test_what_was_skipped_is_kept_when_reading_is_stopped(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    (root := tmp_path / "scans").mkdir()
    (root / "a.nii").write_bytes(b"broken" * 100)
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 20), np.float32), np.eye(4)), root / "b.nii")

    def stopped(scans: list[Any]) -> Any:
        yield from scans
        raise KeyboardInterrupt

    monkeypatch.setattr(train.screen, "reading", stopped)
    run = tmp_path / "run"
    assert trainer(run, "--steps=1", f"--data.root={root}", f"--data.names={names}") == 130
    text = (run / "skipped.txt").read_text()
    assert len(text.splitlines()) == 2
    assert ("a.nii: " in text) == (names == "files")


def test_without_weights_an_epoch_is_a_permutation_of_all() -> None:
    order = Order(3, (4, 6))
    assert sorted(order(s) for s in range(10)) == list(range(10))
    assert [order(s) for s in range(30)] == [sample_scan(3, s, 10) for s in range(30)]


def test_weights_set_the_share_of_each_root_and_each_goes_through_its_own_scans() -> None:
    order = Order(0, (4, 16), (3.0, 1.0))
    drawn = [order(s) for s in range(20 * 40)]
    assert sum(d < 4 for d in drawn) == 20 * 40 * 3 // 4
    for epoch in range(40):  # exact in every epoch
        assert sum(d < 4 for d in drawn[20 * epoch : 20 * epoch + 20]) == 15
    counts = Counter(drawn)
    assert [counts[i] for i in range(4)] == [150] * 4
    assert {counts[i] for i in range(4, 20)} <= {12, 13}
    assert drawn == [Order(0, (4, 16), (3.0, 1.0))(s) for s in range(20 * 40)]
    assert drawn != [Order(1, (4, 16), (3.0, 1.0))(s) for s in range(20 * 40)]


def test_two_roots_train_in_one_run(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    voxels = np.random.default_rng(9).normal(0, 30, (20, 18, 22)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), other / "extra.nii")
    config = DataConfig(root=f"{trainer.scans}:{other}", weights=(1.0, 1.0), held_out=1)
    whole, order = gather(config, ViewsConfig(global_size=(8, 8, 8), local_views=0), 3, tmp_path / "cache", 0)
    assert order.counts == (3, 1)
    assert whole.train[-1].name == "extra"
    assert len(whole.held_out) == 1  # a lone scan is never held out
    assert voxel_scale(whole) == "z-score"
    root = f"{trainer.scans}:{other}"
    assert (
        train.main(
            [*trainer.flags, f"--data.root={root}", "--data.weights=1,1", f"--out={tmp_path / 'run'}", "--steps=2"]
        )
        == 0
    )
    assert "extra" in capsys.readouterr().out


def test_labelled_cases_are_read_whole_and_split(folder: Path) -> None:
    data = read_labelled(OnlineConfig(task=str(folder / "set.npz")), VIEWS, 2)
    assert data.train.shape == (23, 1, 16, 16)
    assert data.held.shape == (5, 1, 16, 16)  # a fifth of the 28 training cases, none of the 12 of the test
    assert data.train.mean().abs() < 1.5


def test_probes_find_what_is_there_and_nothing_where_nothing_is() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    x = torch.randn(300, 8, generator=generator)
    told = x + 4 * nn.functional.one_hot(labels, 8)
    assert linear_accuracy(told[:200], labels[:200], told[200:], labels[200:]) > 0.9
    assert linear_accuracy(x[:200], labels[:200], x[200:], labels[200:]) < 0.5


def test_measuring_leaves_the_encoder_as_it_was(folder: Path) -> None:
    data = read_labelled(OnlineConfig(task=str(folder / "set.npz")), VIEWS, 2)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 8)).train()
    before, state = {n: p.clone() for n, p in encoder.state_dict().items()}, torch.get_rng_state()
    figures = measure(encoder, data, 5)
    assert figures.keys() == {"knn_accuracy", "linear_accuracy"}
    assert figures["linear_accuracy"] > 0.9  # half of the image tells the class
    assert encoder.training
    assert all(torch.equal(before[n], p) for n, p in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(features(encoder, data.train), features(encoder, data.train))  # no dropout


def test_one_decision_a_folder_is_what_is_stored(tmp_path: Path) -> None:
    for i in range(6):
        values = np.random.default_rng(i).normal(20, 60, (12, 20, 20))
        values[:4] = -900 if i else 20
        nib.save(nib.Nifti1Image(values.round().astype(np.int16).T, np.eye(4)), tmp_path / f"{i}.nii")
    views = ViewsConfig(global_size=(8, 8, 8), local_views=0)
    config = DataConfig(root=str(tmp_path), held_out=0)
    found = prepare(config, views, tmp_path / "cache", 0)
    assert {s.modality for s in found.train} == {"CT"}
    assert len(found.notices) == 1
    assert "5 of 6 scans" in found.notices[0]
    again = prepare(config, views, tmp_path / "cache", 0)
    assert again.fingerprint() == found.fingerprint()
    said = prepare(replace(config, modality="MR"), views, tmp_path / "cache", 0)
    assert {s.modality for s in said.train} == {"MR"}
    assert said.notices == []


def ct_cubes(folder: Path, numbers: Iterable[int], airless: int = 0) -> None:
    """Soft tissue of HU; with air but where `airless`."""
    folder.mkdir(exist_ok=True)
    for i in numbers:
        values = np.random.default_rng(i).normal(20, 60, (12, 20, 20))
        values[:4] = 20 if i == airless else -900
        nib.save(nib.Nifti1Image(values.round().astype(np.int16).T, np.eye(4)), folder / f"{i}.nii")


def seen(stored: Iterable[Stored]) -> list[bytes]:
    """What training sees of each, by content."""
    return sorted(np.asarray(load(scan.path)[:]).tobytes() for scan in stored)


def test_a_store_is_normalised_as_its_folder_is(tmp_path: Path) -> None:
    folder, store, views = tmp_path / "scans", tmp_path / "store", ViewsConfig(global_size=(8, 8, 8), local_views=0)
    said: list[str] = []

    def made(modality: str | None = None) -> list[Stored]:
        said.clear()
        load.cache_clear()
        build(adapter("folder").scan(folder), store, modality=modality, say=said.append)
        return prepare(DataConfig(root=str(store), held_out=0), views, tmp_path / "cache", 0).train

    def trained(modality: str | None = None) -> list[Stored]:
        config = DataConfig(root=str(folder), held_out=0, modality=modality)
        return prepare(config, views, tmp_path / "cache", 0).train

    ct_cubes(folder, range(3))
    assert sorted(s.modality for s in made()) == ["CT", "CT", "unknown"]  # too few for a vote
    assert said == []
    assert seen(made()) == seen(trained())
    ct_cubes(folder, range(3, 6))  # the folder grows, and decides about what is stored already
    assert {s.modality for s in made()} == {"CT"}
    (line,) = said
    assert "5 of 6 scans" in line
    assert "folder/" in line  # the minority, by the names of the store
    assert str(folder) not in line
    assert seen(made()) == seen(trained())
    for modality in ("MR", "CT"):
        found = made(modality)
        assert {s.modality for s in found} == {modality}
        assert said == []
        assert seen(found) == seen(trained(modality))
    assert {s.modality for s in made()} == {"CT"}  # nothing of it is left
    assert len(said) == 1


def test_other_values_keep_their_scale_in_a_store_too(tmp_path: Path) -> None:
    folder, store, views = tmp_path / "scans", tmp_path / "store", ViewsConfig(global_size=(8, 8, 8), local_views=0)
    ct_cubes(folder, range(5), airless=9)
    counts = np.random.default_rng(9).poisson(300, (20, 20, 12)).astype(np.int16)  # nothing below 0
    nib.save(nib.Nifti1Image(counts, np.eye(4)), folder / "9.nii")
    said: list[str] = []
    build(adapter("folder").scan(folder), store, say=said.append)
    assert "1 of them cannot be" in said[0]
    ours, theirs = (
        prepare(DataConfig(root=str(root), held_out=0), views, tmp_path / "cache", 0) for root in (store, folder)
    )
    assert seen(ours.train) == seen(theirs.train)
    assert (
        sorted(s.modality for s in ours.train) == sorted(s.modality for s in theirs.train) == ["CT"] * 5 + ["unknown"]
    )


def test_a_zip_file_one_file_and_a_colon_are_roots(tmp_path: Path) -> None:
    folder = tmp_path / "odd:name"
    folder.mkdir()
    for i in range(2):
        values = np.random.default_rng(i).normal(20, 60, (12, 20, 20)).astype(np.float32)
        nib.save(nib.Nifti1Image(values.T, np.eye(4)), folder / f"{i}.nii")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    views, cache = ViewsConfig(global_size=(8, 8, 8), local_views=0), tmp_path / "cache"

    def count(root: str) -> int:
        return len(gather(DataConfig(root=root, held_out=0), views, 3, cache, 0)[0].train)

    assert count(str(folder)) == 2
    assert count(f"{folder}:{folder / '0.nii'}") == 3
    assert count(str(folder / "0.nii")) == 1
    zipped = DataConfig(root=str(tmp_path / "x.zip"), held_out=0)
    first = prepare(zipped, views, cache, 0).fingerprint()
    assert len(first) == 2
    assert prepare(zipped, views, cache, 0).fingerprint() == first


@pytest.mark.parametrize("word", ["ct", "", "C T"])
def test_a_modality_is_a_word_of_capitals(word: str) -> None:
    with pytest.raises(ValueError, match=r"--data\.modality"):
        DataConfig(modality=word)
