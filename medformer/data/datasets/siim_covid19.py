"""SIIM-FISABIO-RSNA COVID-19: 6,334 chest X-rays of 6,054 studies, with opacity boxes.

Get: kaggle.com/c/siim-covid19-detection (`train/`, `test/`, `train_image_level.csv`, `train_study_level.csv`); in a
notebook below `input/siim-covid19-detection/`.

Quirks: files lie as `<study>/<series>/<image>.dcm`, or flat after `misc/dataset_folder_cleanup.py`: both are read, and
of the latter `index.csv`, which keeps study and first name of every image; boxes are a Python list in a cell, in
original pixels, and a blank cell with the label "none" means looked at and nothing there; a study may hold several
images of which one alone is annotated: the boxes of its unboxed siblings are unknown; many images are MONOCHROME1 and
compressed; the test part has no labels.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.geometry import ScanError
from medformer.data.records import UNKNOWN, Box, Record, Split, state_of
from medformer.data.tables import parse_literal, read_table

ABOUT = About(
    name="SIIM-FISABIO-RSNA COVID-19",
    folders=("siim_covid19", "siim-covid19-detection", "SIIM-FISABIO-RSNA-COVID-19"),
    source="https://www.kaggle.com/c/siim-covid19-detection",
    layout="train/ and test/ of .dcm files with train_image_level.csv and train_study_level.csv next to them",
)
CLASSES = ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance")
_PARTS: tuple[Split, ...] = ("train", "test")
_IMAGES, _STUDIES, _INDEX = "train_image_level.csv", "train_study_level.csv", "index.csv"
Annotated = tuple[str, tuple[Box, ...] | None]


def recognise(folder: Path) -> bool:
    if not any((folder / part).is_dir() for part in _PARTS):
        return False
    return ABOUT.named(folder) or any((folder / name).is_file() for name in (_IMAGES, _STUDIES))


def scan(root: str | Path) -> Records:
    """One record an image; the study stands for the patient, whom nothing names. Raises ScanError if absent."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    tables = near.first(_IMAGES), near.first(_STUDIES)
    images = Join("boxes", "images", (_IMAGES,), near, tables[0], read_images(tables[0]) if tables[0] else {})
    studies = Join("classes", "studies", (_STUDIES,), near, tables[1], read_studies(tables[1]) if tables[1] else {})
    origins = _origins(folder)
    siblings = Counter(study for study, _ in images.rows.values())
    boxed = {study for study, boxes in images.rows.values() if boxes}
    records, alike = [], 0
    for part in _PARTS:
        for path in sorted(p for p in (folder / part).rglob("*") if p.suffix.lower() == ".dcm"):
            study, stem = origins.get((part, path.name), ("", path.stem))
            nested = path.relative_to(folder / part).parts
            study = study or (nested[0] if len(nested) == 3 else "")
            named, boxes = (images.get(stem) if part == "train" else None) or ("", None)
            if study and named != study:  # another image of that name
                boxes = None
            study = study or named
            alike += not study
            study = study or stem
            if not boxes and siblings[study] > 1 and study in boxed:
                boxes = None
            states = (studies.get(study) if part == "train" else None) or {}
            records.append(
                Record(
                    dataset="siim_covid19", patient=study, study=study, paths=(str(path),), modality="DX",
                    labels={name: states.get(name, UNKNOWN) for name in CLASSES}, boxes=boxes, split=part,
                )
            )  # fmt: skip
    notes = (
        [f"{alike} images lie flat without {_INDEX}: their study is not known, each counts as its own"] if alike else []
    )
    return reported(ABOUT, records, [images, studies], notes)


def read_images(table: Path) -> dict[str, Annotated]:
    """Image to its study and boxes."""
    out: dict[str, Annotated] = {}
    for row in read_table(table, ["id", "boxes", "label", "StudyInstanceUID"]):
        found = parse_literal(row["boxes"], table.name) if row["boxes"] else []
        try:
            boxes = tuple(
                Box(
                    x=float(b["x"]),
                    y=float(b["y"]),
                    width=float(b["width"]),
                    height=float(b["height"]),
                    label="opacity",
                )
                for b in found
            )
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise ScanError(f"{table.name}: boxes {row['boxes'][:40]!r} are no x, y, width, height") from error
        looked = bool(boxes) or row["label"].startswith("none")
        out[row["id"].removesuffix("_image")] = (row["StudyInstanceUID"], boxes if looked else None)
    return out


def read_studies(table: Path) -> dict[str, dict[str, str]]:
    """Study to the state of each class."""
    return {
        row["id"].removesuffix("_study"): {name: state_of(row[name]) for name in CLASSES}
        for row in read_table(table, ["id", *CLASSES])
    }


def _origins(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(Part, file) of a flattened tree to the study and the name it had, from the index of the tool that made it."""
    table = folder / _INDEX
    columns = ["part", "image", "study", "original"]
    return {
        (row["part"], row["image"]): (row["study"], Path(row["original"]).stem)
        for row in (read_table(table, columns) if table.is_file() else ())
    }
