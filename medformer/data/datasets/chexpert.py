"""CheXpert: 224,316 chest X-rays of 65,240 patients, labelled from reports.

Get: stanfordmlgroup.github.io/competitions/chexpert (`CheXpert-v1.0` or `-small`: JPEG, train.csv, valid.csv).

Quirks: paths in the tables start with the name of whichever root they were made for; a blank label is *not mentioned*
and not negative, -1 is uncertain: `as_targets` turns the states into numbers by a policy you name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from medformer.data.geometry import ScanError
from medformer.data.records import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN, About, Record, Split, find_file, state_of
from medformer.data.tables import read_table

ABOUT = About(
    name="CheXpert",
    folders=("chexpert", "CheXpert-v1.0", "CheXpert-v1.0-small", "CheXpert"),
    source="https://stanfordmlgroup.github.io/competitions/chexpert",
    layout="{train,valid}/patient*/study*/view*.jpg beside train.csv and valid.csv",
)
FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_PARTS: tuple[Split, ...] = ("train", "valid", "test")


def recognise(folder: Path) -> bool:
    return any((folder / part).is_dir() and any((folder / part).glob("patient*")) for part in _PARTS)


def scan(root: str | Path) -> list[Record]:
    """One record an image of the tables. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    records = []
    for part in _PARTS:
        table = find_file(folder, f"{part}.csv", depth=0)
        for row in read_table(table, ["Path", *FINDINGS]) if table else ():
            # .../CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
            parts = [p for p in row["Path"].split("/") if p not in {"", ".", ".."}]
            if len(parts) < 4 or not parts[-3].startswith("patient"):
                raise ScanError(f"{part}.csv: path {row['Path'][:60]!r} is not .../patient/study/view.jpg")
            records.append(
                Record(
                    dataset="chexpert", patient=parts[-3], study=f"{parts[-3]}/{parts[-2]}",
                    paths=(str(folder.joinpath(*parts[-4:])),), modality="DX", split=part,
                    labels={name: state_of(row[name]) for name in FINDINGS},
                    info={"view": row.get("AP/PA", "") or row.get("Frontal/Lateral", ""), "age": row.get("Age", "")},
                )
            )  # fmt: skip
    return records


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
