"""VICTRE: simulated mammograms (2D) and tomosynthesis (3D) of 2,994 digital breasts.

Get: cancerimagingarchive.net/collection/victre (DICOM, NBIA).

Quirks: nobody was ever in the scanner: a "patient" is a phantom, and headers are minimal, so tomosynthesis may come
without functional groups (stacked by its own spacing, with a note). Which phantom has lesions is told by supporting
tables whose layout no loader we know of documents; the label is therefore UNKNOWN here and never guessed.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.datasets.series import has_dicom, series_below
from medformer.data.records import UNKNOWN, About, Record

ABOUT = About(
    name="VICTRE",
    folders=("victre", "VICTRE"),
    source="https://www.cancerimagingarchive.net/collection/victre",
    layout="any tree of DICOM files in a folder named VICTRE",
)


def recognise(folder: Path) -> bool:
    return (folder.name.lower() == "victre" or (folder / "VICTRE").is_dir()) and has_dicom(folder)


def scan(root: str | Path) -> list[Record]:
    """One record an image or a tomosynthesis stack. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    records = []
    for found, who in series_below(folder, images=True):
        depth = 1 if found.shape is None else found.shape[0]
        records.append(
            Record(
                dataset="victre", patient=who.patient, study=who.study, paths=found.files, modality="MG",
                labels={"lesion": UNKNOWN}, scan=found,
                info={"kind": "tomosynthesis" if depth > 1 else "mammogram", "side": who.laterality, "view": who.view},
            )
        )  # fmt: skip
    return records
