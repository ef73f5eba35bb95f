"""RSNA Intracranial Hemorrhage: 25,312 head CTs as 874,035 loose slices.

Get: kaggle.com/c/rsna-intracranial-hemorrhage-detection (`stage_2_train/`, `stage_2_test/`, `stage_2_train.csv`).

Layout: as listed; the archive has one more folder of the same name around, a notebook `input/` too. Of the first stage
(`stage_1_*`, folders also `stage_1_train_images/`) all images are in the second, which is taken where both lie.

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

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.datasets.series import series_below
from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, Record, Split
from medformer.data.tables import read_table
from medformer.data.volumes import Volume

ABOUT = About(
    name="RSNA Intracranial Hemorrhage",
    folders=("rsna_ich", "rsna-intracranial-hemorrhage-detection", "RSNA-Intracranial-Hemorrhage"),
    source="https://www.kaggle.com/c/rsna-intracranial-hemorrhage-detection",
    layout="stage_2_train/ID_*.dcm next to stage_2_train.csv",
)
KINDS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
_PARTS: dict[str, Split] = {
    f"stage_{stage}_{part}{more}": part for stage in (2, 1) for part in ("train", "test") for more in ("", "_images")
}
_TABLES = ("stage_2_train.csv", "stage_2_train.csv.gz", "stage_1_train.csv", "stage_1_train.csv.gz")


def recognise(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in _PARTS)


def scan(root: str | Path) -> Records:
    """One record a series; `info["slices"]` maps each image to its labels. Raises ScanError where it is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    table = near.first(*_TABLES)
    labels = Join("labels of the train part", "slices", _TABLES, near, table, read_labels(table) if table else {})
    parts = [part for part in _PARTS if (folder / part).is_dir()]
    latest = parts[0][: len("stage_2")]
    notes = [f"{part} is left out: its images are in {latest} too" for part in parts if not part.startswith(latest)]
    records = []
    for part in (part for part in parts if part.startswith(latest)):
        tree = series_below(folder / part, near, ABOUT)
        notes += tree.notes
        for found, who in tree.found:
            names = [Path(f).stem for f in found.files]
            known = {name: labels.get(name) for name in names} if _PARTS[part] == "train" else {}
            of_slices = {name: states for name, states in known.items() if states is not None}
            records.append(
                Record(
                    dataset="rsna_ich", patient=who.patient, study=who.study, paths=found.files, modality="CT",
                    labels={kind: _any(of_slices, kind, len(found.files)) for kind in KINDS}, split=_PARTS[part],
                    info={"slices": of_slices}, scan=found,
                )
            )  # fmt: skip
    return reported(ABOUT, records, [labels], notes)


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
