"""What the DICOM archives share: every series of a tree, grouped by header and never by path, with its identifiers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from medformer.data.dicom.identity import Identity, identity_of
from medformer.data.geometry import ScanError
from medformer.data.scans import Scan, find_scans

__all__ = ["has_dicom", "series_below"]


def series_below(folder: Path, *, images: bool = False, workers: int | None = None) -> Iterator[tuple[Scan, Identity]]:
    """Each DICOM scan with the identifiers of its first file. What cannot be read is left to `inspect` to tell."""
    try:
        index = find_scans(folder, images=images, workers=workers)
    except ScanError:
        return
    for scan in index.scans:
        if scan.kind == "dicom" or (scan.kind == "image" and not scan.files[0].lower().endswith((".png", ".jpg"))):
            try:
                yield scan, identity_of(scan.files[0])
            except ScanError:
                continue


def has_dicom(folder: Path, *, files: int = 2000) -> bool:
    """Whether one of the first few files is DICOM."""
    from medformer.data.dicom.headers import sniff_dicom

    for number, path in enumerate(folder.rglob("*")):
        if number > files:
            return False
        if path.is_file():
            with path.open("rb") as file:
                if sniff_dicom(file.read(352)):
                    return True
    return False
