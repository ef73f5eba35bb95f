"""Fetching ahead: batches while the network computes, and samples of a slow store by many threads, in their order."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset, get_worker_info

__all__ = ["Ahead", "ReadAhead", "Threads"]

T = TypeVar("T")


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
        return item  # pyright: ignore[reportReturnType] - None only with an error

    def close(self) -> None:
        """Stop fetching; what was fetched is dropped."""
        self._closed = True
        while True:
            try:
                self._held.get_nowait()
            except queue.Empty:
                break
        self._thread.join(5)  # longer only where a read hangs, and then the process may end without it


class Threads:
    """Threads that make calls. They are daemons: a process ends without waiting for a read that hangs."""

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, call, args))
        return future

    def _work(self) -> None:
        while True:
            future, call, args = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*args))
                except BaseException as error:  # whoever waits for it raises it
                    future.set_exception(error)
                del future


class ReadAhead(Dataset[T]):
    """A data set whose next samples are read by threads: for reads that wait, not for work.

    Each process (the trainer, or a worker of its loader) reads ahead what its own next batches need. A sample is what
    `item` gives for its number, so what comes is the same with and without.

    Args:
        item: sample number to sample.
        starts: the first sample of each batch of this rank, in order; worker w of W reads the batches w, w + W, ...
        batch: samples of a batch, consecutive ones.
        held: samples that are read, or being read, at a time; the batch that is due at least.
    """

    def __init__(self, item: Callable[[int], T], starts: range, batch: int, *, held: int, threads: int = 8) -> None:
        self.item, self.starts, self.batch = item, starts, batch
        self.held, self.threads = held, threads
        self._owner = 0
        self._pool: Threads | None = None
        self._pending: dict[int, Future[T]] = {}

    def __getitem__(self, sample: int) -> T:
        return self.item(sample)

    def __getitems__(self, samples: list[int]) -> list[T]:
        """A batch. Raises what `item` did for the first sample that failed."""
        if self._pool is None or self._owner != os.getpid():  # threads do not follow into a fork
            self._owner, self._pool, self._pending = os.getpid(), Threads(self.threads, "samples"), {}
        worker = get_worker_info()
        for start in self.starts[self.starts.index(samples[0]) :: worker.num_workers if worker else 1]:
            if start != samples[0] and len(self._pending) + self.batch > self.held:
                break
            for sample in range(start, start + self.batch):
                if sample not in self._pending:
                    self._pending[sample] = self._pool.submit(self.item, sample)
        return [self._pending.pop(sample).result() for sample in samples]
