"""Parts of the evaluation: labels by the seed, splits that keep a class, weights of classes, crops, losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import medformer
from medformer.errors import UserError
from medformer.evaluation import dense, fitting, probes, scores, tasks, tuning

pytest.importorskip("sklearn", reason="scikit-learn is in the extras evaluate and test")


def a_task(labels: list[int], split: list[str], patients: list[str] | None = None) -> tasks.Task:
    return tasks.Task(
        name="t", kind="classes", dims=2, names=tuple("abc"[: max(labels) + 1]),
        images=[torch.zeros(1, 2, 2) for _ in labels], targets=[torch.tensor(label) for label in labels],
        split=np.array(split, "U6"), patients=None if patients is None else tuple(patients),
        sources=tuple(f"case {i}" for i in range(len(labels))), hashes=tuple(map(str, range(len(labels)))),
    )  # fmt: skip


def test_few_shots_are_others_for_another_seed_and_the_same_for_the_same() -> None:
    task = a_task([0, 1] * 20, ["train"] * 40)
    drawn = [tuple(tasks.few_shots(task, 4, seed)) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_the_last_training_cases_of_a_class_are_not_held_out() -> None:
    """A class of one case, and one whose cases are all of one patient."""
    labels, patients = [0] * 20 + [1] + [2] * 3, [f"p{i}" for i in range(20)] + ["q", "r", "r", "r"]
    for seed in range(5):
        task = a_task(labels, ["train"] * 24, patients)
        split = tasks._cut(task, task.split, "val", seed)
        assert (split == "val").sum() == 4
        assert set(split[20:]) == {"train"}


def test_a_held_out_case_that_validation_holds_too_has_leaked() -> None:
    task = a_task([0, 1] * 6, ["train"] * 4 + ["val"] * 4 + ["test"] * 4)
    hashes = list(task.hashes)
    hashes[8] = hashes[5]
    leaky = replace(task, hashes=tuple(hashes))
    cleaned, lines = tasks.drop_leaks(leaky, set(), keep=False)
    assert lines == [
        "LEAK: 1 of 4 held-out cases occur in the task's training cases (case 8); left out of "
        "the test (--leaks keep only reports them)"
    ]
    assert cleaned.where("test").tolist() == [9, 10, 11]


def test_every_class_weighs_alike_whatever_its_cases() -> None:
    weights = probes.balance_of(torch.tensor([0] * 6 + [1] * 3 + [2]), 3)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert probes.balance_of(torch.zeros(4, 2), 2) is None


def test_the_spread_over_seeds_is_that_of_a_sample_and_p_is_never_zero() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(40) % 2
    stack = np.stack([np.stack([1 - s, s], 1) for s in (np.clip(truth * 0.3 + rng.random((3, 40)), 0, 1))])
    found = scores.estimate("auroc", stack, truth, np.arange(40), resamples=50)
    points = [scores.point("auroc", p, truth) for p in stack]
    assert found.sd == pytest.approx(np.std(points, ddof=1))
    right = np.eye(2)[truth][None]
    assert scores.difference("auroc", right, 1 - right, truth, np.arange(40), resamples=99).p == 1 / 100


def test_crops_reach_both_ends_of_an_image() -> None:
    image = torch.arange(6 * 5, dtype=torch.float32).view(1, 6, 5)
    rng = np.random.default_rng(0)
    nothing = [np.zeros((0, 2), int)]
    firsts = {int(dense._crop([image], [torch.zeros(6, 5)], nothing, (4, 5), rng)[0][0, 0, 0]) // 5 for _ in range(60)}
    assert firsts == {0, 1, 2}


def test_half_of_the_crops_are_put_around_a_label() -> None:
    image, mask = torch.zeros(1, 9, 9), torch.zeros(9, 9)
    mask[7, 8] = 1
    rng = np.random.default_rng(0)
    held = [bool(dense._crop([image], [mask], [np.array([[7, 8]])], (3, 3), rng)[1].any()) for _ in range(600)]
    assert 0.46 < np.mean(held) < 0.58  # of those that are put anywhere one in 25


class Recorder(nn.Module):
    """A network that remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 2)
        self.device, self.number = torch.device("cpu"), None
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.clone())
        return self.out(self.norm(x.flatten(1)))


def test_batches_of_fine_tuning_follow_the_seed() -> None:
    images, target = [torch.full((1, 2, 2), float(i)) for i in range(20)], torch.arange(20) % 2
    budget = fitting.Budget(steps=2, batch=8)
    seen: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        network: Any = Recorder()
        tuning.train_classifier(network, images, target, 2, budget, 1e-3, seed, torch.enable_grad, list)
        seen.append(torch.stack(network.seen))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_steps_without_a_finite_gradient_are_counted_and_a_training_of_nothing_else_fails() -> None:
    budget, seen = fitting.Budget(steps=4, batch=2), list[float]()
    network = torch.nn.Linear(3, 1)

    def train(bad: set[int]) -> None:
        def batch_at(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(float("nan") if len(seen) in bad else 1.0)
            return torch.full((2, 3), seen[-1]), torch.zeros(2, 1)

        seen.clear()
        fitting.fit(network, budget, 1e-2, 0, batch_at, torch.nn.functional.mse_loss, torch.enable_grad, list)

    with pytest.warns(RuntimeWarning, match=r"rate 0.01: 1 of 4 steps had a gradient that is not finite"):
        train({2})
    assert all(p.isfinite().all() for p in network.parameters())
    before = network.weight.clone()
    with pytest.raises(UserError, match=r"4 of 4 steps .* nothing was learned"):
        train({0, 1, 2, 3})
    assert torch.equal(network.weight, before)


def test_vectors_do_not_decay_in_fine_tuning() -> None:
    model = medformer.tiny_2d(width=24, depth=1, heads=2, patch_size=4, patch_stride=4, patch_padding=0)
    network = tuning.Network(model, "finetune", 2, dense=False)
    groups = fitting.optimiser_of(network, 1e-3, 0.05).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, others = ({id(p) for p in group["params"]} for group in groups)
    assert decayed == {id(p) for p in network.parameters() if p.ndim > 1}
    assert others == {id(p) for p in network.parameters() if p.ndim <= 1}


def test_the_dense_loss_is_cross_entropy_and_dice_of_the_classes_that_are_there() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(2, 4, 5, dtype=torch.long)
    target[0, :2] = 1  # class 2 is nowhere
    p = logits.softmax(1)[:, 1]
    there = target == 1
    dice = (2 * p[there].sum() + 1) / (p.sum() + there.sum() + 1)
    expected = nn.functional.cross_entropy(logits, target) + 1 - dice
    torch.testing.assert_close(dense.dense_loss(logits, target), expected)
    empty = torch.zeros_like(target)
    torch.testing.assert_close(dense.dense_loss(logits, empty), nn.functional.cross_entropy(logits, empty))
