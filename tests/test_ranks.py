"""Two processes train like one with the same global batch, for DINO and all of it that looks across a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import runs

VARIANTS = {
    "dino": (),
    "sinkhorn": ("--dino.balance=sinkhorn",),
    "koleo": ("--dino.koleo=0.1",),
}


def assert_same_weights(expected: Path, found: Path) -> None:
    a, b = (runs.load_checkpoint(run, print)[1]["method"] for run in (expected, found))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["sinkhorn", "koleo"])  # plain dino: test_train.py
def test_two_processes_train_like_one(trainer: Any, lives: Any, tmp_path: Path, name: str) -> None:
    flags = ("--steps=3", *VARIANTS[name])
    one = lives(trainer.arguments(tmp_path / "one", *flags, "--batch_size=4"))
    two = lives(trainer.arguments(tmp_path / "two", *flags, "--batch_size=2"), ranks=2)
    assert (one["codes"], two["codes"]) == ([0], [0, 0]), (one, two)
    assert trainer.losses(tmp_path / "two") == pytest.approx(trainer.losses(tmp_path / "one"), rel=1e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["dino"])
def test_accumulation_moves_averages_and_schedules_once_a_step(
    trainer: Any,
    lives: Any,
    tmp_path: Path,
    name: str,
) -> None:
    flags = ("--steps=3", *VARIANTS[name])
    whole = lives(trainer.arguments(tmp_path / "whole", *flags, "--batch_size=4"))
    halves = lives(trainer.arguments(tmp_path / "halves", *flags, "--batch_size=2", "--accumulate=2"))
    assert (whole["codes"], halves["codes"]) == ([0], [0]), (whole, halves)
    for key in ("loss", "lr", "weight_decay", "momentum"):
        a, b = ([line.get(key) for line in trainer.lines(tmp_path / run)] for run in ("whole", "halves"))
        assert (a == b) if a[0] is None else a == pytest.approx(b, rel=1e-5), key
    assert_same_weights(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize("name", ["dino"])
def test_split_over_two_processes_a_run_is_the_same(trainer: Any, lives: Any, tmp_path: Path, name: str) -> None:
    """fsdp2 against one process, then from its second step on again: whole tensors are saved, halves are trained."""
    flags = ("--steps=3", "--model.depth=2", "--save_every=2", "--keep=9", *VARIANTS[name])
    one = lives(trainer.arguments(tmp_path / "one", *flags, "--batch_size=4"))
    run = tmp_path / "two"
    two = lives(trainer.arguments(run, *flags, "--batch_size=2", "--parallel=fsdp2"), ranks=2)
    assert (one["codes"], two["codes"]) == ([0], [0, 0]), (one, two)
    assert trainer.losses(run) == pytest.approx(trainer.losses(tmp_path / "one"), rel=1e-5)
    assert_same_weights(tmp_path / "one", run)
    _, before = runs.load_checkpoint(run, print)
    (run / "checkpoints" / "step-00000003.pt").unlink()
    again = lives([f"--resume={run}"], ranks=2)
    assert again["codes"] == [0, 0], again
    _, after = runs.load_checkpoint(run, print)
    assert after["step"] == 3
    leaves = (tree_leaves([s["method"], s["optimiser"]["state"]]) for s in (before, after))
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_splitting_refuses_what_it_cannot_do(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer(tmp_path / "run", "--parallel=fsdp2") == 2
    assert "--parallel fsdp2 with one process" in capsys.readouterr().err
