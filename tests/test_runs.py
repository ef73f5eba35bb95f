"""Checkpoint files: whole or not at all, checked when read, the last few and the best kept."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
from medformer.errors import UserError
from runs import load_checkpoint, save_checkpoint


def state(step: int) -> dict[str, Any]:
    return {"format": "medformer-run-1", "step": step, "weights": torch.full((64, 64), float(step))}


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, state(step), keep=3, best=step == 2)
    assert names(tmp_path) == ["best.pt", *(f"step-0000000{s}.pt" for s in (3, 4, 5))]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt", print)[1]["step"] == 2
    assert load_checkpoint(tmp_path, print)[1]["step"] == 5
    save_checkpoint(tmp_path, 6, state(6), best=True)
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt", print)[1]["step"] == 6


def test_the_checksum_is_of_all_before_it_and_torch_reads_the_file_too(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(1))
    content = path.read_bytes()
    assert content.endswith(b"medformer-sha256" + hashlib.sha256(content[:-48]).digest())
    assert torch.equal(torch.load(path, weights_only=True)["weights"], state(1)["weights"])


def test_any_flipped_bit_falls_back_aloud(tmp_path: Path) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, state(step))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        said: list[str] = []
        step = load_checkpoint(tmp_path, said.append)[1]["step"]
        # A flip in the mark itself leaves a file without a checksum, whose content is whole.
        in_mark = len(content) - 48 <= place < len(content) - 32
        assert step == (2 if in_mark else 1)
        assert bool(said) is not in_mark
        assert all(f"WARNING: {path} is damaged" in line and "falling back" in line for line in said)


def test_any_truncation_is_survived(tmp_path: Path) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, state(step))
    content = path.read_bytes()
    for length in [0, 1, 100, *np.random.default_rng(0).integers(0, len(content) - 48, 20).tolist()]:
        path.write_bytes(content[:length])
        said: list[str] = []
        assert load_checkpoint(tmp_path, said.append)[1]["step"] == 1
        assert len(said) == 1


def test_the_best_is_the_last_resort(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state(1), best=True)
    for step in (2, 3):
        save_checkpoint(tmp_path, step, state(step)).write_bytes(b"rubbish")
    said: list[str] = []
    assert load_checkpoint(tmp_path, said.append)[1]["step"] == 1
    assert len(said) == 2


def test_a_checkpoint_of_before_the_checksums_is_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save(state(4), tmp_path / "checkpoints" / "step-00000004.pt")
    assert load_checkpoint(tmp_path, print)[1]["step"] == 4


def test_nothing_but_data_is_ever_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    path = save_checkpoint(tmp_path, 1, {**state(1), "evil": Evil()})
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load_checkpoint(path, print)
    assert not (tmp_path / "owned").exists()


def test_a_link_that_fails_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(tmp_path, 1, state(1), best=True)
    assert names(tmp_path) == ["best.pt", "step-00000001.pt"]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt", print)[1]["step"] == 1


def test_a_snapshot_stays_what_it_was() -> None:
    held = {"a": torch.ones(3), "b": [torch.arange(6).view(2, 3).T, 7, "text"], "c": torch.ones(4)[::2]}
    copied = runs.snapshot(held)
    held["a"].zero_()
    held["b"][0].zero_()
    assert torch.equal(copied["a"], torch.ones(3))
    assert torch.equal(copied["b"][0], torch.arange(6).view(2, 3).T)
    assert copied["b"][1:] == [7, "text"]
    assert copied["c"].untyped_storage().nbytes() == 8  # no more than what is seen


def test_writes_take_turns_and_the_caller_goes_on() -> None:
    writer, go, order = runs.Writer(), threading.Event(), []
    writer.start(lambda: (go.wait(10), order.append(1)))
    writer.check()
    order.append(0)
    threading.Timer(0.05, go.set).start()
    writer.start(lambda: order.append(2))
    writer.finish()
    assert order == [0, 1, 2]
    writer.close()


def test_a_failed_write_is_told_once_at_the_next_look(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("cannot write it")

    for look in ("check", "finish", "start"):
        writer = runs.Writer()
        writer.start(fail)
        wait([writer._writing])
        with pytest.raises(UserError, match="cannot write it"):
            getattr(writer, look)(*([print] if look == "start" else []))
        writer.check()
        writer.close()
        assert capsys.readouterr().err == ""
    writer = runs.Writer()
    writer.start(fail)
    writer.close()  # where another error ends the run
    assert capsys.readouterr().err == "error: cannot write it\n"


def test_what_a_killed_write_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000001.pt.4711.partial").write_bytes(b"half")
    save_checkpoint(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step-00000002.pt"]


def test_a_write_that_dies_leaves_no_checkpoint_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    monkeypatch.setattr(runs.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"No space left on device; make room.*step-00000001.pt is safe"):
        save_checkpoint(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step-00000001.pt"]
