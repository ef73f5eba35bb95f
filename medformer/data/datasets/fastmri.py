"""fastMRI: raw k-space of knees, brains, prostates and breasts, with the fastMRI+ boxes.

Get: after signing the agreement at fastmri.med.nyu.edu; boxes from github.com/microsoft/fastmri-plus.

Layouts, found by the names of files and folders anywhere below the root:
- knee and brain: `knee_singlecoil_{train,val,test}.tar.xz`, `knee_multicoil_*`, `brain_multicoil_*_batch_*` unpack to
  `{singlecoil,multicoil}_{train,val,test,challenge}/*.h5` (people keep them in `knee/` and `brain/`, or in a folder
  named as the archive); fastMRI+ adds `Annotations/{knee,brain}.csv` and the lists of files that were looked at.
- prostate: `fastMRI_prostate_{T2,DIFF}_IDS_001_020/file_prostate_AX{T2,DIFF}_001.h5`; labels are PI-RADS by slice in
  `labels/{t2,dwi}_slice_level_labels.csv` (`fastmri_rawfile`, `slice`, `PIRADS`, `data_split`), from github.com/cai2r/
  fastMRI_prostate, whose own code calls a score above 2 positive.
- breast: `fastMRI_breast_IDS_001_010/fastMRI_breast_001_1.h5` (two parts an exam); `fastMRI_breast_labels.xlsx` or
  `breast_fastMRI_final.xlsx` with "Patient Coded Name", "Lesion status (0 = negative, 1= malignancy, 2= benign)", "Data
  split (0=training, 1=testing)" and "Repeated scans": exams of one number there are of one woman.
The DICOM versions are plain trees: use the adapter `folder`.

Quirks: one file is one patient's volume (T2 and diffusion of a prostate, and the parts of a breast, share a patient);
test and challenge files have no reference; boxes were drawn on pictures flipped upside down, and are turned back here;
a file in the list of reviewed files without a box is normal, a file outside it was never looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from medformer.data.datasets.joins import Join, Records, reported
from medformer.data.datasets.layout import About, Near
from medformer.data.fastmri import probe_fastmri
from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNKNOWN, Box, Record, Split
from medformer.data.tables import pick, read_sheet, read_table, same_name, whole

ABOUT = About(
    name="fastMRI",
    folders=("fastmri", "fastMRI", "fastMRI_dataset"),
    source="https://fastmri.med.nyu.edu (boxes: https://github.com/microsoft/fastmri-plus)",
    layout="{singlecoil,multicoil}_{train,val,test,challenge}/*.h5, fastMRI_prostate_*/*.h5, fastMRI_breast_*/*.h5",
    loose=True,
)
_SPLITS: dict[str, Split] = {"train": "train", "val": "valid", "test": "test", "challenge": "test"}
_PART = re.compile(
    r"(?:.*_)?(?P<coils>singlecoil|multicoil)_(?:brain_|knee_)?(?P<part>train|val|test|challenge)(?:\d|_.*)?", re.I
)
_PROSTATE = re.compile(r"file_prostate_AX(?P<kind>T2|DIFF)_(?P<patient>\d+)", re.I)
_BREAST = re.compile(r"fastMRI_breast_(?P<patient>\d+)(?:_\d+)?", re.I)
_RELEASE = re.compile(r"fastMRI_(prostate|breast)_.*", re.I)
_SLICES = {"T2": "t2_slice_level_labels.csv", "DIFF": "dwi_slice_level_labels.csv"}
_PROSTATE_SPLITS: dict[str, Split] = {"training": "train", "validation": "valid", "test": "test"}
_BREASTS = ("fastMRI_breast_labels*.xlsx", "breast_fastMRI_final*.xlsx", "fastMRI_breast_labels*.csv")
_PIRADS, _MALIGNANT = "PI-RADS 3 or more", "malignant"


def recognise(folder: Path) -> bool:
    return any(_is_part(place) for pattern in ("*", "*/*") for place in folder.glob(pattern) if place.is_dir())


def _is_part(folder: Path) -> bool:
    """A folder of files, known by its own name or theirs."""
    first = next(folder.glob("*.h5"), None)
    if first is None:
        return False
    named = _PART.fullmatch(folder.name) or _RELEASE.fullmatch(folder.name)
    return bool(named or _PROSTATE.fullmatch(first.stem) or _BREAST.fullmatch(first.stem))


def scan(root: str | Path) -> Records:
    """One record a file. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    near = Near(folder, ABOUT)
    plus, prostates, breasts = _Plus(near), {kind: _slices(near, kind) for kind in _SLICES}, _breasts(near)
    records, odd = [], 0
    for path in sorted(p for p in folder.rglob("*.h5") if not p.name.startswith(".")):
        common: dict[str, Any] = {"dataset": "fastmri", "study": path.stem, "paths": (str(path),), "modality": "MR"}
        part = next(
            (m for p in path.parents[: len(path.relative_to(folder).parts)] if (m := _PART.fullmatch(p.name))), None
        )
        if (match := _PROSTATE.fullmatch(path.stem)) is not None:
            rows = prostates[match["kind"].upper()].get(path.name) or {}
            records.append(
                Record(
                    **common, patient=f"prostate_{match['patient']}", labels={_PIRADS: rows.get("state", UNKNOWN)},
                    split=rows.get("split"),
                    info={"coils": "multicoil", "body_part": "prostate", "slices": rows.get("slices", {})},
                )
            )  # fmt: skip
        elif (match := _BREAST.fullmatch(path.stem)) is not None:
            row = breasts.get(f"fastmri_breast_{match['patient']}") or {}
            records.append(
                Record(
                    **common, patient=row.get("patient", f"breast_{match['patient']}"),
                    labels={_MALIGNANT: row.get("state", UNKNOWN)}, split=row.get("split"),
                    info={"coils": "multicoil", "body_part": "breast"},
                )
            )  # fmt: skip
        elif part is not None:
            brain = "brain" in path.stem or "brain" in "/".join(path.relative_to(folder.parent).parts[:-1]).lower()
            records.append(
                Record(
                    **common, patient=path.stem, labels=plus.labels.get(path.stem, {}),
                    split=_SPLITS[part["part"].lower()], boxes=plus.boxes_of(path),
                    info={"coils": part["coils"].lower(), "body_part": "brain" if brain else "knee"},
                )
            )  # fmt: skip
        else:
            odd += 1
    notes = [f"{odd} .h5 files in folders of no known part are left out"] if odd else []
    joins = [join for join in (*prostates.values(), breasts, *plus.joins) if join.asked]
    return reported(ABOUT, records, joins, notes)


class _Plus:
    """The annotations of fastMRI+: boxes, labels of whole studies, and which files were looked at."""

    def __init__(self, near: Near) -> None:
        self.labels: dict[str, dict[str, str]] = {}
        self.boxes: dict[str, list[Box]] = {}
        self.joins: list[Join[str, bool]] = []
        columns = ["file", "slice", "study_level", "x", "y", "width", "height", "label"]
        for part in ("knee", "brain"):
            table = near.first(f"{part}.csv", columns=columns)
            listed = near.first(f"{part}_file_list.csv", columns=["file"]) or near.first(
                f"{part}_file_list.csv", depth=4
            )
            reviewed: dict[str, bool] = {}
            for row in read_table(listed, names=["file"]) if listed is not None and table is not None else ():
                if row["file"] not in {"file", "filename"}:
                    reviewed[row["file"].removesuffix(".h5")] = True
            for row in read_table(table, columns) if table is not None else ():
                self._add(row, table.name if table else "", reviewed)
            looked = (f"{part}.csv", f"{part}_file_list.csv")
            self.joins.append(Join(f"fastMRI+ of the {part}", "files", looked, near, table, reviewed))

    def _add(self, row: dict[str, str], what: str, reviewed: dict[str, bool]) -> None:
        file = row["file"].removesuffix(".h5")
        reviewed[file] = True
        self.labels.setdefault(file, {})[row["label"]] = POSITIVE
        if row["study_level"].lower() in {"yes", "true", "1"}:
            return
        try:
            x, y, width, height = (float(row[k]) for k in ("x", "y", "width", "height"))
            box = Box(x=x, y=y, width=width, height=height, label=row["label"], slice=int(whole(row["slice"])))
        except ValueError as error:
            raise ScanError(f"{what}: box of {file[:40]} is no slice, x, y, width and height in numbers") from error
        self.boxes.setdefault(file, []).append(box)

    def boxes_of(self, path: Path) -> tuple[Box, ...] | None:
        """Turned from the upside-down pictures they were drawn on to the stored images; None where nobody looked."""
        join = self.joins["brain" in path.stem]
        if not join.get(path.stem):
            return None
        boxes = self.boxes.get(path.stem, [])
        if not boxes:
            return ()
        try:
            (_, rows, _), _ = probe_fastmri(str(path))
        except ScanError:
            return None  # the file cannot be read; neither can its boxes be placed
        return tuple(
            Box(x=b.x, y=rows - b.y - b.height, width=b.width, height=b.height, label=b.label, slice=b.slice)
            for b in boxes
        )


def _slices(near: Near, kind: str) -> Join[str, dict[str, Any]]:
    """File to the PI-RADS of its slices, the state of the whole and the official split."""
    table = near.first(_SLICES[kind])
    columns = ["fastmri_rawfile", "slice", "PIRADS", "data_split"]
    scores: dict[str, dict[int, int]] = defaultdict(dict)
    splits: dict[str, Split] = {}
    for row in read_table(table, columns) if table is not None else ():
        name = table.name if table is not None else ""
        score, number = whole(row["PIRADS"]), whole(row["slice"])
        if not (score.isdigit() and number.isdigit()) or row["data_split"].lower() not in _PROSTATE_SPLITS:
            raise ScanError(f"{name}: slice {number[:20]!r}, PIRADS {score[:20]!r}, split {row['data_split'][:20]!r}: "
                            "must be two whole numbers and training, validation or test")  # fmt: skip
        scores[row["fastmri_rawfile"]][int(number)] = int(score)
        splits[row["fastmri_rawfile"]] = _PROSTATE_SPLITS[row["data_split"].lower()]
    rows = {
        file: {"slices": of, "state": POSITIVE if max(of.values()) > 2 else NEGATIVE, "split": splits[file]}
        for file, of in scores.items()
    }
    return Join(f"PI-RADS of {kind}", "files", (_SLICES[kind],), near, table, rows)


def _breasts(near: Near) -> Join[str, dict[str, Any]]:
    """Exam to patient, state and official split. A woman who came again has one number in "Repeated scans"."""
    table = near.first(*_BREASTS)
    rows: dict[str, dict[str, Any]] = {}
    for row in read_sheet(table, ["Patient Coded Name"]) if table is not None else ():

        def start(text: str, row: dict[str, str] = row) -> str:
            """The column that begins so: the rest of its name explains its codes."""
            return whole(pick(row, *(name for name in row if same_name(name).startswith(text))))

        exam = row["Patient Coded Name"].casefold()
        again, status, part = start("repeated scans"), start("lesion status"), start("data split")
        rows[exam] = {
            "patient": f"breast_again_{again}" if again not in {"", "0"} else exam.replace("fastmri_", ""),
            "state": {"0": NEGATIVE, "1": POSITIVE, "2": NEGATIVE}.get(status, UNKNOWN),
            "split": {"0": "train", "1": "test"}.get(part),
        }
    # Where the official split itself parts a woman, her exams stay as they are named.
    parted: dict[str, set[Any]] = defaultdict(set)
    for row in rows.values():
        parted[row["patient"]].add(row["split"])
    for exam, row in rows.items():
        if len(parted[row["patient"]]) > 1:
            row["patient"] = exam.replace("fastmri_", "")
    return Join("lesions of the breast", "exams", _BREASTS, near, table, rows)
