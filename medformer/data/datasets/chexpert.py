"""CheXpert: 224,316 chest X-rays of 65,240 patients, labelled from reports.

Get: stanfordmlgroup.github.io/competitions/chexpert or aimi.stanford.edu (registration).

Layouts, all of them of paths `patient*/study*/view*`:
- `CheXpert-v1.0[-small]/{train,valid}/` with `train.csv` and `valid.csv` (one archive).
- Four archives of AIMI (`chexpertchestxrays-u20210408/`): `CheXpert-v1.0 batch 1 (validate & csv)/` holds `valid/` and
  the tables, `... batch 2 (train 1)/` to `... batch 4 (train 3)/` hold patients without a `train/`; also
  `train_cheXbert.csv` and `train_visualCheXbert.csv`, other labels of the same images, which are not used here.
- The test set: `test/` with `test_labels.csv`; CheXlocalize has it in `CheXpert/`, with `val/` and `val_labels.csv`.
- CheXpert Plus: `PNG/[PNG/]{train,valid}/` (also DICOM), `df_chexpert_plus_240401.csv` with `path_to_image` and
  `split`, labels as lines of JSON in `chexbert_labels/{impression,findings,report}_fixed.json`; those of the
  impression, which is of the image itself, are used.

Quirks: paths in the tables start with the name of whichever root they were made for, so images are found by part,
patient, study and view; a blank label is *not mentioned* and not negative, -1 is uncertain: `as_targets` turns the
states into numbers by a policy you name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near, folders_in
from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN, Record, Split, state_of
from medformer.data.tables import read_table

ABOUT = About(
    name="CheXpert",
    folders=("chexpert", "CheXpert-v1.0", "CheXpert-v1.0-small", "CheXpert"),
    source="https://stanfordmlgroup.github.io/competitions/chexpert",
    layout="{train,valid}/patient*/study*/view*.jpg with train.csv and valid.csv, or the four folders of batches",
    loose=True,
)
FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_PARTS: dict[str, Split] = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
_TABLES: dict[Split, tuple[str, ...]] = {
    "train": ("train.csv", "train_labels.csv"), "valid": ("valid.csv", "val.csv", "val_labels.csv"),
    "test": ("test_labels.csv", "test.csv", "groundtruth.csv"),
}  # fmt: skip
_PLUS, _PLUS_LABELS = "df_chexpert_plus_*.csv", ("impression_fixed.json", "report_fixed.json")
_BATCH = re.compile(r"CheXpert.* batch \d.*", re.I)
_IMAGES = (".jpg", ".jpeg", ".png", ".dcm")
_VIEW = ("Frontal/Lateral", "AP/PA", "Sex", "Age")
# Part, patient, study and view without its ending: CheXpert Plus names .jpg and holds .png.
_Place = tuple[str, str, str, str]


def recognise(folder: Path) -> bool:
    parts = [folder / part for part in _PARTS]
    batches = [child for child in folders_in(folder) if _BATCH.fullmatch(child.name)]
    return any(map(_has_patients, [*parts, *batches])) or (
        bool(_BATCH.fullmatch(folder.name)) and _has_patients(folder)
    )


def _has_patients(folder: Path) -> bool:
    return folder.is_dir() and any(re.fullmatch(r"patient\d+", path.name) for path in folder.glob("patient*"))


def scan(root: str | Path) -> Records:
    """One record an image. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    images = _images(folder, near)
    # A batch alone, given as the root, is of one part; its tables name the others too.
    rows, joins, notes, gone = {}, [], [], 0
    plus = near.first(_PLUS)
    for part, names in _TABLES.items():
        table = near.first(*names, depth=2, columns=["Path"])
        if table is None and (plus is not None or not any(place[0] == part for place in images)):
            continue
        found = dict(_labelled(table)) if table is not None else {}
        joins.append(Join(f"labels of the {part} part", "images", names, near, table, found))
        gone += sum(place not in images for place in found)
        rows |= found
    if plus is not None:
        found, lines = _plus_labels(near, plus)
        notes += lines
        joins.append(Join("labels of CheXpert Plus", "images", (_PLUS,), near, plus, found))
        gone += sum(place not in images for place in found)
        rows = found | rows
    records = []
    for place, path in sorted(images.items(), key=lambda item: str(item[1])):
        part, patient, study, _ = place
        for join in joins:
            if join.what.startswith("labels of CheXpert") or f" {part} " in join.what:
                join.get(place)
        labels, info = rows.get(place) or (dict.fromkeys(FINDINGS, UNKNOWN), {})
        records.append(
            Record(
                dataset="chexpert", patient=patient, study=f"{patient}/{study}", paths=(str(path),), modality="DX",
                split=_PARTS[part], labels=labels, info=info,
            )
        )  # fmt: skip
    if gone:
        notes.append(f"{gone} of {gone + len(records)} files named in its tables are not here; copy them")
    return reported(ABOUT, records, joins, notes)


def _images(folder: Path, near: Near) -> dict[_Place, Path]:
    """Every image by its place; of two formats of one view the first of .jpg, .png, .dcm."""
    out: dict[_Place, Path] = {}
    whole = near.around if _BATCH.fullmatch(folder.name) else []
    batches = [b for place in (folder, *whole[:1]) for b in folders_in(place) if _BATCH.fullmatch(b.name)]
    for place in {folder, *batches}:
        for base, folders, files in os.walk(place):
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
            parts = Path(base).parts
            if len(parts) < 3 or not re.fullmatch(r"patient\d+", parts[-2]):
                continue
            part = parts[-3].lower()
            part = part if part in _PARTS else "train"
            for name in files:
                stem, ending = os.path.splitext(name)
                if ending.lower() in _IMAGES and not name.startswith("."):
                    key = ("valid" if part == "val" else part, parts[-2], parts[-1], stem)
                    held = out.get(key)
                    if held is None or _IMAGES.index(ending.lower()) < _IMAGES.index(held.suffix.lower()):
                        out[key] = Path(base) / name
    return out


def _place(path: str, part: str, what: str) -> _Place:
    """.../CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg, whatever stands before the part."""
    parts = [p for p in path.replace("\\", "/").split("/") if p not in {"", ".", ".."}]
    if len(parts) < 3 or not re.fullmatch(r"patient\d+", parts[-3]):
        raise ScanError(f"{what}: path {path[:60]!r} is not .../patient/study/view.jpg")
    named = parts[-4].lower() if len(parts) > 3 else ""
    return ({"val": "valid"}.get(named, named) if named in _PARTS else part, parts[-3], parts[-2],
            os.path.splitext(parts[-1])[0])  # fmt: skip


def _labelled(table: Path) -> Iterator[tuple[_Place, tuple[dict[str, str], dict[str, Any]]]]:
    part = next(part for part, names in _TABLES.items() if table.name.casefold() in names)
    for row in read_table(table, ["Path"], optional=[*FINDINGS, *_VIEW]):
        if not any(name in row for name in FINDINGS):
            raise ScanError(f"{table.name}: no column of a finding among {', '.join(row)[:200]}")
        labels = {name: state_of(row.get(name, "")) for name in FINDINGS}
        yield _place(row["Path"], part, table.name), (labels, _info(row, _VIEW))


def _info(row: Mapping[str, str], names: tuple[str, str, str, str]) -> dict[str, Any]:
    lateral, view, _, age = (row.get(name, "") for name in names)
    return {"view": view or lateral, "age": age}


def _plus_labels(near: Near, table: Path) -> tuple[dict[_Place, tuple[dict[str, str], dict[str, Any]]], list[str]]:
    """Of every image that CheXpert Plus lists, what CheXbert read in the impression."""
    names = ("frontal_lateral", "ap_pa", "sex", "age")
    out, notes = {}, []
    for row in read_table(table, ["path_to_image", "split"], optional=names):
        if row["split"] not in _PARTS:
            raise ScanError(f"{table.name}: split {row['split'][:20]!r} must be one of {', '.join(_PARTS)}")
        key = _place(row["path_to_image"], row["split"], table.name)
        out[key] = (dict.fromkeys(FINDINGS, UNKNOWN), _info(row, names))
    file = near.first(*_PLUS_LABELS)
    if file is None:
        return out, [f"no labels of CheXpert Plus: looked for {', '.join(_PLUS_LABELS)} {near.where()}"]
    joined = 0
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
                if row is None:
                    continue
                labels = {n: state_of("" if row[n] is None else str(row[n])) for n in FINDINGS if n in row}
                key = _place(str(row["path_to_image"]), "train", file.name)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if isinstance(error, ScanError):
                    raise
                raise ScanError(f"{file.name}: line {number} is no JSON of path_to_image and findings") from error
            if key in out:
                out[key][0].update(labels)
                joined += 1
    if joined < len(out):
        notes.append(f"labels of CheXpert Plus: {file.name} has {joined} of {len(out)} images of {table.name}")
    return out, notes


def as_targets(
    labels: Mapping[str, str],
    uncertain: Literal["ignore", "one", "zero"],
    unknown: Literal["ignore", "zero"] = "ignore",
) -> dict[str, float | None]:
    """1, 0 or None (leave out of the loss) for each finding.

    uncertain: U-ignore, U-ones or U-zeros of the CheXpert paper. unknown: what "not mentioned" counts as.
    """
    values = {
        POSITIVE: 1.0, NEGATIVE: 0.0, UNCERTAIN: {"ignore": None, "one": 1.0, "zero": 0.0}[uncertain],
        UNKNOWN: {"ignore": None, "zero": 0.0}[unknown],
    }  # fmt: skip
    return {name: values[state] for name, state in labels.items()}
