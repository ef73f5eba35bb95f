"""NIfTI: affine, type and values as stored, or one line saying why not."""

from __future__ import annotations

import gzip
import time
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel import nifti1
from nibabel.funcs import as_closest_canonical

from medformer.data import ScanError, read_volume

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real scans are not at {SHARED}")
AFFINE = np.array([[-2.0, 0.1, 0, 30], [0.05, 1.5, 0.2, -20], [0, -0.2, 3.0, 10], [0, 0, 0, 1]])
DATA = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)


def make(data: np.ndarray = DATA, affine: np.ndarray = AFFINE, sform: int = 1, qform: int = 0) -> nib.Nifti1Image:
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    image.set_sform(affine, code=sform)
    image.set_qform(affine, code=qform)
    return image


def save(image: nib.Nifti1Image, path: Path) -> Path:
    nib.save(image, path)
    return path


def patch(path: Path, offset: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_array_is_transposed_and_affine_untouched(tmp_path: Path, suffix: str) -> None:
    volume = read_volume(save(make(), tmp_path / f"a{suffix}"), canonical=False)
    np.testing.assert_array_equal(volume.voxels, DATA.T)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert (volume.voxels.dtype, volume.modality, volume.notes) == (np.int16, "unknown", ())


def test_canonical_agrees_with_nibabel(tmp_path: Path) -> None:
    affine = np.array([[0, 0, -2.0, 5], [-1.5, 0, 0, 6], [0, 1.0, 0, 7], [0, 0, 0, 1]])
    image = make(affine=affine)
    ours, theirs = read_volume(save(image, tmp_path / "a.nii")), as_closest_canonical(image)
    np.testing.assert_array_equal(ours.voxels, np.asarray(theirs.dataobj).T)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "f4"])
def test_type_is_kept(tmp_path: Path, dtype: str) -> None:
    volume = read_volume(save(make(DATA.astype(dtype)), tmp_path / "a.nii"), canonical=False)
    assert volume.voxels.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.voxels, DATA.T)


def test_float64_becomes_float32(tmp_path: Path) -> None:
    assert read_volume(save(make(DATA.astype("f8")), tmp_path / "a.nii")).voxels.dtype == np.float32


def test_big_endian_becomes_native(tmp_path: Path) -> None:
    image = nib.Nifti1Image(DATA.astype(">i2"), AFFINE, nib.Nifti1Header(endianness=">"))
    path = save(image, tmp_path / "a.nii")
    assert path.read_bytes()[:4] == b"\0\0\x01\x5c"
    volume = read_volume(path, canonical=False)
    assert volume.voxels.dtype.isnative
    np.testing.assert_array_equal(volume.voxels, DATA.T)


def test_nifti2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti2Image(DATA, AFFINE), path)
    np.testing.assert_array_equal(read_volume(path, canonical=False).voxels, DATA.T)


@pytest.mark.parametrize(
    ("slope", "inter", "dtype"), [(1.0, -1024.0, np.int16), (2.0, 0.0, np.int16), (0.5, 1.0, np.float32)]
)
def test_scale_is_applied_in_the_smallest_exact_type(tmp_path: Path, slope: float, inter: float, dtype: type) -> None:
    path = save(make(), tmp_path / "a.nii")
    patch(path, 112, np.array([slope, inter], "<f4").tobytes())
    volume = read_volume(path, canonical=False)
    assert volume.voxels.dtype == dtype
    np.testing.assert_allclose(volume.voxels, DATA.T * slope + inter)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_slope_of_zero_or_nan_means_none(tmp_path: Path, slope: float) -> None:
    path = patch(save(make(), tmp_path / "a.nii"), 112, np.array([slope, 7], "<f4").tobytes())
    np.testing.assert_array_equal(read_volume(path, canonical=False).voxels, DATA.T)


class TestAffine:
    def test_sform_wins_and_a_difference_is_noted(self, tmp_path: Path) -> None:
        image = make(qform=1)
        moved = np.diag([2.0, 1.5, 3.0, 1.0])
        image.set_qform(moved, code=1)
        volume = read_volume(save(image, tmp_path / "a.nii"), canonical=False)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
        assert "sform and qform differ" in volume.notes[0]

    def test_qform_alone_is_used(self, tmp_path: Path) -> None:
        rigid = np.diag([-2.0, 1.5, 3.0, 1.0])
        rigid[:3, 3] = 4, 5, 6
        volume = read_volume(save(make(affine=rigid, sform=0, qform=1), tmp_path / "a.nii"), canonical=False)
        np.testing.assert_allclose(volume.affine, rigid, atol=1e-6)
        assert volume.notes == ()

    def test_no_orientation_is_noted(self, tmp_path: Path) -> None:
        volume = read_volume(save(make(sform=0), tmp_path / "a.nii"), canonical=False)
        assert "no orientation in header" in volume.notes[0]
        np.testing.assert_allclose(volume.spacing_mm, np.linalg.norm(AFFINE[:3, :3], axis=0)[::-1], rtol=1e-6)
        with pytest.raises(ScanError, match="strict=True"):
            read_volume(tmp_path / "a.nii", strict=True)

    @pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
    def test_affine_without_volume_is_refused(self, tmp_path: Path, value: float) -> None:
        path = patch(save(make(), tmp_path / "a.nii"), 280, np.full(12, value, "<f4").tobytes())
        with pytest.raises(ScanError, match=r"a\.nii: affine .* fix the header"):
            read_volume(path)

    def test_zero_voxel_size_without_orientation_is_refused(self, tmp_path: Path) -> None:
        path = patch(save(make(sform=0), tmp_path / "a.nii"), 80, np.zeros(3, "<f4").tobytes())
        with pytest.raises(ScanError, match="singular"):
            read_volume(path)

    def test_micrometres_become_millimetres(self, tmp_path: Path) -> None:
        affine = np.array([[500.0, 0, 40, -7000], [0, 500, 0, 12000], [0, 0, 800, 300], [0, 0, 0, 1]])
        image = make(affine=affine)
        image.header.set_xyzt_units("micron")
        volume = read_volume(save(image, tmp_path / "a.nii"))
        expected = affine / 1000  # voxel sizes and the place of the first voxel alike
        expected[3, 3] = 1
        np.testing.assert_allclose(volume.affine, expected, atol=1e-6)
        assert "converted to mm" in volume.notes[0]


class TestFrames:
    def test_frame_is_chosen_and_noted(self, tmp_path: Path) -> None:
        data = np.stack([DATA, DATA + 100], axis=-1)
        path = save(make(data), tmp_path / "a.nii.gz")
        volume = read_volume(path, frame=1, canonical=False)
        np.testing.assert_array_equal(volume.voxels, (DATA + 100).T)
        assert volume.notes == ("4D: frame 1 of 2 used",)
        with pytest.raises(ScanError, match="frame=2 must be 0 to 1"):
            read_volume(path, frame=2)

    def test_vectors_and_flat_images_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ScanError, match="several values a voxel"):
            read_volume(save(make(np.zeros((2, 3, 4, 1, 3), "i2")), tmp_path / "a.nii"))
        with pytest.raises(ScanError, match="2D image"):
            read_volume(save(make(np.zeros((2, 3), "i2")), tmp_path / "b.nii"))


class TestRefused:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite_are_counted(self, tmp_path: Path, value: float) -> None:
        data = DATA.astype("f4")
        data[0, 0, :2] = value
        with pytest.raises(ScanError, match="2 of 24 voxels are NaN or infinite"):
            read_volume(save(make(data), tmp_path / "a.nii"))

    def test_colour_and_complex_are_refused(self, tmp_path: Path) -> None:
        colour = np.zeros((2, 3, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
        with pytest.raises(ScanError, match="RGB colour"):
            read_volume(save(make(colour), tmp_path / "a.nii"))
        with pytest.raises(ScanError, match="complex64"):
            read_volume(save(make(DATA.astype("c8")), tmp_path / "b.nii"))

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("kept", [0.999, 0.7, 0.3])
    def test_truncated_file_is_refused(self, tmp_path: Path, suffix: str, kept: float) -> None:
        data = np.random.default_rng(0).integers(0, 4000, (20, 20, 20)).astype("i2")
        path = save(make(data), tmp_path / f"a{suffix}")
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(ScanError, match="cut off"):
            read_volume(path)

    def test_damage_behind_the_frame_that_is_read_is_refused(self, tmp_path: Path) -> None:
        """Frame 0 comes out whole of either file, but something is wrong with them: only their end tells."""
        data = np.random.default_rng(0).integers(0, 4000, (20, 20, 20, 3)).astype("i2")
        path = save(make(data), tmp_path / "a.nii.gz")
        content, whole = path.read_bytes(), gzip.decompress(path.read_bytes())
        cases = {
            "checksum": content[:-8] + bytes(b ^ 1 for b in content[-8:-4]) + content[-4:],
            "short": gzip.compress(whole[:-1000]),
        }
        for name, damaged in cases.items():
            path = tmp_path / f"{name}.nii.gz"
            path.write_bytes(damaged)
            with pytest.raises(ScanError, match=rf"^{name}.nii.gz: .*cut off"):
                read_volume(path, frame=0)

    def test_declared_size_is_checked_before_allocation(self, tmp_path: Path) -> None:
        path = save(make(), tmp_path / "a.nii")
        patch(path, 40, np.array([3, 30000, 30000, 30000], "<i2").tobytes())
        packed = tmp_path / "b.nii.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        tracemalloc.start()
        start = time.process_time()
        for file in (path, packed):
            with pytest.raises(ScanError, match="cut off"):
                read_volume(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - start < 1
        assert peak < 2**22

    def test_gzip_with_too_much_behind_it_costs_nothing(self, tmp_path: Path) -> None:
        plain = save(make(), tmp_path / "a.nii").read_bytes()
        path = tmp_path / "b.nii.gz"
        path.write_bytes(gzip.compress(plain + bytes(2**26)))
        tracemalloc.start()
        volume = read_volume(path, canonical=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(volume.voxels, DATA.T)
        assert peak < 2**23

    def test_analyze_pair_and_junk_are_refused(self, tmp_path: Path) -> None:
        nib.save(nib.AnalyzeImage(DATA, np.eye(4)), tmp_path / "a.hdr")
        with pytest.raises(ScanError, match="not a scan"):
            read_volume(tmp_path / "a.hdr")
        (tmp_path / "b.nii").write_bytes(b"not a scan" * 50)
        with pytest.raises(ScanError, match="named like a scan"):
            read_volume(tmp_path / "b.nii")
        (tmp_path / "c.nii.gz").write_bytes(b"")
        with pytest.raises(ScanError, match="0 bytes"):
            read_volume(tmp_path / "c.nii.gz")

    def test_flipped_header_bytes_raise_nothing_but_scan_errors(self, tmp_path: Path) -> None:
        content = save(make(), tmp_path / "a.nii").read_bytes()
        rng = np.random.default_rng(0)
        path, refused = tmp_path / "b.nii", 0
        for _ in range(400):
            broken = bytearray(content)
            for at in rng.integers(0, 352, 3):
                broken[at] = rng.integers(256)
            path.write_bytes(bytes(broken))
            try:
                read_volume(path)
            except ScanError:
                refused += 1
        assert refused > 30


class TestModality:
    def test_hounsfield_values_are_taken_as_ct_with_a_note(self, tmp_path: Path) -> None:
        data = np.full((12, 12, 12), -1000, "i2")
        data[3:9, 3:9, 3:9] = np.random.default_rng(0).integers(-100, 150, (6, 6, 6))
        path = save(make(data), tmp_path / "a.nii")
        volume = read_volume(path)
        assert (volume.modality, volume.units) == ("CT", "HU")
        assert "taken as CT" in volume.notes[0]
        named = read_volume(path, modality="MR")
        assert (named.modality, named.units, named.notes) == ("MR", "arbitrary", ())

    def test_phase_images_and_labels_are_not_taken_as_ct(self, tmp_path: Path) -> None:
        phase = np.random.default_rng(0).integers(-4096, 4096, (12, 12, 12)).astype("i2")
        assert read_volume(save(make(phase), tmp_path / "a.nii")).modality == "unknown"
        assert read_volume(save(make(DATA), tmp_path / "b.nii")).modality == "unknown"


class TestSave:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_saved_volume_reads_back(self, tmp_path: Path, suffix: str) -> None:
        volume = read_volume(save(make(), tmp_path / "a.nii"))
        again = read_volume(volume.save(tmp_path / "out" / f"b{suffix}"), strict=True)
        np.testing.assert_array_equal(again.voxels, volume.voxels)
        np.testing.assert_allclose(again.affine, volume.affine, atol=1e-5)
        assert [p.name for p in (tmp_path / "out").iterdir()] == [f"b{suffix}"]

    def test_sheared_affine_is_kept_by_sform_alone(self, tmp_path: Path) -> None:
        sheared = np.array([[1.0, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
        volume = read_volume(save(make(affine=sheared), tmp_path / "a.nii"))
        path = volume.save(tmp_path / "b.nii")
        header = nifti1.load(path).header
        assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)
        np.testing.assert_allclose(read_volume(path, strict=True).affine, sheared, atol=1e-6)

    def test_other_suffixes_are_refused(self, tmp_path: Path) -> None:
        volume = read_volume(save(make(), tmp_path / "a.nii"))
        with pytest.raises(ScanError, match=r"\.nii or \.nii\.gz"):
            volume.save(tmp_path / "b.npy")


@needs_shared
class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "shape", "spacing", "dtype", "modality"),
        [
            ("ct/ct_torso_3mm.nii.gz", (112, 101, 122), 3.0, np.int32, "CT"),
            ("ct/ct_chest_1p5mm.nii.gz", (112, 102, 122), 1.5, np.int16, "CT"),
            ("ct/ct_small_organs.nii.gz", (30, 101, 122), 3.0, np.uint8, "unknown"),
            ("mr/mr_small.nii.gz", (20, 91, 117), 3.0, np.int16, "unknown"),
        ],
    )
    def test_known_facts(self, name: str, shape: tuple[int, ...], spacing: float, dtype: type, modality: str) -> None:
        volume = read_volume(SHARED / name)
        assert (volume.shape, volume.orientation, volume.modality) == (shape, "RAS", modality)
        np.testing.assert_allclose(volume.spacing_mm, spacing, rtol=1e-6)
        assert volume.voxels.dtype == dtype

    def test_qform_only_file_agrees_with_nibabel(self) -> None:
        path = SHARED / "mr" / "ms_patient07_FLAIR.nii.gz"
        volume, theirs = read_volume(path), as_closest_canonical(nifti1.load(path))
        np.testing.assert_allclose(volume.affine, theirs.affine, atol=1e-6)
        np.testing.assert_array_equal(volume.voxels, np.asarray(theirs.dataobj, dtype=np.float32).T)
        assert volume.notes == ()
