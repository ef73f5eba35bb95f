"""CT Images in COVID-19: 771 chest CTs of 661 patients, all with a positive test, as NIfTI.

Get: cancerimagingarchive.net/collection/ct-images-in-covid-19 (`CT_COVID-19_August2020.zip`); lung lesions of a
subset as COVID-19-20 (`*_ct.nii.gz`, `*_seg.nii.gz`).

Quirks: one file is one scan; the patient is the number, so `-0721_day008` and `-0318_1` are later scans of patients
0721 and 0318; there are no negatives.
"""

from __future__ import annotations

import re
from pathlib import Path

from medformer.data.records import POSITIVE, About, Record

ABOUT = About(
    name="CT Images in COVID-19",
    folders=("ct_images_in_covid19", "CT-Images-in-COVID-19", "CT_COVID-19_August2020"),
    source="https://www.cancerimagingarchive.net/collection/ct-images-in-covid-19",
    layout="volume-covid19-A-*.nii.gz",
)
_NAME = re.compile(r"volume-covid19-A-(?P<patient>\d{4})(?:_day(?P<day>\d+)|_(?P<repeat>\d+))?(?P<part>_ct)?\.nii\.gz")


def recognise(folder: Path) -> bool:
    return any(folder.glob("volume-covid19-A-*.nii.gz")) or any(folder.glob("*/volume-covid19-A-*.nii.gz"))


def scan(root: str | Path) -> list[Record]:
    """One record a scan. Raises ScanError where the data set is not there."""
    folder = ABOUT.folder(root, recognise)
    records = []
    for path in sorted(folder.rglob("volume-covid19-A-*.nii.gz")):
        if (match := _NAME.fullmatch(path.name)) is None:
            continue
        lesions = path.with_name(path.name.removesuffix("_ct.nii.gz").removesuffix(".nii.gz") + "_seg.nii.gz")
        records.append(
            Record(
                dataset="ct_images_in_covid19", patient=match["patient"], study=path.name.removesuffix(".nii.gz"),
                paths=(str(path),), modality="CT", labels={"covid-19": POSITIVE},
                info={
                    "day": int(match["day"]) if match["day"] else None,
                    "lesions": str(lesions) if lesions.is_file() else None,
                },
            )
        )  # fmt: skip
    return records
