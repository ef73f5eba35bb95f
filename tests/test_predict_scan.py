"""The measuring of a whole scan's prediction: it counts what the command does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import predict_scan
from medformer.data import read_volume


def test_a_scan_is_stretched_onto_the_grid_and_stays_where_it_was(tmp_path: Path) -> None:
    predict_scan.a_scan(tmp_path / "small.nii.gz", (8, 12, 10), None)
    predict_scan.a_scan(tmp_path / "large.nii.gz", (16, 24, 30), tmp_path / "small.nii.gz")
    small, large = (read_volume(tmp_path / f"{name}.nii.gz") for name in ("small", "large"))
    assert large.shape == (16, 24, 30)
    extents = [[n * mm for n, mm in zip(v.shape, v.spacing_mm, strict=True)] for v in (small, large)]
    assert all(abs(a - b) < 1e-3 for a, b in zip(*extents, strict=True))


def test_the_command_is_measured_with_all_its_windows(tmp_path: Path) -> None:
    words = [
        "--shape",
        "8x16x16",
        "--window",
        "8x8x8",
        "--overlap",
        "0",
        "--patch",
        "4",
        "--width",
        "16",
        "--scans",
        "2",
    ]
    script = Path(predict_scan.__file__)
    done = subprocess.run([sys.executable, script, *words, "--work", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert (found["scans"], found["windows"]) == (2, 8)
    assert found["peak_mib"] > found["model_and_scan_mib"] > 100
    assert found["command_s"] > found["network_s"] > 0
