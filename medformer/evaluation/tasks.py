"""Downstream tasks: labelled cases, who is in which split, which labels a fraction keeps, and what has leaked.

Two forms, distinguished by their ending. `.npz` in MedMNIST's layout: `train_images` [n, Y, X] or [n, Z, Y, X],
`train_labels` [n, 1] (one class a case) or [n, L] (several labels: 0, 1, and -1 or NaN for unknown), optionally
`val_*`, `test_*`, `train_patients` and `class_names`. `.csv` or `.tsv`: columns `path` (a scan, below the table's
folder), optionally `patient` and `split` (train, val, test), and either `label` (one class), `mask` (a label map on the
scan's grid), `value` (a number), or one column a label (0, 1, empty for unknown). A case may be several files, one a
channel: columns of files or patterns in a folder; `medformer/data/labels.py` has the rules.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medformer.data import ScanError, Volume, find_scans, read_volume
from medformer.data.cases import Looks, Vote, WrongAxes, cases_of, first, network_input, read_case, sources_of
from medformer.data.labels import Kind, check_arrays, read_arrays, read_label_table
from medformer.data.pictures import find_pictures, grey_array, is_picture, read_mask, split_page
from medformer.data.resample import on_grid, resize
from medformer.data.volumes import counted, nameless
from medformer.errors import UserError

__all__ = ["Task", "drop_leaks", "few_shots", "fraction", "hashes_of", "read_task", "source_hash"]

_SPLITS = ("train", "val", "test")
_SPLIT = "U6"  # "leaked" is the longest
_VAL_SHARE = 0.2  # of the training cases, where the task names no validation split
_NAMED = 3  # examples in an error


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a scan was measured like, which a later one may be far from."""

    spacing_mm: tuple[float, float, float] | None
    """zyx; None where the file says nothing about it."""
    modality: str
    units: str
    shape: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Labelled cases in memory, normalised as the trainer does it."""

    name: str
    kind: Kind
    """One class a case; several labels a case; one class a voxel; or a number a case."""
    dims: int
    """Spatial axes of an image."""
    names: tuple[str, ...]
    """Classes, labels, or what the number is; of a segmentation without the background."""
    images: list[Tensor]
    """float16 (C, *size) each; NaN in every voxel of a sequence that is missing."""
    targets: list[Tensor]
    """int64 (), float32 (L,) with NaN for unknown, float32 (1,), or uint8 of the image's size, 0 for background."""
    split: np.ndarray
    """'train', 'val' or 'test' for each case."""
    patients: tuple[str, ...] | None
    sources: tuple[str, ...]
    """Where each case came from, to name it by."""
    hashes: tuple[str, ...]
    """Source hash of each case."""
    parts: tuple[tuple[str, ...], ...] = ()
    """And of each of its sequences, where it has several."""
    notes: tuple[str, ...] = ()
    files: tuple[tuple[Path | None, ...], ...] = ()
    """Of each case one for each channel; empty for an archive of arrays."""
    modalities: tuple[tuple[str | None, ...], ...] = ()
    """What the files are read as, where they do not say it themselves."""
    masks: tuple[Path, ...] = ()
    """Label maps of a segmentation."""
    missing: bool = False
    """Whether a case may lack sequences."""
    seen: tuple[Seen, ...] = ()
    """What each scan was measured like; empty for an archive of arrays."""

    @property
    def channels(self) -> int:
        return len(self.images[0])

    @property
    def flags(self) -> int:
        """Channels of a network that say which sequence is missing."""
        return self.channels if self.missing else 0

    @property
    def range(self) -> tuple[float, float]:
        """Mean and standard deviation of the training cases' numbers."""
        values = self.labels(self.where("train")).astype(np.float64)
        return float(values.mean()), float(values.std())

    def known_to(self, hashes: Collection[str], i: int) -> bool:
        """Whether a case, or any of its sequences, is among these."""
        return self.hashes[i] in hashes or (bool(self.parts) and any(part in hashes for part in self.parts[i]))

    def where(self, split: str) -> np.ndarray:
        """Indices of a split's cases."""
        return np.flatnonzero(self.split == split)

    def labels(self, index: Iterable[int]) -> np.ndarray:
        """Targets of a classification task as one array."""
        return torch.stack([self.targets[i] for i in index]).numpy()

    def groups(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """A number for each case; cases of one patient share theirs."""
        if self.patients is None:
            return np.arange(len(index))
        return np.unique([self.patients[i] for i in index], return_inverse=True)[1]


def read_task(
    path: Path, dims: int, size: tuple[int, ...] | None, seed: int, progress: Callable[[Any], Any], *,
    labels: Sequence[str] = (), outside: bool = False, value: str | None = None, channels: Sequence[str] = (),
    missing: bool = False,
) -> Task:  # fmt: skip
    """Read, normalise and split a task; `size` resizes every image (but not of a segmentation).

    labels: columns of a table that are labels, where not all that look like it are. outside: absolute paths in it may
    lead out of its folder. value: the column of numbers to predict. channels, missing: as for `read_label_table`.

    Raises:
        UserError: in one line, for whatever is wrong with the table, a scan, a split or the dimension.
    """
    if not path.is_file():
        raise UserError(f"--task {path}: no such file; give an .npz (MedMNIST's layout) or a .csv of scans", 2)
    if path.suffix.lower() == ".npz":
        if channels or value is not None:
            raise UserError(f"--task {path}: {'--channels' if channels else '--value'} is of a .csv of scans", 2)
        task = _read_npz(path, dims, progress)
    elif path.suffix.lower() in (".csv", ".tsv"):
        task = _read_csv(path, dims, progress, labels, outside, value, channels, missing)
    else:
        raise UserError(f"--task {path}: must end in .npz, .csv or .tsv", 2)
    task = _complete(task, seed)
    _check_patients(task)
    _check_classes(task)
    shapes = {tuple(image.shape[1:]) for image in task.images}
    if task.kind == "segmentation":
        return task
    if size is None and len(shapes) > 1:
        raise UserError(f"--task {path}: images of {len(shapes)} sizes; give --size, to which all are resized", 2)
    if size is not None and len(size) != dims:
        raise UserError(f"--size {size} must have the {dims} axes of the checkpoint's images", 2)
    return task if size is None else replace(task, images=[resize(image, size) for image in task.images])


def _normal(voxels: np.ndarray, source: str) -> Tensor:
    """An array as pretraining sees it: (1, Y, X) or (1, Z, Y, X) float16."""
    return torch.from_numpy(network_input([as_volume(voxels, source)], voxels.ndim)).half()


def as_volume(voxels: np.ndarray, source: str) -> Volume:
    """An array (Y, X) or (Z, Y, X) as a scan without place."""
    return Volume(
        voxels=voxels[None] if voxels.ndim == 2 else voxels, affine=np.eye(4), modality="unknown", units="arbitrary",
        notes=(), source=source, geometry="none",
    )  # fmt: skip


def _array_hash(voxels: np.ndarray) -> str:
    head = f"{voxels.shape}{voxels.dtype.str}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(voxels).tobytes()).hexdigest()


def source_hash(files: Iterable[str | Path]) -> str:
    """One hash of a scan's files, whatever their names and order; pages of one file differ."""
    each = []
    for path in files:
        file, page = split_page(path)
        with open(file, "rb") as opened:
            each.append(hashlib.file_digest(opened, "sha256").hexdigest() + (f"#{page}" if page else ""))
    return each[0] if len(each) == 1 else hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path)
    except ScanError as error:
        raise UserError(f"--task {path}: {error}") from error


def _read_npz(path: Path, dims: int, progress: Callable[[Any], Any]) -> Task:
    arrays = _open_npz(path)
    present = [s for s in _SPLITS if f"{s}_images" in arrays]
    missing = [f"{s}_labels" for s in present if f"{s}_labels" not in arrays]
    if "train" not in present or missing:
        raise UserError(f"--task {path}: no {missing[0] if missing else 'train_images'} in it; MedMNIST's layout has")
    first = arrays["train_images"]
    colour = first.ndim == 4 and first.shape[-1] == 3
    found = first.ndim - 1 - colour
    if found != dims:
        raise UserError(
            f"--task {path}: images of {found} axes, but the checkpoint takes {dims}; use one trained in {found}D", 2
        )
    images, targets, split, patients, sources, hashes, remarks = [], [], [], [], [], [], []
    try:
        lists, count = check_arrays(arrays, present)
    except ScanError as error:
        raise UserError(f"--task {path}: {error}") from error
    several = lists[0].ndim > 1
    names = arrays.get("class_names")
    if names is not None and names.shape != (count,):
        raise UserError(f"--task {path}: class_names of shape {names.shape} for {count} classes or labels")
    for part, labels in zip(present, lists, strict=True):
        stack = arrays[f"{part}_images"]
        ids = arrays.get(f"{part}_patients")
        for i in progress(range(len(stack))):
            voxels, changes = grey_array(stack[i]) if colour else (stack[i], ())
            source = f"{path.name} {part}[{i}]"
            try:
                image = _normal(voxels, source)
            except ScanError as error:
                raise UserError(f"--task {path}: {error}") from error
            remarks.append(changes)
            images.append(image)
            targets.append(torch.from_numpy(labels[i]) if several else torch.tensor(int(labels[i])))
            split.append(part)
            sources.append(source)
            hashes.append(_array_hash(stack[i]))
            if ids is not None:
                patients.append(str(ids[i]))
    if patients and len(patients) != len(images):
        raise UserError(f"--task {path}: patients are given for some splits only; give them for all or none")
    return Task(
        name=path.stem, kind="labels" if several else "classes", dims=dims,
        names=tuple(str(n) for n in names) if names is not None else tuple(str(i) for i in range(count)),
        images=images, targets=targets, split=np.array(split, _SPLIT), patients=tuple(patients) or None,
        sources=tuple(sources), hashes=tuple(hashes),
        notes=(f"{path.name}: {', '.join(f'{s} {len(l)}' for s, l in zip(present, lists, strict=True))} cases; "
               f"{count} {'labels' if several else 'classes'}", *counted(remarks, "images")),
    )  # fmt: skip


def _read_csv(
    path: Path, dims: int, progress: Callable[[Any], Any], labels: Sequence[str], outside: bool, value: str | None,
    channels: Sequence[str], missing: bool,
) -> Task:  # fmt: skip
    try:
        table = read_label_table(path, labels, outside=outside, value=value, channels=channels, missing=missing)
    except ScanError as error:
        raise UserError(f"--task {path}: {str(error).removeprefix(f'{path.name}: ')}") from error
    images, targets, hashes, parts, seen, remarks, highest = [], [], [], [], [], [], 0
    vote = Vote(path.parent, len(table.files[0]))
    for i, files in enumerate(progress(table.files)):
        try:
            case = read_case(files, dims)
            if (words := vote.hear(i, files, [Looks.of(volume) for volume in case])) is not None:
                case = read_case(files, dims, modalities=words)
            image = torch.from_numpy(network_input(case, dims)).half()
            if table.kind == "segmentation":
                target = _read_mask(table.masks[i], first(case), dims)
                highest = max(highest, int(target.max()))
            else:
                target = torch.tensor(table.targets[i])
            each = [sources_of(file) for file in files if file is not None]  # as `hashes_of` takes them
            hashes.append(source_hash(itertools.chain(*each)))
            parts.append(tuple(map(source_hash, each)) if len(each) > 1 else ())
        except WrongAxes as error:
            raise UserError(f"--task {path}: row {table.lines[i]}: {error}", 2) from error
        except (ScanError, OSError) as error:
            said = str(error).removeprefix("read_volume: ")
            raise UserError(f"--task {path}: row {table.lines[i]}: {said}") from error
        changes = dict.fromkeys(note for volume in case if volume is not None for note in volume.notes)
        kept = nameless(changes)
        beside = ["files in its folder left out, which are no part of the scan"] if len(kept) < len(changes) else []
        remarks.append([*kept, *beside])
        images.append(image)
        targets.append(target)
        seen.append(_seen(first(case)))
    for i in vote.count():  # as pretraining on their folder takes them
        case = read_case(table.files[i], dims, modalities=vote.words[i])
        images[i], seen[i] = torch.from_numpy(network_input(case, dims)).half(), _seen(first(case))
    classes = tuple(str(c) for c in range(1, highest + 1)) if table.kind == "segmentation" else table.names
    return Task(
        name=path.stem, kind=table.kind, dims=dims, names=classes, images=images, targets=targets,
        split=np.array(table.splits, _SPLIT), patients=table.patients, sources=table.paths, hashes=tuple(hashes),
        notes=(*table.notes, *counted(remarks, "images"), *vote.lines), files=table.files, masks=table.masks,
        missing=missing, seen=tuple(seen), parts=tuple(parts),
        modalities=tuple(tuple(vote.words[i]) for i in range(len(images))),
    )  # fmt: skip


def _seen(grid: Volume) -> Seen:
    place = None if grid.geometry == "none" else grid.spacing_mm
    return Seen(spacing_mm=place, modality=grid.modality, units=grid.units, shape=grid.shape)


def _read_mask(path: Path, scan: Volume, dims: int) -> Tensor:
    source = Path(scan.source).name
    if is_picture(path):
        mask = read_mask(path)[None]
    else:
        found = read_volume(path)
        mask = found.voxels
        if found.shape == scan.shape and "none" not in (found.geometry, scan.geometry) and not on_grid(found, scan):
            raise ScanError(f"{path.name}: mask lies elsewhere in the patient than {source}; resample it onto its grid")
    if mask.shape != scan.shape:
        raise ScanError(f"{path.name}: mask of {mask.shape[3 - dims :]} voxels, {source} has {scan.shape[3 - dims :]}")
    if mask.min() < 0 or mask.max() > 255 or not np.array_equal(mask, np.round(mask)):
        raise ScanError(f"{path.name}: labels from {mask.min()} to {mask.max()} must be whole numbers of 0 to 255")
    return torch.from_numpy((mask[0] if dims == 2 else mask).astype(np.uint8))


def _complete(task: Task, seed: int) -> Task:
    """Every split a task lacks, cut by patient. A lone val split is the test: it was kept aside by someone else."""
    split, notes = task.split.copy(), list(task.notes)
    if (split == "").all():
        split[:] = "train"
        split = _cut(task, split, "test", seed)
        notes.append("no split given: a fifth of the patients held out by --split_seed")
    elif "test" not in split:
        if "val" not in split:
            split = _cut(task, split, "test", seed)
            notes.append("no held-out split given: a fifth of the training cases held out by --split_seed")
        else:
            split[split == "val"] = "test"
            notes.append("no test split given: the validation split is the test")
    if "val" not in split:
        split = _cut(task, split, "val", seed + 1)
        notes.append("learning rates are chosen on a fifth of the training cases, cut off by --split_seed")
    return replace(task, split=split, notes=tuple(notes))


def _cut(task: Task, split: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Move a fifth of the training cases, whole patients, about evenly over the classes, into a new split."""
    index = np.flatnonzero(split == "train")
    if len(index) < 2:
        raise UserError(
            f"task {task.name}: {len(index)} training case(s) cannot be split; give more, or a split column"
        )
    rng = np.random.default_rng((seed, 11))
    group = task.groups(index)
    order = rng.permutation(group.max() + 1)
    strata = np.array([int(task.targets[i]) if task.kind == "classes" else 0 for i in index])
    if task.kind == "regression" and len(index) >= 20:  # about evenly over the quarters of the range
        values = task.labels(index)[:, 0]
        strata = np.searchsorted(np.quantile(values, (0.25, 0.5, 0.75)), values)
    out = split.copy()
    moved = dict.fromkeys(np.unique(strata).tolist(), 0)
    for g in order:
        members = np.flatnonzero(group == g)
        stratum = int(strata[members[0]])
        wanted = max(1, round(_VAL_SHARE * int((strata == stratum).sum())))
        left = int((out[index][strata == stratum] == "train").sum())
        if moved[stratum] < wanted and left > len(members):
            out[index[members]] = name
            moved[stratum] += len(members)
    if not (out == name).any():
        raise UserError(f"task {task.name}: all cases are of one patient, nothing can be held out; give more patients")
    return out


def _check_patients(task: Task) -> None:
    if task.patients is None:
        return
    homes: dict[str, set[str]] = {}
    for patient, split in zip(task.patients, task.split.tolist(), strict=True):
        homes.setdefault(patient, set()).add(split)
    both = [p for p, splits in homes.items() if len(splits) > 1]
    if both:
        raise UserError(
            f"task {task.name}: {len(both)} patient(s) are in more than one split (row of the first: "
            f"{task.sources[task.patients.index(both[0])]}); put all cases of a patient into one"
        )


def _check_classes(task: Task) -> None:
    if task.kind == "regression":
        for split in _SPLITS:
            values = task.labels(task.where(split))
            if len(values) < 2 or values.min() == values.max():
                what = f"{len(values)} case(s)" if len(values) < 2 else f"the one number {values.min():g}"
                raise UserError(
                    f"task {task.name}: {task.names[0]} has {what} in the {split} split; two different ones are the "
                    "least; add cases, or (where no split is given) try another --split_seed"
                )
        return
    least = {"classes": 2, "labels": 1, "segmentation": 1}[task.kind]
    if len(task.names) < least:
        found = f"only class {task.names[0]}" if task.names else "only background in every mask"
        raise UserError(
            f"task {task.name}: {found}; give cases of at least {least} {'classes' if least > 1 else 'label'}"
        )
    if task.kind == "segmentation":
        return
    for split in _SPLITS:
        values = task.labels(task.where(split))
        for c, name in enumerate(task.names):
            if task.kind == "classes":
                ok, lacks = bool((values == c).any()), "no case"
            else:
                ok, lacks = bool((values[:, c] == 1).any() and (values[:, c] == 0).any()), "not both a 0 and a 1"
            if not ok:
                raise UserError(
                    f"task {task.name}: class {name} has {lacks} in the {split} split ({len(values)} cases); add "
                    "cases, leave the class out, or (where no split is given) try another --split_seed"
                )


def fraction(task: Task, share: float, seed: int) -> np.ndarray:
    """Training cases that keep their labels: `share` of each class (one class a case), else of all.

    Raises:
        UserError: a class would be left without a label.
    """
    index, rng = task.where("train"), np.random.default_rng((seed, 12))
    if task.kind in ("segmentation", "regression"):
        count, least = round(share * len(index)), 1 if task.kind == "segmentation" else 2
        if count < least:
            raise UserError(
                f"--fractions {share:g} of {len(index)} training scans is {'none' if count < 1 else 'one'}; use at "
                f"least {least / len(index):.2g}"
            )
        return np.sort(rng.permutation(index)[:count])
    values = task.labels(index)
    if task.kind == "labels":
        kept = rng.permutation(len(index))[: max(1, round(share * len(index)))]
        for c, name in enumerate(task.names):
            if not {0.0, 1.0} <= set(values[kept, c].tolist()):
                raise UserError(
                    f"--fractions {share:g} of {len(index)} training cases leaves label {name} without a 0 or a 1; "
                    "use a larger one"
                )
        return np.sort(index[kept])
    chosen = []
    for c, name in enumerate(task.names):
        members = index[values == c]
        count = round(share * len(members))
        if count < 1:
            raise UserError(
                f"--fractions {share:g} leaves class {name} ({len(members)} training cases) without a label; use at "
                f"least {math.ceil(500 / len(members)) / 1000:g}, or --shots"
            )
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def few_shots(task: Task, shots: int, seed: int) -> np.ndarray:
    """`shots` labelled training cases of each class."""
    if task.kind != "classes":
        raise UserError(f"--shots {shots}: task {task.name} is not one class a case; use --fractions", 2)
    index, rng = task.where("train"), np.random.default_rng((seed, 13))
    values, chosen = task.labels(index), []
    for c, name in enumerate(task.names):
        members = index[values == c]
        if len(members) < shots:
            raise UserError(f"--shots {shots}: class {name} has {len(members)} training cases; use at most that")
        chosen.append(rng.permutation(members)[:shots])
    return np.sort(np.concatenate(chosen))


def hashes_of(path: Path, progress: Callable[[Any], Any], channels: Sequence[str] = ()) -> set[str]:
    """Source hashes of pretraining data: the images of an .npz, every scan and picture below a folder, or the files of
    a table with the columns `channels`.

    Raises:
        UserError: there is nothing to hash.
    """
    if path.suffix == ".npz" and path.is_file():
        arrays = _open_npz(path)
        stacks = [v for n, v in arrays.items() if n == "images" or n == "train_images"]
        return {_array_hash(image) for stack in stacks for image in progress(stack)}
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        try:
            cases = [files for _, files in cases_of(path, channels, True) if not isinstance(files, ScanError)]
            files = [file for case in cases for file in case if file is not None and file.exists()]
            return {source_hash(sources_of(file)) for file in progress(files)}
        except ScanError as error:
            raise UserError(f"--pretraining {path}: {error}") from error
    if not path.is_dir():
        raise UserError(f"--pretraining {path}: no such folder, table or .npz", 2)
    found: list[Sequence[str | Path]] = [[p] for p in find_pictures(path)]
    try:  # images too, which have no place in a patient: pictures are there already, page by page
        scans = find_scans(path, images=True).scans
        found += [scan.files for scan in scans if not is_picture(scan.files[0])]
    except ScanError as error:
        if not found:
            raise UserError(f"--pretraining {path}: {error}") from error
    return {source_hash(files) for files in progress(found)}


def drop_leaks(
    task: Task, pretraining: set[str], keep: bool, flag: str = "--leaks keep"
) -> tuple[Task, list[str]]:  # fmt: skip
    """Held-out cases that the training cases or the pretraining index hold too: reported, and left out unless `keep`.

    flag: what keeps them on the command line; empty where nothing does.

    A task's own validation and training cases are expected in the pretraining index (without labels) and stay.
    """
    lines, out = [], task.split.copy()
    learned = [*task.where("train"), *task.where("val")]
    train = {task.hashes[i] for i in learned} | {part for i in learned if task.parts for part in task.parts[i]}
    for what, known in (("the task's training cases", train), ("the pretraining index", pretraining)):
        hits = [int(i) for i in task.where("test") if task.known_to(known, int(i))]
        if hits:
            named = ", ".join(task.sources[i] for i in hits[:_NAMED]) + (", ..." if len(hits) > _NAMED else "")
            way = f" ({flag} only reports them)" if flag else ""
            fate = f"kept ({flag})" if keep else f"left out of the test{way}"
            lines.append(
                f"LEAK: {len(hits)} of {len(task.where('test'))} held-out cases occur in {what} ({named}); {fate}"
            )
            out[hits] = "test" if keep else "leaked"
    result = replace(task, split=out)
    if not len(result.where("test")):
        raise UserError(
            f"task {task.name}: every held-out case has leaked ({lines[-1]}); hold other cases "
            "out, or fine-tune, which takes what pretraining has seen"
        )
    if not keep:
        _check_classes(result)
    return result, lines
