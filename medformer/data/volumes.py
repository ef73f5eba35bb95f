"""A 3D scan in memory: voxels, where they lie in the patient, and what was assumed on the way."""

from __future__ import annotations

import base64
import json
import os
import re
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension

from medformer.data.geometry import ScanError, axis_codes, check_affine, closest_ras, spacing_of

__all__ = ["EXTENSION_MARK", "MAX_VOLUME_BYTES", "Volume", "as_float32", "counted", "nameless", "odd_values", "rescale"]

# A header may declare any size; more than this is refused before a byte is allocated.
MAX_VOLUME_BYTES = 8 * 2**30
# Begins the header extension that `Volume.save` writes and nifti.py reads.
EXTENSION_MARK = b"medformer 1 "
# Beyond the root of float32's range variances overflow; no scanner measures that.
_LARGEST = 1e18
# A note is due for values above this that are so many times what 99% of the voxels reach.
_ODD, _ODD_RATIO = 1e5, 1e3


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """One 3D scan.

    The voxel array is (Z, Y, X); the affine takes (x, y, z, 1) to RAS+ millimetres, as NIfTI does.
    """

    voxels: np.ndarray
    """(Z, Y, X), the stored integer type where that is exact, else float32; native byte order."""
    affine: np.ndarray
    """(4, 4) float64, voxel index (x, y, z, 1) to RAS+ mm. Oblique and sheared (tilted gantry) as acquired."""
    modality: str
    """"CT", "MR", "PT", ... as in DICOM; "unknown" where neither the header nor the values tell."""
    units: str
    """"HU" or "arbitrary"."""
    notes: tuple[str, ...]
    """Everything assumed or dropped; empty for a scan that needed nothing."""
    source: str
    """The file or folder read."""
    valid: np.ndarray | None = None
    """(Z, Y, X) bool, False where the scanner padded; None means all voxels are measured."""
    geometry: Literal["patient", "spacing", "none"] = "patient"
    """What the affine means: a place in the patient; voxel sizes alone (an X-ray); or nothing, voxels counted as 1."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Format, reader, files, bytes and how the image was made; plain JSON, without names, dates or identifiers."""

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or 0 in self.voxels.shape:
            raise ScanError(f"{_base(self.source)}: voxels of shape {self.voxels.shape} must be (Z, Y, X)")
        if self.valid is not None and self.valid.shape != self.voxels.shape:
            raise ScanError(f"{_base(self.source)}: valid is {self.valid.shape}, voxels are {self.voxels.shape}")
        check_affine(self.affine, _base(self.source))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        z, y, x = self.voxels.shape
        return z, y, x

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in zyx order."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """Where x, y and z run: "RAS" means to the right, the front and the head."""
        return axis_codes(self.affine)

    def canonical(self, *, copy: bool = True) -> Volume:
        """The same voxels with axes flipped and swapped, never resampled, to run closest to R, A and S.

        copy: in the order of memory; False gives a view, which takes no memory of its own.
        """
        order, flips = closest_ras(self.affine)
        if order == (0, 1, 2) and not any(flips):
            return self
        affine = self.affine.copy()
        matrix, origin = affine[:3, :3].copy(), affine[:3, 3].copy()
        size_xyz = self.voxels.shape[::-1]
        for world, axis in enumerate(order):
            column = matrix[:, axis]
            if flips[world]:
                origin = origin + column * (size_xyz[axis] - 1)
                column = -column
            affine[:3, world] = column
        affine[:3, 3] = origin

        def turn(array: np.ndarray) -> np.ndarray:
            turned = self.turned(array)
            return np.ascontiguousarray(turned) if copy else turned

        valid = None if self.valid is None else turn(self.valid)
        return replace(self, voxels=turn(self.voxels), affine=affine, valid=valid)

    def turned(self, array: np.ndarray) -> np.ndarray:
        """A view, on the axes of `canonical()`, of an array [..., Z, Y, X] on this volume's own axes."""
        order, flips = closest_ras(self.affine)
        lead = array.ndim - 3
        xyz = np.moveaxis(array, (-1, -2, -3), (lead, lead + 1, lead + 2))
        xyz = xyz.transpose(*range(lead), *(lead + axis for axis in order))
        xyz = xyz[(..., *(slice(None, None, -1 if flip else 1) for flip in flips))]
        return np.moveaxis(xyz, (lead, lead + 1, lead + 2), (-1, -2, -3))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write .nii or .nii.gz, whole or not at all.

        Modality, units, notes and the padding mask travel in a header extension, which `read_volume` takes up again
        and other readers pass over.
        """
        target = Path(path)
        suffix = ".nii.gz" if target.name.endswith(".nii.gz") else target.suffix
        if suffix not in {".nii", ".nii.gz"}:
            raise ScanError(f"{target.name}: a volume is saved as .nii or .nii.gz; rename the target")
        voxels = self.voxels.view(np.uint8) if self.voxels.dtype == bool else self.voxels
        image = nib.Nifti1Image(voxels.T, self.affine, dtype=voxels.dtype)
        image.header.set_xyzt_units("mm", "sec")
        image.header.extensions.append(Nifti1Extension("comment", _pack_extension(self)))
        image.set_sform(self.affine, code=1)
        cosines = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        rigid = bool(np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-5))
        # A qform cannot hold a shear: no qform is better than one that disagrees.
        image.set_qform(self.affine if rigid else None, code=1 if rigid else 0)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".draft-{uuid.uuid4().hex}{suffix}")
        try:
            nib.save(image, draft)
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return target


def _pack_extension(volume: Volume) -> bytes:
    """Modality, units, notes and the padding mask as the text of a NIfTI header extension (code 6, comment)."""
    values: dict[str, Any] = {
        "modality": volume.modality, "units": volume.units, "geometry": volume.geometry, "notes": list(volume.notes),
        "tags": dict(volume.provenance.get("tags", {})),
    }  # fmt: skip
    if volume.valid is not None:
        packed = zlib.compress(np.packbits(volume.valid.ravel()).tobytes(), 9)
        values["valid"] = base64.b64encode(packed).decode()
    return EXTENSION_MARK + json.dumps(values, separators=(",", ":")).encode()


def as_float32(values: np.ndarray, name: str) -> np.ndarray:
    """Floating-point values as float32. Raises ScanError for NaN, infinity, and what float32 cannot square."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = values.astype(np.float32, copy=False)
        low, high = float(out.min()), float(out.max())  # NaN where any is
    if max(-low, high) <= _LARGEST:
        return out
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ScanError(
            f"{name}: {bad} of {values.size} voxels are NaN or infinite, all must be finite; replace them first "
            "(numpy.nan_to_num) and save the file again"
        )
    raise ScanError(
        f"{name}: voxels of up to {max(-low, high):.3g} in float32, at most {_LARGEST:g} are read; rescale them first, "
        "or fix the slope in the header"
    )


def odd_values(voxels: np.ndarray) -> tuple[str, ...]:
    """A note where a few values lie far beyond all others, as a damaged file or a fill value has them."""
    if voxels.dtype.itemsize <= 2 and voxels.dtype.kind != "f":
        return ()
    high = max(-float(voxels.min()), float(voxels.max()))
    if high <= _ODD:
        return ()
    usual = float(np.percentile(np.abs(voxels.ravel()[:: max(1, voxels.size // 500_000)]), 99))
    if high <= _ODD_RATIO * usual:
        return ()
    return (f"values reach {high:.3g} while 99% are below {usual:.3g}: a fill value, or damage",)


def rescale(
    stored: np.ndarray, slope: np.ndarray | float, intercept: np.ndarray | float, name: str = "scan"
) -> np.ndarray:
    """stored * slope + intercept in the smallest type that is exact; float32 where none is.

    slope and intercept broadcast against `stored`. Unity keeps the stored type; whole numbers give int16,
    else int32; everything else float32, computed in float64.
    """
    slope, intercept = np.asarray(slope, dtype=np.float64), np.asarray(intercept, dtype=np.float64)
    if (slope == 1).all() and (intercept == 0).all():
        return stored
    whole = bool((slope == np.round(slope)).all() and (intercept == np.round(intercept)).all())
    if whole and stored.dtype.kind in "iu" and stored.size and np.abs(slope).max() < 2**15:
        low, high = float(stored.min()), float(stored.max())
        corners = [v * s + i for v in (low, high) for s in np.unique(slope) for i in np.unique(intercept)]
        for dtype in (np.int16, np.int32):
            info = np.iinfo(dtype)
            if min(corners) >= info.min and max(corners) <= info.max:
                if (slope == 1).all() and np.abs(intercept).max() <= info.max and high <= info.max and low >= info.min:
                    return stored.astype(dtype) + intercept.astype(dtype)
                return (stored.astype(np.int64) * slope.astype(np.int64) + intercept.astype(np.int64)).astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        out = stored.astype(np.float64) * slope + intercept
    return as_float32(out, name)


def nameless(notes: Iterable[str]) -> list[str]:
    """Notes without the names of files that are in some."""
    kept = (note for note in notes if not note.startswith("left out: "))
    return [re.sub(r"^(resampled onto the grid of ).*( by linear)", r"\1the first channel\2", note) for note in kept]


def counted(notes: Iterable[Sequence[str]], what: str, most: int = 8) -> list[str]:
    """The notes of many scans as a few lines, each note once with how many have it, the most frequent first."""
    lists = list(notes)
    count = Counter(note for some in lists for note in dict.fromkeys(some))
    lines = [f"{number} of {len(lists)} {what}: {note}" for note, number in count.most_common(most)]
    return [*lines, f"and {len(count) - most} more kinds of notes"] if len(count) > most else lines


def _base(source: str) -> str:
    return os.path.basename(source.rstrip("/")) or source
