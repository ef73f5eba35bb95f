"""Downstream evaluation: splits, leaks, probes, fairness, resume, and the one-line errors."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import medformer
from medformer.errors import UserError
from medformer.evaluation import dense, evaluate, fitting, probes, tasks, trials, tuning
from medformer.evaluation.config import DownstreamConfig
from medformer.image_gpt import ImageGPT, ImageGPTConfig

pytest.importorskip("sklearn", reason="scikit-learn is in the extras evaluate and test")

QUICK = ("--steps=3", "--batch_size=4", "--lrs=1e-3", "--seeds=2", "--probe_steps=40", "--resamples=50", "--device=cpu")


def images_of(labels: np.ndarray, size: int = 16, seed: int = 0) -> np.ndarray:
    """Noise, or with rows or columns brighter by turns."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (len(labels), size, size))
    for image, label in zip(images, labels, strict=True):
        image[::2] += 120 * (label == 1)
        image[:, ::2] += 120 * (label == 2)
    return images.astype(np.uint8)


def an_npz(path: Path, **more: np.ndarray) -> Path:
    train, test = np.arange(60) % 3, np.arange(30) % 3
    arrays = {
        "train_images": images_of(train), "train_labels": train[:, None], "val_images": images_of(test, seed=1),
        "val_labels": test[:, None], "class_names": np.array(["plain", "rows", "columns"]),
    }  # fmt: skip
    np.savez(path, **{k: v for k, v in (arrays | more).items() if v is not None})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = medformer.tiny_2d(width=24, depth=2, heads=2, patch_size=4, patch_stride=4, patch_padding=0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    medformer.save(model, path)
    return path


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3D model, and scans with a bright ball, its mask, and a table of them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("volumes")
    model = medformer.tiny_3d(
        width=24, depth=1, heads=2, patch_size=4, patch_stride=4, patch_padding=0, attention="softmax"
    )
    medformer.save(model, root / "model3d.safetensors")
    zyx = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"))
    for i in range(6):
        ball = ((zyx - np.array([4 + i % 3, 6, 5])[:, None, None, None]) ** 2).sum(0) < 12
        voxels = np.random.default_rng(i).normal(100, 20, ball.shape) + 200 * ball
        nib.save(nib.Nifti1Image(voxels.astype(np.float32).T, np.eye(4)), root / f"scan{i}.nii")
        nib.save(nib.Nifti1Image(ball.astype(np.uint8).T, np.eye(4)), root / f"mask{i}.nii")
    with open(root / "masks.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["path", "mask", "patient"])
        out.writerows([f"scan{i}.nii", f"mask{i}.nii", f"p{i}"] for i in range(6))
    return root


def run(checkpoint: Path, task: Path, out: Path, *flags: str) -> int:
    return evaluate.main([str(checkpoint), "--task", str(task), "--out", str(out), *QUICK, *flags])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def test_every_method_runs_resumes_and_is_compared(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, out = an_npz(tmp_path / "stripes.npz"), tmp_path / "out"
    assert run(checkpoint, task, out, "--fractions=0.2,1.0") == 0
    first = json.loads((out / "results.json").read_text())
    assert [r["method"] for r in first["rows"]] == list(trials.CLASSIFY) * 2
    assert first["labelled"] == {"20%": [9, 9], "100%": [48, 48]}  # a fifth of 60 went to validation
    assert all(("auroc_over_scratch" in r) == (r["method"] != "scratch") for r in first["rows"])
    linear = next(r for r in first["rows"] if (r["setting"], r["method"]) == ("100%", "linear"))
    assert linear["auroc"]["mean"] > 0.95
    assert Image.open(out / "plot.png").size[0] > 600
    table = (out / "table.md").read_text()
    assert "| 20% | 9 | knn |" in table
    assert "| auroc of |  | plain | rows | columns |" in table
    assert np.mean(linear["by_class"]) == pytest.approx(
        linear["auroc"]["mean"], abs=1e-4
    )  # macro is the mean of the classes
    capsys.readouterr()

    for path in (out / "cells").glob("100%-finetune-1.npz"):
        path.unlink()
    written = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    assert run(checkpoint, task, out, "--fractions=0.2,1.0") == 0
    assert "going on" in capsys.readouterr().out
    assert all(p.stat().st_mtime_ns == then for p, then in written.items())
    second = json.loads((out / "results.json").read_text())
    assert [r["auroc"] for r in second["rows"]] == [r["auroc"] for r in first["rows"]]

    assert run(checkpoint, task, out, "--fractions=1.0", "--lrs=5e-4") == 2
    assert "another evaluation (lrs is [0.001] there" in error_of(capsys)


def test_masks_are_segmented_in_three_dimensions(volumes: Path, tmp_path: Path) -> None:
    flags = ("--fractions=1.0", "--size=8x8x8", "--steps=25", "--lrs=5e-3", "--seeds=1")
    assert run(volumes / "model3d.safetensors", volumes / "masks.csv", tmp_path / "out", *flags) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["method"] for r in results["rows"]] == list(trials.SEGMENT)
    assert results["kind"] == "segmentation"
    values = {r["method"]: r["dice"]["mean"] for r in results["rows"]}
    assert values["decoder"] > 0.5
    assert all(0 <= v <= 1 for v in values.values())
    assert results["rows"][0]["dice"]["low"] is None  # one held-out scan has no interval
    assert results["rows"][1]["by_class"] == pytest.approx([values["decoder"]], abs=1e-4)  # of one class


def test_several_labels_with_unknown_ones(checkpoint: Path, tmp_path: Path) -> None:
    train, test = np.arange(60) % 3, np.arange(30) % 3
    labels = [np.stack([t == 0, t != 1], 1).astype(int) for t in (train, test)]
    labels[0][:7, 0] = -1
    labels[1][3:5, 1] = -1
    task = an_npz(tmp_path / "several.npz", train_labels=labels[0], val_labels=labels[1], class_names=None)
    assert run(checkpoint, task, tmp_path / "out", "--fractions=1.0", "--methods=knn,linear,finetune") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[1]["auroc"]["mean"] > 0.95


def test_patients_are_never_split(tmp_path: Path) -> None:
    patients = np.arange(60) // 6
    path = an_npz(tmp_path / "p.npz", train_patients=patients, val_images=None, val_labels=None)
    task = tasks.read_task(path, 2, None, 0, list)
    patients_of = task.patients or ()
    homes = {s: {patients_of[i] for i in task.where(s)} for s in ("train", "val", "test")}
    assert all(homes.values())
    assert not homes["train"] & homes["test"]
    assert not homes["train"] & homes["val"]
    assert not homes["val"] & homes["test"]
    clash = an_npz(tmp_path / "q.npz", train_patients=patients, val_patients=np.full(30, 3))
    with pytest.raises(UserError, match=r"1 patient\(s\) are in more than one split"):
        tasks.read_task(clash, 2, None, 0, list)


def test_leaks_are_reported_and_left_out(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = images_of(np.arange(30) % 3, seed=1)
    held[4] = images_of(np.arange(60) % 3)[4]
    task = an_npz(tmp_path / "t.npz", val_images=held)
    np.savez(tmp_path / "seen.npz", images=held[10:12])
    flags = ("--methods=knn", "--fractions=1.0", f"--pretraining={tmp_path / 'seen.npz'}")
    assert run(checkpoint, task, tmp_path / "a", *flags) == 0
    out = capsys.readouterr().out
    assert "LEAK: 1 of 30 held-out cases occur in the task's training cases (t.npz val[4]); left out" in out
    assert "LEAK: 2 of 30 held-out cases occur in the pretraining index (t.npz val[10], t.npz val[11])" in out
    assert json.loads((tmp_path / "a" / "results.json").read_text())["cases"]["test"] == 27
    assert run(checkpoint, task, tmp_path / "b", *flags, "--leaks=keep") == 0
    assert json.loads((tmp_path / "b" / "results.json").read_text())["cases"]["test"] == 30


def test_a_run_says_what_it_was_trained_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml beside the checkpoint names the roots of the leak check and the size of the images."""
    task = an_npz(tmp_path / "t.npz", val_images=images_of(np.arange(30) % 3, size=20, seed=1))
    with np.load(task) as file:
        np.savez(tmp_path / "seen.npz", train_images=file["val_images"][:2])
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "backbone.safetensors").write_bytes(checkpoint.read_bytes())
    roots = os.pathsep.join([str(tmp_path / "seen.npz"), str(tmp_path / "gone")])
    (run_folder / "config.yaml").write_text(f"data: {{root: '{roots}'}}\nviews: {{global_size: [1, 12, 16]}}\n")
    assert run(run_folder, task, tmp_path / "o", "--methods=knn", "--fractions=1.0") == 0
    out = capsys.readouterr().out
    assert "LEAK: 2 of 30 held-out cases occur in the pretraining index" in out
    assert "gone, which is not here" in out
    assert json.loads((tmp_path / "o" / "results.json").read_text())["size"] == [12, 16]


def test_a_leak_of_a_file_is_found_under_another_name(volumes: Path, tmp_path: Path) -> None:
    (tmp_path / "other.nii").write_bytes((volumes / "scan0.nii").read_bytes())
    known = tasks.hashes_of(tmp_path, list)
    task = tasks.read_task(volumes / "masks.csv", 3, None, 0, list)
    assert [h in known for h in task.hashes] == [True] + [False] * 5


def test_labels_of_a_fraction_grow_and_do_not_move(tmp_path: Path) -> None:
    task = tasks.read_task(an_npz(tmp_path / "t.npz"), 2, None, 0, list)
    tenth, half = tasks.fraction(task, 0.13, 3), tasks.fraction(task, 0.5, 3)
    assert np.array_equal(tenth, tasks.fraction(task, 0.13, 3))
    assert set(tenth) != set(tasks.fraction(task, 0.13, 4))
    assert np.bincount(task.labels(half)).tolist() == [8, 8, 8]
    assert np.bincount(task.labels(tasks.few_shots(task, 5, 0))).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--fractions=0.001",),
            "--fractions 0.001 leaves class plain (16 training cases) without a label; use at least",
        ),
        (("--shots=40",), "--shots 40: class plain has 16 training cases; use at most that"),
        (("--fractions=1.5",), "--fractions 1.5 must be above 0 and at most 1"),
        (("--methods=magic",), "--methods magic: a classes task takes knn, linear"),
        (("--size=2x2",), "smaller than the patch kernel"),
        (("--nonsense=1",), "nonsense"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert run(checkpoint, an_npz(tmp_path / "t.npz"), tmp_path / "out", *flags) in (1, 2)
    assert message in error_of(capsys)


def test_a_checkpoint_of_another_dimension_is_refused(
    volumes: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(volumes / "model3d.safetensors", an_npz(tmp_path / "t.npz"), tmp_path / "o") == 2
    assert "images of 2 axes, but the checkpoint takes 3" in error_of(capsys)
    assert run(checkpoint, volumes / "masks.csv", tmp_path / "o") == 2
    assert "scan0.nii has 3 axes, but the checkpoint takes 2" in error_of(capsys)


def test_a_class_absent_from_a_split_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = (np.arange(30) % 2)[:, None]
    assert run(checkpoint, an_npz(tmp_path / "t.npz", val_labels=labels), tmp_path / "o") == 1
    assert "class columns has no case in the test split (30 cases)" in error_of(capsys)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\na.nii,1\n", "needs a header with the column path"),
        ("path\na.nii\n", "give exactly one of label, mask, value, or one column for each label"),
        ("path,label\nscan0.nii,a\nscan1.nii,\n", "row 3 has no label"),
        ("path,label\nnone.nii,a\n", "row 2: 'none.nii' does not exist (looked at "),
        ("path,label,split\nscan0.nii,a,train\nscan1.nii,a,testing\n", "split 'testing' must be train, val or test"),
        ("path,mask\nscan0.nii,scan1.nii\n", "must be whole numbers of 0 to 255"),
    ],
)
def test_a_wrong_table_is_named(volumes: Path, table: str, message: str) -> None:
    path = volumes / "wrong.csv"
    path.write_text(table)
    with pytest.raises(UserError, match="--task") as caught:
        tasks.read_task(path, 3, None, 0, list)
    assert message in str(caught.value)


def test_knn_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    train, queries = (torch.from_numpy(rng.normal(size=(n, 5))) for n in (12, 4))
    target = torch.arange(12) % 3
    found = probes.knn(train, target, queries, 3, k=5)
    for q, row in zip(queries, found, strict=True):
        similar = torch.nn.functional.cosine_similarity(q[None], train)
        votes = np.zeros(3)
        for i in similar.argsort(descending=True)[:5].tolist():
            votes[target[i]] += np.exp(similar[i].item() / 0.07)
        np.testing.assert_allclose(row, votes / votes.sum(), rtol=1e-9)


def test_features_of_the_last_layer_are_the_backbones(checkpoint: Path) -> None:
    model, _, _ = probes.load_model(checkpoint)
    images = [torch.randn(1, 16, 16) for _ in range(5)]
    frozen = probes.extract(model, images, 2, torch.no_grad, list)
    features = model.forward_features(torch.stack(images))
    torch.testing.assert_close(frozen.layers[-1], features.cls)
    torch.testing.assert_close(frozen.pooled, features.patches.mean(1))
    assert len(frozen.layers) == 2  # a model of two blocks has no four last layers


# Once, on a processor where oneDNN computes bf16 itself, no step of fine-tuning had a finite gradient (misc/LOG.md).
ONEDNN_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    "name",
    ["images", pytest.param("scans", marks=pytest.mark.skipif(ONEDNN_BF16, reason="bf16 of masks by oneDNN: see LOG"))],
)
def test_bf16_reaches_the_network_and_says_nearly_the_same(
    name: str, checkpoint: Path, volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "linear" if ONEDNN_BF16 else "linear,finetune"
    flags = ["--fractions=1.0", "--seeds=1", "--steps=2", f"--methods={methods}"]
    model, task = checkpoint, tmp_path / "stripes.npz"
    if name == "images":
        an_npz(task)
    else:  # at a rate that changes nothing: training long enough would end elsewhere with every rounding
        model, task = volumes / "model3d.safetensors", volumes / "masks.csv"
        flags += ["--size=8x8x8", "--lrs=1e-7"]
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert run(model, task, out, *flags, f"--precision={precision}") == 0
        assert f"{precision} on cpu" in capsys.readouterr().out
        found[precision] = [np.load(cell)["predictions"] for cell in sorted((out / "cells").glob("*.npz"))]
    assert len(found["bf16"]) == len(found["fp32"]) >= 1
    for exact, rounded in zip(found["fp32"], found["bf16"], strict=True):
        np.testing.assert_allclose(rounded, exact, atol=0.1)
    if name == "images":
        assert not all(np.array_equal(a, b) for a, b in zip(*found.values(), strict=True))


@pytest.fixture
def sequence_model(tmp_path: Path) -> ImageGPT:
    """An Image-GPT with a codebook, in `run/`."""
    torch.manual_seed(0)
    model = ImageGPT(ImageGPTConfig(vocabulary=16, grid=(4, 4), patch=(4, 4), width=16, depth=4, heads=2))
    model.codebook.fit(model.codebook.patches(torch.randn(40, 1, 16, 16)).flatten(0, 1))
    (tmp_path / "run").mkdir()
    medformer.save(model, tmp_path / "run" / "image_gpt.safetensors")
    return model


def test_image_gpt_is_probed_in_its_middle_and_learns_at_its_end(
    sequence_model: ImageGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [torch.randn(1, 16, 16) for _ in range(5)]
    frozen = probes.extract(sequence_model, images, 2, torch.no_grad, list)
    expected = sequence_model.features(sequence_model.codebook.encode(torch.stack(images)), 2)
    torch.testing.assert_close(frozen.layers[-1], expected)

    task = an_npz(tmp_path / "set.npz")
    assert run(tmp_path / "run", task, tmp_path / "out", "--fractions=1.0") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(trials.CLASSIFY)
    assert next(row for row in rows if row["method"] == "linear")["auroc"]["mean"] > 0.8
    capsys.readouterr()
    assert run(tmp_path / "run", task, tmp_path / "out3", "--size=8x8") == 2
    assert "size=(8, 8) must be (16, 16), the voxels of grid=(4, 4)" in error_of(capsys)


def test_scratch_of_an_image_gpt_keeps_the_codebook_and_nothing_else(
    sequence_model: ImageGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tasks.read_task(an_npz(tmp_path / "t.npz"), 2, (16, 16), 0, list)
    config = DownstreamConfig(task="t", steps=1, batch_size=2)
    bench = trials.Bench(task, sequence_model, config, (16, 16), torch.device("cpu"), tmp_path)
    fresh = bench._fresh(0)
    torch.testing.assert_close(fresh.codebook.centres, sequence_model.codebook.centres, rtol=0, atol=0)
    assert not torch.equal(fresh.token_embed, sequence_model.token_embed)
    before = {name: value.clone() for name, value in sequence_model.state_dict().items()}
    network = bench._trained("finetune", np.arange(6), 1e-2, 0, "")
    assert all(torch.equal(value, before[name]) for name, value in sequence_model.state_dict().items())
    moved = {name for name, value in network.backbone.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in sequence_model.named_parameters()} - {"output"}  # which no classifier asks

    quick = ("--fractions=1.0", "--seeds=1", "--methods=scratch")
    assert run(tmp_path / "run", tmp_path / "t.npz", tmp_path / "out", *quick) == 0
    sequence_model.codebook.centres.neg_()
    (tmp_path / "other").mkdir()
    medformer.save(sequence_model, tmp_path / "other" / "image_gpt.safetensors")
    capsys.readouterr()
    other = (tmp_path / "other", tmp_path / "t.npz", tmp_path / "out2")
    assert run(*other, *quick, f"--scratch_of={tmp_path / 'out'}") == 2
    assert "codebook_sha256" in error_of(capsys)


@pytest.mark.parametrize("kind", ["resnet", "tnt", "stem", "slices"])
def test_other_networks_are_compared_too(kind: str, volumes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    level = {"width": 12, "depth": 1, "heads": 2, "kernel": 2, "stride": 2}
    config = {
        "resnet": medformer.ResNetConfig(depth=10, base_width=32, output_stride=8, stages=2),
        "tnt": medformer.TNTConfig(levels=(level, level), attention="softmax"),  # type: ignore[arg-type]
        "stem": medformer.BackboneConfig(
            width=24, depth=1, heads=2, stem="resnet18", stem_stages=1, patch_size=1, patch_stride=1, patch_padding=0
        ),
        "slices": medformer.SliceEncoderConfig(
            encoder=medformer.ResNetConfig(dims=2, in_channels=3, depth=10, base_width=32, stages=1)
        ),
    }[kind]
    model = tmp_path / "model.safetensors"
    medformer.save(medformer.build(config), model)
    flags = ("--fractions=1.0", "--seeds=1", "--batch_size=2", "--probe_steps=5")
    with open(volumes / "labels.csv", "w") as file:
        file.write("path,label\n" + "".join(f"scan{i}.nii,{i % 2}\n" for i in range(6)))
    for task, methods, more in (("labels", trials.CLASSIFY, ()), ("masks", trials.SEGMENT, ("--size=12x12x12",))):
        out = tmp_path / task
        assert run(model, volumes / f"{task}.csv", out, *flags, *more) == 0
        rows = json.loads((out / "results.json").read_text())["rows"]
        assert [row["method"] for row in rows] == list(methods)


def test_several_tokens_a_voxel_make_no_mask(volumes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = medformer.tiny_3d(width=24, depth=1, heads=2, patch_size=2, patch_stride=1, patch_padding=0,
                              patch_transposed=True)  # fmt: skip
    medformer.save(model, tmp_path / "model.safetensors")
    assert run(tmp_path / "model.safetensors", volumes / "masks.csv", tmp_path / "out", "--size=4x4x4") == 2
    assert "several tokens a voxel (patch_transposed); give a task of classes" in error_of(capsys)


def test_what_each_method_may_move(checkpoint: Path) -> None:
    moved = {}
    for method in ("attentive", "fpt", "finetune"):
        network = tuning.Network(medformer.load(checkpoint), method, 3, dense=False)
        before = {n: p.detach().clone() for n, p in network.backbone.named_parameters()}
        images = [torch.randn(1, 16, 16) for _ in range(6)]
        budget = fitting.Budget(steps=3, batch=6)
        tuning.train_classifier(network, images, torch.arange(6) % 3, 3, budget, 1e-2, 0, torch.enable_grad, list)
        moved[method] = {n for n, p in network.backbone.named_parameters() if not torch.equal(p, before[n])}
    assert moved["attentive"] == set()
    kinds = {n.split(".")[0] if not n.startswith("blocks") else n.split(".")[2] for n in moved["fpt"]}
    assert kinds <= {"norm", "norm1", "norm2", "position", "patch_embed"}
    assert {"patch_embed", "norm1", "position"} <= kinds
    assert any("mlp" in n or "attention" in n for n in moved["finetune"])


def test_scratch_starts_from_other_weights_and_the_same_shape(checkpoint: Path, tmp_path: Path) -> None:
    task = tasks.read_task(an_npz(tmp_path / "t.npz"), 2, None, 0, list)
    model = medformer.load(checkpoint)
    config = DownstreamConfig(task="t", steps=1, batch_size=2, lrs=[1e-12], seeds=1, probe_steps=1)
    bench = trials.Bench(task, model, config, (16, 16), torch.device("cpu"), tmp_path)
    index = task.where("train")
    tuned = bench._trained("finetune", index, 1e-12, 0, "").backbone
    fresh = bench._trained("scratch", index, 1e-12, 0, "").backbone
    assert fresh.config == model.config
    torch.testing.assert_close(tuned.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight, rtol=0, atol=1e-6)
    assert not torch.allclose(fresh.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight, atol=1e-3)


def test_what_knows_no_checkpoint_is_taken_from_another_evaluation(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second checkpoint computes neither scratch nor untrained, and has the numbers it would have had."""
    task, flags = an_npz(tmp_path / "t.npz"), ("--fractions=0.5", *QUICK)
    torch.manual_seed(1)
    other = medformer.build(medformer.load(checkpoint).config)
    medformer.save(other, tmp_path / "other.safetensors")
    assert run(checkpoint, task, tmp_path / "first", "--methods=untrained,scratch", *flags) == 0
    alone = tmp_path / "alone"
    assert run(tmp_path / "other.safetensors", task, alone, "--methods=untrained,scratch", *flags) == 0
    reused = (f"--scratch_of={tmp_path / 'first'}", *flags)
    assert (
        run(tmp_path / "other.safetensors", task, tmp_path / "second", "--methods=linear,untrained,scratch", *reused)
        == 0
    )
    assert "4 results without the checkpoint taken" in capsys.readouterr().out
    cells = sorted(cell.name for cell in (alone / "cells").glob("*.npz"))
    assert [cell.split("-")[1] for cell in cells] == ["scratch"] * 2 + ["untrained"] * 2
    for cell in cells:
        taken = tmp_path / "second" / "cells" / cell
        assert taken.read_bytes() == (tmp_path / "first" / "cells" / cell).read_bytes()
        with np.load(taken) as found, np.load(alone / "cells" / cell) as expected:
            np.testing.assert_array_equal(found["predictions"], expected["predictions"])
    answers = [np.load(tmp_path / "second" / "cells" / f"50%-{m}.npz")["predictions"] for m in
               ("linear-0", "untrained-0", "untrained-1")]  # fmt: skip
    assert all(np.abs(answers[i] - answers[j]).max() > 1e-3 for i, j in ((0, 1), (1, 2)))  # other weights each
    assert run(checkpoint, task, tmp_path / "third", "--methods=scratch", *reused, "--steps=4") == 2
    assert "steps is 3 there, 4 here; leave it out" in capsys.readouterr().err
    wide = medformer.tiny_2d(width=32, depth=2, heads=2, patch_size=4, patch_stride=4, patch_padding=0)
    medformer.save(wide, tmp_path / "wide.safetensors")
    assert run(tmp_path / "wide.safetensors", task, tmp_path / "fourth", *reused) == 2
    assert "architecture.width is 24 there, 32 here" in capsys.readouterr().err
    assert run(checkpoint, task, tmp_path / "fifth", f"--scratch_of={tmp_path}", *flags) == 2
    assert "no evaluation there" in capsys.readouterr().err


def test_a_rate_is_chosen_by_three_seeds_and_no_run_is_repeated(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks.read_task(an_npz(tmp_path / "t.npz"), 2, None, 0, list)
    config = DownstreamConfig(task="t", steps=1, batch_size=2, lrs=[1e-3, 1e-2], seeds=5)
    bench = trials.Bench(task, medformer.load(checkpoint), config, (16, 16), torch.device("cpu"), tmp_path / "out")
    (tmp_path / "out" / "cells").mkdir(parents=True)
    on_validation = {1e-3: (0.6, 0.8, 0.8, 0.0, 0.0), 1e-2: (0.9, 0.5, 0.5, 1.0, 1.0)}
    ran = []

    def train(_method: str, _index: np.ndarray, lr: float, seed: int, _what: str) -> tuple[float, int]:
        ran.append((lr, seed))
        return lr, seed

    monkeypatch.setattr(bench, "_trained", train)
    monkeypatch.setattr(bench, "_predict", lambda run, _index: np.array(run))
    monkeypatch.setattr(trials.scores, "point", lambda _metric, run, _truth: on_validation[run[0]][int(run[1])])
    setting = trials.Setting("50%", 0.5, 0)
    cells = [bench.cell(setting, "scratch", seed) for seed in (0, 4, 4)]
    assert [tuple(cell["predictions"]) for cell in cells] == [(1e-3, 0), (1e-3, 4), (1e-3, 4)]
    assert sorted(ran) == [*((1e-3, seed) for seed in (0, 1, 2, 4)), *((1e-2, seed) for seed in (0, 1, 2))]


def test_dense_head_reaches_every_voxel_of_any_size() -> None:
    model = medformer.tiny_3d(width=24, depth=1, heads=2)
    for method in ("linear", "decoder"):
        network = tuning.Network(model, method, 2, dense=True)
        logits = network(torch.randn(2, 1, 16, 12, 20))
        assert logits.shape == (2, 3, 16, 12, 20)
        assert (logits.detach().flatten(2).std(-1) > 0).all()


def test_tiles_cover_an_image_below_and_above_the_crop() -> None:
    torch.manual_seed(0)
    model = medformer.tiny_3d(width=24, depth=1, heads=2, patch_size=4, patch_stride=4, patch_padding=0)
    network = tuning.Network(model, "linear", 2, dense=True)
    for shape in ((5, 9, 30), (8, 8, 8)):
        image = torch.randn(1, *shape)
        guess, one_by_one = (dense.predict_dense(network, image, (8, 8, 8), 2, n, torch.no_grad) for n in (5, 1))
        assert guess.shape == shape
        assert (guess == one_by_one).mean() > 0.999  # a tie may fall either way


def test_cubes_of_one_folder_are_scaled_alike_as_in_pretraining(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for i in range(6):
        values = np.random.default_rng(i).normal(20, 60, (8, 8, 8)).round().astype(np.int16)
        values[:3] = -900 if i else 20
        nib.save(nib.Nifti1Image(values.T, np.eye(4)), tmp_path / "scans" / f"{i}.nii")
    rows = [f"scans/{i}.nii,{i % 2},{('train', 'test')[i > 3]}" for i in range(6)]
    (tmp_path / "task.csv").write_text("\n".join(["path,label,split", *rows]))

    def first(said: str = "") -> tuple[torch.Tensor, str]:
        (tmp_path / "modality.txt").write_text(said)
        task = tasks.read_task(tmp_path / "task.csv", 3, None, 0, list)
        return task.images[0][0], " ".join(task.notes)

    values = torch.from_numpy(np.random.default_rng(0).normal(20, 60, (8, 8, 8)).round())
    values[:3] = 20
    image, notes = first()
    torch.testing.assert_close(image, (values / 500).half())
    assert "5 of 6 scans without a modality look like CT" in notes
    image, notes = first("MR")
    assert (image.float() - values / 500).abs().max() > 0.5
    assert "look like CT" not in notes
