"""fastMRI: raw k-space of knees and brains, with the fastMRI+ boxes.

Get: `knee_singlecoil_{train,val,test}.tar.xz`, `knee_multicoil_*`, `brain_multicoil_*` after signing the agreement at
fastmri.med.nyu.edu; boxes from github.com/microsoft/fastmri-plus (`Annotations/knee.csv`, `brain.csv` and the lists
of the files that were looked at).

Quirks: one file is one patient's volume; test and challenge files have no reference; boxes were drawn on pictures
flipped upside down, and are turned back here; a file in the list of reviewed files without a box is normal, a file
outside it was never looked at.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.fastmri import probe_fastmri
from medformer.data.geometry import ScanError
from medformer.data.records import POSITIVE, About, Box, Record, Split, find_file
from medformer.data.tables import read_table

ABOUT = About(
    name="fastMRI",
    folders=("fastmri", "fastMRI", "fastMRI_dataset"),
    source="https://fastmri.med.nyu.edu (boxes: https://github.com/microsoft/fastmri-plus)",
    layout="{singlecoil,multicoil}_{train,val,test,challenge}/*.h5, Annotations/{knee,brain}.csv",
)
_SPLITS: dict[str, Split] = {"train": "train", "val": "valid", "test": "test", "challenge": "test"}


def _parts(folder: Path) -> list[Path]:
    return sorted(
        part for coils in ("singlecoil", "multicoil") for part in folder.rglob(f"{coils}_*")
        if part.is_dir() and part.name.split("_")[1] in _SPLITS
    )  # fmt: skip


def recognise(folder: Path) -> bool:
    return any(part.is_dir() for coils in ("singlecoil", "multicoil") for part in folder.glob(f"*{coils}_*"))


def scan(root: str | Path) -> list[Record]:
    """One record a file. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    boxes, labels, reviewed = _annotations(folder)
    records = []
    for part in _parts(folder):
        for path in sorted(part.glob("*.h5")):
            seen = path.stem in reviewed
            records.append(
                Record(
                    dataset="fastmri",
                    patient=path.stem,
                    study=path.stem,
                    paths=(str(path),),
                    modality="MR",
                    labels=labels.get(path.stem, {}),
                    split=_SPLITS[part.name.split("_")[1]],
                    boxes=_turned(path, boxes.get(path.stem, [])) if seen else None,
                    info={"coils": part.name.split("_")[0], "body_part": "brain" if "brain" in path.stem else "knee"},
                )
            )
    return records


def _annotations(folder: Path) -> tuple[dict[str, list[Box]], dict[str, dict[str, str]], set[str]]:
    boxes: dict[str, list[Box]] = {}
    labels: dict[str, dict[str, str]] = {}
    reviewed: set[str] = set()
    for part in ("knee", "brain"):
        table, listed = find_file(folder, f"{part}.csv"), find_file(folder, f"{part}_file_list.csv")
        if table is None:
            continue
        if listed is not None:
            reviewed |= {row["file"].removesuffix(".h5") for row in read_table(listed, names=["file"])} - {
                "file",
                "filename",
            }
        for row in read_table(table, ["file", "slice", "study_level", "x", "y", "width", "height", "label"]):
            file = row["file"].removesuffix(".h5")
            reviewed.add(file)
            labels.setdefault(file, {})[row["label"]] = POSITIVE
            if row["study_level"].lower() not in {"yes", "true", "1"}:
                x, y, width, height = (float(row[k]) for k in ("x", "y", "width", "height"))
                box = Box(x=x, y=y, width=width, height=height, label=row["label"], slice=int(row["slice"]))
                boxes.setdefault(file, []).append(box)
    return boxes, labels, reviewed


def _turned(path: Path, boxes: list[Box]) -> tuple[Box, ...]:
    """From the upside-down pictures they were drawn on to the stored images."""
    if not boxes:
        return ()
    try:
        (_, rows, _), _ = probe_fastmri(str(path))
    except ScanError:
        return ()
    return tuple(
        Box(x=b.x, y=rows - b.y - b.height, width=b.width, height=b.height, label=b.label, slice=b.slice) for b in boxes
    )
