"""The comparison in 3D: crops that fit the scans, and a table of what is there so far."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compare_3d

sides = st.integers(1, 600)


@given(st.tuples(sides, sides, sides), st.sampled_from((24, 32, 48)))
def test_crops_fit_the_scans_and_hold_no_more_voxels_than_asked(shape: tuple[int, int, int], side: int) -> None:
    crop = compare_3d.crop_of(shape, side)
    assert all(side % compare_3d.STEP == 0 and side >= compare_3d.STEP for side in crop)
    assert all(side <= max(n, compare_3d.STEP) for side, n in zip(crop, shape, strict=True))
    assert np.prod(crop) <= 1.2 * side**3


def test_crops_are_cubes_where_scans_allow_it_and_flat_where_scans_are() -> None:
    assert compare_3d.crop_of((36, 50, 35)) == (32, 32, 32)
    assert compare_3d.crop_of((9, 192, 162)) == (8, 64, 64)
    assert compare_3d.crop_of((9, 192, 162), 24) == (8, 40, 40)


def test_whole_views_hold_most_of_a_scan_and_no_more_than_all_of_it() -> None:
    flags = compare_3d.whole_views((9, 192, 160), (8, 64, 64))
    assert flags == ["--views.global_scale", "2,2.5", "--views.through_plane_scale", "0.9,1.12"]


def test_a_set_is_its_scans_and_its_tables(tmp_path: Path) -> None:
    (tmp_path / "images" / "fit").mkdir(parents=True)
    for i in range(3):
        image = nib.Nifti1Image(np.zeros((40, 36, 12), np.float32), np.eye(4))
        nib.save(image, tmp_path / "images" / "fit" / f"{i}.nii.gz")
    (tmp_path / "organs.csv").write_text("path,mask,split\na,b,train\nc,d,train\ne,f,test\n")
    (tmp_path / "grade.csv").write_text("path,label\na,1\n")
    (tmp_path / "origin.csv").write_text("path,challenge_id\na,Q1\n")  # no task
    found = compare_3d.read_set(tmp_path)
    assert found.tasks == {"grade": "classes", "organs": "segmentation"}
    assert found.training == {"organs": 2}
    assert found.shape == (12, 36, 40)
    assert found.crop == (12, 36, 40)


def test_scratch_and_peers_are_listed_once_whatever_was_pretrained(tmp_path: Path) -> None:
    def value(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "sd": 0.01}

    def results(method: str, mean: float) -> dict[str, Any]:
        rows = [
            {"setting": "10%", "method": "finetune", "dice": value(mean), "dice_over_scratch": value(mean - 0.5),
             "dice_over_peer": value(mean - 0.6)},
            {"setting": "10%", "method": "scratch", "dice": value(0.5)},
            {"setting": "10%", "method": "unet", "dice": value(0.6), "dice_over_scratch": value(0.1)},
        ]  # fmt: skip
        return {"set": "a", "task": "t", "on": "a", "method": method, "seed": 0, "metrics": ["dice"],
                "labelled": {"10%": [4, 5]}, "rows": rows}  # fmt: skip

    compare_3d.report([results("dino", 0.7), results("byol", 0.4)], tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| a, t | a | dino | 0 | 10% (4) | finetune | 0.700 [0.600, 0.800] | +0.200 [+0.100, +0.300] |" in table
    assert table.count("| scratch |") == table.count("| unet |") == 1
    assert table.count("| finetune |") == 2
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert (tmp_path / "plot.png").stat().st_size > 5000


def a_set(tmp_path: Path) -> compare_3d.Set:
    return compare_3d.Set(name="a", root=tmp_path, shape=(8.0, 8.0, 8.0), crop=(8, 8, 8), tasks={"t": "classes"},
                          training={"t": 45})  # fmt: skip


def test_numbers_of_labelled_cases_become_shares_of_each_task(tmp_path: Path) -> None:
    args = SimpleNamespace(labelled="9,45,90", plan=compare_3d.PLANS["quick"])
    assert compare_3d.shares_of(a_set(tmp_path), "t", args) == "0.2,1"
    args.labelled = None
    assert compare_3d.shares_of(a_set(tmp_path), "t", args) == "0.1"
    args.labelled = "9"
    with pytest.raises(SystemExit, match=r"unsplit\.csv has no column split"):
        compare_3d.shares_of(a_set(tmp_path), "unsplit", args)


def test_results_of_another_budget_are_not_taken_for_finished(tmp_path: Path) -> None:
    plan = compare_3d.PLANS["quick"]
    used = {"steps": 100, "batch_size": 8, "seeds": 1, "lrs": [1.6e-3], "fractions": [0.1]}
    assert not compare_3d.made(tmp_path, "0.1", plan)
    (tmp_path / "results.json").write_text(json.dumps({"config": used}))
    assert compare_3d.made(tmp_path, "0.1", plan)
    assert not compare_3d.made(tmp_path, "0.1", plan, ["knn"])
    (tmp_path / "results.json").write_text(json.dumps({"config": used, "rows": [{"method": "knn"}]}))
    assert compare_3d.made(tmp_path, "0.1", plan, ["knn"])
    assert not compare_3d.made(tmp_path, "0.1", plan, ["knn", "scratch"])
    assert not compare_3d.made(tmp_path, "0.1,1", plan)
    assert not compare_3d.made(tmp_path, "0.1", dataclasses.replace(plan, seeds=3))
    (tmp_path / "runs" / "a-dino-0").mkdir(parents=True)
    (tmp_path / "runs" / "a-dino-0" / "config.yaml").write_text("steps: 200\n")
    with pytest.raises(SystemExit, match=r"--pretrain_steps 300: .* is of 200"):
        compare_3d.pretrained(tmp_path, "", (8, 8, 8), "a", "dino", 0, SimpleNamespace(plan=plan))


def test_scratch_is_trained_once_a_task_and_leaks_are_looked_for_in_all_that_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def called(*words: object) -> None:
        seen.append([str(word) for word in words])
        out = Path(seen[-1][seen[-1].index("--out") + 1])
        out.mkdir(parents=True)
        (out / "results.json").write_text("{}")

    monkeypatch.setattr(compare_3d, "called", called)
    (tmp_path / "evaluations").mkdir()
    args = SimpleNamespace(plan=compare_3d.PLANS["quick"], labelled=None, precision="bf16", device="cpu",
                           downstream=None)  # fmt: skip
    for run in ("a-dino-0", "all-dino-0"):
        compare_3d.evaluated(tmp_path, a_set(tmp_path), "t", tmp_path / "runs" / run, args)
    assert "--scratch_of" not in seen[0]
    assert seen[1][seen[1].index("--scratch_of") + 1] == seen[0][seen[0].index("--out") + 1]
    assert all("--pretraining" not in words for words in seen)  # the run says itself what it was trained on
