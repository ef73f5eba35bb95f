"""Multi-frame DICOM, mosaics, repeats, tables, tilt on request, zip files: right or refused."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medformer.commands import main
from medformer.data import ScanError, Volume, find_scans, read_volume
from medformer.data.resample import deskew
from tests.dicom_files import OBLIQUE, image, lps_affine, normal_of, write_enhanced, write_series, write_slice


def add_dimensions(values: list[tuple[int, ...]], pointers: list[int]):
    """Give frame i the dimension index values[i]."""

    def edit(_: int, ds: FileDataset) -> None:
        items = []
        for pointer in pointers:
            item = Dataset()
            item.DimensionIndexPointer = pointer
            items.append(item)
        ds.DimensionIndexSequence = Sequence(items)
        for group, index in zip(ds.PerFrameFunctionalGroupsSequence, values, strict=True):
            content = Dataset()
            content.DimensionIndexValues = list(index)
            group.FrameContentSequence = Sequence([content])
            group.PixelValueTransformationSequence[0].RescaleSlope = 1

    return edit


class TestFourDimensions:
    def test_dimension_index_tells_the_repeats_apart(self, tmp_path: Path) -> None:
        # (stack, in-stack position, temporal position), frames stored in no helpful order
        order = [(1, 2, 2), (1, 1, 1), (1, 2, 1), (1, 1, 2)]
        depths = [2, 0, 2, 0]
        write_enhanced(
            tmp_path / "a.dcm", [float(d) for d in depths], add_dimensions(order, [0x00209056, 0x00209057, 0x00209128])
        )
        for frame, parts in ((0, (1, 2)), (1, (3, 0))):
            volume = read_volume(tmp_path / "a.dcm", canonical=False, frame=frame)
            np.testing.assert_array_equal(volume.voxels, np.stack([image(i) for i in parts]))
            assert f"4D: frame {frame} of 2 used" in volume.notes[-1]
        index = find_scans(tmp_path)
        assert [(s.name, s.shape, s.repeat) for s in index.scans] == [
            ("a#1", (2, 6, 5), "dimension index 1"),
            ("a#2", (2, 6, 5), "dimension index 2"),
        ]
        np.testing.assert_array_equal(index.scans[1].read(canonical=False).voxels, np.stack([image(3), image(0)]))
        with pytest.raises(ScanError, match="frame=2 must be 0 to 1"):
            read_volume(tmp_path / "a.dcm", frame=2)

    def test_a_series_twice_as_one_file_and_as_slices_is_read_in_every_part(self, tmp_path: Path) -> None:
        """What tells a repeat apart depends on its neighbours: the index saw files that one scan does not name."""
        order = [(1, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)]
        write_enhanced(
            tmp_path / "a.dcm", [0.0, 2.0, 0.0, 2.0], add_dimensions(order, [0x00209056, 0x00209057, 0x00209128])
        )

        def classic(i: int, ds: FileDataset) -> None:
            ds.Modality, ds.SeriesInstanceUID, ds.EchoTime, ds.ImageType = "MR", "1.2.3.9", 2.3 * (1 + i // 2), ["M"]
            ds.FrameOfReferenceUID, ds.StudyInstanceUID = "1.2.3.8", "1.2.3"

        (tmp_path / "classic").mkdir()
        write_series(tmp_path / "classic", [0.0, 2.0, 0.0, 2.0], edit=classic)
        found = find_scans(tmp_path)
        assert len(found) == 4
        assert sorted(len(scan.files) for scan in found.scans) == [1, 1, 2, 2]
        whole = [read_volume(tmp_path / "a.dcm", canonical=False, frame=frame).voxels for frame in (0, 1)]
        voxels = [scan.read(canonical=False).voxels for scan in found.scans]
        of_one_file = [v for v, scan in zip(voxels, found.scans, strict=True) if len(scan.files) == 1]
        for a, b in zip(of_one_file, whole, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_frames_of_different_orientation_are_separate_scans(self, tmp_path: Path) -> None:
        def turn(_: int, ds: FileDataset) -> None:
            ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [
                1,
                0,
                0,
                0,
                1,
                0,
            ]
            for i in (2, 3):
                plane, place = Dataset(), Dataset()
                plane.ImageOrientationPatient, place.ImagePositionPatient = (
                    [1, 0, 0, 0, 0, -1],
                    [-10.0, 20.0 + 3 * i, 5],
                )
                group = ds.PerFrameFunctionalGroupsSequence[i]
                group.PlaneOrientationSequence, group.PlanePositionSequence = Sequence([plane]), Sequence([place])

        write_enhanced(tmp_path / "a.dcm", [0, 2, 4, 6], turn)
        assert [s.shape[0] for s in find_scans(tmp_path).scans if s.shape] == [2, 2]
        with pytest.raises(ScanError, match="2 stacks that lie differently"):
            read_volume(tmp_path / "a.dcm")

    def test_two_tags_together_split_echoes_and_phases(self, tmp_path: Path) -> None:
        def number(i: int, ds: FileDataset) -> None:
            ds.EchoTime, ds.TriggerTime = 5 + 10 * (i // 6), 100 * (i // 3 % 2)

        write_series(tmp_path, [0, 2, 4] * 4, edit=number)
        index = find_scans(tmp_path)
        assert [s.repeat for s in index.scans] == [
            f"EchoTime {e}, TriggerTime {t}" for e in (5.0, 15.0) for t in (0.0, 100.0)
        ]
        for k, scan in enumerate(index.scans):
            np.testing.assert_array_equal(
                scan.read(canonical=False).voxels, np.stack([image(3 * k + i) for i in range(3)]).astype(int) - 1024
            )

    def test_table_in_the_shared_groups_replaces_the_slope(self, tmp_path: Path) -> None:
        def table(_: int, ds: FileDataset) -> None:
            for group in ds.PerFrameFunctionalGroupsSequence:
                del group.PixelValueTransformationSequence
            part = Dataset()
            part.ModalityLUTSequence = Sequence([lut(4096, 0, [i * 2 for i in range(4096)])])
            ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = Sequence([part])

        write_enhanced(tmp_path / "a.dcm", [0, 2], table)
        volume = read_volume(tmp_path / "a.dcm", canonical=False)
        np.testing.assert_array_equal(volume.voxels, 2 * np.stack([image(0), image(1)]))


def lut(entries: int, first: int, values: list[int], kind: str = "HU", bits: int = 16) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [entries % 65536, first, bits])
    item.ModalityLUTType = kind
    item.add_new("LUTData", "OW", np.array(values, "<u2").tobytes())
    return item


class TestModalityTable:
    def test_values_outside_the_table_take_its_ends(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            del ds.RescaleSlope, ds.RescaleIntercept
            ds.ModalityLUTSequence = Sequence([lut(10, 1005, [7 * i for i in range(10)])])

        write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
        volume = read_volume(tmp_path / "a.dcm", canonical=False)
        expected = 7 * np.clip(image(0).astype(int) - 1005, 0, 9)
        np.testing.assert_array_equal(volume.voxels[0], expected)
        assert volume.units == "HU"
        assert "Modality LUT applied" in volume.notes

    def test_the_first_value_of_a_table_for_signed_pixels_is_signed(self, tmp_path: Path) -> None:
        """PS3.3 C.11.1.1: the second number of LUTDescriptor has the sign of the pixels, whatever its VR says."""
        values = np.arange(-15, 15).reshape(6, 5)

        def edit(_: int, ds: FileDataset) -> None:
            del ds.RescaleSlope, ds.RescaleIntercept
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 15, 1
            ds.PixelData = values.astype("<i2").tobytes()
            ds.ModalityLUTSequence = Sequence([lut(20, 65536 - 10, [100 + 3 * i for i in range(20)])])

        write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
        volume = read_volume(tmp_path / "a.dcm", canonical=False)
        np.testing.assert_array_equal(volume.voxels[0], 100 + 3 * np.clip(values + 10, 0, 19))

    def test_a_table_cut_short_is_refused(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.ModalityLUTSequence = Sequence([lut(4096, 0, [1, 2, 3])])

        write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
        with pytest.raises(ScanError, match="Modality LUT has 3 of 4096 entries"):
            read_volume(tmp_path / "a.dcm")


def csa_header(tags: dict[str, tuple[str, list[str]]]) -> bytes:
    """A Siemens CSA2 header with the given tags (VR, values); layout as nibabel documents it."""
    out = b"SV10\4\3\2\1" + struct.pack("<II", len(tags), 77)
    for name, (vr, values) in tags.items():
        items = [v.encode() for v in values]
        out += struct.pack("<64si4siii", name.encode(), len(items), vr.encode(), 0, len(items), 77)
        for item in items:
            out += struct.pack("<4i", len(item), len(item), 77, len(item)) + item + b"\0" * (-len(item) % 4)
    return out


def write_mosaic(
    path: Path, count: int, *, iop=OBLIQUE, flip: bool = False, edit=None
) -> tuple[np.ndarray, np.ndarray]:
    """`count` slices of 6 x 5 tiled; returns the slices and the affine they ought to have."""
    tiles = int(np.ceil(np.sqrt(count)))
    slices = np.stack([image(i) for i in range(count)])
    mosaic = np.zeros((tiles * 6, tiles * 5), np.uint16)
    for i in range(count):
        row, column = divmod(i, tiles)
        mosaic[6 * row : 6 * row + 6, 5 * column : 5 * column + 5] = slices[i]
    normal = normal_of(iop) * (-1 if flip else 1)
    first = np.array([-10.0, 20.0, -30.0])
    corner = first - np.array(iop[:3]) * 0.7 * 5 * (tiles - 1) / 2 - np.array(iop[3:]) * 0.8 * 6 * (tiles - 1) / 2

    def change(i: int, ds: FileDataset) -> None:
        ds.Modality, ds.ImageType = "MR", ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
        ds.Manufacturer, ds.SpacingBetweenSlices, ds.SliceThickness = "SIEMENS", 2.5, 2.0
        ds.Rows, ds.Columns, ds.PixelData = *mosaic.shape, mosaic.tobytes()
        del ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType
        block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        tags = {
            "AcquisitionMatrixText": ("SH", ["6*5"]),  # by which nibabel knows a mosaic
            "NumberOfImagesInMosaic": ("US", [str(count)]),
            "SliceNormalVector": ("FD", [f"{v:.14f}" for v in normal]),
        }
        block.add_new(0x10, "OB", csa_header(tags))
        if edit is not None:
            edit(i, ds)

    write_slice(path, 0, corner, iop=iop, edit=change)
    return slices, lps_affine(2.5 * normal, iop)


class TestMosaic:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("count", [4, 7, 9])
    def test_tiles_lie_where_they_were_measured(self, tmp_path: Path, count: int, flip: bool) -> None:
        slices, affine = write_mosaic(tmp_path / "a.dcm", count, flip=flip)
        volume = read_volume(tmp_path / "a.dcm", canonical=False)
        if flip:  # our stacks always run along row x column
            slices, affine = slices[::-1], affine.copy()
            affine[:3, 3] += (count - 1) * affine[:3, 2]
            affine[:3, 2] *= -1
        np.testing.assert_array_equal(volume.voxels, slices)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-6)

    def test_affine_agrees_with_nibabel(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nibabel calls its DICOM readers experimental on import
            from nibabel.nicom import dicomwrappers

        write_mosaic(tmp_path / "a.dcm", 7)
        wrapper = dicomwrappers.wrapper_from_file(tmp_path / "a.dcm")
        ours = read_volume(tmp_path / "a.dcm", canonical=False)
        theirs = np.diag([-1, -1, 1, 1]) @ wrapper.affine  # (row, column, slice) to LPS
        np.testing.assert_allclose(ours.affine[:, [1, 0, 2, 3]], theirs, atol=1e-6)
        np.testing.assert_array_equal(ours.voxels, np.moveaxis(wrapper.get_data(), -1, 0))

    def test_time_points_are_separate_scans(self, tmp_path: Path) -> None:
        for i in range(3):

            def later(_: int, ds: FileDataset, i: int = i) -> None:
                ds.AcquisitionNumber, ds.SOPInstanceUID = i + 1, f"1.2.3.4.{i + 50}"
                ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) + i).tobytes()

            write_mosaic(tmp_path / f"{i}.dcm", 4, edit=later)
        index = find_scans(tmp_path)
        assert [s.shape for s in index.scans] == [(4, 6, 5)] * 3
        assert sorted(int(s.read(canonical=False).voxels[0, 0, 0]) for s in index.scans) == [1000, 1001, 1002]

    def test_without_its_private_header_it_is_refused(self, tmp_path: Path) -> None:
        def strip(_: int, ds: FileDataset) -> None:
            ds.remove_private_tags()

        write_mosaic(tmp_path / "a.dcm", 4, edit=strip)
        with pytest.raises(ScanError, match="mosaic without the CSA header"):
            read_volume(tmp_path / "a.dcm")

    def test_a_damaged_private_header_is_refused(self, tmp_path: Path) -> None:
        def damage(_: int, ds: FileDataset) -> None:
            block = ds.private_block(0x0029, "SIEMENS CSA HEADER")
            block[0x10].value = block[0x10].value[:60]

        write_mosaic(tmp_path / "a.dcm", 4, edit=damage)
        with pytest.raises(ScanError, match="mosaic"):
            read_volume(tmp_path / "a.dcm")


class TestDeskew:
    def ramp(self, shear: tuple[float, float], dtype: type = np.float32) -> Volume:
        """Voxels that hold their own place along the patient's x + 2 y + 3 z."""
        affine = np.diag([0.7, 0.8, 2.0, 1.0])
        affine[0, 2], affine[1, 2] = shear
        z, y, x = np.indices((9, 12, 10))
        world = affine[:3, :3] @ np.stack([x.ravel(), y.ravel(), z.ravel()])
        values = (np.array([1, 2, 3]) @ world).reshape(x.shape)
        return Volume(
            voxels=values.astype(dtype), affine=affine, modality="CT", units="HU", notes=("gantry tilt x",), source="a"
        )

    @pytest.mark.parametrize("shear", [(0.0, 0.6), (0.3, -0.7), (-0.5, 0.0)])
    def test_a_linear_image_is_kept_exactly_where_it_was(self, shear: tuple[float, float]) -> None:
        out = deskew(self.ramp(shear))
        np.testing.assert_allclose(out.affine[:3, 2], [0, 0, 2.0], atol=1e-12)
        assert out.valid is not None
        z, y, x = np.nonzero(out.valid)
        world = out.affine[:3] @ np.stack([x, y, z, np.ones_like(x)])
        np.testing.assert_allclose(out.voxels[out.valid], np.array([1, 2, 3]) @ world, atol=1e-4)
        assert out.valid.sum() > 0.75 * 9 * 12 * 10
        assert out.notes == ("slices shifted onto an upright grid by linear interpolation (deskew)",)

    def test_integers_stay_integers_and_no_shear_changes_nothing(self) -> None:
        assert deskew(self.ramp((0.0, 0.6), np.int16)).voxels.dtype == np.int16
        straight = self.ramp((0.0, 0.0))
        assert deskew(straight) is straight

    def test_read_volume_does_it_on_request(self, tmp_path: Path) -> None:
        angle = np.radians(18.5)
        write_series(tmp_path, np.arange(9), step=tuple(2.371 * np.array([0.0, np.sin(angle), np.cos(angle)])))
        volume = read_volume(tmp_path, deskew=True)
        assert volume.spacing_mm == pytest.approx((2.371 * np.cos(angle), 0.8, 0.7))
        matrix = volume.affine[:3, :3]
        np.testing.assert_allclose(matrix.T @ matrix, np.diag(np.diag(matrix.T @ matrix)), atol=1e-9)


class TestBudgets:
    def test_a_deflated_bomb_is_refused_within_50_ms_and_50_mib(self, tmp_path: Path) -> None:
        path = tmp_path / "bomb.dcm"
        write_slice(path, 0, np.zeros(3))
        ds = pydicom.dcmread(path)
        ds.PixelData = bytes(2**28)
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)
        del ds
        with pytest.raises(ScanError):
            read_volume(path)  # imports are not what is measured
        start = time.process_time()
        with pytest.raises(ScanError, match="deflated transfer syntax"):
            read_volume(path)
        assert time.process_time() - start < 0.05
        tracemalloc.start()
        with pytest.raises(ScanError):
            read_volume(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50 * 2**20

    def test_more_pixels_than_the_stream_can_hold_are_refused_unread(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.Rows = ds.Columns = 8000
            ds.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
            ds.PixelData = pydicom.encaps.encapsulate([b"\0" * 100])
            ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

        write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
        with pytest.raises(ScanError, match="at most 4,000 to 1 are decoded"):
            read_volume(tmp_path / "a.dcm")

    def test_deep_nesting_is_refused(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            item = Dataset()
            for _ in range(400):
                outer = Dataset()
                outer.ReferencedStudySequence = Sequence([item])
                item = outer
            ds.ReferencedStudySequence = Sequence([item])

        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)
        try:
            write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
        finally:
            sys.setrecursionlimit(limit)
        try:
            assert isinstance(read_volume(tmp_path / "a.dcm"), Volume)
        except ScanError as error:
            assert "damaged" in str(error)  # noqa: PT017


class TestZip:
    def test_a_zipped_series_is_read_whatever_its_names_ask_for(self, tmp_path: Path) -> None:
        paths = write_series(tmp_path / "s", np.arange(5) * 2.0)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for i, path in enumerate(paths):
                archive.write(path, f"../../../escape/{i}.dcm")
            archive.writestr("/absolute/readme.txt", "hello")
        volume = read_volume(tmp_path / "a.zip", canonical=False)
        np.testing.assert_array_equal(volume.voxels, read_volume(tmp_path / "s", canonical=False).voxels)
        assert volume.source == str(tmp_path / "a.zip")
        assert not list(tmp_path.parent.glob("escape*"))

    def test_a_zipped_pair_and_nifti_are_read(self, tmp_path: Path) -> None:
        data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
        nib.save(nib.Nifti1Pair(data, np.diag([1, 2, 3, 1.0])), tmp_path / "b.img")
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(tmp_path / "b.img", "b.img")
            archive.write(tmp_path / "b.hdr", "b.hdr")
        np.testing.assert_array_equal(read_volume(tmp_path / "a.zip").voxels, data.T)

    def test_bombs_links_and_cut_archives_are_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(40):
                archive.writestr(f"{i}.dcm", bytes(2**20))
        bomb = bytearray((tmp_path / "bomb.zip").read_bytes())
        at = 0
        while (at := bomb.find(b"PK\x01\x02", at)) >= 0:  # each now declares a byte
            bomb[at + 24 : at + 28] = struct.pack("<I", 1)
            at += 4
        (tmp_path / "liar.zip").write_bytes(bytes(bomb))
        with pytest.raises(ScanError, match="zip"):
            read_volume(tmp_path / "liar.zip")
        with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
            info = zipfile.ZipInfo("link.dcm")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
        with pytest.raises(ScanError, match="holds a link"):
            read_volume(tmp_path / "link.zip")
        (tmp_path / "cut.zip").write_bytes((tmp_path / "bomb.zip").read_bytes()[:-300])
        with pytest.raises(ScanError, match="cut off"):
            read_volume(tmp_path / "cut.zip")


class TestPrivacy:
    def test_provenance_holds_how_and_not_who(self, tmp_path: Path) -> None:
        def edit(_: int, ds: FileDataset) -> None:
            ds.Manufacturer, ds.ConvolutionKernel, ds.KVP = "ACME", "B30f", 120
            ds.PatientBirthDate, ds.StudyDate, ds.InstitutionName = "19500101", "20200101", "Secret Hospital"
            ds.BurnedInAnnotation = "YES"
            ds.ManufacturerModelName = "model of Ms. Secret <x>"

        write_series(tmp_path / "s", np.arange(3) * 2.0, edit=edit)
        volume = read_volume(tmp_path / "s")
        text = json.dumps({"p": dict(volume.provenance), "n": volume.notes})
        assert all(word in text for word in ("ACME", "B30f", "120", "pydicom"))
        assert not any(word in text for word in ("ecret", "SECRET", "1950", "2020", "1.2.3"))
        assert "BurnedInAnnotation is YES" in text


class TestInspect:
    def test_every_series_is_told_with_problem_and_way_out(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        write_series(tmp_path / "good", np.arange(5) * 2.0)
        write_series(tmp_path / "gap", [0, 2, 6, 8])
        shutil.copy(tmp_path / "good" / "f000.dcm", tmp_path / "lone.dcm")
        (tmp_path / "notes.txt").write_text("x")
        for path in (tmp_path / "gap").iterdir():
            ds = pydicom.dcmread(path)
            ds.SeriesInstanceUID = "1.2.3.10"
            ds.save_as(path)
        assert main(["inspect", str(tmp_path), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["left_out"] == {"not a scan": 1}
        assert len(found["problems"]) == 1
        assert "1 of 5 slices missing" in found["problems"][0]
        assert "copy the missing files" in found["problems"][0]
        assert main(["inspect", str(tmp_path)]) == 1
        assert "refused" in capsys.readouterr().out

    def test_reading_finds_what_headers_hide(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
        data = (tmp_path / "a.nii.gz").read_bytes()
        (tmp_path / "a.nii.gz").write_bytes(data[:-6])
        assert main(["inspect", str(tmp_path)]) == 0
        assert main(["inspect", str(tmp_path), "--read"]) == 1
        assert "cut off" in capsys.readouterr().out

    def test_it_runs_as_a_module_and_names_a_missing_folder(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "medformer", "inspect", str(tmp_path / "nowhere")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "no folder" in done.stderr
