"""What `medformer predict` makes of the files it is given: each is a row, part of one, or listed as passed over."""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import medformer
from medformer import commands
from medformer.answers import command
from medformer.answers.model import About, Finetuned, network_of, save_finetuned
from medformer.data import ScanError, Volume, make_phantom, read_volume, write_dicom_series
from medformer.evaluation import tasks

LITTLE: dict[str, Any] = {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "patch_stride": 4, "patch_padding": 0,
                          "attention": "softmax"}  # fmt: skip
GREY = np.arange(400, dtype=np.uint8).reshape(20, 20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Segmenters of 2 and 3 axes that learned nothing."""
    found = {}
    for dims, make in ((2, medformer.tiny_2d), (3, medformer.tiny_3d)):
        torch.manual_seed(0)
        about = About(task="t", kind="segmentation", names=("a",), size=(8,) * dims, cases={"test": 3})
        found[dims] = tmp_path_factory.mktemp("models") / f"{dims}.safetensors"
        save_finetuned(Finetuned(network_of(make(**LITTLE), about), about), found[dims])
    return found


def phantom(seed: int = 1) -> Volume:
    return make_phantom(seed, shape=(10, 16, 16))


def a_mess(root: Path) -> Path:
    """What downloads and hospital exports hold, nested and mixed."""
    (root / "deep" / "er").mkdir(parents=True)
    (root / "nothing").mkdir()
    phantom().save(root / "scan.nii.gz")
    np.save(root / "cube.npy", phantom().voxels)
    np.save(root / "flat.npy", GREY)
    for name in ("photo.png", "deep/er/photo.jpg"):
        Image.fromarray(GREY).save(root / name)
    Image.fromarray(GREY).save(root / "pages.tif", save_all=True, append_images=[Image.fromarray(GREY.T)])
    for name in ("broken.png", "empty.nii.gz", "empty.dcm", "notes.txt", "._scan.nii.gz"):
        (root / name).write_bytes(b"no" if name in ("broken.png", "notes.txt") else b"")
    for i, name in enumerate(("series", "half_a", "gap")):
        write_dicom_series(phantom(), root / name, patient_id=str(i))
    (root / "half_b").mkdir()
    for file in sorted((root / "half_a").iterdir())[5:]:
        file.rename(root / "half_b" / file.name)
    sorted((root / "gap").iterdir())[4].unlink()
    with zipfile.ZipFile(root / "inner.zip", "w") as archive:
        for file in (root / "series").iterdir():
            archive.write(file, f"s/{file.name}")
        for name in ("photo.png", "notes.txt"):
            archive.write(root / name, name)
    with zipfile.ZipFile(root / "outer.zip", "w") as archive:
        archive.write(root / "inner.zip", "inner.zip")
    zipfile.ZipFile(root / "emptied.zip", "w").close()
    (root / "cut.zip").write_bytes((root / "inner.zip").read_bytes()[:3000])
    (root / "old.tar").write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 250)
    shutil.copy(root / "inner.zip", root / "letter.docx")  # a zip, as all of that kind
    (root / "modality.txt").write_text("CT")
    (root / "dead.nii.gz").symlink_to(root / "nowhere.nii.gz")
    (root / "again.nii.gz").symlink_to(root / "scan.nii.gz")
    (root / "looped").symlink_to(root / "series")
    (root / ".hidden").mkdir()
    phantom().save(root / ".hidden" / "h.nii.gz")
    return root


def ask(model: Path, out: Path, *inputs: Path) -> tuple[int, dict[str, dict[str, str]], dict[str, str]]:
    """Exit code, rows by source, and reasons of what was passed over."""
    code = command.main([str(model), *map(str, inputs), "--out", str(out)])
    with open(out / "predictions.csv", newline="") as file:
        rows = {row["source"]: row for row in csv.DictReader(file)}
    passed = dict(line.split(": ", 1) for line in (out / "skipped.txt").read_text().splitlines())
    return code, rows, passed


READ = {2: ("photo.png", "deep/er/photo.jpg", "flat.npy", "pages.tif#1", "pages.tif#2", "inner.zip/photo.png"),
        3: ("scan.nii.gz", "cube.npy", "series", "half_a + {}half_b", "inner.zip/000000")}  # fmt: skip
AXES = {2: "but the checkpoint takes 2; use one trained in 3D", 3: "but the checkpoint takes 3; use one trained in 2D"}
BROKEN = {
    "broken.png": "its content is none", "empty.nii.gz": "its content is none", "empty.dcm": "empty file",
    "gap": "1 of 10 slices missing", "cut.zip": "cut off or damaged", "emptied.zip": "nothing in it",
    "outer.zip/inner.zip": "a zip inside a zip", "old.tar": "an archive, which is not searched",
    "dead.nii.gz": "link to nothing",
}  # fmt: skip
PASSED = {"notes.txt": "not a scan", "letter.docx": "not a scan", "inner.zip/notes.txt": "not a scan",
          "._scan.nii.gz": "not a scan", "again.nii.gz": "links to a file that is here already",
          "looped": "links to series, already searched", ".hidden": "hidden folder, not searched"}  # fmt: skip


@pytest.mark.parametrize("dims", [2, 3])
def test_every_file_that_is_found_is_a_row_or_is_passed_over_by_name(
    dims: int, models: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = a_mess(tmp_path / "mess")
    code, rows, passed = ask(models[dims], tmp_path / "out", root)
    assert code == 1
    good = {f"{root}/{name.format(f'{root}/')}" for name in READ[dims]}
    assert {source for source, row in rows.items() if row["status"] == "ok"} == good
    other = {f"{root}/{name.format(f'{root}/')}" for name in READ[5 - dims]}
    other = {s.partition("#")[0] for s in other}  # one row for a file of pages where pages are no use
    wrong = {s for s, row in rows.items() if AXES[dims] in row["reason"]}
    assert other - {f"{root}/pages.tif"} == wrong
    for name, reason in BROKEN.items():
        assert reason in rows[f"{root}/{name}"]["reason"], name
    more = {f"{root}/pages.tif"} if dims == 3 else set()
    assert {*rows} == good | wrong | more | {f"{root}/{name}" for name in BROKEN}
    assert {name.removeprefix(f"{root}/"): reason for name, reason in passed.items()} == PASSED
    said = capsys.readouterr()
    assert "passed over: ._scan.nii.gz, .hidden" in said.out
    assert len(said.err.splitlines()) == min(21, sum(row["status"] == "failed" for row in rows.values()))


def test_what_holds_no_scan_says_so_and_is_no_silence(models: dict[int, Path], tmp_path: Path):
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    empty.mkdir()
    texts.mkdir()
    for name in ("a.txt", "b.json"):
        (texts / name).write_text("{}")
    code, rows, passed = ask(models[3], tmp_path / "out", empty, texts, texts / "a.txt")
    assert code == 1
    assert [row["reason"] for row in rows.values()] == [
        "empty: nothing in it", "texts: no scan or picture among its 2 files",
        "a.txt: not a scan, nor a PNG, JPEG, TIFF or BMP picture, whatever its name says",
    ]  # fmt: skip
    assert [Path(name).name for name in passed] == ["a.txt", "b.json"]


def test_only_twenty_lines_are_shown_of_many_broken_files(
    models: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "many").mkdir()
    for i in range(30):
        (tmp_path / "many" / f"{i:02}.nii").write_bytes(b"")
    code, rows, _ = ask(models[3], tmp_path / "out", tmp_path / "many")
    said = capsys.readouterr()
    assert (code, len(rows)) == (1, 30)
    assert len(said.err.splitlines()) == 21
    assert "and 10 more, in predictions.csv" in said.err
    assert said.out.count("cannot be read: ") == 21


def test_json_holds_what_was_passed_over_and_rows_hold_the_notes_of_reading(
    models: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "cube.npy", phantom().voxels)
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert command.main([str(models[3]), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed_over"] == [{"source": f"{tmp_path}/in/notes.txt", "reason": "not a scan"}]
    assert found["rows"][0]["notes"] == "no voxel size and no orientation in this format"


def test_a_picture_or_an_x_ray_is_no_scan_of_one_slice(models: dict[int, Path], tmp_path: Path):
    flat = replace(phantom(), voxels=phantom().voxels[:1], geometry="none")
    model = medformer.load(models[3])
    with pytest.raises(ScanError, match="has 2 axes, but the checkpoint takes 3"):
        medformer.predict(model, flat)
    assert medformer.predict(model, replace(flat, geometry="patient")).labels is not None


def test_one_scan_is_read_ahead_and_one_written_behind(
    models: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Memory is that of three scans, however many there are."""
    (tmp_path / "in").mkdir()
    for i in range(5):
        phantom(i).save(tmp_path / "in" / f"{i}.nii")
    reads, asked = [], []
    timed, real = command._timed, command.predict
    monkeypatch.setattr(command, "_timed", lambda read: (reads.append(1), timed(read))[1])
    monkeypatch.setattr(command, "predict", lambda *a, **k: (asked.append(len(reads)), real(*a, **k))[1])
    code, rows, _ = ask(models[3], tmp_path / "out", tmp_path / "in")
    assert (code, len(rows)) == (0, 5)
    assert all(count <= i + 2 for i, count in enumerate(asked))


@pytest.mark.parametrize("axes", ["LPS", "ASR", "IRP"])
def test_a_turned_scan_is_not_held_twice_and_gives_the_same_answer(axes: str, models: dict[int, Path]):
    model, volume = medformer.load(models[3]), phantom()
    letters = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    turns = [letters[letter] for letter in axes]
    xyz = volume.voxels.transpose(2, 1, 0).transpose([axis for axis, _ in turns])
    xyz = xyz[tuple(slice(None, None, sign) for _, sign in turns)]
    affine = np.eye(4)
    for column, (axis, sign) in enumerate(turns):
        affine[:3, column] = volume.affine[:3, axis] * sign
    affine[:3, 3] = volume.affine[:3, 3]
    for (axis, sign), n in zip(turns, xyz.shape, strict=True):
        affine[:3, 3] += volume.affine[:3, axis] * (n - 1) * (sign < 0)
    turned = replace(volume, voxels=np.ascontiguousarray(xyz.transpose(2, 1, 0)), affine=affine)
    assert turned.orientation == axes
    view = turned.canonical(copy=False)
    assert np.shares_memory(view.voxels, turned.voxels)
    np.testing.assert_array_equal(view.voxels, volume.voxels)
    np.testing.assert_allclose(view.affine, volume.affine, atol=1e-9)
    straight, other = (medformer.predict(model, v, probabilities=True) for v in (volume, turned))
    assert other.labels is not None
    assert other.probabilities is not None
    assert other.labels.shape == turned.shape
    np.testing.assert_array_equal(turned.turned(other.labels), straight.labels)
    np.testing.assert_array_equal(turned.turned(other.probabilities), straight.probabilities)
    assert other.voxels == {"a": int((other.labels == 1).sum())}


def test_a_series_that_highdicom_refuses_keeps_its_map_and_says_why(
    models: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hd = pytest.importorskip("highdicom")
    write_dicom_series(phantom(), tmp_path / "series")

    def refuse(*args: Any, **more: Any) -> None:
        raise AttributeError("no such attribute")

    monkeypatch.setattr(hd.seg, "Segmentation", refuse)
    code, rows, _ = ask(models[3], tmp_path / "out", tmp_path / "series")
    (row,) = rows.values()
    assert (code, row["status"]) == (0, "ok")
    assert (
        "no DICOM SEG: highdicom cannot make one of this series (AttributeError: no such attribute)" in row["warnings"]
    )
    assert (tmp_path / "out" / row["map"]).is_file()


def test_leftovers_of_a_header_with_its_voxels_beside_it_are_no_rows(models: dict[int, Path], tmp_path: Path):
    (tmp_path / "in").mkdir()
    volume = phantom()
    nib.save(nib.Nifti1Pair(volume.voxels.T, volume.affine), tmp_path / "in" / "pair.img")
    header = (
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "ElementSpacing = 1 1 1",
        "DimSize = 16 16 10",
        "ElementType = MET_SHORT",
        "ElementDataFile = s.raw",
    )
    (tmp_path / "in" / "s.mhd").write_text("\n".join(header) + "\n")
    (tmp_path / "in" / "s.raw").write_bytes(volume.voxels.tobytes())
    code, rows, passed = ask(models[3], tmp_path / "out", tmp_path / "in")
    assert {Path(source).name: row["status"] for source, row in rows.items()} == {"pair.hdr": "ok", "s.mhd": "ok"}
    assert (code, passed) == (0, {})


def test_labels_of_two_axes_are_counted_alike(models: dict[int, Path], tmp_path: Path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    code, rows, _ = ask(models[2], tmp_path / "out", tmp_path / "a.png", tmp_path / "b.png", tmp_path / "a.png")
    assert code == 0
    assert len(rows) == 2  # by source; the file given twice has a row of its own each time
    with open(tmp_path / "out" / "predictions.csv") as file:
        assert len([*csv.DictReader(file)]) == 3
    for row in rows.values():
        with Image.open(tmp_path / "out" / row["map"]) as image:
            assert int(row["voxels_a"]) == int((np.asarray(image) == 1).sum())


def test_pictures_beside_a_series_are_named_where_its_folder_is_read(
    models: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By read_volume, and so by embed and the page; by a table of cases as a count."""
    rows = ["path,label,split"]
    for i in range(6):
        write_dicom_series(phantom(i), tmp_path / f"s{i}", patient_id=str(i))
        Image.fromarray(GREY).save(tmp_path / f"s{i}" / "photo.png")
        rows.append(f"s{i},{'ab'[i % 2]},{('train', 'val', 'test')[i // 2]}")
    left = "photo.png: a picture without a place in a patient; find_scans(images=True) lists it"
    assert f"left out: {left}" in read_volume(tmp_path / "s0").notes
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    task = tasks.read_task(tmp_path / "cases.csv", 3, (8, 8, 8), 0, list)
    assert "6 of 6 images: files in its folder left out, which are no part of the scan" in task.notes
    assert commands.main(["embed", str(models[3]), str(tmp_path / "s0"), str(tmp_path / "t.npy")]) == 0
    assert f"note: left out: {left}" in capsys.readouterr().out


def test_files_beside_the_channels_of_a_case_are_passed_over_by_name(tmp_path: Path):
    torch.manual_seed(0)
    about = About(task="t", kind="segmentation", names=("a",), size=(8,) * 3, cases={"test": 3}, channels=("t1", "t2"))
    model = tmp_path / "two.safetensors"
    save_finetuned(Finetuned(network_of(medformer.tiny_3d(**LITTLE, in_channels=2), about), about), model)
    for name in ("p1/t1", "p1/t2", "p1/mask", "p2/t1", "other/scan"):
        path = tmp_path / "in" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        phantom().save(path)
    (tmp_path / "in" / "notes.txt").write_text("x")
    code, rows, passed = ask(model, tmp_path / "out", tmp_path / "in")
    assert code == 1
    assert sorted((Path(row["name"]).name, row["status"]) for row in rows.values()) == [("p1", "ok"), ("p2", "failed")]
    assert {Path(name).name: reason for name, reason in passed.items()} == dict.fromkeys(
        ("mask.nii.gz", "scan.nii.gz", "notes.txt"), "fits no channel of a case"
    )


def test_a_file_that_cannot_be_opened_is_a_row(models: dict[int, Path], tmp_path: Path):
    (tmp_path / "in").mkdir()
    phantom().save(tmp_path / "in" / "locked.nii")
    (tmp_path / "in" / "locked.nii").chmod(0)
    if os.access(tmp_path / "in" / "locked.nii", os.R_OK):
        pytest.skip("this user may read everything")
    code, rows, _ = ask(models[3], tmp_path / "out", tmp_path / "in")
    assert code == 1
    assert "cannot be opened" in next(iter(rows.values()))["reason"]
