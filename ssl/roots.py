"""Several data roots in one run, and which scan a sample shows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crops import sample_scan
from images import prepare_images
from prepare import DataConfig, Prepared, prepare
from runs import UserError
from views import ViewsConfig

__all__ = ["Order", "gather", "voxel_scale"]


@dataclass(frozen=True)
class Order:
    """The scan of each sample, a pure function of seed and number.

    Without weights each epoch is a permutation of all scans. With weights an epoch is as long, each root has its share
    of it (largest remainder), spread evenly at random, and goes through its own scans by permutations of its own.
    """

    seed: int
    counts: tuple[int, ...]
    """Scans of each root; they lie one root after the other in the list of scans."""
    weights: tuple[float, ...] | None = None

    def __call__(self, sample: int) -> int:
        total = sum(self.counts)
        if self.weights is None:
            return sample_scan(self.seed, sample, total)
        epoch, at = divmod(sample, total)
        roots, ranks, shares = _epoch(self, epoch)
        root = int(roots[at])
        along = epoch * shares[root] + int(ranks[at])
        return sum(self.counts[:root]) + sample_scan(self.seed + 7919 * (root + 1), along, self.counts[root])


@lru_cache(maxsize=8)
def _epoch(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Root of each sample of an epoch, its rank among that root's samples, and how many each root has."""
    assert order.weights is not None
    total = sum(order.counts)
    exact = np.array(order.weights) / sum(order.weights) * total
    shares = np.floor(exact).astype(int)
    for root in np.argsort(-(exact - shares), kind="stable")[: total - shares.sum()]:
        shares[root] += 1
    roots = np.repeat(np.arange(len(shares)), shares)
    roots = np.random.default_rng((order.seed, 5, epoch)).permutation(roots)
    ranks = np.zeros(total, int)
    for root in range(len(shares)):
        ranks[roots == root] = np.arange(shares[root])
    return roots, ranks, shares.tolist()


def gather(
    config: DataConfig,
    views: ViewsConfig,
    dims: int,
    cache: Path,
    seed: int,
    progress: Callable[[list[Any]], Any] = iter,
) -> tuple[Prepared, Order]:
    """Read all roots, scans for dims=3 and images for dims=2; they are one list, root after root.

    Raises:
        UserError: a root has nothing to train on, or weights do not fit the roots.
    """
    paths = [None] if config.root is None else [p for p in config.root.split(os.pathsep) if p]
    if config.weights is not None and len(config.weights) != len(paths):
        raise UserError(
            f"--data.weights {','.join(map(str, config.weights))} are {len(config.weights)} numbers for {len(paths)} "
            "roots; give one for each", 2,
        )  # fmt: skip
    read = prepare if dims == 3 else prepare_images
    parts = [read(replace(config, root=path), views, cache, seed, progress) for path in paths]
    whole = Prepared(
        train=[scan for part in parts for scan in part.train],
        held_out=[scan for part in parts for scan in part.held_out],
        skipped=[entry for part in parts for entry in part.skipped],
        ignored=sum(part.ignored for part in parts),
    )
    return whole, Order(seed, tuple(len(part.train) for part in parts), config.weights)


def voxel_scale(prepared: Prepared) -> str:
    """What the normalised voxels of the training scans are."""
    ct = {scan.modality == "CT" for scan in prepared.train}
    return "HU / 500" if ct == {True} else "z-score" if ct == {False} else "HU / 500 and z-score"
