"""What a run trains on: the scans or images of one root or several, stored once, and which one a sample shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crops import sample_scan
from medformer.data import ScanError
from medformer.data.names import Ids, known_modality, salt_of
from medformer.data.store.catalogue import has_scans, scans_of
from medformer.data.store.config import DataConfig
from medformer.data.store.entries import Stored
from medformer.data.store.images import store_images
from medformer.data.store.limit import Use
from medformer.data.store.reading import Taken, misfit, stored_cases, stored_scans
from medformer.data.store.remote import is_url, split_roots
from medformer.errors import UserError
from views import ViewsConfig

__all__ = ["DataConfig", "Order", "Prepared", "gather", "prepare", "prepare_images", "voxel_scale"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run trains on."""

    train: list[Stored]
    held_out: list[Stored]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each scan left out."""
    ignored: int = 0
    """Files that are no scans at all."""
    notices: list[str] = field(default_factory=list)
    """Decisions about scans that do not say what they are, and damaged entries of the cache."""

    def fingerprint(self) -> list[str]:
        """Name, content and unit of each training scan, in order; a resumed run compares it."""
        return [f"{scan.name} {scan.content}-{scan.modality}" for scan in self.train]


def prepare(
    config: DataConfig, views: ViewsConfig, cache: Path, seed: int, progress: Callable[[list[Any]], Any] = iter,
    use: Use | None = None,
) -> Prepared:  # fmt: skip
    """Find, check, normalise and store all scans; those already in the cache are only looked up.

    `progress` wraps the list of scans to show how far it is; `use` notes what is taken from the cache.

    Raises:
        UserError: there is nothing to train on.
    """
    if config.root is not None and not (is_url(config.root) or Path(config.root).exists()):
        raise UserError(
            f"--data.root {config.root}: no such folder or file; where scans were moved, give their new folder"
        )
    if config.root is not None and config.root.lower().endswith((".csv", ".tsv")) and not config.channels:
        raise UserError(
            f"--data.root {config.root}: a table of cases needs --data.channels, the columns of their files", 2
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data.cache {cache}: {error.strerror}; give a folder that can be written") from error
    taken = Taken()
    try:
        if config.root is not None and has_scans(config.root):
            return _from_store(config.root, config, views, cache, seed, use)
        if config.root is not None and config.channels:
            stored_cases(config.root, config.channels, config.missing, cache, config.modality, taken, progress, use)
        else:
            stored_scans(config.root, cache, config.modality, taken, progress, use)
    except KeyboardInterrupt as stop:  # what was skipped so far, for skipped.txt
        stop.args = (_by_ids([], taken.skipped, taken.hidden(cache))[1] if config.names == "ids" else taken.skipped,)
        raise
    except ScanError as error:
        raise UserError(str(error).replace("--channels", "--data.channels")) from error
    except OSError as error:  # the built-in scans write a few synthetic ones
        raise UserError(
            f"cannot write {error.filename or cache}: {error.strerror}; choose another --data.cache"
        ) from error
    where = "the built-in scans" if config.root is None else f"--data.root {config.root}"
    pad = config.small == "pad" or (config.small == "auto" and config.root is None)
    good: list[Stored] = []
    skipped, notices = taken.skipped, taken.notices
    for stored in taken.scans.values():
        reason = _unwanted(stored, config, views, pad)
        if reason:
            skipped.append((stored.name, reason))
        else:
            good.append(stored)
    kept = [s for s in taken.scans.values() if _unwanted(s, config, views, True) is None]
    if config.small == "auto" and good and (small := [s.shape for s in kept if s not in good]):
        notices.append(
            f"WARNING: {len(small)} of {len(kept)} scans (down to {min(map(min, small))} slices) are below --views."
            "global_size and left out; --data.small pad trains on them, their edges repeated"
        )
    if config.small == "auto" and all(_too_small(s, views, False) for s in good):  # padding would be all there is
        skipped += [(s.name, _too_small(s, views, False) or "") for s in good]
        good = []
    if config.names == "ids":
        good, skipped = _by_ids(good, skipped, taken.hidden(cache))
        notices = [taken.hidden(cache).hide(line) for line in notices]
    if not good:
        raise UserError(_nothing_left(where, skipped))
    held = _held_out(good, views, min(config.held_out, len(good) - 1), seed)
    return Prepared(
        train=[s for s in good if s not in held],
        held_out=held,
        skipped=skipped,
        ignored=taken.ignored,
        notices=notices,
    )


def _by_ids(good: list[Stored], skipped: list[tuple[str, str]], ids: Ids) -> tuple[list[Stored], list[tuple[str, str]]]:
    """The same, called by ids."""
    renamed = [replace(scan, name=ids.of(scan.name), modality=known_modality(scan.modality)) for scan in good]
    return renamed, [(ids.of(name), ids.hide(reason, name)) for name, reason in skipped]


def _from_store(
    store: str, config: DataConfig, views: ViewsConfig, cache: Path, seed: int, use: Use | None
) -> Prepared:
    """The scans that `medformer prepare` has put there."""
    if config.modality is not None:
        raise UserError(f"--data.modality {config.modality}: the store {store} was prepared already; leave it out", 2)
    found, skipped, notices = scans_of(store, cache, use and use.limit)
    reasons = [
        misfit(scan, config.channels, config.missing) or _unwanted(scan, config, views, config.small == "pad")
        for scan in found
    ]
    good = [scan for scan, reason in zip(found, reasons, strict=True) if reason is None]
    skipped += [(scan.name, reason) for scan, reason in zip(found, reasons, strict=True) if reason is not None]
    if not good:
        raise UserError(_nothing_left(f"the store {store}", skipped))
    held = _held_out(good, views, min(config.held_out, len(good) - 1), seed)
    train = [scan for scan in good if scan not in held]
    return Prepared(train=train, held_out=held, skipped=skipped, notices=notices)


def _nothing_left(where: str, skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return f"{where} holds no .nii, .nii.gz or DICOM file; point --data.root at a folder that does"
    name, reason = skipped[-1]
    return f"{where}: none of {len(skipped)} candidates can be used; for instance {name}: {reason}"


def _unwanted(scan: Stored, config: DataConfig, views: ViewsConfig, pad: bool) -> str | None:
    if scan.labels and config.labels == "skip":
        lie = [n.partition("=")[0] for n, part in zip(config.channels, scan.parts, strict=True) if part and part.labels]
        return (
            f"{lie[0] + ' ' if lie else ''}looks like a label map ({scan.labels} labels), not a scan; --data.labels "
            "keep trains on it too"
        )
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


def prepare_images(
    config: DataConfig, views: ViewsConfig, cache: Path, seed: int, progress: Callable[[list[Any]], Any] = iter,
    use: Use | None = None,
) -> Prepared:  # fmt: skip
    """As `prepare`, for one folder of images or one .npz file (of which `train_images` are used).

    Raises:
        UserError: there is nothing to train on.
    """
    root = Path(config.root or "")
    if config.root is None or not (root.is_dir() or (root.suffix == ".npz" and root.is_file())):
        raise UserError(
            f"--data.root {config.root}: with --model.dims 2 it must be a folder of PNG or JPEG images, or an .npz "
            "file with train_images"
        )
    notices: list[str] = []
    stored, skipped = store_images(root, cache, views.image_side, progress, notices.append, use)
    if config.names == "ids":
        stored, skipped = _by_ids(stored, skipped, Ids(salt_of(cache), [image.name for image in stored]))
    images: list[Stored] = []
    for image in stored:
        if config.small != "pad" and any(n < w for n, w in zip(image.shape, views.global_size, strict=True)):
            size, wanted = ("x".join(map(str, s)) for s in (image.shape[1:], views.global_size[1:]))
            skipped.append((image.name, f"{size} pixels (yx) is below --views.global_size {wanted}"))
            continue
        images.append(image)
    if not images:
        why = f"; for instance {skipped[-1][0]}: {skipped[-1][1]}" if skipped else ""
        raise UserError(f"--data.root {root}: no image that can be used{why}")
    held = np.random.default_rng((seed, 1)).permutation(len(images))[: min(config.held_out, len(images) - 1)]
    chosen_out = {int(i) for i in held}
    return Prepared(
        train=[image for i, image in enumerate(images) if i not in chosen_out],
        held_out=[images[i] for i in sorted(chosen_out)],
        skipped=skipped,
        notices=notices,
    )


@dataclass(frozen=True)
class Order:
    """The scan of each sample, a pure function of seed and number.

    Without weights each epoch is a permutation of all scans. With weights an epoch is as long, each root has its share
    of it (largest remainder), spread evenly at random, and goes through its own scans by permutations of its own.
    """

    seed: int
    counts: tuple[int, ...]
    """Scans of each root; they come one root after the other in the list of scans."""
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
    config: DataConfig, views: ViewsConfig, dims: int, cache: Path, seed: int,
    progress: Callable[[list[Any]], Any] = iter, use: Use | None = None,
) -> tuple[Prepared, Order]:  # fmt: skip
    """Read all roots, scans for dims=3 and images for dims=2; they are one list, root after root.

    Raises:
        UserError: a root has nothing to train on, or weights do not fit the roots.
    """
    paths = [None] if config.root is None else split_roots(config.root)
    if config.weights is not None and len(config.weights) != len(paths):
        raise UserError(
            f"--data.weights {','.join(map(str, config.weights))} are {len(config.weights)} numbers for {len(paths)} "
            "roots; give one for each",
            2,
        )
    read = prepare if dims == 3 else prepare_images
    parts = [read(replace(config, root=path), views, cache, seed, progress, use) for path in paths]
    whole = Prepared(
        train=[scan for part in parts for scan in part.train],
        held_out=[scan for part in parts for scan in part.held_out],
        skipped=[entry for part in parts for entry in part.skipped],
        ignored=sum(part.ignored for part in parts),
        notices=[line for part in parts for line in part.notices],
    )
    return whole, Order(seed, tuple(len(part.train) for part in parts), config.weights)


def voxel_scale(prepared: Prepared) -> str:
    """What the normalised voxels of the training scans are."""
    ct = {part.modality == "CT" for scan in prepared.train for part in scan.there}
    return "HU / 500" if ct == {True} else "z-score" if ct == {False} else "HU / 500 and z-score"
