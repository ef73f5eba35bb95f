"""One scan under several UIDs: stacks that together would make a regular one are joined, or said to be parts of it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from medformer.data.dicom.records import Frame, SliceFile
from medformer.data.geometry import ScanError, SliceStack, stack_slices

__all__ = ["Series", "join_parts"]

# Directions and pixel sizes of parts of one scan agree to this; each has been split by less.
_ALIKE = 0.02


@dataclass(frozen=True)
class Series:
    """Slices that form one regular stack."""

    files: tuple[SliceFile, ...]
    frames: tuple[Frame, ...]
    stack: SliceStack
    notes: tuple[str, ...]
    repeat: str = ""
    """Which of several stacks at one place it is, e.g. "EchoTime 4.6"; empty for a lone stack."""
    doubts: tuple[str, ...] = ()
    """What only decoding can settle."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.stack.groups), self.files[0].rows, self.files[0].columns

    @property
    def folder(self) -> str:
        return os.path.dirname(self.files[0].path)


def join_parts(series: list[Series], stack: Callable[[tuple[SliceFile, ...], list[Frame]], Series]) -> list[Series]:
    """Join single slices of one study that each have a series of their own and make a stack; note other parts.

    stack: makes a Series of files and frames.
    """
    notes: dict[int, list[str]] = defaultdict(list)
    joined: dict[int, Series] = {}
    gone: set[int] = set()
    for by_study in (True, False):
        buckets: dict[tuple, list[int]] = defaultdict(list)
        for i, part in enumerate(series):
            first = part.files[0]
            place = first.series[0] if by_study else part.folder
            if place and not part.repeat:
                buckets[place, first.modality, *part.shape[1:]].append(i)
        for members in buckets.values():
            for alike in _alike(series, members):
                alike = [i for i in alike if i not in gone and i not in joined and not notes[i]]
                single = [i for i in alike if len(series[i].frames) == 1]
                if len(alike) > 1 and _one_stack([f for i in alike for f in series[i].frames]):
                    if by_study and len(single) == len(alike) > 2 and _one_frame_of_reference(series, alike):
                        whole = _join([series[i] for i in alike], stack)
                        joined[alike[0]], gone = whole, gone | set(alike[1:])
                        continue
                    for i in alike:
                        notes[i].append(
                            f"one of {len(alike)} parts that together would make one regular stack, with different UIDs"
                        )
                elif len(single) > 2 and not by_study:
                    for i in single:
                        notes[i].append(
                            f"one of {len(single)} scans of one slice in one folder, each with its own UIDs: parts of "
                            "one scan?"
                        )
    return [
        joined.get(i, replace(part, notes=(*part.notes, *notes[i])) if notes[i] else part)
        for i, part in enumerate(series)
        if i not in gone
    ]


def _join(parts: list[Series], stack: Callable[[tuple[SliceFile, ...], list[Frame]], Series]) -> Series:
    files = tuple(f for part in parts for f in part.files)
    whole = stack(files, [f for part in parts for f in part.frames])
    note = f"{len(parts)} slices of one study, each with its own SeriesInstanceUID, make one stack: joined"
    return replace(whole, notes=(note, *whole.notes))


def _one_frame_of_reference(series: list[Series], members: list[int]) -> bool:
    return len({f.split.get("FrameOfReferenceUID", "") for i in members for f in series[i].frames}) == 1


def _alike(series: list[Series], members: list[int]) -> list[list[int]]:
    """Members whose slices are parallel and whose pixels are of one size."""
    groups: list[tuple[np.ndarray, list[int]]] = []
    for i in members:
        frame = series[i].frames[0]
        here = np.array([*frame.orientation, *frame.spacing])
        found = next((g for at, g in groups if np.abs(at - here).max() <= _ALIKE), None)
        if found is None:
            groups.append((here, [i]))
        else:
            found.append(i)
    return [group for _, group in groups]


def _one_stack(frames: list[Frame]) -> bool:
    """Whether the slices make one regular stack of three and more, no place twice."""
    if len(frames) < 3:
        return False
    positions, orientation = np.array([f.position for f in frames]), np.mean([f.orientation for f in frames], axis=0)
    spacing = np.mean([f.spacing for f in frames], axis=0)
    gaps = np.diff(np.sort(positions @ np.cross(orientation[:3], orientation[3:])))
    if gaps.min() <= 0.02 * spacing.min():
        return False
    try:
        stack_slices(positions, orientation, (float(spacing[0]), float(spacing[1])))
    except ScanError:
        return False
    return True
