"""From scans to stored scans: each is read, checked and written once, to be read by the crop (`crops.py`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medformer.data import ScanError, Volume, find_scans, sample_scans
from medformer.data.intensity import Scaling, count_labels, scaling_of
from medformer.data.store import MAX_OPEN, Scaled, compresses, open_array, suffix, write_array
from runs import UserError, write_whole
from views import ViewsConfig

__all__ = [
    "INDEX",
    "DataConfig",
    "Prepared",
    "Stored",
    "keep",
    "key_of",
    "load",
    "look_up",
    "prepare",
]

# Part of every cache key: raise it when what is stored changes.
_VERSION = 3
_JUNK = "not a scan"  # what find_scans says of a file that is none
INDEX = "index.sqlite"  # of a store that building.py made
_POINTS = 2048  # places in the tissue kept for each scan


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which scans to train on."""

    root: str | None = None
    """Folder of scans (NIfTI, DICOM and more), nested and mixed with anything, or a store made by ssl/prepare.py (with
    --model.dims 2: of PNG and JPEG images, or an .npz file with train_images); several, parted by a colon; default:
    the scans that come with the dependencies."""
    weights: tuple[float, ...] | None = None
    """How often each of several roots is shown, relative to the others, for instance 1,2; default: by its scans."""
    cache: str | None = None
    """Folder for the stored copies (at most 2 bytes a voxel; half of it with blosc2), shared by all runs; default:
    runs/cache."""
    small: Literal["auto", "skip", "pad"] = "auto"
    """A scan below --views.global_size: skip it, or pad it by repeating its edge. auto: skip, but pad the built-in
    scans, unless all of them are."""
    labels: Literal["skip", "keep"] = "skip"
    """What looks like a label map lying among the scans (few whole numbers in large areas): skip it, or train on it
    too."""
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
    """.b2nd or .npy file [Z, Y, X], axes nearest to S, A and R; `load` gives its scaled values."""
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    modality: str
    threshold: float
    """Tissue is above it, air below."""
    notes: tuple[str, ...]
    labels: int = 0
    """Labels in what looks like a label map; 0 for a scan."""

    @property
    def points_path(self) -> str:
        return str(Path(self.path).with_suffix("")) + ".points.npy"


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
        if config.root is not None and (Path(config.root) / INDEX).is_file():
            return _from_store(Path(config.root), config, views, seed)
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
        reason = _unwanted(stored, config, views, pad)
        if reason:
            skipped.append((scan.name, reason))
        else:
            good.append(stored)
    if config.small == "auto" and all(_too_small(s, views, False) for s in good):  # padding would be all there is
        skipped += [(s.name, _too_small(s, views, False) or "") for s in good]
        good = []
    if not good:
        raise UserError(_nothing_left(where, skipped))
    held = _held_out(good, views, min(config.held_out, len(good) - 1), seed)
    return Prepared(train=[s for s in good if s not in held], held_out=held, skipped=skipped, ignored=ignored)


def _from_store(store: Path, config: DataConfig, views: ViewsConfig, seed: int) -> Prepared:
    """The scans that `python ssl/prepare.py` has put there."""
    from building import rows

    skipped = [(row.name, row.reason) for row in rows(store) if row.state == "quarantined"]
    good: list[Stored] = []
    for row in rows(store):
        if row.state != "kept" or row.split not in {"train", ""}:
            continue
        stored = look_up(store / row.key, row.name)
        reason = "its stored array is gone; prepare the store again" if stored is None else None
        if stored is not None and (reason := _unwanted(stored, config, views, config.small == "pad")) is None:
            good.append(stored)
        else:
            skipped.append((row.name, reason or ""))
    if not good:
        raise UserError(_nothing_left(f"the store {store}", skipped))
    held = _held_out(good, views, min(config.held_out, len(good) - 1), seed)
    return Prepared(train=[s for s in good if s not in held], held_out=held, skipped=skipped)


def _nothing_left(where: str, skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return f"{where} holds no .nii, .nii.gz or DICOM file; point --data.root at a folder that does"
    name, reason = skipped[-1]
    return f"{where}: none of {len(skipped)} candidates can be used; for instance {name}: {reason}"


def _unwanted(scan: Stored, config: DataConfig, views: ViewsConfig, pad: bool) -> str | None:
    if scan.labels and config.labels == "skip":
        return f"looks like a label map ({scan.labels} labels), not a scan; --data.labels keep trains on it too"
    return _too_small(scan, views, pad)


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
    """Read, check and write one scan, unless the cache has it. Raises ScanError."""
    base = cache / key_of(scan.files)
    known = look_up(base, scan.name)
    return known or keep(scan.read(), base, scan.name, scan.files)


def look_up(base: Path, name: str) -> Stored | None:
    """The entry under `base`, if it is there and complete."""
    sidecar = base.with_suffix(".json")
    if not sidecar.exists():
        return None
    values: dict[str, Any] = json.loads(sidecar.read_text())
    path = base.with_suffix(values["suffix"])
    if not path.exists() or (values["suffix"] == ".b2nd" and not compresses()):
        return None
    # The cache may have been moved, and a scan's name depends on the root it was found under.
    return Stored(
        name=name, path=str(path), shape=tuple(values["shape"]), spacing_mm=tuple(values["spacing_mm"]),
        modality=values["modality"], threshold=values["threshold"], notes=tuple(values["notes"]),
        labels=values.get("labels", 0),  # stores made before 2026-11-28 do not say
    )  # fmt: skip


def keep(volume: Volume, base: Path, name: str, files: Sequence[str]) -> Stored:
    """Write the voxels, some places in the tissue and the sidecar of one volume."""
    scaling = scaling_of(volume)
    voxels, scaled = _narrow(volume, scaling)
    stored = Scaled(voxels, scaled)
    seen = np.asarray(stored)
    threshold = _otsu(seen.astype(np.float32))
    tissue = seen > threshold
    path, points = base.with_suffix(suffix()), _points(tissue)
    with _naming(path):
        write_array(path, voxels)
        write_array(Path(str(base) + ".points.npy"), points)
    entry = {
        "schema": _VERSION,
        "suffix": path.suffix,
        "shape": volume.shape,
        "spacing_mm": volume.spacing_mm,
        "affine": volume.affine.tolist(),
        "geometry": volume.geometry,
        "modality": volume.modality,
        "units": volume.units if scaled is scaling else "normalised",
        "scaling": asdict(scaled),
        "intensity": {"low": scaling.low, "high": scaling.high, "mean": scaling.mean, "scale": scaling.scale},
        "threshold": threshold,
        "foreground_zyx": _box(tissue),
        "labels": count_labels(volume.voxels),
        "notes": [n for n in volume.notes if not n.startswith("left out: ")],  # which names files
        "tags": dict(volume.provenance.get("tags", {})),
        "source_hash": _content(files),
        "bytes": voxels.nbytes,
    }
    # The sidecar comes last: with it the entry is complete.
    write_whole(base.with_suffix(".json"), lambda file: file.write(json.dumps(entry).encode()))
    found = look_up(base, name)
    assert found is not None
    return found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk ends the run in one line that names the cache."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --data.cache") from error


def _narrow(volume: Volume, scaling: Scaling) -> tuple[np.ndarray, Scaling]:
    """Voxels in 16 bits: whole numbers that fit as they are, everything else scaled, as float16.

    Padding becomes the lowest value that scaling clips to, so it looks like the air around it.
    """
    voxels = volume.voxels
    if volume.valid is not None:
        low = np.floor(scaling.low)
        low = max(low, np.iinfo(voxels.dtype).min) if voxels.dtype.kind in "iu" else low
        voxels = np.where(volume.valid, voxels, np.asarray(low).astype(voxels.dtype))
    for dtype in (np.uint8, np.int16, np.uint16) if voxels.dtype.kind in "iu" else ():
        limits = np.iinfo(dtype)
        if voxels.dtype == dtype or (voxels.min() >= limits.min and voxels.max() <= limits.max):
            return voxels.astype(dtype, copy=False), scaling
    limit = float(np.finfo(np.float16).max)
    return scaling.apply(voxels).clip(-limit, limit).astype(np.float16), Scaling(
        low=-limit, high=limit, mean=0.0, scale=1.0
    )


def key_of(files: Sequence[str]) -> str:
    """Changes with the files' paths, sizes and times, and with how they are stored."""
    digest = hashlib.sha256(f"{_VERSION}{suffix()}".encode())
    for file in files:
        stat = os.stat(file)
        digest.update(f"|{Path(file).resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _content(files: Sequence[str]) -> str:
    """A hash of what the files hold, whatever they are called."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as source:
            while block := source.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _box(tissue: np.ndarray) -> list[list[int]]:
    """First and last index of the tissue along z, y and x."""
    if not tissue.any():
        return [[0, n - 1] for n in tissue.shape]
    lines = [np.flatnonzero(tissue.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return [[int(line[0]), int(line[-1])] for line in lines]


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


def _points(tissue: np.ndarray) -> np.ndarray:
    """Up to 2048 random places in the tissue, [n, 3] int32 zyx; the same for the same scan."""
    flat = np.flatnonzero(tissue.reshape(-1))
    chosen = np.random.default_rng(0).choice(flat, min(_POINTS, len(flat)), replace=False) if len(flat) else flat
    return np.stack(np.unravel_index(np.sort(chosen), tissue.shape), axis=1).astype(np.int32)


@lru_cache(maxsize=2 * MAX_OPEN)
def load(path: str) -> Any:
    """A stored array, read by the slice: scaled where a sidecar says how, else as it is. 64 scans stay open."""
    sidecar = Path(path).with_suffix(".json")
    array = open_array(path)
    if path.endswith(".points.npy") or not sidecar.exists():
        return array
    return Scaled(array, Scaling(**json.loads(sidecar.read_text())["scaling"]))


if __name__ == "__main__":
    import sys

    from building import main

    sys.exit(main())
