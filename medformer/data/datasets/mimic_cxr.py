"""MIMIC-CXR: 377,110 chest X-rays of 227,835 studies, as DICOM (MIMIC-CXR) or JPEG (MIMIC-CXR-JPG).

Get: physionet.org/content/mimic-cxr and mimic-cxr-jpg after credentialing (`files/`, `mimic-cxr-2.*-{chexpert,negbio,
metadata,split}.csv.gz`).

Quirks: labels are those of a *study*, so joining on (subject, study) gives every image of it the same; both versions
share names, and a root may hold either or both: DICOM is preferred; tables may lie beside `files/` or above.
"""

from __future__ import annotations

from pathlib import Path

from medformer.data.records import UNKNOWN, About, Record, Split, find_file, state_of
from medformer.data.tables import read_table

ABOUT = About(
    name="MIMIC-CXR",
    folders=("mimic_cxr", "mimic-cxr", "mimic-cxr-jpg", "MIMIC-CXR", "MIMIC-CXR-JPG"),
    source="https://physionet.org/content/mimic-cxr and https://physionet.org/content/mimic-cxr-jpg",
    layout="files/p1?/p1???????/s????????/*.{dcm,jpg} beside mimic-cxr-2.*-metadata.csv.gz",
)
_SPLITS: dict[str, Split] = {"train": "train", "validate": "valid", "test": "test"}


def recognise(folder: Path) -> bool:
    return (folder / "files").is_dir() and any((folder / "files").glob("p1[0-9]"))


def scan(root: str | Path) -> list[Record]:
    """One record an image. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    splits: dict[str, Split] = {
        row["dicom_id"]: _SPLITS[row["split"]] for row in _rows(folder, "split", ["dicom_id", "split"])
    }
    views = {row["dicom_id"]: row.get("ViewPosition", "") for row in _rows(folder, "metadata", ["dicom_id"])}
    labels: dict[tuple[str, str], dict[str, str]] = {}
    names: list[str] = []
    for row in _rows(folder, "chexpert", ["subject_id", "study_id"]) or _rows(
        folder, "negbio", ["subject_id", "study_id"]
    ):
        names = names or [k for k in row if k not in {"subject_id", "study_id"}]
        labels[row["subject_id"], row["study_id"]] = {name: state_of(row[name]) for name in names}
    images: dict[str, Path] = {}
    for suffix in ("jpg", "dcm"):  # the second wins
        images |= {p.stem: p for p in (folder / "files").glob(f"p??/p*/s*/*.{suffix}")}
    records = []
    for name, path in sorted(images.items(), key=lambda item: str(item[1])):
        subject, study = path.parts[-3].removeprefix("p"), path.parts[-2].removeprefix("s")
        records.append(
            Record(
                dataset="mimic_cxr", patient=subject, study=study, paths=(str(path),), modality="DX",
                split=splits.get(name), info={"view": views.get(name, "")},
                labels=labels.get((subject, study), dict.fromkeys(names, UNKNOWN)),
            )
        )  # fmt: skip
    return records


def _rows(folder: Path, what: str, columns: list[str]) -> list[dict[str, str]]:
    path = find_file(folder, f"mimic-cxr-2.*-{what}.csv.gz", f"mimic-cxr-2.*-{what}.csv", depth=0)
    path = path or find_file(folder.parent, f"mimic-cxr-2.*-{what}.csv.gz", f"mimic-cxr-2.*-{what}.csv", depth=0)
    return [] if path is None else list(read_table(path, columns))
