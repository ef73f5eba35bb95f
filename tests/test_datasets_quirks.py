"""Data sets: the labels kept apart, and the quirks each is known for."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import FileDataset

from medformer.data import ScanError
from medformer.data.datasets import bimcv_covid19, chexpert, lidc_idri, rsna_ich
from medformer.data.records import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN, Record
from tests.dataset_files import (
    by,
    csv,
    make_bimcv,
    make_chexpert,
    make_cmmd,
    make_covid_ct,
    make_fastmri,
    make_lidc,
    make_medmnist,
    make_mimic,
    make_mrnet,
    make_nlst,
    make_prostate,
    make_rsna,
    make_siim,
    make_victre,
    scan,
)  # fmt: skip
from tests.dicom_files import write_slice

pytestmark = pytest.mark.filterwarnings("ignore::medformer.data.datasets.joins.DataSetWarning")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


class TestFastMri:
    def test_boxes_are_turned_from_the_flipped_pictures(self, root: Path) -> None:
        make_fastmri(root)
        records = by(scan("fastmri", root), lambda r: r.patient)
        assert records["file1"].boxes is not None
        (box,) = records["file1"].boxes
        assert (box.x, box.y, box.width, box.height, box.slice) == (2, 20 - 3 - 5, 4, 5, 1)

    def test_looked_at_and_normal_is_not_the_same_as_never_looked_at(self, root: Path) -> None:
        make_fastmri(root)
        records = by(scan("fastmri", root), lambda r: r.patient)
        assert records["file2"].boxes == ()
        assert records["file3"].boxes is None
        assert records["file1"].labels == {"Meniscus Tear": POSITIVE, "Artifact": POSITIVE}

    def test_parts_are_the_official_split(self, root: Path) -> None:
        make_fastmri(root)
        splits = {r.patient: r.split for r in scan("fastmri", root)}
        assert splits == {
            "file1": "train",
            "file2": "train",
            "file3": "train",
            "file4": "valid",
            "file_brain_9": "test",
        }


class TestNlst:
    def test_tables_join_on_person_and_year(self, root: Path) -> None:
        make_nlst(root)
        records = by(scan("nlst", root), lambda r: (r.patient, r.info["year"]))
        assert records["100", "0"].labels == {"lung cancer": POSITIVE, "screen": POSITIVE}
        assert records["100", "1"].labels["screen"] == NEGATIVE  # the study date of 2000 is the second year
        assert records["100", "0"].info["abnormalities"] == [{"sct_ab_desc": "51", "sct_slice_num": "7"}]
        assert records["101", "0"].labels["lung cancer"] == NEGATIVE
        assert records["999", ""].labels == {"lung cancer": UNKNOWN, "screen": UNKNOWN}

    def test_series_below_8_slices_are_left_out(self, root: Path) -> None:
        make_nlst(root)
        assert sorted(len(r.paths) for r in scan("nlst", root)) == [9, 9, 9, 9]


class TestBreast:
    def test_cmmd_labels_belong_to_one_side(self, root: Path) -> None:
        make_cmmd(root)
        records = by(scan("cmmd", root), lambda r: (r.patient, r.info["side"]))
        assert {k: r.labels["malignant"] for k, r in records.items()} == {
            ("D1-0001", "L"): POSITIVE, ("D1-0001", "R"): UNKNOWN, ("D2-0002", "R"): NEGATIVE,
        }  # fmt: skip
        assert records["D2-0002", "R"].info["subtype"] == "Luminal A"
        assert records["D1-0001", "L"].info["view"] == "CC"
        assert records["D1-0001", "L"].read().shape == (1, 40, 30)

    def test_victre_has_pictures_and_stacks_and_no_guessed_label(self, root: Path) -> None:
        make_victre(root)
        records = by(scan("victre", root), lambda r: r.info["kind"])
        assert set(records) == {"mammogram", "tomosynthesis"}
        assert records["tomosynthesis"].read().shape == (3, 40, 30)
        assert {r.labels["lesion"] for r in records.values()} == {UNKNOWN}


class TestProstate:
    def test_no_core_is_unknown_and_benign_cores_are_negative(self, root: Path) -> None:
        make_prostate(root)
        records = by(scan("prostate_mri_us_biopsy", root), lambda r: r.patient[-4:])
        assert [records[k].labels["cancer"] for k in ("0001", "0002", "0003")] == [POSITIVE, NEGATIVE, UNKNOWN]
        assert records["0001"].info["highest_gleason"] == 7
        assert set(records["0001"].info["surfaces"]) == {"Target1", "ProstateSurface"}
        assert records["0001"].info["target_scores"] == ["4"]


class TestLidc:
    def test_readers_are_matched_and_ratings_kept_apart(self, root: Path) -> None:
        make_lidc(root)
        records = by(scan("lidc_idri", root), lambda r: r.patient)
        states = [records[f"LIDC-IDRI-000{i}"].labels for i in range(1, 5)]
        assert [s["malignancy"] for s in states] == [POSITIVE, UNCERTAIN, NEGATIVE, UNKNOWN]
        assert [s["nodule"] for s in states] == [POSITIVE, POSITIVE, NEGATIVE, UNKNOWN]
        groups = records["LIDC-IDRI-0001"].info["nodules"]
        assert sorted(sorted(n.reader for n in g) for g in groups) == [[0], [0, 1]]

    def test_the_outline_itself_is_outside(self, root: Path) -> None:
        make_lidc(root)
        _, nodules = lidc_idri.read_annotations(root / "tcia-lidc-xml" / "2.xml")
        (mask,) = lidc_idri.mask_of(nodules[0].outlines, 30, 30).values()
        expected = np.zeros((30, 30), bool)
        expected[6:11, 6:11] = True  # the ring runs from 5 to 11
        np.testing.assert_array_equal(mask, expected)

    def test_a_hole_is_cut_out(self) -> None:
        square = lambda a, b: tuple((x, y) for x in range(a, b + 1) for y in range(a, b + 1) if {x, y} & {a, b})  # noqa: E731
        ring = sorted(square(2, 14), key=lambda p: np.arctan2(p[1] - 8, p[0] - 8))
        hole = sorted(square(6, 10), key=lambda p: np.arctan2(p[1] - 8, p[0] - 8))
        outlines = (lidc_idri.Outline(0.0, "", True, tuple(ring)), lidc_idri.Outline(0.0, "", False, tuple(hole)))
        mask = lidc_idri.mask_of(outlines, 20, 20)[0.0]
        assert mask.sum() == 11 * 11 - 5 * 5


class TestCovidCt:
    def test_later_scans_belong_to_the_same_patient(self, root: Path) -> None:
        make_covid_ct(root)
        records = scan("ct_images_in_covid19", root)
        assert sorted(r.patient for r in records) == ["0269", "0318", "0318", "0721", "0721"]
        assert {r.info["day"] for r in records} == {None, 0, 8}


class TestRsna:
    def test_loose_slices_become_series_and_four_repeated_rows_do_not_matter(self, root: Path) -> None:
        make_rsna(root)
        records = by(scan("rsna_ich", root), lambda r: r.split)
        assert len(records["train"].paths) == 3
        assert records["train"].labels["subdural"] == POSITIVE
        assert records["train"].labels["epidural"] == NEGATIVE
        assert records["train"].info["slices"]["ID_000000000"]["any"] == NEGATIVE
        assert set(records["test"].labels.values()) == {UNKNOWN}

    def test_rows_that_contradict_are_refused(self, tmp_path: Path) -> None:
        table = csv(tmp_path / "t.csv", "ID,Label", "ID_1_any,0", "ID_1_any,1")
        with pytest.raises(ScanError, match="both 0 and 1"):
            rsna_ich.read_labels(table)

    def test_wrapped_12_bit_air_comes_back_to_minus_1000(self, tmp_path: Path) -> None:
        true = np.array([[-1000, -500, 0, 40, 80], [1000, 2000, 3000, -990, 5]] * 3, np.int16)

        def edit(_: int, ds: FileDataset) -> None:
            ds.RescaleIntercept, ds.PixelData = 1, ((true % 4096).astype(np.uint16)).tobytes()

        write_slice(tmp_path / "a.dcm", 0, np.zeros(3), edit=edit)
        record = Record(dataset="rsna_ich", patient="p", study="s", paths=(str(tmp_path / "a.dcm"),), modality="CT")
        np.testing.assert_array_equal(record.read(canonical=False).voxels[0], true)

    def test_sound_files_are_left_alone(self, tmp_path: Path) -> None:
        write_slice(tmp_path / "a.dcm", 0, np.zeros(3))
        record = Record(dataset="rsna_ich", patient="p", study="s", paths=(str(tmp_path / "a.dcm"),), modality="CT")
        assert "unwrapped" not in " ".join(record.read().notes)


class TestMrnet:
    def test_names_keep_their_zeros_and_unlisted_findings_are_unknown(self, root: Path) -> None:
        make_mrnet(root)
        records = by(scan("mrnet", root), lambda r: (r.patient, r.info["plane"]))
        assert records["0000", "axial"].labels == {"abnormal": POSITIVE, "acl": NEGATIVE, "meniscus": UNKNOWN}
        assert records["1130", "axial"].split == "valid"
        assert records["0000", "coronal"].read().shape == (6, 8, 8)


class TestSiim:
    @pytest.mark.parametrize("flat", [False, True])
    def test_nested_and_flat_trees_give_the_same(self, root: Path, flat: bool) -> None:
        make_siim(root)
        if flat:
            for path in [*root.glob("*/*/series/*.dcm")]:
                path.rename(path.parents[2] / path.name)
        records = by(scan("siim_covid19", root), lambda r: Path(r.paths[0]).stem)
        assert [b.width for b in records["i1"].boxes or ()] == [3]
        assert records["i1"].labels["Typical Appearance"] == POSITIVE
        assert records["i9"].labels["Typical Appearance"] == UNKNOWN
        assert {k: r.split for k, r in records.items()} == {"i1": "train", "i2": "train", "i3": "train", "i9": "test"}

    def test_an_unboxed_sibling_is_unknown_and_a_lone_none_is_empty(self, root: Path) -> None:
        make_siim(root)
        records = by(scan("siim_covid19", root), lambda r: Path(r.paths[0]).stem)
        assert records["i2"].boxes is None
        assert records["i3"].boxes == ()

    def test_a_cell_that_calls_something_is_refused(self, root: Path) -> None:
        make_siim(root)
        csv(
            root / "train_image_level.csv", "id,boxes,label,StudyInstanceUID", "i1_image,__import__('os').getcwd(),x,s1"
        )
        with pytest.raises(ScanError, match="no list or dictionary"):
            scan("siim_covid19", root)


class TestBimcv:
    def test_monochrome1_is_known_from_the_sidecar_only(self, root: Path) -> None:
        make_bimcv(root)
        records = by(scan("bimcv_covid19", root), lambda r: Path(r.paths[0]).name)
        values = np.arange(48, dtype=np.uint16).reshape(6, 8) * 80
        inverted = records["sub-S03113_ses-E06208_run-1_bp-chest_vp-ap_cr.png"]
        np.testing.assert_array_equal(inverted.read().voxels[0], 4095 - values)
        plain = records["sub-S03113_ses-E06208_run-2_bp-chest_cr.png"]  # its sidecar is broken
        np.testing.assert_array_equal(plain.read().voxels[0], values)
        assert (inverted.info["view"], plain.info["view"]) == ("ap", "")

    def test_cts_beyond_int16_are_read_whole(self, root: Path) -> None:
        make_bimcv(root)
        (record,) = [r for r in scan("bimcv_covid19", root) if r.modality == "CT"]
        assert record.read().voxels.max() == 70000

    def test_labels_are_lists_in_cells(self, root: Path) -> None:
        make_bimcv(root)
        labels = next(r.labels for r in scan("bimcv_covid19", root) if r.patient == "S03113")
        assert labels == {"pneumonia": POSITIVE, "consolidation": UNCERTAIN}
        table = csv(root / "participants.tsv", "participant\tage\tgender", "sub-S1\t[80]\tM", "sub-S2\t\tF")
        assert bimcv_covid19.read_people(table) == {"S1": {"age": 80, "sex": "M"}, "S2": {"age": None, "sex": "F"}}


class TestChexpert:
    def test_blank_is_unknown_and_minus_one_uncertain(self, root: Path) -> None:
        make_chexpert(root)
        records = by(scan("chexpert", root), lambda r: r.patient)
        labels = list(records["patient00001"].labels.values())
        assert labels[:5] == [POSITIVE, UNKNOWN, NEGATIVE, UNCERTAIN, UNKNOWN]
        assert Path(records["patient00001"].paths[0]).is_file()  # whatever root the table was made for
        assert records["patient64541"].split == "valid"

    def test_policies_are_named(self) -> None:
        labels = {"a": POSITIVE, "b": NEGATIVE, "c": UNCERTAIN, "d": UNKNOWN}
        assert list(chexpert.as_targets(labels, "ignore").values()) == [1, 0, None, None]
        assert list(chexpert.as_targets(labels, "one", "zero").values()) == [1, 0, 1, 0]

    def test_a_path_out_of_the_root_is_refused(self, root: Path) -> None:
        make_chexpert(root)
        header = "Path," + ",".join(chexpert.FINDINGS)
        csv(root / "train.csv", header, "../../../../etc/passwd" + "," * 14)
        with pytest.raises(ScanError, match=r"not \.\.\./patient/study/view"):
            scan("chexpert", root)


class TestMimic:
    def test_labels_of_a_study_go_to_each_of_its_images_once(self, root: Path) -> None:
        make_mimic(root)
        records = by(scan("mimic_cxr", root), lambda r: Path(r.paths[0]).stem)
        assert records["aaa"].labels == records["bbb"].labels == {"Edema": UNCERTAIN, "Pneumonia": POSITIVE}
        assert records["ccc"].labels == {"Edema": UNKNOWN, "Pneumonia": UNKNOWN}
        assert records["aaa"].info["view"] == "PA"

    def test_of_two_versions_of_an_image_dicom_is_taken(self, root: Path) -> None:
        make_mimic(root)
        assert [r.paths[0][-3:] for r in scan("mimic_cxr", root)] == ["dcm", "jpg", "jpg"]


class TestMedmnist:
    def test_records_are_places_in_arrays(self, root: Path) -> None:
        make_medmnist(root)
        records = scan("medmnist", root)
        assert [(r.split, r.labels["label"]) for r in records] == [
            ("train", "0"),
            ("train", "1"),
            ("train", "1"),
            ("valid", "0"),
        ]
        np.testing.assert_array_equal(records[1].read().voxels, np.load(root / "x3d.npz")["train_images"][1])

    def test_pickles_are_never_opened(self, root: Path) -> None:
        make_medmnist(root)
        np.savez(root / "bad.npz", train_images=np.array([{}], dtype=object), train_labels=np.array([{}], dtype=object))
        assert len(scan("medmnist", root)) == 4


class TestFolder:
    def test_folders_name_patients_and_splits_and_a_table_labels(self, root: Path) -> None:
        for name in ("train/p1/a.nii", "train/p1/b.nii", "val/p2/c.nii", "d.nii"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), root / name)
        csv(root / "labels.csv", "name,finding,patient", "train/p1/a.nii,yes,", "d,no,p9")
        records = by(scan("folder", root), lambda r: Path(r.paths[0]).stem)
        assert {k: (r.patient, r.split) for k, r in records.items()} == {
            "a": ("p1", "train"), "b": ("p1", "train"), "c": ("p2", "valid"), "d": ("p9", None),
        }  # fmt: skip
        assert records["a"].labels == {"finding": "yes"}
        assert records["b"].labels == {}
