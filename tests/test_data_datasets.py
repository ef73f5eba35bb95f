"""Data sets: layouts made here, the labels kept apart, the quirks each is known for."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset

from medformer.data import ScanError, Volume
from medformer.data.__main__ import main
from medformer.data.datasets import (
    DATASETS,
    adapter,
    bimcv_covid19,
    chexpert,
    lidc_idri,
    rsna_ich,
    siim_covid19,
)
from medformer.data.records import (
    NEGATIVE,
    POSITIVE,
    UNCERTAIN,
    UNKNOWN,
    Record,
    data_root,
    find_file,
    hash_patient,
    patient_split,
    state_of,
)  # fmt: skip
from medformer.data.tables import parse_literal, read_sheet, read_table
from tests.dicom_files import write_series, write_slice
from tests.test_data_planar import breast, write_image


def csv(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def sheet(path: Path, rows: list[list[object]]) -> Path:
    """A small .xlsx: text shared, numbers as they are."""
    texts: list[str] = []

    def cell(column: int, row: int, value: object) -> str:
        name = f"{chr(65 + column)}{row}"
        if isinstance(value, str):
            texts.append(value)
            return f'<c r="{name}" t="s"><v>{len(texts) - 1}</v></c>'
        return "" if value is None else f'<c r="{name}"><v>{value}</v></c>'

    body = "".join(
        f'<row r="{r}">{"".join(cell(c, r, v) for c, v in enumerate(row))}</row>' for r, row in enumerate(rows, 1)
    )
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{body}</sheetData></worksheet>")
        shared = "".join(f"<si><t>{text}</t></si>" for text in texts)
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")
    return path


def ct(folder: Path, patient: str, uid: str, slices: int = 3, **tags: object) -> list[Path]:
    def edit(_: int, ds: FileDataset) -> None:
        ds.PatientID, ds.SeriesInstanceUID, ds.StudyInstanceUID = patient, uid, f"{uid}.1"
        for name, value in tags.items():
            setattr(ds, name, value)

    return write_series(folder, np.arange(slices) * 2.0, edit=edit)


def scan(name: str, root: Path) -> list[Record]:
    return adapter(name).scan(root)


def make_fastmri(root: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for part, names in {
        "singlecoil_train": ["file1", "file2", "file3"],
        "singlecoil_val": ["file4"],
        "multicoil_test": ["file_brain_9"],
    }.items():
        (root / part).mkdir(parents=True)
        for name in names:
            with h5py.File(root / part / f"{name}.h5", "w") as file:
                file["reconstruction_esc"] = np.random.default_rng(0).random((2, 20, 10)).astype(np.float32)
    csv(root / "Annotations" / "knee_file_list.csv", "file1", "file2")
    csv(
        root / "Annotations" / "knee.csv", "file,slice,study_level,x,y,width,height,label",
        "file1,1,No,2,3,4,5,Meniscus Tear", "file1,,Yes,,,,,Artifact",
    )  # fmt: skip


def make_nlst(root: Path) -> None:
    csv(root / "nlst_prsn.csv", "pid,cancyr,scr_res0,scr_res1", "100,1,4,1", "101,,2,")
    csv(root / "nlst_ctab.csv", "pid,study_yr,sct_ab_desc,sct_slice_num", "100,0,51,7")
    ct(root / "a", "100", "1.1", 9, ClinicalTrialTimePointID="T0")
    ct(root / "b", "100", "1.2", 9, StudyDate="20000102")
    ct(root / "c", "101", "1.3", 9, ClinicalTrialTimePointID="T0")
    ct(root / "d", "101", "1.4", 3, ClinicalTrialTimePointID="T0")
    ct(root / "e", "999", "1.5", 9)


def mammogram(path: Path, patient: str, side: str, uid: str) -> None:
    def edit(_: int, ds: FileDataset) -> None:
        ds.PatientID, ds.ImageLaterality, ds.ViewPosition, ds.SeriesInstanceUID = patient, side, "CC", uid

    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, breast("left"), "MG", edit)


def make_cmmd(root: Path) -> None:
    for i, (patient, side) in enumerate([("D1-0001", "L"), ("D1-0001", "R"), ("D2-0002", "R")]):
        mammogram(root / "CMMD" / patient / f"{i}" / "1-1.dcm", patient, side, f"1.{i}")
    sheet(
        root / "CMMD_clinicaldata_revision.xlsx",
        [
            ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"],
            ["D1-0001", "L", 44, 2, "mass", "Malignant", None],
            ["D2-0002", "R", 61, 2, "calcification", "Benign", "Luminal A"],
        ],
    )


def make_victre(root: Path) -> None:
    mammogram(root / "VICTRE" / "1" / "1-1.dcm", "phantom1", "L", "1.1")

    def stack(_: int, ds: FileDataset) -> None:
        ds.PatientID, ds.NumberOfFrames, ds.SeriesInstanceUID = "phantom1", 3, "1.2"

    (root / "VICTRE" / "2").mkdir()
    write_image(root / "VICTRE" / "2" / "1-1.dcm", np.stack([breast("left")] * 3), "MG", stack)


def make_prostate(root: Path) -> None:
    ct(root / "p1", "Prostate-MRI-US-Biopsy-0001", "1.2.1", Modality="MR")
    ct(root / "p2", "Prostate-MRI-US-Biopsy-0002", "1.2.2", Modality="MR")
    ct(root / "p3", "Prostate-MRI-US-Biopsy-0003", "1.2.3", Modality="MR")
    header = ["Patient Number", "Series Instance UID (MRI)", "Primary Gleason", "Secondary Gleason"]
    sheet(
        root / "TCIA-Biopsy-Data_2020-07-14.xlsx",
        [header, [1, "1.2.1", 3, 4], [1, "1.2.1", None, None], [2, "1.2.2", None, None]],
    )
    sheet(root / "Target-Data_2019-12-05.xlsx", [["seriesInstanceUID_MR", "UCLA Score"], ["1.2.1", 4]])
    for what in ("Target1", "ProstateSurface"):
        (root / f"Prostate-MRI-US-Biopsy-0001-{what}-seriesUID-1.2.1.STL").write_bytes(b"solid")


def annotation(uid: str, readers: list[list[tuple[int, int, int]]]) -> str:
    """Each reader outlines squares (x, y, malignancy) of 6 pixels around."""
    sessions = ""
    for reader in readers:
        nodules = ""
        for x, y, malignancy in reader:
            ring = [(x + i, y) for i in range(7)] + [(x + 6, y + i) for i in range(1, 7)]
            ring += [(x + 6 - i, y + 6) for i in range(1, 7)] + [(x, y + 6 - i) for i in range(1, 7)]
            points = "".join(f"<edgeMap><xCoord>{a}</xCoord><yCoord>{b}</yCoord></edgeMap>" for a, b in ring)
            place = "<imageZposition>-28.0</imageZposition><imageSOP_UID>1</imageSOP_UID>"
            roi = f"<roi>{place}<inclusion>TRUE</inclusion>{points}</roi>"
            rated = f"<characteristics><malignancy>{malignancy}</malignancy></characteristics>"
            nodules += f"<unblindedReadNodule><noduleID>n</noduleID>{rated}{roi}</unblindedReadNodule>"
        sessions += f"<readingSession>{nodules}</readingSession>"
    head = f"<ResponseHeader><SeriesInstanceUid>{uid}</SeriesInstanceUid></ResponseHeader>"
    return f'<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov">{head}{sessions}</LidcReadMessage>'


def make_lidc(root: Path) -> None:
    for i in range(1, 5):
        ct(root / f"LIDC-IDRI-000{i}", f"LIDC-IDRI-000{i}", f"1.3.{i}")
    csv(root / "tcia-lidc-xml" / "1.xml", annotation("1.3.1", [[(5, 5, 5), (40, 40, 2)], [(7, 6, 4)], [], []]))
    csv(root / "tcia-lidc-xml" / "2.xml", annotation("1.3.2", [[(5, 5, 3)], [], [], []]))
    csv(root / "tcia-lidc-xml" / "3.xml", annotation("1.3.3", [[], [], [], []]))


def make_covid_ct(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in ("0269", "0721_day000", "0721_day008", "0318", "0318_1"):
        nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), root / f"volume-covid19-A-{name}.nii.gz")


def make_rsna(root: Path) -> None:
    for i, path in enumerate(ct(root / "stage_2_train", "ID_p", "1.4.1")):
        path.rename(path.with_name(f"ID_{i:09d}.dcm"))
    for i, path in enumerate(ct(root / "stage_2_test", "ID_q", "1.4.2")):
        path.rename(path.with_name(f"ID_{i + 50:09d}.dcm"))
    rows = [
        f"ID_{i:09d}_{kind},{int(i == 1 and kind in ('any', 'subdural'))}"
        for i in (0, 1, 2, 2)
        for kind in rsna_ich.KINDS
    ]
    csv(root / "stage_2_train.csv", "ID,Label", *rows)


def make_mrnet(root: Path) -> None:
    for part, plane, exam, depth in [
        ("train", "axial", "0000", 4),
        ("train", "coronal", "0000", 6),
        ("valid", "axial", "1130", 5),
    ]:
        (root / part / plane).mkdir(parents=True, exist_ok=True)
        np.save(root / part / plane / f"{exam}.npy", np.zeros((depth, 8, 8), np.uint8))
    csv(root / "train-abnormal.csv", "0000,1")
    csv(root / "train-acl.csv", "0000,0")
    csv(root / "valid-abnormal.csv", "1130,0")


def make_siim(root: Path) -> None:
    for part, study, name in [
        ("train", "s1", "i1"),
        ("train", "s1", "i2"),
        ("train", "s2", "i3"),
        ("test", "s9", "i9"),
    ]:
        path = root / part / study / "series" / f"{name}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, np.arange(30, dtype=np.uint16).reshape(6, 5))
    csv(
        root / "train_image_level.csv", "id,boxes,label,StudyInstanceUID",
        "i1_image,\"[{'x': 1.5, 'y': 2, 'width': 3, 'height': 4}]\",opacity 1 1.5 2 4.5 6,s1",
        "i2_image,,none 1 0 0 1 1,s1", "i3_image,,none 1 0 0 1 1,s2",
    )  # fmt: skip
    csv(root / "train_study_level.csv", "id," + ",".join(siim_covid19.CLASSES), "s1_study,0,1,0,0", "s2_study,1,0,0,0")


def make_bimcv(root: Path) -> None:
    xray = root / "covid19_posi" / "sub-S03113" / "ses-E06208" / "mod-rx"
    xray.mkdir(parents=True)
    stem = "sub-S03113_ses-E06208_run-1_bp-chest_vp-ap_cr"
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) * 80
    Image.fromarray(values).save(xray / f"{stem}.png")
    (xray / f"{stem}.json").write_text(
        json.dumps({"00280004": {"vr": "CS", "Value": ["MONOCHROME1"]}, "00280101": {"Value": [12]}})
    )
    Image.fromarray(values).save(xray / "sub-S03113_ses-E06208_run-2_bp-chest_cr.png")
    (xray / "sub-S03113_ses-E06208_run-2_bp-chest_cr.json").write_text("{broken")
    scan = root / "covid19_posi" / "sub-S03114" / "ses-E1" / "mod-ct"
    scan.mkdir(parents=True)
    nib.save(
        nib.Nifti1Image(np.full((3, 3, 3), 70000, np.int32), np.eye(4)),
        scan / "sub-S03114_ses-E1_run-1_bp-chest_ct.nii.gz",
    )
    csv(
        root / "derivatives" / "labels" / "labels_covid_posi.tsv", "ReportID\tReport\tLabels",
        "E06208\ttext\t['pneumonia', 'consolidation uncertain', 'exclude']", "E2\ttext\t",
    )  # fmt: skip


def make_chexpert(root: Path) -> None:
    for path in ("train/patient00001/study1/view1_frontal.jpg", "valid/patient64541/study1/view1_frontal.jpg"):
        (root / path).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / path)
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(chexpert.FINDINGS)
    values = ["1.0", "", "0.0", "-1.0"] + [""] * 10
    for part, patient in (("train", "patient00001"), ("valid", "patient64541")):
        path = f"CheXpert-v1.0-small/{part}/{patient}/study1/view1_frontal.jpg"
        csv(root / f"{part}.csv", header, f"{path},Female,68,Frontal,AP," + ",".join(values))


def make_mimic(root: Path) -> None:
    for study, names in (("s50414267", ("aaa", "bbb")), ("s2", ("ccc",))):
        for name in names:
            path = root / "files" / "p10" / "p10000032" / study / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    write_image(root / "files" / "p10" / "p10000032" / "s2" / "ccc.dcm", np.zeros((6, 5), np.uint16))
    for what, lines in {
        "chexpert": ["subject_id,study_id,Edema,Pneumonia", "10000032,50414267,-1.0,1.0"],
        "split": ["dicom_id,study_id,subject_id,split", "aaa,1,1,train", "bbb,1,1,train", "ccc,2,1,train"],
        "metadata": ["dicom_id,subject_id,ViewPosition", "aaa,1,PA"],
    }.items():
        (root / f"mimic-cxr-2.0.0-{what}.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def make_medmnist(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    np.savez_compressed(
        root / "x3d.npz",
        train_images=rng.integers(0, 255, (3, 5, 5, 5)).astype(np.uint8), train_labels=[[0], [1], [1]],
        val_images=rng.integers(0, 255, (1, 5, 5, 5)).astype(np.uint8), val_labels=[[0]],
    )  # fmt: skip


MAKERS: dict[str, Callable[[Path], None]] = {
    "fastmri": make_fastmri, "nlst": make_nlst, "victre": make_victre, "cmmd": make_cmmd,
    "prostate_mri_us_biopsy": make_prostate, "lidc_idri": make_lidc, "ct_images_in_covid19": make_covid_ct,
    "rsna_ich": make_rsna, "mrnet": make_mrnet, "siim_covid19": make_siim, "bimcv_covid19": make_bimcv,
    "chexpert": make_chexpert, "mimic_cxr": make_mimic, "medmnist": make_medmnist,
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def by(records: list[Record], key: Callable[[Record], object]) -> dict[object, Record]:
    out = {key(r): r for r in records}
    assert len(out) == len(records)
    return out


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


@pytest.mark.parametrize("name", MAKERS)
def test_every_data_set_is_found_below_a_root_and_named_where_it_is_not(name: str, tmp_path: Path) -> None:
    about = adapter(name).ABOUT
    MAKERS[name](tmp_path / "root" / about.folders[0])
    records = scan(name, tmp_path / "root")
    assert records
    assert {r.dataset for r in records} == {name}
    assert all(Path(r.paths[0]).is_file() for r in records)
    assert all(isinstance(record.read(), Volume) for record in records)
    parts = patient_split(records, valid=0.3, test=0.3)
    patients = [{r.patient for r in part} for part in parts.values()]
    assert sum(map(len, patients)) == len(set().union(*patients))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match="get it from https") as caught:
        scan(name, tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_doctor_tells_what_is_here_and_where_the_rest_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mrnet(tmp_path / "mrnet")
    make_chexpert(tmp_path / "chexpert")
    (tmp_path / "chexpert" / "train" / "patient00001" / "study1" / "view1_frontal.jpg").unlink()
    monkeypatch.setenv("TENSOR_RELOADED_DATADIR", str(tmp_path))
    monkeypatch.delenv("MEDFORMER_DATA", raising=False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "here     MRNet: 3 records of 2 patients (2 train, 1 valid)" in out
    assert "problem  CheXpert: 1 of 2 files named in its tables are not here" in out
    assert out.count("missing  ") == len(DATASETS) - 3
    assert main(["doctor", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["found"]) == 14
    assert main(["doctor", "--root", str(tmp_path / "nowhere")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_the_data_root_is_flag_then_new_then_old_variable(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    both = {"MEDFORMER_DATA": str(tmp_path / "b"), "TENSOR_RELOADED_DATADIR": str(tmp_path / "c")}
    assert data_root(tmp_path / "a", both).name == "a"
    assert data_root(None, both).name == "b"
    assert data_root(None, {"TENSOR_RELOADED_DATADIR": str(tmp_path / "c")}).name == "c"
    with pytest.raises(ScanError, match=r"MEDFORMER_DATA is not given, TENSOR_RELOADED_DATADIR is not given"):
        data_root(None, {})
    with pytest.raises(ScanError, match="which is no folder"):
        data_root(tmp_path / "x", both)


class TestShared:
    def test_official_parts_stay_and_patients_never_part(self) -> None:
        def record(patient: str, split: str | None, dataset: str = "d") -> Record:
            return Record(dataset=dataset, patient=patient, study="", paths=(patient,), modality="CT", split=split)

        records = [record(str(i % 50), None) for i in range(200)]
        parts = patient_split(records, valid=0.2, test=0.2)
        assert sum(map(len, parts.values())) == 200
        assert all(parts.values())
        bigger = patient_split([*records, record("new", None)], valid=0.2, test=0.2)
        for name, part in parts.items():
            assert {r.patient for r in part} <= {r.patient for r in bigger[name]}
        official = [record(str(i), "test" if i < 5 else "train", "e") for i in range(50)]
        parts = patient_split(official, valid=0.2, test=0.9 - 0.2)
        assert {r.patient for r in parts["test"]} == {"0", "1", "2", "3", "4"}
        assert parts["valid"]
        with pytest.raises(ScanError, match="one patient into train and test"):
            patient_split([record("1", "train"), record("1", "test")])

    def test_states_are_four(self) -> None:
        assert [state_of(v) for v in ("1.0", "0", "-1.0", "", "nan")] == [
            POSITIVE,
            NEGATIVE,
            UNCERTAIN,
            UNKNOWN,
            UNKNOWN,
        ]
        with pytest.raises(ScanError, match="must be 1, 0, -1 or blank"):
            state_of("2")

    def test_tables_say_what_is_wrong_with_them(self, tmp_path: Path) -> None:
        table = csv(tmp_path / "t.csv", "a,b", "1,2", "", "3")
        assert list(read_table(table, ["a"])) == [{"a": "1", "b": "2"}, {"a": "3", "b": ""}]
        with pytest.raises(ScanError, match="no column c among a, b"):
            list(read_table(table, ["c"]))
        with pytest.raises(ScanError, match="row 1 has 3 cells"):
            list(read_table(csv(tmp_path / "t.csv", "a,b", "1,2,3")))
        (tmp_path / "t.csv.gz").write_bytes(b"no gzip")
        with pytest.raises(ScanError, match="cannot be read"):
            list(read_table(tmp_path / "t.csv.gz"))
        (tmp_path / "t.xlsx").write_bytes(b"no zip")
        with pytest.raises(ScanError, match="workbook cannot be read"):
            list(read_sheet(tmp_path / "t.xlsx"))

    @pytest.mark.parametrize("text", ["[" * 3000, "__import__('os')", "1 +", "[x]", "9" * 70000])
    def test_cells_are_values_and_nothing_else(self, text: str) -> None:
        with pytest.raises(ScanError):
            parse_literal(text, "cell")

    def test_label_files_are_found_wherever_a_release_puts_them(self, tmp_path: Path) -> None:
        csv(tmp_path / "a" / "b" / "labels.csv", "x")
        assert find_file(tmp_path, "labels.csv") == tmp_path / "a" / "b" / "labels.csv"
        csv(tmp_path / "a" / "labels.csv", "x")
        assert find_file(tmp_path, "labels.csv") == tmp_path / "a" / "labels.csv"
        assert find_file(tmp_path, "labels.csv", depth=0) is None

    def test_hashed_patients_do_not_lead_back_without_the_salt(self) -> None:
        assert hash_patient("p1", b"a" * 32) == hash_patient("p1", b"a" * 32) != hash_patient("p1", b"b" * 32)
        assert "p1" not in hash_patient("p1", b"a" * 32)
