"""What the header of a DICOM file says of it: a slice or several of a scan, an image without a place, or neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medformer.data.geometry import ScanError

__all__ = ["Frame", "ImageFile", "NotAnImage", "SliceFile"]


class NotAnImage(ScanError):
    """A sound DICOM file that is no slice of a 3D scan: a report, a plan, a screen capture, a localizer."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice of a file: where it lies, and how stored values become measured ones."""

    path: str
    index: int
    """Its number in the file, from 0."""
    position: tuple[float, float, float]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    slope: float
    intercept: float
    split: dict[str, str]
    """What tells repeats of one position apart; see headers.SPLIT_TAGS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceFile:
    """The header of one file: one slice, the tiles of a mosaic, or the frames of an enhanced multi-frame image."""

    path: str
    series: tuple[Any, ...]
    """What all slices of a scan share exactly."""
    series_uid: str
    modality: str
    rows: int
    columns: int
    frames: tuple[Frame, ...]
    depth_mm: float | None
    depth_source: str
    hounsfield: bool
    notes: tuple[str, ...]
    tiles: tuple[int, int] | None = None
    """Tiles down and across of a mosaic or grid; None where the file is none."""
    problem: str | None = None
    """Why the pixels cannot be read; the file still counts as a slice, so that its series is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """The header of an image with no place in the patient: an X-ray, a mammogram, a tomosynthesis stack."""

    path: str
    modality: str
    rows: int
    columns: int
    frames: int
    spacing: tuple[float, float] | None
    """(row, column) in mm; None where the header has none."""
    depth_mm: float | None
    colour: str
    """The photometric interpretation."""
    laterality: str
    """"L", "R", "B" or "" where the header does not say."""
    view: str
    """"CC", "MLO", "PA", ... or ""."""
    orientation: tuple[str, ...]
    """PatientOrientation: where the rows and the columns run to."""
    notes: tuple[str, ...]
    problem: str | None = None
