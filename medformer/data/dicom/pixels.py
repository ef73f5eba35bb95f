"""Decoding DICOM pixels: stored values and padding, checked against what the header declares."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom import encaps, filereader
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue
from pydicom.pixels.processing import apply_color_lut, apply_voi_lut
from pydicom.uid import UID

from medformer.data.dicom.headers import acquisition_tags
from medformer.data.dicom.mosaic import cut_mosaic
from medformer.data.dicom.syntax import NATIVE, PARSE_ERRORS, check_syntax, quiet, syntax_of
from medformer.data.geometry import ScanError

__all__ = ["Pixels", "read_pixels"]


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What one file holds, decoded."""

    stored: np.ndarray
    """(frames, rows, columns), or (frames, rows, columns, 3) RGB; after the Modality LUT where there is one."""
    padding: np.ndarray | None
    """True where the scanner padded; None where nowhere."""
    notes: tuple[str, ...]
    tags: dict[str, str]
    """The allow-list of acquisition_tags."""
    signed: bool
    bits: int
    slope: float
    intercept: float
    table: bool
    """A Modality LUT was applied; slope and intercept are unity."""
    display: np.ndarray | None = None
    """float32 0..1 after the VOI LUT or window, on request."""


def read_pixels(path: str, *, tiles: int = 0, count: int = 0, voi: bool = False) -> Pixels:
    """Decode one file. Checks it again.

    tiles, count: cut a mosaic of tiles x tiles into its first `count` slices. voi: fill `display`.
    """
    name = os.path.basename(path)
    with open(path, "rb") as file, quiet():
        check_syntax(file, name)
        try:
            ds = pydicom.dcmread(file, force=True)
            syntax = syntax_of(ds)
            ds.file_meta.TransferSyntaxUID = UID(syntax)
            if syntax not in NATIVE:
                _check_stream(ds, name)
            frames, samples = int(ds.get("NumberOfFrames") or 1), int(ds.get("SamplesPerPixel") or 1)
            expected = (frames, int(ds.Rows), int(ds.Columns), *((samples,) if samples > 1 else ()))
            array = np.asarray(ds.pixel_array)
            if frames == 1 and array.ndim == len(expected) - 1:
                array = array[None]
            if array.shape != expected:
                raise ScanError(f"{name}: pixels decode to {array.shape}, header declares {expected}")
            return _unpack(ds, array, tiles, count, voi, name)
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


def _unpack(ds: FileDataset, array: np.ndarray, tiles: int, count: int, voi: bool, name: str) -> Pixels:
    """Keep the stored bits only, restore the sign, find the padding (PS3.5 8.1.1, PS3.3 C.7.5.1.1.2), apply tables."""
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
    padding = None if array.ndim == 4 else _padding(ds, array, allocated, signed)
    if array.ndim == 4 or str(ds.get("PhotometricInterpretation") or "").strip() == "PALETTE COLOR":
        array = _rgb(ds, array)
        padding = None
    table = "ModalityLUTSequence" in ds or _shared_table(ds) is not None
    if table:
        array = _modality_table(ds, array, signed, name)
        notes += ("Modality LUT applied",)
    slope, intercept = _rescale_of(ds) if not table and array.ndim == 3 else (1.0, 0.0)
    display = _display(ds, array, slope, intercept, padding) if voi and array.ndim == 3 else None
    if tiles:
        array = cut_mosaic(array[0], tiles, count)
        padding = None if padding is None else cut_mosaic(padding[0], tiles, count)
    return Pixels(
        stored=array, padding=padding, notes=notes, tags=acquisition_tags(ds), signed=signed, bits=stored,
        slope=slope, intercept=intercept, table=table, display=display,
    )  # fmt: skip


def _rescale_of(ds: FileDataset) -> tuple[float, float]:
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    return (1.0 if slope in (None, "") else float(slope)), (0.0 if intercept in (None, "") else float(intercept))


def _rgb(ds: FileDataset, array: np.ndarray) -> np.ndarray:
    kind = str(ds.get("PhotometricInterpretation") or "").strip()
    if kind == "PALETTE COLOR":
        return np.asarray(apply_color_lut(array, ds))[..., :3]
    # pixel_array has already turned YBR into RGB (pydicom 3); planes come last.
    return array


def _shared_table(ds: FileDataset) -> Dataset | None:
    shared = ds.get("SharedFunctionalGroupsSequence")
    for group in shared or []:
        for part in group.get("PixelValueTransformationSequence") or []:
            if part.get("ModalityLUTSequence"):
                return part.ModalityLUTSequence[0]
    return None


def _modality_table(ds: FileDataset, array: np.ndarray, signed: bool, name: str) -> np.ndarray:
    """PS3.3 C.11.1.1: values below the table take its first entry, values above its last."""
    item = ds.ModalityLUTSequence[0] if "ModalityLUTSequence" in ds else _shared_table(ds)
    assert item is not None
    descriptor = [int(v) for v in item.LUTDescriptor]
    entries, first, bits = descriptor[0] or 65536, descriptor[1], descriptor[2]
    if signed and first >= 32768:
        first -= 65536
    data = item.LUTData
    if isinstance(data, bytes):
        little = ds.original_encoding[1] is not False
        wide = bits > 8 or len(data) >= 2 * entries
        data = np.frombuffer(data, ("<u2" if little else ">u2") if wide else "u1")
    values = np.atleast_1d(np.asarray(data)).astype(np.int64)
    if not 1 <= bits <= 16 or len(values) < entries:
        raise ScanError(f"{name}: Modality LUT has {len(values)} of {entries} entries of {bits} bits; fix the header")
    values = (values[:entries] & 0xFFFF).astype(np.uint16)
    return values[np.clip(array.astype(np.int64) - first, 0, entries - 1)]


def _display(
    ds: FileDataset, array: np.ndarray, slope: float, intercept: float, padding: np.ndarray | None
) -> np.ndarray:
    """VOI LUT or first window to 0..1; the measured range where the header has neither."""
    values = array.astype(np.float64) * slope + intercept
    if "VOILUTSequence" in ds or "WindowCenter" in ds:
        source = values if "VOILUTSequence" not in ds else values.astype(np.int64)
        shown = np.asarray(apply_voi_lut(source, ds), np.float64)
        if "VOILUTSequence" in ds:
            low, high = 0.0, float(2 ** int(ds.VOILUTSequence[0].LUTDescriptor[2]) - 1)
        else:  # pydicom's windows end at the range of the modality's values
            low, high = _output_range(ds, slope, intercept)
    else:
        measured = values if padding is None or padding.all() else values[~padding]
        shown, low, high = values, float(measured.min()), float(measured.max())
    return np.clip((shown - low) / ((high - low) or 1.0), 0, 1).astype(np.float32)


def _output_range(ds: FileDataset, slope: float, intercept: float) -> tuple[float, float]:
    if "ModalityLUTSequence" in ds:
        return 0.0, float(2 ** int(ds.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
    bits = int(ds.get("BitsStored") or ds.BitsAllocated)
    signed = int(ds.get("PixelRepresentation") or 0) == 1
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return ends[0] * slope + intercept, ends[1] * slope + intercept


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
