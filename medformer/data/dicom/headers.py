"""Reading DICOM headers: one record a file with its frames, or the reason why not.

Geometry is left to geometry.py, images without a place (X-rays) to planar.py. Only ImagePositionPatient,
ImageOrientationPatient and PixelSpacing place a slice; InstanceNumber, SliceLocation, SliceThickness and file names
never do. Names and identifiers of patients are neither kept nor shown.

Source: DICOM PS3.3 and PS3.5 (2024), sections named where they are used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import UID

from medformer.data.dicom.mosaic import grid_places, mosaic_places
from medformer.data.dicom.planar import describe_image
from medformer.data.dicom.records import Frame, ImageFile, NotAnImage, SliceFile
from medformer.data.dicom.syntax import PARSE_ERRORS, check_syntax, pixel_problem, quiet
from medformer.data.dicom.tags import values_of
from medformer.data.geometry import FARTHEST_MM, LARGEST_MM, SMALLEST_MM, ScanError
from medformer.data.volumes import MAX_VOLUME_BYTES

__all__ = ["DIMENSIONS", "MARKS", "NUMBER", "SPLIT_TAGS", "probe_dicom", "sniff_dicom"]

_NOT_IMAGES = {"SR", "KO", "PR", "RTSTRUCT", "RTPLAN", "RTRECORD", "RTDOSE", "SEG", "REG", "RWV", "FID", "DOC", "ECG"}
_NOT_IMAGES |= {"AU", "PLAN", "M3D", "OSS", "TEXTUREMAP", "SMR", "HD", "EPS", "RESP"}
_SCANNERS = {"CT", "MR", "PT", "NM", "US"}
# Without a place an image of these is damaged; of any other modality it is a 2D image.
_VOLUMES = {"CT", "MR", "PT"}
_PROJECTIONS = {"CR", "DX", "MG"}
# Dimension pointers that say where a frame lies, not which repeat it is: ImagePositionPatient, InStackPositionNumber,
# StackID, SliceLocation, ImageOrientationPatient.
_PLACES = {0x00200032, 0x00209057, 0x00209056, 0x00201041, 0x00200037}
_DEEPER = ("DiffusionGradientDirectionSequence",)
_DIRECTORY = "1.2.840.10008.1.3.10"
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Raw Data Storage, and Philips' private classes of spectra, series data and exam cards.
_RAW, _RAW_PRIVATE = "1.2.840.10008.5.1.4.1.1.66", "1.3.46.670589.11.0.0.12."
# What differs between scans of one series, but between slices of one scan too; it splits only what is no stack.
MARKS = ("FrameOfReferenceUID", "ImageType")
# The same in Philips' own tags: name to group, private creator and element.
_PRIVATE = {
    "phase": (0x2001, "Philips Imaging DD 001", 0x08),
    "b-value number": (0x2005, "Philips MR Imaging DD 005", 0x12),
    "gradient number": (0x2005, "Philips MR Imaging DD 005", 0x13),
    "label": (0x2005, "Philips MR Imaging DD 005", 0x29),
}
# Tells whole volumes apart, in series.py, and never places a slice.
NUMBER = "InstanceNumber"
# What tells repeats of one position apart, in the order it is tried: these, the dimension index of an enhanced image,
# the file where each holds a whole stack, then single tags.
DIMENSIONS, _FILE = "dimension index", "file"
SPLIT_TAGS = (
    *MARKS,
    DIMENSIONS,
    _FILE,
    "AcquisitionNumber",
    "EchoNumbers",
    "EchoTime",
    "EffectiveEchoTime",
    "DiffusionBValue",
    "DiffusionGradientOrientation",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "TriggerTime",
    "NominalCardiacTriggerDelayTime",
    "AcquisitionTime",
    *_PRIVATE,
)


def sniff_dicom(head: bytes) -> bool:
    """Whether the first 352 bytes start a DICOM file, with or without preamble."""
    if head[128:132] == b"DICM":
        return True
    # No preamble: group 2 or 8, an element below 0x0100, then a known VR or a short length.
    if len(head) < 16 or head[:2] not in {b"\x02\x00", b"\x08\x00"} or head[3] != 0:
        return False
    return head[4:6] in {b"UL", b"OB", b"UI", b"CS", b"DA", b"TM", b"SH", b"LO"} or head[6:8] == b"\0\0"


def probe_dicom(path: str) -> SliceFile | ImageFile:
    """The header of one file. NotAnImage or ScanError say why it is no slice and no image."""
    name = os.path.basename(path)
    size = os.path.getsize(path)
    if size > 2 * MAX_VOLUME_BYTES:
        raise ScanError(f"{name}: {size:,} bytes, at most {2 * MAX_VOLUME_BYTES:,} are read; split the file")
    with open(path, "rb") as file, quiet():
        check_syntax(file, name)
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            end = file.tell()
            return _describe(header, path, pixel_problem(header, file, end, size, name))
        except ScanError:
            raise
        except PARSE_ERRORS as error:
            raise ScanError(f"{name}: DICOM header is damaged ({type(error).__name__}); copy the file again") from error


def _describe(ds: FileDataset, path: str, problem: str | None) -> SliceFile | ImageFile:
    name = os.path.basename(path)
    sop = str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    modality = str(ds.get("Modality") or "").strip().upper()
    if sop == _DIRECTORY or "DirectoryRecordSequence" in ds:
        raise NotAnImage(f"{name}: DICOMDIR, an index of files and no scan")
    if modality in _NOT_IMAGES:
        raise NotAnImage(f"{name}: DICOM without a scan in it ({modality})")
    if (sop == _RAW or sop.startswith(_RAW_PRIVATE)) and "ImagePositionPatient" not in ds:
        raise NotAnImage(f"{name}: raw data, no image")
    if "Rows" not in ds or "Columns" not in ds:
        if modality in _SCANNERS:
            raise ScanError(
                f"{name}: {modality} header without Rows and Columns: cut off or emptied; copy the file again"
            )
        kind = modality or (UID(sop).name if sop else "no image attributes")
        raise NotAnImage(f"{name}: DICOM without a scan in it ({kind})")
    kinds = [str(v).upper() for v in values_of(ds.get("ImageType"))]
    if any(word in kind for kind in kinds for word in ("LOCALIZER", "SCOUT")):
        raise NotAnImage(f"{name}: localizer image")
    capture = sop == _CAPTURE or sop.startswith(_CAPTURE + ".")  # 1.1.77 and its like are other classes
    groups = "PerFrameFunctionalGroupsSequence" in ds or "SharedFunctionalGroupsSequence" in ds
    placed = groups or all(tag in ds for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
    if "SCREEN SAVE" in kinds or (capture and modality not in _PROJECTIONS and not placed):
        raise NotAnImage(f"{name}: screen capture (Secondary Capture), no geometry to trust")
    notes = _burned_in(ds)
    if capture and placed:
        notes += ("of the Secondary Capture class, with a place in the patient: believed",)
    colour = str(ds.get("PhotometricInterpretation") or "MONOCHROME2").strip()
    grey = int(ds.get("SamplesPerPixel") or 1) == 1 and colour in {"MONOCHROME1", "MONOCHROME2"}
    if not grey or (modality not in _VOLUMES and not groups and "ImagePositionPatient" not in ds):
        return describe_image(ds, path, modality, colour if not grey or colour else "", notes, problem)
    columns, rows, tiles = int(ds.Columns), int(ds.Rows), None
    grid = "VFRAME" in kinds and "ImagePositionPatient" not in ds
    if grid or "MOSAIC" in kinds:
        places = grid_places(ds, name) if grid else mosaic_places(ds, name)
        header = _frame_header(name, modality, [ds], places.positions[0] if grid else None)
        split = _split_values([ds]) | {_FILE: str(ds.get("SOPInstanceUID") or path)}
        frames = [replace(header, position=p, split=split) for p in places.positions]
        rows, columns, tiles = places.rows, places.columns, places.tiles
    else:
        frames = _frame_headers(ds, modality, name)
    depth, source = _depth(ds, frames[0])
    hounsfield, unit_notes = _units(ds, modality, frames)
    marks = {"FrameOfReferenceUID": str(ds.get("FrameOfReferenceUID") or ""), "ImageType": "\\".join(kinds[2:])}
    inverted = (f"{colour} kept as stored",) if colour == "MONOCHROME1" else ()
    return SliceFile(
        path=path,
        series=(
            str(ds.get("StudyInstanceUID") or ""),
            str(ds.get("SeriesInstanceUID") or "") or "in " + os.path.dirname(path),
            modality,
            rows,
            columns,
        ),
        series_uid=str(ds.get("SeriesInstanceUID") or ""),
        modality=modality or "unknown",
        rows=rows,
        columns=columns,
        frames=tuple(
            Frame(path, i, f.position, f.orientation, f.spacing, f.slope, f.intercept, f.split | marks)
            for i, f in enumerate(frames)
        ),
        depth_mm=depth,
        depth_source=source,
        hounsfield=hounsfield,
        notes=unit_notes + inverted + notes,
        tiles=tiles,
        problem=problem,
    )


def _burned_in(ds: Dataset) -> tuple[str, ...]:
    if str(ds.get("BurnedInAnnotation") or "").strip().upper() == "YES":
        return ("BurnedInAnnotation is YES: names may be written into the pixels",)
    return ()


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
    split: dict[str, str]


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
    shared_parts, pointers = _parts(shared), _repeating_dimensions(ds)
    whole = {_FILE: str(ds.get("SOPInstanceUID") or name)} if count > 1 else {}
    headers = []
    for group in groups:
        parts = [*_parts(group), *shared_parts]
        header = _frame_header(name, modality, parts)
        index = next((values_of(p.get("DimensionIndexValues")) for p in parts if "DimensionIndexValues" in p), [])
        told = "/".join(str(index[i]) for i in pointers if i < len(index))
        headers.append(replace(header, split=header.split | whole | ({DIMENSIONS: told} if told else {})))
    return headers


def _repeating_dimensions(ds: Dataset) -> list[int]:
    """Which of the dimension index values do not say where a frame lies (PS3.3 C.7.6.17)."""
    pointers = [item.get("DimensionIndexPointer") for item in ds.get("DimensionIndexSequence") or []]
    return [i for i, pointer in enumerate(pointers) if pointer is not None and int(pointer) not in _PLACES]


def _parts(group: Dataset | None) -> list[Dataset]:
    if group is None:
        return []
    macros = [e.keyword for e in group if e.VR == "SQ" and e.keyword.endswith("Sequence") and e.value]
    parts = [group[macro][0] for macro in sorted(macros)]
    return parts + [item for part in parts for macro in _DEEPER if (item := _first(part.get(macro))) is not None]


def _first(sequence: Any) -> Dataset | None:
    return sequence[0] if sequence else None


def _split_values(parts: list[Dataset]) -> dict[str, str]:
    found = {
        tag: str(value)
        for tag in (*SPLIT_TAGS[len(MARKS) :], NUMBER)
        for p in parts
        if (value := p.get(tag)) not in (None, "")
    }
    for name, (group, creator, element) in _PRIVATE.items():
        for part in parts:
            if (group << 16) + 0x10 in part and (value := _private(part, group, creator, element)):
                found[name] = value
    return found


def _private(part: Dataset, group: int, creator: str, element: int) -> str:
    try:
        value = part.private_block(group, creator)[element].value
    except KeyError:
        return ""
    return str(value) if isinstance(value, str | int | float) else ""


def _frame_header(
    name: str, modality: str, parts: list[Dataset], place: tuple[float, float, float] | None = None
) -> _FrameHeader:
    """place: the position of a frame whose tags do not hold it."""

    def find(tag: str) -> Any:
        return next((part.get(tag) for part in parts if part.get(tag) not in (None, "")), None)

    position = _floats(find("ImagePositionPatient")) if place is None else place
    orientation = _floats(find("ImageOrientationPatient"))
    spacing = _floats(find("PixelSpacing"))
    for tag, value, length in (
        ("ImagePositionPatient", position, 3),
        ("ImageOrientationPatient", orientation, 6),
        ("PixelSpacing", spacing, 2),
    ):
        if len(value) != length or not (np.abs(value) <= FARTHEST_MM).all():
            raise ScanError(
                f"{name}: {tag} is {'absent' if not value else 'malformed'}: a 2D image, or a scan without its "
                "geometry; export the series again with its geometry"
            )
    slope, intercept = find("RescaleSlope"), find("RescaleIntercept")
    thickness = _floats(find("SliceThickness"))
    slope_value = 1.0 if slope is None else float(slope)
    intercept_value = 0.0 if intercept is None else float(intercept)
    if not (np.isfinite(slope_value) and np.isfinite(intercept_value)) or slope_value == 0:
        raise ScanError(
            f"{name}: RescaleSlope {slope_value:g}, RescaleIntercept {intercept_value:g} must be finite, slope not 0"
        )
    rescaled, kind = slope is not None and intercept is not None, str(find("RescaleType") or "").strip().upper()
    if (table := _first(find("ModalityLUTSequence"))) is not None:
        # PS3.3 C.11.1: a table replaces slope and intercept; pixels.py applies it.
        slope_value, intercept_value, rescaled = 1.0, 0.0, True
        kind = str(table.get("ModalityLUTType") or "").strip().upper() or "an unnamed unit"
    return _FrameHeader(
        position=(position[0], position[1], position[2]),
        orientation=orientation,
        spacing=(spacing[0], spacing[1]),
        slope=slope_value,
        intercept=intercept_value,
        rescaled=rescaled,
        rescale_type=kind,
        thickness=thickness[0] if thickness and SMALLEST_MM < thickness[0] <= LARGEST_MM else None,
        split=_split_values(parts),
    )


def _floats(value: Any) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in values_of(value))
    except (TypeError, ValueError):
        return ()


def _depth(ds: Dataset, frame: _FrameHeader) -> tuple[float | None, str]:
    """How deep a lone slice is; a stack never needs it."""
    if frame.thickness:
        return frame.thickness, "SliceThickness"
    between = _floats(ds.get("SpacingBetweenSlices"))
    usable = between and SMALLEST_MM < between[0] <= LARGEST_MM
    return (between[0], "SpacingBetweenSlices") if usable else (None, "")


# Defined terms of RescaleType (PS3.3 C.11.1.1.2): the value is free text and may say anything.
_UNITS = {"OD", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT", "an unnamed unit"}


def _units(ds: Dataset, modality: str, frames: list[_FrameHeader]) -> tuple[bool, tuple[str, ...]]:
    if modality != "CT":
        return False, ()
    if not all(f.rescaled for f in frames):
        return False, ("CT without RescaleSlope and RescaleIntercept: values may not be HU",)
    kinds = {f.rescale_type for f in frames} - {"", "HU", "US"}
    if kinds:
        named = ", ".join(sorted(kind if kind in _UNITS else "a unit of the header's own" for kind in kinds))
        return False, (f"CT values in {named}, not HU",)
    return True, ()
