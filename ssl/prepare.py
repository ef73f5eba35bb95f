"""From a folder of scans to crops: every scan is read, checked and normalised once, then cut by memory map.

The order of samples and every crop are pure functions of the seed and the sample's number, so a run can be stopped
anywhere, resumed, or spread over workers and processes, and still see the same data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medformer.data import ScanError, find_scans, normalise, sample_scans
from runs import UserError, write_whole
from views import Plan, ViewsConfig, draw

__all__ = ["Crops", "DataConfig", "Prepared", "Stored", "load", "loader", "prepare", "sample_scan"]

# Part of every cache key: raise it when what is stored changes.
_VERSION = 1
_JUNK = "not a scan"  # what find_scans says of a file that is none
_POINTS = 2048  # places in the tissue kept for each scan


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which scans to train on."""

    root: str | None = None
    """Folder of .nii, .nii.gz and DICOM files, nested and mixed with anything (with --model.dims 2: of PNG and JPEG
    images, or an .npz file with train_images); several, parted by a colon; default: the scans that come with the
    dependencies."""
    weights: tuple[float, ...] | None = None
    """How often each of several roots is shown, relative to the others, for instance 1,2; default: by its scans."""
    cache: str | None = None
    """Folder for the normalised copies (2 bytes a voxel), shared by all runs; default: runs/cache."""
    small: Literal["auto", "skip", "pad"] = "auto"
    """A scan below --views.global_size: skip it, or pad it by repeating its edge. auto: skip, but pad the built-in
    scans."""
    held_out: int = 1
    """Scans kept out of training for the pictures; 0 or more. One scan alone is never held out."""

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise ValueError(f"--data.held_out {self.held_out} must be 0 or more")
        if self.weights is not None and not all(w > 0 for w in self.weights):
            raise ValueError(f"--data.weights {self.weights} must all be above 0")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One scan in the cache."""

    name: str
    path: str
    """.npy file, float16 [Z, Y, X], axes nearest to S, A and R."""
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    modality: str
    threshold: float
    """Tissue is above it, air below."""
    notes: tuple[str, ...]

    @property
    def points_path(self) -> str:
        return self.path.removesuffix(".npy") + ".points.npy"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run trains on."""

    train: list[Stored]
    held_out: list[Stored]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each scan left out."""
    ignored: int = 0
    """Files that are no scans at all."""

    def fingerprint(self) -> list[str]:
        """Names the training scans and their content, in order; a resumed run compares it."""
        return [f"{scan.name} {Path(scan.path).stem}" for scan in self.train]


def prepare(
    config: DataConfig,
    views: ViewsConfig,
    cache: Path,
    seed: int,
    progress: Callable[[list[Any]], Any] = iter,
) -> Prepared:
    """Find, check, normalise and store all scans; those already in the cache are only looked up.

    `progress` wraps the list of scans to show how far it is.

    Raises:
        UserError: there is nothing to train on.
    """
    if config.root is not None and not Path(config.root).is_dir():
        raise UserError(f"--data.root {config.root}: no such folder")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data.cache {cache}: {error.strerror}; give a folder that can be written") from error
    try:
        index = sample_scans(cache / "samples") if config.root is None else find_scans(config.root)
    except ScanError as error:
        raise UserError(str(error)) from error
    except OSError as error:  # the built-in scans write a few synthetic ones
        raise UserError(
            f"cannot write {error.filename or cache}: {error.strerror}; choose another --data.cache"
        ) from error
    where = "the built-in scans" if config.root is None else f"--data.root {config.root}"
    skipped = [(s.path, s.reason) for s in index.skipped if s.reason != _JUNK]
    ignored = len(index.skipped) - len(skipped)
    pad = config.small == "pad" or (config.small == "auto" and config.root is None)
    good: list[Stored] = []
    for scan in progress(index.scans):
        try:
            stored = _store(scan, cache)
        except ScanError as error:
            skipped.append((scan.name, str(error)))
            continue
        reason = _too_small(stored, views, pad)
        if reason:
            skipped.append((scan.name, reason))
        else:
            good.append(stored)
    if not good:
        raise UserError(_nothing_left(where, skipped))
    held = _held_out(good, views, min(config.held_out, len(good) - 1), seed)
    return Prepared(train=[s for s in good if s not in held], held_out=held, skipped=skipped, ignored=ignored)


def _nothing_left(where: str, skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return f"{where} holds no .nii, .nii.gz or DICOM file; point --data.root at a folder that does"
    name, reason = skipped[-1]
    return f"{where}: none of {len(skipped)} candidates can be used; for instance {name}: {reason}"


def _too_small(scan: Stored, views: ViewsConfig, pad: bool) -> str | None:
    if pad or all(n >= wanted for n, wanted in zip(scan.shape, views.global_size, strict=True)):
        return None
    size, wanted = ("x".join(map(str, s)) for s in (scan.shape, views.global_size))
    return f"{size} voxels (zyx) is below --views.global_size {wanted}; use a smaller one, or --data.small pad"


def _held_out(scans: list[Stored], views: ViewsConfig, count: int, seed: int) -> list[Stored]:
    """Chosen by seed among the scans that need no padding, or among all where none is large enough."""
    large = [s for s in scans if _too_small(s, views, False) is None] or scans
    order = np.random.default_rng((seed, 1)).permutation(len(large))
    return [large[i] for i in order[:count]]


def _store(scan: Any, cache: Path) -> Stored:
    """Read, check, normalise and write one scan, unless the cache has it. Raises ScanError."""
    base = cache / _key(scan)
    sidecar = base.with_suffix(".json")
    if sidecar.exists():
        values: dict[str, Any] = json.loads(sidecar.read_text())
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        # The cache may have been moved, and a scan's name depends on the root it was found under.
        values |= {"name": scan.name, "path": str(base.with_suffix(".npy"))}
        if Path(values["path"]).exists():
            return Stored(**values)
    volume = scan.read()
    voxels = normalise(volume)
    if not np.isfinite(voxels).all():
        raise ScanError(f"{scan.name}: {int((~np.isfinite(voxels)).sum())} voxels are NaN or Inf; repair the file")
    if float(voxels.max()) == float(voxels.min()):
        raise ScanError(f"{scan.name}: every voxel has the same value; there is nothing to learn from")
    threshold = _otsu(voxels)
    stored = Stored(
        name=scan.name,
        path=str(base.with_suffix(".npy")),
        shape=volume.shape,
        spacing_mm=volume.spacing_mm,
        modality=volume.modality,
        threshold=threshold,
        notes=tuple(volume.notes),
    )
    limit = np.finfo(np.float16).max
    half = np.ascontiguousarray(voxels.clip(-limit, limit).astype(np.float16))
    points = _points(voxels, threshold)
    write_whole(Path(stored.path), lambda file: np.lib.format.write_array(file, half))
    write_whole(Path(stored.points_path), lambda file: np.lib.format.write_array(file, points))
    # The sidecar comes last: with it the entry is complete.
    write_whole(sidecar, lambda file: file.write(json.dumps(asdict(stored)).encode()))
    return stored


def _key(scan: Any) -> str:
    """Changes with the files' paths, sizes and times."""
    digest = hashlib.sha256(f"{_VERSION}".encode())
    for file in scan.files:
        stat = os.stat(file)
        digest.update(f"|{Path(file).resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _otsu(voxels: np.ndarray) -> float:
    """The value that parts the histogram best into two classes (Otsu 1979): air and the rest, nearly always."""
    counts, edges = np.histogram(voxels.reshape(-1)[:: max(1, voxels.size // 200_000)], bins=128)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + int(np.nanargmax(np.where(above > 0, between, -1)))])


def _points(voxels: np.ndarray, threshold: float) -> np.ndarray:
    """Up to 2048 random places above the threshold, [n, 3] int32 zyx; the same for the same scan."""
    flat = np.flatnonzero(voxels.reshape(-1) > threshold)
    chosen = np.random.default_rng(0).choice(flat, min(_POINTS, len(flat)), replace=False) if len(flat) else flat
    return np.stack(np.unravel_index(np.sort(chosen), voxels.shape), axis=1).astype(np.int32)


def sample_scan(seed: int, sample: int, scans: int) -> int:
    """The scan of a sample: each epoch is a new permutation of all scans."""
    return int(_permutation(seed, sample // scans, scans)[sample % scans])


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, scans: int) -> np.ndarray:
    return np.random.default_rng((seed, 2, epoch)).permutation(scans)


@lru_cache(maxsize=64)
def load(path: str) -> np.ndarray:
    """Memory map of a stored array; at most 64 stay open in a process."""
    return np.load(path, mmap_mode="r")


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


def _quiet_worker(_: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    torch.set_num_threads(1)
