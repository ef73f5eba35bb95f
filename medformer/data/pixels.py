"""Decoding DICOM pixels: stored values and padding, checked against what the header declares."""

from __future__ import annotations

import os
import struct

import numpy as np
import pydicom
from pydicom import encaps, filereader
from pydicom.dataset import FileDataset
from pydicom.multival import MultiValue
from pydicom.uid import UID

from medformer.data.dicom import NATIVE, PARSE_ERRORS, check_syntax, quiet, syntax_of
from medformer.data.geometry import ScanError

__all__ = ["read_pixels"]


def read_pixels(path: str) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Stored values (frames, rows, columns), the padding mask or None, and notes. Checks the file again."""
    name = os.path.basename(path)
    with open(path, "rb") as file, quiet():
        check_syntax(file, name)
        try:
            ds = pydicom.dcmread(file, force=True)
            syntax = syntax_of(ds)
            ds.file_meta.TransferSyntaxUID = UID(syntax)
            if syntax not in NATIVE:
                _check_stream(ds, name)
            frames = int(ds.get("NumberOfFrames") or 1)
            array = np.asarray(ds.pixel_array)
            expected = (int(ds.Rows), int(ds.Columns))
            if array.ndim == 2:
                array = array[None]
            if array.shape != (frames, *expected):
                raise ScanError(f"{name}: pixels decode to {array.shape}, header declares {(frames, *expected)}")
            return _unpack(ds, array)
        except ScanError:
            raise
        except (*PARSE_ERRORS, RuntimeError) as error:
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise ScanError(
                f"{name}: pixels do not decode ({UID(_syntax_or_blank(path)).name}: {reason}); if a codec is missing: "
                "pip install -e '.[codecs]'"
            ) from error


def _syntax_or_blank(path: str) -> str:
    try:
        return str(filereader.read_file_meta_info(path).get("TransferSyntaxUID") or "")
    except PARSE_ERRORS:
        return ""


def _check_stream(ds: FileDataset, name: str) -> None:
    """Size declared inside a JPEG or JPEG 2000 stream against the header, and the end-of-image marker."""
    data = bytes(ds.PixelData)
    rows, columns = int(ds.Rows), int(ds.Columns)
    frames = int(ds.get("NumberOfFrames") or 1)
    syntax = syntax_of(ds)
    if not syntax.startswith("1.2.840.10008.1.2.4.") or frames < 1:
        return
    for stream in encaps.generate_frames(data, number_of_frames=frames):
        size = _stream_size(stream)
        if size is not None and size != (rows, columns):
            raise ScanError(f"{name}: compressed image is {size[0]} x {size[1]}, header declares {rows} x {columns}")
        if b"\xff\xd9" not in stream[-16:]:
            raise ScanError(f"{name}: compressed image has no end marker, it is cut off; copy the file again")


def _stream_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) from the JPEG 2000 SIZ or the JPEG start-of-frame segment."""
    at = stream[:4096].find(b"\xff\x4f\xff\x51")
    if at >= 0 and len(stream) >= at + 24:
        x, y, x0, y0 = struct.unpack(">4L", stream[at + 8 : at + 24])
        return y - y0, x - x0
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker in {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}:
            rows, columns = struct.unpack(">HH", stream[at + 5 : at + 9])
            return rows, columns
        at += 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
    return None


def _unpack(ds: FileDataset, array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Keep the stored bits only, restore the sign, find the padding (PS3.5 8.1.1, PS3.3 C.7.5.1.1.2)."""
    allocated, stored = int(ds.BitsAllocated), int(ds.get("BitsStored") or ds.BitsAllocated)
    signed = int(ds.get("PixelRepresentation") or 0) == 1
    notes: tuple[str, ...] = ()
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if stored < allocated:
        # pydicom may have decoded to a wider type than allocated: go by its own width.
        width = array.dtype.itemsize * 8
        unsigned = np.dtype(f"u{array.dtype.itemsize}")
        kept = (array.view(unsigned) & unsigned.type((1 << stored) - 1)).astype(unsigned)
        if signed:
            left = width - stored
            kept = (kept << left).view(f"i{array.dtype.itemsize}") >> left
        if not np.array_equal(kept, array):
            notes = ("bits outside BitsStored masked off (overlays or unused)",)
        array = kept.astype(array.dtype, copy=False)
    return array, _padding(ds, array, allocated, signed), notes


def _padding(ds: FileDataset, array: np.ndarray, allocated: int, signed: bool) -> np.ndarray | None:
    value = _pad_value(ds, "PixelPaddingValue", allocated, signed)
    if value is None:
        return None
    limit = _pad_value(ds, "PixelPaddingRangeLimit", allocated, signed)
    low, high = sorted((value, value if limit is None else limit))
    mask = (array >= low) & (array <= high)
    return mask if mask.any() else None


def _pad_value(ds: FileDataset, tag: str, allocated: int, signed: bool) -> int | None:
    value = ds.get(tag)
    if value in (None, "") or isinstance(value, MultiValue):
        return None
    if isinstance(value, bytes):
        if len(value) != 2:
            return None
        value = int.from_bytes(value, "little" if ds.original_encoding[1] is not False else "big")
    number = int(value)
    # Often written with the other signedness: bring it to that of the pixels.
    if signed and number >= 1 << (allocated - 1):
        return number - (1 << allocated)
    if not signed and number < 0:
        return number + (1 << allocated)
    return number
