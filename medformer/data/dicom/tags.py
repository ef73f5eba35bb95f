"""Values of DICOM attributes, and the few that are kept."""

from __future__ import annotations

import re
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medformer.data.dicom.anatomy import laterality_of, view_of

__all__ = ["acquisition_tags", "values_of"]

_KEPT_TAGS = (
    "SOPClassUID", "Modality", "Manufacturer", "ManufacturerModelName", "BodyPartExamined", "PatientPosition", "KVP",
    "ConvolutionKernel", "SliceThickness", "SpacingBetweenSlices", "MagneticFieldStrength", "RepetitionTime",
    "EchoTime", "FlipAngle", "ScanningSequence", "PhotometricInterpretation", "BitsStored", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "ViewPosition", "ImageLaterality", "PresentationIntentType",
    "EstimatedRadiographicMagnificationFactor", "BurnedInAnnotation", "BreastImplantPresent",
)  # fmt: skip
_PLAIN = re.compile(r"[A-Za-z0-9 ._+\-/\\]*")


def acquisition_tags(ds: Dataset) -> dict[str, str]:
    """How the image was made: an allow-list without names, dates, identifiers or free text, for provenance."""
    out = {}
    for tag in _KEPT_TAGS:
        text = "\\".join(str(v) for v in values_of(ds.get(tag)))
        if text and len(text) <= 64 and _PLAIN.fullmatch(text):
            out[tag] = text
    for key, text in (("laterality", laterality_of(ds)), ("view", view_of(ds))):
        if text and _PLAIN.fullmatch(text):
            out[key] = text
    return out


def values_of(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]
