"""Scans to try things out with, without a download: samples bundled in dependencies, and phantoms."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import replace
from importlib import resources
from pathlib import Path

from medformer.data.geometry import ScanError
from medformer.data.phantom import make_phantom
from medformer.data.scans import ScanIndex, Skipped, find_scans
from medformer.data.writing import write_dicom_series

__all__ = ["sample_scans"]

_PHANTOM_SEEDS = (0, 1, 2, 3)
# A new name for every change of the phantoms, so that an old cache is never taken for the new one.
_PHANTOMS = "synthetic-v1"
_BUNDLED = (
    ("nibabel", "tests/data", ("anatomical.nii", "example4d.nii.gz", "functional.nii")),
    ("pydicom", "data/test_files", ("CT_small.dcm", "MR_small.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm")),
)


def sample_scans(cache_dir: str | os.PathLike[str]) -> ScanIndex:
    """Real scans bundled with nibabel and pydicom, and four synthetic CT series written into cache_dir as DICOM.

    Names start with the package, or with "synthetic". Nothing is downloaded; a file that a package no longer
    ships, or whose compression has no decoder here, is listed in `skipped`.
    """
    phantoms = _phantoms(Path(cache_dir))
    scans, skipped = [], []
    for package, folder, files in _BUNDLED:
        for file in files:
            path = resources.files(package).joinpath(folder, file)
            if not isinstance(path, Path) or not path.is_file():
                skipped.append(Skipped(f"{package}/{file}", f"{file}: not shipped by this version of {package}"))
                continue
            try:
                found = find_scans(path, workers=0)
            except ScanError as error:
                skipped.append(Skipped(f"{package}/{file}", str(error)))
                continue
            scans += [replace(scan, name=f"{package}/{scan.name}") for scan in found.scans]
    found = find_scans(phantoms, workers=0)
    scans += [replace(scan, name=f"synthetic/{scan.name}") for scan in found.scans]
    return ScanIndex(scans=scans, skipped=skipped + found.skipped)


def _phantoms(cache: Path) -> Path:
    """Write the phantoms next to their final place and rename: the folder exists whole or not at all."""
    target = cache / _PHANTOMS
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    draft = cache / f".draft-{uuid.uuid4().hex}"
    try:
        for seed in _PHANTOM_SEEDS:
            write_dicom_series(make_phantom(seed), draft / f"phantom-{seed}")
        try:
            draft.rename(target)
        except OSError:
            # Another process was faster: its folder is just as whole.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
