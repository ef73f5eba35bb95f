"""MedMNIST-format archives: `train_images`, `train_labels`, `val_*`, `test_*` in one `.npz`.

Get: medmnist.com (any of the 2D and 3D sets), or write your own with numpy.savez.

Quirks: arrays, not files: a record is an index into one of them; there are no patients, so records cannot be split
further; objects (pickles) in an archive are refused.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from medformer.data.datasets.joins import Records, reported
from medformer.data.datasets.layout import About
from medformer.data.geometry import ScanError
from medformer.data.pictures import grey_of
from medformer.data.records import Record, Split
from medformer.data.tables import ZIP_ERRORS
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume

ABOUT = About(
    name="MedMNIST",
    folders=("medmnist", "MedMNIST"),
    source="https://medmnist.com",
    layout="*.npz with train_images and train_labels",
)
_PARTS: dict[str, Split] = {"train": "train", "val": "valid", "test": "test"}


def recognise(folder: Path) -> bool:
    return any(_is_one(path) for path in folder.glob("*.npz"))


def _is_one(path: Path) -> bool:
    return _has(path, "train_images")


def _has(path: Path, array: str) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{array}.npy" in archive.namelist()
    except (*ZIP_ERRORS, ValueError):
        return False


def scan(root: str | Path) -> Records:
    """One record an image of each archive. Raises ScanError where there is none."""
    folder = ABOUT.folder(root, recognise)
    records, notes = [], []
    for path in sorted(p for p in folder.glob("*.npz") if _is_one(p)):
        for part, split in _PARTS.items():
            try:
                labels = load(path, f"{part}_labels")
            except ScanError as error:
                if _has(path, f"{part}_images"):
                    notes.append(f"the {part} part is left out: {error}")
                continue  # a part may be left out
            for i, label in enumerate(labels.reshape(len(labels), -1) if labels.size else ()):
                named = {f"label{k}" if label.size > 1 else "label": str(int(v)) for k, v in enumerate(label)}
                name = f"{path.stem}/{part}/{i}"
                records.append(
                    Record(
                        dataset="medmnist", patient=name, study=name, paths=(str(path),), modality="unknown",
                        split=split, labels=named, info={"array": f"{part}_images", "index": i},
                    )
                )  # fmt: skip
    return reported(ABOUT, records, [], notes)


@lru_cache(maxsize=6)
def load(path: Path, name: str) -> np.ndarray:
    """One array of an archive. Raises ScanError for objects, damage and more than memory is granted."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.file_size > MAX_VOLUME_BYTES or member.file_size > 1100 * member.compress_size + 2**20:
                raise ScanError(f"{path.name}: {name} declares {member.file_size:,} bytes; made up or too large")
            with archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False, max_header_size=10_000)
    except (*ZIP_ERRORS, ValueError, SyntaxError, TypeError, AttributeError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(f"{path.name}: no readable array {name!r} in it ({type(error).__name__})") from error
    if array.dtype.kind not in "iufb" or not array.ndim or not np.isfinite(array).all():
        raise ScanError(f"{path.name}: {name} is {array.dtype} of shape {array.shape}, must be finite numbers")
    array.setflags(write=False)  # shared by all who ask
    return array


def read(record: Record) -> Volume:
    """One image as (Z, Y, X); colour is kept only where its channels are equal."""
    path = Path(record.paths[0])
    images = load(path, record.info["array"])
    image = images[record.info["index"]]
    colour = image.ndim == 3 and image.shape[-1] == 3
    notes = ["no voxel size and no orientation in this format"]
    if colour:
        image, note = grey_of(image, "grey", path.name, "RGB")
        notes.append(note)
    image = image[..., 0] if image.ndim == 4 and image.shape[-1] == 1 else image
    if image.ndim not in {2, 3}:
        raise ScanError(f"{path.name}: images of shape {images.shape[1:]}, must be 2D or 3D")
    return Volume(
        voxels=np.ascontiguousarray(image if image.ndim == 3 else image[None]), affine=np.eye(4),
        modality=record.modality, units="arbitrary", notes=tuple(notes), source=str(path), geometry="none",
        provenance={"format": "MedMNIST npz", "files": 1, "tags": {}},
    )  # fmt: skip
