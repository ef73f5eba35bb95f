"""One case as a network takes it: a scan, or several sequences of one patient on one grid.

A sequence that is missing is NaN in all its voxels: nothing else is, so the network that may lack some finds which.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.intensity import normalise
from medformer.data.pictures import is_picture, read_picture
from medformer.data.resample import onto
from medformer.data.scans import read_volume
from medformer.data.store.entries import taken_as
from medformer.data.volumes import Volume

__all__ = ["Case", "WrongAxes", "check_axes", "first", "network_input", "read_case", "read_one"]

Case = tuple[Volume | None, ...]


class WrongAxes(ScanError):
    """An image where the network takes scans, or a scan where it takes images."""


def read_one(path: Path, dims: int, *, canonical: bool = True, modality: str | None = None) -> Volume:
    """A scan, or a picture as a scan of one slice without place. Raises ScanError.

    modality: what it is where its file does not say it; "unknown" takes values that look like HU for no unit.
    """
    if is_picture(path):
        voxels, notes = read_picture(path)
        volume = Volume(
            voxels=voxels[None], affine=np.eye(4), modality="unknown", units="arbitrary", notes=tuple(notes),
            source=str(path), geometry="none",
        )  # fmt: skip
    else:
        volume = taken_as(read_volume(path, canonical=canonical, modality=modality), modality)
    check_axes(volume, dims, picture=is_picture(path))
    return volume


def check_axes(volume: Volume, dims: int, picture: bool = False) -> None:
    """Raises WrongAxes for what the network has not the axes for."""
    found = 2 if picture or (dims == 2 and volume.shape[0] == 1) else 3
    if found != dims:
        name = Path(volume.source).name
        raise WrongAxes(f"{name} has {found} axes, but the checkpoint takes {dims}; use one trained in {found}D")


def read_case(
    files: Sequence[Path | None], dims: int, *, canonical: bool = True, modalities: Sequence[str | None] = ()
) -> Case:
    """A volume for each file, on the grid of the first there is; None for None. modalities: as for `read_one`.

    Raises ScanError.
    """
    words = modalities or [None] * len(files)
    volumes = [
        None if path is None else read_one(path, dims, canonical=canonical, modality=word)
        for path, word in zip(files, words, strict=True)
    ]
    grid = first(volumes)
    return tuple(None if volume is None else onto(volume, grid) for volume in volumes)


def first(case: Sequence[Volume | None]) -> Volume:
    """The first volume there is, whose grid is the case's."""
    return next(volume for volume in case if volume is not None)


def network_input(case: Sequence[Volume | None], dims: int) -> np.ndarray:
    """float32 (C, *size), normalised as in pretraining; NaN for a sequence that is missing."""
    grid = first(case)
    planes = [np.full(grid.shape, np.nan, np.float32) if volume is None else normalise(volume) for volume in case]
    return np.stack([plane[0] if dims == 2 else plane for plane in planes])
