"""What makes one scan of slices: marks that decorate, UIDs that vary, classes whose UID begins alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence

from medformer.data import ScanError, find_scans, read_volume
from medformer.data.inspect_folder import inspect
from tests.dicom_files import image, lps_affine, write_series, write_slice

DEPTHS = [2.0 * i for i in range(12)]
KINDS = {
    "interleaved": lambda i: i % 2,
    "halves": lambda i: i < 6,
    "fives": lambda i: i < 5,
    "each its own": lambda i: i,
}


def mark(tag: str, kind: str):
    def edit(i: int, ds: FileDataset) -> None:
        value = int(KINDS[kind](i))
        setattr(ds, tag, ["ORIGINAL", "PRIMARY", "AXIAL", f"K{value}"] if tag == "ImageType" else f"1.2.{value + 1}")

    return edit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tag", ["ImageType", "FrameOfReferenceUID"])
def test_marks_that_vary_do_not_part_a_stack(tmp_path: Path, tag: str, kind: str) -> None:
    write_series(tmp_path, DEPTHS, edit=mark(tag, kind))
    (scan,) = find_scans(tmp_path).scans
    assert (scan.shape, scan.spacing_mm) == ((12, 6, 5), pytest.approx((2.0, 0.8, 0.7)))
    assert any(n.startswith(f"{tag} differs between slices") for n in scan.notes)
    assert "1.2." not in str(scan.notes)


def test_a_lost_slice_is_seen_through_the_marks(tmp_path: Path) -> None:
    write_series(tmp_path, DEPTHS[:5] + DEPTHS[6:], edit=mark("ImageType", "interleaved"))
    with pytest.raises(ScanError, match="1 of 12 slices missing"):
        read_volume(tmp_path)


def test_halves_with_a_gap_between_them_are_said_to_be_parts(tmp_path: Path) -> None:
    write_series(tmp_path, DEPTHS[:5] + DEPTHS[6:], edit=mark("ImageType", "fives"))
    scans = find_scans(tmp_path).scans
    assert sorted(s.shape[0] for s in scans if s.shape) == [5, 6]
    assert all(
        "one of 2 parts of a series by ImageType, which together are no stack (1 of 12" in s.notes[0] for s in scans
    )
    assert all(s.read().notes[0] == s.notes[0] for s in scans)


def test_magnitude_and_phase_at_one_place_are_two_scans(tmp_path: Path) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M" if i < 12 else "P"]

    write_series(tmp_path, DEPTHS * 2, edit=edit)
    scans = find_scans(tmp_path).scans
    assert [(s.shape, s.repeat) for s in scans] == [((12, 6, 5), "ImageType M"), ((12, 6, 5), "ImageType P")]
    np.testing.assert_array_equal(scans[1].read().voxels - scans[0].read().voxels, 1200)


def test_a_decoration_never_parts_two_echoes_wrongly(tmp_path: Path) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        ds.Modality, ds.EchoTime = "MR", 5 if i < 12 else 10
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", f"K{i % 2}"]

    write_series(tmp_path, DEPTHS * 2, edit=edit)
    assert [s.repeat for s in find_scans(tmp_path).scans] == ["EchoTime 5.0", "EchoTime 10.0"]


def test_slices_of_one_study_with_a_series_each_are_joined(tmp_path: Path) -> None:
    write_series(tmp_path, DEPTHS, edit=mark("SeriesInstanceUID", "each its own"))
    (scan,) = find_scans(tmp_path).scans
    assert scan.shape == (12, 6, 5)
    assert "12 slices of one study, each with its own SeriesInstanceUID, make one stack: joined" in scan.notes
    assert scan.read().shape == (12, 6, 5)
    assert read_volume(tmp_path).shape == (12, 6, 5)


@pytest.mark.parametrize("depths", [DEPTHS, [0.0, 2.0, 5.0, 11.0]])
def test_slices_with_all_uids_of_their_own_are_warned_about(tmp_path: Path, depths: list[float]) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        for tag in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            setattr(ds, tag, f"1.2.{i + 1}")

    write_series(tmp_path, depths, edit=edit)
    scans = find_scans(tmp_path).scans
    assert len(scans) == len(depths)
    assert all("one of" in " ".join(s.notes) for s in scans)


def test_two_series_in_one_grid_are_said_so(tmp_path: Path) -> None:
    write_series(tmp_path, DEPTHS, edit=mark("SeriesInstanceUID", "interleaved"))
    scans = find_scans(tmp_path).scans
    assert [s.shape for s in scans] == [(6, 6, 5)] * 2
    assert all("one of 2 parts that together would make one regular stack" in s.notes[-1] for s in scans)


def test_two_planes_of_one_study_are_no_parts(tmp_path: Path) -> None:
    write_series(tmp_path / "a", DEPTHS)
    sagittal = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
    write_series(
        tmp_path / "b", DEPTHS, step=(1.0, 0, 0), iop=sagittal,
        edit=lambda i, ds: setattr(ds, "SeriesInstanceUID", "1.2.3.10"),
    )  # fmt: skip
    assert [s.notes for s in find_scans(tmp_path).scans] == [(), ()]


@pytest.mark.parametrize(
    ("sop", "modality"),
    [
        ("1.2.840.10008.5.1.4.1.1.77.1.5.4", "OPT"), ("1.2.840.10008.5.1.4.1.1.78.1", "OP"),
        ("1.2.840.10008.5.1.4.1.1.7", "CT"), ("1.2.840.10008.5.1.4.1.1.7.2", "MR"),
    ],
)  # fmt: skip
def test_classes_are_compared_whole(tmp_path: Path, sop: str, modality: str) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        ds.SOPClassUID, ds.Modality = sop, modality

    write_series(tmp_path, DEPTHS, edit=edit)
    (scan,) = find_scans(tmp_path).scans
    assert scan.shape == (12, 6, 5)
    assert ("Secondary Capture" in " ".join(scan.notes)) == (modality in {"CT", "MR"})


@pytest.mark.parametrize("sop", ["1.2.840.10008.5.1.4.1.1.66", "1.3.46.670589.11.0.0.12.2"])
def test_raw_data_next_to_a_scan_is_no_damage(tmp_path: Path, sop: str) -> None:
    write_series(tmp_path / "scan", DEPTHS)

    def edit(i: int, ds: FileDataset) -> None:
        ds.SOPClassUID, ds.Modality = sop, "MR"
        for tag in ("ImagePositionPatient", "PixelData", *(("Rows", "Columns") if i else ())):
            delattr(ds, tag)

    write_series(tmp_path / "raw", [0.0, 2.0], edit=edit)
    index = find_scans(tmp_path)
    assert [s.shape for s in index.scans] == [(12, 6, 5)]
    assert [(s.refused, s.reason.partition(": ")[2]) for s in index.skipped] == [(False, "raw data, no image")] * 2


def test_a_capture_without_a_place_is_left_out(tmp_path: Path) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        del ds.ImagePositionPatient

    write_series(tmp_path, DEPTHS, edit=edit)
    with pytest.raises(ScanError, match="screen capture"):
        find_scans(tmp_path)


@pytest.mark.parametrize(("tag", "value"), [("RescaleSlope", 1e5), ("RescaleIntercept", 1e7), ("RescaleSlope", -1e6)])
def test_a_scale_far_beyond_that_of_the_other_slices_is_refused(tmp_path: Path, tag: str, value: float) -> None:
    write_series(tmp_path, DEPTHS, edit=lambda i, ds: setattr(ds, tag, value if i == 3 else 1))
    with pytest.raises(ScanError, match=rf"{tag} .* on a slice"):
        read_volume(tmp_path)


def test_pet_slices_with_slopes_of_their_own_are_read(tmp_path: Path) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = "PT", [0.001, 1, 30][i % 3], 0

    write_series(tmp_path, DEPTHS, edit=edit)
    assert read_volume(tmp_path).shape == (12, 6, 5)


def test_inspect_says_that_only_reading_settles_what_no_tag_tells_apart(tmp_path: Path) -> None:
    write_series(tmp_path, [0.0, 2.0, 4.0] * 4, edit=lambda i, ds: setattr(ds, "InstanceNumber", 1))
    (scan,) = inspect(str(tmp_path))["scans"]
    assert scan["use"] == "only --read knows"
    assert "3 of 3 positions hold up to 4 images that no tag tells apart" in scan["notes"][-1]
    assert len(inspect(str(tmp_path), read=True)["problems"]) == 1


def test_a_slice_that_is_there_twice_has_no_doubts_once_read(tmp_path: Path) -> None:
    paths = write_series(tmp_path, [0.0, 2.0, 4.0])
    (tmp_path / "copy.dcm").write_bytes(paths[0].read_bytes())
    (scan,) = find_scans(tmp_path).scans
    assert "only reading shows" in scan.notes[-1]
    assert scan.read().notes == ("1 duplicate slice dropped",)


@pytest.mark.parametrize("depths", [[0.0, 2.0, 4.0], [4.0, 0.0, 2.0]])
def test_volumes_one_after_another_are_told_apart_by_their_numbers(tmp_path: Path, depths: list[float]) -> None:
    write_series(tmp_path, depths * 4)
    scans = find_scans(tmp_path).scans
    assert [s.repeat for s in scans] == [f"volume {k} by InstanceNumber" for k in (1, 2, 3, 4)]
    for number, scan in enumerate(scans):
        volume = scan.read(canonical=False)
        slices = np.stack([image(3 * number + i) for i in np.argsort(depths)]).astype(np.int16) - 1024
        np.testing.assert_array_equal(volume.voxels, slices)
        assert "told apart by InstanceNumber alone" in " ".join(volume.notes)


@pytest.mark.parametrize(
    ("depths", "number"),
    [
        ([0.0, 2.0, 4.0] * 4, lambda i: i % 3),  # twice the same
        ([0.0] * 4 + [2.0] * 4 + [4.0] * 4, lambda i: i),  # slice by slice
        ([0.0, 2.0, 4.0, 4.0, 2.0, 0.0], lambda i: i),  # in two orders
        ([0.0, 2.0, 4.0] * 3 + [0.0], lambda i: i),  # one volume cut off
        ([0.0] * 4, lambda i: i),  # nothing but repeats of one place
    ],
)
def test_numbers_that_do_not_run_through_whole_volumes_tell_nothing(tmp_path: Path, depths, number) -> None:
    write_series(tmp_path, depths, edit=lambda i, ds: setattr(ds, "InstanceNumber", number(i)))
    (scan,) = find_scans(tmp_path).scans
    assert "only reading shows" in scan.notes[-1]
    with pytest.raises(ScanError, match="two different images at one position"):
        scan.read()


BLOCKS = {
    "phase": (0x2001, "Philips Imaging DD 001", 0x08),
    "gradient number": (0x2005, "Philips MR Imaging DD 005", 0x13),
    "label": (0x2005, "Philips MR Imaging DD 005", 0x29),
}


@pytest.mark.parametrize("tag", BLOCKS)
def test_private_tags_of_philips_tell_volumes_apart(tmp_path: Path, tag: str) -> None:
    def edit(i: int, ds: FileDataset) -> None:
        group, creator, element = BLOCKS[tag]
        ds.private_block(group, creator, create=True).add_new(element, "CS", f"{i % 2}")
        ds.InstanceNumber = 1

    write_series(tmp_path, [0.0, 0.0, 2.0, 2.0, 4.0, 4.0], edit=edit)
    scans = find_scans(tmp_path).scans
    assert [s.repeat for s in scans] == [f"{tag} 0", f"{tag} 1"]
    np.testing.assert_array_equal(scans[1].read(canonical=False).voxels[:, 0, 0], [76, 276, 476])


def test_b_values_and_directions_that_are_uneven_tell_volumes_apart_together(tmp_path: Path) -> None:
    tables = [(0, "0"), (1000, "0"), (1000, "1"), (1000, "2")]  # of b 0, of the trace, of two directions

    def edit(i: int, ds: FileDataset) -> None:
        b, direction = tables[i % 4]
        ds.DiffusionBValue, ds.TemporalPositionIdentifier, ds.InstanceNumber = b, direction, 1
        ds.AcquisitionTime = f"1200{i:02d}"  # another for each image: has no say

    write_series(tmp_path, [depth for depth in (0.0, 2.0, 4.0) for _ in range(4)], edit=edit)
    scans = find_scans(tmp_path).scans
    assert [s.repeat for s in scans] == [
        f"DiffusionBValue {b}.0, TemporalPositionIdentifier {direction}" for b, direction in tables
    ]
    np.testing.assert_array_equal(scans[3].read(canonical=False).voxels[:, 0, 0], [276, 676, 1076])


def write_grid(path: Path, count: int, edit=None) -> np.ndarray:
    """A UIH grid of `count` slices of 6 x 5, 2.5 mm apart; the slices."""
    across = int(np.ceil(np.sqrt(count)))
    down = int(np.ceil(count / across))
    grid, slices = np.zeros((down * 6, across * 5), np.uint16), np.stack([image(i) for i in range(count)])
    for i in range(count):
        row, column = divmod(i, across)
        grid[6 * row : 6 * row + 6, 5 * column : 5 * column + 5] = slices[i]

    def fill(_: int, ds: FileDataset) -> None:
        ds.Modality, ds.ImageType = "MR", ["ORIGINAL", "PRIMARY", "M", "VFRAME"]
        del ds.ImagePositionPatient
        ds.Rows, ds.Columns, ds.PixelData, ds.RescaleIntercept = *grid.shape, grid.tobytes(), 0
        items = []
        for i in range(count):
            item = Dataset()
            item.ImagePositionPatient = [-10.0, 20.0, -30.0 + 2.5 * i]
            items.append(item)
        block = ds.private_block(0x0065, "Image Private Header", create=True)
        block.add_new(0x50, "DS", str(count))
        block.add_new(0x51, "SQ", Sequence(items))
        if edit is not None:
            edit(ds, block)

    write_slice(path, 0, np.zeros(3), edit=fill)
    return slices


@pytest.mark.parametrize("count", [1, 3, 5, 7, 12, 20])
def test_slices_of_a_uih_grid_lie_where_its_private_sequence_says(tmp_path: Path, count: int) -> None:
    slices = write_grid(tmp_path / "a.dcm", count)
    volume = read_volume(tmp_path / "a.dcm", canonical=False)
    np.testing.assert_array_equal(volume.voxels, slices)
    depth = 2.5 if count > 1 else 99.0
    np.testing.assert_allclose(volume.affine, lps_affine(np.array([0, 0, depth])), atol=1e-9)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda ds, block: ds.pop(0x00651051), "without the private sequence"),
        (lambda ds, block: ds.pop(0x00650010), "without the private sequence"),
        (lambda ds, block: block[0x51].value.pop(), "does not divide"),
        (lambda ds, block: setattr(block[0x50], "value", "nan"), "without the private sequence"),
        (lambda ds, block: setattr(block[0x51].value[1], "ImagePositionPatient", [0, 0]), "malformed"),
        (lambda ds, block: setattr(block[0x51].value[1], "ImagePositionPatient", [0, 0, 1e300]), "not finite|malf"),
        (lambda ds, block: setattr(ds, "Rows", 13), "does not divide"),
    ],
)  # fmt: skip
def test_a_uih_grid_that_does_not_add_up_is_refused(tmp_path: Path, edit, reason: str) -> None:
    write_grid(tmp_path / "a.dcm", 7, edit)
    with pytest.raises(ScanError, match=reason):
        read_volume(tmp_path / "a.dcm")
