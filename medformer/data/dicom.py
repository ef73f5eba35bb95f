"""Reading DICOM headers: one record a file, or the reason why not.

Geometry is left to geometry.py. Only ImagePositionPatient, ImageOrientationPatient and PixelSpacing place a
slice; InstanceNumber, SliceLocation, SliceThickness and file names never do. Names and identifiers of patients
are neither kept nor shown. Source: DICOM PS3.3 and PS3.5 (2024), sections named where they are used.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom import config, filereader
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medformer.data.geometry import ScanError
from medformer.data.volumes import MAX_VOLUME_BYTES

__all__ = [
    "NATIVE",
    "PARSE_ERRORS",
    "SPLIT_TAGS",
    "NotAnImage",
    "SliceFile",
    "check_syntax",
    "probe_dicom",
    "quiet",
    "sniff_dicom",
    "syntax_of",
]

_DEFLATED = {str(DeflatedExplicitVRLittleEndian), "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
NATIVE = {str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian), str(ExplicitVRBigEndian)}
_NOT_IMAGES = {"SR", "KO", "PR", "RTSTRUCT", "RTPLAN", "RTRECORD", "RTDOSE", "SEG", "REG", "RWV", "FID", "DOC", "ECG"}
_NOT_IMAGES |= {"AU", "PLAN", "M3D", "OSS", "TEXTUREMAP", "SMR", "HD", "EPS", "RESP"}
_SCANNERS = {"CT", "MR", "PT", "NM", "US"}
_DIRECTORY = "1.2.840.10008.1.3.10"
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MAX_FRAME_VOXELS = 2**26
# Tags that tell repeats of one position apart, in the order they are tried.
SPLIT_TAGS = (
    "AcquisitionNumber",
    "EchoNumbers",
    "EchoTime",
    "DiffusionBValue",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "AcquisitionTime",
)
# What pydicom raises on a damaged data set (found by cutting and flipping bytes of real files).
PARSE_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    RecursionError,
    OverflowError,
    MemoryError,
    struct.error,
)


class NotAnImage(ScanError):
    """A sound DICOM file that is no slice of a 3D scan: a report, a plan, a screen capture, a localizer."""


@dataclass(frozen=True, kw_only=True)
class SliceFile:
    """The header of one file: one slice, or the frames of an enhanced multi-frame image."""

    path: str
    series: tuple[Any, ...]
    """What all slices of a scan share exactly."""
    series_uid: str
    modality: str
    rows: int
    columns: int
    positions: tuple[tuple[float, float, float], ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, float]
    depth_mm: float | None
    depth_source: str
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    hounsfield: bool
    notes: tuple[str, ...]
    split: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    """Why the pixels cannot be read; the file still counts as a slice, so that its series is refused."""


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns of harmless deviations from the standard in most real files."""
    level = config.logger.level
    config.logger.setLevel(100)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.logger.setLevel(level)


def sniff_dicom(head: bytes) -> bool:
    """Whether the first 352 bytes start a DICOM file, with or without preamble."""
    if head[128:132] == b"DICM":
        return True
    # No preamble: group 2 or 8, an element below 0x0100, then a known VR or a short length.
    if len(head) < 16 or head[:2] not in {b"\x02\x00", b"\x08\x00"} or head[3] != 0:
        return False
    return head[4:6] in {b"UL", b"OB", b"UI", b"CS", b"DA", b"TM", b"SH", b"LO"} or head[6:8] == b"\0\0"


def probe_dicom(path: str) -> SliceFile:
    """The header of one file. NotAnImage or ScanError say why it is no slice."""
    name = os.path.basename(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file, quiet():
        check_syntax(file, name)
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            end = file.tell()
            return _describe(header, path, _pixel_problem(header, file, end, size, name))
        except ScanError:
            raise
        except PARSE_ERRORS as error:
            raise ScanError(f"{name}: DICOM header is damaged ({type(error).__name__}); copy the file again") from error


def check_syntax(file: BinaryIO, name: str) -> None:
    """Refuse deflated files before pydicom inflates them without bound; leaves the file at its start."""
    file.seek(0)
    try:
        filereader.read_preamble(file, force=True)
        meta = filereader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        syntax = str(meta.get("TransferSyntaxUID") or "")
    except PARSE_ERRORS as error:
        raise ScanError(f"{name}: DICOM header is damaged ({type(error).__name__}); copy the file again") from error
    finally:
        file.seek(0)
    if syntax in _DEFLATED:
        raise ScanError(
            f"{name}: deflated transfer syntax ({syntax}) may inflate without bound and is not read; convert it to "
            "Explicit VR Little Endian (dcmconv +te)"
        )


def _describe(ds: FileDataset, path: str, problem: str | None) -> SliceFile:
    name = os.path.basename(path)
    sop = str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    modality = str(ds.get("Modality") or "").strip().upper()
    if sop == _DIRECTORY or "DirectoryRecordSequence" in ds:
        raise NotAnImage(f"{name}: DICOMDIR, an index of files and no scan")
    if modality in _NOT_IMAGES:
        raise NotAnImage(f"{name}: DICOM without a scan in it ({modality})")
    if "Rows" not in ds or "Columns" not in ds:
        if modality in _SCANNERS:
            raise ScanError(
                f"{name}: {modality} header without Rows and Columns: cut off or emptied; copy the file again"
            )
        kind = modality or (UID(sop).name if sop else "no image attributes")
        raise NotAnImage(f"{name}: DICOM without a scan in it ({kind})")
    kinds = [str(v).upper() for v in _values(ds.get("ImageType"))]
    if any(word in kind for kind in kinds for word in ("LOCALIZER", "SCOUT")):
        raise NotAnImage(f"{name}: localizer image")
    if sop.startswith(_CAPTURE) or "SCREEN SAVE" in kinds:
        raise NotAnImage(f"{name}: screen capture (Secondary Capture), no geometry to trust")
    if "MOSAIC" in kinds:
        raise ScanError(
            f"{name}: Siemens mosaic (many slices tiled in one image) is not read; convert it with dcm2niix first"
        )
    colour = str(ds.get("PhotometricInterpretation") or "MONOCHROME2").strip()
    if int(ds.get("SamplesPerPixel") or 1) != 1 or colour not in {"MONOCHROME1", "MONOCHROME2"}:
        raise NotAnImage(f"{name}: colour image ({colour}), a scan is grey-scale")
    if "ModalityLUTSequence" in ds:
        raise ScanError(f"{name}: Modality LUT Sequence is not read; convert it to RescaleSlope and RescaleIntercept")
    frames = _frame_headers(ds, modality, name)
    spacing = {f.spacing for f in frames}
    orientations = np.array([f.orientation for f in frames])
    if len(spacing) > 1 or np.ptp(orientations, axis=0).max() > 5e-4:
        raise ScanError(f"{name}: frames differ in PixelSpacing or orientation; export one stack a file")
    rows, columns = int(ds.Rows), int(ds.Columns)
    depth, source = _depth(ds, frames[0])
    hounsfield, notes = _units(ds, modality, frames)
    kept = tuple(kinds[2:])
    return SliceFile(
        path=path,
        series=(
            str(ds.get("StudyInstanceUID") or ""),
            str(ds.get("SeriesInstanceUID") or "") or "in " + os.path.dirname(path),
            str(ds.get("FrameOfReferenceUID") or ""),
            modality,
            rows,
            columns,
            kept,
        ),
        series_uid=str(ds.get("SeriesInstanceUID") or ""),
        modality=modality or "unknown",
        rows=rows,
        columns=columns,
        positions=tuple(f.position for f in frames),
        orientation=tuple(orientations.mean(axis=0).tolist()),
        pixel_spacing=frames[0].spacing,
        depth_mm=depth,
        depth_source=source,
        slopes=tuple(f.slope for f in frames),
        intercepts=tuple(f.intercept for f in frames),
        hounsfield=hounsfield,
        notes=notes + ((f"{colour} kept as stored",) if colour == "MONOCHROME1" else ()),
        split={tag: str(value) for tag in SPLIT_TAGS if (value := ds.get(tag)) not in (None, "")},
        problem=problem,
    )


@dataclass(frozen=True)
class _FrameHeader:
    position: tuple[float, float, float]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    slope: float
    intercept: float
    rescaled: bool
    rescale_type: str
    thickness: float | None


def _frame_headers(ds: Dataset, modality: str, name: str) -> list[_FrameHeader]:
    """Geometry and rescale of every frame; enhanced images keep them in functional groups (PS3.3 C.7.6.16)."""
    count = int(ds.get("NumberOfFrames") or 1)
    shared = _first(ds.get("SharedFunctionalGroupsSequence"))
    per_frame = ds.get("PerFrameFunctionalGroupsSequence")
    if shared is None and per_frame is None:
        if count != 1:
            raise ScanError(
                f"{name}: {count} frames without functional groups have no known places; convert it to one file a slice"
            )
        return [_frame_header(name, modality, [ds])]
    groups = list(per_frame or [])
    if len(groups) != count:
        raise ScanError(f"{name}: {count} frames but {len(groups)} per-frame functional groups; the header is damaged")
    shared_parts = _parts(shared)
    return [_frame_header(name, modality, [*_parts(group), *shared_parts]) for group in groups]


def _parts(group: Dataset | None) -> list[Dataset]:
    if group is None:
        return []
    macros = (
        "PlanePositionSequence",
        "PlaneOrientationSequence",
        "PixelMeasuresSequence",
        "PixelValueTransformationSequence",
    )
    return [item for macro in macros if (item := _first(group.get(macro))) is not None]


def _first(sequence: Any) -> Dataset | None:
    return sequence[0] if sequence else None


def _frame_header(name: str, modality: str, parts: list[Dataset]) -> _FrameHeader:
    def find(tag: str) -> Any:
        return next((part.get(tag) for part in parts if part.get(tag) not in (None, "")), None)

    position, orientation = _floats(find("ImagePositionPatient")), _floats(find("ImageOrientationPatient"))
    spacing = _floats(find("PixelSpacing"))
    for tag, value, length in (
        ("ImagePositionPatient", position, 3),
        ("ImageOrientationPatient", orientation, 6),
        ("PixelSpacing", spacing, 2),
    ):
        if len(value) != length:
            kind = ScanError if modality in {"CT", "MR", "PT"} else NotAnImage
            raise kind(
                f"{name}: {tag} is {'absent' if not value else 'malformed'}: a 2D image, or a scan without its geometry"
            )
    slope, intercept = find("RescaleSlope"), find("RescaleIntercept")
    thickness = _floats(find("SliceThickness"))
    slope_value = 1.0 if slope is None else float(slope)
    intercept_value = 0.0 if intercept is None else float(intercept)
    if not (np.isfinite(slope_value) and np.isfinite(intercept_value)) or slope_value == 0:
        raise ScanError(
            f"{name}: RescaleSlope {slope_value:g}, RescaleIntercept {intercept_value:g} must be finite, slope not 0"
        )
    return _FrameHeader(
        position=(position[0], position[1], position[2]),
        orientation=orientation,
        spacing=(spacing[0], spacing[1]),
        slope=slope_value,
        intercept=intercept_value,
        rescaled=slope is not None and intercept is not None,
        rescale_type=str(find("RescaleType") or "").strip().upper(),
        thickness=thickness[0] if thickness and thickness[0] > 0 else None,
    )


def _floats(value: Any) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in _values(value))
    except (TypeError, ValueError):
        return ()


def _values(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def _depth(ds: Dataset, frame: _FrameHeader) -> tuple[float | None, str]:
    """How deep a lone slice is; a stack never needs it."""
    if frame.thickness:
        return frame.thickness, "SliceThickness"
    between = _floats(ds.get("SpacingBetweenSlices"))
    return (between[0], "SpacingBetweenSlices") if between and between[0] > 0 else (None, "")


def _units(ds: Dataset, modality: str, frames: list[_FrameHeader]) -> tuple[bool, tuple[str, ...]]:
    if modality != "CT":
        return False, ()
    if not all(f.rescaled for f in frames):
        return False, ("CT without RescaleSlope and RescaleIntercept: values may not be HU",)
    kinds = {f.rescale_type for f in frames} - {"", "HU", "US"}
    if kinds:
        return False, (f"CT values in {', '.join(sorted(kinds))}, not HU",)
    return True, ()


def _pixel_problem(ds: FileDataset, file: BinaryIO, end: int, size: int, name: str) -> str | None:
    """What is wrong with the pixel data behind the header, without reading it."""
    if "Rows" not in ds or "Columns" not in ds:
        return None
    little = ds.original_encoding[1] is not False
    file.seek(end)
    head = file.read(12)
    tag = struct.unpack("<HH" if little else ">HH", head[:4]) if len(head) >= 8 else None
    if tag in {(0x7FE0, 0x0008), (0x7FE0, 0x0009)}:
        return f"{name}: floating-point pixel data is not read; convert it to integers"
    if tag != (0x7FE0, 0x0010):
        return f"{name}: no pixel data: cut off, or stored elsewhere; copy the file again"
    allocated, frames = int(ds.get("BitsAllocated") or 0), int(ds.get("NumberOfFrames") or 1)
    if allocated not in {8, 16, 32}:
        return f"{name}: BitsAllocated {allocated} must be 8, 16 or 32"
    stored, high = int(ds.get("BitsStored") or allocated), ds.get("HighBit")
    high = stored - 1 if high in (None, "") else int(high)
    if not 1 <= stored <= allocated or high != stored - 1:
        return f"{name}: BitsStored {stored}, HighBit {high} do not fit BitsAllocated {allocated}; fix the header"
    voxels = int(ds.Rows) * int(ds.Columns)
    if voxels < 1 or voxels * frames * allocated // 8 > MAX_VOLUME_BYTES:
        return f"{name}: {ds.Rows} x {ds.Columns} x {frames} voxels are out of range; the header is damaged"
    needed = voxels * frames * allocated // 8
    syntax = syntax_of(ds)
    explicit = not ds.original_encoding[0]
    start = end + (12 if explicit else 8)
    length = struct.unpack("<L" if little else ">L", head[8:12] if explicit else head[4:8])[0]
    if syntax in NATIVE:
        if length == 0xFFFFFFFF:
            return f"{name}: pixel data of undefined length in an uncompressed file; the header is damaged"
        if length < needed or size - start < needed:
            here = max(0, min(length, size - start))
            return f"{name}: cut off, {here:,} of {needed:,} bytes of pixels are here; copy the file again"
        if length >= needed + voxels * allocated // 8:
            return (
                f"{name}: {length:,} bytes of pixels, header declares {needed:,}; fix Rows, Columns or NumberOfFrames"
            )
        return None
    if voxels > _MAX_FRAME_VOXELS:
        return f"{name}: compressed frame of {ds.Rows} x {ds.Columns}, at most {_MAX_FRAME_VOXELS:,} voxels are decoded"
    if not _decodable(syntax):
        return f"{name}: no decoder for {UID(syntax).name} ({syntax}); install them with: pip install -e '.[codecs]'"
    if not _fragments_whole(file, start, size, frames):
        return f"{name}: compressed pixel data is cut off; copy the file again"
    return None


def syntax_of(ds: FileDataset) -> str:
    declared = str(ds.file_meta.get("TransferSyntaxUID") or "")
    # A wrong label on an uncompressed file is found by pydicom while parsing; believe what it found.
    if declared and UID(declared).is_transfer_syntax and declared not in NATIVE:
        return declared
    implicit, little = ds.original_encoding
    if little is False:
        return str(ExplicitVRBigEndian)
    return str(ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)


def _decodable(syntax: str) -> bool:
    try:
        return bool(get_decoder(UID(syntax)).is_available)
    except NotImplementedError:
        return False


def _fragments_whole(file: BinaryIO, start: int, size: int, frames: int) -> bool:
    """Whether the chain of fragments (PS3.5 A.4) ends with its delimiter in the file, with one a frame at least."""
    at, items = start, 0
    while at + 8 <= size:
        file.seek(at)
        group, element, length = struct.unpack("<HHL", file.read(8))
        if (group, element) == (0xFFFE, 0xE0DD):
            return items > frames
        if (group, element) != (0xFFFE, 0xE000) or length == 0xFFFFFFFF:
            return False
        at, items = at + 8 + length, items + 1
    return False
