"""From stored scans to batches of crops: which scan a sample shows, and how batches are fetched ahead.

The order of samples and every crop are pure functions of the seed and the sample's number, so a run can be stopped
anywhere, resumed, or spread over workers and processes, and still see the same data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medformer.data.store.ahead import ReadAhead
from medformer.data.store.entries import Stored, open_scan
from views import Plan, ViewsConfig, draw, region_size

__all__ = ["Batches", "Crops", "loader", "sample_scan"]

_AHEAD = 32, 2**29  # samples of a store on a server that a process reads ahead at most, and their bytes


def sample_scan(seed: int, sample: int, scans: int) -> int:
    """The scan of a sample: each epoch is a new permutation of all scans."""
    return int(_permutation(seed, sample // scans, scans)[sample % scans])


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, scans: int) -> np.ndarray:
    return np.random.default_rng((seed, 2, epoch)).permutation(scans)


class Crops(Dataset[Plan]):
    """Sample number to the views drawn for it."""

    def __init__(
        self, scans: list[Stored], views: ViewsConfig, seed: int, order: Callable[[int], int] | None = None
    ) -> None:
        """`order` gives the scan of a sample; None: a permutation of all scans each epoch."""
        self.scans = scans
        self.views = views
        self.seed = seed
        self.order = order

    def __getitem__(self, sample: int) -> Plan:
        number = self.order(sample) if self.order else sample_scan(self.seed, sample, len(self.scans))
        scan = self.scans[number]
        voxels, points = open_scan(scan)
        seed = (self.seed, 3, sample)
        return draw(voxels, scan.spacing_mm, points, scan.threshold, self.views, seed, number, scan.modalities)


class Batches:
    """Sample numbers of each micro-batch of one process: those of a step are consecutive over all of them."""

    def __init__(self, steps: int, origin: int, accumulate: int, batch: int, rank: int, ranks: int) -> None:
        self.starts = range(origin + rank * batch, origin + steps * accumulate * ranks * batch, ranks * batch)
        self.batch = batch

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self.batch)) for start in self.starts)

    def __len__(self) -> int:
        return len(self.starts)


def loader(
    crops: Crops,
    *,
    steps: int,
    origin: int = 0,
    accumulate: int,
    batch: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    pin: bool = False,
    timeout: float = 0,
) -> DataLoader[Plan]:
    """Micro-batches of `steps` optimiser steps from sample `origin` on, in order, with any number of workers.

    A batch that workers do not deliver within `timeout` seconds (0: no limit) is a RuntimeError.
    """
    batches = Batches(steps, origin, accumulate, batch, rank, ranks)
    channels = max((len(scan.there) for scan in crops.scans), default=1)
    held = min(_AHEAD[0], _AHEAD[1] // (2 * channels * math.prod(region_size(crops.views))))
    far = any(scan.far for scan in crops.scans)
    return DataLoader(
        ReadAhead(crops.__getitem__, batches.starts, batch, held=max(held, 2 * batch)) if far else crops,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        timeout=timeout if workers else 0,
        worker_init_fn=_quiet_worker,
        # Its own generator, so that making a loader never moves torch's.
        generator=torch.Generator().manual_seed(0),
    )


def _quiet_worker(_: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    torch.set_num_threads(1)
