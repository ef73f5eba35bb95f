"""Label maps on disk: NIfTI on the scan's own grid, PNG for a picture, DICOM SEG for a DICOM series."""

from __future__ import annotations

import importlib.util
import uuid
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medformer.data import ScanError, Volume
from medformer.files import write_whole

__all__ = ["write_labels", "write_probabilities", "write_segmentation_object"]


def write_labels(labels: np.ndarray, volume: Volume, path: Path) -> Path:
    """(Z, Y, X) uint8 on the grid of `volume`, to `path` with its ending: .png for what has no place, else .nii.gz."""
    if volume.geometry == "none" and len(labels) == 1:
        from PIL import Image

        path = path.with_name(f"{path.name}.png")
        write_whole(path, lambda file: Image.fromarray(labels[0]).save(file, format="PNG"))
        return path
    path = path.with_name(f"{path.name}.nii.gz")
    _save(labels.transpose(2, 1, 0), volume.affine, path)
    return path


def write_probabilities(each: np.ndarray, volume: Volume, path: Path) -> Path:
    """(K, Z, Y, X) float32 as NIfTI of four axes (X, Y, Z, K)."""
    path = path.with_name(f"{path.name}_probabilities.nii.gz")
    _save(each.transpose(3, 2, 1, 0), volume.affine, path)
    return path


def _save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, code=1)
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    rigid = bool(np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-5))
    image.set_qform(affine if rigid else None, code=1 if rigid else 0)  # a qform cannot hold a shear
    draft = path.with_name(f".draft-{uuid.uuid4().hex}.nii.gz")
    try:
        nib.save(image, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_segmentation_object(
    labels: np.ndarray, volume: Volume, files: Sequence[str], names: Sequence[str], path: Path
) -> Path:
    """DICOM SEG that refers to the slices it was made from; (Z, Y, X) labels on the series' own axes.

    Raises ScanError where highdicom is not installed or the series does not allow it (many frames a file, no UIDs).
    """
    if importlib.util.find_spec("highdicom") is None:
        raise ScanError("no DICOM SEG: highdicom is not installed; pip install 'medformer[seg]'")
    import highdicom as hd
    import pydicom
    from highdicom.sr.coding import CodedConcept

    slices = [pydicom.dcmread(file) for file in files]
    if len(slices) != volume.shape[0] or any("ImagePositionPatient" not in s for s in slices):
        raise ScanError(
            f"no DICOM SEG: {len(slices)} files for {volume.shape[0]} slices; only one file a slice is taken"
        )
    lacking = [
        tag for tag in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
        if not getattr(slices[0], tag, "")
    ]  # fmt: skip
    if lacking:
        raise ScanError(f"no DICOM SEG: the series has no {lacking[0]}, to which it would refer")
    order = _order(slices, volume)
    present = [i for i in range(1, len(names) + 1) if (labels == i).any()]
    if not present:
        raise ScanError("no DICOM SEG: nothing was found in the scan, and a SEG holds at least one segment")
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number, segment_label=names[i - 1],
            segmented_property_category=CodedConcept("123037004", "SCT", "Anatomical Structure"),
            segmented_property_type=CodedConcept(f"structure-{i}", "99MEDFORMER", names[i - 1][:64]),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=hd.AlgorithmIdentificationSequence(
                name="medformer", version=version("medformer"),
                family=CodedConcept("123109", "DCM", "Artificial Intelligence"),
            ),
        )
        for number, i in enumerate(present, 1)
    ]  # fmt: skip
    masks = np.stack([labels == i for i in present], -1)[order].astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it remarks on names of patients, and prints them
        made = _made(
            hd.seg.Segmentation,
            source_images=slices, pixel_array=masks, segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions, series_instance_uid=hd.UID(), series_number=900,
            sop_instance_uid=hd.UID(), instance_number=1, manufacturer="medformer", manufacturer_model_name="medformer",
            software_versions=version("medformer"), device_serial_number="0", omit_empty_frames=True,
        )  # fmt: skip
    path = path.with_name(f"{path.name}.dcm")
    write_whole(path, lambda file: made.save_as(file))
    return path


def _made(segmentation: Any, **words: Any) -> Any:
    """The object; ScanError where highdicom does not take the series, whose headers may hold anything."""
    try:
        return segmentation(**words)
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise ScanError(
            f"no DICOM SEG: highdicom cannot make one of this series ({type(error).__name__}: {text})"
        ) from error


def _order(slices: Sequence[Any], volume: Volume) -> list[int]:
    """Of each file the slice of the volume that it is; ScanError where rows and columns are not the volume's."""
    found = []
    back = np.linalg.inv(volume.affine)
    for one in slices:
        corner = back @ [*(np.array(one.ImagePositionPatient, float) * (-1, -1, 1)), 1]  # LPS+ to RAS+
        row = back[:3, :3] @ (
            np.array(one.ImageOrientationPatient[:3], float) * (-1, -1, 1) * float(one.PixelSpacing[1])
        )
        if np.abs(corner[:2]).max() > 0.1 or np.abs(row - (1, 0, 0)).max() > 0.01:
            raise ScanError("no DICOM SEG: the slices' rows and columns are not the volume's")
        found.append(round(corner[2]))
    if sorted(found) != list(range(volume.shape[0])):
        raise ScanError("no DICOM SEG: the slices do not fill the volume one by one")
    return found
