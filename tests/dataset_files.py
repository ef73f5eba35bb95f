"""Data sets made for tests, small, with every quirk their adapters know; in the layout of one archive unpacked."""

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

from medformer.data.datasets import adapter, chexpert, rsna_ich, siim_covid19
from medformer.data.records import Record
from tests.dicom_files import write_series
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


def by(records: list[Record], key: Callable[[Record], object]) -> dict[object, Record]:
    out = {key(r): r for r in records}
    assert len(out) == len(records)
    return out
