"""MRNet: 1,370 knee MR exams in three planes each.

Get: `MRNet-v1.0.zip` from stanfordmlgroup.github.io/competitions/mrnet.

Quirks: `.npy` stacks of 256 x 256 without any spacing; names are text with leading zeros; label tables have no
header; the three planes of an exam have different numbers of slices; the test part was never published.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from medformer.data.records import UNKNOWN, About, Record, Split, find_file, state_of
from medformer.data.tables import read_table

ABOUT = About(
    name="MRNet",
    folders=("mrnet", "MRNet-v1.0", "MRNet"),
    source="https://stanfordmlgroup.github.io/competitions/mrnet",
    layout="{train,valid}/{axial,coronal,sagittal}/0000.npy beside train-acl.csv",
)
PLANES, FINDINGS = ("axial", "coronal", "sagittal"), ("abnormal", "acl", "meniscus")
_PARTS: tuple[Split, ...] = ("train", "valid")


def recognise(folder: Path) -> bool:
    return (folder / "train" / "axial").is_dir() or (folder / "valid" / "axial").is_dir()


def scan(root: str | Path) -> list[Record]:
    """One record a plane; the exam is patient and study. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    records = []
    for part in _PARTS:
        labels: dict[str, dict[str, str]] = defaultdict(dict)
        for finding in FINDINGS:
            table = find_file(folder, f"{part}-{finding}.csv", depth=1)
            for row in read_table(table, names=["exam", "state"]) if table else ():
                labels[row["exam"]][finding] = state_of(row["state"])
        for plane in PLANES:
            for path in sorted((folder / part / plane).glob("*.npy")):
                known = labels.get(path.stem, {})
                records.append(
                    Record(
                        dataset="mrnet", patient=path.stem, study=path.stem, paths=(str(path),), modality="MR",
                        labels={finding: known.get(finding, UNKNOWN) for finding in FINDINGS}, split=part,
                        info={"plane": plane},
                    )
                )  # fmt: skip
    return records
