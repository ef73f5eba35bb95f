"""Which breast, and seen from where.

Source: DICOM PS3.3 C.8.11.7 (mammography image), C.7.6.16.2.8 (frame anatomy), PS3.16 CID 4014 (views).
"""

from __future__ import annotations

from pydicom.dataset import Dataset

__all__ = ["laterality_of", "view_of"]

# PS3.16 CID 4014, SNOMED CT and the retired SNOMED RT codes of older files.
_VIEWS = {
    "399260004": "ML", "399368009": "MLO", "399352003": "LM", "399099002": "LMO", "399162004": "CC",
    "399196006": "FB", "399188001": "SIO", "399192008": "XCCL", "399101009": "XCCM", "441555000": "ISO",
    "R-10224": "ML", "R-10226": "MLO", "R-10228": "LM", "R-10230": "LMO", "R-10242": "CC", "R-10244": "FB",
    "R-102D0": "SIO", "Y-X1770": "XCCL", "Y-X1771": "XCCM",
}  # fmt: skip


def laterality_of(ds: Dataset) -> str:
    """ "L", "R", "B", or "" where the header does not say; tomosynthesis says it frame by frame."""
    shared, each = ds.get("SharedFunctionalGroupsSequence") or [], ds.get("PerFrameFunctionalGroupsSequence") or []
    groups = [*shared, *each[:1]]
    anatomy = [part for group in groups for part in group.get("FrameAnatomySequence") or []]
    for value in (ds.get("ImageLaterality"), *(a.get("FrameLaterality") for a in anatomy), ds.get("Laterality")):
        text = str(value or "").strip().upper()
        if text in {"L", "R", "B"}:
            return text
    return ""


def view_of(ds: Dataset) -> str:
    """ "CC", "MLO", "PA", ... by code, else by name; "" where there is neither."""
    for item in ds.get("ViewCodeSequence") or []:
        if (view := _VIEWS.get(str(item.get("CodeValue") or "").strip())) is not None:
            return view
    text = str(ds.get("ViewPosition") or "").strip().upper()
    return text if len(text) <= 16 else ""
