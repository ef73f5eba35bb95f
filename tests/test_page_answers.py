"""The page of a fine-tuned model: its answers, the cases it learned from, several scans as a table."""

from __future__ import annotations

import csv
import json
import shlex
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medformer.answers.model import save_finetuned
from medformer.answers.predict import predict
from medformer.commands import main
from medformer.data import make_phantom, read_volume, write_dicom_series
from medformer.page import cases, command, page, serve
from tests.pages import SHAPE, a_finetuned, a_model, a_run, launched, unpacked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


def test_several_scans_give_a_table(folder: Path, browser: Any, tmp_path: Path) -> None:
    model = a_finetuned("segmentation", ("one", "two"))
    viewer = page.Viewer(model.backbone, folder / "model.safetensors")
    viewer.finetuned = model
    (tmp_path / "bad.nii").write_bytes(b"no scan")
    files = [folder / "scan.nii.gz", tmp_path / "bad.nii", folder / "cases" / "case1.nii"]
    running = serve.make_server(viewer, [], 0)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.goto(running.address)
    assert not opened.locator("#overlay").is_visible()
    opened.set_input_files("#file", files)
    opened.locator("#count", has_text="2 of 3 scans answered, 1 cannot be").wait_for()
    table = [r.locator("td").all_text_contents() for r in opened.locator("#rows tbody tr").all()]
    assert [row[0] for row in table] == ["scan.nii.gz", "bad.nii", "case1.nii"]
    for path, row in ((files[0], table[0]), (files[2], table[2])):
        volumes = predict(model, read_volume(path)).volumes_ml or {}
        assert [float(cell) for cell in row[1:3]] == pytest.approx(list(volumes.values()), rel=1e-3)
    assert table[1][3].startswith("bad.nii: ")
    assert opened.text_content("#name") == "case1.nii"
    opened.locator("#rows button", has_text="scan.nii.gz").click()
    opened.locator("#name", has_text="scan.nii.gz").wait_for()
    with opened.expect_download() as waiting:
        opened.click("#save")
    with open(waiting.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scan"] for row in rows] == ["scan.nii.gz", "bad.nii", "case1.nii"]
    assert rows[0]["one, ml"] == table[0][1]
    assert rows[1]["problem"] == table[1][3]
    opened.close()
    running.shutdown()
    running.server_close()
    thread.join()


def test_nearest_cases_are_compared_without_what_all_share() -> None:
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=16), 0.05 * rng.normal(size=(12, 16))
    vectors = [(v := shared + o) / np.linalg.norm(v) for o in own]
    known = [cases.Case(name=str(i), vector=v, picture="", label=f"l{i}") for i, v in enumerate(vectors)]
    found = cases.nearest(known, vectors[3])
    assert [found[0]["name"], found[0]["label"]] == ["3", "l3"]
    assert found[0]["similarity"] == pytest.approx(1)
    assert found[1]["similarity"] < 0.9 < vectors[3] @ vectors[int(found[1]["name"])]


def test_training_images_of_an_archive_come_with_their_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 20, 24)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images)
    (tmp_path / "training.csv").write_text(f"path,label\n{tmp_path}/set.npz#train_images[3],glioma\n")
    model = a_finetuned("classes", ("a", "b"), dims=2)
    found = cases.read_cases(page.Viewer(model.backbone, tmp_path / "m"), tmp_path / "training.csv", 9, list)
    assert [(case.name, case.label) for case in found] == [("set 3", "glioma")]


def test_curves_of_a_fine_tuning_are_one_for_each_rate(tmp_path: Path) -> None:
    rows = [{"lr": lr, "step": s, "loss": s * lr} for lr in (0.1, 0.01) for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert page.training_curves(tmp_path, rates=True) == {
        "loss, lr 0.1": [[1, 0.1], [2, 0.2]], "loss, lr 0.01": [[1, 0.01], [2, 0.02]],
    }  # fmt: skip


def test_a_fine_tuned_model_shows_its_mask_and_millilitres(folder: Path) -> None:
    model, volume = a_finetuned("segmentation", ("one", "two")), read_volume(folder / "scan.nii.gz")
    viewer = page.Viewer(model.backbone, folder / "model.safetensors")
    viewer.finetuned = model
    scan = viewer.scan(volume, "scan")
    said = predict(model, volume)
    assert np.array_equal(unpacked(scan["mask"], "u1").reshape(SHAPE), said.labels)
    assert [part["ml"] for part in scan["answer"]["structures"]] == list((said.volumes_ml or {}).values())
    assert scan["answer"]["scores"] == "dice 0.5 [0.4, 0.6]"
    assert scan["answer"]["cases"] == 9


@pytest.mark.parametrize(("kind", "names"), [("classes", ("a", "b")), ("regression", ("age",))])
def test_answers_stand_beside_their_held_out_scores(folder: Path, kind: str, names: tuple[str, ...]) -> None:
    model, volume = a_finetuned(kind, names), read_volume(folder / "scan.nii.gz")
    viewer = page.Viewer(model.backbone, folder / "model.safetensors")
    viewer.finetuned = model
    answer, said = viewer.scan(volume, "scan")["answer"], predict(model, volume)
    if kind == "classes":
        assert said.probabilities is not None
        shares = sorted(said.probabilities.tolist(), reverse=True)
        assert [(share, score) for _, share, score in answer["classes"]] == [(share, 0.5) for share in shares]
        assert answer["classes"][0][0] == said.answer
    else:
        assert answer["value"] == said.value
        assert answer["error"] == 0.5
    assert "0.5 [0.4, 0.6]" in answer["scores"]


def test_a_picture_has_no_millimetres(tmp_path: Path) -> None:
    model = a_finetuned("segmentation", ("one",), dims=2)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20)).astype(np.uint8)).save(tmp_path / "p.png")
    viewer = page.Viewer(model.backbone, tmp_path / "model.safetensors")
    viewer.finetuned = model
    scan = viewer.scan(page.load_scan(tmp_path / "p.png", 2), "p")
    assert not scan["measured"]
    assert scan["answer"]["structures"][0]["ml"] is None


def test_only_cases_that_the_run_was_trained_on_are_compared(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "skipped.txt").write_text("case1: too thin\n")
    viewer = page.Viewer(a_model(), folder / "backbone.safetensors")
    skipped = command._skipped(tmp_path)
    assert [case.name for case in cases.read_cases(viewer, folder / "cases", 9, list, skipped)] == ["case2"]
    (tmp_path / "training.csv").write_text(f"path\n{folder / 'cases/case1.nii'}\n")
    assert [case.name for case in cases.read_cases(viewer, tmp_path / "training.csv", 9, list)] == ["case1"]


def test_every_end_names_a_command_that_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_finetuned(a_finetuned("segmentation", ("one", "two")), Path("model.safetensors"))
    scans = Path("my scans")
    write_dicom_series(make_phantom(0, shape=(10, 24, 24)), scans / "deep" / "series")
    (scans / "other").mkdir()
    (scans / "other" / "mr.nii.gz").write_bytes((folder / "scan.nii.gz").read_bytes())
    sources, commands = [], [["predict", "model.safetensors", "my scans", "--out", "my answers"]]
    for run in range(3):  # predict, the report that it names, the predict that this names
        assert main(commands[-1]) == 0
        said = capsys.readouterr().out
        words = next(shlex.split(line)[1:] for line in said.splitlines() if line.startswith("next: "))
        assert words[0] == "medformer"
        commands.append(words[1:])
        if run == 0:
            with open("my answers/predictions.csv", newline="") as file:
                sources = sorted(row["source"] for row in csv.DictReader(file))
    assert sources == ["my scans/deep/series", "my scans/other/mr.nii.gz"]
    assert [words[0] for words in commands] == ["predict", "report", "predict", "report"]
    assert Path("my answers/page.html").is_file()


@pytest.mark.parametrize("command", ["report", "evaluate", "finetune", "predict"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    where = str(tmp_path / "file" / "out")
    rest = {"report": ["none.nii"], "predict": ["none.nii"]}.get(command, ["--task", "none.csv"])
    out = where + "/p.html" * (command == "report")
    assert main([command, str(tmp_path / "none.safetensors"), *rest, "--out", out]) != 0
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert f"--out {where}: Not a directory; give a folder that can be written" in said


def test_spacings_are_compared_on_the_axes_of_training() -> None:
    model = a_finetuned("regression", ("age",))
    model.about = replace(model.about, spacing_mm=((5.0, 1.0, 1.0),) * 3)
    scan = make_phantom(0, shape=(10, 30, 30), spacing_mm=(5.0, 1.0, 1.0))
    columns = scan.affine[:, [0, 2, 1, 3]]  # y and z swapped in the file
    turned = replace(scan, voxels=np.ascontiguousarray(scan.voxels.transpose(1, 0, 2)), affine=columns)
    assert turned.spacing_mm == (1.0, 5.0, 1.0)
    assert predict(model, scan).warnings == predict(model, turned).warnings == ()
    assert "spacing 1x1x5 mm" in predict(model, replace(scan, affine=np.diag([5.0, 1.0, 1.0, 1.0]))).warnings[0]
