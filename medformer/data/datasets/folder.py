"""A plain folder of scans or images in any format `read_volume` knows.

Layout: anything. Below `train/`, `valid/` (or `val/`) and `test/`, that is the split. A `labels.csv` with the columns
`name` (path below the folder, with or without suffix) and any others gives labels; `patient` and `split` among them
are taken as such.

Quirk: without a `patient` column the folder a file lies in stands for the patient, for a series the folder above it,
and for files that lie loose their own name; DICOM brings its own.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.datasets.joins import Records, reported
from medformer.data.datasets.layout import About
from medformer.data.dicom.identity import identity_of
from medformer.data.geometry import ScanError
from medformer.data.records import UNKNOWN, Record, Split
from medformer.data.scans import Scan, find_scans
from medformer.data.tables import read_table

ABOUT = About(
    name="a plain folder",
    folders=(),
    source="your own files",
    layout="scans and images of any known format, and labels.csv with a column `name`",
)
SPLITS: dict[str, Split] = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}


def recognise(folder: Path) -> bool:
    return folder.is_dir()


def scan(root: str | Path) -> Records:
    """One record a scan or image. Raises ScanError where the folder holds none."""
    folder = ABOUT.folder(root, recognise)
    table = folder / "labels.csv"
    rows = {
        row["name"].removeprefix("./"): row
        for row in (read_table(table, ["name"], optional=["patient", "split"]) if table.is_file() else ())
    }
    used: set[str] = set()
    index = find_scans(folder, images=True)
    records = [_record(found, rows, used, str(folder)) for found in index.scans]
    refused = sum(skipped.refused for skipped in index.skipped)
    notes = [f"{refused} files or series cannot be read and are left out; `inspect` says why"] if refused else []
    if rows and len(used) < max(len(rows), len(records)):
        notes.append(f"labels.csv names {len(rows)} scans, {len(used)} of them among the {len(records)} here")
    return reported(ABOUT, records, [], notes)


def _record(found: Scan, rows: dict[str, dict[str, str]], used: set[str], root: str) -> Record:
    parts = list(Path(found.name).parts)
    file = Path(found.files[0]).name
    keys = (found.name, f"{found.name.rpartition('/')[0]}/{file}".lstrip("/"))
    key = next((key for key in keys if key in rows), None)
    row = {} if key is None else rows[key]
    used |= {key} if key is not None else set()
    patient, study = row.get("patient", ""), ""
    if found.kind == "dicom":
        who = identity_of(found.files[0])
        patient, study = patient or who.patient, who.study
    reported = row.get("split", "") or (parts[0] if len(parts) > 1 else "")
    if row.get("split") and row["split"] not in SPLITS:
        raise ScanError(f"labels.csv: split {row['split'][:20]!r} must be one of {', '.join(SPLITS)}")
    inside = parts[1:] if parts[0] in SPLITS else parts
    return Record(
        dataset="folder", patient=patient or (inside[0] if len(inside) > 1 else found.name), study=study or found.name,
        paths=found.files, modality=found.modality, split=SPLITS.get(reported), scan=found,
        labels={k: v or UNKNOWN for k, v in row.items() if k not in {"name", "patient", "split"}},
        info={"shape": found.shape, "root": root},
    )  # fmt: skip
