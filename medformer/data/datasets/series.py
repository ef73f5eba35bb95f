"""What the DICOM archives share: every series of a tree, grouped by header and never by path, with its identifiers.

NBIA's Retriever writes `manifest-*/<collection>/<patient>/<study>/<series>/*.dcm` with the folders' names either UIDs
("classic") or `MM-DD-YYYY-...` ("descriptive"), and `metadata.csv`, a row a series, next to the collection. IDC writes
`<collection_id>/<PatientID>/<StudyInstanceUID>/<Modality>_<SeriesInstanceUID>/*.dcm`, or one folder a series named by
its own UUID; its index is a table with `collection_id` and `SeriesInstanceUID`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from medformer.data.datasets.layout import About, Near, first_dicom
from medformer.data.dicom.identity import Identity, identity_of
from medformer.data.geometry import ScanError
from medformer.data.scans import Scan, find_scans
from medformer.data.tables import read_table

__all__ = ["Series", "is_here", "series_below"]

_MANIFESTS = ("metadata.csv",)
_INDEXES = ("idc_index*.csv", "idc_index*.csv.gz", "idc_index*.parquet")


@dataclass(frozen=True)
class Series:
    """What a tree of DICOM files holds of one data set."""

    found: list[tuple[Scan, Identity]]
    notes: list[str]
    """What was left out, and what the download's own list names and is not here."""


def series_below(folder: Path, near: Near, about: About, *, images: bool = False) -> Series:
    """Each DICOM scan of the data set with the identifiers of its first file."""
    notes: list[str] = []
    try:
        index = find_scans(folder, images=images)
    except ScanError as error:
        return Series([], [f"no scan can be read ({error})"])
    if refused := sum(skipped.refused for skipped in index.skipped):
        notes.append(f"{refused} files or series cannot be read and are left out; `inspect` says why")
    ours, indexed, others = _listed(near, about, notes)
    found, foreign, damaged = [], 0, 0
    for scan in index.scans:
        if scan.kind != "dicom" and (scan.kind != "image" or scan.files[0].lower().endswith((".png", ".jpg", ".jpeg"))):
            continue
        try:
            who = identity_of(scan.files[0])
        except ScanError:
            damaged += 1
            continue
        listed = who.series in ours or who.series in indexed
        if who.series in others or (about.patients and not listed and not about.is_patient(who.patient)):
            foreign += 1
        else:
            found.append((scan, who))
    if foreign:
        notes.append(f"{foreign} series of another collection (by PatientID or the download's list) are left out")
    if damaged:
        notes.append(f"{damaged} series with damaged headers are left out")
    here = {who.series for _, who in found}
    if lost := len(ours - here):
        # A list names radiographs, segmentations and reports too, which are no scans.
        notes.append(f"{_MANIFESTS[0]} lists {len(ours)} series, of which {lost} are not here or are no scans")
    return Series(found, notes)


def _listed(near: Near, about: About, notes: list[str]) -> tuple[set[str], set[str], set[str]]:
    """Series of this data set in NBIA's list of a download and in IDC's index of everything, and series of others."""
    ours: set[str] = set()
    indexed: set[str] = set()
    others: set[str] = set()
    for path in near.all(*_MANIFESTS, *_INDEXES, depth=2):
        nbia = path.name.casefold() in _MANIFESTS
        series, collection = ("Series UID", "Collection") if nbia else ("SeriesInstanceUID", "collection_id")
        try:
            for row in read_table(path, [series, collection]):
                mine = about.named(Path(row[collection] or "-"))
                (others if not mine else ours if nbia else indexed).add(row[series])
        except ScanError as error:
            notes.append(f"the download's list is not used: {error}")
    return ours, indexed, others


def is_here(folder: Path, about: About, *tables: str) -> bool:
    """Whether a tree of DICOM files is this data set: by its name, its tables or the download's list."""
    inside = Near(folder, about)
    inside.around.clear()
    known = about.named(folder) or inside.first(*tables, depth=2) is not None
    known = known or any(about.is_patient(entry.name) for entry in os.scandir(folder))
    if not known and inside.first(*_MANIFESTS, *_INDEXES, depth=0) is not None:
        known = any(_listed(inside, about, [])[:2])
    return known and first_dicom(folder) is not None
