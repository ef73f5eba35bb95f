"""CT Images in COVID-19: 771 chest CTs of 661 patients, all with a positive test, as NIfTI.

Get: cancerimagingarchive.net/collection/ct-images-in-covid-19 (`CT_COVID-19_August2020.zip`); lung lesions of a subset
as COVID-19-20 (`*_ct.nii.gz`, `*_seg.nii.gz`).

Layout: the files, or `COVID-19-20_v2/{Train,Validation}/` of the challenge, whose parts are the split where nothing
else lies there.

Quirks: one file is one scan; the patient is the number, so `-0721_day008` and `-0318_1` are later scans of patients
0721 and 0318; there are no negatives.
"""

from __future__ import annotations

import re
from pathlib import Path

from medformer.data.datasets.joins import Records, reported
from medformer.data.datasets.layout import About, folders_in
from medformer.data.records import POSITIVE, Record, Split

ABOUT = About(
    name="CT Images in COVID-19",
    folders=("ct_images_in_covid19", "CT-Images-in-COVID-19", "CT_COVID-19_August2020", "COVID-19-20"),
    source="https://www.cancerimagingarchive.net/collection/ct-images-in-covid-19",
    layout="volume-covid19-A-*.nii.gz",
    loose=True,
)
_NAME = re.compile(
    r"volume-covid19-A-(?P<patient>\d{4})(?:_day(?P<day>\d+)|_(?P<repeat>\d+))?(?P<part>_ct)?(?P<end>\.nii(\.gz)?)",
    re.I,
)
_FILES = "volume-covid19-A-*.nii*"
_SPLITS: dict[str, Split] = {"train": "train", "validation": "valid", "test": "test"}


def recognise(folder: Path) -> bool:
    parts = [folder, *(child for child in folders_in(folder) if child.name.lower() in _SPLITS)]
    return any(True for part in parts for _ in part.glob(_FILES))


def scan(root: str | Path) -> Records:
    """One record a scan. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    found = [(p, m) for p in sorted(folder.rglob(_FILES)) if (m := _NAME.fullmatch(p.name))]
    parted = all(match["part"] and path.parent.name.lower() in _SPLITS for path, match in found)
    records = []
    for path, match in found:
        lesions = path.with_name(
            path.name[: match.start("part") if match["part"] else match.start("end")] + "_seg.nii.gz"
        )
        records.append(
            Record(
                dataset="ct_images_in_covid19", patient=match["patient"], study=path.name[: match.start("end")],
                paths=(str(path),), modality="CT", labels={"covid-19": POSITIVE},
                split=_SPLITS[path.parent.name.lower()] if parted else None,
                info={
                    "day": int(match["day"]) if match["day"] else None,
                    "lesions": str(lesions) if lesions.is_file() else None,
                },
            )
        )  # fmt: skip
    others = sum(1 for p in folder.rglob(_FILES) if not _NAME.fullmatch(p.name) and not re.search("_seg", p.name, re.I))
    return reported(ABOUT, records, [], [f"{others} files named otherwise are left out"] if others else [])
