"""fastMRI HDF5 files: stacks of 2D slices as k-space, with or without the reference reconstruction.

Source: Zbontar et al. 2018 (arXiv:1811.08839), section 4; ismrmrd.github.io (the XML header). An extra: h5py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.safe_xml import parse_xml
from medformer.data.volumes import MAX_VOLUME_BYTES, Volume

__all__ = ["magnitude", "probe_fastmri", "read_fastmri", "sniff_hdf5"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_RECONSTRUCTIONS = ("reconstruction_rss", "reconstruction_esc")


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
    with _open(path, name) as file, _damage(name):
        geometry, _ = _geometry(file, name)
        for key in _RECONSTRUCTIONS:
            if key in file:
                z, y, x = _array(file, key, name, 3).shape
                return (z, y, x), geometry
        kspace = _array(file, "kspace", name, 3, 4)
        crop = _crop(file, name, kspace.shape)
        return (kspace.shape[0], min(crop[0], kspace.shape[-2]), min(crop[1], kspace.shape[-1])), geometry


def read_fastmri(path: str, *, from_kspace: bool = False) -> Volume:
    """The reference reconstruction as stored; the magnitude of the k-space where there is none, or on request."""
    name = os.path.basename(path)
    notes = ["slices without a place: voxel sizes from the header, distance of slices taken as their thickness"]
    with _open(path, name) as file, _damage(name):
        spacing, told = _geometry(file, name)
        key = next((k for k in _RECONSTRUCTIONS if k in file), None)
        if key is not None and not from_kspace:
            voxels = np.asarray(_array(file, key, name, 3), np.float32)
        else:
            kspace = _array(file, "kspace", name, 3, 4)
            voxels = magnitude(kspace, _crop(file, name, kspace.shape))
            notes.append("magnitude of the k-space, root sum of squares over coils")
            if "mask" in file:
                notes.append("undersampled k-space, zero-filled: aliased")
        sequence = str(file.attrs.get("acquisition", ""))[:32]
    if not np.isfinite(voxels).all():
        raise ScanError(f"{name}: voxels are NaN or infinite, all must be finite; leave this file out")
    if spacing is None:
        notes = [told, *notes[1:]]
    z_mm, y_mm, x_mm = spacing or (1.0, 1.0, 1.0)
    tags = {"acquisition": sequence} if sequence.replace("_", "").isalnum() else {}
    return Volume(
        voxels=voxels, affine=np.diag([x_mm, y_mm, z_mm, 1.0]), modality="MR", units="arbitrary", notes=tuple(notes),
        source=path, geometry="spacing" if spacing else "none",
        provenance={
            "format": "fastMRI HDF5", "reader": "h5py", "files": 1, "bytes": os.path.getsize(path), "tags": tags
        },
    )  # fmt: skip


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """h5py raises what it likes on damage."""
    try:
        yield
    except ScanError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ScanError(f"{name}: HDF5 file is cut off or damaged ({type(error).__name__}); copy it again") from error


def _open(path: str, name: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ScanError(f"{name}: HDF5 needs h5py; pip install -e '.[formats]'") from error
    try:
        return h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ScanError(f"{name}: HDF5 file is cut off or damaged; copy it again") from error


def _array(file: Any, key: str, name: str, *dims: int) -> Any:
    """A data set that lies in this very file, of a size that may be read."""
    import h5py

    if key not in file or not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise ScanError(f"{name}: HDF5 without {key!r} in it, not a fastMRI file")
    found = file[key]
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or found.dtype.kind not in "fc":
        raise ScanError(f"{name}: {key!r} is no array of this file; external and virtual data are not followed")
    if len(found.shape) not in dims or 0 in found.shape:
        raise ScanError(f"{name}: {key!r} of shape {found.shape} must have {' or '.join(map(str, dims))} axes")
    if int(np.prod(found.shape, dtype=object)) * found.dtype.itemsize > MAX_VOLUME_BYTES:
        raise ScanError(f"{name}: {key!r} of shape {found.shape} is above {MAX_VOLUME_BYTES:,} bytes")
    stored = found.id.get_storage_size()
    if int(np.prod(found.shape, dtype=object)) * found.dtype.itemsize > max(2**20, 1100 * stored):
        raise ScanError(f"{name}: {key!r} declares more than its {stored:,} stored bytes can hold; made up or cut off")
    return found


def _header(file: Any, name: str) -> Any:
    if "ismrmrd_header" not in file:
        return None
    value = file["ismrmrd_header"]
    if value.shape != () or value.id.get_storage_size() > 2**22:
        raise ScanError(f"{name}: ismrmrd_header must be one XML text; the file is damaged")
    text = value[()]
    return parse_xml(text if isinstance(text, bytes) else str(text).encode(), name, limit=2**22)


def _geometry(file: Any, name: str) -> tuple[tuple[float, float, float] | None, str]:
    """Voxel sizes in zyx mm, field of view over matrix. The header's x is the readout, the file's first image axis."""
    root = _header(file, name)
    space = None if root is None else root.find("encoding/reconSpace")
    if space is None:
        return None, "no voxel size: the file has no ISMRMRD header"
    try:
        sizes = [
            float(space.findtext(f"fieldOfView_mm/{axis}", "")) / int(space.findtext(f"matrixSize/{axis}", ""))
            for axis in "zxy"
        ]
    except (ValueError, ZeroDivisionError):
        return None, "no voxel size: the ISMRMRD header has no field of view"
    if not all(np.isfinite(s) and s > 0 for s in sizes):
        return None, f"no voxel size: the ISMRMRD header gives {sizes} mm"
    return (sizes[0], sizes[1], sizes[2]), ""


def _crop(file: Any, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(readout, phase) of the reconstructed matrix; without a header, the middle square."""
    root = _header(file, name)
    space = None if root is None else root.find("encoding/reconSpace")
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
