"""Grey values to network input: a fixed map for CT, a robust z-score for everything else."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.volumes import Volume

__all__ = ["HU_RANGE", "HU_SCALE", "Scaling", "count_labels", "normalise", "scaling_of"]

HU_RANGE = (-1000.0, 1000.0)
HU_SCALE = 500.0
_SAMPLES = 2_000_000
_MOST_LABELS = 512


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Stored grey values to network input: (clip(x, low, high) - mean) / scale."""

    low: float
    high: float
    mean: float
    scale: float

    def apply(self, voxels: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """float32 of any part of the volume; where `valid` is False it gets the lowest value."""
        out = voxels.astype(np.float32)
        if valid is not None:
            out[~valid] = self.low
        np.clip(out, self.low, self.high, out=out)
        out -= np.float32(self.mean)
        out /= np.float32(self.scale)
        return out


def normalise(volume: Volume) -> np.ndarray:
    """float32 (Z, Y, X) of about zero mean and unit scale, finite everywhere.

    Volumes in HU: clipped to [-1000, 1000] and divided by 500, so that water is 0, air -2 and the same tissue
    has the same value in every scan. All others: the foreground is what lies above the mean of the measured
    voxels; values are clipped to [0.5th percentile of all, 99.5th of the foreground], then shifted by the
    foreground's mean and scaled by its standard deviation, or by half the distance from mean to lowest value
    where that is more, so that background lies at -2 at least, as in CT.

    Padding (`valid` False) never enters the statistics and gets the lowest value. Raises ScanError for a volume
    without contrast, which has no scale.
    """
    return scaling_of(volume).apply(volume.voxels, volume.valid)


def scaling_of(volume: Volume) -> Scaling:
    """What `normalise` applies, found slice by slice: the volume is never held a second time. Raises ScanError."""
    name = os.path.basename(volume.source.rstrip("/")) or volume.source
    voxels, valid = volume.voxels, volume.valid
    count = voxels.size if valid is None else int(np.count_nonzero(valid))
    if not count:
        raise ScanError(f"{name}: every voxel is padding; leave this scan out")
    # Every step-th measured voxel, in the order of the volume.
    step, before, samples = max(1, count // _SAMPLES), 0, []
    lowest, highest = np.inf, -np.inf
    for z in range(len(voxels)):
        measured = voxels[z].ravel() if valid is None else voxels[z][valid[z]]
        if not measured.size:
            continue
        if measured.dtype.kind == "f" and not np.isfinite(measured).all():
            raise ScanError(f"{name}: voxels are NaN or infinite, all must be finite; replace them first")
        lowest, highest = min(lowest, float(measured.min())), max(highest, float(measured.max()))
        samples.append(measured[-before % step :: step].astype(np.float32))
        before += measured.size
    if volume.units == "HU":
        found = Scaling(low=HU_RANGE[0], high=HU_RANGE[1], mean=0.0, scale=HU_SCALE)
        flat = lowest >= found.high or highest <= found.low or lowest == highest
    else:
        found = _robust(np.concatenate(samples).astype(np.float64))
        flat = found.scale <= 1e-6 * max(1.0, abs(found.mean)) if found.high > found.low else True
    if flat:
        raise ScanError(
            f"{name}: voxels are constant (from {lowest:g} to {highest:g}), contrast is needed to scale them; leave "
            "this scan out"
        )
    return found


def _robust(sample: np.ndarray) -> Scaling:
    """Clip limits, mean and standard deviation of the foreground, from an even sample of the voxels."""
    foreground = sample[sample > sample.mean()]
    if not foreground.size:
        return Scaling(low=0.0, high=0.0, mean=0.0, scale=0.0)
    low, high = float(np.percentile(sample, 0.5)), float(np.percentile(foreground, 99.5))
    clipped = np.clip(foreground, low, high)
    mean = float(clipped.mean())
    return Scaling(low=low, high=high, mean=mean, scale=max(float(clipped.std()), (mean - low) / 2))


def count_labels(voxels: np.ndarray) -> int:
    """Labels in what looks like a label map, or 0 for what looks like a scan.

    A label map holds few whole numbers from 0 up, and most voxels of a label have their right neighbour in the same one
    (mean over labels: 0.57 for small lesions to 0.9 for organs; scans of 8 bits: 0.2 at most).
    """
    if not voxels.size or voxels.min() != 0:
        return 0
    if voxels.dtype.kind == "f" and not all(np.array_equal(plane, np.rint(plane)) for plane in voxels):
        return 0
    if len(np.unique(voxels.reshape(-1)[:: max(1, voxels.size // _SAMPLES)])) > _MOST_LABELS:
        return 0
    values = np.unique(voxels)
    if not 2 <= len(values) <= _MOST_LABELS:
        return 0
    index = np.searchsorted(values, voxels)
    left, right = index[..., :-1], index[..., 1:]
    pairs = np.bincount(left.ravel(), minlength=len(values))[1:]
    alike = np.bincount(left[left == right], minlength=len(values))[1:]
    shares = alike[pairs > 0] / pairs[pairs > 0]
    return len(values) - 1 if len(shares) and shares.mean() > 0.4 else 0
