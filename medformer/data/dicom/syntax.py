"""What can be said of a DICOM file before its pixels are decoded: transfer syntax, sizes, and whether all is there."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pydicom import config, filereader
from pydicom.dataset import FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medformer.data.geometry import ScanError
from medformer.data.volumes import MAX_VOLUME_BYTES

__all__ = ["NATIVE", "PARSE_ERRORS", "check_syntax", "pixel_problem", "quiet", "syntax_of"]

_DEFLATED = {str(DeflatedExplicitVRLittleEndian), "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
NATIVE = {str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian), str(ExplicitVRBigEndian)}
_MAX_FRAME_VOXELS = 2**26
# Decode budget of a compressed file: so much is always allowed, and so many times its size.
_FREE_BYTES, _MAX_RATIO = 2**26, 4000
# What pydicom raises on a damaged data set (found by cutting and flipping bytes of real files).
PARSE_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    RecursionError,
    MemoryError,
    struct.error,
)


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns of harmless deviations from the standard in most real files."""
    level = config.logger.level
    config.logger.setLevel(100)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.logger.setLevel(level)


def check_syntax(file: BinaryIO, name: str) -> None:
    """Refuse deflated files before pydicom inflates them without bound; leaves the file at its start."""
    file.seek(0)
    try:
        filereader.read_preamble(file, force=True)
        meta = filereader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        syntax = str(meta.get("TransferSyntaxUID") or "")
    except PARSE_ERRORS as error:
        raise ScanError(f"{name}: DICOM header is damaged ({type(error).__name__}); copy the file again") from error
    finally:
        file.seek(0)
    if syntax in _DEFLATED:
        raise ScanError(
            f"{name}: deflated transfer syntax ({syntax}) may inflate without bound and is not read; convert it to "
            "Explicit VR Little Endian (dcmconv +te)"
        )


def pixel_problem(ds: FileDataset, file: BinaryIO, end: int, size: int, name: str) -> str | None:
    """What is wrong with the pixel data behind the header, without reading it."""
    if "Rows" not in ds or "Columns" not in ds:
        return None
    little = ds.original_encoding[1] is not False
    file.seek(end)
    head = file.read(12)
    tag = struct.unpack("<HH" if little else ">HH", head[:4]) if len(head) >= 8 else None
    if tag in {(0x7FE0, 0x0008), (0x7FE0, 0x0009)}:
        return f"{name}: floating-point pixel data is not read; convert it to integers"
    if tag != (0x7FE0, 0x0010):
        return f"{name}: no pixel data: cut off, or stored elsewhere; copy the file again"
    allocated, frames = int(ds.get("BitsAllocated") or 0), int(ds.get("NumberOfFrames") or 1)
    if allocated not in {8, 16, 32}:
        return f"{name}: BitsAllocated {allocated} must be 8, 16 or 32"
    stored = int(ds.get("BitsStored") or allocated)
    if not 1 <= stored <= allocated:
        return f"{name}: BitsStored {stored} and BitsAllocated {allocated} do not fit; fix the header"
    voxels = int(ds.Rows) * int(ds.Columns) * int(ds.get("SamplesPerPixel") or 1)
    if str(ds.get("PhotometricInterpretation") or "").strip() == "YBR_FULL_422" and syntax_of(ds) in NATIVE:
        voxels = int(ds.Rows) * int(ds.Columns) * 2  # chroma is stored for every other column (PS3.3 C.7.6.3.1.2)
    if voxels < 1 or voxels * frames * allocated // 8 > MAX_VOLUME_BYTES:
        return f"{name}: {ds.Rows} x {ds.Columns} x {frames} voxels are out of range; the header is damaged"
    needed = voxels * frames * allocated // 8
    syntax = syntax_of(ds)
    explicit = not ds.original_encoding[0]
    start = end + (12 if explicit else 8)
    length = struct.unpack("<L" if little else ">L", head[8:12] if explicit else head[4:8])[0]
    if syntax in NATIVE:
        if length == 0xFFFFFFFF:
            return f"{name}: pixel data of undefined length in an uncompressed file; the header is damaged"
        if length < needed or size - start < needed:
            here = max(0, min(length, size - start))
            return f"{name}: cut off, {here:,} of {needed:,} bytes of pixels are here; copy the file again"
        if length >= needed + voxels * allocated // 8:
            return (
                f"{name}: {length:,} bytes of pixels, header declares {needed:,}; fix Rows, Columns or NumberOfFrames"
            )
        return None
    if voxels > _MAX_FRAME_VOXELS:
        return f"{name}: compressed frame of {ds.Rows} x {ds.Columns}, at most {_MAX_FRAME_VOXELS:,} voxels are decoded"
    if not _decodable(syntax):
        return f"{name}: no decoder for {UID(syntax).name} ({syntax}); install them with: pip install -e '.[codecs]'"
    if needed > max(_FREE_BYTES, _MAX_RATIO * (size - start)):
        return (
            f"{name}: {needed:,} bytes of pixels declared for {size - start:,} compressed ones, at most {_MAX_RATIO:,} "
            "to 1 are decoded; the header is damaged or made up"
        )
    if not _fragments_whole(file, start, size, frames):
        return f"{name}: compressed pixel data is cut off; copy the file again"
    return None


def syntax_of(ds: FileDataset) -> str:
    declared = str(ds.file_meta.get("TransferSyntaxUID") or "")
    # A wrong label on an uncompressed file is found by pydicom while parsing; believe what it found.
    if declared and UID(declared).is_transfer_syntax and declared not in NATIVE:
        return declared
    implicit, little = ds.original_encoding
    if little is False:
        return str(ExplicitVRBigEndian)
    return str(ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)


def _decodable(syntax: str) -> bool:
    try:
        return bool(get_decoder(UID(syntax)).is_available)
    except NotImplementedError:
        return False


def _fragments_whole(file: BinaryIO, start: int, size: int, frames: int) -> bool:
    """Whether the chain of fragments (PS3.5 A.4) ends with its delimiter in the file, with one a frame at least."""
    at, items = start, 0
    while at + 8 <= size:
        file.seek(at)
        group, element, length = struct.unpack("<HHL", file.read(8))
        if (group, element) == (0xFFFE, 0xE0DD):
            return items > frames
        if (group, element) != (0xFFFE, 0xE000) or length == 0xFFFFFFFF:
            return False
        at, items = at + 8 + length, items + 1
    return False
