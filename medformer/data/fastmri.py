"""fastMRI HDF5 files: stacks of 2D slices as k-space, with or without the reference reconstruction.

Source: Zbontar et al. 2018 (arXiv:1811.08839), section 4; ismrmrd.github.io (the XML header). An extra: h5py.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from medformer.data.geometry import LARGEST_MM, SMALLEST_MM, ScanError
from medformer.data.native import NativeError, call
from medformer.data.safe_xml import parse_xml
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume, as_float32, odd_values

__all__ = ["magnitude", "probe_fastmri", "read_fastmri", "sniff_hdf5"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_RECONSTRUCTIONS, _HEADER = ("reconstruction_rss", "reconstruction_esc"), "ismrmrd_header"


def sniff_hdf5(head: bytes) -> bool:
    return head.startswith(_MAGIC)


def magnitude(kspace: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """(Z, [coil,] readout, phase) complex k-space to (Z, Y, X) float32: centred inverse FFT, root sum of squares, crop.

    The readout is oversampled twice; `crop` is the (Y, X) size kept around the centre.
    """
    out = []
    for plane in kspace:  # one slice at a time: k-space of 16 coils is large
        shifted = np.fft.ifftshift(plane.astype(np.complex64), axes=(-2, -1))
        image = np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
        y, x = (min(n, m) for n, m in zip(crop, image.shape[-2:], strict=True))
        top, left = (image.shape[-2] - y) // 2, (image.shape[-1] - x) // 2
        power = np.abs(image[..., top : top + y, left : left + x]) ** 2
        out.append(np.sqrt(power if power.ndim == 2 else power.sum(axis=0)))
    return np.stack(out).astype(np.float32)


def probe_fastmri(path: str) -> tuple[tuple[int, int, int], tuple[float, float, float] | None]:
    """(Z, Y, X) and voxel sizes in zyx mm (None where the header has none), without reading voxels."""
    name = os.path.basename(path)
    found = _look(path, name)
    geometry, _ = _geometry(found, name)
    for key in _RECONSTRUCTIONS:
        if key in found.arrays:
            z, y, x = _shape(found, key, name, 3)
            return (z, y, x), geometry
    kspace = _shape(found, "kspace", name, 3, 4)
    crop = _crop(found, name, kspace)
    return (kspace[0], min(crop[0], kspace[-2]), min(crop[1], kspace[-1])), geometry


def read_fastmri(path: str, *, from_kspace: bool = False) -> Volume:
    """The reference reconstruction as stored; the magnitude of the k-space where there is none, or on request."""
    name = os.path.basename(path)
    notes = ["slices without a place: voxel sizes from the header, distance of slices taken as their thickness"]
    found = _look(path, name)
    spacing, remarks = _geometry(found, name)
    key = next((k for k in _RECONSTRUCTIONS if k in found.arrays), None)
    if key is not None and not from_kspace:
        voxels = _read(path, name, found, key, _shape(found, key, name, 3), np.dtype(np.float32))
    else:
        shape = _shape(found, "kspace", name, 3, 4)
        kspace = _read(path, name, found, "kspace", shape, np.dtype(np.complex64))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite in the end is refused
            voxels = magnitude(kspace, _crop(found, name, shape))
        notes.append("magnitude of the k-space, root sum of squares over coils")
        if "mask" in found.arrays:
            notes.append("undersampled k-space, zero-filled: aliased")
    voxels = as_float32(voxels, name)
    if spacing is None:
        notes = [remarks, *notes[1:]]
    z_mm, y_mm, x_mm = spacing or (1.0, 1.0, 1.0)
    tags = {"acquisition": found.acquisition} if found.acquisition.replace("_", "").isalnum() else {}
    return Volume(
        voxels=voxels, affine=np.diag([x_mm, y_mm, z_mm, 1.0]), modality="MR", units="arbitrary",
        notes=(*notes, *odd_values(voxels)), source=path, geometry="spacing" if spacing else "none",
        provenance={
            "format": "fastMRI HDF5", "reader": "h5py", "files": 1, "bytes": os.path.getsize(path), "tags": tags
        },
    )  # fmt: skip


@dataclass(frozen=True)
class _File:
    """What lies in a file, as the child process saw it."""

    arrays: dict[str, dict[str, Any] | None]
    header: bytes | None
    acquisition: str


def _look(path: str, name: str) -> _File:
    if importlib.util.find_spec("h5py") is None:
        raise ScanError(f"{name}: HDF5 needs h5py; pip install -e '.[formats]'")
    keys = [*_RECONSTRUCTIONS, "kspace", "mask"]
    try:
        facts, _ = call(name, "hdf5_look", {"path": os.path.abspath(path), "keys": keys, "text": _HEADER}, most=0)
    except NativeError as error:
        raise _damaged(name, error) from error
    found, text = facts["found"], facts["text"]
    if _HEADER in found and text is None:
        raise ScanError(f"{name}: ismrmrd_header must be one XML text; the file is damaged")
    header = None if text is None else text.encode("latin1")
    return _File({k: v for k, v in found.items() if k != _HEADER}, header, facts["attrs"]["acquisition"][:32])


def _read(path: str, name: str, file: _File, key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Here where the file holds the bytes as they are, which takes no library; else in the child process."""
    size, found = int(np.prod(shape, dtype=object)) * dtype.itemsize, file.arrays[key] or {}
    if found.get("offset") is not None:
        stored, count = np.dtype(found["dtype"]), int(np.prod(shape, dtype=object))
        values = np.fromfile(path, stored, count, offset=int(found["offset"]))
        if len(values) != count:
            raise ScanError(f"{name}: cut off, {len(values):,} of {count:,} values are here; copy the file again")
        return values.astype(dtype, copy=False).reshape(shape)
    try:
        arguments = {"path": os.path.abspath(path), "key": key, "dtype": dtype.str}
        return call(name, "hdf5_read", arguments, most=size)[1]
    except NativeError as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: NativeError) -> ScanError:
    return ScanError(f"{name}: HDF5 file is cut off or damaged ({str(error).partition(':')[0]}); copy it again")


def _shape(file: _File, key: str, name: str, *dims: int) -> tuple[int, ...]:
    """That of a data set that lies in this very file, of a size that may be read."""
    if key not in file.arrays:
        raise ScanError(f"{name}: HDF5 without {key!r} in it, not a fastMRI file")
    found = file.arrays[key]
    if found is None or not found["own"] or found["kind"] not in "fc":
        raise ScanError(f"{name}: {key!r} is no array of this file; external and virtual data are not followed")
    shape = tuple(int(n) for n in found["shape"])
    if len(shape) not in dims or 0 in shape:
        raise ScanError(f"{name}: {key!r} of shape {shape} must have {' or '.join(map(str, dims))} axes")
    needed = int(np.prod(shape, dtype=object)) * max(8 if found["kind"] == "c" else 4, found["itemsize"])
    if needed > MAX_VOLUME_BYTES:
        raise ScanError(f"{name}: {key!r} of shape {shape} is above {MAX_VOLUME_BYTES:,} bytes")
    if needed > max(2**20, 1100 * found["stored"]):
        raise ScanError(
            f"{name}: {key!r} declares more than its {found['stored']:,} stored bytes can hold; made up or cut off"
        )
    return shape


def _space(file: _File, name: str) -> Any:
    """The reconSpace element of the ISMRMRD header; None where there is none."""
    return None if file.header is None else parse_xml(file.header, name, limit=2**22).find("encoding/reconSpace")


def _geometry(file: _File, name: str) -> tuple[tuple[float, float, float] | None, str]:
    """Voxel sizes in zyx mm, field of view over matrix. The header's x is the readout, the file's first image axis."""
    if file.header is None:
        return None, "no voxel size: the file has no ISMRMRD header"
    space = _space(file, name)
    try:
        sizes = [
            float(space.findtext(f"fieldOfView_mm/{axis}", "")) / int(space.findtext(f"matrixSize/{axis}", ""))
            for axis in "zxy"
        ]
    except (AttributeError, ValueError, ArithmeticError):
        return None, "no voxel size: the ISMRMRD header has no field of view"
    if not all(SMALLEST_MM <= s <= LARGEST_MM for s in sizes):
        return None, f"no voxel size: the ISMRMRD header gives {', '.join(f'{s:.3g}' for s in sizes)} mm"
    return (sizes[0], sizes[1], sizes[2]), ""


def _crop(file: _File, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(readout, phase) of the reconstructed matrix; without a header, the middle square."""
    space = _space(file, name)
    if space is None:
        side = min(shape[-2:])
        return side, side
    try:
        readout, phase = (int(space.findtext(f"matrixSize/{axis}", "")) for axis in "xy")
        if min(readout, phase) < 1:
            raise ValueError
    except ValueError as error:
        raise ScanError(f"{name}: ISMRMRD header without a matrix size; the file is damaged") from error
    return readout, phase
