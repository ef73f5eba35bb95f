"""The script for a borrowed GPU, without one: all of its code, with the modules hidden that such a machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prove_on_gpu import Worker, table

ROOT = Path(__file__).resolve().parent.parent
# Python imports this at its start: what it names is as if it were not installed, in every process.
_HIDING = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
MISSING = {
    "pydicom", "nibabel", "jsonargparse", "pytest_benchmark", "xdist", "hypothesis", "blosc2", "zarr",
    "performer_pytorch", "nystrom_attention", "monai", "highdicom", "SimpleITK", "tensorboard", "matplotlib",
}

def hiding(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in MISSING else find(name, path, target)

PathFinder.find_spec = classmethod(hiding)
"""


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[dict], float]:
    folder = tmp_path_factory.mktemp("dry")
    (folder / "sitecustomize.py").write_text(_HIDING)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    out = folder / "results" / "gpu.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "prove_on_gpu.py"), "--dry", "--out", str(out)]
    began = time.process_time() + sum(os.times()[2:4])
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.process_time() + sum(os.times()[2:4]) - began
    return done, [json.loads(line) for line in out.read_text().splitlines()], seconds


def test_dry_run_reaches_every_step_and_finds_nothing_wrong(dry_run):
    done, lines, seconds = dry_run
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "not reached: nothing" in done.stdout
    assert not [line for line in lines if line.get("ok") is False]
    assert seconds < 120  # of processors, which others' work does not lengthen


def test_dry_run_measures_each_family_with_what_a_bare_machine_has(dry_run):
    _, lines, _ = dry_run
    timed = {line["step"] for line in lines if line["step"].endswith(": time")}
    assert timed == {
        f"{family}: time"
        for family in (
            "performer", "nystrom", "disentangled", "tnt", "patch_embed a", "patch_embed b", "nystrom volume",
            "patch_embed raw", "performer causal",
        )
    }  # fmt: skip
    skipped = {line["peer"]: line["skipped"] for line in lines if "peer" in line and "skipped" in line}
    assert skipped["performer_pytorch"] == "pip install performer-pytorch"
    assert not [line for line in lines if "peer" in line and "failed" in line]


def test_dry_run_imports_the_gpu_tests_and_compiles_a_kernel(dry_run):
    _, lines, _ = dry_run
    (tests,) = (line for line in lines if line["step"] == "tests" and "mark" in line)
    assert tests["whole"]
    assert set(tests["counts"]) == {"SKIPPED"}
    assert tests["counts"]["SKIPPED"] >= 75
    (kernel,) = (line for line in lines if line.get("headline") == "patch_embed b forward")
    assert kernel["matrix"] == "wgmma"
    assert 0 < kernel["low_ms"] <= kernel["high_ms"]


def badly(connection, *_) -> None:
    connection.send("ready")
    while (name := connection.recv()) is not None:
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            time.sleep(60)
        connection.send("ValueError: raises" if name == "raises" else None)


def test_a_step_that_dies_hangs_or_raises_ends_no_other(tmp_path):
    worker = Worker(tmp_path / "out", time.time(), True, badly)
    try:
        assert worker("fine", 60) is None
        assert worker("dies", 60) == "the process died"
        assert worker("raises", 60) == "ValueError: raises"
        assert worker("hangs", 0.2) == "stopped after 0 s"
        assert worker("fine", 60) is None
    finally:
        worker.end()


def test_table_says_what_is_wrong_failed_and_not_reached(tmp_path):
    out = tmp_path / "out.jsonl"
    peer = {"step": "tnt: peers", "what": "forward", "large": True}
    lines = [
        {"step": "compile", "headline": "tnt forward", "low_ms": 0.9, "high_ms": 1.1},
        {"step": "compile", "tile": {"num_warps": 8}, "low_ms": 7, "high_ms": 8},
        {"step": "tnt: time", "what": "forward", "ms": 0.75, "goal_ms": 0.5, "floor_ms": 0.18, "share_of_floor": 0.24},
        {"step": "tnt: right, small", "ok": False, "worst": "dx"},
        *(peer | {"peer": name, "ms": ms} for name, ms in (("eager", 3.0), ("sdpa", 2.0), ("medformer", 1.0))),
    ]  # fmt: skip
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = table(out, {"tnt: time": None, "tnt: peers": "stopped after 90 s"}, ["tnt: time", "tnt: peers", "x", "y"])
    assert "| tnt forward | 0.750 | 0.50 | 0.18 | 0.24 | 0.90 to 1.10 | sdpa (2.00) |" in text
    assert 'wrong: {"step": "tnt: right, small", "ok": false, "worst": "dx"}' in text
    assert "failed: tnt: peers: stopped after 90 s" in text
    assert "not reached: x; y" in text
