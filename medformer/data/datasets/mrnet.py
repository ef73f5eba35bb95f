"""MRNet: 1,370 knee MR exams in three planes each.

Get: `MRNet-v1.0.zip` from stanfordmlgroup.github.io/competitions/mrnet.

Layout: `{train,valid}/{axial,coronal,sagittal}/0000.npy`, `{train,valid}-{abnormal,acl,meniscus}.csv` next to them;
copies put one more folder around.

Quirks: `.npy` stacks of 256 x 256 without any spacing; names are text with leading zeros, which spreadsheets strip;
label tables have no header, though copies add one; the three planes of an exam have different numbers of slices; the
test part was never published.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.records import UNKNOWN, Record, Split, state_of
from medformer.data.tables import read_table, whole

ABOUT = About(
    name="MRNet",
    folders=("mrnet", "MRNet-v1.0", "MRNet"),
    source="https://stanfordmlgroup.github.io/competitions/mrnet",
    layout="{train,valid}/{axial,coronal,sagittal}/0000.npy with train-acl.csv next to them",
)
PLANES, FINDINGS = ("axial", "coronal", "sagittal"), ("abnormal", "acl", "meniscus")
_PARTS: tuple[Split, ...] = ("train", "valid")


def recognise(folder: Path) -> bool:
    return any((folder / part / plane).is_dir() for part in _PARTS for plane in PLANES)


def scan(root: str | Path) -> Records:
    """One record a plane; the exam is patient and study. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    records, joins = [], []
    here: list[Split] = [part for part in _PARTS if (folder / part).is_dir()]
    for part in here:
        found = {finding: _states(near, part, finding) for finding in FINDINGS}
        joins += found.values()
        for plane in PLANES:
            for path in sorted((folder / part / plane).glob("*.npy")):
                records.append(
                    Record(
                        dataset="mrnet", patient=path.stem, study=path.stem, paths=(str(path),), modality="MR",
                        labels={finding: found[finding].get(path.stem) or UNKNOWN for finding in FINDINGS}, split=part,
                        info={"plane": plane},
                    )
                )  # fmt: skip
    notes = [f"no {part} part next to the other one" for part in _PARTS if part not in here]
    return reported(ABOUT, records, joins, notes)


def _states(near: Near, part: str, finding: str) -> Join[str, str]:
    name = f"{part}-{finding}.csv"
    table = near.first(name, f"{name}.gz", depth=1)
    rows = {}
    for number, row in enumerate(read_table(table, names=["exam", "state"]) if table else ()):
        exam = whole(row["exam"])
        if number == 0 and not exam.isdigit():
            continue  # a header
        rows[exam.zfill(4)] = state_of(row["state"])
    return Join(f"{finding} of the {part} part", "exams", (name,), near, table, rows)
