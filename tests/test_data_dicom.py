"""DICOM: every awkward series is either read right or refused with the reason. All files are generated here."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    MRImageStorage,
)

from medformer.data import ScanError, Volume, find_scans, read_volume, write_dicom_series
from tests.dicom_files import (
    AXIAL,
    OBLIQUE,
    Edit,
    expected_voxels,
    image,
    lps_affine,
    normal_of,
    write_enhanced,
    write_series,
    write_slice,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real scans are not at {SHARED}")


class TestPlainSeries:
    def test_axial_series_has_exact_affine_and_values(self, tmp_path: Path) -> None:
        write_series(tmp_path, np.arange(8) * 2.0)
        volume = read_volume(tmp_path, canonical=False)
        np.testing.assert_array_equal(volume.voxels, expected_voxels(8))
        np.testing.assert_allclose(volume.affine, lps_affine(np.array([0, 0, 2.0])), atol=1e-12)
        assert (volume.modality, volume.units, volume.notes, volume.valid) == ("CT", "HU", (), None)
        assert volume.voxels.dtype == np.int16
        np.testing.assert_allclose(volume.spacing_mm, (2.0, 0.8, 0.7))
        assert volume.orientation == "LPS"

    def test_canonical_flips_to_ras_and_keeps_every_voxel_in_place(self, tmp_path: Path) -> None:
        write_series(tmp_path, np.arange(4) * 2.0, step=tuple(normal_of(OBLIQUE)), iop=OBLIQUE)
        raw, turned = read_volume(tmp_path, canonical=False), read_volume(tmp_path)
        assert turned.orientation == "RAS"
        np.testing.assert_array_equal(turned.voxels, raw.voxels[:, ::-1, ::-1])
        there = raw.affine @ [1, 2, 3, 1]
        np.testing.assert_allclose(turned.affine @ [5 - 1 - 1, 6 - 1 - 2, 3, 1], there, atol=1e-9)

    def test_oblique_series_follows_its_normal(self, tmp_path: Path) -> None:
        normal = normal_of(OBLIQUE)
        write_series(tmp_path, np.arange(6) * 0.7, step=tuple(normal), iop=OBLIQUE)
        volume = read_volume(tmp_path, canonical=False)
        np.testing.assert_allclose(volume.affine, lps_affine(0.7 * normal, OBLIQUE), atol=1e-6)
        assert volume.notes == ()

    def test_sagittal_series_is_turned_so_that_x_runs_right(self, tmp_path: Path) -> None:
        sagittal = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
        write_series(tmp_path, np.arange(4) * 3.0, step=(-1.0, 0.0, 0.0), iop=sagittal)
        volume = read_volume(tmp_path)
        assert volume.shape == (6, 5, 4)
        np.testing.assert_allclose(volume.spacing_mm, (0.8, 0.7, 3.0))
        np.testing.assert_allclose(np.diag(volume.affine)[:3], (3.0, 0.7, 0.8))

    def test_slice_thickness_never_sets_the_step(self, tmp_path: Path) -> None:
        write_series(tmp_path, np.arange(3) * 2.5)
        assert read_volume(tmp_path).spacing_mm[0] == pytest.approx(2.5)

    def test_single_slice_takes_thickness_and_says_so(self, tmp_path: Path) -> None:
        write_slice(tmp_path / "a.dcm", 0, np.zeros(3))
        volume = read_volume(tmp_path / "a.dcm")
        assert volume.shape == (1, 6, 5)
        assert volume.notes == ("single slice: depth SliceThickness 99 mm",)

    def test_strict_refuses_what_needs_a_note(self, tmp_path: Path) -> None:
        write_slice(tmp_path / "a.dcm", 0, np.zeros(3))
        with pytest.raises(ScanError, match="strict=True: single slice"):
            read_volume(tmp_path / "a.dcm", strict=True)


class TestAwkwardSeries:
    """The twelve cases on which readers in use return a wrong geometry without a word."""

    def test_variable_gaps_with_tilt_are_refused(self, tmp_path: Path) -> None:
        write_series(tmp_path, np.cumsum([0, 1.08, 2.4, 3.1, 5.0, 7.0, 7.0]), step=(0, 0.335, 1.0))
        with pytest.raises(ScanError, match=r"uneven slices, gaps 1.08 to 7 mm"):
            read_volume(tmp_path)

    def test_regular_tilt_gives_a_sheared_affine(self, tmp_path: Path) -> None:
        angle = np.radians(18.5)
        step = 2.371 * np.array([0.0, np.sin(angle), np.cos(angle)])
        write_series(tmp_path, np.arange(9), step=tuple(step))
        volume = read_volume(tmp_path, canonical=False)
        np.testing.assert_allclose(volume.affine, lps_affine(step), atol=1e-6)
        assert volume.notes == ("gantry tilt 18.5 deg: affine is sheared",)
        assert volume.spacing_mm[0] == pytest.approx(2.371)

    def test_blank_uids_are_read_by_folder(self, tmp_path: Path) -> None:
        def blank(i: int, ds: FileDataset) -> None:
            ds.SOPClassUID = ds.SOPInstanceUID = ds.StudyInstanceUID = ds.SeriesInstanceUID = ""

        write_series(tmp_path, np.arange(5) * 2.0, edit=blank)
        volume = read_volume(tmp_path, canonical=False)
        np.testing.assert_array_equal(volume.voxels, expected_voxels(5))
        assert "no SeriesInstanceUID" in volume.notes[0]

    def test_identical_duplicate_is_dropped_with_a_note(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path, np.arange(6) * 2.0)
        shutil.copy(paths[2], tmp_path / "copy.dcm")
        volume = read_volume(tmp_path, canonical=False)
        np.testing.assert_array_equal(volume.voxels, expected_voxels(6))
        assert volume.spacing_mm[0] == pytest.approx(2.0)
        assert volume.notes == ("1 duplicate slice dropped",)

    def test_two_images_at_one_position_are_refused(self, tmp_path: Path) -> None:
        write_series(tmp_path, [0, 2, 4, 4, 6])
        with pytest.raises(ScanError, match="two different images at one position"):
            read_volume(tmp_path)

    def test_missing_slice_is_refused_by_its_position(self, tmp_path: Path) -> None:
        write_series(tmp_path, [0, 2, 4, 8, 10, 12])
        with pytest.raises(ScanError, match=r"1 of 7 slices missing, at \(-10 20 -24\) mm"):
            read_volume(tmp_path)

    def test_missing_slice_at_either_end_of_a_short_stack_is_refused(self, tmp_path: Path) -> None:
        write_series(tmp_path / "a", [0, 4, 6, 8])
        write_series(tmp_path / "b", [0, 2, 4, 8])
        for part in "ab":
            with pytest.raises(ScanError, match="1 of 5 slices missing"):
                read_volume(tmp_path / part)

    def test_instance_numbers_are_ignored(self, tmp_path: Path) -> None:
        shuffled = np.random.default_rng(1).permutation(8)

        def shuffle(i: int, ds: FileDataset) -> None:
            ds.InstanceNumber = int(shuffled[i])

        write_series(tmp_path, np.arange(8) * 2.0, edit=shuffle)
        np.testing.assert_array_equal(read_volume(tmp_path, canonical=False).voxels, expected_voxels(8))

    def test_localizer_is_left_out_with_a_note(self, tmp_path: Path) -> None:
        def localizer(i: int, ds: FileDataset) -> None:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

        write_series(tmp_path, np.arange(5) * 2.0)
        write_slice(tmp_path / "loc.dcm", 0, np.zeros(3), iop=(1, 0, 0, 0, 0, -1), edit=localizer)
        volume = read_volume(tmp_path, canonical=False)
        np.testing.assert_array_equal(volume.voxels, expected_voxels(5))
        assert volume.notes == ("left out: loc.dcm: localizer image",)

    def test_unmarked_localizer_makes_a_second_scan_and_is_refused(self, tmp_path: Path) -> None:
        write_series(tmp_path, np.arange(5) * 2.0)
        write_slice(tmp_path / "loc.dcm", 0, np.zeros(3), iop=(1, 0, 0, 0, 0, -1))
        with pytest.raises(ScanError, match=r"folder holds 2 scans .*use find_scans"):
            read_volume(tmp_path)

    @pytest.mark.parametrize("kept", [0.97, 0.5, 0.1])
    def test_truncated_file_refuses_the_series(self, tmp_path: Path, kept: float) -> None:
        paths = write_series(tmp_path, np.arange(6) * 2.0)
        data = paths[-1].read_bytes()
        paths[-1].write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(ScanError, match=paths[-1].name):
            read_volume(tmp_path)

    def test_pixels_that_are_not_all_there_are_seen_without_reading_them(self, tmp_path: Path) -> None:
        """An index must not promise what reading then refuses."""
        paths = write_series(tmp_path, np.arange(6) * 2.0)
        paths[-1].write_bytes(paths[-1].read_bytes()[:-20])
        with pytest.raises(ScanError, match=rf"{paths[-1].name}: cut off, 40 of 60 bytes of pixels are here"):
            find_scans(tmp_path)

    def test_every_cut_of_a_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.dcm"
        write_slice(path, 0, np.zeros(3))
        data = path.read_bytes()
        for end in range(0, len(data) - 1, 7):
            path.write_bytes(data[:end])
            with pytest.raises(ScanError):
                read_volume(path)

    def test_position_jitter_of_4_um_is_regular(self, tmp_path: Path) -> None:
        jitter = np.random.default_rng(2).uniform(-0.004, 0.004, 40)
        write_series(tmp_path, np.arange(40) * 1.0 + jitter)
        volume = read_volume(tmp_path, canonical=False)
        assert volume.spacing_mm[0] == pytest.approx(1.0, abs=3e-4)
        np.testing.assert_allclose(volume.affine, lps_affine(np.array([0, 0, 1.0])), atol=5e-3)

    def test_orientation_jitter_is_one_series(self, tmp_path: Path) -> None:
        jitter = np.random.default_rng(3).uniform(-4e-5, 4e-5, (10, 6))

        def shake(i: int, ds: FileDataset) -> None:
            ds.ImageOrientationPatient = [f"{v:.8f}" for v in np.array(AXIAL) + jitter[i]]

        write_series(tmp_path, np.arange(10) * 2.0, edit=shake)
        volume = read_volume(tmp_path, canonical=False)
        assert volume.shape == (10, 6, 5)
        np.testing.assert_allclose(volume.affine, lps_affine(np.array([0, 0, 2.0])), atol=1e-4)

    def test_slope_of_each_slice_is_applied(self, tmp_path: Path) -> None:
        def rescale(i: int, ds: FileDataset) -> None:
            ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = "PT", 0.5 * (i + 1), 3.0 * i

        write_series(tmp_path, np.arange(4) * 2.0, edit=rescale)
        volume = read_volume(tmp_path, canonical=False)
        expected = np.stack([image(i) * (0.5 * (i + 1)) + 3.0 * i for i in range(4)])
        assert volume.voxels.dtype == np.float32
        np.testing.assert_allclose(volume.voxels, expected, rtol=1e-6)
        assert (volume.modality, volume.units) == ("PT", "arbitrary")

    def test_other_files_are_ignored(self, tmp_path: Path) -> None:
        write_series(tmp_path, np.arange(4) * 2.0)
        (tmp_path / "README.txt").write_text("notes")
        (tmp_path / ".DS_Store").write_bytes(b"\0" * 300)
        (tmp_path / "._f001.dcm").write_bytes(b"\0\5\x16\7" * 40)
        volume = read_volume(tmp_path, canonical=False)
        assert volume.shape[0] == 4
        assert volume.notes == ()

    def test_rounded_positions_stay_regular_and_drift_does_not(self, tmp_path: Path) -> None:
        write_series(tmp_path / "rounded", np.round(np.arange(30) * 0.625, 1))
        assert read_volume(tmp_path / "rounded").spacing_mm[0] == pytest.approx(0.625, abs=1e-3)
        write_series(tmp_path / "drift", np.cumsum(1.0 + 0.004 * np.arange(30)))
        with pytest.raises(ScanError, match="uneven slices"):
            read_volume(tmp_path / "drift")


class TestRepeats:
    @pytest.mark.parametrize("tag", ["AcquisitionNumber", "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue"])
    def test_repeats_told_apart_by_one_tag_become_scans(self, tmp_path: Path, tag: str) -> None:
        def number(i: int, ds: FileDataset) -> None:
            setattr(ds, tag, i // 4 + 1)

        write_series(tmp_path, [0, 2, 4, 6, 0, 2, 4, 6], edit=number)
        index = find_scans(tmp_path)
        assert [s.shape for s in index.scans] == [(4, 6, 5), (4, 6, 5)]
        first = index.scans[0].read(canonical=False)
        np.testing.assert_array_equal(first.voxels, expected_voxels(8)[:4])

    def test_positions_shifted_in_plane_are_refused(self, tmp_path: Path) -> None:
        write_series(tmp_path, [0, 2, 4])
        write_slice(tmp_path / "x.dcm", 7, np.array([-8.0, 20.0, -30.0]))
        with pytest.raises(ScanError, match="same depth"):
            read_volume(tmp_path)


class TestPixels:
    def read_one(self, tmp_path: Path, edit: Edit) -> Volume:
        write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
        return read_volume(tmp_path / "a.dcm", canonical=False)

    @pytest.mark.parametrize(
        ("slope", "intercept", "dtype"),
        [(1, 0, np.uint16), (1, -1024, np.int16), (2, 5, np.int16), (1000, 0, np.int32), (0.5, 0, np.float32)],
    )
    def test_smallest_exact_type_is_kept(self, tmp_path: Path, slope: float, intercept: float, dtype: type) -> None:
        def edit(i: int, ds: FileDataset) -> None:
            ds.RescaleSlope, ds.RescaleIntercept = slope, intercept

        volume = self.read_one(tmp_path, edit)
        assert volume.voxels.dtype == dtype
        np.testing.assert_allclose(volume.voxels[0], image(0) * float(slope) + intercept)

    def test_padding_is_masked_by_value(self, tmp_path: Path) -> None:
        def edit(i: int, ds: FileDataset) -> None:
            pixels = image(0).astype(np.int16)
            pixels[0, :3] = -2000
            ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 16, 15
            ds.PixelPaddingValue = 63536  # -2000 written with the wrong sign, as some scanners do
            ds["PixelPaddingValue"].VR = "US"
            ds.PixelData = pixels.tobytes()

        volume = self.read_one(tmp_path, edit)
        assert volume.valid is not None
        np.testing.assert_array_equal(np.argwhere(~volume.valid), [[0, 0, 0], [0, 0, 1], [0, 0, 2]])

    def test_padding_range_is_masked(self, tmp_path: Path) -> None:
        def edit(i: int, ds: FileDataset) -> None:
            ds.PixelPaddingValue, ds.PixelPaddingRangeLimit = 1000, 1004

        volume = self.read_one(tmp_path, edit)
        assert volume.valid is not None
        assert int((~volume.valid).sum()) == 5

    def test_far_padding_does_not_widen_the_type(self, tmp_path: Path) -> None:
        def edit(i: int, ds: FileDataset) -> None:
            pixels = image(0).astype(np.int16)
            pixels[0, 0] = -32768
            ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 16, 15
            ds.PixelPaddingValue = -32768
            ds.PixelData = pixels.tobytes()

        volume = self.read_one(tmp_path, edit)
        assert volume.voxels.dtype == np.int16
        np.testing.assert_array_equal(volume.voxels[0, 1:], image(0)[1:].astype(int) - 1024)

    def test_overlay_bits_are_masked_off(self, tmp_path: Path) -> None:
        def edit(i: int, ds: FileDataset) -> None:
            ds.PixelData = (image(0) | 0xF000).tobytes()

        volume = self.read_one(tmp_path, edit)
        np.testing.assert_array_equal(volume.voxels[0], image(0).astype(int) - 1024)

    def test_signed_12_bit_values_get_their_sign(self, tmp_path: Path) -> None:
        values = np.linspace(-2048, 2047, 30).astype(np.int16).reshape(6, 5)

        def edit(i: int, ds: FileDataset) -> None:
            ds.PixelRepresentation, ds.RescaleIntercept = 1, 0
            ds.PixelData = (values.view(np.uint16) & 0x0FFF).tobytes()

        np.testing.assert_array_equal(self.read_one(tmp_path, edit).voxels[0], values)

    def test_ct_without_rescale_is_not_called_hu(self, tmp_path: Path) -> None:
        def edit(i: int, ds: FileDataset) -> None:
            del ds.RescaleSlope, ds.RescaleIntercept

        volume = self.read_one(tmp_path, edit)
        assert volume.units == "arbitrary"
        assert "may not be HU" in volume.notes[0]

    @pytest.mark.parametrize(
        ("tag", "value", "reason"),
        [
            ("PhotometricInterpretation", "RGB", "colour"),
            ("SamplesPerPixel", 3, "colour"),
            ("ImageType", ["ORIGINAL", "PRIMARY", "MOSAIC"], "mosaic"),
            ("PixelSpacing", [0, 0.7], "must be positive"),
            ("PixelSpacing", None, "PixelSpacing is absent"),
            ("ImagePositionPatient", None, "ImagePositionPatient is absent"),
            ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "not two perpendicular unit vectors"),
            ("ImageOrientationPatient", [0] * 6, "not two perpendicular unit vectors"),
            ("RescaleSlope", 0, "slope not 0"),
            ("Rows", 7, "cut off, 60 of 70 bytes"),
            ("Rows", 2, "60 bytes of pixels, header declares 20"),
            ("Columns", 60000, "cut off"),
            ("NumberOfFrames", 2, "without functional groups"),
            ("BitsAllocated", 12, "must be 8, 16 or 32"),
            ("BitsStored", 17, "do not fit"),
            ("Modality", "SEG", "without a scan"),
            ("ImageType", ["DERIVED", "SECONDARY", "SCREEN SAVE"], "screen capture"),
        ],
    )
    def test_unreadable_headers_are_refused_in_one_line(
        self, tmp_path: Path, tag: str, value: object, reason: str
    ) -> None:
        def edit(i: int, ds: FileDataset) -> None:
            if value is None:
                delattr(ds, tag)
            else:
                setattr(ds, tag, value)

        with pytest.raises(ScanError, match=reason) as caught:
            self.read_one(tmp_path, edit)
        message = str(caught.value)
        assert "\n" not in message
        assert "a.dcm" in message
        assert "Secret" not in message
        assert "SECRET" not in message


class TestCompressed:
    def compress(self, path: Path, syntax: str, stream: bytes) -> None:
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        ds.PixelData = encapsulate([stream])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.save_as(path)

    def test_a_frame_without_its_fragment_is_refused_by_the_header(self, tmp_path: Path) -> None:
        """An offset table and the end of the sequence, nothing between: no decoder is asked."""
        path = tmp_path / "a.dcm"
        write_slice(path, 0, np.zeros(3))
        self.compress(path, "1.2.840.10008.1.2.5", b"\0" * 64)  # RLE, which pydicom decodes itself
        ds = pydicom.dcmread(path)
        ds.PixelData = b"\xfe\xff\x00\xe0" + bytes(4)
        ds.save_as(path)
        with pytest.raises(ScanError, match=r"reason: a\.dcm: compressed pixel data is cut off; copy the file again"):
            find_scans(tmp_path)

    def test_unknown_codec_names_the_syntax_and_the_extra(self, tmp_path: Path) -> None:
        path = tmp_path / "a.dcm"
        write_slice(path, 0, np.zeros(3))
        self.compress(path, "1.2.840.10008.1.2.4.105", b"\xff\xd8" + b"\0" * 20)
        with pytest.raises(ScanError, match=r"no decoder for .*codecs"):
            read_volume(path)

    def test_declared_size_is_checked_against_the_stream(self, tmp_path: Path) -> None:
        pytest.importorskip("openjpeg", reason="needs pylibjpeg-openjpeg")
        path = tmp_path / "a.dcm"
        write_slice(path, 0, np.zeros(3))
        size = (60000).to_bytes(4, "big")
        siz = b"\xff\x4f\xff\x51\0\x29\0\0" + size + size + b"\0" * 8
        self.compress(path, "1.2.840.10008.1.2.4.90", siz + b"\0" * 60 + b"\xff\xd9")
        with pytest.raises(ScanError, match="60000 x 60000, header declares 6 x 5"):
            read_volume(path)

    def test_truncated_j2k_is_refused_at_any_length(self, tmp_path: Path) -> None:
        pytest.importorskip("openjpeg", reason="needs pylibjpeg-openjpeg")
        from pydicom.data import get_testdata_file

        source = get_testdata_file("693_J2KI.dcm", download=False)
        if source is None:
            pytest.skip("pydicom ships no 693_J2KI.dcm here")
        data = Path(str(source)).read_bytes()
        path = tmp_path / "a.dcm"
        for part in (0.999, 0.9, 0.5, 0.2, 0.02):
            path.write_bytes(data[: int(len(data) * part)])
            with pytest.raises(ScanError):
                read_volume(path)

    def test_deflate_bomb_is_refused_fast(self, tmp_path: Path) -> None:
        path = tmp_path / "bomb.dcm"
        write_slice(path, 0, np.zeros(3))
        ds = pydicom.dcmread(path)
        ds.PixelData = bytes(2**27)
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
        assert path.stat().st_size < 2**18
        start = time.process_time()
        with pytest.raises(ScanError, match="deflated transfer syntax"):
            read_volume(path)
        assert time.process_time() - start < 1


class TestEnhanced:
    def test_frames_are_placed_by_their_functional_groups(self, tmp_path: Path) -> None:
        write_enhanced(tmp_path / "a.dcm", [4, 0, 6, 2])
        volume = read_volume(tmp_path / "a.dcm", canonical=False)
        expected = np.stack([image(i).astype(np.int64) * (i + 1) for i in (1, 3, 0, 2)])
        np.testing.assert_array_equal(volume.voxels, expected)
        np.testing.assert_allclose(volume.affine, lps_affine(np.array([0, 0, 2.0])), atol=1e-12)

    def test_missing_frame_is_refused(self, tmp_path: Path) -> None:
        write_enhanced(tmp_path / "a.dcm", [0, 2, 6, 8])
        with pytest.raises(ScanError, match="1 of 5 slices missing"):
            read_volume(tmp_path / "a.dcm")

    def test_repeated_positions_are_refused(self, tmp_path: Path) -> None:
        write_enhanced(tmp_path / "a.dcm", [0, 2, 0, 2])
        with pytest.raises(ScanError, match="two different images at one position"):
            read_volume(tmp_path / "a.dcm")

    def test_fewer_groups_than_frames_are_refused(self, tmp_path: Path) -> None:
        def drop(i: int, ds: FileDataset) -> None:
            del ds.PerFrameFunctionalGroupsSequence[-1]

        write_enhanced(tmp_path / "a.dcm", [0, 2, 4], drop)
        with pytest.raises(ScanError, match="3 frames but 2 per-frame"):
            read_volume(tmp_path / "a.dcm")


class TestDamage:
    def test_flipped_bytes_raise_nothing_but_scan_errors(self, tmp_path: Path) -> None:
        path = tmp_path / "a.dcm"
        write_slice(path, 0, np.zeros(3))
        data, rng = path.read_bytes(), np.random.default_rng(0)
        outcomes = set()
        for _ in range(300):
            broken = bytearray(data)
            for at in rng.integers(128, len(data), 4):
                broken[at] = rng.integers(256)
            path.write_bytes(bytes(broken))
            try:
                outcomes.add(type(read_volume(path)))
            except ScanError as error:
                outcomes.add(type(error).__mro__[-4])
        assert outcomes <= {Volume, ScanError, ValueError}


class TestWriting:
    def test_header_is_complete_enough_for_ct(self, tmp_path: Path) -> None:
        voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
        volume = Volume(voxels=voxels, affine=np.diag([1.0, 2, 3, 1]), modality="CT", units="HU", notes=(), source="x")
        ds = pydicom.dcmread(write_dicom_series(volume, tmp_path / "s")[0])
        assert ds.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
        assert [ds.PatientID, ds.Modality, ds.RescaleIntercept] == ["PHANTOM", "CT", -1024]
        assert ds.SOPClassUID == CTImageStorage

    def test_mr_and_padding_survive_a_round_trip(self, tmp_path: Path) -> None:
        voxels = np.arange(60, dtype=np.uint16).reshape(3, 4, 5) * 1000
        valid = np.ones(voxels.shape, bool)
        valid[0, 0, 0] = False
        affine = np.diag([1.0, 2, 3, 1])
        volume = Volume(
            voxels=voxels, affine=affine, modality="MR", units="arbitrary", notes=(), source="x", valid=valid
        )
        write_dicom_series(volume, tmp_path / "s")
        again = read_volume(tmp_path / "s")
        np.testing.assert_array_equal(again.voxels, voxels)
        np.testing.assert_array_equal(again.valid, valid)
        assert again.voxels.dtype == np.uint16
        assert pydicom.dcmread(tmp_path / "s" / "0001.dcm").SOPClassUID == MRImageStorage

    def test_interrupted_writing_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(FileDataset, "save_as", fail)
        volume = Volume(
            voxels=np.zeros((1, 2, 2), np.int16), affine=np.eye(4), modality="CT", units="HU", notes=(), source="x"
        )
        with pytest.raises(KeyboardInterrupt):
            write_dicom_series(volume, tmp_path / "s")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_with_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("")
        volume = Volume(
            voxels=np.zeros((1, 2, 2), np.int16), affine=np.eye(4), modality="CT", units="HU", notes=(), source="x"
        )
        with pytest.raises(ScanError, match="not empty"):
            write_dicom_series(volume, tmp_path)


@needs_shared
class TestRealSeries:
    def test_chest_ct_has_a_2_mm_step_and_lies_on_its_label_map(self) -> None:
        pytest.importorskip("openjpeg", reason="needs pylibjpeg-openjpeg")
        scan = read_volume(SHARED / "dicom" / "ct_chest_j2k")
        labels = read_volume(SHARED / "ct" / "ct_chest_j2k_organs.nii.gz")
        np.testing.assert_allclose(scan.affine, labels.affine, atol=1e-6)
        assert scan.shape == labels.shape == (20, 512, 512)
        np.testing.assert_allclose(scan.spacing_mm, (2.0, 0.9765625, 0.9765625))
        assert scan.voxels.dtype == np.int16

    def test_chest_ct_ribs_are_dense_under_their_labels_and_nowhere_mirrored(self) -> None:
        pytest.importorskip("openjpeg", reason="needs pylibjpeg-openjpeg")
        scan = read_volume(SHARED / "dicom" / "ct_chest_j2k").voxels
        labels = read_volume(SHARED / "ct" / "ct_chest_j2k_organs.nii.gz").voxels
        ribs = (labels >= 92) & (labels <= 115)
        assert np.median(scan[ribs]) > 180
        for axis in range(3):
            assert np.median(scan[np.flip(ribs, axis)]) < 110

    def test_7t_mr_is_oblique_and_regular(self) -> None:
        index = find_scans(SHARED / "dicom" / "mr_t1_7t")
        assert [(s.kind, s.modality, s.shape) for s in index.scans] == [("dicom", "MR", (384, 384, 274))]
        spacing = index.scans[0].spacing_mm
        assert spacing is not None
        np.testing.assert_allclose(spacing, (2 / 3, 2 / 3, 0.7), atol=2e-5)
