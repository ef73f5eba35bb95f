"""Writing a volume as a DICOM series, one file a slice."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from medformer.data.geometry import ScanError
from medformer.data.volumes import Volume

__all__ = ["write_dicom_series"]

_STORAGE: dict[str, UID] = {"CT": CTImageStorage, "MR": MRImageStorage}


def write_dicom_series(volume: Volume, folder: str | os.PathLike[str], *, patient_id: str = "PHANTOM") -> list[Path]:
    """Write an integer CT or MR volume into a new or empty folder, whole or not at all.

    `read_volume` of the folder gives the same voxels back.

    Slices run along the axis closest to the feet-head direction, rows to the patient's left and columns to the
    back where the volume is not oblique, as scanners write them. UIDs derive from the content and patient_id,
    so the same volume always gives the same files. Raises ScanError for voxels that are not 16-bit integers and
    for a grid whose rows and columns are not perpendicular, which DICOM cannot hold.
    """
    if volume.modality not in _STORAGE:
        raise ScanError(f"write_dicom_series: modality={volume.modality!r} must be CT or MR; set it on the volume")
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise ScanError(f"write_dicom_series: {target.name!r} is not empty, series would mix; give a new folder")
    canonical = volume.canonical()
    # Flip x and y: RAS+ to DICOM's LPS+, so that an axial slice has the usual 1 0 0 0 1 0.
    voxels = canonical.voxels[:, ::-1, ::-1]
    matrix = canonical.affine.copy()
    corner = canonical.affine @ [voxels.shape[2] - 1, voxels.shape[1] - 1, 0, 1]
    matrix[:, 0], matrix[:, 1], matrix[:3, 3] = -matrix[:, 0], -matrix[:, 1], corner[:3]
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix
    col_mm, row_mm, step_mm = np.linalg.norm(lps[:3, :3], axis=0).tolist()
    row, col = lps[:3, 0] / col_mm, lps[:3, 1] / row_mm
    if abs(row @ col) > 1e-6:
        raise ScanError("write_dicom_series: rows and columns must be perpendicular; resample the volume first")
    signed, intercept, bits = _encoding(voxels, volume.modality)
    stored = (voxels.astype(np.int32) - intercept).astype("<i2" if signed else "<u2")
    padding = _padding(canonical, stored)
    digest = hashlib.sha256(np.ascontiguousarray(voxels).tobytes() + lps.tobytes() + patient_id.encode()).hexdigest()

    def uid(*parts: object) -> UID:
        return generate_uid(entropy_srcs=[digest, *(str(p) for p in parts)])

    def write_slice(path: Path, i: int, plane: np.ndarray) -> None:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = _STORAGE[volume.modality]
        meta.MediaStorageSOPInstanceUID = uid("slice", i)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
        ds.Modality, ds.Manufacturer = volume.modality, "medformer"
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = patient_id, patient_id, "", ""
        ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "", "", "", ""
        ds.ReferringPhysicianName, ds.PositionReferenceIndicator, ds.PatientPosition = "", "", "HFS"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uid("study"), uid("series"), uid("frame")
        ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = 1, i + 1, 1
        if volume.modality == "CT":
            ds.KVP = None
            ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, intercept, "HU"
        else:
            ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "RM", "NONE", "", "3D"
            ds.EchoTime, ds.EchoTrainLength, ds.RepetitionTime = None, None, None
        position = lps[:3, 2] * i + lps[:3, 3]
        ds.ImagePositionPatient = _decimal(position)
        ds.ImageOrientationPatient = _decimal([*row, *col])
        ds.PixelSpacing = _decimal([row_mm, col_mm])
        ds.SliceThickness = _decimal([step_mm])[0]
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *plane.shape, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
        if padding is not None:
            ds.add_new((0x0028, 0x0120), "SS" if signed else "US", padding)
        ds.PixelData = np.ascontiguousarray(plane).tobytes()
        ds.save_as(path, enforce_file_format=True)

    # Written under another name and renamed: a killed run must not leave half a series that looks whole.
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".draft-{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        for i, plane in enumerate(stored):
            write_slice(draft / f"{i + 1:04d}.dcm", i, plane)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [target / f"{i + 1:04d}.dcm" for i in range(len(stored))]


def _encoding(voxels: np.ndarray, modality: str) -> tuple[bool, int, int]:
    """(signed, intercept, bits stored): 12 bits from -1024 up for ordinary CT, as scanners do."""
    if voxels.dtype.kind not in "iu":
        raise ScanError(f"write_dicom_series: voxels are {voxels.dtype}, must be integers; round them first")
    low, high = int(voxels.min()), int(voxels.max())
    if modality == "CT" and low >= -1024 and high <= 3071:
        return False, -1024, 12
    if low >= 0 and high <= 65535:
        return False, 0, 16
    if low >= -32768 and high <= 32767:
        return True, 0, 16
    raise ScanError(f"write_dicom_series: values {low} to {high} must fit 16 bits; clip them first")


def _padding(volume: Volume, stored: np.ndarray) -> int | None:
    if volume.valid is None:
        return None
    mask = ~volume.valid[:, ::-1, ::-1]
    values = np.unique(stored[mask])
    if len(values) != 1 or (stored[~mask] == values[0]).any():
        raise ScanError("write_dicom_series: padding must have one value that no measured voxel has; set it first")
    return int(values[0])


def _decimal(values: np.ndarray | list[float]) -> list[str]:
    """DICOM decimal strings: at most 16 characters (PS3.5 6.2)."""
    return [format_number_as_ds(float(v) + 0.0) for v in values]
