"""From stored scans to batches of crops: which scan a sample shows, and how batches are fetched ahead.

The order of samples and every crop are pure functions of the seed and the sample's number, so a run can be stopped
anywhere, resumed, or spread over workers and processes, and still see the same data.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prepare import Stored, load
from views import Plan, ViewsConfig, draw

__all__ = ["Ahead", "Crops", "loader", "sample_scan"]

T = TypeVar("T")


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
        return draw(
            load(scan.path),
            scan.spacing_mm,
            load(scan.points_path),
            scan.threshold,
            self.views,
            (self.seed, 3, sample),
            number,
            scan.modality,
        )


class _Batches:
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
    return DataLoader(
        crops,
        batch_sampler=_Batches(steps, origin, accumulate, batch, rank, ranks),  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        timeout=timeout if workers else 0,
        worker_init_fn=_quiet_worker,
        # Its own generator, so that making a loader never moves torch's.
        generator=torch.Generator().manual_seed(0),
    )


class Ahead(Iterator[T], Generic[T]):
    """What an iterator gives, in its order, the next ones fetched by a thread while the caller computes.

    Errors come at their turn. Where the caller stands is what it has taken: a checkpoint knows nothing of this.
    """

    def __init__(self, source: Iterator[T], *, device: torch.device, timeout: float = 0, depth: int = 2) -> None:
        """At most `depth` are held, and one more is being fetched; `device`: of the caller, for pinned memory."""
        self._timeout = timeout or None
        self._held: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._fetch, args=(source, device), name="crops", daemon=True)
        self._thread.start()

    def _fetch(self, source: Iterator[T], device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a choice of its own, GPU 0 at first
        while not self._closed:
            try:
                self._held.put((next(source), None))
            except BaseException as error:  # StopIteration too: the caller's to see
                self._held.put((None, error))
                return

    def __next__(self) -> T:
        """Raises what the iterator did; RuntimeError where nothing came within `timeout` seconds (0: no limit)."""
        try:
            item, error = self._held.get(timeout=self._timeout)
        except queue.Empty:
            raise RuntimeError(f"timed out after {self._timeout} seconds") from None
        if error is not None:
            self._held.put((None, error))  # and at every later call
            raise error
        return item  # pyright: ignore[reportReturnType] - None only beside an error

    def close(self) -> None:
        """Stop fetching; what was fetched is dropped."""
        self._closed = True
        while True:
            try:
                self._held.get_nowait()
            except queue.Empty:
                break
        self._thread.join(5)  # longer only where a read hangs, and then the process may end without it


def _quiet_worker(_: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    torch.set_num_threads(1)
