"""Downstream tasks: labelled cases, who is in which split, which labels a fraction keeps, and what has leaked.

Two forms, told apart by their ending. `.npz` in MedMNIST's layout: `train_images` [n, Y, X] or [n, Z, Y, X],
`train_labels` [n, 1] (one class a case) or [n, L] (several labels: 0, 1, and -1 or NaN for unknown), optionally
`val_*`, `test_*`, `train_patients` and `class_names`. `.csv`: columns `path` (a scan, beside the table), optionally
`patient` and `split` (train, val, test), and either `label` (one class), `mask` (a label map on the scan's grid), or
one column a label (0, 1, empty for unknown).
"""

from __future__ import annotations

import csv
import hashlib
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medformer.data import ScanError, Volume, find_scans, normalise, read_volume
from runs import UserError

__all__ = ["Task", "drop_leaks", "few_shots", "fraction", "hashes_of", "read_task", "resize", "source_hash"]

_SPLITS = ("train", "val", "test")
_SPLIT = "U6"  # "leaked" is the longest
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_CODE = {"path", "patient", "split", "label", "mask"}
_VAL_SHARE = 0.2  # of the training cases, where the task names no validation split
_NAMED = 3  # examples in an error


@dataclass(frozen=True, kw_only=True)
class Task:
    """Labelled cases in memory, normalised as the trainer does it."""

    name: str
    kind: Literal["classes", "labels", "segmentation"]
    """One class a case; several labels a case; or one class a voxel."""
    dims: int
    """Spatial axes of an image."""
    names: tuple[str, ...]
    """Classes or labels; of a segmentation without the background."""
    images: list[Tensor]
    """float16 (1, *size) each."""
    targets: list[Tensor]
    """int64 (), float32 (L,) with NaN for unknown, or uint8 of the image's size with 0 for background."""
    split: np.ndarray
    """'train', 'val' or 'test' for each case."""
    patients: tuple[str, ...] | None
    sources: tuple[str, ...]
    """Where each case came from, to name it by."""
    hashes: tuple[str, ...]
    """Source hash of each case."""
    notes: tuple[str, ...] = ()

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


def read_task(path: Path, dims: int, size: tuple[int, ...] | None, seed: int, progress: Callable[[Any], Any]) -> Task:
    """Read, normalise and split a task; `size` resizes every image (but not of a segmentation).

    Raises:
        UserError: in one line, for whatever is wrong with the table, a scan, a split or the dimension.
    """
    if not path.is_file():
        raise UserError(f"--task {path}: no such file; give an .npz (MedMNIST's layout) or a .csv of scans", 2)
    if path.suffix == ".npz":
        task = _read_npz(path, dims, progress)
    elif path.suffix == ".csv":
        task = _read_csv(path, dims, progress)
    else:
        raise UserError(f"--task {path}: must end in .npz or .csv", 2)
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


def resize(image: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image
    x = image[None].float()
    for _ in range(8):  # halve first: interpolation alone would skip voxels
        halve = [n >= 2 * s for n, s in zip(x.shape[2:], size, strict=True)]
        if not any(halve):
            break
        pool = F.avg_pool3d if len(size) == 3 else F.avg_pool2d
        x = pool(x, [2 if h else 1 for h in halve])
    mode = "trilinear" if len(size) == 3 else "bilinear"
    return F.interpolate(x, size=size, mode=mode, align_corners=False)[0].half()


def _normal(voxels: np.ndarray, source: str) -> Tensor:
    """As pretraining sees it: (1, Y, X) or (1, Z, Y, X) float16."""
    flat = voxels.ndim == 2
    volume = Volume(
        voxels=voxels[None] if flat else voxels, affine=np.eye(4), modality="unknown", units="arbitrary", notes=(),
        source=source,
    )  # fmt: skip
    out = normalise(volume)
    return torch.from_numpy(out[0] if flat else out)[None].half()


def _array_hash(voxels: np.ndarray) -> str:
    head = f"{voxels.shape}{voxels.dtype.str}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(voxels).tobytes()).hexdigest()


def source_hash(files: Iterable[str | Path]) -> str:
    """One hash of a scan's files, whatever their names and order."""
    each = []
    for file in files:
        with open(file, "rb") as opened:
            each.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return each[0] if len(each) == 1 else hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--task {path}: not an .npz of plain arrays ({error})") from error


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
    images, targets, split, patients, sources, hashes = [], [], [], [], [], []
    lists = [arrays[f"{s}_labels"].reshape(len(arrays[f"{s}_images"]), -1) for s in present]
    several = lists[0].shape[1] > 1
    names = arrays.get("class_names")
    count = lists[0].shape[1] if several else int(max(labels.max() for labels in lists)) + 1
    if names is not None and len(names) != count:
        raise UserError(f"--task {path}: {len(names)} class_names for {count} classes or labels")
    for part, labels in zip(present, lists, strict=True):
        stack = arrays[f"{part}_images"]
        ids = arrays.get(f"{part}_patients")
        for i in progress(range(len(stack))):
            voxels = np.round(stack[i].mean(-1)).astype(stack.dtype) if colour else stack[i]
            source = f"{path.name} {part}[{i}]"
            try:
                image = _normal(voxels, source)
            except ScanError as error:
                raise UserError(f"--task {path}: {error}") from error
            images.append(image)
            targets.append(_known(labels[i].astype(np.float32)) if several else torch.tensor(int(labels[i, 0])))
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
    )  # fmt: skip


def _known(labels: np.ndarray) -> Tensor:
    """0, 1, and NaN for everything below 0."""
    return torch.from_numpy(np.where(labels < 0, np.nan, labels).astype(np.float32))


def _read_csv(path: Path, dims: int, progress: Callable[[Any], Any]) -> Task:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or "path" not in rows[0]:
        raise UserError(f"--task {path}: needs a header with the column path and at least one row")
    columns = [c for c in rows[0] if c is not None]
    others = [c for c in columns if c not in _CODE]
    ways = [("mask" in columns), ("label" in columns), bool(others)]
    if sum(ways) != 1:
        raise UserError(
            f"--task {path}: columns {', '.join(columns)}; give exactly one of label, mask, or one column for each "
            "label"
        )
    kind: Any = ("segmentation", "classes", "labels")[ways.index(True)]
    classes = sorted({row["label"] for row in rows}) if kind == "classes" else others
    if kind == "classes" and "" in classes:
        empty = next(i for i, row in enumerate(rows) if row["label"] == "")
        raise UserError(f"--task {path}: row {empty + 2} has no label; fill it in or remove the row")
    images, targets, hashes, highest = [], [], [], 0
    for number, row in enumerate(progress(rows)):
        source = path.parent / row["path"]
        try:
            voxels, image = _read_image(source, dims)
            if kind == "segmentation":
                target = _read_mask(path.parent / row["mask"], voxels, source)
                highest = max(highest, int(target.max()))
            elif kind == "classes":
                target = torch.tensor(classes.index(row["label"]))
            else:
                target = _known(np.array([float(row[c]) if row[c].strip() else -1 for c in others], np.float32))
        except ScanError as error:
            raise UserError(f"--task {path}: row {number + 2}: {error}") from error
        except ValueError as error:
            raise UserError(f"--task {path}: row {number + 2}: a label is no number ({error})") from error
        images.append(image)
        targets.append(target)
        # Of a folder only the slices, as `hashes_of` takes them; reading it said that it holds one scan.
        files: Sequence[str | Path] = find_scans(source).scans[0].files if source.is_dir() else [source]
        hashes.append(source_hash(files))
    split = np.array([row.get("split") or "" for row in rows], "U32")
    wrong = sorted(set(split.tolist()) - {*_SPLITS, ""})
    if wrong or ("" in split and (split != "").any()):
        shown = wrong[0] if wrong else ""
        raise UserError(
            f"--task {path}: split {shown!r} must be train, val or test in every row, or no row may have one"
        )
    if kind == "segmentation":
        classes = [str(c) for c in range(1, highest + 1)]
    return Task(
        name=path.stem, kind=kind, dims=dims, names=tuple(classes), images=images, targets=targets,
        split=split.astype(_SPLIT),
        patients=tuple(row["patient"] for row in rows) if "patient" in columns else None,
        sources=tuple(row["path"] for row in rows), hashes=tuple(hashes),
    )  # fmt: skip


def _read_image(source: Path, dims: int) -> tuple[np.ndarray, Tensor]:
    if source.suffix.lower() in _IMAGES:
        from PIL import Image

        try:
            with Image.open(source) as opened:
                voxels = np.asarray(opened.convert("L"))
        except OSError as error:
            raise ScanError(f"{source.name}: cannot be read as an image ({error})") from error
        found, image = 2, _normal(voxels, source.name)
    else:
        volume = read_volume(source)
        voxels, found = volume.voxels, 3
        image = torch.from_numpy(normalise(volume))[None].half()
        if dims == 2 and voxels.shape[0] == 1:
            return voxels[0], image[:, 0]
    if found != dims:
        raise UserError(
            f"--task: {source.name} has {found} axes, but the checkpoint takes {dims}; use one trained in {found}D", 2
        )
    return voxels, image


def _read_mask(path: Path, voxels: np.ndarray, source: Path) -> Tensor:
    if path.suffix.lower() in _IMAGES:
        from PIL import Image

        with Image.open(path) as opened:
            mask = np.asarray(opened)
    else:
        mask = read_volume(path).voxels
        mask = mask[0] if voxels.ndim == 2 else mask
    if mask.shape != voxels.shape:
        raise ScanError(f"{path.name}: mask of {mask.shape} voxels, {source.name} has {voxels.shape}")
    if mask.min() < 0 or mask.max() > 255 or not np.array_equal(mask, np.round(mask)):
        raise ScanError(f"{path.name}: labels from {mask.min()} to {mask.max()} must be whole numbers of 0 to 255")
    return torch.from_numpy(mask.astype(np.uint8))


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
    if task.kind == "segmentation":
        count = round(share * len(index))
        if count < 1:
            raise UserError(
                f"--fractions {share:g} of {len(index)} training scans is none; use at least {1 / len(index):.2g}"
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


def hashes_of(path: Path, progress: Callable[[Any], Any]) -> set[str]:
    """Source hashes of pretraining data: the images of an .npz, or every scan and picture below a folder.

    Raises:
        UserError: there is nothing to hash.
    """
    if path.suffix == ".npz" and path.is_file():
        arrays = _open_npz(path)
        stacks = [v for n, v in arrays.items() if n == "images" or n == "train_images"]
        return {_array_hash(image) for stack in stacks for image in progress(stack)}
    if not path.is_dir():
        raise UserError(f"--pretraining {path}: no such folder or .npz", 2)
    found: list[Sequence[str | Path]] = [[p] for p in sorted(path.rglob("*")) if p.suffix.lower() in _IMAGES]
    try:
        found += [scan.files for scan in find_scans(path).scans]
    except ScanError as error:
        if not found:
            raise UserError(f"--pretraining {path}: {error}") from error
    return {source_hash(files) for files in progress(found)}


def drop_leaks(task: Task, pretraining: set[str], keep: bool) -> tuple[Task, list[str]]:
    """Held-out cases that the training cases or the pretraining index hold too: reported, and left out unless `keep`.

    A task's own validation and training cases are expected in the pretraining index (without labels) and stay.
    """
    lines, out = [], task.split.copy()
    train = {task.hashes[i] for i in task.where("train")} | {task.hashes[i] for i in task.where("val")}
    for what, known in (("the task's training cases", train), ("the pretraining index", pretraining)):
        hits = [int(i) for i in task.where("test") if task.hashes[i] in known]
        if hits:
            named = ", ".join(task.sources[i] for i in hits[:_NAMED]) + (", ..." if len(hits) > _NAMED else "")
            fate = "kept (--leaks keep)" if keep else "left out of the test"
            lines.append(
                f"LEAK: {len(hits)} of {len(task.where('test'))} held-out cases occur in {what} ({named}); {fate}"
            )
            out[hits] = "test" if keep else "leaked"
    result = replace(task, split=out)
    if not len(result.where("test")):
        raise UserError(f"task {task.name}: every held-out case has leaked ({lines[-1]}); hold other cases out")
    if not keep:
        _check_classes(result)
    return result, lines
