"""X-rays, mammograms and tomosynthesis: images with a size but no place in the patient.

Source: DICOM PS3.3 C.7.6.1.1.1 (PatientOrientation), C.8.11.7 (mammography), C.11.1 and C.11.2 (LUTs, windows),
C.7.6.3.1.2 (photometric interpretation).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset

from medformer.data.dicom.anatomy import laterality_of, view_of
from medformer.data.dicom.pixels import Pixels, read_pixels
from medformer.data.dicom.records import ImageFile, NotAnImage
from medformer.data.geometry import ScanError
from medformer.data.pictures import grey_of
from medformer.data.volumes import Volume, rescale

__all__ = ["describe_image", "read_image", "why_left_out"]

_TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"


def describe_image(
    ds: FileDataset, path: str, modality: str, colour: str, notes: tuple[str, ...], problem: str | None
) -> ImageFile:
    """The record of an image without geometry. NotAnImage for a film of frames that nothing places."""
    name = os.path.basename(path)
    frames, samples = int(ds.get("NumberOfFrames") or 1), int(ds.get("SamplesPerPixel") or 1)
    if (samples == 1) != (colour.startswith(("MONOCHROME", "PALETTE")) or not colour) or samples not in {1, 3}:
        raise ScanError(f"{name}: colour image ({colour}) of {samples} values a pixel; the header contradicts itself")
    stacked = modality == "MG" or str(ds.get("SOPClassUID") or "") == _TOMOSYNTHESIS
    if frames != 1 and not stacked:
        raise ScanError(
            f"{name}: {frames} frames without functional groups have no known places; convert it to one file a slice"
        )
    spacing, source = _spacing(ds)
    depth = _positive(ds.get("SpacingBetweenSlices")) or _positive(ds.get("SliceThickness"))
    remarks = [f"voxel size from {source}"] if spacing and source != "PixelSpacing" else []
    if spacing is None:
        remarks.append("no voxel size in the header")
    if frames > 1:
        remarks.append(
            f"{frames} frames stacked {depth:g} mm apart" if depth else f"{frames} frames of unknown distance"
        )
    if str(ds.get("PresentationIntentType") or "").strip().upper() == "FOR PROCESSING":
        remarks.append("FOR PROCESSING: raw detector values, not those of a picture for reading")
    if str(ds.get("BreastImplantPresent") or "").strip().upper() == "YES":
        remarks.append("breast implant")
    return ImageFile(
        path=path,
        modality=modality or "unknown",
        rows=int(ds.Rows),
        columns=int(ds.Columns),
        frames=frames,
        spacing=spacing,
        depth_mm=depth,
        colour=colour or "MONOCHROME2",
        laterality=laterality_of(ds),
        view=view_of(ds),
        orientation=tuple(str(v).strip().upper() for v in _list(ds.get("PatientOrientation"))),
        notes=(*remarks, *notes),
        problem=problem,
    )


def read_image(image: ImageFile, *, canonical: bool, colour: str, voi: bool) -> Volume:
    """(frames, rows, columns) as a Volume that lies nowhere: stored values brought to the modality's, bright = dense.

    MONOCHROME1 is inverted over the stored range, so that the same tissue keeps one value whatever is in the
    picture. canonical: mammograms are flipped to have the chest wall on the left and the axillary side on top.
    colour: "grey" weighs RGB by ITU-R BT.601; "refuse" does so only where the three channels are equal. voi: the
    header's VOI LUT or window, scaled to 0..1.
    """
    name = os.path.basename(image.path)
    if image.problem:
        raise ScanError(image.problem)
    pixels = read_pixels(image.path, voi=voi)
    notes = [*image.notes, *pixels.notes]
    values, mask = pixels.stored, pixels.padding
    if values.ndim == 4:
        values, note = grey_of(values, colour, name, image.colour)
        notes.append(note)
        mask = None
    elif voi:
        values = pixels.display
        assert values is not None
        if image.colour == "MONOCHROME1":
            values = 1 - values
    else:
        if image.colour == "MONOCHROME1":
            values = _inverted(pixels)
            notes.append("MONOCHROME1 inverted over the stored range")
        values = rescale(values, pixels.slope, pixels.intercept)
    if canonical and image.modality == "MG":
        flips, remarks = _breast_flips(image, values, mask)
        notes += remarks
        axes = tuple(axis for axis, flip in ((1, flips[0]), (2, flips[1])) if flip)
        values = np.flip(values, axes) if axes else values
        mask = np.flip(mask, axes) if axes and mask is not None else mask
    row_mm, col_mm = image.spacing or (1.0, 1.0)
    return Volume(
        voxels=np.ascontiguousarray(values),
        affine=np.diag([col_mm, row_mm, image.depth_mm or 1.0, 1.0]),
        modality=image.modality,
        units="arbitrary",
        notes=tuple(dict.fromkeys(notes)),
        source=image.path,
        valid=None if mask is None else np.ascontiguousarray(~mask),
        geometry="spacing" if image.spacing and (image.frames == 1 or image.depth_mm) else "none",
        provenance={"format": "DICOM", "files": 1, "bytes": os.path.getsize(image.path), "tags": pixels.tags},
    )


def _inverted(pixels: Pixels) -> np.ndarray:
    """The other end of the stored range: 2^bits - 1 - v, or -1 - v for signed values."""
    if pixels.table or pixels.stored.dtype.kind == "f":
        low, high = pixels.stored.min(), pixels.stored.max()
        return (low + high - pixels.stored).astype(pixels.stored.dtype)
    top = -1 if pixels.signed else 2**pixels.bits - 1
    return (top - pixels.stored.astype(np.int64)).astype(pixels.stored.dtype)


def _breast_flips(image: ImageFile, values: np.ndarray, mask: np.ndarray | None) -> tuple[tuple[bool, bool], list[str]]:
    """Whether to flip rows and columns, from PatientOrientation, else from where the tissue is."""
    seen = values[values.shape[0] // 2].astype(np.float64)
    if mask is not None:
        seen = np.where(mask[values.shape[0] // 2], seen.min(), seen)
    tissue = seen > seen.min() + 0.1 * (np.percentile(seen, 99) - seen.min())
    half = tissue.shape[1] // 2
    left, right = float(tissue[:, :half].sum()), float(tissue[:, tissue.shape[1] - half :].sum())
    along_rows = image.orientation[0] if len(image.orientation) == 2 else ""
    down = image.orientation[1] if len(image.orientation) == 2 else ""
    notes = []
    if along_rows[:1] in {"A", "P"}:
        sideways = along_rows.startswith("P")
        if max(left, right) > 1.5 * min(left, right) and sideways != (right > left):
            notes.append("PatientOrientation disagrees with where the tissue is: tissue believed")
            sideways = right > left
    else:
        sideways = right > left
        notes.append("no PatientOrientation: chest wall taken to be where the tissue is")
    # Upside down: head below, or (CC) the lateral side below.
    lateral = image.laterality if image.laterality in {"L", "R"} else "?"
    upside = down.startswith("H") or (not down.startswith("F") and down.startswith(lateral))
    if sideways or upside:
        notes.append("flipped " + " and ".join(w for w, f in (("left-right", sideways), ("upside down", upside)) if f))
    return (upside, sideways), notes


def _spacing(ds: Dataset) -> tuple[tuple[float, float] | None, str]:
    """PixelSpacing, else ImagerPixelSpacing (at the detector) brought to the patient by the magnification."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        values = [_positive(v) for v in _list(ds.get(tag))]
        if len(values) == 2 and values[0] and values[1]:
            factor = _positive(ds.get("EstimatedRadiographicMagnificationFactor"))
            if tag == "ImagerPixelSpacing" and factor and factor >= 1:
                return (values[0] / factor, values[1] / factor), f"ImagerPixelSpacing / magnification {factor:g}"
            return (values[0], values[1]), tag
    return None, ""


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None


def _list(value: Any) -> list[Any]:
    return [] if value is None or value == "" else [value] if isinstance(value, str | int | float) else list(value)


def why_left_out(image: ImageFile) -> NotAnImage:
    """The reason by which an index of volumes leaves the image out."""
    name = os.path.basename(image.path)
    if not image.colour.startswith("MONOCHROME"):
        return NotAnImage(f"{name}: colour image ({image.colour}), a scan is grey-scale")
    return NotAnImage(f"{name}: a 2D image ({image.modality}) and no slice of a scan; find_scans(images=True) lists it")
