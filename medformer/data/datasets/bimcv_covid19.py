"""BIMCV-COVID19+ and -: X-rays and CTs of Valencian hospitals, BIDS-like.

Get: bimcv.cipf.es/bimcv-projects/bimcv-covid19 (tar parts of both; unpack them and `derivatives/`).

Quirks: X-rays are 16-bit PNG whose DICOM header lies beside as `.json`, which may be missing or broken; only it tells
MONOCHROME1, which `repair` inverts; the `vp-` part of a name may be absent; label cells are Python lists; some CTs
exceed int16; ages are written "[80]".
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.records import POSITIVE, UNCERTAIN, UNKNOWN, About, Record, find_file
from medformer.data.tables import parse_literal, pick, read_table
from medformer.data.volumes import Volume

ABOUT = About(
    name="BIMCV-COVID19",
    folders=("bimcv_covid19", "BIMCV-COVID19"),
    source="https://bimcv.cipf.es/bimcv-projects/bimcv-covid19",
    layout="[covid19_posi/]sub-S*/ses-E*/mod-*/*.png and *.nii.gz, derivatives/labels/*.tsv",
)
_NAME = re.compile(r"sub-(?P<patient>S\d+)_ses-(?P<study>E\d+)(?P<rest>_.*)?\.(?P<type>png|nii\.gz)")
_VIEW, _ORDER = re.compile(r"_vp-([a-z-]+)"), {"cr": "CR", "dx": "DX", "ct": "CT"}
_MAX_JSON = 2**20


def recognise(folder: Path) -> bool:
    return any(folder.glob("sub-S*")) or any(folder.glob("covid19_*/sub-S*"))


def scan(root: str | Path) -> list[Record]:
    """One record a file. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    labels: dict[str, dict[str, str]] = {}
    for name in ("labels_covid_posi.tsv", "labels_covid_neg.tsv", "labels_covid19_posi.tsv", "labels_covid19_neg.tsv"):
        table = find_file(folder, name, depth=4)
        for row in read_table(table, ["ReportID", "Labels"]) if table else ():
            labels[row["ReportID"]] = states_of(row["Labels"], name)
    records = []
    for path in sorted([*folder.rglob("sub-*.png"), *folder.rglob("sub-*.nii.gz")]):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        view = _VIEW.search(match["rest"] or "")
        kind = (match["rest"] or "").rpartition("_")[2]
        side = (
            "positive" if "covid19_posi" in path.as_posix() else "negative" if "covid19_neg" in path.as_posix() else ""
        )
        records.append(
            Record(
                dataset="bimcv_covid19", patient=match["patient"], study=match["study"], paths=(str(path),),
                modality=_ORDER.get(kind, "unknown"), labels=labels.get(match["study"], {}),
                info={"view": view[1] if view else "", "collection": side, "tags": read_sidecar(path)},
            )
        )  # fmt: skip
    return records


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
    """The few header values reading needs, from the .json beside an image; empty where it is missing or broken."""
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
