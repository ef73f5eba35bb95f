"""The cases a scan is compared with: those that the checkpoint was trained on, by their embeddings."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from medformer.answers.results import case_names
from medformer.data import ScanError, Volume, find_scans, read_volume
from medformer.data.intensity import count_labels
from medformer.data.pictures import find_pictures, luma, unsuffixed
from medformer.data.tables import read_table

__all__ = ["CASES", "Case", "nearest", "read_cases"]

CASES = 200  # most that are compared with
NEAREST = 6
_CENTRED = 8  # cases from which on their mean is taken off
_THUMB = 72  # pixels
_ARRAY = re.compile(r"(.+\.npz)#(\w+)\[(\d+)\]$")  # one of an archive's arrays

Read = Callable[[], Volume]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Its embedding, of unit length, and a small picture."""

    name: str
    vector: np.ndarray
    picture: str
    label: str = ""
    """What it was taught as; empty where it had no label."""


class Embedder(Protocol):
    """What `read_cases` needs of a viewer."""

    @property
    def dims(self) -> int: ...
    def called(self, name: str) -> str: ...
    def embed(self, volume: Volume) -> np.ndarray: ...


def nearest(cases: Sequence[Case], vector: np.ndarray) -> list[dict[str, Any]]:
    """The most similar cases, JSON-ready: cosines, of eight cases or more after the cases' mean is taken off.

    What all scans share is most of an embedding: without that every cosine is nearly 1.
    """
    if not cases:
        return []
    all_of = np.stack([case.vector for case in cases])
    if len(cases) >= _CENTRED:
        middle = all_of.mean(0)
        all_of, vector = all_of - middle, vector - middle
        all_of = all_of / np.maximum(np.linalg.norm(all_of, axis=1, keepdims=True), 1e-12)
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    similar = all_of @ vector
    found = ((cases[i], float(similar[i])) for i in np.argsort(-similar)[:NEAREST])
    return [{"name": c.name, "similarity": s, "picture": c.picture, "label": c.label} for c, s in found]


def read_cases(
    viewer: Embedder, root: Path, limit: int, progress: Callable[[Any], Any], skipped: Collection[str] = ()
) -> list[Case]:
    """Embed up to `limit` cases below a folder, of a .csv with the column path, or of the train_images of an .npz.

    Without what the trainer skips, and those whose names are in `skipped`.
    """
    volumes = _listed(root) if root.suffix in (".csv", ".npz") else _below(root, viewer.dims)
    volumes = [each for each in volumes if viewer.called(each[0]) not in skipped]
    order = np.random.default_rng(0).permutation(len(volumes))[:limit]
    cases = []
    for name, label, read in progress([volumes[i] for i in order]):
        try:
            volume = read()
        except ScanError:
            continue
        if viewer.dims == 3 and count_labels(volume.voxels):
            continue
        picture = _thumbnail(volume.voxels)
        cases.append(Case(name=viewer.called(name), vector=viewer.embed(volume), picture=picture, label=label))
    return cases


def _listed(root: Path) -> list[tuple[str, str, Read]]:
    """Name, label and reader of each row, or of each training image of an archive."""
    if root.suffix == ".npz":
        with np.load(root, allow_pickle=False) as file:
            images = file["train_images"]
        return [(f"{root.stem} {i}", "", lambda image=image: _picture(image)) for i, image in enumerate(images)]
    rows = list(read_table(root, ["path"], optional=["label"]))
    files, arrays, found = [row["path"] for row in rows], {}, []
    for row, name in zip(rows, case_names(files), strict=True):
        read: Read = lambda path=row["path"]: read_volume(path, colour="grey")  # noqa: E731
        if part := _ARRAY.match(row["path"]):
            archive, key, number = part.groups()
            if (archive, key) not in arrays:
                with np.load(archive, allow_pickle=False) as file:
                    arrays[archive, key] = file[key]
            read = lambda image=arrays[archive, key][int(number)]: _picture(image)  # noqa: E731
            name = f"{Path(archive).stem} {number}"
        found.append((name, row.get("label") or "", read))
    return found


def _below(root: Path, dims: int) -> list[tuple[str, str, Read]]:
    if dims == 3:
        return [(scan.name, "", scan.read) for scan in find_scans(root).scans]
    return [
        (unsuffixed(p).name, "", lambda path=p: read_volume(path, colour="grey")) for p in find_pictures(root)
    ]  # fmt: skip


def _picture(image: np.ndarray) -> Volume:
    grey = luma(image) if image.shape[-1] == 3 else image
    return Volume(
        voxels=np.ascontiguousarray(grey[None] if grey.ndim == 2 else grey, np.float32), affine=np.eye(4),
        modality="unknown", units="arbitrary", notes=(), source="picture",
    )  # fmt: skip


def _thumbnail(voxels: np.ndarray) -> str:
    """A PNG data address of the middle axial slice, the patient's right on the left."""
    plane = voxels[len(voxels) // 2].astype(np.float32)
    if len(voxels) > 1:
        plane = plane[::-1, ::-1]
    low, high = np.percentile(plane, (1, 99.5))
    picture = Image.fromarray(np.clip(255 * (plane - low) / max(high - low, 1e-6), 0, 255).astype(np.uint8))
    picture.thumbnail((_THUMB, _THUMB))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
