"""SIIM-FISABIO-RSNA COVID-19: 6,334 chest X-rays of 6,054 studies, with opacity boxes.

Get: kaggle.com/c/siim-covid19-detection (`train/`, `test/`, `train_image_level.csv`, `train_study_level.csv`).

Quirks: files lie as `<study>/<series>/<image>.dcm`, or flat after `misc/dataset_folder_cleanup.py`: both are read;
boxes are a Python list in a cell, in original pixels, and a blank cell with the label "none" means looked at and
nothing there; a study may hold several images of which one alone is annotated: the boxes of its unboxed siblings are
unknown; many images are MONOCHROME1 and compressed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, About, Box, Record, Split, find_file
from medformer.data.tables import parse_literal, read_table

ABOUT = About(
    name="SIIM-FISABIO-RSNA COVID-19",
    folders=("siim_covid19", "siim-covid19-detection", "SIIM-FISABIO-RSNA-COVID-19"),
    source="https://www.kaggle.com/c/siim-covid19-detection",
    layout="train/ and test/ of .dcm files beside train_image_level.csv",
)
CLASSES = ("Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance")
_PARTS: tuple[Split, ...] = ("train", "test")


def recognise(folder: Path) -> bool:
    tables = ("train_image_level.csv", "train_study_level.csv")
    return any((folder / part).is_dir() for part in _PARTS) and find_file(folder, *tables) is not None


def scan(root: str | Path) -> list[Record]:
    """One record an image; the study stands for the patient, whom nothing names. Raises ScanError if absent."""
    folder = ABOUT.folder(root, recognise)
    images, studies = read_images(folder), read_studies(folder)
    siblings = Counter(study for study, _ in images.values())
    boxed = {study for study, boxes in images.values() if boxes}
    records = []
    for part in _PARTS:
        for path in sorted((folder / part).rglob("*.dcm")):
            study, boxes = images.get(path.stem, ("", None))
            nested = path.relative_to(folder / part).parts
            study = study or (nested[0] if len(nested) == 3 else path.stem)
            if not boxes and siblings[study] > 1 and study in boxed:
                boxes = None
            states = studies.get(study, {})
            records.append(
                Record(
                    dataset="siim_covid19", patient=study, study=study, paths=(str(path),), modality="DX",
                    labels={name: states.get(name, UNKNOWN) for name in CLASSES}, boxes=boxes, split=part,
                )
            )  # fmt: skip
    return records


def read_images(folder: Path) -> dict[str, tuple[str, tuple[Box, ...] | None]]:
    """Image to its study and boxes."""
    table = find_file(folder, "train_image_level.csv")
    out: dict[str, tuple[str, tuple[Box, ...] | None]] = {}
    for row in read_table(table, ["id", "boxes", "label", "StudyInstanceUID"]) if table else ():
        found = parse_literal(row["boxes"], table.name if table else "") if row["boxes"] else []
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
            raise ScanError(f"train_image_level.csv: boxes {row['boxes'][:40]!r} are no x, y, width, height") from error
        looked = bool(boxes) or row["label"].startswith("none")
        out[row["id"].removesuffix("_image")] = (row["StudyInstanceUID"], boxes if looked else None)
    return out


def read_studies(folder: Path) -> dict[str, dict[str, str]]:
    """Study to the state of each class."""
    table = find_file(folder, "train_study_level.csv")
    return {
        row["id"].removesuffix("_study"): {
            name: POSITIVE if row[name] in {"1", "1.0"} else NEGATIVE for name in CLASSES
        }
        for row in (read_table(table, ["id", *CLASSES]) if table else ())
    }
