"""Data sets in the layouts downloads have: every label, split and patient right, from every root a user may give."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from medformer.commands import main
from medformer.data import ScanError
from medformer.data.datasets.joins import DataSetWarning, Records
from medformer.data.records import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN, patient_split
from tests import dataset_downloads as downloads
from tests.dataset_files import by, csv, scan

pytestmark = pytest.mark.filterwarnings("ignore::medformer.data.datasets.joins.DataSetWarning")


def quiet(name: str, root: Path) -> Records:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataSetWarning)
        found = scan(name, root)
    assert isinstance(found, Records)
    assert all(Path(path).is_file() for record in found for path in record.paths)
    return found


def labels(records: Records, finding: str) -> dict[str, str]:
    return {record.patient: record.labels[finding] for record in records}


class TestTcia:
    @pytest.mark.parametrize("style", ["classic", "descriptive"])
    def test_nlst_of_several_manifests_joins_the_delivered_tables(self, tmp_path: Path, style: str) -> None:
        records = quiet("nlst", downloads.nlst_nbia(tmp_path / "lung", style))
        assert labels(records, "lung cancer") == {"100002": POSITIVE, "100012": NEGATIVE, "199999": UNKNOWN}
        assert labels(records, "screen") == {"100002": POSITIVE, "100012": POSITIVE, "199999": UNKNOWN}
        assert by(records, lambda r: r.patient)["100002"].info["abnormalities"][0]["sct_slice_num"] == "87"
        notes = "\n".join(records.notes)
        assert "persons: 2 of 3 persons here are in nlst_780_prsn_idc_20210527.csv, which lists 2" in notes
        assert "metadata.csv lists 4 series, of which 1 are not here" in notes

    def test_nlst_below_a_manifest_finds_the_tables_around_it(self, tmp_path: Path) -> None:
        root = downloads.nlst_nbia(tmp_path / "nlst")
        for given in (root, root / "manifest-1617826161202", root / "manifest-1617826161202" / "NLST", tmp_path):
            assert labels(quiet("nlst", given), "lung cancer")["100002"] == POSITIVE
        with pytest.raises(ScanError, match=r"'100002' is a part of it; give the whole, '.*NLST'"):
            scan("nlst", root / "manifest-1617826161202" / "NLST" / "100002")

    def test_nlst_of_idc_in_its_own_tree_and_in_folders_of_uuids(self, tmp_path: Path) -> None:
        downloads.idc_tree(tmp_path / "idc", "nlst", "100002", "1.3.6.9", 9, ClinicalTrialTimePointID="T0")
        csv(
            tmp_path / "idc" / "nlst_prsn.csv",
            "dicom_patient_id,source_batch,pid,cancyr,scr_res0",
            "100002,0,100002,1,4",
        )
        assert labels(quiet("nlst", tmp_path / "idc"), "lung cancer") == {"100002": POSITIVE}
        rows = [("nlst", "100002", "1.3.6.1"), ("lidc_idri", "LIDC-IDRI-0001", "1.3.6.2"), ("nlst", "7", "1.3.6.3")]
        flat = downloads.idc_flat(tmp_path / "flat", rows)
        downloads.nlst_tables(flat / "nlst_tables")
        records = quiet("nlst", flat)
        assert labels(records, "lung cancer") == {"100002": POSITIVE, "7": UNKNOWN}
        assert any("1 series of another collection" in note for note in records.notes)
        assert [r.patient for r in quiet("lidc_idri", flat)] == ["LIDC-IDRI-0001"]

    def test_nlst_with_the_table_of_cancers_alone_calls_nobody_negative(self, tmp_path: Path) -> None:
        root = downloads.nlst_nbia(tmp_path / "nlst")
        (root / "nlst.780.idc.delivery.052821" / "nlst_780_prsn_idc_20210527.csv").unlink()
        assert labels(quiet("nlst", root), "lung cancer") == {"100002": POSITIVE, "100012": UNKNOWN, "199999": UNKNOWN}

    def test_lidc_annotations_lie_beside_the_manifest_or_among_the_slices(self, tmp_path: Path) -> None:
        root = downloads.lidc_nbia(tmp_path / "lidc")
        for given in (root, root / "manifest-1600709154662" / "LIDC-IDRI", tmp_path):
            records = quiet("lidc_idri", given)
            assert labels(records, "nodule") == {"LIDC-IDRI-0001": POSITIVE, "LIDC-IDRI-0002": UNKNOWN}
            assert "annotations: 1 of 2 series here are in 158.xml, which lists 1" in records.notes[0]
        assert labels(quiet("lidc_idri", downloads.lidc_old_nbia(tmp_path / "old")), "nodule") == {
            "LIDC-IDRI-0001": NEGATIVE
        }

    def test_lidc_names_the_packed_annotations(self, tmp_path: Path) -> None:
        root = downloads.lidc_nbia(tmp_path / "lidc")
        shutil.rmtree(root / "LIDC-XML-only")
        (root / "LIDC-XML-only.zip").write_bytes(b"PK")
        with pytest.warns(DataSetWarning, match=r"LIDC-XML-only\.zip is here and not unpacked"):
            assert set(labels(quiet_not("lidc_idri", root), "nodule").values()) == {UNKNOWN}

    @pytest.mark.parametrize("table", ["xlsx", "csv"])
    def test_cmmd_reads_the_workbook_and_its_copy_with_semicolons(self, tmp_path: Path, table: str) -> None:
        records = quiet("cmmd", downloads.cmmd_nbia(tmp_path / "mammo", table))
        sides = {r.info["side"]: r.labels["malignant"] for r in records}
        assert sides == {"L": POSITIVE, "R": UNKNOWN}
        assert by(records, lambda r: r.info["side"])["L"].info["age"] == "44"

    def test_prostate_workbooks_under_their_older_names(self, tmp_path: Path) -> None:
        records = by(
            quiet("prostate_mri_us_biopsy", downloads.prostate_wiki(tmp_path / "RP")), lambda r: r.patient[-4:]
        )
        states = {patient: record.labels["cancer"] for patient, record in records.items()}
        assert states == {"0001": POSITIVE, "0002": NEGATIVE, "0003": UNKNOWN}
        assert records["0001"].info["target_scores"] == ["5"]
        assert set(records["0001"].info["surfaces"]) == {"ProstateSurface"}

    def test_victre_says_that_its_lesions_are_in_no_table(self, tmp_path: Path) -> None:
        records = quiet("victre", downloads.victre_nbia(tmp_path / "sim"))
        assert [(r.patient, r.labels) for r in records] == [("115301", {"lesion": UNKNOWN})]
        assert any("no table of lesions is documented: all 1 are unknown" in note for note in records.notes)


def quiet_not(name: str, root: Path) -> Records:
    found = scan(name, root)
    assert isinstance(found, Records)
    return found


class TestKaggle:
    def test_rsna_one_folder_deeper(self, tmp_path: Path) -> None:
        root = downloads.rsna_kaggle(tmp_path)
        for given in (root, root / "rsna-intracranial-hemorrhage-detection"):
            records = by(quiet("rsna_ich", given), lambda r: r.split)
            assert records["train"].labels["epidural"] == POSITIVE
            assert records["train"].labels["subdural"] == NEGATIVE
            assert set(records["test"].labels.values()) == {UNKNOWN}
        inside = root / "rsna-intracranial-hemorrhage-detection" / "rsna-intracranial-hemorrhage-detection"
        with pytest.raises(ScanError, match=r"'stage_2_train' is a part of it; give the whole"):
            scan("rsna_ich", inside / "stage_2_train")

    def test_rsna_takes_the_second_stage_of_two(self, tmp_path: Path) -> None:
        home = downloads.rsna_kaggle(tmp_path) / ("rsna-intracranial-hemorrhage-detection/" * 2)
        shutil.copytree(home / "stage_2_train", home / "stage_1_train_images")
        records = quiet("rsna_ich", home)
        assert len(records) == 2
        assert any("stage_1_train_images is left out" in note for note in records.notes)

    def test_siim_below_input(self, tmp_path: Path) -> None:
        root = downloads.siim_kaggle(tmp_path)
        for given in (root, root / "siim-covid19-detection"):
            records = by(quiet("siim_covid19", given), lambda r: r.split)
            assert records["train"].labels["Typical Appearance"] == POSITIVE
            assert records["train"].labels["Atypical Appearance"] == NEGATIVE
            assert len(records["train"].boxes or ()) == 1
            assert records["test"].patient == "00188a671292"
            assert (records["test"].boxes, set(records["test"].labels.values())) == (None, {UNKNOWN})

    def test_mrnet_of_a_copy_with_headers_and_stripped_names(self, tmp_path: Path) -> None:
        records = quiet("mrnet", downloads.mrnet_copy(tmp_path))
        assert {(r.patient, r.split, r.labels["abnormal"], r.labels["acl"]) for r in records} == {
            ("0007", "train", POSITIVE, NEGATIVE), ("1130", "valid", POSITIVE, NEGATIVE),
        }  # fmt: skip
        assert len(records) == 6
        with pytest.raises(ScanError, match=r"'train' is a part of it"):
            scan("mrnet", tmp_path / "archive" / "MRNet-v1.0" / "train")


def test_covid_ct_takes_the_parts_of_the_challenge_as_its_split(tmp_path: Path) -> None:
    records = by(quiet("ct_images_in_covid19", downloads.covid_challenge(tmp_path)), lambda r: r.patient)
    assert {patient: record.split for patient, record in records.items()} == {"0003": "train", "0013": "valid"}
    assert records["0003"].info["lesions"].endswith("0003_seg.nii.gz")
    assert records["0013"].info["lesions"] is None


def test_bimcv_reads_the_table_of_each_collection(tmp_path: Path) -> None:
    root = downloads.bimcv_both(tmp_path)
    for given in (root, tmp_path):
        records = by(quiet("bimcv_covid19", given), lambda r: (r.patient, r.study))
        assert records["S03047", "E07985"].labels == {"pneumonia": POSITIVE, "consolidation": UNCERTAIN}
        assert records["S330041", "E75051"].labels == {"normal": POSITIVE}
        assert records["S330041", "E9"].labels == {}
        sides = {r.patient: r.info["collection"] for r in records.values()}
        assert sides == {"S03047": "positive", "S330041": "negative"}
    alone = quiet("bimcv_covid19", root / "covid19_neg")
    assert {r.study: dict(r.labels) for r in alone} == {"E75051": {"normal": POSITIVE}, "E9": {}}
    assert any("labels: 1 of 2 sessions here are in Labels_covid_NEG_JAN21.tsv" in note for note in alone.notes)


class TestChexpert:
    def test_the_four_batches_are_one_data_set_from_any_of_their_roots(self, tmp_path: Path) -> None:
        root = downloads.chexpert_batches(tmp_path)
        for given in (
            root,
            tmp_path,
            root / "CheXpert-v1.0 batch 1 (validate & csv)",
            root / "CheXpert-v1.0 batch 3 (train 2)",
        ):
            records = quiet("chexpert", given)
            assert {r.patient: r.split for r in records} == {
                "patient00001": "train", "patient21514": "train", "patient43018": "train", "patient64541": "valid",
            }  # fmt: skip
            known = {
                tuple(r.labels[f] for f in ("No Finding", "Cardiomegaly", "Lung Opacity", "Edema")) for r in records
            }
            assert known == {(POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN)}
            assert not records.notes

    def test_images_that_are_not_here_are_counted(self, tmp_path: Path) -> None:
        root = downloads.chexpert_batches(tmp_path)
        shutil.rmtree(root / "CheXpert-v1.0 batch 4 (train 3)")
        assert any("1 of 4 files named in its tables are not here" in note for note in quiet("chexpert", root).notes)

    def test_the_test_set_of_chexlocalize(self, tmp_path: Path) -> None:
        records = quiet("chexpert", downloads.chexlocalize(tmp_path))
        assert {r.patient: (r.split, r.labels["No Finding"]) for r in records} == {
            "patient64541": ("valid", POSITIVE), "patient64741": ("test", POSITIVE),
        }  # fmt: skip

    def test_chexpert_plus_with_the_labels_of_the_impression(self, tmp_path: Path) -> None:
        records = quiet("chexpert", downloads.chexpert_plus(tmp_path))
        assert {r.patient: r.split for r in records} == {"patient42142": "train", "patient64541": "valid"}
        wanted = {
            "Edema": POSITIVE,
            "Pneumonia": UNCERTAIN,
            "Cardiomegaly": NEGATIVE,
            "Fracture": UNKNOWN,
            "Lung Lesion": UNKNOWN,
        }
        assert all({name: r.labels[name] for name in wanted} == wanted for r in records)
        assert all(r.paths[0].endswith(".png") for r in records)


class TestMimic:
    def test_dicom_takes_labels_and_split_of_the_sibling_tree(self, tmp_path: Path) -> None:
        files = downloads.mimic_wget(tmp_path)
        roots = (
            files,
            files.parent,
            files / "mimic-cxr",
            files / "mimic-cxr" / "2.1.0",
            files / "mimic-cxr" / "2.1.0" / "files",
        )
        for given in roots:
            record = by(quiet("mimic_cxr", given), lambda r: r.patient)["10000032"]
            assert (record.split, record.labels) == ("test", {"Atelectasis": POSITIVE, "Edema": UNKNOWN})
            assert record.paths[0].endswith(".dcm")
            assert record.info == {"view": "PA", "radiologists": {"Lung Opacity": POSITIVE, "Edema": NEGATIVE}}
        both = quiet("mimic_cxr", files)
        assert {r.patient: r.split for r in both} == {"10000032": "test", "11000011": "train"}
        assert {part: len(found) for part, found in patient_split(both, valid=0, test=0).items()} == {
            "train": 1, "valid": 0, "test": 1,
        }  # fmt: skip

    def test_a_lost_split_is_said(self, tmp_path: Path) -> None:
        files = downloads.mimic_wget(tmp_path)
        (files / "mimic-cxr-jpg" / "2.1.0" / "mimic-cxr-2.0.0-split.csv.gz").unlink()
        with pytest.warns(
            DataSetWarning, match=r"no table of official split: looked for mimic-cxr-2\.\*-split\.csv\.gz"
        ):
            scan("mimic_cxr", files)


def test_fastmri_of_four_organs(tmp_path: Path) -> None:
    records = by(quiet("fastmri", downloads.fastmri_releases(tmp_path)), lambda r: r.study)
    found = {name: (r.info["body_part"], r.split) for name, r in records.items()}
    assert found == {
        "file1000001": ("knee", "train"), "file1000007": ("knee", "valid"), "file1000022": ("knee", "test"),
        "file_brain_AXT2_200_2000001": ("brain", "train"), "file_brain_AXT1_201_6002717": ("brain", "valid"),
        "file_prostate_AXT2_001": ("prostate", "test"), "file_prostate_AXT2_002": ("prostate", None),
        "file_prostate_AXDIFF_001": ("prostate", "train"),
        "fastMRI_breast_001_1": ("breast", "train"), "fastMRI_breast_001_2": ("breast", "train"),
        "fastMRI_breast_002_1": ("breast", "train"), "fastMRI_breast_003_1": ("breast", "test"),
    }  # fmt: skip
    states = {name: next(iter(r.labels.values()), None) for name, r in records.items()}
    assert states["file_prostate_AXT2_001"] == POSITIVE
    assert states["file_prostate_AXT2_002"] == UNKNOWN
    assert states["file_prostate_AXDIFF_001"] == NEGATIVE
    assert records["file_prostate_AXT2_001"].info["slices"] == {1: 1, 2: 4}
    assert (states["fastMRI_breast_001_2"], states["fastMRI_breast_003_1"]) == (POSITIVE, NEGATIVE)
    women = {str(name)[-5:-2]: r.patient for name, r in records.items() if "breast" in str(name)}
    assert women["001"] == women["002"] != women["003"]  # one woman, scanned again


EMPTIED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "nlst": (downloads.nlst_nbia, "*.csv", r"no table of persons: looked for nlst\*prsn\.csv.* 3 persons have none"),
    "cmmd": (downloads.cmmd_nbia, "*.xlsx", r"no table of malignancy: looked for CMMD\*clinical\*data\*\.xlsx"),
    "prostate_mri_us_biopsy": (
        downloads.prostate_wiki,
        "*.xlsx",
        r"no table of biopsy cores: looked for \*biopsy\*data",
    ),
    "lidc_idri": (downloads.lidc_nbia, "*.xml", r"no table of annotations: looked for \*\.xml"),
    "rsna_ich": (downloads.rsna_kaggle, "*.csv", "no table of labels of the train part: looked for stage_2_train.csv"),
    "mrnet": (downloads.mrnet_copy, "*.csv", "no table of acl of the valid part: looked for valid-acl.csv"),
    "siim_covid19": (downloads.siim_kaggle, "*.csv", "no table of classes: looked for train_study_level.csv"),
    "bimcv_covid19": (downloads.bimcv_both, "*.tsv", r"no table of labels: looked for labels_\*\.tsv"),
    "chexpert": (downloads.chexpert_batches, "*.csv", r"no table of labels of the train part: looked for train\.csv"),
    "mimic_cxr": (
        downloads.mimic_wget,
        "*.csv.gz",
        r"no table of labels: looked for mimic-cxr-2\.\*-chexpert\.csv\.gz",
    ),
    "fastmri": (
        downloads.fastmri_releases,
        "*.csv",
        r"no table of PI-RADS of T2: looked for t2_slice_level_labels\.csv",
    ),
}


@pytest.mark.parametrize("name", EMPTIED)
def test_a_set_without_its_tables_says_which_it_looked_for_and_how_many_have_none(name: str, tmp_path: Path) -> None:
    make, pattern, message = EMPTIED[name]
    # By its name: nothing else tells a folder of DICOM files from another.
    root = make(tmp_path / name)
    for path in tmp_path.rglob(pattern):
        path.unlink()
    with pytest.warns(DataSetWarning, match=message):
        records = scan(name, root)
    assert {state for r in records for state in r.labels.values()} <= {UNKNOWN} | ({POSITIVE, NEGATIVE} & _breast(name))


def _breast(name: str) -> set[str]:
    return {POSITIVE, NEGATIVE} if name == "fastmri" else set()  # its breasts have a workbook


def test_a_table_that_joins_nothing_is_said_with_both_counts(tmp_path: Path) -> None:
    root = downloads.nlst_nbia(tmp_path / "nlst")
    table = root / "nlst.780.idc.delivery.052821" / "nlst_780_prsn_idc_20210527.csv"
    table.write_text(table.read_text().replace("100002", "500002").replace("100012", "500012"))
    with pytest.warns(DataSetWarning, match=r"20210527\.csv lists 2 persons and none of the 3 of the images here"):
        scan("nlst", root)


def test_doctor_and_inspect_show_labels_splits_and_what_did_not_join(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = downloads.nlst_nbia(tmp_path / "nlst")
    assert main(["doctor", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "here     NLST: 3 records of 3 patients (3 no official split)" in out
    assert "labels: 2 records have some, 1 none" in out
    assert "lung cancer: 1 negative, 1 positive, 1 unknown" in out
    assert "note: persons: 2 of 3 persons here are in nlst_780_prsn_idc_20210527.csv" in out
    main(["inspect", str(root)])
    assert "labels: 2 records have some, 1 none" in capsys.readouterr().out
