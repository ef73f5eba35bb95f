"""Kernels compiled ahead of time: no spills, wgmma on sm_90, and nothing new to compile for a new length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(*arguments: str) -> str:
    """A fresh Python without TRITON_INTERPRET: an interpreted kernel has nothing to compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_headline_kernels_use_wgmma_without_spills():
    out = run(
        "compile_report.py", "--family", "performer", "--arch", "sm_90", "--width", "64", "--case", "bfloat16 plain"
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "| sm_90" in line]
    by_kernel = {cells[2]: dict(zip(("spills", "matrix"), (cells[8], cells[10]), strict=True)) for cells in rows}
    assert set(by_kernel) == {
        "performer_state_fwd", "performer_merge", "performer_read_fwd", "performer_read_dq",
        "performer_read_dstate", "performer_state_bwd", "performer_omega", "performer_scan",
        "performer_causal_fwd", "performer_causal_dq", "performer_causal_dkv",
    }  # fmt: skip
    small = ("performer_merge", "performer_scan")  # no products
    assert {cells["spills"] for cells in by_kernel.values()} == {"0"}
    assert {cells["matrix"] for kernel, cells in by_kernel.items() if kernel not in small} == {"wgmma"}
    assert "0 problems" in out


_LENGTHS = """
import torch
from ahead_of_time import record
from medformer_kernels.performer import fused, kernels

omega = torch.empty(64, 64, device="meta")
for tokens in (1, 16, 999, 4096, 100_001):
    x = torch.empty(1, 8, tokens, 64, dtype=torch.bfloat16, device="meta")
    record("sm_90", lambda: fused.state(x, x, omega, None, False))
    print("compiled", len(kernels.performer_state_fwd_kernel.device_caches["sm_90"][0]))
"""


def test_new_length_compiles_nothing():
    assert run("-c", _LENGTHS).split() == ["compiled", "1"] * 5


@pytest.mark.parametrize(
    ("direction", "share"),
    [("forward", 1.15), ("backward", 1.4), ("causal forward", 1.15), ("causal backward", 1.15)],
)
def test_planned_bytes_are_near_the_least(direction, share):
    """Counted from the launch plans at B1 H8 N=262,144 D64 M256 bf16 on sm_90; backward reads q, k, v, dout twice.

    What is least for the causal form says `floors`.
    """
    from compile_cases import FAMILIES

    floor = next(floor for floor in FAMILIES["performer"].floors() if floor.direction == direction)
    assert floor.least_bytes <= floor.planned_bytes <= share * floor.least_bytes


def test_case_for_no_chip_runs_on_none():
    from compile_cases import Case

    shape = {"name": "", "width": 64, "dtype": torch.float32, "launches": {}}
    assert Case(**shape).runs_on("sm_90")
    assert Case(**shape, archs=("sm_90",)).runs_on("sm_90")
    assert not Case(**shape, archs=()).runs_on("sm_90")
