"""Folders as they lie: links, archives, empty files, zip roots, and one decision about units for the scans of one."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from medformer.data import ScanError, find_scans, read_volume
from medformer.data.inspect_folder import inspect, report
from medformer.data.modality import could_be_hu, decide, looks_like_hu
from tests.dicom_files import write_series
from tests.test_data_numbers import meta, nrrd

DEPTHS = [2.0 * i for i in range(4)]


def body(seed: int, low: float = -900, size: int = 12) -> np.ndarray:
    """Soft tissue with a block of `low`."""
    values = np.random.default_rng(seed).normal(20, 60, (size, size, size))
    values[: size // 3] = low
    return values.round().astype(np.int16)


def nifti(path: Path, values: np.ndarray) -> Path:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.T, np.eye(4)), path)
    return path


class TestLinks:
    def test_folders_are_followed_once_and_loops_named(self, tmp_path: Path) -> None:
        root, away = tmp_path / "root", tmp_path / "away"
        write_series(away / "p1", DEPTHS, edit=lambda i, ds: setattr(ds, "SeriesInstanceUID", "1.2.3.10"))
        write_series(root / "p0", DEPTHS)
        (root / "a").symlink_to(away)  # before the real folders in the order of names
        (root / "again").symlink_to(away)
        (root / "p0" / "up").symlink_to(root)
        (away / "round").symlink_to(away)
        index = find_scans(root)
        assert [s.name for s in index.scans] == ["a/p1", "p0"]
        reasons = {Path(s.path).name: s.reason for s in index.skipped}
        assert reasons.keys() == {"again", "up", "round"}
        assert all("already searched" in r for r in reasons.values())

    def test_a_linked_file_is_read_once(self, tmp_path: Path) -> None:
        nifti(tmp_path / "b.nii", body(0))
        (tmp_path / "a.nii").symlink_to(tmp_path / "b.nii")
        (tmp_path / "away").mkdir()
        index = find_scans(tmp_path)
        assert [s.name for s in index.scans] == ["b"]
        assert [s.reason for s in index.skipped] == ["a.nii: links to a file that is here already"]


class TestArchives:
    @pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tgz", "x.7z", "x.rar", "x.dcm.gz"])
    def test_inside_a_folder_are_named_with_the_way_out(self, tmp_path: Path, name: str) -> None:
        nifti(tmp_path / "a.nii", body(0))
        (tmp_path / name).write_bytes(b"PK\x03\x04" if name == "x.zip" else b"\x1f\x8b" + bytes(300))
        (skipped,) = find_scans(tmp_path).skipped
        assert f"{name}: an archive, which is not searched" in skipped.reason
        assert "unpack it" in skipped.reason
        assert not skipped.refused

    def test_a_zip_file_is_a_root(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_series(
                tmp_path / name, DEPTHS, edit=lambda i, ds, n=name: setattr(ds, "SeriesInstanceUID", f"1.2.{ord(n)}")
            )
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for path in sorted(tmp_path.glob("?/*.dcm")):
                archive.write(path, f"{path.parent.name}/{path.name}")
        scans = find_scans(tmp_path / "x.zip").scans
        assert [s.shape for s in scans] == [(4, 6, 5)] * 2
        np.testing.assert_array_equal(scans[0].read().voxels, read_volume(tmp_path / "a").voxels)
        assert len(inspect(str(tmp_path / "x.zip"))["scans"]) == 2


def test_an_empty_file_does_not_refuse_the_series_and_is_said(tmp_path: Path) -> None:
    write_series(tmp_path, DEPTHS)
    (tmp_path / "x.dcm").touch()
    assert "left out: x.dcm: empty file (0 bytes)" in read_volume(tmp_path).notes
    (scan,) = find_scans(tmp_path).scans
    assert "1 empty files in its folder: slices lost?" in scan.notes
    (tmp_path / "y.dcm").write_bytes(b"junk")
    with pytest.raises(ScanError, match="1 that cannot be read"):
        read_volume(tmp_path)


class TestVote:
    def test_of_a_folder_names_the_minority(self) -> None:
        scans = {f"{i:02d}": ("CT" if i < 86 else "unknown", i != 99) for i in range(100)}
        decision = decide(scans)
        assert decision.modality == {f"{i:02d}": "CT" for i in range(86, 99)}
        (line,) = decision.lines
        assert "86 of 100 scans" in line
        assert "86, 87, 88, 89, 90, ..." in line
        assert "1 of them cannot be" in line

    def test_goes_the_other_way_too(self) -> None:
        scans = {f"{i}": ("CT" if i < 2 else "unknown", True) for i in range(9)}
        assert decide(scans).modality == {"0": "unknown", "1": "unknown"}

    def test_is_by_folder_and_small_folders_ask_the_one_above(self) -> None:
        scans = {f"ct/{i}": ("CT", True) for i in range(6)} | {f"mr/{i}": ("unknown", True) for i in range(6)}
        assert decide(scans).modality == {}
        scans = {f"p{i}/scan": ("CT" if i else "unknown", True) for i in range(6)}
        assert decide(scans).modality == {"p0/scan": "CT"}

    def test_few_scans_have_none(self) -> None:
        assert decide({"a": ("CT", True), "b": ("unknown", True)}).modality == {}

    def test_cubes_without_air_could_be_ct_and_counts_could_not(self) -> None:
        soft = np.random.default_rng(0).normal(40, 30, (9, 9, 9))
        assert (looks_like_hu(soft), could_be_hu(soft)) == (False, True)
        assert not could_be_hu(np.abs(soft))
        assert not could_be_hu(soft * 1000)

    def test_is_what_inspect_shows(self, tmp_path: Path) -> None:
        for i in range(6):
            nifti(tmp_path / f"{i}.nii", body(i, low=-900 if i else 20))
        found = inspect(str(tmp_path), read=True)
        assert [(s["modality"], s["normalised"]) for s in found["scans"]] == [("CT", "HU / 500")] * 6
        assert "5 of 6 scans" in report(found)
        unread = inspect(str(tmp_path))
        assert {s["normalised"] for s in unread["scans"]} == {"by values: only --read knows"}
        assert "show with --read" in report(unread)


class TestSaid:
    def test_a_text_file_says_what_scans_below_it_are(self, tmp_path: Path) -> None:
        nifti(tmp_path / "a" / "b" / "x.nii", body(0, low=20))
        nifti(tmp_path / "c" / "x.nii", body(1))
        (tmp_path / "a" / "modality.txt").write_text("ct\n")
        scans = {s.name: s for s in find_scans(tmp_path).scans}
        assert (scans["a/b/x"].modality, scans["c/x"].modality) == ("CT", "unknown")
        volume = scans["a/b/x"].read()
        assert (volume.modality, volume.units) == ("CT", "HU")
        assert scans["a/b/x"].notes == ("CT by modality.txt",)

    def test_a_header_that_names_it_is_believed(self, tmp_path: Path) -> None:
        meta(tmp_path / "a.mha", Modality="MET_MOD_MR")
        nrrd(tmp_path / "b.nrrd")
        (tmp_path / "modality.txt").write_text("CT")
        assert [s.modality for s in find_scans(tmp_path).scans] == ["MR", "CT"]
        assert read_volume(tmp_path / "a.mha").modality == "MR"
        assert read_volume(tmp_path / "b.nrrd").units == "HU"


class TestInspect:
    def test_says_what_pretraining_uses_and_skips(self, tmp_path: Path) -> None:
        write_series(tmp_path / "ct", DEPTHS)
        labels = np.zeros((12, 12, 12), np.uint8)
        labels[3:8, 3:8, 3:8] = 4
        nifti(tmp_path / "labels.nii", labels)
        nifti(tmp_path / "flat.nii", np.full((12, 12, 12), 7, np.int16))
        nifti(tmp_path / "good.nii", body(0))
        np.save(tmp_path / "picture.npy", np.zeros((1, 8, 8), np.uint8))
        found = {s["name"]: s for s in inspect(str(tmp_path), read=True, least=(8, 8, 8))["scans"]}
        assert {n: s["use"] for n, s in found.items()} == {
            "ct": "no", "labels": "no", "flat": "no", "good": "yes", "picture": "no"
        }  # fmt: skip
        assert "smaller than the crops of 8x8x8" in found["ct"]["why"]
        assert "label map (1 labels)" in found["labels"]["why"]
        assert "constant" in found["flat"]["why"]
        assert found["good"]["normalised"] == "HU / 500"

    def test_without_reading_it_calls_no_label_map_a_scan(self, tmp_path: Path) -> None:
        labels = np.zeros((12, 12, 12), np.uint8)
        labels[3:8, 3:8, 3:8] = 4
        nifti(tmp_path / "labels.nii", labels)
        nrrd(tmp_path / "a.nrrd")
        found = inspect(str(tmp_path))
        assert {s["use"] for s in found["scans"]} == {"only --read knows"}
        assert "ok " not in report(found)
        assert "show with --read" in report(found)

    def test_knows_how_dicom_is_scaled_from_headers(self, tmp_path: Path) -> None:
        write_series(tmp_path / "hu", DEPTHS)
        write_series(tmp_path / "raw", DEPTHS, edit=_no_rescale)
        found = {s["name"]: s["normalised"] for s in inspect(str(tmp_path))["scans"]}
        assert found == {"hu": "HU / 500", "raw": "z-score"}


def _no_rescale(i: int, ds) -> None:
    ds.SeriesInstanceUID = "1.2.3.77"
    del ds.RescaleSlope


def test_a_file_that_is_gone_is_one_refusal(tmp_path: Path) -> None:
    nifti(tmp_path / "a" / "a.nii", body(0))
    (scan,) = find_scans(tmp_path).scans
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ScanError, match=r"a\.nii: cannot be opened"):
        scan.read()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_value_far_beyond_all_others_is_noted_in_any_type(tmp_path: Path, dtype: type) -> None:
    values = body(0).astype(dtype)
    values[0, 0, 0] = 2**30
    nifti(tmp_path / "a.nii", values)
    assert "a fill value, or damage" in " ".join(read_volume(tmp_path / "a.nii").notes)
