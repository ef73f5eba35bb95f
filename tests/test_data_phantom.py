"""The phantom looks like a torso where one would measure it, and grey values scale as documented."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medformer.data import ScanError, Volume, make_phantom, normalise, read_volume, write_dicom_series


@pytest.fixture(scope="module")
def phantoms() -> list[Volume]:
    return [make_phantom(seed) for seed in range(3)]


class TestPhantom:
    def test_same_seed_same_voxels_other_seed_other_voxels(self, phantoms: list[Volume]) -> None:
        np.testing.assert_array_equal(make_phantom(1).voxels, phantoms[1].voxels)
        assert (phantoms[0].voxels != phantoms[1].voxels).mean() > 0.3

    def test_it_is_a_ct_in_hounsfield_units(self, phantoms: list[Volume]) -> None:
        for volume in phantoms:
            assert (volume.shape, volume.modality, volume.units) == ((64, 96, 96), "CT", "HU")
            assert volume.voxels.dtype == np.int16
            assert volume.orientation == "RAS"
            assert volume.spacing_mm == (2.5, 1.5, 1.5)
            assert volume.voxels.min() >= -1024
            assert volume.voxels.max() > 300

    def test_tissues_make_up_a_torso(self, phantoms: list[Volume]) -> None:
        for volume in phantoms:
            hu = volume.voxels
            shares = [
                ((hu >= low) & (hu < high)).mean() for low, high in ((-950, -700), (-160, -50), (0, 120), (250, 3000))
            ]
            lung, fat, soft, bone = shares
            assert 0.05 < lung < 0.3
            assert 0.02 < fat < 0.3
            assert 0.1 < soft < 0.5
            assert 0.005 < bone < 0.1

    def test_anatomy_is_the_right_way_round(self, phantoms: list[Volume]) -> None:
        """Spine at the back, liver on the right, lungs above it, heart left of the middle."""
        for volume in phantoms:
            hu = volume.voxels.astype(float)
            bone = np.argwhere(hu > 350)
            assert np.median(bone[:, 1]) < 48
            lung = (hu > -950) & (hu < -700)
            assert lung[32:].sum() > 5 * lung[:12].sum()
            low = hu[12:22, 30:66]
            assert ((low[..., 55:80] > 20) & (low[..., 55:80] < 160)).mean() > 0.6
            middle = (hu[26:36, 50:72] > 0) & (hu[26:36, 50:72] < 350)
            assert middle[..., 20:48].sum() > middle[..., 48:76].sum() * 0.8

    def test_other_grids_are_filled(self) -> None:
        volume = make_phantom(0, shape=(16, 24, 32), spacing_mm=(5.0, 4.0, 3.0))
        assert volume.shape == (16, 24, 32)
        assert volume.spacing_mm == (5.0, 4.0, 3.0)
        assert ((volume.voxels > -950) & (volume.voxels < -700)).any()

    @pytest.mark.parametrize("bad", [{"shape": (4, 96, 96)}, {"spacing_mm": (0.0, 1.0, 1.0)}])
    def test_impossible_grids_are_refused(self, bad: dict) -> None:
        with pytest.raises(ScanError, match="make_phantom: "):
            make_phantom(0, **bad)

    def test_dicom_round_trip_is_exact(self, tmp_path: Path) -> None:
        volume = make_phantom(5, shape=(10, 24, 28))
        files = write_dicom_series(volume, tmp_path / "s")
        again = read_volume(tmp_path / "s")
        assert [f.name for f in files] == [f"{i:04d}.dcm" for i in range(1, 11)]
        np.testing.assert_array_equal(again.voxels, volume.voxels)
        np.testing.assert_array_equal(again.affine, volume.affine)
        assert (again.voxels.dtype, again.units, again.notes) == (np.int16, "HU", ())


def volume_of(voxels: np.ndarray, units: str = "arbitrary", valid: np.ndarray | None = None) -> Volume:
    modality = "CT" if units == "HU" else "MR"
    return Volume(
        voxels=voxels, affine=np.eye(4), modality=modality, units=units, notes=(), source="made.nii", valid=valid
    )


class TestNormalise:
    def test_hounsfield_map_is_fixed(self) -> None:
        hu = np.array([[[-3000, -1000, 0, 500, 1000, 3000]]], np.int16)
        np.testing.assert_allclose(normalise(volume_of(hu, "HU"))[0, 0], [-2, -2, 0, 1, 2, 2])

    def test_mr_has_about_zero_mean_and_unit_scale(self) -> None:
        rng = np.random.default_rng(0)
        head = np.abs(rng.normal(20, 10, (24, 24, 24)))
        head[6:18, 6:18, 6:18] = rng.normal(600, 120, (12, 12, 12))
        for scaled in (head, head * 37, head + 1000):
            out = normalise(volume_of(scaled.astype(np.float32)))
            inside = out[6:18, 6:18, 6:18]
            assert abs(float(inside.mean())) < 0.1
            assert 0.3 < float(inside.std()) < 1.2
            assert out.min() >= -2.001
            assert out.dtype == np.float32

    @settings(max_examples=30, deadline=None)
    @given(scale=st.floats(0.01, 1000), shift=st.floats(-1000, 1000))
    def test_mr_result_does_not_depend_on_gain_and_offset(self, scale: float, shift: float) -> None:
        voxels = np.random.default_rng(1).gamma(2.0, 100.0, (8, 8, 8))
        plain, changed = (normalise(volume_of(v.astype(np.float32))) for v in (voxels, voxels * scale + shift))
        np.testing.assert_allclose(plain, changed, atol=2e-2)

    def test_padding_never_changes_the_rest(self) -> None:
        voxels = np.random.default_rng(2).normal(300, 50, (6, 8, 8)).astype(np.float32)
        valid = np.ones(voxels.shape, bool)
        valid[:, :2] = False
        results = []
        for pad in (-2000, 0, 30000):
            padded = np.where(valid, voxels, np.float32(pad))
            results.append(normalise(volume_of(padded, valid=valid)))
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])
        assert (results[0][~valid] == results[0].min()).all()

    def test_input_is_not_changed(self) -> None:
        voxels = np.random.default_rng(3).normal(0, 500, (4, 4, 4)).astype(np.float32)
        before = voxels.copy()
        normalise(volume_of(voxels, "HU"))
        np.testing.assert_array_equal(voxels, before)

    @pytest.mark.parametrize("units", ["HU", "arbitrary"])
    @pytest.mark.parametrize("value", [-1000, 0, 7])
    def test_constant_volumes_are_refused(self, units: str, value: int) -> None:
        with pytest.raises(ScanError, match=r"made\.nii: voxels are constant"):
            normalise(volume_of(np.full((2, 3, 4), value, np.int16), units))

    def test_labels_and_padding_alone(self) -> None:
        labels = np.zeros((4, 4, 4), np.uint8)
        labels[1:3] = 1
        assert np.isfinite(normalise(volume_of(labels))).all()
        with pytest.raises(ScanError, match="every voxel is padding"):
            normalise(volume_of(labels, valid=np.zeros(labels.shape, bool)))

    def test_nan_is_refused_and_hidden_nan_is_not(self) -> None:
        voxels = np.random.default_rng(4).normal(0, 1, (4, 4, 4)).astype(np.float32)
        voxels[0, 0, 0] = np.nan
        with pytest.raises(ScanError, match="NaN"):
            normalise(volume_of(voxels))
        out = normalise(volume_of(voxels, valid=np.isfinite(voxels)))
        assert np.isfinite(out).all()

    def test_volumes_compare_by_identity(self) -> None:
        volume = volume_of(np.zeros((1, 2, 2), np.int16))
        assert volume != replace(volume)
