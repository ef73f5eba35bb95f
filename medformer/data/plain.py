"""Formats with no patient geometry of their own: .npy arrays, and PNG and JPEG pictures of 8 and 16 bits."""

from __future__ import annotations

import ast
import os
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image

from medformer.data.dicom.planar import grey_of
from medformer.data.geometry import ScanError
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume

__all__ = ["PlainHeader", "probe_plain", "read_plain", "sniff_plain"]

_MAX_PIXELS = 2**28
_MAGIC = {b"\x93NUMPY": "npy", b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
# What numpy and ast raise on a header that is none.
_NPY_ERRORS = (ValueError, SyntaxError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError)
# What Pillow raises on damage (found by altering bytes).
_PICTURE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError, EOFError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_MODES = {"L", "I;16", "I;16B", "I", "1", "LA", "RGB", "RGBA", "P", "CMYK", "F"}


@dataclass(frozen=True, kw_only=True)
class PlainHeader:
    """What a file declares, checked."""

    path: str
    kind: str
    """npy, png or jpeg."""
    shape: tuple[int, int, int]
    """(Z, Y, X); Z is 1 for a picture."""


def sniff_plain(head: bytes) -> str | None:
    """npy, png, jpeg, or None."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


def probe_plain(path: str) -> PlainHeader:
    """Read and check the header alone."""
    with open(path, "rb") as file:
        kind = sniff_plain(file.read(16))
    name = os.path.basename(path)
    if kind == "npy":
        shape, _ = _npy_header(path, name)
        return PlainHeader(path=path, kind=kind, shape=shape)
    if kind is None:
        raise ScanError(f"{name}: neither .npy nor PNG nor JPEG")
    with _open(path, name) as image:
        return PlainHeader(path=path, kind=kind, shape=(1, image.height, image.width))


def read_plain(path: str, *, colour: str = "refuse", modality: str | None = None) -> Volume:
    """The array or picture as stored. `colour` as in read_image."""
    header = probe_plain(path)
    name = os.path.basename(path)
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
            if not np.isfinite(voxels).all():
                raise ScanError(f"{name}: voxels are NaN or infinite, all must be finite; replace them first")
            voxels = voxels.astype(np.float32)
        reader = f"numpy {np.__version__}"
    else:
        voxels, note = _pixels(path, name, colour)
        notes += [note] if note else []
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
            "format": header.kind.upper(), "reader": reader, "files": 1, "bytes": os.path.getsize(path), "tags": {}
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


def _open(path: str, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures: the limit below is ours
            image = Image.open(path, formats=["PNG", "JPEG"])
    except _PICTURE_ERRORS as error:
        raise ScanError(f"{name}: picture cannot be read ({type(error).__name__}); copy the file again") from error
    # Deflate makes at most 1032 bytes of one, JPEG about 2000 pixels of one (an 8 x 8 block in a few bits).
    most = min(_MAX_PIXELS, 4096 * os.path.getsize(path))
    if image.width * image.height > most:
        image.close()
        raise ScanError(
            f"{name}: {image.width} x {image.height} pixels declared in {os.path.getsize(path):,} bytes, at most "
            f"{most:,} are decoded; the header is damaged or made up"
        )
    return image


def _pixels(path: str, name: str, colour: str) -> tuple[np.ndarray, str]:
    with _open(path, name) as image:
        mode = image.mode
        if mode not in _MODES:
            raise ScanError(f"{name}: picture of mode {mode}; save it as 8 or 16 bit grey")
        if mode in {"RGB", "RGBA", "LA"} and ";16" in str(getattr(image, "tile", "")):
            raise ScanError(f"{name}: 16-bit colour, which Pillow cuts to 8 bits; save it as 16-bit grey")
        try:
            if mode in {"P", "CMYK", "RGBA", "LA", "1"}:
                image = image.convert({"LA": "L", "1": "L"}.get(mode, "RGB"))
            values = np.asarray(image)
        except _PICTURE_ERRORS as error:
            raise ScanError(f"{name}: picture is cut off or damaged ({type(error).__name__}); copy it again") from error
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.ndim == 3:
        return grey_of(values, colour, name, "RGB")
    if values.dtype == np.int32:  # how Pillow opens some 16-bit pictures
        values = values.astype(np.uint16) if values.min() >= 0 and values.max() <= 65535 else values
    return np.ascontiguousarray(values), ""
