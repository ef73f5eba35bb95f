"""Grey values to network input: a fixed map for CT, a robust z-score for everything else."""

from __future__ import annotations

import os

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.volumes import Volume

__all__ = ["HU_RANGE", "HU_SCALE", "normalise"]

HU_RANGE = (-1000.0, 1000.0)
HU_SCALE = 500.0
_SAMPLES = 2_000_000


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
    name = os.path.basename(volume.source.rstrip("/")) or volume.source
    voxels = volume.voxels.astype(np.float32)
    measured = voxels.ravel() if volume.valid is None else voxels[volume.valid]
    if not measured.size:
        raise ScanError(f"{name}: every voxel is padding; leave this scan out")
    if not np.isfinite(measured).all():
        raise ScanError(f"{name}: voxels are NaN or infinite, all must be finite; replace them first")
    if volume.units == "HU":
        low, high = HU_RANGE
        mean, scale = 0.0, HU_SCALE
        flat = bool(measured.min() >= high or measured.max() <= low) or measured.min() == measured.max()
    else:
        low, high, mean, scale = _robust(measured)
        flat = scale <= 1e-6 * max(1.0, abs(mean)) if high > low else True
    if flat:
        raise ScanError(
            f"{name}: voxels are constant (from {measured.min():g} to {measured.max():g}), contrast is needed to scale "
            "them; leave this scan out"
        )
    if volume.valid is not None:
        voxels[~volume.valid] = low
    np.clip(voxels, low, high, out=voxels)
    voxels -= np.float32(mean)
    voxels /= np.float32(scale)
    return voxels


def _robust(measured: np.ndarray) -> tuple[float, float, float, float]:
    """Clip limits, mean and standard deviation of the foreground, from an even sample of the voxels."""
    sample = measured[:: max(1, measured.size // _SAMPLES)].astype(np.float64)
    foreground = sample[sample > sample.mean()]
    if not foreground.size:
        return 0.0, 0.0, 0.0, 0.0
    low, high = float(np.percentile(sample, 0.5)), float(np.percentile(foreground, 99.5))
    clipped = np.clip(foreground, low, high)
    mean = float(clipped.mean())
    return low, high, mean, max(float(clipped.std()), (mean - low) / 2)
