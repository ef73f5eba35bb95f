"""MIMIC-CXR: 377,110 chest X-rays of 227,835 studies, as DICOM (MIMIC-CXR) or JPEG (MIMIC-CXR-JPG).

Get: physionet.org/content/mimic-cxr and mimic-cxr-jpg after credentialing.

Layout: `files/p10/p10000032/s50414267/<dicom_id>.{dcm,jpg}` and, with the JPG version only, `mimic-cxr-2.0.0-{chexpert,
negbio,metadata,split}.csv.gz`, so named in release 2.1.0 too, which adds `mimic-cxr-2.1.0-test-set-labeled.csv` (by
radiologists; keyed by study alone, "Airspace Opacity" for "Lung Opacity"). By wget both lie below
`physionet.org/files/{mimic-cxr,mimic-cxr-jpg}/<version>/`: the tables of the one are those of the other's images.

Quirks: labels are those of a *study*, so joining on (subject, study) gives every image of it the same; both versions
share names, and a root may hold either or both: DICOM is preferred. The radiologists' labels are in
`info["radiologists"]`.
"""

from __future__ import annotations

import re
from pathlib import Path

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near, folders_in
from medformer.data.geometry import ScanError
from medformer.data.records import UNKNOWN, Record, Split, state_of
from medformer.data.tables import read_table

ABOUT = About(
    name="MIMIC-CXR",
    folders=("mimic_cxr", "mimic-cxr", "mimic-cxr-jpg", "MIMIC-CXR", "MIMIC-CXR-JPG"),
    source="https://physionet.org/content/mimic-cxr and https://physionet.org/content/mimic-cxr-jpg",
    layout="[files/]p1?/p1???????/s????????/*.{dcm,jpg} with mimic-cxr-2.*-{chexpert,split}.csv.gz next to it",
    loose=True,
)
_SPLITS: dict[str, Split] = {"train": "train", "validate": "valid", "test": "test"}
_DEEP = 3  # physionet.org/files/<name>/<version>


def recognise(folder: Path) -> bool:
    return _images_in(folder) is not None or any(_images_in(f) is not None for f in _versions(folder))


def _images_in(folder: Path) -> Path | None:
    """The folder of p10 to p19 in or at `folder`."""
    for place in (folder / "files", folder):
        if place.is_dir() and any(re.fullmatch(r"p1\d", p.name) and p.is_dir() for p in place.glob("p1[0-9]")):
            return place
    return None


def _versions(folder: Path) -> list[Path]:
    """Releases below `folder`: <name>/<version>/ of names of ours."""
    level, out = [folder], []
    for _ in range(_DEEP):
        level = [f for place in level for f in folders_in(place) if not re.fullmatch(r"p1\d", f.name)]
        out += [f for f in level if _images_in(f) is not None and (ABOUT.named(f) or ABOUT.named(f.parent))]
    return out


def scan(root: str | Path) -> Records:
    """One record an image. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    splits, split_of = _table(near, "split", ["dicom_id", "split"], "official split", "images")
    for row in splits:
        if row["split"] not in _SPLITS:
            raise ScanError(f"mimic-cxr split table: split {row['split'][:20]!r} must be one of {', '.join(_SPLITS)}")
        split_of.rows[row["dicom_id"]] = _SPLITS[row["split"]]
    view_rows, views = _table(near, "metadata", ["dicom_id"], "views", "images", ["ViewPosition"])
    views.rows.update({row["dicom_id"]: row.get("ViewPosition", "") for row in view_rows})
    label_rows, labels = _table(near, "chexpert", ["subject_id", "study_id"], "labels", "studies")
    if not labels.files:
        label_rows, labels = _table(near, "negbio", ["subject_id", "study_id"], "labels", "studies")
        labels.looked = (*_names("chexpert"), *_names("negbio"))
    names: list[str] = []
    for row in label_rows:
        names = names or [k for k in row if k not in {"subject_id", "study_id"}]
        labels.rows[row["subject_id"], row["study_id"]] = {name: state_of(row[name]) for name in names}
    read_by_people = _radiologists(near)
    records = []
    for name, path in sorted(_images(folder, Path(root)).items(), key=lambda item: str(item[1])):
        subject, study = path.parts[-3].removeprefix("p"), path.parts[-2].removeprefix("s")
        info = {"view": views.get(name) or ""}
        if study in read_by_people:
            info["radiologists"] = read_by_people[study]
        records.append(
            Record(
                dataset="mimic_cxr", patient=subject, study=study, paths=(str(path),), modality="DX",
                split=split_of.get(name), info=info,
                labels=labels.get((subject, study)) or dict.fromkeys(names, UNKNOWN),
            )
        )  # fmt: skip
    return reported(ABOUT, records, [split_of, labels, *([views] if views.files else [])])


def _images(folder: Path, root: Path) -> dict[str, Path]:
    """Every image below the root by its name; of both versions the DICOM."""
    found = [folder, *_versions(folder), *_versions(root)]
    places = dict.fromkeys(p for f in found if (p := _images_in(f)) is not None)
    out: dict[str, Path] = {}
    for suffix in ("png", "jpg", "dcm"):  # the last wins
        out |= {p.stem: p for place in places for p in place.glob(f"p??/p*/s*/*.{suffix}")}
    return out


def _names(what: str) -> tuple[str, ...]:
    return f"mimic-cxr-2.*-{what}.csv.gz", f"mimic-cxr-2.*-{what}.csv", f"mimic-cxr-2.*-{what}.parquet"


def _table(
    near: Near, what: str, columns: list[str], meaning: str, unit: str, optional: list[str] | None = None
) -> tuple[list[dict[str, str]], Join]:
    path = near.first(*_names(what))
    rows = [] if path is None else list(read_table(path, columns, optional=optional or ()))
    return rows, Join(meaning, unit, _names(what), near, path, {})


def _radiologists(near: Near) -> dict[str, dict[str, str]]:
    """Study to what radiologists found, of the 687 studies of release 2.1.0's labelled test set."""
    path = near.first("mimic-cxr-2.*-test-set-labeled.csv", "mimic-cxr-2.*-test-set-labeled.csv.gz")
    return {
        row["study_id"]: {
            "Lung Opacity" if name == "Airspace Opacity" else name: state_of(value)
            for name, value in row.items() if name not in {"subject_id", "study_id", ""}
        }
        for row in (read_table(path, ["study_id"]) if path is not None else ())
    }  # fmt: skip
