"""Scores of predictions, their intervals and their differences.

Points come from scikit-learn. Intervals need thousands of resamples, so the same scores exist here as functions of the
cases' weights, all resamples in one array pass; tests hold them to scikit-learn's `sample_weight`. Axes: S seeds, n
cases, C classes or labels, R resamples.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medformer.errors import UserError

__all__ = ["Difference", "Estimate", "dice", "difference", "estimate", "metrics_of", "point", "weighted"]

_METRICS = {
    "classes": ("auroc", "balanced_accuracy"),
    "labels": ("auroc", "balanced_accuracy"),
    "segmentation": ("dice",),
    "regression": ("r2", "mae", "rmse", "r"),
}


def metrics_of(kind: str) -> tuple[str, ...]:
    """Metrics of a kind of task; the first one chooses learning rates."""
    return _METRICS[kind]


def point(metric: str, predictions: np.ndarray, truth: np.ndarray) -> float:
    """One score of [n, C] probabilities: macro over classes or labels, NaN truth left out. Dice: mean of the cases'.

    Of numbers [n, 1] the mean absolute (mae) and root mean squared error, Pearson's r, and r2, the share of the
    variance of `truth` that is explained (below 0 where its mean alone would do better).

    Raises:
        UserError: scikit-learn is not installed.
    """
    if metric == "dice":
        return float(np.nanmean(np.nanmean(predictions, axis=1)))
    if metric in _METRICS["regression"]:
        return float(weighted(metric, predictions, truth, np.ones((1, len(truth))))[0])
    try:
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    except ImportError as error:
        raise UserError(
            "scikit-learn computes the scores and is not installed: pip install -e '.[evaluate]'"
        ) from error
    if truth.ndim == 1:
        if metric == "balanced_accuracy":
            return float(balanced_accuracy_score(truth, predictions.argmax(1)))
        columns = [(truth == c, predictions[:, c]) for c in range(predictions.shape[1])]
        return float(np.mean([roc_auc_score(y, p) for y, p in columns]))
    values = []
    for c in range(truth.shape[1]):
        known = ~np.isnan(truth[:, c])
        y, p = truth[known, c].astype(int), predictions[known, c]
        values.append(balanced_accuracy_score(y, p > 0.5) if metric == "balanced_accuracy" else roc_auc_score(y, p))
    return float(np.mean(values))


def dice(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """[C] Dice of one case's label maps, background left out; NaN where neither has the class."""
    p = np.bincount(predicted.ravel(), minlength=classes + 1)[1:]
    t = np.bincount(truth.ravel(), minlength=classes + 1)[1:]
    both = np.bincount(truth.ravel()[predicted.ravel() == truth.ravel()], minlength=classes + 1)[1:]
    with np.errstate(invalid="ignore"):
        return np.where(p + t > 0, 2 * both / np.maximum(p + t, 1), np.nan)


def weighted(metric: str, predictions: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R] scores of the same predictions under [R, n] case weights; a class that a resample lacks is left out of it."""
    if metric == "dice":
        values = np.nanmean(predictions, axis=1)
        seen = ~np.isnan(values)
        return weights[:, seen] @ values[seen] / np.maximum(weights[:, seen].sum(1), 1e-12)
    if metric in _METRICS["regression"]:
        return _of_numbers(metric, predictions[:, 0], truth[:, 0], weights)
    columns = []
    guess = predictions.argmax(1) if truth.ndim == 1 else None
    for c in range(predictions.shape[1]):
        if guess is not None:
            y, w, p = truth == c, weights, predictions[:, c]
            recall = [(y, guess == c)]
        else:
            known = ~np.isnan(truth[:, c])
            y, w, p = truth[known, c] == 1, weights[:, known], predictions[known, c]
            recall = [(y, p > 0.5), (~y, p <= 0.5)]
        if metric == "auroc":
            columns.append(_auroc(p, y, w))
        else:
            with np.errstate(invalid="ignore", divide="ignore"):
                parts = [w[:, is_c & right].sum(1) / w[:, is_c].sum(1) for is_c, right in recall]
            columns.append(np.mean(parts, axis=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample in which no class can be scored is NaN
        return np.nanmean(columns, axis=0)


def _of_numbers(metric: str, guess: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    guess, truth = guess.astype(np.float64), truth.astype(np.float64)
    weights = weights / weights.sum(1, keepdims=True)
    error = guess - truth
    if metric == "mae":
        return weights @ np.abs(error)
    if metric == "rmse":
        return np.sqrt(weights @ error**2)
    y = truth - (weights @ truth)[:, None]
    spread = (weights * y**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample of one number has neither
        if metric == "r2":
            return np.where(spread > 0, 1 - weights @ error**2 / spread, np.nan)
        x = guess - (weights @ guess)[:, None]
        return (weights * x * y).sum(1) / np.sqrt(spread * (weights * x**2).sum(1))


def _auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of (positive, negative) pairs in the right order, ties half; weights count."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    w, y = weights[:, order], positive[order]
    up = np.add.reduceat(w * y, starts, axis=1)
    down = np.add.reduceat(w * ~y, starts, axis=1)
    below = np.cumsum(down, axis=1) - down
    with np.errstate(invalid="ignore", divide="ignore"):
        return (up * (below + down / 2)).sum(1) / (up.sum(1) * down.sum(1))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score over seeds."""

    mean: float
    low: float
    high: float
    """95% interval: patients (or cases) and seeds resampled together; NaN below 5 of the former."""
    sd: float
    """Standard deviation over the seeds; NaN for one seed."""

    def as_dict(self) -> dict[str, Any]:
        return {k: None if np.isnan(v) else round(v, 5) for k, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One method minus another on the same cases and seeds."""

    mean: float
    low: float
    high: float
    """95% paired bootstrap interval, as in `Estimate`."""
    p: float
    """Paired permutation test: the two methods' predictions of a patient swapped at random, two-sided."""

    def as_dict(self) -> dict[str, Any]:
        return {k: None if np.isnan(v) else round(v, 5) for k, v in asdict(self).items()}


_LEAST_GROUPS = 5


def _resamples(groups: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[R, n] how often each case is drawn when whole patients are."""
    number = int(groups.max()) + 1
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=count)
    return drawn[:, groups].astype(np.float64)


def _boot(metric: str, stack: np.ndarray, truth: np.ndarray, weights: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """[R] mean over each resample's seeds; stack is [S, n, C]."""
    each = np.stack([weighted(metric, p, truth, weights) for p in stack], axis=1)  # [R, S]
    return np.take_along_axis(each, seeds, axis=1).mean(1)


def estimate(
    metric: str, stack: np.ndarray, truth: np.ndarray, groups: np.ndarray, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over seeds of [S, n, C] predictions, with its interval."""
    points = np.array([point(metric, p, truth) for p in stack])
    low, high = np.nan, np.nan
    if len(np.unique(groups)) >= _LEAST_GROUPS:
        rng = np.random.default_rng((seed, 21))
        seeds = rng.integers(len(stack), size=(resamples, len(stack)))
        low, high = np.nanpercentile(
            _boot(metric, stack, truth, _resamples(groups, resamples, rng), seeds), (2.5, 97.5)
        )
    sd = float(points.std(ddof=1)) if len(points) > 1 else float("nan")
    return Estimate(mean=float(points.mean()), low=float(low), high=float(high), sd=sd)


def difference(
    metric: str,
    a: np.ndarray,
    b: np.ndarray,
    truth: np.ndarray,
    groups: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """`a` minus `b`, both [S, n, C] over the same seeds and cases."""
    if a.shape != b.shape:
        raise ValueError(f"difference: a is {a.shape} and b {b.shape}; pair the same seeds and cases")
    mean = float(np.mean([point(metric, p, truth) - point(metric, q, truth) for p, q in zip(a, b, strict=True)]))
    if len(np.unique(groups)) < _LEAST_GROUPS:
        return Difference(mean=mean, low=float("nan"), high=float("nan"), p=float("nan"))
    rng = np.random.default_rng((seed, 21))
    seeds = rng.integers(len(a), size=(resamples, len(a)))
    weights = _resamples(groups, resamples, rng)
    boot = _boot(metric, a, truth, weights, seeds) - _boot(metric, b, truth, weights, seeds)
    low, high = np.nanpercentile(boot, (2.5, 97.5))
    if metric == "auroc":
        # Two methods' probabilities have different scales; what may be swapped is a case's rank within its method.
        a, b = _ranks(a), _ranks(b)
    ones = np.ones((1, len(truth) if metric != "dice" else a.shape[1]))

    def gap(left: np.ndarray, right: np.ndarray) -> float:
        one, other = ([weighted(metric, p, truth, ones) for p in stack] for stack in (left, right))
        return float(np.mean(one) - np.mean(other))

    observed = abs(gap(a, b))
    extreme, swaps = 0, min(resamples, 1000)
    for _ in range(swaps):
        swap = (rng.random(int(groups.max()) + 1) < 0.5)[groups][:, None]
        extreme += abs(gap(np.where(swap, b, a), np.where(swap, a, b))) >= observed - 1e-12
    return Difference(mean=mean, low=float(low), high=float(high), p=(1 + extreme) / (1 + swaps))


def _ranks(stack: np.ndarray) -> np.ndarray:
    """Mid-ranks of each seed's and class's scores over the cases."""
    out = np.empty_like(stack, dtype=np.float64)
    for s, c in np.ndindex(stack.shape[0], stack.shape[2]):
        _, inverse, count = np.unique(stack[s, :, c], return_inverse=True, return_counts=True)
        out[s, :, c] = (np.cumsum(count) - (count - 1) / 2)[inverse]
    return out
