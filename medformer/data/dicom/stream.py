"""What a JPEG, JPEG-LS or JPEG 2000 stream says of itself: size, precision, sign, coding. It outranks the header.

Source: ITU-T T.81 B.2.2 (frame header), T.87 C.2.2 (JPEG-LS), T.800 A.4 and A.5.1 (tile-parts, SIZ).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pydicom import encaps
from pydicom.dataset import FileDataset
from pydicom.uid import UID

from medformer.data.geometry import ScanError

__all__ = ["Stream", "check_streams"]

_JPEG = "1.2.840.10008.1.2.4."
_CODINGS = {
    _JPEG + "50": "JPEG", _JPEG + "51": "JPEG", _JPEG + "57": "JPEG lossless", _JPEG + "70": "JPEG lossless",
    _JPEG + "80": "JPEG-LS", _JPEG + "81": "JPEG-LS", _JPEG + "90": "JPEG 2000", _JPEG + "91": "JPEG 2000",
    _JPEG + "92": "JPEG 2000", _JPEG + "93": "JPEG 2000", _JPEG + "201": "HTJ2K", _JPEG + "202": "HTJ2K",
    _JPEG + "203": "HTJ2K",
}  # fmt: skip
# The transfer syntax whose decoder takes any stream of a coding.
_ANY = {
    "JPEG": _JPEG + "51", "JPEG lossless": _JPEG + "57", "JPEG-LS": _JPEG + "81", "JPEG 2000": _JPEG + "91",
    "HTJ2K": _JPEG + "203",
}  # fmt: skip
_FRAMES = {0xC0: "JPEG", 0xC1: "JPEG", 0xC2: "JPEG", 0xC3: "JPEG lossless", 0xF7: "JPEG-LS"}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What all frames of a file share."""

    syntax: str
    """The transfer syntax to decode by."""
    precision: int = 0
    """Bits a value; 0 where the coding does not say (RLE)."""
    signed: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Frame:
    rows: int
    columns: int
    precision: int
    signed: bool
    components: int
    coding: str
    whole: bool
    """Whether it ends with its end marker, padding behind it aside."""


def check_streams(ds: FileDataset, syntax: str, name: str) -> Stream:
    """Read every frame's own header. Raises ScanError where one is cut off or contradicts the size in the header."""
    if syntax not in _CODINGS:
        return Stream(syntax=syntax)
    found: set[tuple[int, bool, str]] = set()
    samples = int(ds.get("SamplesPerPixel") or 1)
    for data in encaps.generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames") or 1)):
        frame = _frame(data)
        if frame is None:
            raise ScanError(f"{name}: compressed image is no JPEG, JPEG-LS or JPEG 2000 stream; copy the file again")
        if (frame.rows, frame.columns) != (int(ds.Rows), int(ds.Columns)):
            raise ScanError(
                f"{name}: compressed image is {frame.rows} x {frame.columns}, header declares {ds.Rows} x {ds.Columns}"
            )
        if frame.components != samples:
            raise ScanError(
                f"{name}: compressed image has {frame.components} values a pixel, SamplesPerPixel says {samples}"
            )
        if not frame.whole:
            raise ScanError(f"{name}: compressed image has no end marker, it is cut off; copy the file again")
        if not 1 <= frame.precision <= 32:
            raise ScanError(f"{name}: compressed image of {frame.precision} bits a value, must be 1 to 32")
        found.add((frame.precision, frame.signed, frame.coding))
    if len(found) != 1:
        raise ScanError(f"{name}: frames coded in {len(found)} ways (bits, sign, coding) in one file; convert it")
    precision, signed, coding = found.pop()
    if coding == _CODINGS[syntax]:
        return Stream(syntax=syntax, precision=precision, signed=signed)
    note = f"coded as {coding}, the transfer syntax says {UID(syntax).name}: stream believed"
    return Stream(syntax=_ANY[coding], precision=precision, signed=signed, notes=(note,))


def _frame(data: bytes) -> _Frame | None:
    try:
        at = data[:4096].find(b"\xff\x4f\xff\x51")
        return _jpeg2000(data, at) if at >= 0 else _jpeg(data)
    except (struct.error, IndexError):
        return None


def _jpeg2000(data: bytes, at: int) -> _Frame:
    x, y, x0, y0 = struct.unpack(">4L", data[at + 8 : at + 24])
    components, depth = struct.unpack(">HB", data[at + 40 : at + 43])
    coding, whole = _tiles(data, at + 2)
    return _Frame(y - y0, x - x0, (depth & 0x7F) + 1, depth >= 0x80, components, coding, whole)


def _tiles(data: bytes, start: int) -> tuple[str, bool]:
    """Whether it is HTJ2K, and whether the chain of tile-parts leads to the end marker."""
    coding = "JPEG 2000"
    while data[start : start + 2] != b"\xff\x90":  # the main header, up to the first tile-part
        if start + 4 > len(data) or data[start] != 0xFF:
            return coding, False
        coding = "HTJ2K" if data[start + 1] == 0x50 else coding  # CAP, part 15
        start += 2 + struct.unpack(">H", data[start + 2 : start + 4])[0]
    while data[start : start + 2] == b"\xff\x90" and start + 12 <= len(data):
        length = struct.unpack(">L", data[start + 6 : start + 10])[0]
        if length < 14:  # 0: to the end. No code word is FF90 or more, so FFD9 ends it.
            return coding, data.find(b"\xff\xd9", start + 12) >= 0
        start += length
    return coding, data[start : start + 2] == b"\xff\xd9"


def _jpeg(data: bytes) -> _Frame | None:
    at, found = 2, None
    while data[:2] == b"\xff\xd8" and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _FRAMES:
            precision, rows, columns, components = struct.unpack(">BHHB", data[at + 4 : at + 10])
            found = (rows, columns, precision, components, _FRAMES[marker])
        at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        if marker == 0xDA:
            break
    if found is None:
        return None
    rows, columns, precision, components, coding = found
    # In coded data FF is followed by 00 or a restart marker (JPEG-LS: below 80), so FFD9 is the end.
    return _Frame(rows, columns, precision, False, components, coding, data.find(b"\xff\xd9", at) >= 0)
