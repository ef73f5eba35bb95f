"""Siemens mosaics and UIH grids: the slices of a volume tiled into one image, their true places in a private header.

Siemens: nibabel's documentation of the CSA header and the mosaic origin (nipy.org/nibabel/dicom/dicom_mosaic.html).
ImagePositionPatient is the corner that one slice as large as the whole mosaic would have, so it is moved by half
the difference; the direction from tile to tile is the CSA header's SliceNormalVector, whose sign no other tag holds.
UIH: the maker's answers in github.com/rordenlab/dcm2niix/issues/225: MRVFrameSequence has an item a tile, in the
order of the tiles, each with the ImagePositionPatient of its own corner.
"""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset

from medformer.data.geometry import ScanError

__all__ = ["MosaicPlaces", "cut_mosaic", "grid_places", "mosaic_places"]

_UIH = "Image Private Header"
_TILE_COUNT, _TILES = 0x50, 0x51  # of its private block: how many, and MRVFrameSequence
_MOST = 4096


@dataclass(frozen=True)
class MosaicPlaces:
    """Where the tiles lie and how large they are."""

    positions: list[tuple[float, float, float]]
    rows: int
    columns: int
    tiles: tuple[int, int]
    """Tiles down and across."""


def mosaic_places(ds: Dataset, name: str) -> MosaicPlaces:
    """Positions of all tiles in LPS mm. Raises ScanError where the private header does not tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel calls its DICOM readers experimental on import
        from nibabel.nicom import csareader
    try:
        header = csareader.get_csa_header(ds, "image")
        count = None if header is None else csareader.get_n_mosaic(header)
        normal = None if header is None else csareader.get_slice_normal(header)
    except (csareader.CSAReadError, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ScanError(f"{name}: Siemens mosaic whose CSA header does not parse; export the slices again") from error
    if not count or normal is None:
        raise ScanError(
            f"{name}: Siemens mosaic without the CSA header that says how many slices it holds and which way they run "
            "(anonymised away?); convert the original with dcm2niix"
        )
    tiles = math.ceil(math.sqrt(count))
    if not 1 <= count <= _MOST or ds.Rows % tiles or ds.Columns % tiles:
        raise ScanError(
            f"{name}: mosaic of {ds.Rows} x {ds.Columns} does not divide into {tiles} x {tiles} tiles ({count} slices)"
        )
    rows, columns = int(ds.Rows) // tiles, int(ds.Columns) // tiles
    corner, direction = np.array(ds.ImagePositionPatient, float), np.array(ds.ImageOrientationPatient, float)
    row_mm, col_mm = (float(v) for v in ds.PixelSpacing)
    step = float(ds.get("SpacingBetweenSlices") or ds.get("SliceThickness") or 0)
    length = float(np.linalg.norm(normal))
    across = abs(float(np.cross(direction[:3], direction[3:]) @ normal)) / length if length else 0.0
    if step <= 0 or across < 0.999:
        raise ScanError(
            f"{name}: mosaic with SpacingBetweenSlices {step:g} and a slice normal {across:.3f} along the image normal "
            "has no certain geometry; convert it with dcm2niix"
        )
    corner = corner + direction[:3] * col_mm * (int(ds.Columns) - columns) / 2
    corner = corner + direction[3:] * row_mm * (int(ds.Rows) - rows) / 2
    places = corner + np.arange(count)[:, None] * step * (np.asarray(normal, float) / length)
    return MosaicPlaces([(p[0], p[1], p[2]) for p in places.tolist()], rows, columns, (tiles, tiles))


def grid_places(ds: Dataset, name: str) -> MosaicPlaces:
    """The same for a UIH grid, whose rows of tiles may be fewer than its columns."""
    try:
        block = ds.private_block(0x0065, _UIH)
        items, declared = list(block[_TILES].value), int(float(str(block[_TILE_COUNT].value)))
        places = [tuple(float(v) for v in item.ImagePositionPatient) for item in items]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ScanError(
            f"{name}: UIH grid without the private sequence that says where its slices lie (anonymised away?); export "
            "it slice by slice, or convert the original with dcm2niix"
        ) from error
    count = len(places)
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across) if count else 0
    if count != declared or not 1 <= count <= _MOST or ds.Rows % down or ds.Columns % across:
        raise ScanError(
            f"{name}: UIH grid of {ds.Rows} x {ds.Columns} and {count} places for {declared} slices does not divide "
            f"into {down} x {across} tiles; convert it with dcm2niix"
        )
    if any(len(place) != 3 for place in places):
        raise ScanError(f"{name}: UIH grid with a slice whose ImagePositionPatient is malformed; the header is damaged")
    return MosaicPlaces(
        [(p[0], p[1], p[2]) for p in places], int(ds.Rows) // down, int(ds.Columns) // across, (down, across)
    )


def cut_mosaic(image: np.ndarray, tiles: tuple[int, int], count: int) -> np.ndarray:
    """(rows, columns) of tiles, left to right and top to bottom, to (count, rows / down, columns / across)."""
    down, across = tiles
    rows, columns = image.shape[0] // down, image.shape[1] // across
    cut = image.reshape(down, rows, across, columns).transpose(0, 2, 1, 3).reshape(-1, rows, columns)
    return cut[:count]
