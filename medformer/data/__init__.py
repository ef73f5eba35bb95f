"""3D scans: reading, indexing and scaling them, and a synthetic one for trying things out."""

from medformer.data.geometry import ScanError
from medformer.data.intensity import normalise
from medformer.data.phantom import make_phantom, write_dicom_series
from medformer.data.samples import sample_scans
from medformer.data.scans import Scan, ScanIndex, Skipped, find_scans, read_volume
from medformer.data.volumes import Volume

__all__ = [
    "Scan",
    "ScanError",
    "ScanIndex",
    "Skipped",
    "Volume",
    "find_scans",
    "make_phantom",
    "normalise",
    "read_volume",
    "sample_scans",
    "write_dicom_series",
]
