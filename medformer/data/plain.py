"""Formats with no patient geometry of their own: .npy arrays and pictures."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass

import numpy as np
import PIL

from medformer.data.geometry import ScanError
from medformer.data.pictures import picture_size, read_picture, sniff_picture, split_page
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume, as_float32, odd_values

__all__ = ["PlainHeader", "probe_plain", "read_plain", "sniff_plain"]

# What numpy and ast raise on a header that is none.
_NPY_ERRORS = (ValueError, SyntaxError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class PlainHeader:
    """What a file declares, checked."""

    path: str
    kind: str
    """npy, png, jpeg, tiff or bmp."""
    shape: tuple[int, int, int]
    """(Z, Y, X); Z is 1 for a picture."""
    problem: str = ""
    """Why a picture cannot be read; its Y and X are 0 then."""


def sniff_plain(head: bytes) -> str | None:
    """npy, png, jpeg, tiff, bmp, or None."""
    return "npy" if head.startswith(b"\x93NUMPY") else sniff_picture(head)


def probe_plain(path: str) -> PlainHeader:
    """Read and check the header alone, of a picture or of a page such as `file.tif#2`."""
    with open(split_page(path)[0], "rb") as file:
        kind = sniff_plain(file.read(32))
    name = os.path.basename(path)
    if kind == "npy":
        shape, _ = _npy_header(path, name)
        return PlainHeader(path=path, kind=kind, shape=shape)
    if kind is None:
        raise ScanError(f"{name}: neither .npy nor a PNG, JPEG, TIFF or BMP picture")
    try:
        return PlainHeader(path=path, kind=kind, shape=(1, *picture_size(path)))
    except ScanError as error:
        return PlainHeader(path=path, kind=kind, shape=(1, 0, 0), problem=str(error))


def read_plain(path: str, *, colour: str = "refuse", modality: str | None = None) -> Volume:
    """The array or picture as stored. `colour` as in read_image."""
    header = probe_plain(path)
    name = os.path.basename(path)
    if header.problem:
        raise ScanError(header.problem)
    notes = ["no voxel size and no orientation in this format"]
    if header.kind == "npy":
        try:
            voxels = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError, TypeError, AttributeError, KeyError) as error:
            raise ScanError(f"{name}: voxels cannot be read ({error}); copy the file again") from error
        voxels = np.ascontiguousarray(voxels.reshape(header.shape))
        voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
        voxels = voxels.view(np.uint8) if voxels.dtype == bool else voxels
        if voxels.dtype.kind == "f":
            voxels = as_float32(voxels, name)
            notes += odd_values(voxels)
        reader = f"numpy {np.__version__}"
    else:
        voxels, changes = read_picture(path, colour=colour)
        notes += changes
        voxels, reader = voxels[None], f"pillow {PIL.__version__}"
    return Volume(
        voxels=voxels,
        affine=np.eye(4),
        modality=modality or "unknown",
        units="arbitrary",
        notes=tuple(notes),
        source=path,
        geometry="none",
        provenance={
            "format": header.kind.upper(), "reader": reader, "files": 1, "bytes": os.path.getsize(split_page(path)[0]),
            "tags": {}
        },
    )  # fmt: skip


def _npy_header(path: str, name: str) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape and type from numpy's text header, without numpy's own eval of long headers."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            width = 2 if version == (1, 0) else 4
            length = int.from_bytes(file.read(width), "little")
            if length > 10_000:
                raise ValueError(f"header of {length} bytes")
            values = ast.literal_eval(file.read(length).decode("latin1"))
            dtype, shape = np.dtype(values["descr"]), tuple(int(v) for v in values["shape"])
        except _NPY_ERRORS as error:
            raise ScanError(f"{name}: not a .npy array of numbers ({error}); save it with numpy.save") from error
        start = file.tell()
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise ScanError(f"{name}: array of {dtype}, must be real numbers; pickled objects are never read")
    if len(shape) not in {2, 3} or min(shape) < 1:
        raise ScanError(f"{name}: array of shape {shape}, a scan has 3 dimensions (Z, Y, X) and an image 2")
    needed = int(np.prod([int(v) for v in shape], dtype=object)) * dtype.itemsize
    if needed > MAX_VOLUME_BYTES or start + needed > size:
        raise ScanError(f"{name}: cut off or made up, {size:,} of {start + needed:,} bytes are here")
    z, y, x = shape if len(shape) == 3 else (1, *shape)
    return (z, y, x), dtype
