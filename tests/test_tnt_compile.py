"""The tiles of configs/tnt.json: compiled for a GPU that is not here, and planned for lengths that none here holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compile_cases.tnt import costs
from medformer_kernels._dispatch import Chip
from medformer_kernels.tnt.plans import KERNELS, OUTER_KERNELS, fits, launch_plan

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
H200 = Chip(arch="sm_90", units=132)

_HEADLINE = """
import torch
from ahead_of_time import record
from compile_cases.tnt import launches

by_kernel = launches(64, 48, 4, torch.bfloat16, True)
for launch in ("fwd", "attn_dx"):
    for compiled in record("sm_90", by_kernel[launch]):
        print(compiled.kernel, compiled.fits, compiled.matrix)
"""


def test_headline_kernels_use_wgmma_without_spills() -> None:
    # An interpreted kernel has nothing to compile.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _HEADLINE], cwd=BENCHMARKS, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {tuple(row[1:]) for row in rows} == {("True", "wgmma")}
    assert {row[0] for row in rows} == {f"tnt_{kernel}_kernel" for kernel in KERNELS}


@pytest.mark.parametrize(
    ("tokens", "width", "heads"),
    [(8, 12, 2), (16, 24, 4), (16, 40, 4), (27, 48, 4), (64, 48, 4), (64, 64, 4), (64, 64, 2), (100, 24, 4)],
)
def test_named_shapes_have_tiles_for_every_kernel_in_16_bits(tokens: int, width: int, heads: int) -> None:
    assert fits(H200, tokens, width, width // heads, 2)


def test_tiles_of_one_generation_are_not_taken_on_another() -> None:
    assert fits(Chip(arch="sm_90", units=114), 16, 24, 6, 2, OUTER_KERNELS)
    for arch in ("sm_75", "sm_120", "gfx942"):
        assert not any(fits(Chip(arch=arch, units=100), 16, 24, 6, 2, (kernel,)) for kernel in KERNELS + OUTER_KERNELS)


@pytest.mark.parametrize("sequences", [262_144, 10_000_000])
@pytest.mark.parametrize(("tokens", "width", "heads"), [(16, 24, 4), (64, 48, 4)])
def test_plans_cover_every_sequence_once(sequences: int, tokens: int, width: int, heads: int) -> None:
    for kernel in KERNELS:
        parts = {"attn_dw": heads, "mlp_dw": 4 * width}.get(kernel, 1)
        plan = launch_plan(
            kernel, chip=H200, sequences=sequences, tokens=tokens, width=width, head=width // heads, parts=parts,
            itemsize=2,
        )  # fmt: skip
        held = plan.block_r if kernel.startswith("mlp") else plan.per_tile * tokens
        assert plan.tiles * held >= sequences * tokens > (plan.tiles - 1) * held
        assert plan.slices * plan.slice_length >= plan.tiles > (plan.slices - 1) * plan.slice_length
        assert held <= plan.block_r
        # One grid axis; a tile's number and its first sequence are 32-bit numbers, its place in memory a 64-bit one.
        assert max(plan.programs, plan.slices * parts, plan.tiles, plan.tiles * max(1, plan.per_tile)) < 2**31


def test_planned_bytes_are_near_the_least() -> None:
    """Counted from the launch plans at 32,768 x 64 x 48, bf16, on sm_90: x, the middle and out once in forward; three
    tensors for each dx; tokens once for each head, and for each 64 channels of the MLP, in the weights' gradients."""
    by_kernel = costs(chip=H200, sequences=32_768, tokens=64, width=48, hidden=192, num_heads=4, itemsize=2)
    tensor = 32_768 * 64 * 48 * 2
    assert {kernel: round(cost.bytes / tensor, 1) for kernel, cost in by_kernel.items()} == {
        "fwd": 3.0, "mlp_dx": 3.0, "mlp_dw": 6.1, "attn_dx": 3.0, "attn_dw": 8.0,
    }  # fmt: skip
