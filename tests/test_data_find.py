"""Finding scans in folders: by content, in a fixed order, and a reason for all that is left out."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel import nifti1, nifti2

from medformer.data import Scan, ScanError, ScanIndex, Volume, find_scans, read_volume, sample_scans, write_dicom_series
from medformer.data import samples as samples_module

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real scans are not at {SHARED}")


def tiny(seed: int, modality: str = "CT") -> Volume:
    voxels = np.random.default_rng(seed).integers(-1000, 1000, (4, 6, 5)).astype(np.int16)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    return Volume(voxels=voxels, affine=affine, modality=modality, units="HU", notes=(), source=f"tiny-{seed}")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two CT series and one MR in nested folders, two NIfTI, and what usually lies around them."""
    write_dicom_series(tiny(0), tmp_path / "site" / "p1" / "CT")
    write_dicom_series(tiny(1), tmp_path / "site" / "p2" / "CT")
    write_dicom_series(replace(tiny(2, "MR"), voxels=tiny(2).voxels + 2000), tmp_path / "site" / "p2" / "MR")
    tiny(3).save(tmp_path / "nifti" / "a.nii.gz")
    tiny(4).save(tmp_path / "nifti" / "b.nii")
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "site" / "labels.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    write_dicom_series(tiny(5), tmp_path / ".draft-of-a-killed-run" / "CT")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def test_everything_is_found_once_with_its_facts(tree: Path) -> None:
    index = find_scans(tree)
    facts = [(s.name, s.kind, s.modality, s.shape) for s in index.scans]
    assert facts == [
        ("nifti/a", "nifti", "unknown", (4, 6, 5)),
        ("nifti/b", "nifti", "unknown", (4, 6, 5)),
        ("site/p1/CT", "dicom", "CT", (4, 6, 5)),
        ("site/p2/CT", "dicom", "CT", (4, 6, 5)),
        ("site/p2/MR", "dicom", "MR", (4, 6, 5)),
    ]
    assert all(s.spacing_mm == pytest.approx((2.0, 1.5, 1.0)) for s in index.scans)
    skipped = {Path(s.path).name: s.reason for s in index.skipped}
    assert {*skipped} == {".draft-of-a-killed-run", "README.md", "dangling", "labels.csv", "loop", "pipe"}
    assert skipped[".draft-of-a-killed-run"].endswith("hidden folder, not searched")
    assert len(index) == 5


def test_scans_read_what_was_written(tree: Path) -> None:
    scans = {s.name: s for s in find_scans(tree).scans}
    for name, seed in (("site/p1/CT", 0), ("site/p2/CT", 1), ("nifti/a", 3), ("nifti/b", 4)):
        volume = scans[name].read()
        np.testing.assert_array_equal(volume.voxels, tiny(seed).voxels)
        np.testing.assert_allclose(volume.affine, tiny(seed).affine)


def test_flat_folder_with_meaningless_names_gives_the_same_scans(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flat = tmp_path_factory.mktemp("flat")
    files = sorted(tree.glob("site/*/*/*.dcm"))
    order = np.random.default_rng(0).permutation(len(files))
    for n, file in zip(order, files, strict=True):
        shutil.copy(file, flat / f"IM{n:05d}")
    index = find_scans(flat)
    assert sorted(s.modality for s in index.scans) == ["CT", "CT", "MR"]
    assert len({s.name for s in index.scans}) == 3
    found = {s.read().voxels.tobytes() for s in index.scans}
    assert found == {tiny(0).voxels.tobytes(), tiny(1).voxels.tobytes(), (tiny(2).voxels + 2000).tobytes()}


def test_order_and_result_do_not_depend_on_workers(tree: Path) -> None:
    assert find_scans(tree, workers=2) == find_scans(tree, workers=0)


def test_scans_survive_pickling(tree: Path) -> None:
    index = find_scans(tree)
    assert pickle.loads(pickle.dumps(index)) == index


def test_broken_series_is_skipped_with_its_reason_and_the_rest_stays(tree: Path) -> None:
    os.remove(tree / "site" / "p1" / "CT" / "0002.dcm")
    index = find_scans(tree)
    assert [s.name for s in index.scans] == ["nifti/a", "nifti/b", "site/p2/CT", "site/p2/MR"]
    refused = [s for s in index.skipped if s.refused and not s.path.endswith("dangling")]
    assert len(refused) == 1
    assert "1 of 4 slices missing" in refused[0].reason
    assert refused[0].path.endswith("site/p1/CT")


def test_reports_and_structures_are_skipped_by_kind(tree: Path) -> None:
    source = tree / "site" / "p1" / "CT" / "0001.dcm"
    for modality in ("SR", "RTSTRUCT", "SEG", "PR"):
        ds = pydicom.dcmread(source)
        ds.Modality = modality
        ds.save_as(tree / "site" / f"{modality}.dcm")
    index = find_scans(tree)
    assert len(index) == 5
    reasons = " ".join(s.reason for s in index.skipped)
    assert all(f"without a scan in it ({m})" in reasons for m in ("SR", "RTSTRUCT", "SEG", "PR"))
    assert not any(s.refused for s in index.skipped if s.path.endswith(".dcm"))


def test_missing_and_empty_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"find_scans: no folder .*point --data\.root"):
        find_scans(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ScanError, match=r"no NIfTI or DICOM under .* \(1 files looked at\); point --data\.root"):
        find_scans(tmp_path)
    with pytest.raises(ScanError, match="does not exist"):
        read_volume(tmp_path / "b.nii")


def test_unreadable_scan_alone_gives_its_reason(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(b"\0" * 500)
    with pytest.raises(ScanError, match=r"first reason: a\.nii"):
        find_scans(tmp_path)


def test_read_volume_of_a_mixed_folder_names_the_scans(tree: Path) -> None:
    with pytest.raises(ScanError, match=r"folder holds 5 scans \('nifti/a', .*use find_scans"):
        read_volume(tree)


def test_files_changed_after_indexing_are_noticed(tree: Path) -> None:
    scan = next(s for s in find_scans(tree).scans if s.name == "site/p1/CT")
    file = Path(scan.files[0])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ScanError, match="cut off"):
        scan.read()


def test_patient_identifiers_appear_nowhere(tmp_path: Path) -> None:
    write_dicom_series(tiny(0), tmp_path / "a", patient_id="JANE-DOE-77")
    (tmp_path / "a" / "0002.dcm").unlink()
    write_dicom_series(tiny(1), tmp_path / "b", patient_id="JANE-DOE-77")
    index = find_scans(tmp_path)
    volume = index.scans[0].read()
    assert "JANE" not in repr(index) + repr(volume.notes) + volume.source


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def index(cache: Path) -> ScanIndex:
    return sample_scans(cache)


class TestSamples:
    def test_bundled_and_synthetic_scans_are_there_and_readable(self, index: ScanIndex) -> None:
        names = {s.name for s in index.scans}
        assert {"nibabel/anatomical", "nibabel/example4d", "pydicom/CT_small", "pydicom/MR_small"} <= names
        assert {f"synthetic/phantom-{i}" for i in range(4)} <= names
        for scan in index.scans:
            assert scan.read().orientation == "RAS"

    def test_synthetic_scans_are_real_dicom_ct(self, index: ScanIndex) -> None:
        made = [s for s in index.scans if s.name.startswith("synthetic/")]
        assert {(s.kind, s.modality, s.shape) for s in made} == {("dicom", "CT", (64, 96, 96))}

    def test_second_call_writes_nothing(self, index: ScanIndex, cache: Path) -> None:
        before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
        assert sample_scans(cache) == index
        assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before

    def test_interrupted_writing_leaves_no_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(samples_module, "write_dicom_series", fail)
        with pytest.raises(KeyboardInterrupt):
            sample_scans(tmp_path)
        assert list(tmp_path.iterdir()) == []


@needs_shared
def test_shared_data_is_indexed_by_content() -> None:
    found = {folder: find_scans(SHARED / folder) for folder in ("ct", "dicom", "mr")}
    kinds = {folder: sorted((s.kind, s.modality) for s in index.scans) for folder, index in found.items()}
    assert kinds == {
        "ct": [("nifti", "unknown")] * 6,
        "dicom": [("dicom", "CT"), ("dicom", "MR")],
        "mr": [("nifti", "unknown")] * 8,
    }
    assert not any(s.refused for index in found.values() for s in index.skipped)


def why_refused(scan: Scan) -> str | None:
    try:
        scan.read()
    except ScanError as error:
        return str(error)
    return None


def test_pydicoms_own_test_files_raise_nothing(tmp_path: Path) -> None:
    root = Path(str(pydicom.__file__)).parent / "data" / "test_files"
    if not root.is_dir():
        pytest.skip("this pydicom ships no test files")
    index = find_scans(root, workers=0)
    names = {s.name for s in index.scans}
    assert {"CT_small", "dicomdirtests/98892001/CT5N"} <= names
    refused = [reason for scan in index.scans if (reason := why_refused(scan)) is not None]
    assert refused == []


def test_nibabels_own_test_files_agree_with_nibabel() -> None:
    root = Path(str(nib.__file__)).parent / "tests" / "data"
    if not root.is_dir():
        pytest.skip("this nibabel ships no test files")
    index = find_scans(root, workers=0)
    readable = [s for s in index.scans if "resampled_anat_moved" not in s.name]
    for scan in readable:
        volume = scan.read(canonical=False)
        theirs = nifti1.load(scan.files[0]) if "nifti2" not in scan.name else nifti2.load(scan.files[0])
        data = np.asarray(theirs.dataobj)
        data = data[..., 0] if data.ndim == 4 else data
        np.testing.assert_allclose(volume.voxels, data.T, rtol=1e-6)
        np.testing.assert_allclose(volume.affine, np.asarray(theirs.affine), atol=1e-5)
    assert len(readable) >= 5


def test_nibabels_file_with_nan_is_refused() -> None:
    path = Path(str(nib.__file__)).parent / "tests" / "data" / "resampled_anat_moved.nii"
    if not path.is_file():
        pytest.skip("this nibabel ships no resampled_anat_moved.nii")
    with pytest.raises(ScanError, match="153 of 1071 voxels are NaN or infinite"):
        read_volume(path)
