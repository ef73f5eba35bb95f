"""Where slices lie in the patient: order, step, gaps, tilt and the affine, from header numbers alone.

Pure NumPy: no file is opened here. DICOM gives positions and directions in LPS+ millimetres (x to the
patient's left, y to the back, z to the head); everything returned is RAS+, as NIfTI has it.

Source: DICOM PS3.3, C.7.6.2.1.1 (Image Position, Image Orientation, the mapping from pixel to patient).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

__all__ = [
    "FARTHEST_MM",
    "LARGEST_MM",
    "LENGTH_UNITS_MM",
    "ORIENTATION_TOLERANCE",
    "SMALLEST_MM",
    "MissingSlices",
    "ScanError",
    "SliceStack",
    "axis_codes",
    "check_affine",
    "closest_ras",
    "cluster_orientations",
    "spacing_of",
    "stack_slices",
]

# Direction cosines of one series may differ by rounding: 5e-4 is 0.18 mm at the far edge of a 350 mm image.
ORIENTATION_TOLERANCE = 5e-4
# What a voxel may measure, and how far from the origin it may lie: a nanometre to 10 m, and 100 km.
SMALLEST_MM, LARGEST_MM, FARTHEST_MM = 1e-6, 1e4, 1e8
# Names of units of length in headers, in mm.
LENGTH_UNITS_MM = {
    "m": 1e3, "meter": 1e3, "metre": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "\u00b5m": 1e-3, "\u03bcm": 1e-3,
    "micron": 1e-3, "nm": 1e-6, **{f"{short}met{end}": size for short, size in (
        ("centi", 10.0), ("milli", 1.0), ("micro", 1e-3), ("nano", 1e-6)) for end in ("er", "re")},
}  # fmt: skip
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class ScanError(ValueError):
    """A scan that cannot be read right. One line: what, the value, the rule, the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class MissingSlices(ScanError):
    """A stack with gaps of whole steps."""


@dataclass(frozen=True, kw_only=True)
class SliceStack:
    """A regular stack of parallel slices."""

    groups: tuple[tuple[int, ...], ...]
    """Input indices by position, in the order of the slice normal; a group of two or more repeats a position."""
    affine: np.ndarray
    """(4, 4): voxel index (column, row, slice, 1) to RAS+ millimetres."""
    tilt_deg: float
    """Angle between the step from slice to slice and the slice normal; not 0 for a tilted gantry."""
    residual_mm: float
    """Greatest distance of a slice from where the affine puts it."""


def stack_slices(
    positions: np.ndarray,
    orientation: np.ndarray,
    pixel_spacing: tuple[float, float],
    *,
    single_depth_mm: float | None = None,
    what: str = "series",
) -> SliceStack:
    """Sort slices along their normal and fit one affine to them, or say why none fits.

    positions: (N, 3) ImagePositionPatient in LPS mm, any order. orientation: the 6 direction cosines of
    ImageOrientationPatient. pixel_spacing: (row, column) spacing as DICOM's PixelSpacing. single_depth_mm:
    the depth of a lone slice. what: named in errors.

    The step is the least-squares fit over all positions; a slice may lie at most 0.06 mm (or 2 % of the
    step, and never more than 10 % of it) from the fitted place. Raises ScanError for missing slices, uneven
    gaps and directions that are no frame.
    """
    positions = np.asarray(positions, dtype=np.float64).reshape(-1, 3)
    row, col = _frame(np.asarray(orientation, dtype=np.float64), what)
    row_mm, col_mm = (float(s) for s in pixel_spacing)
    if not (min(row_mm, col_mm) > SMALLEST_MM and max(row_mm, col_mm) <= LARGEST_MM):
        raise ScanError(
            f"{what}: PixelSpacing {row_mm:g} x {col_mm:g} mm must be positive and at most "
            f"{LARGEST_MM:g}; fix the header"
        )
    if not (np.abs(positions) <= FARTHEST_MM).all():
        raise ScanError(
            f"{what}: ImagePositionPatient holds a value that is not finite, or beyond {FARTHEST_MM:g} mm; fix the "
            "header"
        )
    normal = np.cross(row, col)
    groups = _group_by_depth(positions, normal, min(row_mm, col_mm), what)
    unique = np.array([positions[g[0]] for g in groups])
    if len(unique) == 1:
        depth = single_depth_mm if single_depth_mm else 1.0
        if not SMALLEST_MM < depth <= LARGEST_MM:
            raise ScanError(f"{what}: slice {depth:g} mm deep, at most {LARGEST_MM:g} are read; fix SliceThickness")
        origin, step, residual = unique[0], normal * depth, 0.0
    else:
        origin, step, residual = _fit_step(unique, normal, what)
    cosine = float(step @ normal / np.linalg.norm(step))
    sine = float(np.linalg.norm(np.cross(step, normal)) / np.linalg.norm(step))
    tilt = float(np.degrees(np.arctan2(sine, cosine)))
    if tilt > 45:
        raise ScanError(
            f"{what}: slices shift {tilt:.1f} deg off their normal, at most 45 is a stack; the files mix several scans"
        )
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2], lps[:3, 3] = row * col_mm, col * row_mm, step, origin
    return SliceStack(groups=groups, affine=_LPS_TO_RAS @ lps, tilt_deg=tilt, residual_mm=residual)


def _frame(orientation: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    if orientation.shape != (6,) or not np.isfinite(orientation).all():
        raise ScanError(f"{what}: ImageOrientationPatient must be 6 finite numbers; fix the header")
    row, col = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(col)
    if max(abs(length - 1) for length in lengths) > 5e-3 or abs(row @ col) > 5e-3:
        raise ScanError(
            f"{what}: ImageOrientationPatient {np.round(orientation, 4).tolist()} is not two perpendicular unit "
            "vectors; fix the header"
        )
    row = row / lengths[0]
    col = col - (col @ row) * row
    return row, col / np.linalg.norm(col)


def _group_by_depth(
    positions: np.ndarray, normal: np.ndarray, pixel_mm: float, what: str
) -> tuple[tuple[int, ...], ...]:
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    same = 0.02 * pixel_mm
    groups: list[list[int]] = []
    for i in order.tolist():
        if groups and depth[i] - depth[groups[-1][0]] <= same:
            shift = float(np.linalg.norm(positions[i] - positions[groups[-1][0]]))
            if shift > 0.1 * pixel_mm + same:
                raise ScanError(
                    f"{what}: two slices at the same depth lie {shift:.3g} mm apart in their plane; the files mix "
                    "several scans: read them separately"
                )
            groups[-1].append(i)
        else:
            groups.append([i])
    return tuple(tuple(g) for g in groups)


def _fit_step(unique: np.ndarray, normal: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray, float]:
    depth = unique @ normal
    gaps = np.diff(depth)
    # With few slices left the median may fall between one gap and two: then the smallest is one step.
    for typical in (float(np.median(gaps)), float(gaps.min())):
        whole = np.round(gaps / typical)
        if not ((whole >= 2).any() and (np.abs(gaps / typical - whole) <= 0.1).all()):
            continue
        lost = [depth[i] + typical * j for i in np.flatnonzero(whole >= 2) for j in range(1, int(min(whole[i], 50)))]
        count = int((whole - 1).sum())
        named = ", ".join(f"{_place(unique, normal, depth, x)}" for x in lost[:3]) + (", ..." if count > 3 else "")
        raise MissingSlices(
            f"{what}: {count} of {len(unique) + count} slices missing, at {named} (steps of {typical:.4g} mm, "
            f"gap of {gaps.max():.4g}); a stack must be complete: copy the missing files, or read the parts separately"
        )
    index = np.arange(len(unique), dtype=np.float64)
    centred = index - index.mean()
    step = centred @ unique / (centred @ centred)
    mean = unique.mean(axis=0)
    residual = float(np.linalg.norm(unique - (mean + centred[:, None] * step), axis=1).max())
    length = float(np.linalg.norm(step))
    allowed = max(0.02 * length, min(0.06, 0.1 * length))
    if residual > allowed:
        raise ScanError(
            f"{what}: uneven slices, gaps {gaps.min():.4g} to {gaps.max():.4g} mm and up to {residual:.3g} mm off an "
            f"even stack (at most {allowed:.3g}); no affine describes them: resample to an even grid first"
        )
    return mean - index.mean() * step, step, residual


def _place(unique: np.ndarray, normal: np.ndarray, depth: np.ndarray, x: float) -> str:
    """Position of a lost slice in LPS mm, by linear interpolation along the stack."""
    point = [float(np.interp(x, depth, unique[:, a])) for a in range(3)]
    return "(" + " ".join(f"{p:.4g}" for p in point) + ") mm"


def cluster_orientations(orientations: np.ndarray, tolerance: float = ORIENTATION_TOLERANCE) -> np.ndarray:
    """Label (N, K) rows so that rows within `tolerance` of a cluster's first row share a label.

    Rounding to a grid would split two values that fall on either side of a grid line; this does not.
    """
    rows = np.asarray(orientations, dtype=np.float64)
    labels = np.full(len(rows), -1, dtype=np.int64)
    count = 0
    while (labels < 0).any():
        first = rows[np.flatnonzero(labels < 0)[0]]
        near = (np.abs(rows - first) <= tolerance).all(axis=1) & (labels < 0)
        near[np.flatnonzero(labels < 0)[0]] = True
        labels[near] = count
        count += 1
    return labels


def check_affine(affine: np.ndarray, what: str) -> np.ndarray:
    """The affine as float64, or ScanError where it is not finite or has no volume."""
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ScanError(f"{what}: affine must be 4 x 4 and finite; fix the header's sform or qform")
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise ScanError(f"{what}: last row of the affine is {affine[3].tolist()}, must be 0 0 0 1; fix the header")
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.max() > LARGEST_MM or np.abs(affine[:3, 3]).max() > FARTHEST_MM:
        raise ScanError(
            f"{what}: voxels of {', '.join(f'{v:.4g}' for v in lengths)} mm at up to {np.abs(affine[:3, 3]).max():.4g} "
            f"mm from the origin, at most {LARGEST_MM:g} and {FARTHEST_MM:g} are read; fix the header"
        )
    if not (lengths > SMALLEST_MM).all() or abs(np.linalg.det(affine[:3, :3] / np.maximum(lengths, 1e-12))) < 1e-3:
        raise ScanError(
            f"{what}: affine with axes of {', '.join(f'{v:.4g}' for v in lengths)} mm is singular: it gives voxels no "
            "place; fix the header's sform or qform"
        )
    return affine


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm, in zyx order: the lengths of the affine's columns."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return z, y, x


def closest_ras(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which voxel axis (0 x, 1 y, 2 z) runs closest to R, A and S, and whether it must be flipped to do so."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    order = max(
        itertools.permutations(range(3)), key=lambda p: round(sum(abs(float(cosines[i, p[i]])) for i in range(3)), 9)
    )
    flips = [bool(cosines[i, order[i]] < 0) for i in range(3)]
    return (order[0], order[1], order[2]), (flips[0], flips[1], flips[2])


def axis_codes(affine: np.ndarray) -> str:
    """Where x, y and z of the voxel grid run, e.g. "RAS" or "LPS"."""
    order, flips = closest_ras(affine)
    codes = [""] * 3
    for world, axis in enumerate(order):
        codes[axis] = ("LR", "PA", "IS")[world][0 if flips[world] else 1]
    return "".join(codes)
