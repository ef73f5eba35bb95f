"""NLST: low-dose chest CT of 26,254 people, up to three yearly screens each.

Get: images from cancerimagingarchive.net/collection/nlst (NBIA or IDC), tables from cdas.cancer.gov/nlst
(`nlst_prsn*.csv`, `nlst_screen*.csv`, `nlst_ctab*.csv`, `nlst_ctabc*.csv`).

Quirks: several reconstructions a screen; series of fewer than 8 slices are localizers; tables join on `pid` and
`study_yr` (0, 1, 2), which images carry as ClinicalTrialTimePointID or as a study date of 1999, 2000 or 2001;
`sct_slice_num` counts in the reconstruction that was read, not in every one.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from medformer.data.datasets.series import has_dicom, series_below
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, About, Record, find_file
from medformer.data.tables import read_table

ABOUT = About(
    name="NLST",
    folders=("nlst", "NLST"),
    source="https://www.cancerimagingarchive.net/collection/nlst, tables from https://cdas.cancer.gov/nlst",
    layout="any tree of DICOM files whose PatientID is the pid, beside nlst_prsn*.csv",
)
MIN_SLICES = 8
_RESULTS = {"1": NEGATIVE, "2": NEGATIVE, "3": NEGATIVE, "4": POSITIVE, "5": POSITIVE, "6": POSITIVE}


def recognise(folder: Path) -> bool:
    named = folder.name.lower() == "nlst" or (folder / "NLST").is_dir()
    return (named and has_dicom(folder)) or find_file(folder, "nlst_prsn*.csv", depth=1) is not None


def scan(root: str | Path) -> list[Record]:
    """One record a series. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    people = {row["pid"]: row for row in _rows(folder, "nlst_prsn*.csv", ["pid", "cancyr"])}
    findings: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in _rows(folder, "nlst_ctab_*.csv", ["pid", "study_yr"]) or _rows(
        folder, "nlst_ctab.csv", ["pid", "study_yr"]
    ):
        findings[row["pid"], row["study_yr"]].append({k: v for k, v in row.items() if k.startswith("sct_")})
    records = []
    for found, who in series_below(folder):
        if who.modality != "CT" or found.shape is None or found.shape[0] < MIN_SLICES:
            continue
        year = who.time_point.lstrip("Tt") or {"1999": "0", "2000": "1", "2001": "2"}.get(who.year, "")
        person = people.get(who.patient)
        labels = {"lung cancer": UNKNOWN, "screen": UNKNOWN}
        if person is not None:
            labels["lung cancer"] = POSITIVE if person["cancyr"] not in {"", ".", "NA"} else NEGATIVE
            labels["screen"] = _RESULTS.get(person.get(f"scr_res{year}", ""), UNKNOWN)
        records.append(
            Record(
                dataset="nlst", patient=who.patient, study=who.study, paths=found.files, modality="CT", labels=labels,
                info={"year": year, "kernel": who.description, "abnormalities": findings.get((who.patient, year), [])},
                scan=found,
            )
        )  # fmt: skip
    return records


def _rows(folder: Path, pattern: str, columns: list[str]) -> list[dict[str, str]]:
    path = find_file(folder, pattern)
    return [] if path is None else list(read_table(path, columns))
