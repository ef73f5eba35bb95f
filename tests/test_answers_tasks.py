"""Tasks of numbers and of several channels: tables, reading onto one grid, scores."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medformer.data import ScanError, Volume
from medformer.data.cases import network_input, read_case
from medformer.data.labels import read_label_table
from medformer.data.resample import on_grid, onto
from medformer.errors import UserError
from medformer.evaluation import scores, tasks


def table(folder: Path, text: str) -> Path:
    path = folder / "cases.csv"
    path.write_text(text)
    return path


def a_scan(path: Path, shape: tuple[int, int, int] = (8, 10, 12), affine: np.ndarray | None = None, seed: int = 0):
    """NIfTI of shape (x, y, z): a ramp that depends on the place in millimetres alone, and noise at 1%."""
    affine = np.eye(4) if affine is None else affine
    xyz = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    voxels = xyz @ [1.0, 10.0, 100.0] + np.random.default_rng(seed).normal(0, 1, shape)
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), path)
    return path


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("path,value\na,1.5\nb,-2\n", None, [1.5, -2.0]),
        ("path;value\na;62,5\nb;3\n", None, [62.5, 3.0]),
        ("path,Age,note\na,60,x\nb,61,y\n", "age", [60.0, 61.0]),
        ("path,label\na,1\nb,5\n", "label", [1.0, 5.0]),
    ],
)
def test_a_column_of_numbers_is_a_regression(tmp_path: Path, text: str, value: str | None, numbers: list[float]):
    found = read_label_table(table(tmp_path, text), value=value)
    assert found.kind == "regression"
    assert [t for (t,) in found.targets] == numbers


@pytest.mark.parametrize("wrong", ["", "n/a", "inf", "nan", "1_0", "1e999", "twelve"])
def test_what_is_no_number_is_refused_with_its_row(tmp_path: Path, wrong: str):
    with pytest.raises(ScanError, match=r"row 3: value is '.*', must be a number"):
        read_label_table(table(tmp_path, f"path,value\na,1\nb,{wrong}\n"))


def test_a_class_between_two_numbers_names_the_way_to_regression(tmp_path: Path):
    with pytest.raises(ScanError, match="for a number to predict give --value label"):
        read_label_table(table(tmp_path, "path,label\na,1.5\n"))
    with pytest.raises(ScanError, match="--value ef: no such column"):
        read_label_table(table(tmp_path, "path,label\na,1\n"), value="ef")
    with pytest.raises(ScanError, match="give exactly one of label, mask, value"):
        read_label_table(table(tmp_path, "path,label,value\na,1,2\n"))


def test_channels_are_columns_or_patterns_and_may_be_missing_where_asked(tmp_path: Path):
    found = read_label_table(table(tmp_path, "t1,FLAIR,label\na,b,x\nc,d,y\n"), channels=["t1", "flair"])
    assert [[p.name for p in case if p] for case in found.files] == [["a", "b"], ["c", "d"]]
    assert found.names == ("x", "y")
    gap = table(tmp_path, "t1,flair,label\na,,x\nc,d,y\n")
    with pytest.raises(ScanError, match="row 2 has no flair"):
        read_label_table(gap, channels=["t1", "flair"])
    found = read_label_table(gap, channels=["t1", "flair"], missing=True)
    assert found.files[0][1] is None
    assert any("1 of 2 cases lack a sequence" in note for note in found.notes)
    with pytest.raises(ScanError, match="row 2 has no t1"):
        read_label_table(table(tmp_path, "t1,flair,label\n,,x\n"), channels=["t1", "flair"], missing=True)

    for name in ("p1/sub_T1.nii", "p1/sub_FLAIR.nii", "p2/x_T1.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folders, by = table(tmp_path, "path,label\np1,x\np2,y\n"), ["t1=*_t1.nii", "flair=*_flair.nii"]
    with pytest.raises(ScanError, match=r"row 3: p2: no file fits flair=\*_flair.nii; --missing true"):
        read_label_table(folders, channels=by)
    found = read_label_table(folders, channels=by, missing=True)
    assert [[p and p.name for p in case] for case in found.files] == [
        ["sub_T1.nii", "sub_FLAIR.nii"],
        ["x_T1.nii", None],
    ]
    with pytest.raises(ScanError, match="2 files fit t1="):
        read_label_table(folders, channels=["t1=*.nii"], missing=True)


def test_sequences_come_onto_the_grid_of_the_first(tmp_path: Path):
    first = a_scan(tmp_path / "t1.nii")
    turned = np.array([[0, -2.0, 0, 12], [1.5, 0, 0, -2], [0, 0, 1.25, -1], [0, 0, 0, 1]])  # covers the first's grid
    second = a_scan(tmp_path / "t2.nii", (12, 10, 14), turned, seed=1)
    case = read_case([first, second], 3)
    t1, t2 = case
    assert t1 is not None
    assert t2 is not None
    assert t2.shape == t1.shape == (12, 10, 8)
    assert "resampled onto the grid of t1.nii" in t2.notes[-1]
    inside = np.ones(t2.shape, bool) if t2.valid is None else t2.valid
    assert inside.mean() > 0.7
    assert np.abs(t2.voxels - t1.voxels)[inside].max() < 8  # of a range of 1200: noise, and no voxel is off
    x = network_input([t1, None, t2], 3)
    assert x.shape == (3, 12, 10, 8)
    assert np.isnan(x[1]).all()
    assert np.isfinite(x[[0, 2]]).all()


def test_scans_that_do_not_overlap_are_refused():
    def volume(offset: float) -> Volume:
        affine = np.eye(4)
        affine[:3, 3] = offset
        return Volume(voxels=np.random.default_rng(0).normal(size=(4, 5, 6)), affine=affine, modality="MR",
                      units="arbitrary", notes=(), source="x.nii")  # fmt: skip

    assert on_grid(volume(0), volume(0.4))
    assert not on_grid(volume(0), volume(0.6))
    with pytest.raises(ScanError, match="do not overlap"):
        onto(volume(100), volume(0))


def test_a_mask_elsewhere_in_the_patient_is_refused(tmp_path: Path):
    affine = np.eye(4)
    affine[0, 3] = 30
    for i in range(3):
        a_scan(tmp_path / f"s{i}.nii")
        mask = np.zeros((8, 10, 12), np.uint8)
        mask[2:5, 2:5, 2:5] = 1
        nib.save(nib.Nifti1Image(mask, affine if i == 2 else np.eye(4)), tmp_path / f"m{i}.nii")
    path = table(tmp_path, "path,mask\n" + "".join(f"s{i}.nii,m{i}.nii\n" for i in range(3)))
    with pytest.raises(UserError, match=r"row 4: m2.nii: mask lies elsewhere in the patient than s2.nii"):
        tasks.read_task(path, 3, None, 0, list)


def test_scores_of_numbers_agree_with_their_definitions_and_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth = rng.normal(50, 10, (40, 1))
    guess = truth + rng.normal(2, 5, (40, 1))
    weights = rng.integers(0, 4, (6, 40)).astype(float)
    for w, r2, mae, rmse in zip(
        weights, *(scores.weighted(m, guess, truth, weights) for m in ("r2", "mae", "rmse")), strict=True
    ):
        assert r2 == pytest.approx(sklearn.r2_score(truth, guess, sample_weight=w))
        assert mae == pytest.approx(sklearn.mean_absolute_error(truth, guess, sample_weight=w))
        assert rmse == pytest.approx(sklearn.mean_squared_error(truth, guess, sample_weight=w) ** 0.5)
    assert scores.point("r", guess, truth) == pytest.approx(np.corrcoef(truth.T, guess.T)[0, 1])
    found = scores.estimate("mae", guess[None], truth, np.arange(40), 200)
    assert found.low < found.mean < found.high
