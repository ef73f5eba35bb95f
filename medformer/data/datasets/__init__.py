"""One file a data set: what to download, how it lies on disk, and `scan(root)` to records.

Every module has ABOUT (its names, where to get it, its layout), `recognise(folder)` and `scan(root)`, which returns
`Records`: a list, with notes of what did not join; where files need mending, `repair(volume)`; where a file holds many
records, `read(record)`. Shared: `layout.py` finds folders and tables, `joins.py` counts what joins, `series.py` groups
DICOM.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from medformer.data.geometry import ScanError

__all__ = ["DATASETS", "adapter"]

DATASETS = (
    "fastmri",
    "nlst",
    "victre",
    "cmmd",
    "prostate_mri_us_biopsy",
    "lidc_idri",
    "ct_images_in_covid19",
    "rsna_ich",
    "mrnet",
    "siim_covid19",
    "bimcv_covid19",
    "chexpert",
    "mimic_cxr",
    "medmnist",
    "folder",
)


def adapter(name: str) -> ModuleType:
    """The module of a data set. Raises ScanError for a name that is none."""
    if name not in DATASETS:
        raise ScanError(f"data set {name!r} must be one of {', '.join(DATASETS)}")
    return import_module(f"medformer.data.datasets.{name}")
