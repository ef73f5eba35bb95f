"""Decoding DICOM pixels: stored values and padding, checked against what the header declares."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from pydicom import filereader
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_voi_lut
from pydicom.uid import UID

from medformer.data.dicom.mosaic import cut_mosaic
from medformer.data.dicom.stream import Stream, check_streams
from medformer.data.dicom.syntax import NATIVE, PARSE_ERRORS, check_syntax, quiet, syntax_of
from medformer.data.dicom.tags import acquisition_tags
from medformer.data.geometry import ScanError
from medformer.data.native import NativeError, call

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


def read_pixels(path: str, *, tiles: tuple[int, int] | None = None, count: int = 0, voi: bool = False) -> Pixels:
    """Decode one file. Checks it again.

    tiles, count: cut a mosaic of so many tiles down and across into its first `count` slices. voi: fill `display`.
    """
    name = os.path.basename(path)
    with open(path, "rb") as file, quiet():
        check_syntax(file, name)
        try:
            ds = pydicom.dcmread(file, force=True)
            syntax = syntax_of(ds)
            stream = None
            if syntax in NATIVE:
                ds.file_meta.TransferSyntaxUID = UID(syntax)
                # Bits above BitsStored are looked at below.
                options: dict[str, Any] = {"correct_unused_bits": False}
                array, _ = get_decoder(UID(syntax)).as_array(ds, **options)
            else:
                stream = check_streams(ds, syntax, name)
                array = _decode(ds, stream, name)
            frames, samples = int(ds.get("NumberOfFrames") or 1), int(ds.get("SamplesPerPixel") or 1)
            expected = (frames, int(ds.Rows), int(ds.Columns), *((samples,) if samples > 1 else ()))
            if frames == 1 and array.ndim == len(expected) - 1:
                array = array[None]
            if array.shape != expected:
                raise ScanError(f"{name}: pixels decode to {array.shape}, header declares {expected}")
            return _unpack(ds, stream, array, tiles, count, voi, name)
        except ScanError:
            raise
        except (*PARSE_ERRORS, RuntimeError, NativeError) as error:
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


def _decode(ds: FileDataset, stream: Stream, name: str) -> np.ndarray:
    """Compressed pixels, in the child process. What the stream says of its values is what the decoder is given."""
    bits, stored, signed = int(ds.BitsAllocated), int(ds.get("BitsStored") or ds.BitsAllocated), _signed(ds, stream)
    if stream.precision:
        stored = stream.precision
        bits = max(bits, next(width for width in (8, 16, 32) if width >= stored))
    frames, samples = int(ds.get("NumberOfFrames") or 1), int(ds.get("SamplesPerPixel") or 1)
    options = {
        "rows": int(ds.Rows), "columns": int(ds.Columns), "number_of_frames": frames, "samples_per_pixel": samples,
        "bits_allocated": bits, "bits_stored": stored, "pixel_representation": int(signed),
        "photometric_interpretation": str(ds.get("PhotometricInterpretation") or "MONOCHROME2").strip(),
        "pixel_keyword": "PixelData",
    } | ({"planar_configuration": int(ds.get("PlanarConfiguration") or 0)} if samples > 1 else {})  # fmt: skip
    frame = int(ds.Rows) * int(ds.Columns) * samples
    # OpenJPEG works on 4 bytes a value, several times over.
    _, array = call(
        name, "decode", {"syntax": stream.syntax, "options": options}, ds.PixelData, most=4 * frames * frame,
        memory=40 * frame,
    )  # fmt: skip
    return array


def _signed(ds: FileDataset, stream: Stream | None) -> bool:
    """An unsigned stream may carry two's complement, which only the header says; a signed one is signed."""
    return int(ds.get("PixelRepresentation") or 0) == 1 or (stream is not None and stream.signed)


def _unpack(
    ds: FileDataset,
    stream: Stream | None,
    array: np.ndarray,
    tiles: tuple[int, int] | None,
    count: int,
    voi: bool,
    name: str,
) -> Pixels:
    """Keep the stored bits only, restore the sign, find the padding (PS3.5 8.1.1, PS3.3 C.7.5.1.1.2), apply tables."""
    allocated, signed = int(ds.BitsAllocated), _signed(ds, stream)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array, stored, notes = _stored_bits(ds, stream, array, signed, name)
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


def _stored_bits(
    ds: FileDataset, stream: Stream | None, array: np.ndarray, signed: bool, name: str
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """The values of BitsStored bits, sign restored; of as many as a coded stream says where it holds more.

    Bits above BitsStored are masked off in uncompressed files (they are overlays or unused), unless HighBit disagrees:
    then values that need them are refused, since they may lie at the other end of the word.
    """
    allocated, stored = int(ds.BitsAllocated), int(ds.get("BitsStored") or ds.BitsAllocated)
    high, notes = ds.get("HighBit"), () if stream is None else stream.notes
    high = stored - 1 if high in (None, "") else int(high)
    if stream is not None and stream.signed and int(ds.get("PixelRepresentation") or 0) == 0:
        notes += ("coded stream holds signed values, PixelRepresentation says unsigned: stream believed",)
    odd = high != stored - 1
    if odd:
        notes += (f"HighBit {high} with BitsStored {stored}: taken as {stored - 1}",)
    if array.dtype.kind not in "iu" or stored >= 8 * array.dtype.itemsize:
        precision = stream.precision if stream is not None else 0
        return array, precision or stored, notes
    kept, whole = _low_bits(array, stored, signed)
    if np.array_equal(kept, array) or whole:
        return kept, stored, notes
    if stream is not None and stream.precision > stored and not _overlay_in_pixels(ds, stored, allocated):
        notes += (f"coded stream holds values of {stream.precision} bits, BitsStored says {stored}: stream believed",)
        wide = 8 * array.dtype.itemsize
        kept = _low_bits(array, stream.precision, signed)[0] if stream.precision < wide else array
        return kept, stream.precision, notes
    if odd:
        raise ScanError(
            f"{name}: BitsStored {stored} and HighBit {high} contradict each other, and values take more than "
            f"{stored} bits; fix the header"
        )
    return kept, stored, (*notes, "bits outside BitsStored masked off (overlays or unused)")


def _low_bits(array: np.ndarray, stored: int, signed: bool) -> tuple[np.ndarray, bool]:
    """The lowest bits, sign restored; and whether the others are all 0."""
    # pydicom may have decoded to a wider type than allocated: go by its own width.
    width = array.dtype.itemsize * 8
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    raw = array.view(unsigned)
    low = (raw & unsigned.type((1 << stored) - 1)).astype(unsigned)
    kept = (low << (width - stored)).view(f"i{array.dtype.itemsize}") >> (width - stored) if signed else low
    return kept.astype(array.dtype, copy=False), bool(signed and np.array_equal(low, raw))


def _overlay_in_pixels(ds: FileDataset, stored: int, allocated: int) -> bool:
    """Whether an overlay lies in unused bits of the pixels (retired, PS3.3 C.9.2 of 2004)."""
    return any(
        (element := ds.get((0x6000 + group, 0x0102))) is not None
        and stored <= int(element.value or 0) < allocated
        and (0x6000 + group, 0x3000) not in ds
        for group in range(0, 0x20, 2)
    )


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
