"""Long runs: a time limit, memory that runs out, losses that leap, and torchrun's restarts."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import collapse
import cost
import runs
import train
from medformer import locks

BYOL = (
    "byol", "--views.local_views=0", "--byol.hidden=32", "--byol.projection=16", "--byol.groups=4", "--byol.koleo=0",
    "--byol.norm=group", "--batch_size=4",
)  # fmt: skip


def test_a_time_limit_ends_in_a_checkpoint(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        clock = [0.0]
        patched.setattr("time.monotonic", lambda: clock.append(clock[-1] + 60) or clock[-1])  # a minute a look
        code = trainer(run, "--steps=1000", "--max_hours=2")
    assert code == 128 + signal.SIGTERM
    done = len(trainer.lines(run))
    assert 0 < done < 120
    assert [path.name for path in runs.checkpoints(run)][-1] == f"step-{done:08d}.pt"
    assert locks.heartbeat(run)["state"] == "stopped"
    assert train.main([f"--resume={run}", f"--steps={done + 2}"]) == 0
    assert [line["step"] for line in trainer.lines(run)] == list(range(done + 2))


def test_a_jump_of_the_clock_moves_nothing(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The computer's time of day is set back a year in the middle: nothing but the stamps of heartbeats reads it."""
    real = runs.Metrics.write

    def jump(self: runs.Metrics, step: int, values: dict[str, float]) -> None:
        if step == 2:
            monkeypatch.setattr("time.time", lambda: 1.0)
        real(self, step, values)

    monkeypatch.setattr(runs.Metrics, "write", jump)
    assert trainer(tmp_path / "run", "--steps=5", "--max_hours=1") == 0
    assert all(line["scans_per_s"] > 0 for line in trainer.lines(tmp_path / "run"))


def short_of(scans: int, monkeypatch: pytest.MonkeyPatch, once: bool = False) -> list[int]:
    """Memory for so many scans in one pass of BYOL; the scans of each pass, those that failed below 0."""
    from byol import Byol

    real, passes = Byol.loss, []

    def loss(self: Byol, student: Any, views: list[torch.Tensor], step: int) -> Any:
        count = len(views[0]) // 2
        if count > scans and not (once and -count in passes):
            passes.append(-count)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        passes.append(count)
        return real(self, student, views, step)

    monkeypatch.setattr(Byol, "loss", loss)
    return passes


def test_memory_that_runs_out_is_met_by_smaller_passes_with_the_same_losses(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer(tmp_path / "whole", "--steps=4", *BYOL) == 0
    with monkeypatch.context() as patched:
        passes = short_of(1, patched)
        assert trainer(tmp_path / "small", "--steps=4", *BYOL) == 0
    assert passes == [-4, -2, *([1] * 16)]
    assert trainer.losses(tmp_path / "small") == pytest.approx(trainer.losses(tmp_path / "whole"), rel=1e-4)
    a, b = (runs.load_checkpoint(tmp_path / name, print)[1]["method"] for name in ("small", "whole"))
    # AdamW divides by the gradient's size: where that is nearly 0, rounding decides the sign of a step of 1e-3.
    differ = torch.cat([(a[name] - value).abs().flatten().float() for name, value in b.items()])
    assert float(differ.quantile(0.99)) < 1e-4
    said = capsys.readouterr().out
    assert "out of memory; 2 of 4 scans in one pass from here on" in said
    assert "(--batch_size 1 --accumulate 4)" in said


@pytest.mark.parametrize(
    ("flags", "room", "words"),
    [
        (
            ("--byol.koleo=0.1",),
            1_200_000,
            "--byol.koleo looks at whole batches, so that smaller ones are",
        ),
        (("--byol.norm=batch",), 1_000_000, "--byol.norm looks at whole batches"),
        (("--byol.koleo=0.1",), 100_000, "--byol.koleo looks at whole batches"),  # not even the weights fit
        (("--batch_size=1",), 10**9, "one scan alone does not fit"),
    ],
)
def test_where_smaller_passes_are_another_training_the_run_ends_in_one_line(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...], room: int, words: str,
) -> None:  # fmt: skip
    short_of(0 if "--batch_size=1" in flags else 2, monkeypatch)
    monkeypatch.setattr(cost, "_MAIN_MEMORY", room)
    assert trainer(tmp_path / "run", "--steps=2", *BYOL, *flags) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert words in error
    assert "--checkpoint_activations or a smaller --views.global_size" in error
    assert ("about" in error) == (10**5 < room < 10**9), error


def test_parts_of_a_batch_hold_the_same_scans_of_every_view() -> None:
    views = [torch.arange(8).reshape(8, 1), 10 + torch.arange(12).reshape(12, 1)]  # 2 and 3 views of 4 scans
    first, second = cost.pieces(views, 4, 2)
    assert [x.flatten().tolist() for x in first] == [[0, 1, 4, 5], [10, 11, 14, 15, 18, 19]]
    assert [x.flatten().tolist() for x in second] == [[2, 3, 6, 7], [12, 13, 16, 17, 20, 21]]
    assert cost.pieces(views, 4, 1)[0] is views


def test_a_leap_of_the_loss_is_said_once_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator).tolist()
    watch = collapse.JumpWatch()
    assert [watch(7 - 0.005 * i + 0.05 * noise[i]) for i in range(300)] == [None] * 300
    said = watch(9.0)
    assert said is not None
    assert "leapt to 9" in said
    assert [watch(9.0 + 0.05 * x) for x in noise[:40]] == [None] * 40
    early = collapse.JumpWatch()
    assert [early(x) for x in (8.0, 3.0, 9.0)] == [None] * 3


def test_a_leap_names_its_scans(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collapse.JumpWatch, "__call__", lambda self, loss: "the loss leapt" if loss else None)
    assert trainer(tmp_path / "run", "--steps=1") == 0
    assert "WARNING: step 0: the loss leapt; scans: scan" in capsys.readouterr().out


def test_a_restart_by_torchrun_goes_on_where_the_run_was(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert trainer(run, "--steps=3") == 0  # killed before the first checkpoint: begins
    assert trainer(run, "--steps=3", "--optim.lr=0.001", "--save_every=1") == 0
    assert "going on at step 3 of 3" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert trainer(run, "--steps=3") == 2
    assert "holds a run" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert train.main([*trainer.flags, f"--data.root={trainer.scans}", "--steps=1"]) == 2
    assert "--max-restarts needs --out" in capsys.readouterr().err
    assert not whole.exists()


KILL_ONE = """
import os, signal, runs
real = runs.Metrics.write
def write(self, step, values):
    real(self, step, values)
    if step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
runs.Metrics.write = write
"""


def test_torchrun_brings_a_run_back_after_a_process_was_killed(trainer: Any, tmp_path: Path) -> None:
    import subprocess
    import sys

    run, whole = tmp_path / "run", tmp_path / "whole"
    place = Path(__file__).parents[1] / "ssl"
    script = tmp_path / "killed.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(place)!r})\n{KILL_ONE}\n"
        "import train\nsys.exit(train.main(sys.argv[1:]))\n"
    )
    flags = trainer.arguments(run, "--steps=8", "--picture_every=0")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
               "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on at step 4 of 8" in done.stdout
    assert trainer(whole, "--steps=8", "--batch_size=4") == 0
    assert trainer.losses(run) == pytest.approx(trainer.losses(whole), rel=1e-5)
    assert json.loads((run / locks.HEARTBEAT).read_text())["state"] == "done"
