"""Whose image it is: the identifiers by which a data set's tables are joined. Kept out of caches and logs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pydicom

from medformer.data.dicom.anatomy import laterality_of, view_of
from medformer.data.dicom.syntax import PARSE_ERRORS, check_syntax, quiet
from medformer.data.geometry import ScanError

__all__ = ["Identity", "identity_of"]

_TAGS = [
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality", "StudyDate",
    "ClinicalTrialTimePointID", "SeriesDescription", "ImageLaterality", "Laterality", "ViewPosition",
    "ViewCodeSequence", "NumberOfFrames", "Rows", "Columns", "SpecificCharacterSet", "PresentationIntentType",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Identifiers and a few facts of one file; empty text where the header has none."""

    patient: str
    study: str
    series: str
    image: str
    modality: str
    year: str
    """Of the study date."""
    time_point: str
    description: str
    laterality: str
    view: str
    frames: int


def identity_of(path: str) -> Identity:
    """From the header alone. Raises ScanError."""
    name = os.path.basename(path)
    with open(path, "rb") as file, quiet():
        check_syntax(file, name)
        try:
            ds = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
            return Identity(
                patient=str(ds.get("PatientID") or "").strip(),
                study=str(ds.get("StudyInstanceUID") or ""),
                series=str(ds.get("SeriesInstanceUID") or ""),
                image=str(ds.get("SOPInstanceUID") or ""),
                modality=str(ds.get("Modality") or "").strip().upper(),
                year=str(ds.get("StudyDate") or "")[:4],
                time_point=str(ds.get("ClinicalTrialTimePointID") or "").strip(),
                description=str(ds.get("SeriesDescription") or "").strip(),
                laterality=laterality_of(ds),
                view=view_of(ds),
                frames=int(ds.get("NumberOfFrames") or 1),
            )
        except PARSE_ERRORS as error:
            raise ScanError(f"{name}: DICOM header is damaged ({type(error).__name__}); copy the file again") from error
