"""NLST: low-dose chest CT of 26,254 people, up to three yearly screens each.

Get: images from cancerimagingarchive.net/collection/nlst (NBIA or IDC); tables from the same page or from
cdas.cancer.gov/nlst: `nlst_780_{prsn,screen,ctab,ctabc,canc}_idc_20210527.csv` in `nlst.780.idc.delivery.052821/` (so
named by several public loaders), or IDC's own `nlst_prsn` and so on as CSV or Parquet (columns as in IDC's BigQuery).

Layout: any tree of DICOM files (`series.py`), the tables in it or next to it.

Quirks: several reconstructions a screen; series of fewer than 8 slices are localizers; tables join on `pid` and
`study_yr` (0, 1, 2), which images carry as ClinicalTrialTimePointID or as a study date of 1999, 2000 or 2001;
`sct_slice_num` counts in the reconstruction that was read, not in every one; `cancyr` is blank for people without lung
cancer, so only who is in the table is negative.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.datasets.series import is_here, series_below
from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, Record
from medformer.data.tables import read_table, whole

ABOUT = About(
    name="NLST",
    folders=("nlst", "NLST"),
    source="https://www.cancerimagingarchive.net/collection/nlst, tables from https://cdas.cancer.gov/nlst",
    layout="any tree of DICOM files whose PatientID is the pid, with nlst_780_prsn_*.csv in it or next to it",
    loose=True,
)
MIN_SLICES = 8
_ENDS = (".csv", ".csv.gz", ".parquet")
_PEOPLE = tuple(f"nlst*prsn{more}{end}" for end in _ENDS for more in ("", "_*"))
_FINDINGS = tuple(f"nlst*ctab{more}{end}" for end in _ENDS for more in ("", "_*"))
_CANCERS = tuple(f"nlst*canc{more}{end}" for end in _ENDS for more in ("", "_*"))
_RESULTS = {"1": NEGATIVE, "2": NEGATIVE, "3": NEGATIVE, "4": POSITIVE, "5": POSITIVE, "6": POSITIVE}
_NONE = {"", ".", ".n", ".m", "na", "nan", "none"}


def recognise(folder: Path) -> bool:
    return is_here(folder, ABOUT, *_PEOPLE, *_FINDINGS, *_CANCERS)


def scan(root: str | Path) -> Records:
    """One record a series. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    people = _people(near)
    table = near.first(*_FINDINGS)
    rows: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in read_table(table, ["pid", "study_yr"]) if table else ():
        row = {k: whole(v) for k, v in row.items()}
        rows[row["pid"], row["study_yr"]].append({k: v for k, v in row.items() if k.startswith("sct_")})
    findings = Join("abnormalities", "screens", _FINDINGS[:2], near, table, rows)
    records, short, foreign = [], 0, 0
    tree = series_below(folder, near, ABOUT)
    for found, who in tree.found:
        if not who.patient.isdigit():  # a pid is a number
            foreign += 1
            continue
        if who.modality != "CT" or found.shape is None or found.shape[0] < MIN_SLICES:
            short += 1
            continue
        year = who.time_point.lstrip("Tt") or {"1999": "0", "2000": "1", "2001": "2"}.get(who.year, "")
        person = people.get(who.patient) or {}
        records.append(
            Record(
                dataset="nlst", patient=who.patient, study=who.study, paths=found.files, modality="CT",
                labels={
                    "lung cancer": person.get("cancer", UNKNOWN), "screen": person.get(f"screen{year}", UNKNOWN)
                },
                info={
                    "year": year, "kernel": who.description, "abnormalities": findings.get((who.patient, year)) or []
                },
                scan=found,
            )
        )  # fmt: skip
    notes = [f"{short} series of fewer than {MIN_SLICES} slices are left out (localizers)"] if short else []
    notes += [f"{foreign} series whose PatientID is no number are left out: of another collection"] if foreign else []
    # A screen without abnormalities has no row: only a table that joins nothing at all is worth a line.
    joins = [people, findings] if not any(findings.asked.values()) else [people]
    return reported(ABOUT, records, joins, [*tree.notes, *notes])


def _people(near: Near) -> Join[str, dict[str, str]]:
    """Person to the state of each label; of the cancer table alone only who has cancer is known."""
    table, cancers = near.first(*_PEOPLE), near.first(*_CANCERS)
    rows: dict[str, dict[str, str]] = {}
    for row in read_table(table, ["pid", "cancyr"], optional=["scr_res0", "scr_res1", "scr_res2"]) if table else ():
        year = whole(row["cancyr"])
        if not year.isdigit() and year.lower() not in _NONE:
            raise ScanError(f"{table.name if table else ''}: cancyr {year[:20]!r} must be a year of the study or blank")
        states = {f"screen{i}": _RESULTS.get(whole(row.get(f"scr_res{i}", "")), UNKNOWN) for i in range(3)}
        rows[whole(row["pid"])] = states | {"cancer": POSITIVE if year.isdigit() else NEGATIVE}
    if table is None and cancers is not None:
        rows = {whole(row["pid"]): {"cancer": POSITIVE} for row in read_table(cancers, ["pid"])}
    return Join("persons", "persons", _PEOPLE[:2], near, table or cancers, rows)
