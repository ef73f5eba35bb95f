"""Names of files, folders and headers, which may be those of patients: where they go, and that ids replace them."""

from __future__ import annotations

import gzip
import os
import sqlite3
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import FileDataset

import medformer
import train
from medformer.answers import finetune
from medformer.data import make_phantom, read_volume
from medformer.data.names import Ids, hide, ids_of_run, salt_of
from medformer.data.records import hash_patient
from medformer.data.store import build
from medformer.evaluation import evaluate
from medformer.page import command
from tests.dicom_files import write_series

MARK = "Zyxwvut"


def marked(root: Path) -> Path:
    """A DICOM series, a NIfTI file and a broken one of each, with the mark wherever a header or path can hold it."""

    def edit(_: int, ds: FileDataset) -> None:
        ds.PatientName = ds.PatientID = ds.SeriesDescription = ds.StudyDescription = ds.InstitutionName = MARK
        ds.AccessionNumber = ds.ProtocolName = ds.OperatorsName = ds.RescaleType = MARK
        ds.PatientBirthDate = "19010203"

    rng = np.random.default_rng(0)

    def noise(i: int, ds: FileDataset) -> None:
        edit(i, ds)
        ds.Rows = ds.Columns = 20
        ds.PixelData = rng.integers(0, 2000, (20, 20)).astype(np.uint16).tobytes()

    folder = root / f"{MARK} Hans" / f"study_{MARK}"
    write_series(folder / MARK, np.arange(20) * 2.0, edit=noise)
    gap = [0.0, 2.0, 4.0, 9.0]
    write_series(folder / f"gap {MARK}", gap, edit=lambda i, ds: (edit(i, ds), setattr(ds, "SeriesInstanceUID", "1.7")))
    for name, size in ((f"{MARK}.nii.gz", 20), (f"small-{MARK}.nii.gz", 4)):
        image = nib.Nifti1Image(rng.integers(-900, 900, (size,) * 3).astype(np.int16), np.eye(4))
        image.header["descrip"], image.header["aux_file"], image.header["intent_name"] = MARK, MARK, MARK
        image.header["db_name"] = MARK
        nib.save(image, folder / name)
    (folder / f"broken {MARK}.nii.gz").write_bytes(gzip.compress(b"\0" * 400))
    (folder / f"{MARK}_cut.nii").write_bytes((folder / f"{MARK}.nii.gz").read_bytes()[:100])
    return root


def holding(folder: Path, text: str) -> list[str]:
    """Files in which the text stands, in their name or content, in any of the usual spellings."""
    spelled = [text.encode(), text.encode("utf-16-le"), text.lower().encode()]
    return [
        str(p.relative_to(folder))
        for p in sorted(folder.rglob("*"))
        if text.lower() in p.name.lower() or (p.is_file() and any(s in p.read_bytes() for s in spelled))
    ]


RUN = ("--steps=1", "--device=cpu", "--workers=0", "--views.global_size=16x16x16", "--views.local_views=0",
       "--batch_size=2", "--picture_every=0", "--log_every=1")  # fmt: skip


def test_with_ids_no_output_of_a_run_and_its_page_holds_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, out = marked(tmp_path / "in"), tmp_path / "out"
    flags = [f"--data.root={data}", f"--data.cache={out / 'cache'}", f"--out={out / 'run'}", "--data.names=ids", *RUN]
    assert train.main(flags) == 0
    said = capsys.readouterr()
    assert "scan-" in said.out
    assert "skipped" in said.out
    scan = data / f"{MARK} Hans" / f"study_{MARK}" / f"{MARK}.nii.gz"
    arguments = [str(out / "run"), str(scan), "--out", str(out / "page.html"), "--cases", str(data)]
    assert command.main(arguments) == 0
    later = capsys.readouterr()
    for text in (said.out, said.err, later.out, later.err):
        assert MARK.lower() not in text.lower()
    assert holding(out, MARK) == []
    assert build.main([str(data), "--out", str(out / "store"), "--workers=0"]) == 0
    said = capsys.readouterr()
    assert MARK.lower() not in (said.out + said.err).lower()
    assert holding(out, MARK) == []
    assert train.main([*flags, f"--out={tmp_path / 'plain'}", "--data.names=files"]) == 0
    assert MARK in capsys.readouterr().out  # so that this test can fail
    assert holding(tmp_path / "plain", MARK)
    assert command.main([str(out / "run"), str(scan.with_name(f"broken {MARK}.nii.gz"))]) == 1
    assert MARK not in capsys.readouterr().err


def a_task_of_marked_names(folder: Path) -> Path:
    """Ten scans of values like CT, two that do not look so, held-out ones that training repeats; names everywhere."""
    place = folder / f"{MARK} Hans"
    place.mkdir(parents=True)
    rows = ["path,label,patient,doctor,split"]
    for i in range(14):
        volume = make_phantom(i % 12, shape=(10, 12, 12))
        voxels = np.clip(volume.voxels, 0, 99) if i in (3, 7) else volume.voxels
        nib.save(nib.Nifti1Image(voxels.T.astype(np.int16), volume.affine), place / f"{MARK}_{i}.nii.gz")
        split = "train" if i < 6 else "val" if i < 8 else "test"
        rows.append(f"{MARK} Hans/{MARK}_{i}.nii.gz,{'ab'[i % 2]},{MARK}-{i},Dr. {MARK},{split}")
    (folder / "cases.csv").write_text("\n".join(rows))
    return folder / "cases.csv"


@pytest.mark.parametrize("asked", ["flag", "run"])
def test_with_ids_evaluation_and_fine_tuning_name_no_case(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task, run, out = a_task_of_marked_names(tmp_path / "in"), tmp_path / "run", tmp_path / "out"
    seen = tmp_path / f"seen {MARK}"
    seen.mkdir()
    (seen / f"{MARK}.nii.gz").write_bytes((task.parent / f"{MARK} Hans" / f"{MARK}_9.nii.gz").read_bytes())
    run.mkdir()
    medformer.save(medformer.tiny_3d(width=24, depth=1, heads=2, patch_size=4, patch_stride=4, patch_padding=0),
                   run / "backbone.safetensors")  # fmt: skip
    roots = f"'{seen}{os.pathsep}{tmp_path / f'gone {MARK}'}'"
    names = "ids" if asked == "run" else "files"
    config = f"data: {{root: {roots}, names: {names}, cache: '{tmp_path / 'cache'}'}}\n"
    (run / "config.yaml").write_text(config)
    words = [str(run), "--task", "in/cases.csv", "--size=8x8x8", "--steps=1", "--batch_size=2", "--lrs=1e-3",
             "--resamples=50", "--device=cpu", *(["--names=ids"] if asked == "flag" else [])]  # fmt: skip
    assert evaluate.main([*words, "--methods=knn,linear", "--fractions=1.0", "--probe_steps=5", f"--out={out}/e"]) == 0
    assert finetune.main([*words, "--checks=1", f"--out={out}/f"]) == 0
    said = capsys.readouterr()
    assert "LEAK: 2 of 6 held-out cases occur in the task's training cases (scan-" in said.out
    assert "LEAK: 1 of 6 held-out cases occur in the pretraining index (scan-" in said.out
    assert "look like CT: all are taken as CT" in said.out
    assert "columns left aside" in said.out
    assert MARK.lower() not in (said.out + said.err).lower()
    assert holding(out, MARK) == []
    (task.parent / f"{MARK} Hans" / f"{MARK}_2.nii.gz").write_bytes(b"broken")
    for main, more in ((evaluate.main, ["--methods=knn"]), (finetune.main, [])):
        assert main([*words, *more, f"--out={out}/g"]) == 1
        assert MARK.lower() not in capsys.readouterr().err.lower()
        assert main([*[w for w in words if w != "--names=ids"], *more, "--names=files", f"--out={out}/g"]) == 1
        assert MARK in capsys.readouterr().err  # so that this test can fail


def test_free_text_of_a_header_is_in_no_note(tmp_path: Path) -> None:
    folder = marked(tmp_path) / f"{MARK} Hans" / f"study_{MARK}" / MARK
    volume = read_volume(folder)
    assert "CT values in a unit of the header's own, not HU" in volume.notes
    assert MARK.lower() not in str((volume.notes, volume.provenance["tags"], volume.modality)).lower()


def test_ids_are_stable_and_salted(tmp_path: Path) -> None:
    first, again = Ids(salt_of(tmp_path)), Ids(salt_of(tmp_path))
    assert first.of("a/b.nii") == again.of("a/b.nii") != Ids(b"x" * 32).of("a/b.nii")
    assert (tmp_path / "salt").stat().st_mode & 0o077 == 0
    assert ids_of_run({}, None) is None
    assert ids_of_run({"data": {"names": "ids"}}, "files") is None
    assert ids_of_run({"data": {"names": "ids", "cache": str(tmp_path)}}, None).of("x") == first.of("x")  # type: ignore[union-attr]


def test_messages_lose_every_part_of_a_name() -> None:
    names = [f"/data/{MARK} Hans/1-01.dcm", "Müller.nii.gz"]
    assert (
        hide(f"{MARK} Hans/1-01.dcm: 3 slices (1-01.dcm, 'Müller') lie twice", names)
        == "3 slices (..., '...') lie twice"
    )
    assert hide("12x20x20 voxels is below 16x16x16", names) == "12x20x20 voxels is below 16x16x16"


def test_an_empty_salt_is_refused_and_made_anew(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="salt is empty"):
        hash_patient("p", b"")
    (tmp_path / "salt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"no salt in it \(0 bytes\); made anew"):
        assert len(salt_of(tmp_path)) == 32
    store = tmp_path / "store"
    store.mkdir()
    (store / "salt").write_bytes(b"")
    with sqlite3.connect(store / "index.sqlite") as index:  # of names that hid nothing
        index.execute("create table scans (key text)")
    with pytest.warns(UserWarning, match="made anew"):
        assert build.build([], store) == []
    assert len((store / "salt").read_bytes()) == 32
