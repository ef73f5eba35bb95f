"""A run lives where its folder lies: moved, copied, with its scans elsewhere; and one process writes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from medformer import locks
from medformer.errors import UserError

RANDOM = ("--model.drop_path=0.3", "--model.depth=2")


def stopped(trainer: Any, run: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """A run that SIGTERM ended after three of six steps."""
    real, lines = runs.Metrics.write, []

    def write(self: runs.Metrics, step: int, values: dict[str, float]) -> None:
        real(self, step, values)
        lines.append(step)
        if len(lines) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(runs.Metrics, "write", write)
        assert trainer(run, "--steps=6", *RANDOM, *flags) == 128 + signal.SIGTERM


@pytest.mark.parametrize("how", ["renamed", "copied", "scans moved"])
def test_a_run_that_was_moved_goes_on_to_the_same_weights(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    import train

    scans = tmp_path / "scans"
    shutil.copytree(trainer.scans, scans)
    whole, first, here = tmp_path / "whole", tmp_path / "a" / "run", tmp_path / "elsewhere" / "b" / "moved"
    assert trainer(whole, "--steps=6", *RANDOM, f"--data.root={scans}") == 0
    stopped(trainer, first, monkeypatch, f"--data.root={scans}")
    here.parent.mkdir(parents=True)
    extra = []
    if how == "copied":
        shutil.copytree(first, here)
    else:
        first.rename(here)
    if how == "scans moved":
        new = tmp_path / "other machine"
        new.mkdir()
        for file in scans.iterdir():  # copied to another time, as scp does
            shutil.copyfile(file, new / file.name)
        shutil.rmtree(scans)
        capsys.readouterr()
        assert train.main([f"--resume={here}"]) == 1
        assert f"--data.root {scans}: no such folder or file; where scans were moved" in capsys.readouterr().err
        extra = [f"--data.root={new}"]
    capsys.readouterr()
    assert train.main([f"--resume={here}", *extra]) == 0
    said = capsys.readouterr().out
    assert "going on at step 4 of 6" in said  # the step that was begun is finished
    assert "WARNING" not in said
    assert trainer.losses(here) == trainer.losses(whole)
    a, b = (runs.load_checkpoint(r, print)[1]["method"] for r in (here, whole))
    assert all(torch.equal(a[name], value) for name, value in b.items())


def test_other_scans_at_the_new_place_are_named(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    run, new = tmp_path / "run", tmp_path / "new"
    stopped(trainer, run, monkeypatch)
    shutil.copytree(trainer.scans, new)
    shutil.copyfile(new / "scan0.nii", new / "scan2.nii")
    capsys.readouterr()
    assert train.main([f"--resume={run}", f"--data.root={new}", "--data.held_out=0"]) == 0
    said = capsys.readouterr().out
    assert "WARNING: the scans differ from those this run began with" in said


def test_two_runs_never_write_one_folder(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    first = runs.claim(str(run))
    first.beat(force=True, step=7, state="training")
    assert trainer(run, "--steps=2") == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert f"--out {run}: process {os.getpid()} on" in error
    assert "step 7" in error
    assert error.endswith("is writing there; give another --out")
    first.close()
    assert not run.exists()  # nothing was written in it
    assert trainer(run, "--steps=2") == 0
    assert json.loads((run / locks.HEARTBEAT).read_text())["state"] == "done"
    with pytest.raises(UserError, match="holds a run"):
        runs.claim(str(run))
    again = runs.claim(run=run)
    with pytest.raises(UserError, match=r"--resume .* is writing there; wait for it, or stop it"):
        runs.claim(run=run)
    again.close()
    assert (run / "metrics.jsonl").exists()


def test_the_lock_of_a_killed_process_is_free_once_its_children_are_gone(tmp_path: Path) -> None:
    """A loader's worker, forked, holds what its parent held."""
    program = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "import runs\n"
        f"folder = runs.claim({str(tmp_path / 'run')!r})\n"
        "(folder.path / 'metrics.jsonl').touch()\n"
        "if os.fork() == 0:\n"
        "    time.sleep(2)\n"
        "    os._exit(0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    place = Path(__file__).parents[1] / "ssl"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(
        [str(place), *sys.path])}, check=False)  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    folder = runs.claim(run=tmp_path / "run")  # waits where the child holds the lock (filelock before 4)
    folder.close()


def test_a_folder_without_locks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with pytest.raises(UserError, match="lies on a file system without locks"):
        runs.claim(str(tmp_path / "run"))
