"""VICTRE: simulated mammograms (2D) and tomosynthesis (3D) of about 2,990 digital breasts.

Get: cancerimagingarchive.net/collection/victre (DICOM, NBIA or IDC).

Layout: any tree of DICOM files (`series.py`) in a folder named VICTRE, or with NBIA's `metadata.csv`.

Quirks: nobody was ever in the scanner: a "patient" is a phantom, and headers are minimal, so tomosynthesis may come
without functional groups (stacked by its own spacing, with a note). Which phantom has lesions is in no table that the
collection's page or a loader we know of documents; the label is therefore UNKNOWN here, said once, and never guessed.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.datasets.joins import Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.datasets.series import is_here, series_below
from medformer.data.records import UNKNOWN, Record

ABOUT = About(
    name="VICTRE",
    folders=("victre", "VICTRE"),
    source="https://www.cancerimagingarchive.net/collection/victre",
    layout="any tree of DICOM files in a folder named VICTRE",
    loose=True,
)


def recognise(folder: Path) -> bool:
    return is_here(folder, ABOUT)


def scan(root: str | Path) -> Records:
    """One record an image or a tomosynthesis stack. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    records = []
    tree = series_below(folder, Near(folder, ABOUT), ABOUT, images=True)
    for found, who in tree.found:
        depth = 1 if found.shape is None else found.shape[0]
        records.append(
            Record(
                dataset="victre", patient=who.patient, study=who.study, paths=found.files, modality="MG",
                labels={"lesion": UNKNOWN}, scan=found,
                info={"kind": "tomosynthesis" if depth > 1 else "mammogram", "side": who.laterality, "view": who.view},
            )
        )  # fmt: skip
    note = f"no table of lesions is documented: all {len(records)} are unknown"
    return reported(ABOUT, records, [], [*tree.notes, note])
