"""One case as a network takes it: a scan, or several sequences of one patient on one grid.

A sequence that is missing is NaN in all its voxels: nothing else is, so the network that may lack some finds which.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.intensity import count_labels, normalise
from medformer.data.labels import read_cases
from medformer.data.modality import could_be_hu, decide, guessed
from medformer.data.pictures import is_picture, read_picture
from medformer.data.resample import onto
from medformer.data.scans import find_scans, read_volume
from medformer.data.sequences import CaseFiles, cases_below, in_folders
from medformer.data.store.entries import taken_as
from medformer.data.volumes import Volume
from medformer.data.walking import Said

__all__ = [
    "Case", "Looks", "Vote", "WrongAxes", "cases_of", "check_axes", "first", "network_input", "read_case", "read_one",
    "sources_of",
]  # fmt: skip

Case = tuple[Volume | None, ...]


def cases_of(root: Path, channels: Sequence[str], missing: bool) -> list[tuple[str, CaseFiles | ScanError]]:
    """Every case of a folder, or of a table (.csv, .tsv) whose columns hold the files: its name, and its files or what
    is wrong with it. Raises ScanError where there is none at all."""
    if not root.exists():
        raise ScanError(f"{root}: no such folder or table")
    if root.is_file() and root.suffix.lower() not in (".csv", ".tsv"):
        raise ScanError(f"{root}: with --channels it must be a folder of cases, or a .csv with the columns of files")
    if root.is_file():
        return read_cases(root, channels, missing)
    found = cases_below(root, in_folders(channels), missing)
    files = found[0][1]
    if missing and len(found) == 1 and not isinstance(files, ScanError):
        tops = {path.relative_to(root).parts[0] for path in files if path is not None and path.parent != root}
        if len(tops) > 1:  # several patients who lack some, or one with a folder for each sequence
            raise ScanError(
                f"{root}: the files lie in {', '.join(sorted(tops)[:3])}: parts of one case, or cases that lack "
                "sequences? put each case into a folder of its own, or list them in a .csv"
            )
    return found


def sources_of(file: Path) -> list[str]:
    """The files that are read of a scan: of a folder its slices alone. Raises ScanError."""
    return list(find_scans(file, workers=0).scans[0].files) if file.is_dir() else [str(file)]


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
    """Raises WrongAxes for what the network has not the axes for: one slice is an image, and for 3D where it has no
    place in a patient (an X-ray)."""
    flat = volume.shape[0] == 1 and (dims == 2 or volume.geometry != "patient")
    found = 2 if picture or flat else 3
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


class Looks(NamedTuple):
    """What a scan is whose files do not say it, by its values alone."""

    modality: str
    could_be_hu: bool
    labels: int

    @classmethod
    def of(cls, volume: Volume | None) -> Looks | None:
        """None where its file says what it is, and where there is no scan."""
        if volume is None or not guessed(volume) or is_picture(Path(volume.source)):
            return None
        return cls(volume.modality, could_be_hu(volume.voxels), count_labels(volume.voxels))


class Vote:
    """What scans are that do not say it: as a modality.txt says, else as most of their folder look; each channel for
    itself."""

    def __init__(self, root: Path, channels: int) -> None:
        self.root, self.said, self.lines = root, Said(str(root)), ()
        self.voters: list[dict[str, tuple[str, bool]]] = [{} for _ in range(channels)]
        self.cases: list[dict[str, int]] = [{} for _ in range(channels)]
        self.words: dict[int, list[str | None]] = {}
        """Of each case what its channels are read as; None: as they say themselves."""

    def hear(self, i: int, files: CaseFiles, looks: Sequence[Looks | None]) -> list[str | None] | None:
        """What a modality.txt says of the case's files; None where there is none for them."""
        words: list[str | None] = [None] * len(files)
        for c, (file, seen) in enumerate(zip(files, looks, strict=True)):
            if file is None or seen is None:
                continue
            if (word := self.said.of(str(file.parent))) is not None:
                words[c] = word
            elif not seen.labels:
                place = os.path.relpath(file, self.root)
                self.cases[c][place] = i
                self.voters[c][place] = (seen.modality, seen.could_be_hu)
        self.words[i] = words
        return words if any(words) else None

    def count(self, flag: str = "") -> list[int]:
        """Cases that the votes change. flag: what else says it on the command line."""
        changed = []
        for voters, cases, c in zip(self.voters, self.cases, range(len(self.cases)), strict=True):
            vote = decide(voters, flag=flag)
            self.lines += tuple(vote.lines)
            for place, modality in vote.modality.items():
                self.words[cases[place]][c] = modality
                changed.append(cases[place])
        return sorted({*changed})
