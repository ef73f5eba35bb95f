"""DICOM files made for tests: a small series with every attribute open to change."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian

Edit = Callable[[int, FileDataset], None]
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OBLIQUE = (
    0.999032176441525,
    -0.0217883691751557,
    0.0382096472372976,
    0.026519476938784,
    0.991413870277297,
    -0.128043957939,
)


def image(i: int, rows: int = 6, columns: int = 5) -> np.ndarray:
    return (np.arange(rows * columns).reshape(rows, columns) + 100 * i + 1000).astype(np.uint16)


def write_slice(
    path: Path, i: int, position: np.ndarray, *, iop: tuple[float, ...] = AXIAL, edit: Edit | None = None
) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.4.{i + 1}")
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.ImageType, ds.Modality = ["ORIGINAL", "PRIMARY", "AXIAL"], "CT"
    ds.PatientName, ds.PatientID = "Secret^Name", "SECRET-ID"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.9", "1.2.3.8"
    ds.InstanceNumber, ds.SliceThickness = i + 1, 99
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.ImagePositionPatient = [f"{v:.10g}" for v in position]
        ds.ImageOrientationPatient = [f"{v:.12g}" for v in iop]
    ds.PixelSpacing = [0.8, 0.7]
    pixels = image(i)
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.PixelData = pixels.tobytes()
    if edit is not None:
        edit(i, ds)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path)


def write_series(
    folder: Path,
    depths: list[float] | np.ndarray,
    *,
    step: tuple[float, float, float] = (0.0, 0.0, 1.0),
    iop: tuple[float, ...] = AXIAL,
    edit: Edit | None = None,
) -> list[Path]:
    """Slice i lies at origin + depths[i] * step; file names are in an order that tells nothing."""
    origin = np.array([-10.0, 20.0, -30.0])
    names = np.random.default_rng(0).permutation(len(depths))
    paths = [folder / f"f{n:03d}.dcm" for n in names]
    for i, depth in enumerate(depths):
        write_slice(paths[i], i, origin + depth * np.array(step), iop=iop, edit=edit)
    return paths


def lps_affine(step: np.ndarray, iop: tuple[float, ...] = AXIAL) -> np.ndarray:
    """The affine by hand: columns are the directions times spacing, then LPS to RAS."""
    out = np.eye(4)
    out[:3, 0], out[:3, 1] = np.array(iop[:3]) * 0.7, np.array(iop[3:]) * 0.8
    out[:3, 2], out[:3, 3] = step, [-10.0, 20.0, -30.0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ out


def expected_voxels(count: int) -> np.ndarray:
    return np.stack([image(i) for i in range(count)]).astype(np.int16) - 1024


def normal_of(iop: tuple[float, ...]) -> np.ndarray:
    return np.cross(iop[:3], iop[3:])


def write_enhanced(path: Path, depths: list[float], edit: Edit | None = None) -> None:
    """One multi-frame file; frame i lies at depths[i] and has the slope i + 1."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = EnhancedMRImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = EnhancedMRImageStorage, UID("1.2.3.4"), "MR"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.9", "1.2.3.8"
    ds.ImageType, ds.NumberOfFrames = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], len(depths)
    shared, plane, measures = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient, measures.PixelSpacing, measures.SliceThickness = list(AXIAL), [0.8, 0.7], 99
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([plane]), Sequence([measures])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for i, depth in enumerate(depths):
        group, position, value = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [-10.0, 20.0, -30.0 + depth]
        value.RescaleSlope, value.RescaleIntercept, value.RescaleType = i + 1, 0, "US"
        group.PlanePositionSequence = Sequence([position])
        group.PixelValueTransformationSequence = Sequence([value])
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    frames = np.stack([image(i) for i in range(len(depths))])
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *frames.shape[1:], 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = frames.tobytes()
    if edit is not None:
        edit(0, ds)
    ds.save_as(path)
