"""What formats that name no modality hold: guessed from the values, and one decision for the scans of a folder."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import numpy as np

from medformer.data.volumes import Volume

__all__ = ["MODALITY_FILE", "Decision", "by_values", "could_be_hu", "decide", "guess", "guessed", "looks_like_hu"]

# A text file next to scans (or in a folder above them) whose first word says what they are.
MODALITY_FILE = "modality.txt"
_LOOKS = "taken as CT since the values look like HU"
# So many scans make a folder's vote; with fewer the folder above is asked.
_QUORUM = 5
_SAMPLES = 500_000


def guess(
    voxels: np.ndarray, modality: str | None, why: str
) -> tuple[str, Literal["HU", "arbitrary"], tuple[str, ...]]:
    """Modality, units and a note, from what is known, else from the values. why: what names none, for the note."""
    if modality is not None and modality != "unknown":
        return modality, "HU" if modality == "CT" else "arbitrary", ()
    if by_values(voxels) == "CT":
        return "CT", "HU", (f"{why}: {_LOOKS}",)
    return "unknown", "arbitrary", ()


def by_values(voxels: np.ndarray) -> str:
    """CT or unknown."""
    return "CT" if looks_like_hu(voxels) else "unknown"


def guessed(volume: Volume) -> bool:
    """Whether nothing but the values said what the scan is."""
    return volume.modality == "unknown" or any(note.endswith(_LOOKS) for note in volume.notes)


def _body(voxels: np.ndarray) -> np.ndarray:
    """A sample of the values without the one value that pads; empty where that is nearly all."""
    sample = voxels.ravel()[:: max(1, voxels.size // _SAMPLES)].astype(np.float64)
    low = float(sample.min())
    body = sample[sample > low] if low < -1100 else sample
    return body if body.size >= 0.05 * sample.size else body[:0]


def looks_like_hu(voxels: np.ndarray) -> bool:
    """Whether values look like Hounsfield units: air near -1000, next to nothing below but one padding value.

    Phase images and signed maps fail on the values below -1100, ordinary MR on the missing air.
    """
    body = _body(voxels)
    if not body.size or body.max() > 32767:
        return False
    air = ((body >= -1100) & (body <= -700)).mean()
    soft = ((body >= -200) & (body <= 300)).mean()
    return bool((body < -1100).mean() < 0.01 and air > 0.005 and soft > 0.05 and np.percentile(body, 99) <= 4000)


def could_be_hu(voxels: np.ndarray) -> bool:
    """Whether nothing speaks against Hounsfield units: the range fits, and some values lie below water's 0.

    A small cube of soft tissue has no air; magnitudes and counts have nothing below 0.
    """
    body = _body(voxels)
    if not body.size or body.max() > 32767:
        return False
    return bool((body < -1100).mean() < 0.01 and np.percentile(body, 99) <= 4000 and (body < 0).any())


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the scans of a folder are taken as."""

    modality: Mapping[str, str]
    """Name of each scan whose own values say otherwise, to what it is taken as."""
    lines: tuple[str, ...]
    """The vote of each folder that was not of one mind, with the minority named."""


def decide(
    scans: Mapping[str, tuple[str, bool]],
    *,
    flag: str = "--data.modality",
    called: Callable[[str], str] = str,
) -> Decision:
    """One decision a folder: most scans look like CT in HU, so the others are too, or the other way round.

    scans: name below the root, to ("CT" or "unknown" by its own values, whether it could be CT at all). A folder with
    fewer than 5 votes with the folder above it; a root with fewer has no vote. What cannot be CT
    is left as it is, and named.

    flag: what else says it on the command line. called: what the lines call a scan, or a folder.
    """
    changed: dict[str, str] = {}
    lines = []
    for folder, names in _folders(scans).items():
        count = Counter(scans[n][0] for n in names)
        if len(count) < 2:
            continue
        winner = "CT" if 2 * count["CT"] > len(names) else "unknown"
        other = sorted(n for n in names if scans[n][0] != winner)
        moved = [n for n in other if winner != "CT" or scans[n][1]]
        changed |= dict.fromkeys(moved, winner)
        shown = ", ".join(map(called, other[:5])) + (", ..." if len(other) > 5 else "")
        what = "taken as CT in HU" if winner == "CT" else "scaled by their own values"
        stay = len(other) - len(moved)
        left = f"; {stay} of them cannot be (nothing below 0, or out of range) and keep their own scale" if stay else ""
        where = called(folder) if folder else "the folder"
        lines.append(
            f"{where}: {count['CT']} of {len(names)} scans without a modality look like CT: all are {what}, these too: "
            f"{shown}{left}; {flag + ' or ' if flag else ''}a {MODALITY_FILE} there says otherwise"
        )
    return Decision(modality=changed, lines=tuple(lines))


def _folders(scans: Mapping[str, object]) -> dict[str, list[str]]:
    """Folder to the scans that vote in it."""
    open_: dict[str, list[str]] = defaultdict(list)
    for name in sorted(scans):
        open_[os.path.dirname(name)].append(name)
    settled: dict[str, list[str]] = {}
    # Deepest first: a folder without a quorum hands its scans to the one above.
    while open_:
        folder = max(open_, key=lambda f: (len(PurePath(f).parts), f))
        names = open_.pop(folder)
        if len(names) >= _QUORUM:
            settled[folder] = names
        elif folder:  # at the root each is left to its own values
            open_[os.path.dirname(folder)] += names
    return settled
