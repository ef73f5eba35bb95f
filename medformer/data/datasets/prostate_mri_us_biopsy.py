"""Prostate-MRI-US-Biopsy: MR and 3D ultrasound of 1,151 men, with targets, surfaces and biopsy cores.

Get: cancerimagingarchive.net/collection/prostate-mri-us-biopsy: DICOM, `STLs.zip`, `Target-Data_2019-12-05*.xlsx`,
`TCIA-Biopsy-Data_2020-07-14.xlsx`.

Quirks: surfaces and targets are STL files that name their series by UID in the file name; a man without a core in the
table was not biopsied, which is UNKNOWN and not NEGATIVE; coordinates of cores are those of the MR (LPS).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from medformer.data.datasets.series import series_below
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, About, Record, find_file
from medformer.data.tables import pick, read_sheet

ABOUT = About(
    name="Prostate-MRI-US-Biopsy",
    folders=("prostate_mri_us_biopsy", "Prostate-MRI-US-Biopsy"),
    source="https://www.cancerimagingarchive.net/collection/prostate-mri-us-biopsy",
    layout="any tree of DICOM files, beside TCIA-Biopsy-Data*.xlsx, Target-Data*.xlsx and *.STL",
)
_STL = re.compile(r"(?P<patient>.+)-(?P<what>Target\d+|ProstateSurface)-seriesUID-(?P<series>[0-9.]+)\.stl", re.I)


def recognise(folder: Path) -> bool:
    return (
        find_file(folder, "TCIA-Biopsy-Data*.xlsx", "TCIA-Biopsy-Data*.csv", "Target-Data*.xlsx", depth=1) is not None
    )


def scan(root: str | Path) -> list[Record]:
    """One record a series. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    cores: dict[str, list[int]] = defaultdict(list)
    table = find_file(folder, "TCIA-Biopsy-Data*.xlsx", "TCIA-Biopsy-Data*.csv")
    for row in read_sheet(table, ["Primary Gleason", "Secondary Gleason"]) if table else ():
        grades = [row["Primary Gleason"], row["Secondary Gleason"]]
        total = sum(int(g) for g in grades) if all(g.isdigit() for g in grades) else 0
        cores[pick(row, "Patient Number", "Patient ID")].append(total)
    scores: dict[str, list[str]] = defaultdict(list)
    table = find_file(folder, "Target-Data*.xlsx", "Target-Data*.csv")
    for row in read_sheet(table) if table else ():
        series = pick(row, "seriesInstanceUID_MR", "Series Instance UID (MRI)")
        scores[series].append(pick(row, "UCLA Score (Similar to PIRADS v2)", "UCLA Score", "ROI UCLA Score"))
    surfaces: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(folder.rglob("*")):
        if (match := _STL.fullmatch(path.name)) is not None:
            surfaces[match["series"]][match["what"]] = str(path)
    records = []
    for found, who in series_below(folder):
        grades = cores.get(who.patient) or cores.get(who.patient.rpartition("-")[2].lstrip("0")) or []
        state = UNKNOWN if not grades else POSITIVE if max(grades) >= 6 else NEGATIVE
        records.append(
            Record(
                dataset="prostate_mri_us_biopsy", patient=who.patient, study=who.study, paths=found.files,
                modality=found.modality, labels={"cancer": state}, scan=found,
                info={
                    "series": who.series, "surfaces": surfaces.get(who.series, {}),
                    "highest_gleason": max(grades, default=0),
                    "target_scores": scores.get(who.series, []),
                },
            )
        )  # fmt: skip
    return records
