"""CMMD: mammograms of 1,775 Chinese patients, benign or malignant by biopsy.

Get: cancerimagingarchive.net/collection/cmmd (DICOM, NBIA or IDC) and `CMMD_clinicaldata_revision.xlsx` from the same
page; public loaders also use it saved as `CMMD_clinicaldata_revision.csv` or `..._CSV.csv` with semicolons.

Layout: any tree of DICOM files (`series.py`), often `manifest-*/CMMD/` or `TheChineseMammographyDatabase/CMMD/`, the
table in it or next to it.

Quirks: 2D images, whatever lists of 3D data say; two or four a patient; the table has one row a *side*, so a label
belongs to the images of that side alone; the side is in ImageLaterality, the view in ViewCodeSequence; the molecular
subtype is known for the second part (D2) only. A side with rows that disagree is UNCERTAIN.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.datasets.series import is_here, series_below
from medformer.data.records import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN, Record
from medformer.data.tables import read_sheet

ABOUT = About(
    name="CMMD",
    folders=("cmmd", "CMMD"),
    also=("TheChineseMammographyDatabase",),
    source="https://www.cancerimagingarchive.net/collection/cmmd",
    layout="any tree of DICOM files of patients D1-* and D2-*, CMMD_clinicaldata_revision.xlsx in it or next to it",
    patients=r"D[12]-\d{4}",
    loose=True,
)
_TABLES = tuple(f"CMMD*clinical*data*{end}" for end in (".xlsx", ".csv", ".csv.gz", ".parquet"))
_STATES = {"malignant": POSITIVE, "benign": NEGATIVE}


def recognise(folder: Path) -> bool:
    return is_here(folder, ABOUT, *_TABLES)


def scan(root: str | Path) -> Records:
    """One record an image. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    sides, disagree = _sides(near)
    records = []
    tree = series_below(folder, near, ABOUT, images=True)
    for found, who in tree.found:
        row = sides.get((who.patient, who.laterality)) or {}
        records.append(
            Record(
                dataset="cmmd", patient=who.patient, study=who.study, paths=found.files, modality="MG",
                labels={"malignant": row.get("state", UNKNOWN)}, scan=found,
                info={
                    "side": who.laterality, "view": who.view, "age": row.get("Age", ""),
                    "abnormality": row.get("abnormality", ""), "subtype": row.get("subtype", ""),
                },
            )
        )  # fmt: skip
    notes = [f"{disagree} sides are both benign and malignant in the table: uncertain"] if disagree else []
    return reported(ABOUT, records, [sides], [*tree.notes, *notes])


def _sides(near: Near) -> tuple[Join[tuple[str, str], dict[str, str]], int]:
    """(Patient, side) to its row with the state, and how many sides have rows that disagree."""
    table = near.first(*_TABLES)
    columns, more = ["ID1", "LeftRight", "classification"], ["Age", "abnormality", "subtype"]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    disagree = 0
    for row in read_sheet(table, columns, optional=more) if table else ():
        key = (row["ID1"], row["LeftRight"].upper()[:1])
        row["state"] = _STATES.get(row["classification"].lower(), UNKNOWN)
        if key in rows and rows[key]["state"] != row["state"]:
            row["state"], disagree = UNCERTAIN, disagree + 1
        rows[key] = row
    return Join("malignancy", "sides", _TABLES, near, table, rows), disagree
