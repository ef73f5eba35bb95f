"""Trees of files as downloads lie, made from the documentation of each archive and not from its adapter.

Names of folders, tables and columns are those that the archives' pages, their tools or public loaders show;
`misc/docs/datasets.md` says which were seen where.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medformer.data.datasets.chexpert import FINDINGS
from tests.dataset_files import annotation, csv, ct, mammogram, sheet
from tests.test_data_planar import write_image

METADATA = (
    "Series UID,Collection,3rd Party Analysis,Data Description URI,Study UID,Study Description,Study Date,"
    "Series Description,Manufacturer,Modality,SOP Class Name,SOP Class UID,Number of Images,File Size,File Location,"
    "Download Timestamp"
)


def listing(manifest: Path, collection: str, series: dict[str, str]) -> None:
    """NBIA's metadata.csv: one row a series."""
    rows = [
        f"{uid},{collection},NO,,1.9,,01-02-1999,,,CT,CT Image Storage,1.2,3,1 MB,{at}," for uid, at in series.items()
    ]
    csv(manifest / "metadata.csv", METADATA, *rows)


def nbia_classic(base: Path, collection: str, patient: str, uid: str, slices: int = 3, **tags: object) -> Path:
    """Classic names: <collection>/<patient>/<study UID>/<series UID>/."""
    folder = base / collection / patient / f"{uid}.1" / uid
    ct(folder, patient, uid, slices, **tags)
    return folder


def nbia_descriptive(base: Path, collection: str, patient: str, uid: str, slices: int = 3, **tags: object) -> Path:
    """Descriptive names: <collection>/<patient>/<date-description-end of UID>/<number-description-end of UID>/."""
    study = base / collection / patient / f"01-02-1999-NA-NLST-LSS-{uid.replace('.', '')[-5:]}"
    folder = study / f"2.000000-0OPAGELSPLUSD3602.512080.00.10.75-{uid.replace('.', '')[-5:]}"
    ct(folder, patient, uid, slices, **tags)
    return folder


def nlst_nbia(base: Path, style: str = "descriptive") -> Path:
    """Two manifests, the delivered tables beside them."""
    make = nbia_classic if style == "classic" else nbia_descriptive
    first, second = base / "manifest-1617826161202", base / "manifest-1617826555824"
    make(first, "NLST", "100002", "1.3.6.1.4.1.14519.5.2.1.7009.1", 9, ClinicalTrialTimePointID="T0")
    make(second, "NLST", "100012", "1.3.6.1.4.1.14519.5.2.1.7009.2", 9, ClinicalTrialTimePointID="T1")
    make(second, "NLST", "199999", "1.3.6.1.4.1.14519.5.2.1.7009.3", 9, ClinicalTrialTimePointID="T0")
    listing(first, "NLST", {"1.3.6.1.4.1.14519.5.2.1.7009.1": "./NLST/100002"})
    listing(second, "NLST", {f"1.3.6.1.4.1.14519.5.2.1.7009.{i}": "./NLST/x" for i in (2, 3, 4)})
    nlst_tables(base / "nlst.780.idc.delivery.052821")
    return base


def nlst_tables(folder: Path) -> None:
    csv(
        folder / "nlst_780_prsn_idc_20210527.csv",
        "race,cigsmok,gender,age,loclhil,scr_res0,scr_res1,scr_res2,scr_iso0,cancyr,can_scr,pid,dataset_version",
        "1,1,1,61,,4,2,2,1,1,1,100002,2011.02.03", "1,0,2,60,,1,5,1,1,,0,100012,2011.02.03",
    )  # fmt: skip
    csv(
        folder / "nlst_780_ctab_idc_20210527.csv", "dataset_version,pid,sct_ab_desc,sct_ab_num,sct_slice_num,study_yr",
        "2011.02.03,100002,51,1,87,0",
    )  # fmt: skip
    csv(folder / "nlst_780_ctabc_idc_20210527.csv", "pid,sct_ab_num,study_yr", "100002,1,1")
    csv(folder / "nlst_780_screen_idc_20210527.csv", "pid,ctdxqual,study_yr", "100002,1,0")
    csv(folder / "nlst_780_canc_idc_20210527.csv", "pid,lc_topog,study_yr", "100002,C341,1")


def idc_tree(base: Path, collection: str, patient: str, uid: str, slices: int = 3, **tags: object) -> Path:
    """What `idc download` makes: <collection_id>/<PatientID>/<StudyInstanceUID>/<Modality>_<SeriesInstanceUID>/."""
    folder = base / collection / patient / f"{uid}.1" / f"{tags.get('Modality', 'CT')}_{uid}"
    ct(folder, patient, uid, slices, **tags)
    return folder


def idc_flat(base: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Series in folders named by their UUID, and an index of everything."""
    for i, (_, patient, uid) in enumerate(rows):
        ct(base / f"{i}1b2c3d4-aaaa-4bbb-8ccc-0123456789ab", patient, uid, 9)
    lines = [f"{collection},{patient},{uid},CT" for collection, patient, uid in rows]
    csv(base / "idc_index.csv", "collection_id,PatientID,SeriesInstanceUID,Modality", *lines)
    return base


def lidc_nbia(base: Path) -> Path:
    """A manifest and, beside it, what LIDC-XML-only.zip unpacks to."""
    manifest = base / "manifest-1600709154662"
    for i in (1, 2):
        uid = f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{i}"
        nbia_descriptive(manifest, "LIDC-IDRI", f"LIDC-IDRI-000{i}", uid)
    csv(base / "LIDC-XML-only" / "tcia-lidc-xml" / "157" / "158.xml",
        annotation("1.3.6.1.4.1.14519.5.2.1.6279.6001.1", [[(5, 5, 5)], [(6, 5, 4)], [], []]))  # fmt: skip
    csv(base / "LIDC-XML-only" / "tcia-lidc-xml" / "157" / "159.xml",
        '<IdriReadMessage xmlns="http://www.nih.gov"><ResponseHeader/></IdriReadMessage>')  # fmt: skip
    csv(base / "LIDC-IDRI_MetaData.csv", "x", "1")
    return base


def lidc_old_nbia(base: Path) -> Path:
    """The annotation among the slices of its series."""
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.1"
    folder = nbia_classic(base, "LIDC-IDRI", "LIDC-IDRI-0001", uid)
    csv(folder / "069.xml", annotation(uid, [[], [], [], []]))
    return base


def cmmd_nbia(base: Path, table: str = "xlsx") -> Path:
    """TheChineseMammographyDatabase around a manifest; the table in the manifest's folder, or as people saved it."""
    manifest = base / "TheChineseMammographyDatabase" / "manifest-1616439774456"
    for i, side in enumerate("LR"):
        at = manifest / "CMMD" / "D1-0001" / "07-18-2010-NA-NA-79377" / f"{i + 1}.000000-NA-7024{i}" / "1-1.dcm"
        mammogram(at, "D1-0001", side, f"1.3.6.{i}")
    rows: list[list[object]] = [
        ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"],
        ["D1-0001", "L", 44, 2, "mass", "Malignant", None], ["D1-0009", "R", 61, 2, "mass", "Benign", None],
    ]  # fmt: skip
    if table == "xlsx":
        sheet(manifest / "CMMD_clinicaldata_revision.xlsx", rows)
    else:
        lines = [";".join("" if cell is None else str(cell) for cell in row) for row in rows]
        csv(base / "TheChineseMammographyDatabase" / "CMMD_clinicaldata_revision_CSV.csv", *lines)
    return base


def prostate_wiki(base: Path) -> Path:
    """Workbooks under the names the wiki gave them, surfaces as their zip unpacks."""
    uid = "1.3.6.1.4.1.14519.5.2.1.2666"
    for i in (1, 2, 3):
        nbia_classic(base / "manifest-1694", "Prostate-MRI-US-Biopsy", f"Prostate-MRI-US-Biopsy-000{i}", f"{uid}.{i}",
                     Modality="MR")  # fmt: skip
    sheet(
        base / "TCIA Biopsy Data_2020-07-14.xlsx",
        [
            ["Patient Number", "Series Instance UID (MRI)", "Core Label", "Primary Gleason", "Secondary Gleason"],
            ["Prostate-MRI-US-Biopsy-0001", f"{uid}.1", "a", 3, 4],
            ["Prostate-MRI-US-Biopsy-0002", f"{uid}.2", "b", None, None],
        ],
    )  # fmt: skip
    sheet(
        base / "Target-Data_2019-12-05 (2).xlsx",
        [
            ["Patient ID", "seriesInstanceUID_MR", "ROI Volume (cc)", "UCLA Score (Similar to PIRADS v2)"],
            ["Prostate-MRI-US-Biopsy-0001", f"{uid}.1", 0.4, 5],
        ],
    )
    stl = base / "STLs" / "STLs" / f"Prostate-MRI-US-Biopsy-0001-ProstateSurface-seriesUID-{uid}.1.STL"
    stl.parent.mkdir(parents=True)
    stl.write_bytes(b"solid")
    return base


def victre_nbia(base: Path) -> Path:
    manifest = base / "manifest-1611"
    mammogram(
        manifest / "VICTRE" / "115301" / "01-01-2018-NA-NA-1" / "1.000000-NA-2" / "1-1.dcm", "115301", "L", "1.7.1"
    )
    listing(manifest, "VICTRE", {"1.7.1": "./VICTRE/115301", "1.7.2": "./VICTRE/115302"})
    return base


def covid_challenge(base: Path) -> Path:
    for name in (
        "Train/volume-covid19-A-0003_ct",
        "Train/volume-covid19-A-0003_seg",
        "Validation/volume-covid19-A-0013_ct",
    ):
        path = base / "COVID-19-20_v2" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), path)
    return base


def rsna_kaggle(base: Path) -> Path:
    """/kaggle/input/<name>/<name>/ and the table in the long form of the competition."""
    home = base / "kaggle" / "input" / ("rsna-intracranial-hemorrhage-detection/" * 2)
    for part, patient, uid in (("train", "ID_0002cd41", "1.4.1"), ("test", "ID_0002cd42", "1.4.2")):
        for i, path in enumerate(ct(home / f"stage_2_{part}", patient, uid)):
            path.rename(path.with_name(f"ID_{part}{i:06d}.dcm"))
    kinds = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
    rows = [f"ID_train{i:06d}_{kind},{int(i == 2 and kind in {'epidural', 'any'})}" for i in range(3) for kind in kinds]
    csv(home / "stage_2_train.csv", "ID,Label", *rows)
    csv(home / "stage_2_sample_submission.csv", "ID,Label", "ID_test000000_any,0.5")
    return base / "kaggle" / "input"


def siim_kaggle(base: Path) -> Path:
    home = base / "kaggle" / "input" / "siim-covid19-detection"
    studies = {
        "train": ("00086460a852", "9e8302230c91", "65761e66de9f"),
        "test": ("00188a671292", "7ce2a7a6a8cf", "e1d1f3e2a9b0"),
    }
    for part, (study, series, image) in studies.items():
        path = home / part / study / series / f"{image}.dcm"
        path.parent.mkdir(parents=True)
        write_image(path, np.arange(30, dtype=np.uint16).reshape(6, 5))
    csv(
        home / "train_image_level.csv", "id,boxes,label,StudyInstanceUID",
        "65761e66de9f_image,\"[{'x': 1.5, 'y': 2.0, 'width': 3.0, 'height': 4.0}]\",opacity 1 1.5 2 4.5 6,00086460a852",
    )  # fmt: skip
    csv(
        home / "train_study_level.csv",
        "id,Negative for Pneumonia,Typical Appearance,Indeterminate Appearance,Atypical Appearance",
        "00086460a852_study,0,1,0,0",
    )
    csv(home / "sample_submission.csv", "id,PredictionString", "00188a671292_study,negative 1 0 0 1 1")
    return base / "kaggle" / "input"


def mrnet_copy(base: Path) -> Path:
    """A copy with a folder more, a header in the tables and names whose zeros a spreadsheet stripped."""
    home = base / "archive" / "MRNet-v1.0"
    for part, exam in (("train", "0007"), ("valid", "1130")):
        for plane in ("axial", "coronal", "sagittal"):
            (home / part / plane).mkdir(parents=True)
            np.save(home / part / plane / f"{exam}.npy", np.zeros((3, 8, 8), np.uint8))
        for finding, value in (("abnormal", 1), ("acl", 0), ("meniscus", 0)):
            csv(home / f"{part}-{finding}.csv", "exam,label", f"{int(exam)},{value}")
    return base


def bimcv_both(base: Path) -> Path:
    """Both collections as their tar parts unpack, a table of labels in the derivatives of each."""
    tables = {
        "posi": ("labels_covid_posi.tsv", "sub-S03047", "ses-E07985", "['pneumonia', 'consolidation uncertain']"),
        "neg": ("Labels_covid_NEG_JAN21.tsv", "sub-S330041", "ses-E75051", "['normal']"),
    }
    for side, (table, patient, session, cell) in tables.items():
        home = base / "BIMCV" / f"covid19_{side}"
        for name in (f"{patient}_{session}_run-1_bp-chest_vp-ap_dx", f"{patient}_ses-E9_run-1_bp-chest_vp-pa_cr"):
            path = home / patient / name.split("_")[1] / "mod-rx" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
        for i in range(130):  # so many that nobody looks into each for tables
            (home / f"sub-S9{i:04d}").mkdir(parents=True)
        csv(
            home / "derivatives" / "labels" / table, "\tPatientID\tReportID\tReport\tLabels\tLocalizations",
            f"0\t{patient}\t{session}\t\"text, in Spanish: radiografía\"\t{cell}\t[]",
        )  # fmt: skip
        csv(
            home / "participants.tsv",
            "participant\tmodality_dicom\tbody_parts\tage\tgender",
            f"{patient}\t['DX']\t[]\t[80]\tM",
        )
    return base / "BIMCV"


CHEXPERT_HEAD = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(FINDINGS)
POSITIVES = "1.0,,0.0,-1.0" + "," * 10


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


def chexpert_batches(base: Path) -> Path:
    home = base / "chexpertchestxrays-u20210408"
    patients = {"2 (train 1)": "patient00001", "3 (train 2)": "patient21514", "4 (train 3)": "patient43018"}
    for batch, patient in patients.items():
        picture(home / f"CheXpert-v1.0 batch {batch}" / patient / "study1" / "view1_frontal.jpg")
    first = home / "CheXpert-v1.0 batch 1 (validate & csv)"
    picture(first / "valid" / "patient64541" / "study1" / "view1_frontal.jpg")
    rows = [
        f"CheXpert-v1.0/train/{p}/study1/view1_frontal.jpg,Male,60,Frontal,AP,{POSITIVES}" for p in patients.values()
    ]
    csv(first / "train.csv", CHEXPERT_HEAD, *rows)
    csv(
        first / "valid.csv",
        CHEXPERT_HEAD,
        f"CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,{POSITIVES}",
    )
    csv(home / "train_cheXbert.csv", CHEXPERT_HEAD)
    return home


def chexlocalize(base: Path) -> Path:
    """The test set as CheXlocalize ships it: val/ and test/, tables without the columns of the person."""
    home = base / "chexlocalize" / "CheXpert"
    picture(home / "test" / "patient64741" / "study1" / "view1_frontal.jpg")
    picture(home / "val" / "patient64541" / "study1" / "view1_frontal.jpg")
    head = "Path," + ",".join(FINDINGS)
    csv(home / "test_labels.csv", head, f"test/patient64741/study1/view1_frontal.jpg,{POSITIVES}")
    csv(home / "val_labels.csv", head, f"CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg,{POSITIVES}")
    return base / "chexlocalize"


def chexpert_plus(base: Path) -> Path:
    home = base / "chexpert_plus"
    head = (
        "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,report,age,sex,split"
    )
    rows, lines = [], []
    for part, patient in (("train", "patient42142"), ("valid", "patient64541")):
        path = f"{part}/{patient}/study5/view1_frontal.jpg"
        picture((home / "PNG" / "PNG" / path).with_suffix(".png"))
        rows.append(f'{path},{path[:-3]}dcm,Frontal,AP,{patient},5,"NARRATIVE: a report, in lines",68,Female,{part}')
        lines.append(
            json.dumps({"path_to_image": path, "Edema": 1.0, "Pneumonia": -1.0, "Fracture": None, "Cardiomegaly": 0.0})
        )
    csv(home / "df_chexpert_plus_240401.csv", head, *rows)
    csv(home / "chexbert_labels" / "impression_fixed.json", *lines)
    csv(home / "chexbert_labels" / "findings_fixed.json", *lines[:1])
    return home


MIMIC_IMAGE = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014"


def mimic_wget(base: Path) -> Path:
    """Release 2.1.0 of both by wget; the tables are in the JPG version's folder and keep the name of 2.0.0."""
    files = base / "physionet.org" / "files"
    jpg, dicom = files / "mimic-cxr-jpg" / "2.1.0", files / "mimic-cxr" / "2.1.0"
    inside = Path("files") / "p10" / "p10000032" / "s50414267" / MIMIC_IMAGE
    picture((jpg / inside).with_suffix(".jpg"))
    picture(jpg / "files" / "p11" / "p11000011" / "s51029426" / "aaaaaaaa-bbbbbbbb-cccccccc-dddddddd-eeeeeeee.jpg")
    (dicom / inside).parent.mkdir(parents=True)
    write_image((dicom / inside).with_suffix(".dcm"), np.zeros((6, 5), np.uint16))
    for what, lines in {
        "split": ["dicom_id,study_id,subject_id,split", f"{MIMIC_IMAGE},50414267,10000032,test",
                  "aaaaaaaa-bbbbbbbb-cccccccc-dddddddd-eeeeeeee,51029426,11000011,train"],
        "chexpert": ["subject_id,study_id,Atelectasis,Edema", "10000032,50414267,1.0,", "11000011,51029426,,-1.0"],
        "metadata": ["dicom_id,subject_id,study_id,ViewPosition", f"{MIMIC_IMAGE},10000032,50414267,PA"],
    }.items():  # fmt: skip
        (jpg / f"mimic-cxr-2.0.0-{what}.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    csv(jpg / "mimic-cxr-2.1.0-test-set-labeled.csv", "study_id,Airspace Opacity,Edema", "50414267,1.0,0.0")
    csv(dicom / "cxr-record-list.csv", "subject_id,study_id,dicom_id,path")
    return files


def volume(path: Path, key: str = "reconstruction_rss") -> None:
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = np.zeros((2, 20, 10), np.float32)


def fastmri_releases(base: Path) -> Path:
    """Knee, brain, prostate and breast, each as its archives unpack."""
    for name in (
        "knee/singlecoil_train/file1000001", "knee/multicoil_val/file1000007", "knee/singlecoil_test_v2/file1000022",
        "brain/multicoil_train/file_brain_AXT2_200_2000001",
        "brain_multicoil_val_batch_0/multicoil_val/file_brain_AXT1_201_6002717",
        "prostate/fastMRI_prostate_T2_IDS_001_020/file_prostate_AXT2_001",
        "prostate/fastMRI_prostate_T2_IDS_001_020/file_prostate_AXT2_002",
        "prostate/fastMRI_prostate_DIFF_IDS_001_020/file_prostate_AXDIFF_001",
        *(f"breast/fastMRI_breast_IDS_001_010/fastMRI_breast_{name}" for name in ("001_1", "001_2", "002_1", "003_1")),
    ):  # fmt: skip
        volume(base / "fastMRI" / f"{name}.h5")
    for kind, file, scores in (("t2", "AXT2_001", (1, 4)), ("dwi", "AXDIFF_001", (2, 2))):
        end = f"file_prostate_{file}.h5,{'test' if kind == 't2' else 'training'},fastMRI_prostate_IDS_001_020"
        rows = [f"{i},1,{i + 1},{score},{end}" for i, score in enumerate(scores)]
        table = base / "fastMRI" / "prostate" / "labels" / f"{kind}_slice_level_labels.csv"
        csv(table, ",fastmri_pt_id,slice,PIRADS,fastmri_rawfile,data_split,folder", *rows)
    head: list[object] = [
        "Patient Coded Name", "Repeated scans (0 = not repeat, 1:16 = repeated)", "Data split (0=training, 1=testing)",
        "Age", "Lesion status (0 = negative, 1= malignancy, 2= benign)",
    ]  # fmt: skip
    sheet(
        base / "fastMRI" / "breast" / "fastMRI_breast_labels.xlsx",
        [
            head,
            ["fastMRI_breast_001", 3, 0, 50, 1],
            ["fastMRI_breast_002", 3, 0, 51, 0],
            ["fastMRI_breast_003", 0, 1, 60, 2],
        ],
    )
    return base / "fastMRI"
