"""RSNA Intracranial Hemorrhage: 25,312 head CTs as 874,035 loose slices.

Get: kaggle.com/c/rsna-intracranial-hemorrhage-detection (`stage_2_train/`, `stage_2_test/`, `stage_2_train.csv`).

Quirks: one file is one slice, names are random and all lie in one folder, so series come from headers; the label
table is long (six rows a slice) and repeats four slices; `ID_6431af929.dcm` is cut off, which costs its series; some
12-bit files have wrapped around: air is stored at the top of the range with an intercept of about 0, which `repair`
undoes; the test labels are hidden.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from medformer.data.datasets.series import series_below
from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, About, Record, Split, find_file
from medformer.data.tables import read_table
from medformer.data.volumes import Volume

ABOUT = About(
    name="RSNA Intracranial Hemorrhage",
    folders=("rsna_ich", "rsna-intracranial-hemorrhage-detection", "RSNA-Intracranial-Hemorrhage"),
    source="https://www.kaggle.com/c/rsna-intracranial-hemorrhage-detection",
    layout="stage_2_train/ID_*.dcm beside stage_2_train.csv",
)
KINDS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
_PARTS: dict[str, Split] = {
    "stage_2_train": "train",
    "stage_1_train": "train",
    "stage_2_test": "test",
    "stage_1_test": "test",
}


def recognise(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in _PARTS)


def scan(root: str | Path) -> list[Record]:
    """One record a series; `info["slices"]` maps each image to its labels. Raises ScanError where it is not there."""
    folder = ABOUT.folder(root, recognise)
    table = find_file(folder, "stage_2_train.csv", "stage_1_train.csv", depth=1)
    slices = {} if table is None else read_labels(table)
    records = []
    for part in sorted(_PARTS):
        for found, who in series_below(folder / part) if (folder / part).is_dir() else ():
            of_slices = {Path(f).stem: slices[Path(f).stem] for f in found.files if Path(f).stem in slices}
            records.append(
                Record(
                    dataset="rsna_ich", patient=who.patient, study=who.study, paths=found.files, modality="CT",
                    labels={kind: _any(of_slices, kind, len(found.files)) for kind in KINDS}, split=_PARTS[part],
                    info={"slices": of_slices}, scan=found,
                )
            )  # fmt: skip
    return records


def read_labels(table: Path) -> dict[str, dict[str, str]]:
    """Slice to its six states. Repeated rows must agree."""
    out: dict[str, dict[str, str]] = defaultdict(dict)
    for row in read_table(table, ["ID", "Label"]):
        name, _, kind = row["ID"].rpartition("_")
        if kind not in KINDS or row["Label"] not in {"0", "1"}:
            raise ScanError(f"{table.name}: row {row['ID'][:40]!r}, {row['Label'][:10]!r} is no slice, kind and 0 or 1")
        state = POSITIVE if row["Label"] == "1" else NEGATIVE
        if out[name].setdefault(kind, state) != state:
            raise ScanError(f"{table.name}: {row['ID']} is both 0 and 1; download the table again")
    return dict(out)


def _any(slices: dict[str, dict[str, str]], kind: str, count: int) -> str:
    """Positive if any slice is; negative only if all slices were labelled."""
    states = [s.get(kind, UNKNOWN) for s in slices.values()]
    if POSITIVE in states:
        return POSITIVE
    return NEGATIVE if len(states) == count and set(states) == {NEGATIVE} else UNKNOWN


def repair(volume: Volume) -> Volume:
    """Unwrap 12-bit unsigned values stored with an intercept above -100: air belongs at -1000, not at +3000."""
    tags = volume.provenance.get("tags", {})
    intercept = float(tags.get("RescaleIntercept", "-1024"))
    if tags.get("BitsStored") != "12" or tags.get("PixelRepresentation") != "0" or intercept <= -100:
        return volume
    if volume.voxels.dtype.kind not in "iu" or float(tags.get("RescaleSlope", "1")) != 1:
        return volume
    stored = volume.voxels.astype(np.int32) - int(intercept)
    voxels = ((stored + 1000) % 4096 - 1000).astype(np.int16)
    return replace(volume, voxels=voxels, notes=(*volume.notes, "12-bit values unwrapped, intercept set to -1000"))
