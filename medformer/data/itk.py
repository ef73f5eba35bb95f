"""NRRD and MetaImage (.nrrd, .mha, .mhd with its raw file): text headers, read here, over raw or deflated voxels.

No native library sees the file: of headers that are not checked first ITK hangs or crashes on some. Data is taken from
the file itself or from next to a MetaImage header, never by path, and no more declared than the file can hold.
Source: teem.sourceforge.net/nrrd/format.html, itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medformer.data.geometry import LENGTH_UNITS_MM, ScanError, check_affine
from medformer.data.modality import guess
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume, as_float32, odd_values

__all__ = ["ItkHeader", "probe_itk", "read_itk", "sniff_itk"]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_HEADER = 2**16
_MAX_RATIO = 1100  # deflate cannot do better than 1032 to 1
_ASSUMED = "axes assumed to run left, posterior, superior"
_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_META_MODALITIES = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR", "MET_MOD_NM": "NM", "MET_MOD_US": "US"}
_NRRD_TYPES = {
    "i1": "signed char, int8, int8_t", "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t", "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float", "f8": "double",
}  # fmt: skip
_NRRD_CODES = {name: code for code, names in _NRRD_TYPES.items() for name in names.split(", ")}
# Spaces that lie in the patient, as signs that take them to RAS+.
_PATIENT = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class ItkHeader:
    """What a file declares, checked."""

    path: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    affine: np.ndarray
    geometry: Literal["patient", "spacing", "none"]
    modality: str
    """"unknown" where the header does not say, as NRRD never does."""
    notes: tuple[str, ...]
    data: str
    """The file that holds the voxels."""
    start: int
    deflated: bool


@dataclass(frozen=True, kw_only=True)
class _Place:
    affine: np.ndarray
    geometry: Literal["patient", "spacing", "none"]
    notes: tuple[str, ...] = ()


def sniff_itk(head: bytes) -> bool:
    """Whether the first bytes start NRRD or MetaImage."""
    return head.startswith(b"NRRD000") or (
        head.startswith((b"ObjectType", b"NDims", b"Comment")) and b"DimSize" in head
    )


def probe_itk(path: str) -> ItkHeader:
    """Header alone. Raises ScanError."""
    name = os.path.basename(path)
    with open(path, "rb") as file:
        head = file.read(_MAX_HEADER)
    nrrd = head.startswith(b"NRRD")
    fields, start = _fields(head, nrrd, name)
    _only_3d(fields, nrrd, name)
    size = _counts(fields, "sizes" if nrrd else "dimsize", name)
    dtype, modality = (_nrrd_type(fields, name), "unknown") if nrrd else _meta_type(fields, name)
    needed = int(np.prod(size, dtype=object)) * dtype.itemsize
    if needed > MAX_VOLUME_BYTES:
        raise ScanError(f"{name}: {needed:,} bytes declared, at most {MAX_VOLUME_BYTES:,} are read")
    data, start, deflated = _data_file(path, fields, start, needed, nrrd, name)
    here = os.path.getsize(data) - start
    if start < 0 or needed > max(0, here) * (_MAX_RATIO if deflated else 1):
        raise ScanError(f"{name}: cut off, header declares {needed:,} bytes of voxels; copy the file again")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite in the end is refused
        place = _nrrd_place(fields, name) if nrrd else _meta_place(fields, name)
    x, y, z = size
    return ItkHeader(
        path=path, shape=(z, y, x), dtype=dtype, affine=check_affine(place.affine, name), geometry=place.geometry,
        modality=modality, notes=place.notes, data=data, start=start, deflated=deflated,
    )  # fmt: skip


def read_itk(path: str, *, modality: str | None = None) -> Volume:
    """The volume, axes as stored."""
    header = probe_itk(path)
    name = os.path.basename(path)
    voxels = _voxels(header, name)
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if voxels.dtype.kind == "f":
        voxels = as_float32(voxels, name)
    known = header.modality if header.modality != "unknown" else None
    taken, units, remarks = guess(voxels, modality or known, "the header names no modality")
    return Volume(
        voxels=voxels, affine=header.affine, modality=taken, units=units,
        notes=(*header.notes, *odd_values(voxels), *remarks), source=path, geometry=header.geometry,
        provenance={
            "format": "NRRD" if _is_nrrd(path) else "MetaImage", "reader": f"numpy {np.__version__}",
            "files": 1 if header.data == path else 2, "bytes": os.path.getsize(header.data), "tags": {},
        },
    )  # fmt: skip


def _is_nrrd(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"NRRD"


def _voxels(header: ItkHeader, name: str) -> np.ndarray:
    count = int(np.prod(header.shape))
    if not header.deflated:
        values = np.fromfile(header.data, header.dtype, count, offset=header.start)
        if len(values) != count:
            raise ScanError(f"{name}: cut off, {len(values):,} of {count:,} voxels are here; copy the file again")
        return values.reshape(header.shape)
    needed, inflater = count * header.dtype.itemsize, zlib.decompressobj(wbits=47)  # zlib or gzip
    out, got = bytearray(needed), 0
    try:
        with open(header.data, "rb") as file:
            file.seek(header.start)
            while not inflater.eof and (block := file.read(2**18)):
                while block:
                    part = inflater.decompress(block, 2**22)
                    if got + len(part) > needed + 2**16:
                        raise ScanError(f"{name}: inflates to far more than its header declares; not read")
                    kept = part[: max(0, needed - got)]
                    out[got : got + len(kept)] = kept
                    got, block = got + len(part), inflater.unconsumed_tail
    except zlib.error as error:
        raise ScanError(f"{name}: voxels cannot be read, the file is damaged ({error}); copy it again") from error
    if got < needed or not inflater.eof:  # only its end shows that nothing is lost or altered
        raise ScanError(f"{name}: cut off, {got:,} of {needed:,} bytes of voxels are here; copy the file again")
    return np.frombuffer(out, header.dtype).reshape(header.shape)


def _fields(head: bytes, nrrd: bool, name: str) -> tuple[dict[str, str], int]:
    """Header lines and where the data starts."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(head):
        end = head.find(b"\n", at)
        if end < 0:
            break
        line = head[at:end].decode("latin1").rstrip("\r")
        at = end + 1
        if nrrd and not line:
            return fields, at
        key, separator, value = line.partition(":" if nrrd else "=")
        if nrrd and value.startswith("="):
            continue  # key:=value, free text
        if separator and not line.startswith("#"):
            fields[key.strip().lower()] = value.strip()
        if not nrrd and key.strip() == "ElementDataFile":
            return fields, at
    if nrrd and ("data file" in fields or "datafile" in fields):
        return fields, at
    raise ScanError(f"{name}: header without an end in its first {_MAX_HEADER:,} bytes; copy the file again")


def _only_3d(fields: dict[str, str], nrrd: bool, name: str) -> None:
    key = "dimension" if nrrd else "ndims"
    dimensions = fields.get(key, "")
    if dimensions != "3":
        raise ScanError(f"{name}: {key} {dimensions[:20]!r}, a scan has 3 dimensions")
    kinds = set(fields.get("kinds", "").lower().split()) - {"space", "domain", "none", "???"}
    channels = fields.get("elementnumberofchannels", "1")
    if kinds or channels != "1" or re.search(r"\bnone\b", fields.get("space directions", "").lower()):
        raise ScanError(f"{name}: several values a voxel, or an axis that is not in space; save one 3D component")


def _numbers(text: str, count: int, what: str, name: str) -> list[float]:
    parts = text.replace(",", " ").split()
    values = [float(p) if _NUMBER.fullmatch(p) else np.nan for p in parts]
    if len(parts) != count or not np.isfinite(values).all():
        raise ScanError(f"{name}: {what} {text[:60]!r} must be {count} finite numbers; the header is damaged")
    return values


def _counts(fields: dict[str, str], key: str, name: str) -> tuple[int, int, int]:
    values = _numbers(fields.get(key, ""), 3, key, name)
    if not all(1 <= v <= MAX_VOLUME_BYTES and v == int(v) for v in values):
        raise ScanError(f"{name}: {key} {fields[key][:60]!r} must be 3 whole numbers above 0; the header is damaged")
    x, y, z = (int(v) for v in values)
    return x, y, z


def _flag(fields: dict[str, str], *keys: str) -> bool | None:
    text = next((fields[k] for k in keys if k in fields), None)
    return None if text is None else text.strip().lower() in {"true", "t", "1", "yes", "y"}


def _meta_type(fields: dict[str, str], name: str) -> tuple[np.dtype, str]:
    kind = fields.get("elementtype", "")
    if kind not in _META_TYPES:
        raise ScanError(f"{name}: ElementType {kind[:40]!r} must be one of {', '.join(_META_TYPES)}")
    if not _flag(fields, "binarydata"):
        raise ScanError(f"{name}: voxels are written as text (BinaryData is not True); save it again as binary")
    big = _flag(fields, "elementbyteordermsb", "binarydatabyteordermsb")
    modality = _META_MODALITIES.get(fields.get("modality", ""), "unknown")
    return np.dtype((">" if big else "<") + _META_TYPES[kind]), modality


def _nrrd_type(fields: dict[str, str], name: str) -> np.dtype:
    kind = fields.get("type", "").lower()
    if kind not in _NRRD_CODES:
        raise ScanError(f"{name}: NRRD type {kind[:40]!r} must be a real number of 8 to 64 bits; save it again")
    order = fields.get("endian", "").lower()
    if order not in {"little", "big"} and not _NRRD_CODES[kind].endswith("1"):
        raise ScanError(f"{name}: NRRD endian {order[:20]!r} must be little or big; fix the header")
    return np.dtype((">" if order == "big" else "<") + _NRRD_CODES[kind])


def _data_file(
    path: str, fields: dict[str, str], start: int, needed: int, nrrd: bool, name: str
) -> tuple[str, int, bool]:
    """The file that holds the voxels, where in it, and whether they are deflated."""
    if nrrd:
        if "data file" in fields or "datafile" in fields:
            raise ScanError(f"{name}: NRRD with its voxels in other files; save it as one .nrrd")
        encoding = fields.get("encoding", "").lower()
        if encoding not in {"raw", "gzip", "gz"}:
            raise ScanError(f"{name}: NRRD encoding {encoding[:20]!r} must be raw or gzip; save it again")
        skip = _whole(fields, ("byte skip", "byteskip"), name)
        if _whole(fields, ("line skip", "lineskip"), name) or (skip and encoding != "raw"):
            raise ScanError(f"{name}: NRRD that skips lines, or bytes of deflated data; save it again without")
        return path, os.path.getsize(path) - needed if skip == -1 else start + skip, encoding != "raw"
    target, packed = fields.get("elementdatafile", ""), bool(_flag(fields, "compresseddata"))
    skip = _whole(fields, ("headersize",), name)
    if target.upper() == "LOCAL":
        return path, start, packed
    beside = os.path.join(os.path.dirname(path), target)
    if (
        not target or os.path.basename(target) != target or "%" in target or target.upper().startswith("LIST")
        or os.path.islink(beside)
    ):  # fmt: skip
        raise ScanError(f"{name}: ElementDataFile {target[:80]!r} must be LOCAL or a file next to the header")
    if not os.path.isfile(beside):
        raise ScanError(f"{name}: its voxels are in {target[:80]}, which is not here; copy it too")
    return beside, os.path.getsize(beside) - needed if skip == -1 else skip, packed


def _whole(fields: dict[str, str], keys: tuple[str, ...], name: str) -> int:
    """A number of bytes or lines; -1 counts from the end of the file, as both formats have it."""
    key = next((k for k in keys if k in fields), None)
    if key is None:
        return 0
    value = _numbers(fields[key], 1, key, name)[0]
    if not -1 <= value <= 2**40 or value != int(value):
        raise ScanError(f"{name}: {key} {fields[key][:40]!r} is out of range; the header is damaged")
    return int(value)


def _units(text: str, name: str) -> float | None:
    """Millimetres in the unit that all axes share; None where the header names none."""
    named = {u.strip().strip('"').lower() for u in re.findall(r'"[^"]*"|\S+', text)} - {"", "???"}
    if not named:
        return None
    if len(named) > 1 or not named <= LENGTH_UNITS_MM.keys():
        raise ScanError(f"{name}: lengths in {', '.join(sorted(named))[:60]}, must be one unit of length")
    return LENGTH_UNITS_MM[named.pop()]


def _scaled(affine: np.ndarray, scale: float | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if scale is None or scale == 1.0:
        return affine, ()
    return np.diag([scale, scale, scale, 1.0]) @ affine, (f"lengths converted to mm by {scale:g}",)


def _sizes(values: list[float], what: str, name: str) -> list[float]:
    if min(values) <= 0:
        raise ScanError(f"{name}: {what} {values} must be above 0; fix the header")
    return values


def _meta_place(fields: dict[str, str], name: str) -> _Place:
    key = next((k for k in ("elementspacing", "elementsize") if k in fields), None)
    if key is None:
        return _Place(affine=_LPS_TO_RAS, geometry="none", notes=("no voxel size in header",))
    spacing = _sizes(_numbers(fields[key], 3, key, name), key, name)
    scale = _units(fields.get("distanceunits", ""), name)
    turned = next((k for k in ("transformmatrix", "rotation", "orientation") if k in fields), None)
    if turned is None:
        affine, notes = _scaled(_LPS_TO_RAS @ np.diag([*spacing, 1.0]), scale)
        return _Place(affine=affine, geometry="spacing", notes=(f"no orientation in header: {_ASSUMED}", *notes))
    lps, notes = np.eye(4), ()
    # Its rows are the directions of the axes.
    lps[:3, :3] = np.array(_numbers(fields[turned], 9, turned, name)).reshape(3, 3).T * spacing
    origin = next((k for k in ("offset", "position", "origin") if k in fields), None)
    if origin is None:
        notes = ("no position in header: the first voxel taken to lie at 0",)
    else:
        lps[:3, 3] = _numbers(fields[origin], 3, origin, name)
    affine, remarks = _scaled(_LPS_TO_RAS @ lps, scale)
    return _Place(affine=affine, geometry="patient", notes=(*notes, *remarks))


def _nrrd_place(fields: dict[str, str], name: str) -> _Place:
    if "space directions" not in fields:
        if set(fields.get("spacings", "nan").lower().split()) == {"nan"}:  # unknown
            return _Place(affine=_LPS_TO_RAS, geometry="none", notes=("no voxel size in header",))
        values = _sizes(_numbers(fields["spacings"], 3, "spacings", name), "spacings", name)
        affine, remarks = _scaled(_LPS_TO_RAS @ np.diag([*values, 1.0]), _units(fields.get("units", ""), name))
        return _Place(affine=affine, geometry="spacing", notes=(f"no orientation in header: {_ASSUMED}", *remarks))
    vectors = re.findall(r"\(([^()]*)\)", fields["space directions"])
    if len(vectors) != 3:
        raise ScanError(f"{name}: space directions must be 3 vectors; the header is damaged")
    matrix = np.array([_numbers(v, 3, "space directions", name) for v in vectors]).T
    scale, space = _units(fields.get("space units", ""), name), fields.get("space", "").lower()
    if space not in _PATIENT:
        sizes = np.linalg.norm(matrix, axis=0)
        affine, remarks = _scaled(_LPS_TO_RAS @ np.diag([*sizes, 1.0]), scale)
        called = f"space {space[:40]!r}" if space else "a space without a name"
        note = f"directions in {called}, which is none of the patient: sizes kept, {_ASSUMED}"
        return _Place(affine=affine, geometry="spacing", notes=(note, *remarks))
    whole, notes = np.eye(4), ()
    whole[:3, :3] = matrix
    if "space origin" in fields:
        whole[:3, 3] = _numbers(fields["space origin"].strip().strip("()"), 3, "space origin", name)
    else:
        notes = ("no position in header: the first voxel taken to lie at 0",)
    affine, remarks = _scaled(np.diag([*_PATIENT[space], 1.0]) @ whole, scale)
    return _Place(affine=affine, geometry="patient", notes=(*notes, *remarks))
