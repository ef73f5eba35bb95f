"""MetaImage and NRRD: voxels that are no finite numbers are refused, wherever and whatever they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medformer.data import ScanError, find_scans, read_volume

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is in the extras formats and test")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_not_finite_is_refused(tmp_path: Path, suffix: str, dtype: type, value: float) -> None:
    voxels = np.random.default_rng(0).normal(100, 20, (4, 5, 6)).astype(dtype)
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    np.testing.assert_array_equal(read_volume(path, canonical=False).voxels, voxels.astype(np.float32))
    voxels[3, 4, 5] = value
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    with pytest.raises(ScanError, match=rf"^a\{suffix}: 1 of \d+ voxels are NaN or infinite, all must be finite"):
        read_volume(path)
    assert [scan.name for scan in find_scans(tmp_path).scans] == ["a"]  # found by its header, refused when it is read
