"""Whatever hits a run - kill -9, a signal, a lost process, a hung worker, an unreadable scan - its outcome is known."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import crops
import runs
import train
from medformer.data.store import entries

RANDOM = ("--model.drop_path=0.3", "--model.depth=2")
LIVES = Path(__file__).with_name("lives.py")

# Put into each process before it trains: the second dies in its sixth step; the first gets a signal in its fifth.
KILL = """
import os, signal, peers
real, calls = peers.due, []
def due(batches, named):
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(batches, named)
peers.due = due
"""
# Half of the second checkpoint is written when the process dies, which has gone on training meanwhile.
KILL_WRITER = """
import os, signal, time, runs
real = runs._Hashed.write
def write(self, data):
    real(self, data)
    if "step-00000004" in str(self.file.name) and self.file.tell() > 50_000:
        while open({metrics!r}).read().count(chr(10)) < 6:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return len(data)
runs._Hashed.write = write
"""
STOP = """
import os, signal, peers
real, calls = peers.due, []
def due(batches, named):
    calls.append(0)
    if os.environ["RANK"] == "0" and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGUSR1)
    return real(batches, named)
peers.due = due
"""


def test_a_run_killed_at_random_moments_ends_bit_identical(trainer: Any, tmp_path: Path) -> None:
    """SIGKILL, with workers and without; by hand the same with 100 kills (misc/LOG.md)."""
    command = [sys.executable, str(LIVES), "--kills", "4", str(trainer.scans), str(tmp_path), *trainer.flags, *RANDOM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 4
    assert found["losses"] == found["steps"]
    assert found["losses_same"]
    assert found["tensors"] > 100
    assert found["differ"] == []


def test_killed_while_reading_storing_and_training_nothing_is_lost(trainer: Any, tmp_path: Path) -> None:
    """A run and the making of a store die together; by hand the same with 50 kills (misc/LOG.md)."""
    command = [sys.executable, str(LIVES), "--kills-everywhere", "5", str(trainer.scans), str(tmp_path), *trainer.flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["losses"] == found["steps"] == 30
    assert (found["losses_same"], found["store_same"], found["scans"], found["damaged"]) == (True, True, 4, 0)


def test_killed_in_the_middle_of_a_background_write_a_run_goes_on_from_the_one_before(
    trainer: Any, lives: Any, tmp_path: Path
) -> None:
    """The process dies while a thread writes its second checkpoint and training is two steps further."""
    run, whole, flags = tmp_path / "run", tmp_path / "whole", (*RANDOM, "--steps=8")
    lost = lives(trainer.arguments(run, *flags), before=KILL_WRITER.format(metrics=str(run / "metrics.jsonl")))
    assert lost["codes"] == [-signal.SIGKILL], lost
    assert len(trainer.lines(run)) >= 6
    assert [path.name for path in runs.checkpoints(run)] == ["step-00000002.pt"]
    assert len(list((run / "checkpoints").glob("*.partial"))) == 1
    again, reference = lives([f"--resume={run}"]), lives(trainer.arguments(whole, *flags))
    assert (again["codes"], reference["codes"]) == ([0], [0]), (again, reference)
    assert "going on at step 2 of 8" in again["out"][0]
    assert trainer.losses(run) == trainer.losses(whole)
    a, b = (runs.load_checkpoint(r, print)[1]["method"] for r in (run, whole))
    assert all(torch.equal(a[name], value) for name, value in b.items())
    assert not list((run / "checkpoints").glob("*.partial"))


def test_two_processes_go_on_after_one_was_killed(trainer: Any, lives: Any, tmp_path: Path) -> None:
    """Also: only the first writes, and one process can go on where two were (the order of samples is the same)."""
    run, flags = tmp_path / "run", ("--steps=16", "--batch_size=2", "--save_every=3")
    lost = lives(trainer.arguments(run, *flags), ranks=2, before=KILL)
    assert lost["codes"] == [75, -signal.SIGKILL]
    assert re.search(r"^error: process 0: another process of this run was lost.*--resume", lost["err"][0], re.M)
    both = lives([f"--resume={run}"], ranks=2, before=STOP)
    assert both["codes"] == [138, 143], both
    assert [line["step"] for line in trainer.lines(run)] == list(range(len(trainer.lines(run))))
    alone = lives([f"--resume={run}", "--batch_size=4"])
    assert alone["codes"] == [0], alone
    assert "scans a step (accumulate" not in alone["out"][0]  # as many as before: no warning
    whole = lives(trainer.arguments(tmp_path / "whole", "--steps=16", "--batch_size=4"))
    assert whole["codes"] == [0], whole
    assert trainer.losses(run) == pytest.approx(trainer.losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_to_one_process_saves_and_ends_all(
    trainer: Any, lives: Any, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    flags = ("--steps=100000", "--save_every=100000")
    found = lives(trainer.arguments(run, *flags), ranks=2, signal=number, kill={"run": str(run), "steps": 3, "rank": 1})
    assert found["codes"] == [128 + signal.SIGTERM, 128 + number]
    assert found["after_kill"] < 30
    assert f"--resume {run}" in found["out"][0]
    assert len(runs.checkpoints(run)) == 1


def test_processes_with_different_flags_refuse_to_start(trainer: Any, lives: Any, tmp_path: Path) -> None:
    argvs = [trainer.arguments(tmp_path / "run", "--steps=3", f"--optim.lr={lr}") for lr in (0.001, 0.002)]
    found = lives([], ranks=2, argvs=argvs)
    assert found["codes"] == [2, 2]
    assert "optim.lr is 0.001 in process 0, 0.002 in process 1" in found["err"][0]
    assert len(found["err"][0].strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rank", "ranks", "words"),
    [("2", "2", "RANK=2 must be below WORLD_SIZE=2"), ("x", "2", "RANK='x' in the environment must be a whole number")],
)
def test_an_impossible_world_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, ranks: str, words: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert train.main([]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_that_hangs_ends_the_run_naming_the_scans(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    real = crops.Crops.__getitem__

    def hang(self: crops.Crops, sample: int) -> Any:
        if sample == 5:
            time.sleep(3)
        return real(self, sample)

    monkeypatch.setattr(crops.Crops, "__getitem__", hang)
    assert trainer(tmp_path / "run", "--steps=9", "--save_every=1", f"--workers={workers}", "--loader_timeout=1") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no batch within --loader_timeout" in error
    assert re.search(r"scans due: scan\d", error)
    assert "--resume" in error
    assert runs.checkpoints(tmp_path / "run")[-1].name == "step-00000002.pt"


def test_a_dead_worker_ends_the_run(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = crops.Crops.__getitem__

    def die(self: crops.Crops, sample: int) -> Any:
        if sample == 5:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
        return real(self, sample)

    monkeypatch.setattr(crops.Crops, "__getitem__", die)
    assert trainer(tmp_path / "run", "--steps=9", "--workers=1") == 1
    assert "a worker of the loader died" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stored_scan_that_is_gone_or_cut_short_is_named(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """After the run has looked them up: before, they would be made anew."""
    run, cache, real = tmp_path / "run", tmp_path / "cache", train.gather

    def gather(*given: Any) -> Any:
        found = real(*given)
        for path in [*cache.rglob("*.npy"), *cache.rglob("*.b2nd")]:
            if "points" not in path.name:
                path.write_bytes(path.read_bytes()[:1000])
        return found

    assert trainer(run, "--steps=2", f"--data.cache={cache}", f"--workers={workers}") == 0
    monkeypatch.setattr(train, "gather", gather)
    entries.load.cache_clear()
    capsys.readouterr()
    assert train.main([f"--resume={run}", "--steps=6"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a batch cannot be cut" in error
    assert re.search(r"scans due: scan\d", error)
    assert "--resume" in error
