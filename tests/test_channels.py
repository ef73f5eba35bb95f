"""Cases of several channels in pretraining: found, stored, cut at one place, trained on, and what starts from that."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import default_collate

import medformer
import settings
import train
from medformer import commands
from medformer.answers import command
from medformer.channels import channel_names, flagged, flags_of, name_channels, with_channels
from medformer.codebook import Codebook
from medformer.data import ScanError, make_phantom
from medformer.data.cases import cases_of, network_input, read_case
from medformer.data.sequences import patterns_of
from medformer.data.store import build as building
from medformer.data.store.case_records import case_records
from medformer.data.store.catalogue import scans_of
from medformer.data.store.entries import Stored, load, open_scan
from medformer.data.writing import write_dicom_series
from medformer.errors import UserError
from medformer.evaluation import tasks
from medformer.evaluation.setup import check_channels
from medformer.page import page
from roots import DataConfig, Prepared, gather, prepare
from tests.pages import launched, unpacked
from views import Plan, ViewsConfig, draw, fitting, render

SHARED = Path(__file__).parents[2] / "shared" / "data"
BY = "t1=*_T1.nii.gz,flair=*_FLAIR.nii.gz"
LITTLE = (
    "--model.width=24", "--model.depth=1", "--model.heads=2", "--model.patch_size=8", "--model.patch_stride=8",
    "--model.patch_padding=0", "--views.global_size=8x16x16", "--device=cpu", "--batch_size=2", "--dino.prototypes=32",
    "--dino.hidden=16", "--dino.bottleneck=8", "--byol.hidden=32", "--byol.projection=16", "--igpt.colours=16",
    "--igpt.patch=4x4x4", "--igpt.fit_steps=2", "--model.patch_size=8",
)  # fmt: skip
VIEWS = ViewsConfig(global_size=(8, 16, 16), local_views=0)
PLAIN = ViewsConfig(
    global_size=(8, 16, 16), local_size=(8, 8, 8), local_views=1, contrast=0, gamma=0, noise=0, blur=0,
    flip=(0, 0.5, 0.5),
)  # fmt: skip


def a_file(path: Path, seed: int, step: int = 1, spacing: tuple[float, ...] = (1, 1, 1.5)) -> None:
    """A ball in noise; every `step`-th voxel along x."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*map(np.arange, (20, 20, 12)), indexing="ij"))
    ball = ((at - 8) ** 2).sum(0) < (4 + seed % 3) ** 2
    voxels = (rng.normal(100, 10, ball.shape) + 300 * ball)[::step]
    affine = np.diag([spacing[0] * step, *spacing[1:], 1])
    nib.save(nib.Nifti1Image(voxels.astype(np.float32 if step == 1 else np.int16), affine), path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cases, of which person3 lacks its FLAIR; FLAIRs have voxels twice as wide."""
    folder = tmp_path_factory.mktemp("channels") / "cases"
    for i in range(5):
        a_file(folder / f"person{i}" / "sub_T1.nii.gz", i)
        if i != 3:
            a_file(folder / f"person{i}" / "sub_FLAIR.nii.gz", 10 + i, step=2)
    return folder


def of(root: Path, **more: Any) -> DataConfig:
    return DataConfig(root=str(root), channels=tuple(BY.split(",")), held_out=0, **more)


def a_run(out: Path, *words: str, root: Path | None = None) -> Path:
    where = () if root is None else (f"--data.root={root}", f"--data.channels={BY}", f"--out={out}")
    assert train.main([*words, *(LITTLE if root is not None else ()), *where]) == 0
    return out


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINO of two sequences, of which one may be missing."""
    return a_run(tmp_path_factory.mktemp("runs") / "dino", "dino", "--steps=3", "--data.missing=true", root=root)


# ---- which file is which ------------------------------------------------------------


def test_names_and_patterns_have_one_notation() -> None:
    assert patterns_of(BY.split(",")) == {"t1": "*_T1.nii.gz", "flair": "*_FLAIR.nii.gz"}
    assert patterns_of(["t1", "flair"]) == {"t1": "", "flair": ""}
    for wrong, words in ((["t1", "T1"], "T1 is given twice"), (["=*a"], "has no name"), (["t1=*a", "t2"], "every ch")):
        with pytest.raises(ScanError, match=words):
            patterns_of(wrong)


def test_cases_are_found_in_nested_folders_and_each_problem_is_named(tmp_path: Path) -> None:
    for name in ("site/a/T1.nii", "site/a/FLAIR.nii", "site/b/T1.nii", "site/b/anat/FLAIR.nii", "c/T1.nii", "T1.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    by = ["t1=*T1.nii", "flair=*FLAIR.nii"]
    found = dict(cases_of(tmp_path, by, False))
    assert {name for name, files in found.items() if not isinstance(files, ScanError)} == {"site/a", "site/b"}
    assert "no file fits flair" in str(found["c"])
    assert "beside folders of cases" in str(found["T1.nii"])
    assert dict(cases_of(tmp_path, by, True))["c"] == (tmp_path / "c" / "T1.nii", None)
    assert dict(cases_of(tmp_path, ["t1", "flair"], False)).keys() == found.keys()  # names are parts of files' names
    ((name, one),) = cases_of(tmp_path / "site" / "b", by, False)
    assert name == "b"
    assert not isinstance(one, ScanError)


def test_parts_of_one_case_and_cases_that_lack_sequences_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    for name in ("a/T1.nii", "b/FLAIR.nii"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(ScanError, match="files lie in a, b: parts of one case, or cases that lack sequences"):
        cases_of(tmp_path, ["t1=*T1.nii", "flair=*FLAIR.nii"], True)


def test_series_of_dicom_are_sequences(tmp_path: Path) -> None:
    for i in range(2):
        for name, seed in (("T1", i), ("T2", i + 5)):
            scan = make_phantom(seed, shape=(10, 24, 24), spacing_mm=(4.0, 4.0, 4.0))
            write_dicom_series(scan, tmp_path / "cases" / f"person{i}" / name, patient_id=f"person{i}")
    config = DataConfig(root=str(tmp_path / "cases"), channels=("t1=*T1*", "t2=*T2*"), held_out=0)
    found = prepare(config, VIEWS, tmp_path / "cache", 0)
    assert [scan.name for scan in found.train] == ["person0", "person1"]
    assert [scan.modalities for scan in found.train] == [("CT", "CT")] * 2
    assert load(found.train[0].path).shape == (2, 10, 24, 24)


# ---- stored once ------------------------------------------------------------


def test_a_case_is_stored_on_one_grid_scaled_channel_by_channel(root: Path, tmp_path: Path) -> None:
    found = prepare(of(root, missing=True), VIEWS, tmp_path, 0)
    assert [scan.name for scan in found.train] == ["person0", "person1", "person2", "person3", "person4"]
    assert "1 of 5 cases lack a sequence (flair 1; person3)" in " ".join(found.notices)
    for scan in found.train:
        voxels, points = open_scan(scan)
        assert voxels.shape == (2, *scan.shape) == (2, 12, 20, 20)
        files = [
            root / scan.name / "sub_T1.nii.gz",
            None if scan.name == "person3" else root / scan.name / "sub_FLAIR.nii.gz",
        ]
        wanted = network_input(read_case(files, 3), 3)
        np.testing.assert_allclose(np.asarray(voxels, np.float32), wanted, atol=2e-3)
        box = (slice(None), slice(2, 9), slice(0, 5), slice(7, 20))
        np.testing.assert_array_equal(voxels[box], np.asarray(voxels)[box])
        assert (voxels[(slice(0, 1), slice(None), slice(None), slice(None))][0][tuple(points.T)] > scan.threshold).all()
    assert np.isnan(load(found.train[3].path)[...][1]).all()
    assert found.train[3].there == (found.train[3].parts[0],)
    assert prepare(of(root, missing=True), VIEWS, tmp_path, 0) == replace(found, notices=found.notices)
    assert not any("sub_T1" in path.read_text() for path in tmp_path.glob("*.json"))  # no names of files


def test_a_case_without_a_sequence_is_left_out_by_name_unless_allowed(root: Path, tmp_path: Path) -> None:
    found = prepare(of(root), VIEWS, tmp_path, 0)
    assert [scan.name for scan in found.train] == ["person0", "person1", "person2", "person4"]
    ((name, reason),) = found.skipped
    assert name == "person3"
    assert reason.endswith("no file fits flair=*_FLAIR.nii.gz; --data.missing true takes cases without it")
    ids = prepare(of(root, names="ids"), VIEWS, tmp_path, 0)
    assert not any("person" in text for text in (*ids.skipped[0], *ids.notices, ids.train[0].name))


def test_order_and_content_are_part_of_what_a_run_compares(root: Path, tmp_path: Path) -> None:
    turned = DataConfig(root=str(root), channels=tuple(reversed(BY.split(","))), held_out=0, small="pad")
    one, other = (prepare(config, VIEWS, tmp_path, 0).fingerprint() for config in (of(root, small="pad"), turned))
    assert len(one) == len(other) == 4
    assert not {*one} & {*other}


def test_each_channel_has_its_own_vote_for_what_scans_are(tmp_path: Path, capsys: Any) -> None:
    """Of six unnamed CTs one has no air; the PETs beside them are no CT."""
    rng, affine = np.random.default_rng(0), np.diag([1.0, 1, 1.5, 1])
    for i in range(6):
        ct = rng.normal(0, 60, (20, 20, 12))
        ct[: 0 if i == 5 else 8] = rng.normal(-1000, 20, (0 if i == 5 else 8, 20, 12))
        pet = rng.gamma(2.0, 1000.0, (20, 20, 12))
        (tmp_path / "cases" / f"person{i}").mkdir(parents=True)
        for name, voxels in (("ct", ct), ("pet", pet)):
            image = nib.Nifti1Image(np.clip(voxels, -1024, 30000).astype(np.int16), affine)
            nib.save(image, tmp_path / "cases" / f"person{i}" / f"{name}.nii")
    config = DataConfig(root=str(tmp_path / "cases"), channels=("ct", "pet"), held_out=0)
    found = prepare(config, VIEWS, tmp_path / "cache", 0)
    assert [scan.modalities for scan in found.train] == [("CT", "unknown")] * 6
    assert any("5 of 6 scans without a modality look like CT" in line for line in found.notices)
    assert prepare(config, VIEWS, tmp_path / "cache", 0).fingerprint() == found.fingerprint()
    words = ["--out", str(tmp_path / "store"), "--split", "all", "--workers", "0", "--channels", "ct,pet"]
    assert building.main([*words, str(tmp_path / "cases")]) == 0
    assert "vote: " in capsys.readouterr().out
    stored = prepare(replace(config, root=str(tmp_path / "store")), VIEWS, tmp_path / "cache", 0).train
    assert [scan.modalities for scan in stored] == [("CT", "unknown")] * 6
    (tmp_path / "cases" / "modality.txt").write_text("MR")
    said = prepare(config, VIEWS, tmp_path / "cache", 0).train
    assert [scan.modalities for scan in said] == [("MR", "MR")] * 6
    assert building.main([*words, str(tmp_path / "cases")]) == 0
    stored = prepare(replace(config, root=str(tmp_path / "store")), VIEWS, tmp_path / "cache", 0).train
    assert [scan.modalities for scan in stored] == [("MR", "MR")] * 6


def test_damage_and_a_limit_mind_every_channel(root: Path, tmp_path: Path, capsys: Any) -> None:
    from medformer.data.store.limit import Use

    found = prepare(of(root), VIEWS, tmp_path, 0)
    array = next(Path(part.path) for part in found.train[1].there[1:])
    array.write_bytes(array.read_bytes()[:-7])
    again = prepare(of(root), VIEWS, tmp_path, 0)
    assert any("made anew" in line for line in again.notices)
    assert again.fingerprint() == found.fingerprint()
    here = sum(Path(part.path).stat().st_size for scan in found.train for part in scan.there)
    use = Use(tmp_path, None)
    assert use.size()[0] > here
    assert use.size()[1] == len(found.train)  # an entry a case
    use.close()
    with pytest.raises(UserError, match="raise the limit"):
        prepare(of(root), VIEWS, tmp_path / "other", 0, use=Use(_made(tmp_path / "other"), 20_000))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_prepared_store_holds_cases_here_and_on_a_server(root: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("blosc2")
    pytest.importorskip("fsspec")
    store = tmp_path / "store"
    words = ["--out", str(store), "--split", "all", "--workers", "0", "--channels", BY, "--missing", str(root)]
    assert building.main(words) == 0
    assert f"next: medformer pretrain --data.root {store} --data.channels t1,flair" in capsys.readouterr().out
    assert building.main(words) == 0  # all is there
    config = DataConfig(root=str(store), channels=("t1", "flair"), missing=True, held_out=0)
    near = prepare(config, VIEWS, tmp_path / "cache", 0).train
    direct = prepare(of(root, missing=True), VIEWS, tmp_path / "cache", 0).train
    assert {scan.content for scan in near} == {scan.content for scan in direct}
    far = {scan.name: scan for scan in scans_of(f"file://{store}", tmp_path / "pieces", None)[0]}
    box = (slice(None), slice(1, 9), slice(3, 17), slice(0, 16))
    for scan in near:
        assert far[scan.name].far is not None
        np.testing.assert_array_equal(open_scan(far[scan.name])[0][box], open_scan(scan)[0][box])
        np.testing.assert_array_equal(open_scan(far[scan.name])[1], open_scan(scan)[1])
    for channels, missing, reason in (
        (("flair", "t1"), True, "a case of the channels t1,flair; --data.channels t1,flair takes it"),
        ((), False, "a case of the channels t1,flair"),
        (("t1", "flair"), False, "lacks flair; --data.missing true takes it"),
    ):
        try:
            reasons = prepare(replace(config, channels=channels, missing=missing), VIEWS, tmp_path / "c", 0).skipped
        except UserError as error:
            reasons = [("", str(error))]
        assert any(reason in why for _, why in reasons)


def test_a_table_says_patients_and_splits_of_a_store(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "all.csv"
    rows = [f"{root}/person{i}/sub_T1.nii.gz,{root}/person{i}/sub_FLAIR.nii.gz" for i in (0, 1, 2, 4)]
    said = ("p0,train", "p0,train", "p1,test", "p1,test")
    table.write_text("t1,flair,patient,split\n" + "".join(f"{a},{b}\n" for a, b in zip(rows, said, strict=True)))
    records, wrong = case_records(str(table), ["t1", "flair"], False)
    assert [(record.patient, record.split) for record in records] == [("p0", "train")] * 2 + [("p1", "test")] * 2
    assert not wrong
    table.write_text(f"t1,flair\n{rows[0]}\n{rows[1]}\n{root}/none.nii,{root}/none.nii\n")
    records, wrong = case_records(str(table), ["t1", "flair"], False)
    assert len({record.patient for record in records}) == 2
    assert wrong == [f"{root}/none.nii: none.nii: no such file or folder"]


# ---- views ------------------------------------------------------------


def drawn(voxels: np.ndarray, config: ViewsConfig, seed: int = 0, modality: Any = "MR") -> Plan:
    points = np.argwhere(np.isfinite(voxels.reshape(-1, *voxels.shape[-3:])[0]))
    return draw(voxels, (2.0, 1.0, 1.0), points, -9.0, config, (seed,), modality=modality)


def rendered(voxels: np.ndarray, config: ViewsConfig, modality: Any = "MR") -> list[torch.Tensor]:
    plans = default_collate([drawn(voxels, config, seed, modality) for seed in range(3)])
    return render(plans, config, torch.device("cpu"))


def test_channels_are_cut_at_one_place_as_each_alone_would_be() -> None:
    voxels = np.random.default_rng(0).normal(size=(3, 14, 30, 26)).astype(np.float16)
    views = rendered(voxels, PLAIN)
    assert [tuple(view.shape) for view in views] == [(6, 3, 8, 16, 16), (3, 3, 8, 8, 8)]
    for c in range(3):
        for view, alone in zip(views, rendered(voxels[c], PLAIN), strict=True):
            torch.testing.assert_close(view[:, c : c + 1], alone)


def test_geometry_is_shared_and_grey_values_change_in_each_channel() -> None:
    one = np.random.default_rng(0).normal(size=(14, 30, 26)).astype(np.float16)
    bent = replace(PLAIN, rotate=(10.0, 5.0, 5.0), shear=0.1, elastic=1.5)
    for view in rendered(np.stack([one, one]), bent):
        torch.testing.assert_close(view[:, 0], view[:, 1])
    for change in ({"contrast": 0.3}, {"gamma": 0.3}, {"noise": 0.2}, {"blur": 1.0}, {"bias": 0.5}, {"coarse": 3.0}):
        (view, *_) = rendered(np.stack([one, one]), replace(PLAIN, **change))
        assert not torch.allclose(view[:, 0], view[:, 1]), change
    window = replace(PLAIN, window=0.3)
    ct, mr = rendered(np.stack([one, one]), window, ("CT", "MR"))[0].unbind(1)
    assert not torch.allclose(ct, mr)  # whose window is jittered
    torch.testing.assert_close(mr, rendered(np.stack([one, one]), PLAIN)[0][:, 1])


def test_a_missing_channel_becomes_zeros_and_a_flag_whatever_is_changed() -> None:
    voxels = np.random.default_rng(0).normal(size=(2, 14, 30, 26)).astype(np.float16)
    voxels[1] = np.nan
    config = replace(PLAIN, contrast=0.3, gamma=0.3, noise=0.2, bias=0.3, elastic=1.0)
    model = medformer.BackboneConfig(in_channels=4)
    for view in rendered(voxels, config):
        seen = fitting(view, model)
        assert seen.shape[1] == 4
        assert seen.isfinite().all()
        assert (seen[:, 1] == 0).all()
        assert (seen[:, 2] == 0).all()
        assert (seen[:, 3] == 1).all()
        assert seen[:, 0].std() > 0.2
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(flagged(x), torch.cat([x, torch.zeros_like(x)], 1))


# ---- training ------------------------------------------------------------


@pytest.mark.parametrize("method", ["dino", "byol", "igpt"])
def test_every_method_trains_on_channels_and_goes_on_exactly(method: str, root: Path, tmp_path: Path) -> None:
    cache, more = f"--data.cache={tmp_path / 'cache'}", ("--data.missing=true", "--save_every=1")
    whole = a_run(tmp_path / "whole", method, "--steps=2", cache, *more, root=root)
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    part = tmp_path / "part"
    (part / "checkpoints").mkdir(parents=True)
    kept = whole / "checkpoints" / "step-00000001.pt"
    (part / "checkpoints" / kept.name).write_bytes(kept.read_bytes())
    a_run(part, f"--resume={part}", "--steps=2")
    again = [json.loads(line)["loss"] for line in (part / "metrics.jsonl").read_text().splitlines()]
    assert again == losses[1:]
    file = "image_gpt.safetensors" if method == "igpt" else "backbone.safetensors"
    model = medformer.load(whole / file)
    assert model.config.in_channels == 4
    assert channel_names(model) == ("t1", "flair")
    assert "| channels, in this order | t1, flair; after them 2 flags" in (whole / file).with_suffix(".md").read_text()
    assert "channels     t1, flair, in this order, and 2 flags" in str(medformer.describe(model, (8, 16, 16)))


def test_the_next_commands_hold_the_channels(run: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    a_run(tmp_path / "run", f"--resume={_copied(run, tmp_path / 'run')}", "--steps=4")
    said = capsys.readouterr().out
    assert f"medformer finetune {tmp_path / 'run'} --task cases.csv --channels '{BY}' --missing true" in said
    assert flags_of((), False) == ""


def _copied(run: Path, out: Path) -> Path:
    (out / "checkpoints").mkdir(parents=True)
    for kept in (run / "checkpoints").iterdir():
        (out / "checkpoints" / kept.name).write_bytes(kept.read_bytes())
    return out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data.channels=flair=*_FLAIR.nii.gz,t1=*_T1.nii.gz", "data.channels are t1,flair there, flair,t1 here"),
        (
            "--data.channels=t1=*_T1.nii.gz,flair=*_FLAIR.nii.gz,x=*x",
            "data.channels are t1,flair there, t1,flair,x here",
        ),
        ("--data.missing=false", "data.missing is True there, False here"),
    ],
)
def test_a_run_of_other_channels_is_not_gone_on_with(flags: str, words: str, run: Path, capsys: Any) -> None:
    assert train.main([f"--resume={run}", "--steps=9", flags]) == 1
    assert words in capsys.readouterr().err


def test_the_config_file_says_channels_as_the_flag_does(run: Path, root: Path, tmp_path: Path) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["channels"] == BY.split(",")
    by_file = settings.parse([f"--config={run / 'config.yaml'}"])
    by_flag = settings.parse(["dino", *LITTLE, f"--data.root={root}", "--data.channels", BY, "--data.missing=true"])
    assert by_file.data.channels == by_flag.data.channels == tuple(BY.split(","))
    assert by_file.model.in_channels == by_flag.model.in_channels == 4
    listed = settings.parse([f"--data.root={root}", "--data.channels", '["t1=*[12].nii", "t2=*b.nii"]'])
    assert listed.data.channels == ("t1=*[12].nii", "t2=*b.nii")
    assert settings.parse([f"--data.root={root}", "--data.channels=t1=*[12].nii"]).data.channels == ("t1=*[12].nii",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.channels=t1,t1", "--data.root=x"], "--data.channels t1,t1: t1 is given twice"),
        (["--data.channels=t1,t2"], "--data.channels needs --data.root"),
        (["--data.missing=true"], "--data.missing true needs --data.channels of two or more"),
        (["--model.in_channels=3", "--data.channels=a,b", "--data.root=x"], "make it 2; drop it"),
        (["--model.in_channels=2"], "--model.in_channels 2: --data.channels and --data.missing make it 1"),
        (["--model.dims=2", "--data.channels=a,b", "--data.root=x"], "with --model.dims 2 images are of one channel"),
    ],
)
def test_channels_that_cannot_be_are_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert train.main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ("t1=*T1*", "person0: 2 files fit t1=*T1*"),
        ("t1=*_T1*,t2=*_T2*", "no file fits t2=*_T2*; --data.missing true takes cases without it"),
        ("t1=*_T1*,again=*T1.nii*", "fits more than one channel; give narrower patterns"),
    ],
)
def test_a_folder_without_a_case_says_why(channels: str, message: str, tmp_path: Path, capsys: Any) -> None:
    a_file(tmp_path / "cases" / "person0" / "a_T1.nii.gz", 0)
    if channels == "t1=*T1*":
        a_file(tmp_path / "cases" / "person0" / "a_T1post.nii.gz", 0)
    words = [f"--data.root={tmp_path / 'cases'}", f"--data.channels={channels}", f"--out={tmp_path / 'out'}"]
    assert train.main([*LITTLE, *words]) == 1
    assert message in capsys.readouterr().err


def test_sequences_of_two_patients_and_label_maps_are_left_out_by_name(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cases"
    a_file(folder / "good" / "a_T1.nii.gz", 0)
    a_file(folder / "good" / "a_FLAIR.nii.gz", 1)
    a_file(folder / "apart" / "a_T1.nii.gz", 0)
    far = np.diag([1.0, 1, 1, 1])
    far[:3, 3] = 500
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 12)), far), folder / "apart" / "a_FLAIR.nii.gz"
    )
    a_file(folder / "mask" / "a_T1.nii.gz", 0)
    label = np.zeros((20, 20, 12), np.uint8)
    label[4:12, 4:12, 4:8] = 1
    nib.save(nib.Nifti1Image(label, np.diag([1, 1, 1.5, 1])), folder / "mask" / "a_FLAIR.nii.gz")
    found = prepare(of(folder), VIEWS, tmp_path / "cache", 0)
    reasons = dict(found.skipped)
    assert [scan.name for scan in found.train] == ["good"]
    assert "do not overlap" in reasons["apart"]
    assert reasons["mask"].startswith("flair looks like a label map (1 labels)")


def test_one_case_is_enough(tmp_path: Path) -> None:
    for name, step in (("T1", 1), ("FLAIR", 2)):
        a_file(tmp_path / "cases" / f"a_{name}.nii.gz", 0, step)
    out = a_run(tmp_path / "run", "--steps=1", root=tmp_path / "cases")
    assert medformer.load(out / "backbone.safetensors").config.in_channels == 2


def test_roots_of_cases_are_one_list(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "more.csv"
    table.write_text(
        f"T1,flair\n{root}/person0/sub_T1.nii.gz,{root}/person1/sub_FLAIR.nii.gz\n{root}/person2/sub_T1.nii.gz,\n"
    )
    config = DataConfig(root=f"{table}:{table}", channels=("t1", "flair"), missing=True, held_out=0)
    found, order = gather(config, VIEWS, 3, tmp_path / "cache", 0)
    assert isinstance(found, Prepared)
    assert order.counts == (2, 2)
    assert all(isinstance(scan, Stored) and len(scan.parts) == 2 for scan in found.train)
    assert found.train[1].parts[1] is None


# ---- what starts from it ------------------------------------------------------------


def a_task(root: Path, folder: Path) -> Path:
    """Labelled rows of the cases by path."""
    for i in range(5):
        mask = np.zeros((20, 20, 12), np.uint8)
        mask[5:11, 5:11, 4:9] = 1
        nib.save(nib.Nifti1Image(mask, np.diag([1, 1, 1.5, 1])), folder / f"mask{i}.nii.gz")
    with open(folder / "cases.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["path", "mask", "split"])
        out.writerows(
            [root / f"person{i}", folder / f"mask{i}.nii.gz", split]
            for i, split in enumerate(["train", "train", "val", "test", "test"])
        )
    return folder / "cases.csv"


def test_finetuning_goes_on_with_the_same_channels_and_answers_on_the_scans_grid(
    run: Path, root: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    words = [
        "finetune",
        str(run),
        "--task",
        str(a_task(root, tmp_path)),
        "--outside=true",
        "--size=8x16x16",
        "--steps=2",
    ]
    words += ["--batch_size=2", "--lrs=1e-3", "--checks=1", "--resamples=20", "--device=cpu", f"--out={out}"]
    assert commands.main([*words, "--channels", BY, "--missing=true"]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 held-out cases were seen without labels in pretraining" in said
    model = medformer.load(out / "model.safetensors")
    assert channel_names(model.backbone) == ("t1", "flair")
    answers = tmp_path / "answers"
    assert command.main([str(out), str(root), "--out", str(answers), "--device=cpu"]) == 0
    for i in range(5):  # person3 lacks one
        made, scan = nib.load(answers / f"person{i}.nii.gz"), nib.load(root / f"person{i}" / "sub_T1.nii.gz")
        assert made.shape == scan.shape
        np.testing.assert_array_equal(made.affine, scan.affine)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--channels", "flair=*_FLAIR.nii.gz,t1=*_T1.nii.gz"],
            "--channels flair,t1: .*trained on 2 channels, t1,flair in",
        ),
        (["--channels", "t1=*_T1.nii.gz"], "--channels t1: .*trained on 2 channels, t1,flair in this order"),
        ([], "no --channels: .*trained on 2 channels, t1,flair in this order; give the same names in the same order"),
        (["--channels", "t1=*_T1*,t1=*_T1*"], "t1 is given twice"),
    ],
)
@pytest.mark.parametrize("word", ["finetune", "evaluate"])
def test_another_order_or_number_is_one_line(
    word: str, flags: list[str], message: str, run: Path, root: Path, tmp_path: Path, capfd: Any
) -> None:
    pytest.importorskip("sklearn")
    words = [word, str(run), "--task", str(a_task(root, tmp_path)), "--outside=true", f"--out={tmp_path / 'o'}"]
    assert commands.main([*words, "--device=cpu", *flags]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err)


@pytest.mark.skipif(not (SHARED / "mr" / "ms_patient07_T1.nii.gz").is_file(), reason="no shared data here")
def test_four_real_sequences_are_pretrained_on_finetuned_and_predicted(tmp_path: Path) -> None:
    """Slabs of a patient with multiple sclerosis, and of another of whom there is a FLAIR alone."""
    pytest.importorskip("sklearn")
    names: tuple[str, ...] = ("T1", "T1POST", "T2", "FLAIR")
    found: dict[str, dict[str, Path]] = {"07-110": {}, "07-120": {}, "19-100": {}}
    for source in (SHARED / "mr").glob("ms_patient*.nii.gz"):
        patient, name = source.name.removesuffix(".nii.gz").removeprefix("ms_patient").split("_", 1)
        whole: Any = nib.load(source)
        held: Any = nib.Nifti1Image(np.asanyarray(whole.dataobj), whole.affine)
        for slab in (slab for slab in found if slab.startswith(patient)):
            found[slab][name] = tmp_path / f"slab{slab}_{name}.nii.gz"
            nib.save(held.slicer[80:112, 80:112, int(slab[3:]) : int(slab[3:]) + 10], found[slab][name])
    rows: list[list[Any]] = [
        [*(row.get(name, "") for name in names), row["GOLD_STANDARD"], split]
        for row, split in zip(found.values(), ("train", "val", "test"), strict=True)
    ]
    with open(tmp_path / "cases.csv", "w", newline="") as file:
        csv.writer(file).writerows([["t1", "t1post", "t2", "flair", "mask", "split"], *rows])
    channels, run, out = "t1,t1post,t2,flair", tmp_path / "run", tmp_path / "out"
    words = [f"--data.root={tmp_path / 'cases.csv'}", f"--data.channels={channels}", "--data.missing=true"]
    assert train.main(["dino", *LITTLE, *words, "--steps=4", f"--out={run}"]) == 0
    assert medformer.load(run / "backbone.safetensors").config.in_channels == 8
    words = ["finetune", str(run), "--task", str(tmp_path / "cases.csv"), "--channels", channels, "--missing=true"]
    words += ["--size=8x16x16", "--steps=2", "--batch_size=2", "--lrs=1e-3", "--checks=1", "--resamples=20"]
    assert commands.main([*words, "--maps=false", "--device=cpu", f"--out={out}"]) == 0
    assert command.main([str(out), str(tmp_path / "cases.csv"), "--out", str(tmp_path / "said"), "--device=cpu"]) == 0
    for row in rows:
        place = next(path for path in row if path)
        scan: Any = nib.load(place)
        made: Any = nib.load(tmp_path / "said" / place.name)
        assert made.shape == scan.shape
        np.testing.assert_array_equal(made.affine, scan.affine)


def test_kernels_are_kept_flags_come_and_go_and_one_channel_starts_several() -> None:
    torch.manual_seed(0)
    model = medformer.tiny_3d(width=24, depth=1, heads=2, in_channels=2).eval()
    name_channels(model, ("t1", "flair"))
    x, noise = torch.randn(1, 2, 16, 16, 16), torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        wide = with_channels(model, 2, silent=2)
        torch.testing.assert_close(wide(torch.cat([x, noise], 1)), model(x))
        torch.testing.assert_close(with_channels(wide, 2)(x), model(x))
    assert channel_names(wide) == ("t1", "flair")
    one = medformer.tiny_3d(width=24, depth=1, heads=2)
    check_channels(one, "file", ["a", "b", "c", "d"], missing=True)
    assert with_channels(one, 4, silent=4).config.in_channels == 8
    check_channels(medformer.tiny_3d(width=24, depth=1, heads=2, in_channels=3), "file", ["a", "b"], missing=False)


def test_names_stay_with_the_file_and_files_of_one_channel_stay_as_they_were(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = medformer.tiny_3d(width=24, depth=1, heads=2, in_channels=2)
    for names in ((), ("t1", "flair")):
        name_channels(model, names)
        medformer.save(model, tmp_path / "m.safetensors", card=False)
        assert channel_names(medformer.load(tmp_path / "m.safetensors")) == names
    for channels in (1, 2):
        config = medformer.ImageGPTConfig(vocabulary=8, grid=(4, 4), width=8, depth=1, heads=1, in_channels=channels)
        medformer.save(medformer.ImageGPT(config), tmp_path / "g.safetensors", card=False)
        with safe_open(tmp_path / "g.safetensors", "pt") as file:
            assert ("in_channels" in json.loads(file.metadata()["medformer_config"])) == (channels > 1)
            assert "medformer_channels" not in file.metadata()
        assert medformer.load(tmp_path / "g.safetensors").config == config


def test_a_codebook_of_channels_turns_scans_into_tokens_and_back() -> None:
    book = Codebook(8, (2, 1, 2), channels=3)
    x = torch.randn(1, 3, 4, 2, 4)
    patches = book.patches(x)
    assert patches.shape == (1, 8, 12)
    torch.testing.assert_close(patches[0, 0, 4:8], x[0, 1, :2, 0, :2].flatten())
    book.centres.copy_(patches[0])
    torch.testing.assert_close(book.decode(book.encode(x), (2, 2, 2)), x)
    with pytest.raises(ValueError, match=r"must be \(batch, 3, size\)"):
        book.patches(x[:, :1])


def test_an_image_gpt_of_other_channels_is_refused() -> None:
    model = medformer.ImageGPT(medformer.ImageGPTConfig(vocabulary=8, grid=(4, 4), width=8, depth=1, heads=1))
    check_channels(model, "file", (), missing=False)
    with pytest.raises(UserError, match=r"codebook is of 1 channel\(s\), the cases have 2"):
        check_channels(model, "file", ["t1", "t2"], missing=False)


def test_a_case_leaks_where_any_of_its_sequences_was_seen(root: Path, tmp_path: Path) -> None:
    task = tasks.read_task(
        a_task(root, tmp_path), 3, None, 0, iter, outside=True, channels=BY.split(","), missing=True
    )  # fmt: skip
    for pretraining in (root / "person4", _listed(root, tmp_path)):
        known = tasks.hashes_of(pretraining, iter, ["flair"])
        assert [task.known_to(known, i) for i in range(5)] == [False, False, False, False, True]


def _listed(root: Path, folder: Path) -> Path:
    (folder / "seen.csv").write_text(f"flair\n{root}/person4/sub_FLAIR.nii.gz\n")
    return folder / "seen.csv"


def test_the_page_shows_a_case_and_every_channel_of_it(run: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    viewer = page.Viewer(medformer.load(run / "backbone.safetensors"), run / "backbone.safetensors")
    viewer.patterns = {name: pattern for name, _, pattern in (text.partition("=") for text in BY.split(","))}
    whole, lacking = (viewer.scan(page.load(viewer, root / name), name) for name in ("person0", "person3"))
    assert [each["name"] for each in whole["sequences"]] == ["t1", "flair"]
    assert [each["name"] for each in lacking["sequences"]] == ["t1"]
    shown = unpacked(whole["sequences"][0]["voxels"], "<i2")
    np.testing.assert_array_equal(unpacked(whole["voxels"], "<i2"), shown)
    assert len(unpacked(whole["sequences"][1]["voxels"], "<i2")) == len(shown) == np.prod(whole["shape"])
    assert commands.main(["report", str(run), str(root / "person3"), f"--out={tmp_path / 'page.html'}"]) == 0
    said = capsys.readouterr().out
    assert f"next: medformer finetune {run} --task cases.csv --channels '{BY}' --missing true" in said
    zipped = shutil.make_archive(str(tmp_path / "case"), "zip", root / "person1")
    assert len(viewer.scan(page.load(viewer, Path(zipped)), "case")["sequences"]) == 2
    with pytest.raises(UserError, match=r"the model takes t1, flair; give the folder of a case with a file of each"):
        page.load(viewer, root / "person0" / "sub_T1.nii.gz")
    assert commands.main(["report", str(run), str(root), "--cases", str(root), f"--out={tmp_path / 'p.html'}"]) == 2
    assert "takes several channels, which it is not for; drop it" in capsys.readouterr().err
    viewer.missing = False
    with pytest.raises(UserError, match=r"no file fits flair=.*; the model was not trained with missing ones"):
        page.load(viewer, root / "person3")
    with pytest.raises(UserError, match="takes 3 channels and does not say which"):
        page.Viewer(medformer.tiny_3d(width=24, depth=1, heads=2, in_channels=3), Path("m.safetensors"))


@pytest.fixture
def browser() -> Iterator[Any]:
    yield from launched()


def test_a_channel_is_chosen_in_the_page(browser: Any, run: Path, root: Path, tmp_path: Path) -> None:
    assert commands.main(["report", str(run), str(root / "person0"), f"--out={tmp_path / 'page.html'}"]) == 0
    opened = browser.new_page()
    opened.goto(f"file://{tmp_path / 'page.html'}")
    opened.locator("#sequence").wait_for()
    before = opened.text_content("#place")
    opened.select_option("#sequence", "flair")
    opened.wait_for_function(f"document.getElementById('place').textContent !== {json.dumps(before)}")
    opened.close()


@pytest.mark.parametrize("read", [(), ("--read",)])
def test_inspect_lists_cases_with_what_they_lack(read: tuple[str, ...], root: Path, capsys: Any) -> None:
    assert commands.main(["inspect", str(root), "--channels", BY, *read]) == 1
    said = capsys.readouterr().out
    assert "flair: sub_FLAIR.nii.gz  unknown 12x20x10 (zyx), 1.5 x 1 x 2 mm, comes onto the grid of t1" in said
    assert "refused  person3: no file fits flair=*_FLAIR.nii.gz; --missing takes cases without it" in said
    assert commands.main(["inspect", str(root), "--channels", BY, "--missing", *read]) == 0
    said = capsys.readouterr().out
    assert "lacks    person3  flair" in said
    assert f"next: medformer pretrain --data.root {root} --data.channels '{BY}' --data.missing true" in said
