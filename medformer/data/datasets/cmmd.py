"""CMMD: mammograms of 1,775 Chinese patients, benign or malignant by biopsy.

Get: cancerimagingarchive.net/collection/cmmd (DICOM, NBIA) and `CMMD_clinicaldata_revision.xlsx` from the same page.

Quirks: 2D images, whatever lists of 3D data say; two or four a patient; the table has one row a *side*, so a label
belongs to the images of that side alone; the side is in ImageLaterality, the view in ViewCodeSequence; the molecular
subtype is known for the second part (D2) only.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.datasets.series import series_below
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, About, Record, find_file
from medformer.data.tables import read_sheet

ABOUT = About(
    name="CMMD",
    folders=("cmmd", "CMMD"),
    source="https://www.cancerimagingarchive.net/collection/cmmd",
    layout="any tree of DICOM files, beside CMMD_clinicaldata_revision.xlsx",
)
_TABLES = ("CMMD_clinicaldata_revision.xlsx", "CMMD_clinicaldata_revision.csv", "CMMD_clinicaldata*.xlsx")
_STATES = {"malignant": POSITIVE, "benign": NEGATIVE}


def recognise(folder: Path) -> bool:
    return find_file(folder, *_TABLES, depth=2) is not None


def scan(root: str | Path) -> list[Record]:
    """One record an image. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    table = find_file(folder, *_TABLES, depth=2)
    assert table is not None  # recognise() has seen it
    sides = {
        (row["ID1"], row["LeftRight"].upper()[:1]): row
        for row in read_sheet(table, ["ID1", "LeftRight", "classification"])
    }
    records = []
    for found, who in series_below(folder, images=True):
        row = sides.get((who.patient, who.laterality), {})
        records.append(
            Record(
                dataset="cmmd", patient=who.patient, study=who.study, paths=found.files, modality="MG",
                labels={"malignant": _STATES.get(row.get("classification", "").lower(), UNKNOWN)}, scan=found,
                info={
                    "side": who.laterality, "view": who.view, "age": row.get("Age", ""),
                    "abnormality": row.get("abnormality", ""), "subtype": row.get("subtype", ""),
                },
            )
        )  # fmt: skip
    return records
