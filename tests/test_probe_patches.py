"""What features see: folds, neighbours and the ridge classifier of the probe, on features whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import medformer
import probe_patches
from medformer.evaluation.tasks import Task


def test_folds_keep_patients_whole_and_classes_even() -> None:
    groups = np.repeat(np.arange(30), 2)
    labels = (groups % 3 == 0).astype(int)
    fold = probe_patches.folds(groups, labels, seed=1)
    assert all(len(set(fold[groups == g])) == 1 for g in range(30))
    for c, patients in ((0, 20), (1, 10)):
        counts = np.bincount(fold[labels == c], minlength=probe_patches.FOLDS) // 2
        assert counts.tolist() == [patients // probe_patches.FOLDS] * probe_patches.FOLDS


def test_classifiers_find_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3, generator=generator)
    for scores in (probe_patches.near(rows, labels, rows, 3), probe_patches.ridge(rows, labels, rows, 3)):
        assert scores.argmax(1).tolist() == labels.tolist()


class Mean(nn.Module):
    """A model whose feature is the scan's mean, or nothing."""

    def __init__(self, sees: bool) -> None:
        super().__init__()
        self.sees = sees

    def forward_features(self, x: Tensor) -> Any:
        own = torch.stack([x.mean(), x.std()])[None] if self.sees else torch.randn(1, 2)
        return SimpleNamespace(cls=own, patches=own[:, None])


def a_task() -> Task:
    labels = np.arange(60) % 2
    images = [torch.full((1, 4, 4, 4), float(label)) + 0.1 * torch.randn(1, 4, 4, 4) for label in labels]
    split = np.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10, "U6")
    images[50:] = [torch.full((1, 4, 4, 4), float("nan"))] * 10  # the test split is not read
    return Task(
        name="t", kind="classes", dims=3, names=("a", "b"), images=images, targets=[torch.tensor(n) for n in labels],
        split=split, patients=tuple(map(str, range(60))), sources=(), hashes=(),
    )  # fmt: skip


@pytest.mark.parametrize("sees", [True, False])
def test_scores_of_cases_are_high_for_features_that_tell_and_near_chance_for_others(sees: bool) -> None:
    torch.manual_seed(0)
    found = probe_patches.case_scores(Mean(sees), a_task())
    for name in ("knn", "ridge"):
        assert found[name] > 0.99 if sees else 0.2 < found[name] < 0.8
    assert 1 <= found["rank"] <= 4


def test_token_dice_is_one_for_the_truth() -> None:
    truth = torch.tensor([0, 1, 2, 2])
    assert probe_patches.token_dice(truth, truth, 2) == pytest.approx(1)
    assert probe_patches.token_dice(torch.zeros(4, dtype=torch.long), truth, 2) == 0


def test_a_probe_from_few_labels_is_asked_about_other_patients() -> None:
    torch.manual_seed(0)
    config = medformer.BackboneConfig(dims=3, width=12, depth=1, heads=1, patch_size=2, patch_stride=2, patch_padding=0)
    model, task = medformer.build(config), a_task()
    assert probe_patches.few_score(model, task, 8) > 0.9
    same = replace(task, patients=("one",) * 40 + task.patients[40:])  # type: ignore[index]
    with pytest.raises(ValueError):  # noqa: PT011
        probe_patches.few_score(model, same, 8)  # nobody is left


def test_the_scan_itself_is_read_without_a_model() -> None:
    assert probe_patches.case_scores(None, a_task())["ridge"] > 0.9
