"""A 3D scan in memory: voxels, where they lie in the patient, and what was assumed on the way."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension

from medformer.data.geometry import ScanError, axis_codes, check_affine, closest_ras, spacing_of

__all__ = ["MAX_VOLUME_BYTES", "Volume", "rescale"]

# A header may declare any size; more than this is refused before a byte is allocated.
MAX_VOLUME_BYTES = 8 * 2**30


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

    def canonical(self) -> Volume:
        """The same voxels with axes flipped and swapped, never resampled, to run closest to R, A and S."""
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
            xyz = array.transpose(2, 1, 0).transpose(order)
            xyz = xyz[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
            return np.ascontiguousarray(xyz.transpose(2, 1, 0))

        valid = None if self.valid is None else turn(self.valid)
        return replace(self, voxels=turn(self.voxels), affine=affine, valid=valid)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write .nii or .nii.gz, whole or not at all.

        Modality, units, notes and the padding mask travel in a header extension, which `read_volume` takes up again
        and other readers pass over.
        """
        from medformer.data.nifti import pack_extension  # which needs Volume

        target = Path(path)
        suffix = ".nii.gz" if target.name.endswith(".nii.gz") else target.suffix
        if suffix not in {".nii", ".nii.gz"}:
            raise ScanError(f"{target.name}: a volume is saved as .nii or .nii.gz; rename the target")
        voxels = self.voxels.view(np.uint8) if self.voxels.dtype == bool else self.voxels
        image = nib.Nifti1Image(voxels.T, self.affine, dtype=voxels.dtype)
        image.header.set_xyzt_units("mm", "sec")
        image.header.extensions.append(Nifti1Extension("comment", pack_extension(self)))
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


def rescale(stored: np.ndarray, slope: np.ndarray | float, intercept: np.ndarray | float) -> np.ndarray:
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
    with np.errstate(over="ignore"):
        out = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    if not np.isfinite(out).all():
        raise ScanError(
            f"slope {np.abs(slope).max():g} and intercept {np.abs(intercept).max():g} exceed float32; fix the header"
        )
    return out


def _base(source: str) -> str:
    return os.path.basename(source.rstrip("/")) or source
