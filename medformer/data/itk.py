"""NRRD and MetaImage (.nrrd, .mha, .mhd with its raw file) through SimpleITK, an extra.

The text header is checked here first: data only beside the header and never by path, and no more declared than the
file can hold. Source: teem.sourceforge.net/nrrd/format.html, itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from medformer.data.geometry import ScanError, check_affine
from medformer.data.nifti import looks_like_hu
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume

__all__ = ["ItkHeader", "probe_itk", "read_itk", "sniff_itk"]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_HEADER = 2**16
_NUMBERS = {
    "8-bit signed integer", "8-bit unsigned integer", "16-bit signed integer", "16-bit unsigned integer",
    "32-bit signed integer", "32-bit unsigned integer", "64-bit signed integer", "64-bit unsigned integer",
    "32-bit float", "64-bit float",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ItkHeader:
    """What a file declares, checked."""

    path: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    notes: tuple[str, ...]


def sniff_itk(head: bytes) -> bool:
    """Whether the first bytes start NRRD or MetaImage."""
    return head.startswith(b"NRRD000") or (
        head.startswith((b"ObjectType", b"NDims", b"Comment")) and b"DimSize" in head
    )


def probe_itk(path: str) -> ItkHeader:
    """Header alone. Raises ScanError, also where SimpleITK is missing."""
    return _inspect(path)[1]


def read_itk(path: str, *, modality: str | None = None) -> Volume:
    """The volume, axes as stored."""
    reader, header = _inspect(path)
    name = os.path.basename(path)
    sitk = _library(name)
    try:
        voxels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise ScanError(f"{name}: voxels cannot be read, the file is cut off or damaged; copy it again") from error
    notes = list(header.notes)
    if voxels.dtype.kind == "f":
        if not np.isfinite(voxels).all():
            raise ScanError(f"{name}: voxels are NaN or infinite, all must be finite; replace them first")
        voxels = voxels.astype(np.float32)
    if modality is None:
        modality = "CT" if looks_like_hu(voxels) else "unknown"
        if modality == "CT":
            notes.append("the format names no modality: taken as CT since the values look like HU")
    return Volume(
        voxels=voxels, affine=header.affine, modality=modality, units="HU" if modality == "CT" else "arbitrary",
        notes=tuple(notes), source=path,
        provenance={
            "format": "NRRD" if _is_nrrd(path) else "MetaImage", "reader": f"SimpleITK {sitk.Version.VersionString()}",
            "files": 1, "bytes": os.path.getsize(path), "tags": {},
        },
    )  # fmt: skip


def _library(name: str) -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise ScanError(f"{name}: NRRD and MetaImage need SimpleITK; pip install -e '.[formats]'") from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _is_nrrd(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"NRRD"


def _inspect(path: str) -> tuple[Any, ItkHeader]:
    name = os.path.basename(path)
    with open(path, "rb") as file:
        head = file.read(_MAX_HEADER)
    nrrd = head.startswith(b"NRRD")
    fields, start = _fields(head, nrrd, name)
    data, start, packed = _data_file(path, fields, start, nrrd, name)
    sitk = _library(name)
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ScanError(f"{name}: header does not parse ({str(error).splitlines()[-1][:80]})") from error
    size = [int(v) for v in reader.GetSize()]
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if len(size) != 3 or min(size) < 1 or reader.GetNumberOfComponents() != 1 or kind not in _NUMBERS:
        raise ScanError(f"{name}: {len(size)}D image of {kind}, a scan has 3 dimensions and one number a voxel")
    width = int(kind.split("-")[0]) // 8
    needed = int(np.prod(size, dtype=object)) * width
    here = os.path.getsize(data) - start
    if needed > MAX_VOLUME_BYTES:
        raise ScanError(f"{name}: {needed:,} bytes declared, at most {MAX_VOLUME_BYTES:,} are read")
    if needed > here * (1100 if packed else 1) or (packed and _inflated(data, start, needed) < needed):
        raise ScanError(f"{name}: cut off, header declares {needed:,} bytes of voxels; copy the file again")
    spacing, direction = np.array(reader.GetSpacing()), np.array(reader.GetDirection()).reshape(3, 3)
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = direction * spacing, reader.GetOrigin()
    notes = []
    if nrrd and "space" not in fields and "space dimension" not in fields:
        notes.append("no orientation in header: axes assumed to run left, posterior, superior")
    z, y, x = size[::-1]
    affine = check_affine(_LPS_TO_RAS @ lps, name)
    return reader, ItkHeader(path=path, shape=(z, y, x), affine=affine, notes=tuple(notes))


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
        if separator and not line.startswith("#"):
            fields[key.strip().lower()] = value.strip()
        if not nrrd and key.strip() == "ElementDataFile":
            return fields, at
    if nrrd and ("data file" in fields or "datafile" in fields):
        return fields, at
    raise ScanError(f"{name}: header without an end in its first {_MAX_HEADER:,} bytes; copy the file again")


def _data_file(path: str, fields: dict[str, str], start: int, nrrd: bool, name: str) -> tuple[str, int, bool]:
    """The file that holds the voxels, where in it, and whether they are deflated."""
    if nrrd:
        if "data file" in fields or "datafile" in fields:
            raise ScanError(f"{name}: NRRD with its voxels in other files; save it as one .nrrd")
        encoding = fields.get("encoding", "").lower()
        if encoding not in {"raw", "gzip", "gz"}:
            raise ScanError(f"{name}: NRRD encoding {encoding!r} must be raw or gzip; save it again")
        return path, start, encoding != "raw"
    target, packed = fields.get("elementdatafile", ""), fields.get("compresseddata", "").lower() == "true"
    if target == "LOCAL":
        return path, start, packed
    beside = os.path.join(os.path.dirname(path), target)
    if not target or os.path.basename(target) != target or target.startswith("LIST") or os.path.islink(beside):
        raise ScanError(f"{name}: ElementDataFile {target!r} must be LOCAL or a file beside the header")
    if not os.path.isfile(beside):
        raise ScanError(f"{name}: its voxels are in {target}, which is not here; copy it too")
    return beside, 0, packed


def _inflated(path: str, start: int, limit: int) -> int:
    """Bytes that come out of a deflated stream, counted up to the limit without keeping them."""
    total, inflater = 0, zlib.decompressobj(wbits=47)  # zlib or gzip
    with open(path, "rb") as file:
        file.seek(start)
        try:
            while total < limit and not inflater.eof and (block := file.read(2**16)):
                while block and total < limit:
                    total += len(inflater.decompress(block, 2**20))
                    block = inflater.unconsumed_tail
        except zlib.error:
            return 0
    return total
