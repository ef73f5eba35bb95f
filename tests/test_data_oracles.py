"""Where other readers accept a series and are right, ours gives the same voxels and the same places."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medformer.data import ScanError, Volume, make_phantom, read_volume, write_dicom_series
from tests.dicom_files import OBLIQUE, normal_of, write_series

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real scans are not at {SHARED}")
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def series(folder: Path, iop: tuple[float, ...]) -> Path:
    write_series(folder, np.arange(7) * 1.3, step=tuple(normal_of(iop)), iop=iop)
    return folder


@pytest.mark.parametrize("iop", [OBLIQUE, SAGITTAL, CORONAL])
class TestGenerated:
    def test_simpleitk(self, tmp_path: Path, iop: tuple[float, ...]) -> None:
        sitk = pytest.importorskip("SimpleITK")
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series(tmp_path, iop))))
        theirs, ours = reader.Execute(), read_volume(tmp_path, canonical=False)
        np.testing.assert_array_equal(ours.voxels, sitk.GetArrayFromImage(theirs))
        for index in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
            there = np.array(theirs.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
            np.testing.assert_allclose((ours.affine @ [*index, 1])[:3], there, atol=1e-3)

    def test_highdicom(self, tmp_path: Path, iop: tuple[float, ...]) -> None:
        image = pytest.importorskip("highdicom.image")
        import pydicom

        files = [pydicom.dcmread(p) for p in series(tmp_path, iop).iterdir()]
        theirs = image.get_volume_from_series(files, dtype=np.float64)
        ours = read_volume(tmp_path, canonical=False)
        # Theirs is (slice, row, column) to LPS, with slices along either direction of the normal.
        matrix = np.diag([-1, -1, 1, 1.0]) @ theirs.affine
        np.testing.assert_array_equal(np.sort(theirs.array.ravel()), np.sort(ours.voxels.ravel()))
        for index in ((0, 0, 0), (6, 5, 4), (2, 3, 1)):
            x, y, z = np.round(np.linalg.inv(ours.affine) @ matrix @ [*index, 1])[:3].astype(int)
            np.testing.assert_allclose(ours.affine @ [x, y, z, 1], matrix @ [*index, 1], atol=1e-3)
            assert ours.voxels[z, y, x] == theirs.array[index]

    def test_dcm2niix(self, tmp_path: Path, iop: tuple[float, ...]) -> None:
        pytest.importorskip("dcm2niix")
        (tmp_path / "out").mkdir()
        command = [sys.executable, "-m", "dcm2niix", "-f", "a", "-o", tmp_path / "out", series(tmp_path / "in", iop)]
        subprocess.run(command, check=True, capture_output=True)
        same_places(read_volume(tmp_path / "in"), nib.load(tmp_path / "out" / "a.nii"))


def same_places(ours: Volume, theirs: nib.Nifti1Image) -> None:
    """Both brought to the closest RAS axes; nibabel's side is independent of ours."""
    theirs = nib.funcs.as_closest_canonical(theirs)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)
    np.testing.assert_array_equal(ours.voxels, np.asanyarray(theirs.dataobj).T)


def test_a_phantom_survives_dcm2niix(tmp_path: Path) -> None:
    pytest.importorskip("dcm2niix")
    phantom = make_phantom(0, shape=(12, 40, 36))
    write_dicom_series(phantom, tmp_path / "in")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "dcm2niix", "-f", "a", "-o", tmp_path / "out", tmp_path / "in"]
    subprocess.run(command, check=True, capture_output=True)
    same_places(phantom.canonical(), nib.load(tmp_path / "out" / "a.nii"))


@needs_shared
class TestReal:
    @pytest.mark.parametrize("name", ["ct/ct_small.nii.gz", "mr/mr_small.nii.gz", "ct/ct_torso_3mm.nii.gz"])
    def test_nibabel(self, name: str) -> None:
        same_places(read_volume(SHARED / name), nib.load(SHARED / name))

    def test_a_real_chest_agrees_with_simpleitk(self) -> None:
        sitk = pytest.importorskip("SimpleITK")
        pytest.importorskip("openjpeg", reason="needs pylibjpeg-openjpeg")
        folder = SHARED / "dicom" / "ct_chest_j2k"
        ours = read_volume(folder, canonical=False)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        theirs = reader.Execute()
        np.testing.assert_array_equal(ours.voxels, sitk.GetArrayFromImage(theirs))
        there = np.array(theirs.TransformIndexToPhysicalPoint((511, 3, 19))) * [-1, -1, 1]
        np.testing.assert_allclose((ours.affine @ [511, 3, 19, 1])[:3], there, atol=1e-3)


def test_simpleitk_gives_a_wrong_geometry_where_ours_refuses(tmp_path: Path) -> None:
    """Why all this exists: a lost slice is stretched over by the most used reader, without a word."""
    sitk = pytest.importorskip("SimpleITK")
    write_series(tmp_path, [0, 2, 4, 8, 10, 12])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    assert reader.Execute().GetSpacing()[2] == pytest.approx(2.4, abs=1e-6)
    with pytest.raises(ScanError, match="1 of 7 slices missing"):
        read_volume(tmp_path)
