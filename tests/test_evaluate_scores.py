"""Scores, intervals and paired tests."""

from __future__ import annotations

import numpy as np
import pytest

from medformer.evaluation import scores

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the extras evaluate and test")


def a_task(n: int = 120, classes: int = 3, signal: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(classes), rng.integers(classes, size=n - classes)]
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), truth] += signal
    p = np.exp(logits).round(1)  # rounded, so that there are ties
    return p / p.sum(1, keepdims=True), truth


@pytest.mark.parametrize("seed", range(3))
def test_weighted_scores_are_scikit_learns(seed: int) -> None:
    p, truth = a_task(seed=seed)
    weights = np.random.default_rng(seed).integers(1, 4, size=(5, len(truth))).astype(float)
    auroc = [np.mean([metrics.roc_auc_score(truth == c, p[:, c], sample_weight=w) for c in range(3)]) for w in weights]
    accuracy = [metrics.balanced_accuracy_score(truth, p.argmax(1), sample_weight=w) for w in weights]
    np.testing.assert_allclose(scores.weighted("auroc", p, truth, weights), auroc, rtol=1e-12)
    np.testing.assert_allclose(scores.weighted("balanced_accuracy", p, truth, weights), accuracy, rtol=1e-12)
    ones = np.ones((1, len(truth)))
    for metric in ("auroc", "balanced_accuracy"):
        assert scores.weighted(metric, p, truth, ones)[0] == pytest.approx(scores.point(metric, p, truth), abs=1e-12)


def test_unknown_labels_do_not_count() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((80, 2)) < 0.4).astype(float)
    p = np.clip(0.3 * truth + 0.7 * rng.random((80, 2)), 0, 1)
    holes = truth.copy()
    holes[:30, 0] = np.nan
    spoiled = p.copy()
    spoiled[:30, 0] = 1 - spoiled[:30, 0]
    ones = np.ones((1, 80))
    for metric in ("auroc", "balanced_accuracy"):
        value = scores.point(metric, p, holes)
        assert scores.point(metric, spoiled, holes) == value
        assert scores.weighted(metric, spoiled, holes, ones)[0] == pytest.approx(value, abs=1e-12)
        assert value != scores.point(metric, p, truth)


def test_dice_counts_overlap_and_leaves_out_what_neither_has() -> None:
    truth = np.array([[0, 1, 1], [2, 2, 0]])
    guess = np.array([[0, 1, 0], [2, 2, 0]])
    np.testing.assert_allclose(scores.dice(guess, truth, 3), [2 / 3, 1.0, np.nan])


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """100 samples of a task whose balanced accuracy is known from a large one: 95% intervals, at least 85 hold it."""
    p, truth = a_task(n=200_000, seed=1)
    true = scores.point("balanced_accuracy", p, truth)
    held = 0
    for seed in range(100):
        p, truth = a_task(n=150, seed=100 + seed)
        e = scores.estimate("balanced_accuracy", p[None], truth, np.arange(150), resamples=300, seed=seed)
        held += e.low <= true <= e.high
    assert 85 <= held <= 100


def test_patients_widen_the_interval() -> None:
    """Twenty cases a patient, all alike, are no twenty pieces of evidence."""
    p, truth = a_task(n=30, seed=2)
    p, truth = p.repeat(20, axis=0), truth.repeat(20)
    cases = scores.estimate("balanced_accuracy", p[None], truth, np.arange(600))
    patients = scores.estimate("balanced_accuracy", p[None], truth, np.repeat(np.arange(30), 20))
    assert patients.high - patients.low > 3 * (cases.high - cases.low)


def test_the_paired_test_rejects_a_difference_and_not_equals() -> None:
    good = np.stack([a_task(signal=2.5, seed=s)[0] for s in (3, 3)])
    truth = a_task(signal=2.5, seed=3)[1]
    rng = np.random.default_rng(5)
    worse = good + rng.normal(0, 0.6, good.shape)
    d = scores.difference("auroc", good, worse, truth, np.arange(len(truth)))
    assert d.mean > 0.05
    assert d.low > 0
    assert d.p < 0.01
    twin_a, twin_b = (good + rng.normal(0, 0.4, good.shape) for _ in range(2))
    d = scores.difference("auroc", twin_a, twin_b, truth, np.arange(len(truth)))
    assert d.low < 0 < d.high
    assert d.p > 0.05


def test_the_paired_test_is_level_under_the_null() -> None:
    """Of 60 comparisons of equals, about 5% fall below 0.05."""
    low = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base, truth = a_task(n=60, seed=seed)
        a, b = (base + rng.normal(0, 0.5, base.shape) for _ in range(2))
        d = scores.difference("balanced_accuracy", a[None], b[None], truth, np.arange(60), resamples=150)
        low += d.p < 0.05
    assert low <= 9


def test_the_scale_of_probabilities_does_not_reach_the_test_of_ranks() -> None:
    p, truth = a_task(seed=4)
    d = scores.difference("auroc", p[None], (p**3)[None], truth, np.arange(len(truth)), resamples=200)
    assert d.mean == pytest.approx(0, abs=1e-12)
    assert d.p == 1.0


def test_few_cases_give_no_interval() -> None:
    values = np.array([[[0.5, np.nan], [0.7, 0.2]]])
    e = scores.estimate("dice", values, np.zeros(2), np.arange(2))
    assert e.mean == pytest.approx((0.5 + 0.45) / 2)
    assert np.isnan(e.low)
    assert np.isnan(scores.difference("dice", values, values, np.zeros(2), np.arange(2)).p)


def test_predictions_must_pair() -> None:
    p, truth = a_task()
    with pytest.raises(ValueError, match="pair the same seeds"):
        scores.difference("auroc", p[None], np.stack([p, p]), truth, np.arange(len(truth)))
