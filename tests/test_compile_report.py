"""Kernels compiled ahead of time: no spills, wgmma on sm_90, and nothing new to compile for a new length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from machine_code import read_code

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


# Registers a thread and cycles a pass of the hot loop (the model of benchmarks/machine_code.py), triton 3.8: what one
# of them exceeds has become slower on paper.
CEILINGS = {
    "performer forward": {"performer_state_fwd": (255, 800), "performer_read_fwd": (255, 1430)},
    "nystrom forward": {"nystrom_pool_values_fwd": (255, 1420), "nystrom_read_fwd": (255, 1350)},
    "disentangled forward": {"disentangled_fwd": (255, 1210)},
    "disentangled backward": {"disentangled_dq": (255, 750), "disentangled_dkv": (255, 960)},
    "tnt forward": {"tnt_fwd": (255, 650)},
    "patch_embed a forward": {"patch_embed_fwd": (168, 1550)},
    "patch_embed b forward": {"patch_embed_fwd": (255, 840)},
}
_CEILINGS = """
import json, sys
from compile_cases.headlines import HEADLINES
from predict import predicted

print(json.dumps({name: predicted(HEADLINES[name], "sm_90") for name in sys.argv[1:]}))
"""


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="the ceilings are those of triton 3.8; 3.6 makes other code (misc/docs/unverified.md)",
)
def test_headline_kernels_stay_below_their_ceilings():
    made = json.loads(run("-c", _CEILINGS, *CEILINGS))
    for name, ceilings in CEILINGS.items():
        kernels = {line["kernel"].removesuffix("_kernel"): line for line in made[name]}
        for kernel, (registers, cycles) in ceilings.items():
            line = kernels[kernel]
            assert not line["serialised"], kernel
            assert line["spills"] == 0, kernel
            assert line["registers"] <= registers, kernel
            assert line["loop_cycles"] <= cycles, kernel
            assert 0 < line["low_ms"] <= line["high_ms"], kernel


_SASS = """
.L_x_1:
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!PT FADD R1, R1, R2 ;
.L_x_2:
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   WARPGROUP.ARRIVE ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0070*/              @P0  BRA `(.L_x_2) ;
        /*0080*/                   LDS.128 R4, [R8] ;
        /*0090*/              @P1  BRA `(.L_x_1) ;
        /*00a0*/                   MUFU.EX2 R3, R3 ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


def test_loops_of_machine_code_are_counted_by_pipe():
    code = read_code(_SASS, "wgmma.commit_group;", 8)
    inner, outer = code.loops
    assert (inner.depth, outer.depth, code.straight.depth) == (2, 1, 0)
    assert inner.cycles["tensor"] == 2 * 2 * 64 * 64 * 16 * 2 / 4096  # two groups of four warps
    assert inner.cycles["shared"] == 2 * (4096 + 2048) / 128  # both operands of one product, one of the other
    assert outer.pipes == {"fma": 1, "shared": 1, "wait": 1}  # what no lane does is not counted
    assert outer.cycles["shared"] == 8 * 32 * 16 / 128
    assert code.straight.cycles["exp"] == 2 * 8
    assert code.hot is inner
    assert code.products == 2


def test_products_that_wait_for_each_other_are_refused():
    from ahead_of_time import Compiled
    from compile_report import problem

    def compiled(commits: int) -> Compiled:
        code = read_code(_SASS, "wgmma.commit_group;" * commits, 8)
        return Compiled(
            kernel="x", arch="sm_90", programs=1, num_warps=8, num_stages=1, tiles={}, registers=9, spills=0, shared=0,
            matrix="wgmma", multiplies=True, assembly="", code=code,
        )  # fmt: skip

    assert problem(compiled(1), torch.bfloat16) == "its 2 wgmma wait for each other"
    assert not compiled(1).fits
    assert problem(compiled(2), torch.bfloat16) is None  # as many groups as products: as written
    assert compiled(2).fits


def test_another_triton_must_be_there(tmp_path):
    command = [sys.executable, "compile_report.py", "--triton", str(tmp_path), "--headlines"]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"compile_report: --triton {tmp_path} holds no triton; pip install --target {tmp_path} triton==3.6.0\n"
    )


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
