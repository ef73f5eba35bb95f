"""Fine-tuning and prediction: what comes out is what was reported, on the scan's own grid, whatever the input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import medformer
from medformer import commands
from medformer.answers import command, results
from medformer.answers import finetune as tuning_command
from medformer.answers.model import Finetuned, save_finetuned
from medformer.answers.predict import predict
from medformer.channels import with_channels
from medformer.data import Volume, read_volume
from medformer.data.writing import write_dicom_series
from medformer.errors import UserError
from medformer.evaluation import evaluate
from medformer.evaluation.scores import dice

pytest.importorskip("sklearn", reason="scikit-learn is in the extras evaluate and test")

LITTLE: dict[str, Any] = {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "patch_stride": 4, "patch_padding": 0,
                          "attention": "softmax"}  # fmt: skip
QUICK = {"steps": 4, "batch_size": 4, "lrs": [5e-3], "checks": 2, "resamples": 50, "device": "cpu"}
# As stored: x to the left, y and z swapped, oblique by nothing, spacing of its own on each axis.
TURNED = np.array([[-1.5, 0, 0, 20], [0, 0, 2.0, -7], [0, 1.0, 0, 3], [0, 0, 0, 1]])


def a_case(folder: Path, i: int, shape: tuple[int, int, int] = (12, 14, 10)) -> dict[str, Any]:
    """A NIfTI scan with a bright ball, its mask and its volume in voxels; (x, y, z) as stored."""
    rng = np.random.default_rng(i)
    xyz = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    radius = 2 + 2 * rng.random()
    ball = ((xyz - np.array([4 + i % 4, 6, 5])[:, None, None, None]) ** 2).sum(0) < radius**2
    voxels = rng.normal(100, 10, shape) + 300 * ball
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), TURNED), folder / f"scan{i}.nii.gz")
    nib.save(nib.Nifti1Image(ball.astype(np.uint8), TURNED), folder / f"mask{i}.nii.gz")
    return {"path": f"scan{i}.nii.gz", "mask": f"mask{i}.nii.gz", "value": int(ball.sum()),
            "label": "large" if ball.sum() > 100 else "small", "patient": f"p{i}"}  # fmt: skip


def table(folder: Path, name: str, rows: list[dict[str, Any]], *columns: str) -> Path:
    with open(folder / name, "w", newline="") as file:
        out = csv.DictWriter(file, columns, extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    return folder / name


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    rows = [a_case(folder, i) for i in range(14)]
    for i, row in enumerate(rows):
        row["split"] = "train" if i < 6 else "val" if i < 9 else "test"
    table(folder, "masks.csv", rows, "path", "mask", "patient", "split")
    table(folder, "numbers.csv", rows, "path", "value", "patient", "split")
    for i, row in enumerate(rows):
        row["label"] = ("odd", "even")[i % 2]
    table(folder, "classes.csv", rows, "path", "label", "patient", "split")
    return folder


@pytest.fixture(scope="module")
def start() -> medformer.Backbone:
    torch.manual_seed(0)
    return medformer.tiny_3d(**LITTLE)


@pytest.fixture(scope="module")
def segmenter(cases: Path, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "seg"
    settings = {**QUICK, "steps": 60, "lrs": [1e-2], "size": [8, 8, 8], "class_names": ["ball"]}
    medformer.finetune(start, cases / "masks.csv", out=out, **settings)
    return out


def test_a_folder_holds_the_model_its_scores_answers_curves_and_card(segmenter: Path, cases: Path):
    names = {p.name for p in segmenter.iterdir()}
    assert names == {"model.safetensors", "model.md", "scores.json", "predictions.csv", "metrics.jsonl", "curves.png",
                     "config.yaml", "finetune.json", "training.csv", "maps"}  # fmt: skip
    model = medformer.load(segmenter / "model.safetensors")
    assert isinstance(model, Finetuned)
    assert model.about.names == ("ball",)
    assert model.about.cases == {"train": 6, "val": 3, "test": 5}
    np.testing.assert_allclose(model.about.spacing_mm, [[1.0, 2.0, 1.5]] * 3)
    scores = json.loads((segmenter / "scores.json").read_text())
    assert scores["scores"]["test"]["dice"]["mean"] > 0.6  # it has learned
    assert scores["scores"]["test"]["dice"]["low"] < scores["scores"]["test"]["dice"]["high"]
    card = (segmenter / "model.md").read_text()
    assert f"{scores['scores']['test']['dice']['mean']:.3f} [" in card
    assert "6 train, 3 val, 5 test" in card
    assert not any(f"scan{i}" in card for i in range(14))  # counts, no names
    assert Image.open(segmenter / "curves.png").size[0] > 600
    validated = [row for row in map(json.loads, (segmenter / "metrics.jsonl").open()) if "validation" in row]
    assert max(row["validation"] for row in validated) == pytest.approx(scores["chosen"]["score"])


def test_dice_of_the_files_is_the_dice_that_was_reported(segmenter: Path, cases: Path):
    rows = [row for row in read_csv(segmenter / "predictions.csv") if row["split"] == "test"]
    assert len(rows) == 5
    found = []
    for row in rows:
        said, scan = nib.load(segmenter / row["map"]), nib.load(cases / f"{row['name']}.nii.gz")
        assert said.shape == scan.shape
        np.testing.assert_allclose(said.affine, scan.affine, atol=1e-6)
        truth = nib.load(cases / f"{row['name'].replace('scan', 'mask')}.nii.gz").get_fdata()
        guess = said.get_fdata()
        found.append(2 * (guess * truth).sum() / (guess.sum() + truth.sum()))
        assert float(row["dice_ball"]) == pytest.approx(found[-1], abs=1e-5)
        assert float(row["ml_ball"]) == pytest.approx(guess.sum() * 3.0 / 1000, rel=1e-4)
    reported = json.loads((segmenter / "scores.json").read_text())["scores"]["test"]["dice"]["mean"]
    assert np.mean(found) == pytest.approx(reported, abs=1e-5)


def test_predict_writes_what_fine_tuning_wrote_and_a_bad_scan_is_a_row(
    segmenter: Path, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "new"
    folder.mkdir()
    for i in (9, 10):
        (folder / f"scan{i}.nii.gz").write_bytes((cases / f"scan{i}.nii.gz").read_bytes())
    (folder / "broken.nii.gz").write_bytes((cases / "scan3.nii.gz").read_bytes()[:300])
    out = tmp_path / "out"
    assert command.main([str(segmenter), str(folder), "--out", str(out), "--probabilities", "--json"]) == 1
    printed = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(printed.out)["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {"scan9": "ok", "scan10": "ok", "broken": "failed"}
    assert "broken.nii.gz" in printed.err
    assert rows["broken"]["reason"]
    for name in ("scan9", "scan10"):
        again, first = nib.load(out / f"{name}.nii.gz"), nib.load(segmenter / "maps" / f"{name}.nii.gz")
        assert np.array_equal(again.get_fdata(), first.get_fdata())
        each = nib.load(out / f"{name}_probabilities.nii.gz").get_fdata()
        assert each.shape == (*again.shape, 2)
        np.testing.assert_allclose(each.sum(-1), 1, atol=1e-5)
        assert np.array_equal(each.argmax(-1), again.get_fdata())
    assert [row["name"] for row in read_csv(out / "predictions.csv")] == list(rows)
    assert json.loads((out / "model.json").read_text())["scores"]["test"]["dice"]["mean"]
    assert command.main([str(segmenter), str(folder), "--out", str(out)]) == 2
    assert "holds answers; give another --out" in capsys.readouterr().err


def test_memory_decides_how_many_windows_go_together_and_nothing_else(segmenter: Path, cases: Path):
    model = medformer.load(segmenter / "model.safetensors")
    volume = read_volume(cases / "scan9.nii.gz")
    with pytest.raises(ValueError, match=r"max_memory=1 MiB must be at least \d+ MiB") as refused:
        predict(model, volume, max_memory="1 MiB")
    least = int(str(refused.value).split("at least ")[1].split(" ")[0])
    little, much = (predict(model, volume, max_memory=m, probabilities=True) for m in (f"{least} MiB", "4 GiB"))
    assert little.probabilities is not None
    assert much.probabilities is not None
    np.testing.assert_allclose(little.probabilities, much.probabilities, atol=1e-5)


def test_a_dicom_series_gets_a_segmentation_object_that_refers_to_it(segmenter: Path, tmp_path: Path):
    hd = pytest.importorskip("highdicom")
    rng = np.random.default_rng(0)
    voxels = rng.normal(100, 10, (10, 14, 12))
    voxels[3:7, 4:9, 3:8] += 300
    volume = Volume(voxels=voxels.round().astype(np.int16), affine=np.diag([1.5, 2.0, 1.0, 1.0]), modality="MR",
                    units="arbitrary", notes=(), source="made")  # fmt: skip
    write_dicom_series(volume, tmp_path / "series")
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in sorted((tmp_path / "series").iterdir()):
            archive.write(file, f"s/{file.name}")
    out = tmp_path / "out"
    assert command.main([str(segmenter), str(tmp_path / "series"), str(tmp_path / "study.zip"), "--out", str(out)]) == 0
    rows = read_csv(out / "predictions.csv")
    assert len(rows) == 2
    assert int(rows[0]["voxels_ball"]) > 20
    assert rows[0]["voxels_ball"] == rows[1]["voxels_ball"]
    seg = hd.seg.segread(out / rows[0]["dicom_seg"])
    whole = seg.get_volume(combine_segments=True).to_patient_orientation("RAF")  # x to the right, ..., as asked
    labels = nib.load(out / rows[0]["map"])
    assert int((whole.array > 0).sum()) == int(rows[0]["voxels_ball"])
    # Middles of both, in millimetres: DICOM's LPS+ against NIfTI's RAS+.
    mine = nib.affines.apply_affine(labels.affine, np.argwhere(labels.get_fdata() > 0)).mean(0)
    theirs = nib.affines.apply_affine(whole.affine, np.argwhere(whole.array > 0)).mean(0)
    np.testing.assert_allclose(mine, theirs * (-1, -1, 1), atol=1e-3)


def test_a_scan_far_from_training_is_warned_about_with_both_figures(segmenter: Path, cases: Path, tmp_path: Path):
    model = medformer.load(segmenter / "model.safetensors")
    image = nib.load(cases / "scan9.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata(), image.affine @ np.diag([3, 1, 1, 1])), tmp_path / "thick.nii.gz")
    assert predict(model, read_volume(cases / "scan9.nii.gz")).warnings == ()
    (warning,) = predict(model, read_volume(tmp_path / "thick.nii.gz")).warnings
    assert warning.startswith("spacing 1x2x4.5 mm, in training 1x2x1.5")


def test_classes_and_numbers_are_rows_of_a_table_with_their_scores(
    cases: Path, start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, kind in (("classes", "classes"), ("numbers", "regression")):
        out = tmp_path / name
        model = medformer.finetune(start, cases / f"{name}.csv", out=out, size=[8, 8, 8], **QUICK)
        assert model.about.kind == kind
        said = capsys.readouterr().out
        assert f"next: medformer predict {out}/model.safetensors {cases}/scan9.nii.gz --out {out}/answers" in said
        assert command.main([str(out), str(cases / "scan9.nii.gz"), "--out", str(out / "answers")]) == 0
        (row,) = read_csv(out / "answers" / "predictions.csv")
        before = next(r for r in read_csv(out / "predictions.csv") if r["name"] == "scan9")
        if kind == "classes":
            assert row["prediction"] == before["predicted"]
            assert float(row["p_odd"]) == pytest.approx(float(before["p_odd"]), abs=2e-5)
            assert float(row["p_odd"]) + float(row["p_even"]) == pytest.approx(1, abs=1e-4)
        else:
            assert float(row["value"]) == pytest.approx(float(before["predicted"]), rel=1e-4)
            tests = [r for r in read_csv(out / "predictions.csv") if r["split"] == "test"]
            errors = [abs(float(r["true"]) - float(r["predicted"])) for r in tests]
            scores = json.loads((out / "scores.json").read_text())["scores"]["test"]
            assert scores["mae"]["mean"] == pytest.approx(np.mean(errors), rel=1e-4)
            assert float(row["expected_error"]) == pytest.approx(np.mean(errors), rel=1e-3)


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(cases: Path, start: Any, tmp_path: Path, monkeypatch):
    settings = {**QUICK, "steps": 6, "checks": 3, "lrs": [1e-3, 5e-3], "size": [8, 8, 8], "patience": 9}
    whole = medformer.finetune(start, cases / "classes.csv", out=tmp_path / "whole", **settings)
    real, calls = tuning_command._Trainer.validation, []

    def stopping(self: Any, network: Any) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, network)

    monkeypatch.setattr(tuning_command._Trainer, "validation", stopping)
    with pytest.raises(KeyboardInterrupt):
        medformer.finetune(start, cases / "classes.csv", out=tmp_path / "half", **settings)
    assert (tmp_path / "half" / "state.pt").exists()
    with pytest.raises(UserError, match=r"holds another fine-tuning \(steps is 6 there, 7 here\)"):
        medformer.finetune(start, cases / "classes.csv", out=tmp_path / "half", **{**settings, "steps": 7})
    half = medformer.finetune(start, cases / "classes.csv", out=tmp_path / "half", **settings)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, half.network.state_dict()[name]), name
    assert whole.about.scores == half.about.scores
    with pytest.raises(UserError, match="holds this fine-tuning, finished; medformer predict"):
        medformer.finetune(start, cases / "classes.csv", out=tmp_path / "half", **settings)


def test_two_processes_train_one_network(cases: Path, start: Any, tmp_path: Path):
    medformer.save(start, tmp_path / "model.safetensors")
    words = ["--task", str(cases / "classes.csv"), "--out", str(tmp_path / "out"), "--size=8x8x8", "--steps=4"]
    words += ["--batch_size=4", "--lrs=1e-3", "--checks=2", "--resamples=50", "--device=cpu"]
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "medformer",
         "finetune", str(tmp_path / "model.safetensors"), *words],
        capture_output=True, text=True, cwd=Path(medformer.__path__[0]).parent, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("next: medformer predict") == 1
    assert isinstance(medformer.load(tmp_path / "out" / "model.safetensors"), Finetuned)


def test_several_channels_one_of_them_missing_are_learned_and_asked(cases: Path, start: Any, tmp_path: Path):
    rows = [
        {"t1": cases / f"scan{i}.nii.gz", "t2": "" if i % 3 == 0 else cases / f"scan{(i + 1) % 14}.nii.gz",
         "mask": cases / f"mask{i}.nii.gz"} for i in range(10)
    ]  # fmt: skip
    task, out = table(tmp_path, "both.csv", rows, "t1", "t2", "mask"), tmp_path / "out"
    settings = {**QUICK, "size": [8, 8, 8], "channels": ["t1", "t2"], "outside": True}
    with pytest.raises(UserError, match="row 2 has no t2"):
        medformer.finetune(start, task, out=out, **settings)
    model = medformer.finetune(start, task, out=out, missing=True, **settings)
    assert model.config.in_channels == 4  # two scans, and for each a flag
    scans = [read_volume(cases / f"scan{i}.nii.gz") for i in (0, 1)]
    both, one = predict(model, scans), predict(model, [scans[0], None])
    assert both.labels is not None
    assert one.labels is not None
    assert both.labels.shape == one.labels.shape == scans[0].shape
    with pytest.raises(ValueError, match="1 volumes for a model of the 2 channels t1, t2"):
        predict(model, scans[0])
    x = torch.randn(2, 2, 8, 8, 8)
    x[0, 1] = torch.nan
    assert model.network(x).isfinite().all()
    asked = table(tmp_path, "asked.csv", rows[:2], "t1", "t2")
    assert command.main([str(out), str(asked), "--out", str(tmp_path / "answers")]) == 0
    assert [row["status"] for row in read_csv(tmp_path / "answers" / "predictions.csv")] == ["ok", "ok"]


@pytest.mark.parametrize("kind", ["backbone", "resnet", "tnt"])
def test_the_same_scan_in_every_channel_gives_what_one_gave(kind: str):
    torch.manual_seed(0)
    levels = (medformer.TNTLevel(width=6, heads=2, kernel=3, stride=2, padding=1, depth=1),
              medformer.TNTLevel(width=24, heads=2, kernel=2, stride=2, depth=1))  # fmt: skip
    model: Any = {
        "backbone": lambda: medformer.tiny_3d(**LITTLE),
        "resnet": lambda: medformer.ResNet(medformer.ResNetConfig(dims=3, depth=10, base_width=32, norm="batch")),
        "tnt": lambda: medformer.TNT(medformer.TNTConfig(dims=3, levels=levels)),
    }[kind]()
    model.eval()
    x, noise = torch.randn(2, 1, 16, 16, 16), torch.randn(2, 3, 16, 16, 16)
    wide = with_channels(model, 3, silent=3)
    with torch.no_grad():
        one = model.forward_features(x).patches
        torch.testing.assert_close(
            wide.forward_features(torch.cat([x, x, x, noise], 1)).patches, one, atol=1e-4, rtol=1e-4
        )


def test_pretraining_on_the_cases_themselves_is_said_and_not_refused(
    cases: Path, start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = {**QUICK, "size": [8, 8, 8], "pretraining": str(cases)}
    medformer.finetune(start, cases / "classes.csv", out=tmp_path / "out", **settings)
    assert "5 of 5 held-out cases were seen without labels in pretraining" in capsys.readouterr().out
    assert "5 of 5 held-out cases were seen" in (tmp_path / "out" / "model.md").read_text()


def test_images_are_classified_and_segmented_without_millimetres(tmp_path: Path):
    torch.manual_seed(0)
    flat: Any = medformer.tiny_2d(**LITTLE)
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        picture, mask = rng.integers(0, 90, (20, 24)).astype(np.uint8), np.zeros((20, 24), np.uint8)
        mask[4 + i % 5 : 12, 6:14] = 1
        picture[mask > 0] += 150
        Image.fromarray(picture).save(tmp_path / f"i{i}.png")
        Image.fromarray(mask).save(tmp_path / f"m{i}.png")
        rows.append({"path": f"i{i}.png", "mask": f"m{i}.png"})
    out = tmp_path / "out"
    medformer.finetune(flat, table(tmp_path, "t.csv", rows, "path", "mask"), out=out, size=[16, 16], **QUICK)
    assert command.main([str(out), str(tmp_path / "i0.png"), "--out", str(tmp_path / "answers")]) == 0
    (row,) = read_csv(tmp_path / "answers" / "predictions.csv")
    assert np.asarray(Image.open(tmp_path / "answers" / row["map"])).shape == (20, 24)
    assert not any(name.startswith("ml_") for name in row)
    tests = [r for r in read_csv(out / "predictions.csv") if r["split"] == "test"]
    for r in tests:
        said = np.asarray(Image.open(out / r["map"]))
        truth = np.asarray(Image.open(tmp_path / f"{r['name'].replace('i', 'm')}.png"))
        assert float(r["dice_1"]) == pytest.approx(dice(said, truth, 1)[0], abs=1e-5)


def test_names_of_files_are_short_and_different():
    assert results.case_names(["a/x.nii.gz", "b/y.png"]) == ["x", "y"]
    assert results.case_names(["a/x.nii.gz", "b/x.nii.gz"]) == ["a_x", "b_x"]
    assert results.case_names(["../x", "x", "x"]) == ["x", "x#2", "x#3"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size=8x8"], "--size"),
        (["--class_names=a,b"], "2 names for 1 structures"),
        (["--value=age"], "--value age: no such column"),
        (["--channels=t1,t2"], "--channels t1: no such column"),
        (["--lrs=0"], "rates above 0"),
        (["--device=cuda:99"], "no"),
        (["--out=/proc/none/x"], "--out /proc/none/x"),
        (["--steps=x"], "--steps x must be a whole number; medformer finetune --help-all"),
        (["--lrs=1e-3,a"], "--lrs a must be a number"),
        (["--train=all"], "--train all must be whole or fpt or frozen"),
        (["--dims=4"], "--dims 4 must be 2 or 3"),
        (["--from_scratch=perhaps"], "--from_scratch perhaps must be true or false"),
        (["--seed=-1"], "--seed -1 must be at least 0"),
        (["--missing=true"], "a case of one file lacks none; name several with --channels"),
        (["--class_names=a,a"], "--class_names a,a: a is there twice"),
        (["--max_memory=x"], "--max_memory 'x' must be bytes"),
        (["--max_memory=1 MiB"], "--max_memory 1 MiB must be at least"),  # before it learns
    ],
)
def test_what_is_wrong_is_one_line(flags: list[str], message: str, cases: Path, tmp_path: Path, capsys, start: Any):
    medformer.save(start, tmp_path / "model.safetensors")
    words = [str(tmp_path / "model.safetensors"), "--task", str(cases / "masks.csv"), "--steps=1", "--size=8x8x8"]
    assert tuning_command.main([*words, "--out", str(tmp_path / "out"), *flags]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_folder_where_nothing_was_learned_yet_is_free(cases: Path, start: Any, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finetune.json").write_text('{"steps": 77}')
    settings = {**QUICK, "steps": 1, "checks": 1, "size": [8, 8, 8]}
    medformer.finetune(start, cases / "classes.csv", out=tmp_path / "out", **settings)
    with pytest.raises(UserError, match=r"holds another fine-tuning \(steps is 1 there, 2 here\)"):
        medformer.finetune(start, cases / "classes.csv", out=tmp_path / "out", **{**settings, "steps": 2})


def test_memory_that_runs_out_is_one_line(cases: Path, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 137 GB")

    monkeypatch.setattr(tuning_command._Trainer, "all_rates", full)
    with pytest.raises(UserError, match=r"--size 8x8x8, --batch_size 4: memory ran out on cpu; take a smaller size"):
        medformer.finetune(start, cases / "classes.csv", out=tmp_path / "out", **{**QUICK, "size": [8, 8, 8]})


def test_folders_stand_for_the_model_in_them(
    segmenter: Path, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of predict, report and export, and of embed, which takes the backbone of a model with answers."""
    scan = str(cases / "scan9.nii.gz")
    assert commands.main(["embed", str(segmenter), scan, str(tmp_path / "t.npy"), "--window", "8x8x8"]) == 0
    assert np.load(tmp_path / "t.npy").shape[-1] == LITTLE["width"]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "finetune.json").write_text("{}")
    for words, message in (
        (["predict", str(tmp_path / "begun"), scan, "--out", str(tmp_path / "o")], "its fine-tuning is not finished"),
        (["export", str(tmp_path)], "no model.safetensors, backbone.safetensors, image_gpt.safetensors in this folder"),
        (["embed", "none", scan, str(tmp_path / "t.npy")], "none: no such file or folder; give weights"),
        (["embed", str(segmenter), scan, "/proc/none/t.npy"], "OUT in /proc/none: No such file"),
        (["embed", str(segmenter), scan, "t.npy", "--window", "8x"], "--window: '8x' must be sizes above 0"),
        (["predict", str(segmenter), "", "--out", str(tmp_path / "o")], "'' names no file"),
    ):
        capsys.readouterr()
        assert commands.main(words) == (1 if "/proc" in message else 2)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_what_cannot_be_asked_says_so(segmenter: Path, cases: Path, tmp_path: Path, capsys, start: Any):
    medformer.save(start, tmp_path / "bare.safetensors")
    flat, out = tmp_path / "flat.png", ["--out", str(tmp_path / "out")]
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(flat)
    assert command.main([str(tmp_path / "bare.safetensors"), str(flat), *out]) == 2
    assert "without a head, which has no answers; medformer finetune" in capsys.readouterr().err
    assert command.main([str(segmenter), str(tmp_path / "none.nii"), *out]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert command.main([str(segmenter), str(flat), *out]) == 1
    assert "has 2 axes, but the checkpoint takes 3" in capsys.readouterr().err
    with pytest.raises(TypeError, match="gives features and no answers"):
        predict(start, read_volume(cases / "scan0.nii.gz"))  # type: ignore[arg-type]
    model = medformer.load(segmenter / "model.safetensors")
    with pytest.raises(UserError, match="tiny_3d is an architecture without weights"):
        medformer.finetune("tiny_3d", cases / "masks.csv", out=tmp_path / "x")
    data = (segmenter / "model.safetensors").read_bytes()
    (tmp_path / "later.safetensors").write_bytes(data.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(ValueError, match="is of format 9 of medformer"):
        medformer.load(tmp_path / "later.safetensors")
    save_finetuned(model, tmp_path / "copy.safetensors")
    again = medformer.load(tmp_path / "copy.safetensors")
    assert again.about == model.about


@pytest.mark.parametrize("task", ["numbers", "both"])
def test_evaluation_takes_numbers_and_several_channels(task: str, cases: Path, start: Any, tmp_path: Path):
    medformer.save(start, tmp_path / "model.safetensors")
    path, more = cases / "numbers.csv", ["--methods=knn,finetune,scratch"]
    if task == "both":
        rows = [{"t1": cases / f"scan{i}.nii.gz", "t2": cases / f"scan{i}.nii.gz" if i % 2 else "",
                 "label": i // 2 % 2} for i in range(12)]  # fmt: skip
        path = table(tmp_path, "both.csv", rows, "t1", "t2", "label")
        more = ["--methods=finetune,scratch", "--channels", "t1,t2", "--missing=true", "--outside=true"]
    words = [str(tmp_path / "model.safetensors"), "--task", str(path), "--size=8x8x8", "--fractions=1.0", "--steps=2"]
    words += ["--batch_size=4", "--lrs=1e-3", "--seeds=2", "--resamples=50", "--device=cpu", *more]
    assert evaluate.main([*words, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    if task == "numbers":
        assert found["metrics"] == ["r2", "mae", "rmse", "r"]
        truth = [int(row["value"]) for row in read_csv(path) if row["split"] == "test"]
        said = np.load(tmp_path / "out" / "cells" / "100%-finetune-0.001-0.npz")["predictions"][:, 0]
        one = np.abs(said - truth).mean()
        other = np.load(tmp_path / "out" / "cells" / "100%-finetune-0.001-1.npz")["predictions"][:, 0]
        mae = next(row for row in found["rows"] if row["method"] == "finetune")["mae"]["mean"]
        assert mae == pytest.approx((one + np.abs(other - truth).mean()) / 2, rel=1e-4)
    assert {row["method"] for row in found["rows"]} >= {"finetune", "scratch"}


def test_an_encoder_of_slices_that_has_one_channel_says_so():
    flat = medformer.BackboneConfig(dims=2, **LITTLE)
    model = medformer.build(medformer.SliceEncoderConfig(encoder=flat))
    assert with_channels(model, 1) is model
    with pytest.raises(UserError, match="a SliceEncoder takes scans of 1 channel"):
        with_channels(model, 2)


@pytest.mark.parametrize("end", ["onnx", "pt2"])
def test_a_fine_tuned_model_leaves_as_a_file_that_computes_the_same(segmenter: Path, tmp_path: Path, end: str):
    """`medformer export` compares the file with PyTorch itself and refuses what differs."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extras export and test")
    out = tmp_path / f"model.{end}"
    argv = ["export", str(segmenter / "model.safetensors"), "--format", end, "--out", str(out)]
    assert commands.main(argv) == 0
    assert out.stat().st_size > 10_000
