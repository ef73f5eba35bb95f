"""Reading NIfTI-1 and NIfTI-2: header, affine and one 3D frame, or the reason why not.

The header is parsed and its declared size compared with the file before anything is allocated. Integers stay
integers. Source: nifti1.h and nifti2.h (the NIfTI data format working group), methods 1 to 3 for the affine.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError

from medformer.data.geometry import ScanError, check_affine
from medformer.data.modality import guess
from medformer.data.volumes import EXTENSION_MARK, MAX_VOLUME_BYTES, Volume, as_float32, odd_values, rescale

__all__ = ["NiftiHeader", "header_of", "probe_nifti", "read_nifti", "sniff_nifti"]

_MAX_GZIP_RATIO = 1100  # deflate cannot do better than 1032 to 1
_MAX_EXTENSION = 2**26
_UNIT_MM = {1: 1000.0, 2: 1.0, 3: 1e-3}
_NUMERIC = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}
_REFUSED = {1: "1-bit", 32: "complex64", 128: "RGB colour", 1792: "complex128", 2048: "complex256", 2304: "RGBA colour"}
_REFUSED[1536] = "128-bit float"


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """What a file declares, checked."""

    path: str
    image: str
    """The file that holds the voxels: the same, or the .img of a pair."""
    shape_xyz: tuple[int, int, int]
    frames: int
    dtype: np.dtype
    offset: int
    affine: np.ndarray
    geometry: Literal["patient", "spacing"]
    slope: float
    intercept: float
    notes: tuple[str, ...]


def sniff_nifti(head: bytes) -> bool:
    """Whether the first 352 bytes (or gzip thereof) start a NIfTI file, or the header of a pair."""
    block = _inflate(head, 352) if head[:2] == b"\x1f\x8b" else head
    return block[344:348] in {b"n+1\0", b"ni1\0"} or block[4:8] in {b"n+2\0", b"ni2\0"}


def header_of(path: str) -> str | None:
    """The .hdr that belongs to an .img file, or None."""
    stem, dot, suffix = path.rpartition(".img")
    if not dot or suffix not in {"", ".gz"}:
        return None
    return next((stem + end for end in (".hdr", ".hdr.gz") if os.path.isfile(stem + end)), None)


def _image_of(path: str) -> str | None:
    stem, dot, _ = path.rpartition(".hdr")
    return next((stem + end for end in (".img", ".img.gz") if dot and os.path.isfile(stem + end)), None)


def _inflate(data: bytes, limit: int) -> bytes:
    """What comes out before the limit, the end of the data, or an error."""
    inflater, out = zlib.decompressobj(wbits=31), b""
    try:
        for at in range(0, len(data), 64):
            out += inflater.decompress(data[at : at + 64], limit)
            if len(out) >= limit:
                break
    except zlib.error:
        pass
    return out[:limit]


def probe_nifti(path: str) -> NiftiHeader:
    """Read and check the header alone."""
    name = os.path.basename(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    block = _inflate(head, 1024) if head[:2] == b"\x1f\x8b" else head
    header = _parse(block, name)
    image = path
    if block[344:348] == b"ni1\0" or block[4:8] == b"ni2\0":
        image = _image_of(path) or ""
        if not image:
            raise ScanError(f"{name}: header of a pair whose .img file is not next to it; copy it too")
    size, zipped = os.path.getsize(image), _is_gzip(image)
    shape, frames = _shape(header, name)
    dtype = _dtype(header, name)
    count = frames * int(np.prod([int(v) for v in shape], dtype=object))
    offset, moved = _offset(header, image, count * dtype.itemsize, image == path, name)
    needed = offset + count * dtype.itemsize
    if zipped and needed > _MAX_GZIP_RATIO * size:
        raise ScanError(
            f"{name}: header declares {needed:,} bytes, more than gzip can hold in {size:,}; cut off or made up: "
            "copy the file again"
        )
    if not zipped and needed > size:
        raise ScanError(f"{name}: cut off, {size:,} of {needed:,} bytes are here; copy the file again")
    frame_bytes = count // frames * dtype.itemsize
    if frame_bytes > MAX_VOLUME_BYTES:
        raise ScanError(f"{name}: {frame_bytes:,} bytes a frame, at most {MAX_VOLUME_BYTES:,} are read; crop it first")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite in the end is refused
        affine, notes = _affine(header, name)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope) or slope == 0:
        slope, intercept = 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise ScanError(f"{name}: scl_slope {slope:g} and scl_inter {intercept:g} must be finite; fix the header")
    return NiftiHeader(
        path=path,
        image=image,
        shape_xyz=shape,
        frames=frames,
        dtype=dtype,
        offset=offset,
        affine=affine,
        geometry="patient" if max(int(header["sform_code"]), int(header["qform_code"])) > 0 else "spacing",
        slope=slope,
        intercept=intercept,
        notes=(*moved, *notes),
    )


def _offset(
    header: nib.Nifti1Header, image: str, voxel_bytes: int, single: bool, name: str
) -> tuple[int, tuple[str, ...]]:
    """Where the voxels start. Below the end of a single file's header they start behind it, if the size says so too."""
    value = float(header["vox_offset"])
    if not 0 <= value <= 2**30 or value != int(value):
        raise ScanError(f"{name}: vox_offset {value:g} must be a whole number of bytes; the header is damaged")
    least = (header.sizeof_hdr + 4) if single else 0
    if value >= least:
        return int(value), ()
    size = os.path.getsize(image)
    if _is_gzip(image):
        with open(image, "rb") as file:  # what it inflates to, modulo 2^32; reading to its end checks that
            file.seek(-4, os.SEEK_END)
            size = int.from_bytes(file.read(4), "little")
    if size != (least + voxel_bytes) % (2**32 if _is_gzip(image) else 2**63):
        raise ScanError(
            f"{name}: vox_offset {value:g} lies inside the header of {least} bytes, and the size of the file does not "
            "show where the voxels start; fix the header"
        )
    return least, (f"vox_offset {value:g} lies inside the header: voxels taken from behind it, which fits the size",)


def _parse(block: bytes, name: str) -> nib.Nifti1Header:
    second = block[4:8] in {b"n+2\0", b"ni2\0"}
    kind, length = (nib.Nifti2Header, 540) if second else (nib.Nifti1Header, 348)
    if not second and block[344:348] not in {b"n+1\0", b"ni1\0"}:
        raise ScanError(f"{name}: not a NIfTI file (no magic in its header)")
    if len(block) < length:
        raise ScanError(f"{name}: cut off inside its header; copy the file again")
    try:
        return kind(block[:length], check=False)
    except (HeaderDataError, ValueError) as error:
        raise ScanError(f"{name}: NIfTI header does not parse: {error}") from error


def _shape(header: nib.Nifti1Header, name: str) -> tuple[tuple[int, int, int], int]:
    dim = [int(v) for v in header["dim"]]
    if not 1 <= dim[0] <= 7 or any(v < 1 for v in dim[1 : dim[0] + 1]):
        raise ScanError(f"{name}: dimensions {dim} must be positive; the header is damaged")
    sizes = dim[1 : dim[0] + 1] + [1] * (7 - dim[0])
    if dim[0] < 3:
        raise ScanError(f"{name}: {dim[0]}D image, a scan has 3 dimensions")
    if any(v != 1 for v in sizes[4:]):
        raise ScanError(f"{name}: {dim[0]}D image of {sizes[: dim[0]]} (several values a voxel); save one 3D component")
    return (sizes[0], sizes[1], sizes[2]), sizes[3]


def _dtype(header: nib.Nifti1Header, name: str) -> np.dtype:
    code = int(header["datatype"])
    if code not in _NUMERIC:
        what = _REFUSED.get(code, f"unknown (code {code})")
        raise ScanError(f"{name}: voxels are {what}, must be one real number each; convert it to a grey-scale type")
    return header.get_data_dtype()


def _affine(header: nib.Nifti1Header, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """sform if coded, else qform, else voxel size alone with a note."""
    notes = []
    sform: np.ndarray | None = np.asarray(header.get_sform()) if int(header["sform_code"]) > 0 else None
    qform: np.ndarray | None = None
    if int(header["qform_code"]) > 0:
        try:
            qform = np.asarray(header.get_qform())
        except (HeaderDataError, ValueError) as error:
            if sform is None:
                raise ScanError(f"{name}: qform does not make a rotation ({error}); fix the header") from error
            notes.append("qform is damaged: sform used")
    if sform is not None:
        affine = sform
        if qform is not None and np.isfinite(qform).all() and np.isfinite(sform).all():
            shape = np.array([int(v) for v in header["dim"][1:4]]) - 1
            corners = np.array(np.meshgrid(*[(0, n) for n in shape], indexing="ij")).reshape(3, -1)
            apart = np.linalg.norm((sform - qform)[:3, :3] @ corners + (sform - qform)[:3, 3:], axis=0).max()
            size = float(np.linalg.norm(sform[:3, :3], axis=0).min())
            if apart > 0.1 * size:
                notes.append(f"sform and qform differ by up to {apart:.3g} mm: sform used")
    elif qform is not None:
        affine = qform
    else:
        sizes = [float(abs(v)) for v in header["pixdim"][1:4]]
        affine = np.diag([*sizes, 1.0])
        notes.append("no orientation in header: axes assumed to run right, anterior, superior")
    scale = _UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    if scale != 1.0:
        affine = np.diag([scale, scale, scale, 1.0]) @ affine
        notes.append(f"lengths converted to mm by {scale:g}")
    return check_affine(affine, name), tuple(notes)


def read_nifti(path: str, *, frame: int = 0, modality: str | None = None) -> Volume:
    """One 3D frame, axes as stored."""
    header = probe_nifti(path)
    name = os.path.basename(path)
    notes = list(header.notes)
    if not 0 <= frame < header.frames:
        raise ScanError(f"{name}: frame={frame} must be 0 to {header.frames - 1}; it holds {header.frames}")
    if header.frames > 1:
        notes.append(f"4D: frame {frame} of {header.frames} used")
    stored = _read_frame(header, frame, name)
    if stored.dtype.kind == "f":
        stored = as_float32(stored, name)
    else:
        stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    voxels = np.ascontiguousarray(rescale(stored, header.slope, header.intercept, name).T)
    kept = _read_extension(path, voxels.shape)
    taken, units, remarks = guess(voxels, modality or kept.modality, "NIfTI names no modality")
    notes += [*kept.notes, *odd_values(voxels), *remarks]
    return Volume(
        voxels=voxels,
        affine=header.affine,
        modality=taken,
        units=kept.units or units,
        notes=tuple(dict.fromkeys(notes)),
        source=path,
        valid=kept.valid,
        geometry=kept.geometry or header.geometry,
        provenance=kept.provenance
        | {
            "format": "NIfTI",
            "reader": f"nibabel {nib.__version__}",
            "files": 1 if header.image == path else 2,
            "bytes": os.path.getsize(header.image),
        },
    )


@dataclass(frozen=True)
class _Kept:
    """What Volume.save wrote next to the voxels."""

    modality: str | None = None
    units: Literal["HU", "arbitrary"] | None = None
    geometry: Literal["patient", "spacing", "none"] | None = None
    notes: tuple[str, ...] = ()
    valid: np.ndarray | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def _read_extension(path: str, shape: tuple[int, ...]) -> _Kept:
    """Ours among the header extensions; everything else, and everything malformed, is passed over."""
    try:
        text = _extension_text(path)
    except (OSError, EOFError, zlib.error):  # the header file of a pair, cut off behind its header
        return _Kept()
    if not text.startswith(EXTENSION_MARK):
        return _Kept()
    try:
        values = json.loads(text[len(EXTENSION_MARK) :].rstrip(b"\0"))
        valid = None
        if "valid" in values:
            count = int(np.prod(shape))
            bits = zlib.decompressobj().decompress(base64.b64decode(values["valid"]), (count + 7) // 8)
            if len(bits) != (count + 7) // 8:
                raise ValueError("mask cut short")
            valid = np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool).reshape(shape)
        units, geometry = values["units"], values["geometry"]
        if units not in {"HU", "arbitrary"} or geometry not in {"patient", "spacing", "none"}:
            raise ValueError(units)
        notes = tuple(str(n) for n in values["notes"])
        return _Kept(str(values["modality"]), units, geometry, notes, valid, {"tags": dict(values["tags"])})
    except (ValueError, KeyError, TypeError, zlib.error, RecursionError):
        return _Kept(notes=("medformer's note in the header is damaged: passed over",))


def _extension_text(path: str) -> bytes:
    """The first header extension, if it is a comment; else nothing."""
    opener = gzip.open if _is_gzip(path) else open
    with opener(path, "rb") as file:
        head = file.read(8)
        length, little = (540, True) if head[4:8] in {b"n+2\0", b"ni2\0"} else (348, head[0] in {0x5C, 0x1C})
        rest = file.read(length - 8 + 4)
        if len(rest) < length - 4 or rest[-4] != 1:
            return b""
        head = file.read(8)
        size, code = struct.unpack("<ii" if little else ">ii", head) if len(head) == 8 else (0, 0)
        return file.read(size - 8) if code == 6 and 16 <= size <= _MAX_EXTENSION else b""


def _read_frame(header: NiftiHeader, frame: int, name: str) -> np.ndarray:
    shape = (*header.shape_xyz, header.frames)
    zipped = _is_gzip(header.image)
    opener = gzip.open if zipped else open
    try:
        with opener(header.image, "rb") as file:
            proxy = ArrayProxy(file, (shape, header.dtype, header.offset, 1.0, 0.0), mmap=False)
            out = np.asanyarray(proxy[..., frame])
            if zipped:
                _drain(file, header, name)
            return out
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(
            f"{name}: voxels cannot be read, the file is cut off or damaged ({error}); copy it again"
        ) from error


def _drain(file: gzip.GzipFile | BinaryIO, header: NiftiHeader, name: str) -> None:
    """Inflate to the end: only there does gzip show that nothing is cut off or altered (its length and checksum)."""
    count = int(np.prod([*header.shape_xyz, header.frames], dtype=object))
    needed = header.offset + count * header.dtype.itemsize
    end = file.tell()
    while block := file.read(2**20):
        end += len(block)
        if end > needed + 2**30:
            raise ScanError(f"{name}: inflates to far more than its header declares; not read")
    if end < needed:
        raise ScanError(f"{name}: cut off, {end:,} of {needed:,} bytes are here; copy the file again")


def _is_gzip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"
