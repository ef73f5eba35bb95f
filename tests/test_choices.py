"""What is chosen for a method (k, layer, rate) is chosen on the validation cases; the held-out cases are scored once.

Each test has cases on which validation and test wish for opposite choices, and says what either would choose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import online
from medformer.evaluation import probes, scores, tasks, trials
from medformer.evaluation.config import DownstreamConfig
from views import ViewsConfig

pytest.importorskip("sklearn", reason="scikit-learn is in the extras evaluate and test")

ALL = trials.Setting("100%", 1.0, 0)


def a_task(train: list[int], val: list[int], test: list[int], kind: Any = "classes") -> tasks.Task:
    """Of labels alone: what is known of the images is given to the bench by each test."""
    labels = [*train, *val, *test]
    split = ["train"] * len(train) + ["val"] * len(val) + ["test"] * len(test)
    return tasks.Task(
        name="t", kind=kind, dims=2, names=("a", "b") if kind == "classes" else ("a",),
        images=[torch.zeros(1, 2, 2) for _ in labels], targets=[torch.tensor(label) for label in labels],
        split=np.array(split, "U6"), patients=None, sources=tuple(map(str, range(len(labels)))),
        hashes=tuple(map(str, range(len(labels)))),
    )  # fmt: skip


def a_bench(task: tasks.Task, out: Path, *layers: torch.Tensor, **settings: Any) -> trials.Bench:
    """With the features [n, C] of all cases as if a network had made them."""
    config = DownstreamConfig(**{"task": "t", "steps": 1, "batch_size": 2, "seeds": 1, **settings})
    bench = trials.Bench(task, nn.Identity(), config, (2, 2), torch.device("cpu"), out)
    if layers:
        bench._features[None] = probes.Frozen(layers=list(layers), pooled=torch.zeros(len(task.images), 1))
    return bench


def auroc(task: tasks.Task, split: str, predictions: np.ndarray) -> float:
    return scores.point("auroc", predictions, task.labels(task.where(split)))


def part(frozen: probes.Frozen, task: tasks.Task, split: str) -> probes.Frozen:
    return frozen.of(torch.as_tensor(task.where(split)))


def test_k_of_the_neighbours_is_chosen_on_validation(tmp_path: Path) -> None:
    """About each of two places lie 10 cases of one class, and a little farther 20 of the other: few neighbours say one,
    many the other. Validation is labelled as the near ones are, the test as the far ones."""
    near, far = 0.0, 0.1
    place, label, angle = [], [], []
    for here in (0, 1):
        for count, kind, at in ((10, here, near), (20, 1 - here, far)):
            place += [here] * count
            label += [kind] * count
            angle += [at] * count
    where_val, where_test = [0, 1] * 4, [0, 1] * 6
    task = a_task(label, where_val, [1 - here for here in where_test])
    places = torch.tensor(place + where_val + where_test)
    turn = torch.tensor(angle + [0.0] * 20) + places * torch.pi / 2
    bench = a_bench(task, tmp_path, torch.stack([turn.cos(), turn.sin()], 1))

    frozen = bench._features[None]
    shares = {
        (split, k): probes.knn(
            part(frozen, task, "train").layers[-1], torch.tensor(label), part(frozen, task, split).layers[-1], 2, k=k
        )
        for split in ("val", "test") for k in (10, 60)
    }  # fmt: skip
    found = {(split, k): auroc(task, split, each) for (split, k), each in shares.items()}
    assert found == {("val", 10): 1.0, ("val", 60): 0.0, ("test", 10): 0.0, ("test", 60): 1.0}

    cell = bench.cell(ALL, "knn", 1)
    assert str(cell["chosen"]) == "k 10"
    np.testing.assert_array_equal(cell["predictions"], shares["test", 10])


def test_the_layer_of_a_probe_is_chosen_on_validation(tmp_path: Path) -> None:
    """In training all four layers tell the class. On validation the last alone is right, on the test the other three,
    which together outweigh it."""
    train, val, test = [0, 1] * 20, [0, 1] * 5, [0, 1] * 7
    task = a_task(train, val, test)
    rng = np.random.default_rng(0)

    def layer(right_on: str) -> torch.Tensor:
        sign = np.concatenate([np.ones(40), np.full(10, 1 if right_on == "val" else -1),
                               np.full(14, 1 if right_on == "test" else -1)])  # fmt: skip
        value = sign * (2 * np.array([*train, *val, *test]) - 1) + rng.normal(0, 0.1, 64)
        return torch.tensor(value, dtype=torch.float32)[:, None]

    bench = a_bench(task, tmp_path, *(layer("test") for _ in range(3)), layer("val"), probe_steps=20)
    cell = bench.cell(ALL, "linear", 1)
    assert str(cell["chosen"]).startswith("last 1")
    assert auroc(task, "test", cell["predictions"]) == 0.0  # the four together have 1 there


def test_the_rate_of_a_probe_is_chosen_on_validation(tmp_path: Path) -> None:
    """One feature is signal and noise, the other the noise. A slow rate has not yet learned to take it away, which pays
    on validation; on the test, where the noise of the two is not the same, it costs."""
    rng = np.random.default_rng(0)
    train, val, test = [0, 1] * 100, [0, 1] * 30, [0, 1] * 40

    def features(labels: list[int], shared: bool) -> np.ndarray:
        signal, noise = 2 * np.array(labels) - 1, rng.normal(0, 3, len(labels))
        return np.stack([signal + (noise if shared else 0), noise], 1)

    task = a_task(train, val, test)
    rows = np.concatenate([features(train, True), features(val, True), features(test, False)])
    bench = a_bench(task, tmp_path, torch.tensor(rows, dtype=torch.float32), probe_steps=60)

    frozen, best = bench._features[None], {}
    for split in ("val", "test"):
        tried: dict[float, float] = {}

        def better(probe: probes.LinearProbe, split: str = split, tried: dict[float, float] = tried) -> float:
            guess = probes.probabilities(probe(part(frozen, task, split)), "classes")
            return tried.setdefault(probe.lr, auroc(task, split, guess))

        probes.linear_sweep(part(frozen, task, "train"), torch.tensor(train), 2, 60, 1, better)
        best[split] = max(tried, key=lambda lr: tried[lr])
    assert best["val"] != best["test"]
    assert str(bench.cell(ALL, "linear", 1)["chosen"]).endswith(f"lr {best['val']:g}")


def test_the_sweep_returns_the_probe_with_the_highest_score() -> None:
    frozen = probes.Frozen(layers=[torch.randn(12, 3)], pooled=torch.randn(12, 2))
    target = torch.arange(12) % 2
    for lr, pool in ((0.05, True), (1e-4, False), (1.0, True)):
        found = probes.linear_sweep(
            frozen, target, 2, 3, 0, lambda probe, lr=lr, pool=pool: float(probe.lr == lr) + float(probe.pool == pool)
        )
        assert (found.lr, found.pool) == (lr, pool)


@pytest.mark.parametrize("kind", ["classes", "segmentation"])
def test_the_learning_rate_of_fine_tuning_is_chosen_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Trained at 0.001 a network is right on validation and wrong on the test, at 0.01 the other way round."""
    task = a_task([0, 1] * 3, [0, 1] * 4, [0, 1] * 5, kind)
    bench = a_bench(task, tmp_path, lrs=[1e-2, 1e-3])

    def predict(lr: float, index: np.ndarray) -> np.ndarray:
        splits = set(task.split[index])
        assert len(splits) == 1
        right = splits == ({"val"} if lr == 1e-3 else {"test"})
        if kind == "segmentation":
            return np.full((len(index), 1), 0.9 if right else 0.1)
        truth = task.labels(index)
        return np.eye(2)[truth if right else 1 - truth]

    trained: list[tuple[float, list[int]]] = []
    monkeypatch.setattr(
        bench, "_trained", lambda _method, index, lr, _seed, _what: (trained.append((lr, index.tolist())), lr)[1]
    )
    monkeypatch.setattr(bench, "_predict", predict)
    cell = bench.cell(ALL, "finetune", 0)
    assert str(cell["chosen"]) == "lr 0.001"
    assert float(cell["validation"]) == (0.9 if kind == "segmentation" else 1.0)
    np.testing.assert_array_equal(cell["predictions"], predict(1e-3, task.where("test")))
    assert sorted(trained) == [(lr, task.where("train").tolist()) for lr in (1e-3, 1e-2)]


def test_a_rate_of_masks_that_falls_behind_gets_no_more_seeds_and_no_held_out_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.01 leads, 0.003 follows closely and wins over three seeds, 0.1 is behind at the first."""
    task = a_task([0, 1] * 3, [0, 1] * 4, [0, 1] * 5, "segmentation")
    bench = a_bench(task, tmp_path, lrs=[3e-3, 1e-2, 1e-1], seeds=3)
    dice = {1e-2: (0.8, 0.7, 0.7), 3e-3: (0.79, 0.8, 0.8), 1e-1: (0.7, 0.9, 0.9)}
    trained: list[tuple[float, int]] = []
    tested: list[tuple[float, int]] = []

    def train(_method: str, _index: np.ndarray, lr: float, seed: int, _what: str) -> tuple[float, int]:
        trained.append((lr, seed))
        return lr, seed

    def predict(network: tuple[float, int], index: np.ndarray) -> np.ndarray:
        if set(task.split[index]) == {"test"}:
            tested.append(network)
        return np.full((len(index), 1), dice[network[0]][network[1]])

    monkeypatch.setattr(bench, "_trained", train)
    monkeypatch.setattr(bench, "_predict", predict)
    for turn in range(2):  # the second from the files of the first
        cells = [bench.cell(ALL, "scratch", seed) for seed in range(3)]
        assert [float(cell["predictions"].mean()) for cell in cells] == pytest.approx(list(dice[3e-3])), turn
        assert trained == [(1e-2, 0), (1e-2, 1), (1e-2, 2), (3e-3, 0), (3e-3, 1), (3e-3, 2), (1e-1, 0)]
        assert tested == [(3e-3, 0), (3e-3, 1), (3e-3, 2)]


def test_what_is_measured_in_training_are_validation_cases(tmp_path: Path) -> None:
    """The best checkpoint is chosen by it."""
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.integers(0, 200, (n, 8, 8)).astype(np.uint8) for split, n in
              (("train", 12), ("val", 6), ("test", 8))}  # fmt: skip
    arrays |= {f"{split}_labels": np.arange(n)[:, None] % 2 for split, n in (("train", 12), ("val", 6), ("test", 8))}
    np.savez(tmp_path / "t.npz", **arrays)  # type: ignore[arg-type]
    config = online.OnlineConfig(task=str(tmp_path / "t.npz"))
    found = online.read_labelled(config, ViewsConfig(global_size=(1, 8, 8)), 2)
    task = tasks.read_task(tmp_path / "t.npz", 2, None, 0, list)
    for images, labels, split in ((found.train, found.train_labels, "train"), (found.held, found.held_labels, "val")):
        expected = torch.stack([task.images[i].float() for i in task.where(split)])
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
        assert labels.tolist() == task.labels(task.where(split)).tolist()
