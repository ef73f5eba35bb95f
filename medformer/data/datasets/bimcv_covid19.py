"""BIMCV-COVID19+ and -: X-rays and CTs of Valencian hospitals, BIDS-like.

Get: bimcv.cipf.es/bimcv-projects/bimcv-covid19 (tar parts of both; unpack them and their derivatives: of the positive
`covid19_posi_head.tar.gz`, of the negative `covid19_neg_derivative.tar.gz`).

Layout: `covid19_{posi,neg}/sub-S*/ses-E*/mod-*/`, `derivatives/labels/` in each; people also call them `bimcv+` and
`bimcv-`. The table of labels has had many names: `labels_covid_posi.tsv`, `labels_covid19_posi.tsv`,
`Labels_covid_123.tsv`, `Labels_covid_NEG_JAN21.tsv`, `labels_SARS-cov-2_nega.tsv`; all that are there are read. Their
ReportID is a session with or without `ses-`.

Quirks: X-rays are 16-bit PNG with their DICOM header next to them as `.json`, which may be missing or broken; it alone
says MONOCHROME1, which `repair` inverts; the `vp-` part of a name may be absent; label cells are Python lists; some CTs
exceed int16; ages are written "[80]".
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near, folders_in
from medformer.data.geometry import ScanError
from medformer.data.records import POSITIVE, UNCERTAIN, UNKNOWN, Record
from medformer.data.tables import has_columns, parse_literal, pick, read_table
from medformer.data.volumes import Volume

ABOUT = About(
    name="BIMCV-COVID19",
    folders=("bimcv_covid19", "BIMCV-COVID19"),
    also=("covid19_posi", "covid19_neg", "bimcv"),
    source="https://bimcv.cipf.es/bimcv-projects/bimcv-covid19",
    layout="[covid19_posi/]sub-S*/ses-E*/mod-*/*.png and *.nii.gz, derivatives/labels/*.tsv",
    loose=True,
)
_NAME = re.compile(r"sub-(?P<patient>S\d+)_ses-(?P<study>E\d+)(?P<rest>_.*)?\.(?P<type>png|nii\.gz)")
_VIEW, _ORDER = re.compile(r"_vp-([a-z-]+)"), {"cr": "CR", "dx": "DX", "ct": "CT"}
_TABLES = ("labels_*.tsv", "labels_*.tsv.gz", "labels_*.csv")
_MAX_JSON = 2**20


def recognise(folder: Path) -> bool:
    parts = [folder, *(child for child in folders_in(folder) if _side(child))]
    return any(True for part in parts for _ in part.glob("sub-S*/ses-E*"))


def _side(folder: Path) -> str:
    """Which of the two collections a folder is of, by its name or that of one around it."""
    for name in (folder.name.lower(), folder.parent.name.lower(), folder.parent.parent.name.lower()):
        if re.search(r"covid.*posi|bimcv.*(\+|posi)", name):
            return "positive"
        if re.search(r"covid.*neg|bimcv.*(-$|neg)", name):
            return "negative"
    return ""


def scan(root: str | Path) -> Records:
    """One record a file. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    labels = _labels(Near(folder, ABOUT))
    sides: dict[Path, str] = {}
    records, odd = [], 0
    for path in sorted([*folder.rglob("sub-*.png"), *folder.rglob("sub-*.nii.gz")]):
        match = _NAME.fullmatch(path.name)
        if match is None:
            odd += 1
            continue
        view = _VIEW.search(match["rest"] or "")
        kind = (match["rest"] or "").rpartition("_")[2]
        above = next((p for p in path.parents if p.name == f"sub-{match['patient']}"), path.parent).parent
        side = sides.setdefault(above, _side(above))
        records.append(
            Record(
                dataset="bimcv_covid19", patient=match["patient"], study=match["study"], paths=(str(path),),
                modality=_ORDER.get(kind, "unknown"), labels=labels.get(match["study"]) or {},
                info={"view": view[1] if view else "", "collection": side, "tags": read_sidecar(path)},
            )
        )  # fmt: skip
    return reported(ABOUT, records, [labels], [f"{odd} files not named sub-S*_ses-E* are left out"] if odd else [])


def _labels(near: Near) -> Join[str, dict[str, str]]:
    """Session to its findings, of every table of labels that is here."""
    columns = ["ReportID", "Labels"]
    tables = [t for t in near.all(*_TABLES, columns=columns) if has_columns(t, columns)]
    rows: dict[str, dict[str, str]] = {}
    for table in tables:
        for row in read_table(table, columns):
            rows[row["ReportID"].removeprefix("ses-")] = states_of(row["Labels"], table.name)
    return Join("labels", "sessions", _TABLES, near, tables, rows)


def states_of(cell: str, what: str) -> dict[str, str]:
    """The radiologist's findings: "exclude X" is negative, "unchanged"-like wording stays as written."""
    values = parse_literal(cell, what) if cell else []
    if not isinstance(values, list):
        raise ScanError(f"{what}: Labels {cell[:40]!r} is no list")
    out: dict[str, str] = {}
    for value in (str(v).strip() for v in values):
        if value.lower() == "normal":
            out["normal"] = POSITIVE
        elif value.lower() in {"exclude", "unchanged", ""}:
            continue
        elif value.lower().endswith("uncertain") and value.lower() != "uncertain":
            out[value[: -len("uncertain")].strip()] = UNCERTAIN
        else:
            out[value] = POSITIVE
    return out or {"findings": UNKNOWN}


def read_sidecar(path: Path) -> dict[str, str]:
    """The few header values reading needs, from the .json next to an image; empty where it is missing or broken."""
    beside = path.with_name(path.name.removesuffix(".nii.gz").removesuffix(".png") + ".json")
    try:
        if beside.stat().st_size > _MAX_JSON:
            return {}
        values: Any = json.loads(beside.read_text(encoding="utf-8", errors="strict"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    out = {}
    for name, tag in (("PhotometricInterpretation", "00280004"), ("BitsStored", "00280101")):
        value = values.get(name, values.get(tag))
        value = value.get("Value") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str | int) and len(str(value)) < 32:
            out[name] = str(value)
    return out


def repair(volume: Volume) -> Volume:
    """Invert MONOCHROME1, which PNG cannot tell, over the stored range that the sidecar gives."""
    tags = read_sidecar(Path(volume.source))
    if tags.get("PhotometricInterpretation") != "MONOCHROME1" or volume.voxels.dtype.kind != "u":
        return volume
    bits = int(tags["BitsStored"]) if tags.get("BitsStored", "").isdigit() else 8 * volume.voxels.dtype.itemsize
    top = max(2**bits - 1, int(volume.voxels.max()))
    voxels = (top - volume.voxels.astype(np.int64)).astype(volume.voxels.dtype)
    return replace(volume, voxels=voxels, notes=(*volume.notes, "MONOCHROME1 inverted over the stored range"))


def read_people(table: Path) -> dict[str, dict[str, Any]]:
    """participants.tsv: patient to age (the first of a list such as "[80]") and sex."""
    out = {}
    for row in read_table(table, ["participant"]):
        ages = parse_literal(row.get("age", "") or "[]", table.name)
        ages = ages if isinstance(ages, list) else [ages]
        name = row["participant"].removeprefix("sub-")
        age = ages[0] if ages else None
        if not isinstance(age, int | float | None):
            raise ScanError(f"{table.name}: age {row['age'][:20]!r} must be a number, or a list of them")
        out[name] = {"age": None if age is None else int(min(max(age, 0), 999)), "sex": pick(row, "gender", "sex")}
    return out
