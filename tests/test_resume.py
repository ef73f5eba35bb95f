"""A run that is killed, stopped or damaged goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import crops
import medformer
import runs
import train

# Drop path draws random numbers in every step: resuming has to restore those as well.
RANDOM = ("--model.drop_path=0.3", "--model.depth=2")


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*.safetensors")
    return safetensors.torch.load_file(path)


def assert_same_run(trainer: Any, run: Path, reference: Path) -> None:
    assert trainer.losses(run) == trainer.losses(reference)
    assert [line["step"] for line in trainer.lines(run)] == list(range(len(trainer.lines(reference))))
    a, b = (runs.load_checkpoint(r, print)[1] for r in (run, reference))
    assert all(torch.equal(a["method"][name], value) for name, value in b["method"].items())
    assert all(torch.equal(weights(run)[name], value) for name, value in weights(reference).items())


METHODS = {
    "dino": RANDOM,
    "byol": ("byol", *RANDOM, "--views.local_views=0", "--byol.hidden=32", "--byol.projection=16"),
    "igpt": (
        "igpt", "--views.local_views=0", "--views.global_views=1", "--igpt.colours=16", "--igpt.patch=4x4x4",
        "--igpt.fit_steps=2", "--igpt.objective=bert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_bit_identical_weights(trainer: Any, lives: Any, tmp_path: Path, method: str) -> None:
    """kill -9 in the middle; then two workers instead of none, which must not matter either."""
    killed, whole, flags = tmp_path / "killed", tmp_path / "whole", (*METHODS[method], "--steps=12")
    lost = lives(trainer.arguments(killed, *flags), strike={"step": 7, "after": 0.01})
    assert lost["codes"] == [-signal.SIGKILL], lost
    assert 0 < int(runs.checkpoints(killed)[-1].stem[5:]) < 12
    again = lives([f"--resume={killed}", "--workers=2"])
    reference = lives(trainer.arguments(whole, *flags))
    assert (again["codes"], reference["codes"]) == ([0], [0]), (again, reference)
    assert "going on at step" in again["out"][0]
    assert_same_run(trainer, killed, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(
    trainer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    real = runs.Metrics.write

    def write(self: runs.Metrics, step: int, values: dict[str, float]) -> None:
        real(self, step, values)
        if step == 2:
            os.kill(os.getpid(), number)

    assert trainer(tmp_path / "whole", "--steps=6", *RANDOM) == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs.Metrics, "write", write)
        # The signal lands during step 2 and is seen after step 3.
        assert trainer(tmp_path / "run", "--steps=6", "--save_every=100", *RANDOM) == 128 + number
    said = capsys.readouterr().out
    assert f"medformer pretrain --resume {tmp_path / 'run'}" in said
    assert [p.name for p in runs.checkpoints(tmp_path / "run")] == ["step-00000004.pt"]
    assert train.main([f"--resume={tmp_path / 'run'}"]) == 0
    assert_same_run(trainer, tmp_path / "run", tmp_path / "whole")


def test_metrics_after_the_checkpoint_are_written_anew(trainer: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert trainer(run, "--steps=4") == 0
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')  # a run that died after its checkpoint, mid-line
    assert train.main([f"--resume={run}", "--steps=7"]) == 0
    assert [line["step"] for line in trainer.lines(run)] == list(range(7))
    assert 99.0 not in trainer.losses(run)


def test_a_truncated_newest_checkpoint_falls_back_aloud(
    trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer(tmp_path / "whole", "--steps=6") == 0
    run = tmp_path / "run"
    assert trainer(run, "--steps=6") == 0
    newest = runs.checkpoints(run)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    assert train.main([f"--resume={run}"]) == 0
    said = capsys.readouterr().out
    assert f"WARNING: {newest} is damaged" in said
    assert "going on at step 4 of 6" in said
    assert_same_run(trainer, run, tmp_path / "whole")


def test_nothing_but_damaged_checkpoints_is_an_error(
    trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert trainer(run, "--steps=3") == 0
    for path in runs.checkpoints(run):
        path.write_bytes(b"")
    assert train.main([f"--resume={run}"]) == 1
    assert "none of its 2 checkpoints can be read" in capsys.readouterr().err


def test_resuming_another_model_lists_what_differs(
    trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert trainer(run, "--steps=1") == 0
    flags = [f"--resume={run}", "--model.width=48", "--dino.prototypes=64", "--optim.lr=0.1"]
    assert train.main(flags) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "another model" in error
    assert "model.width is 24 there, 48 here" in error
    assert "dino.prototypes is 32 there, 64 here" in error
    assert "optim" not in error


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = medformer.Backbone(medformer.BackboneConfig(width=24, depth=1, heads=2))
    medformer.save(model, tmp_path / "backbone.safetensors")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    for name in ("backbone.safetensors", "other.pt", "empty"):
        assert train.main([f"--resume={tmp_path / name}"]) == 1
        error = capsys.readouterr().err.strip()
        assert name in error
        assert len(error.splitlines()) == 1


def test_a_checkpoint_file_and_auto_name_a_run_too(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume=auto"]) == 2
    assert "no folder in runs/" in capsys.readouterr().err
    assert train.main([*trainer.flags, f"--data.root={trainer.scans}", "--steps=4"]) == 0
    (run,) = [p for p in Path("runs").iterdir() if p.name != "cache"]
    assert train.main(["--resume=auto", "--steps=5"]) == 0
    assert "--steps was 4 in this run and is 5" in capsys.readouterr().out
    assert train.main(["--resume=auto", "--steps=2"]) == 2
    assert "--steps 2 is below the 5 steps" in capsys.readouterr().err
    assert train.main([f"--resume={runs.checkpoints(run)[0]}", "--steps=5"]) == 0
    assert [line["step"] for line in trainer.lines(run)] == list(range(5))


def test_another_batch_size_goes_on_with_the_next_sample(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = crops.Crops.__getitem__
    monkeypatch.setattr(crops.Crops, "__getitem__", lambda self, sample: drawn.append(sample) or real(self, sample))
    assert trainer(tmp_path / "run", "--steps=3") == 0
    assert drawn == [0, 1, *range(6)]  # the first step is shown to the teacher beforehand
    drawn.clear()
    assert train.main([f"--resume={tmp_path / 'run'}", "--steps=5", "--batch_size=3"]) == 0
    assert drawn == [*range(6, 12)]


def test_changed_scans_are_named_on_resume(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert trainer(run, "--steps=1", "--data.held_out=0") == 0
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in ("scan0.nii", "scan1.nii"):
        (fewer / name).symlink_to(trainer.scans / name)
    assert train.main([f"--resume={run}", "--steps=2", f"--data.root={fewer}"]) == 0
    assert "WARNING: the scans differ" in capsys.readouterr().out
