"""Prostate-MRI-US-Biopsy: MR and 3D ultrasound of 1,151 men, with targets, surfaces and biopsy cores.

Get: cancerimagingarchive.net/collection/prostate-mri-us-biopsy: DICOM (NBIA or IDC), `STLs.zip`, and two workbooks
whose names changed: `TCIA-Biopsy-Data_2020-07-14.xlsx`, in the wiki's attachments `TCIA Biopsy Data_2020-07-14.xlsx`,
and `Target-Data_2019-12-05.xlsx`, `Target-Data_2019-12-05 (2).xlsx` or `Target-Data_2019-12-05-2.xlsx`.

Layout: any tree of DICOM files (`series.py`), the workbooks and `STLs/` in it or next to it.

Quirks: surfaces and targets are STL files that name their series by UID in the file name; a man without a core in the
table was not biopsied, which is UNKNOWN and not NEGATIVE; a core without a Gleason grade is benign; men are numbers in
one workbook and PatientIDs in the other; coordinates of cores are those of the MR (LPS).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.datasets.series import is_here, series_below
from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, Record
from medformer.data.tables import pick, read_sheet, whole

ABOUT = About(
    name="Prostate-MRI-US-Biopsy",
    folders=("prostate_mri_us_biopsy", "Prostate-MRI-US-Biopsy"),
    source="https://www.cancerimagingarchive.net/collection/prostate-mri-us-biopsy",
    layout="any tree of DICOM files, with TCIA-Biopsy-Data*.xlsx, Target-Data*.xlsx and *.STL in it or next to it",
    patients=r"Prostate-MRI-US-Biopsy-\d+",
    loose=True,
)
_ENDS = (".xlsx", ".csv", ".csv.gz")
_CORES = tuple(f"*biopsy*data*{end}" for end in _ENDS)
_TARGETS = tuple(f"target*data*{end}" for end in _ENDS)
_STL = re.compile(r"(?P<patient>.+)-(?P<what>Target\d+|ProstateSurface)-seriesUID-(?P<series>[0-9.]+)\.stl", re.I)
_GRADES = (("Primary Gleason", "Primary"), ("Secondary Gleason", "Secondary"))
_MEN = ("Patient Number", "Patient ID", "PatientID")


def recognise(folder: Path) -> bool:
    return is_here(folder, ABOUT, *_CORES, *_TARGETS)


def scan(root: str | Path) -> Records:
    """One record a series. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    cores, scores = _cores(near), _scores(near)
    surfaces: dict[str, dict[str, str]] = defaultdict(dict)
    for place in (folder, *near.folders("stl*")):
        for path in sorted(place.rglob("*")):
            if (match := _STL.fullmatch(path.name)) is not None:
                surfaces[match["series"]][match["what"]] = str(path)
    records = []
    tree = series_below(folder, near, ABOUT)
    for found, who in tree.found:
        grades = cores.get(_man(who.patient)) or []
        state = UNKNOWN if not grades else POSITIVE if max(grades) >= 6 else NEGATIVE
        records.append(
            Record(
                dataset="prostate_mri_us_biopsy", patient=who.patient, study=who.study, paths=found.files,
                modality=found.modality, labels={"cancer": state}, scan=found,
                info={
                    "series": who.series, "surfaces": surfaces.get(who.series, {}),
                    "highest_gleason": max(grades, default=0),
                    "target_scores": scores.get(who.series) or [],
                },
            )
        )  # fmt: skip
    # Most series have no target: only a table that joins nothing is worth a line.
    joins = [cores, scores] if not any(scores.asked.values()) else [cores]
    return reported(ABOUT, records, joins, tree.notes)


def _man(name: str) -> str:
    """The number of a man, however a table writes him."""
    return whole(name).rpartition("-")[2].lstrip("0")


def _cores(near: Near) -> Join[str, list[int]]:
    """Man to the sum of the two Gleason grades of each of his cores, 0 where benign."""
    table = near.first(*_CORES)
    rows: dict[str, list[int]] = defaultdict(list)
    names = [name for pair in _GRADES for name in pair]
    for row in read_sheet(table, optional=[*names, *_MEN]) if table else ():
        if not any(name in row for name in _MEN) or not all(any(n in row for n in pair) for pair in _GRADES):
            raise ScanError(
                f"{table.name if table else ''}: needs {' or '.join(_MEN)}, and {' and '.join(p[0] for p in _GRADES)}"
            )
        grades = [whole(pick(row, *pair)) for pair in _GRADES]
        rows[_man(pick(row, *_MEN))].append(sum(map(int, grades)) if all(g.isdigit() for g in grades) else 0)
    return Join("biopsy cores", "men", _CORES[:2], near, table, rows)


def _scores(near: Near) -> Join[str, list[str]]:
    """MR series to the scores of its targets."""
    table = near.first(*_TARGETS)
    series = ("seriesInstanceUID_MR", "Series Instance UID (MRI)")
    columns = ("UCLA Score (Similar to PIRADS v2)", "UCLA Score", "ROI UCLA Score")
    rows: dict[str, list[str]] = defaultdict(list)
    for row in read_sheet(table, optional=[*series, *columns]) if table else ():
        rows[pick(row, *series)].append(pick(row, *columns))
    return Join("targets", "series", _TARGETS[:2], near, table, rows)
