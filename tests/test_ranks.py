"""Several processes train like one with the same global batch, for each method and whatever looks across a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import runs

# LARS, whose steps are as long as the gradient's share of the weights: AdamW turns the rounding of a gradient that is 0
# (of biases in front of a norm) into whole steps. Batches of 4 scans that hardly differ allow no higher rates,
# and less where they are divided by how much they differ.
BYOL = (
    "byol", "--views.local_views=0", "--byol.hidden=32", "--byol.projection=16", "--optim.name=lars",
)  # fmt: skip
VARIANTS = {
    "dino": (),
    "sinkhorn": ("--dino.balance=sinkhorn",),
    "koleo": ("--dino.koleo=0.1",),
    "byol": (*BYOL, "--optim.lr=0.01", "--checkpoint_activations"),
    "byol-sync": (*BYOL, "--optim.lr=0.002", "--byol.norm=sync"),
    "igpt": (
        "igpt", "--views.local_views=0", "--views.global_views=1", "--igpt.colours=16", "--igpt.patch=4x4x4",
        "--igpt.fit_steps=2", "--checkpoint_activations",
    ),
}  # fmt: skip
FLAGS = ("--steps=3", "--model.depth=2", "--save_every=2", "--keep=9")


def assert_same_weights(expected: Path, found: Path) -> None:
    a, b = (runs.load_checkpoint(run, print)[1]["method"] for run in (expected, found))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def alone(trainer: Any, lives: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a variant in one process with four scans a step, trained once."""
    folder = tmp_path_factory.mktemp("alone")

    def train(name: str) -> Path:
        if not (folder / name).exists():
            done = lives(trainer.arguments(folder / name, *FLAGS, *VARIANTS[name], "--batch_size=4"))
            assert done["codes"] == [0], done
        return folder / name

    return train


@pytest.mark.parametrize("name", ["sinkhorn", "koleo", "byol", "byol-sync", "igpt"])  # plain dino: test_train.py
def test_two_processes_train_like_one(trainer: Any, lives: Any, alone: Any, tmp_path: Path, name: str) -> None:
    two = lives(trainer.arguments(tmp_path / "two", *FLAGS, *VARIANTS[name], "--batch_size=2"), ranks=2)
    assert two["codes"] == [0, 0], two
    assert trainer.losses(tmp_path / "two") == pytest.approx(trainer.losses(alone(name)), rel=1e-5)
    assert_same_weights(alone(name), tmp_path / "two")


@pytest.mark.parametrize("name", ["dino", "byol", "igpt"])
def test_accumulation_moves_averages_and_schedules_once_a_step(
    trainer: Any, lives: Any, alone: Any, tmp_path: Path, name: str
) -> None:
    flags = (*FLAGS, *VARIANTS[name], "--batch_size=2", "--accumulate=2")
    halves = lives(trainer.arguments(tmp_path / "halves", *flags))
    assert halves["codes"] == [0], halves
    for key in ("loss", "lr", "weight_decay", "momentum"):
        a, b = ([line.get(key) for line in trainer.lines(run)] for run in (alone(name), tmp_path / "halves"))
        assert (a == b) if a[0] is None else a == pytest.approx(b, rel=1e-5), key
    assert_same_weights(alone(name), tmp_path / "halves")


@pytest.mark.parametrize("name", ["dino", "byol", "byol-sync", "igpt"])
def test_split_over_processes_a_run_is_the_same(
    trainer: Any, lives: Any, alone: Any, tmp_path: Path, name: str
) -> None:
    """fsdp2 on two processes against one; then from its second step on again, on four."""
    run = tmp_path / "two"
    two = lives(trainer.arguments(run, *FLAGS, *VARIANTS[name], "--batch_size=2", "--parallel=fsdp2"), ranks=2)
    assert two["codes"] == [0, 0], two
    assert trainer.losses(run) == pytest.approx(trainer.losses(alone(name)), rel=1e-5)
    assert_same_weights(alone(name), run)
    (run / "checkpoints" / "step-00000003.pt").unlink()
    four = lives([f"--resume={run}", "--batch_size=1"], ranks=4)
    assert four["codes"] == [0] * 4, four
    assert "going on at step 2 of 3" in four["out"][0]
    assert trainer.losses(run) == pytest.approx(trainer.losses(alone(name)), rel=1e-5)
    assert_same_weights(alone(name), run)


def test_split_again_over_as_many_processes_a_run_goes_on_to_the_same_bits(
    trainer: Any, lives: Any, tmp_path: Path
) -> None:
    """Whole tensors are saved, halves are trained."""
    run = tmp_path / "run"
    first = lives(trainer.arguments(run, *FLAGS, "--parallel=fsdp2"), ranks=2)
    _, before = runs.load_checkpoint(run, print)
    (run / "checkpoints" / "step-00000003.pt").unlink()
    again = lives([f"--resume={run}"], ranks=2)
    assert (first["codes"], again["codes"]) == ([0, 0], [0, 0]), (first, again)
    _, after = runs.load_checkpoint(run, print)
    assert after["step"] == 3
    leaves = (tree_leaves([s["method"], s["optimiser"]["state"]]) for s in (before, after))
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_splitting_refuses_what_it_cannot_do(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer(tmp_path / "run", "--parallel=fsdp2") == 2
    assert "--parallel fsdp2 with one process" in capsys.readouterr().err
