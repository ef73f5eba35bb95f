"""The disentangled kernels compiled ahead of time for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

_SCRIPT = """
from ahead_of_time import record
from compile_cases import FAMILIES

for case in FAMILIES["disentangled"].cases():
    if case.name.startswith("grid 32^3 D=") and case.dtype.itemsize == 2:
        for launch in ("fwd", "dkv"):
            for compiled in record("sm_90", case.launches[launch]):
                print(case.width, compiled.kernel, compiled.fits, compiled.matrix)
"""


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="triton 3.6 spills in one of these kernels (misc/docs/unverified.md)",
)
def test_headline_kernels_use_wgmma_without_spills() -> None:
    # A fresh Python without TRITON_INTERPRET: an interpreted kernel has nothing to compile.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], cwd=BENCHMARKS, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    # dK and dV of wide heads take a launch each
    expected = [("64", name) for name in ("fwd", "dq", "dkv")] + [("128", name) for name in ("fwd", "dq", "dkv", "dkv")]
    assert [(width, kernel) for width, kernel, _, _ in rows] == [(w, f"disentangled_{n}_kernel") for w, n in expected]
    assert {(fits, matrix) for *_, fits, matrix in rows} == {("True", "wgmma")}
