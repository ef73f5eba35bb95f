"""The Nystrom kernels compiled ahead of time for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

_HEADLINE = """
from ahead_of_time import record
from compile_cases import FAMILIES

case = next(case for case in FAMILIES["nystrom"].cases(widths=(64,)) if case.name.endswith("bfloat16 plain"))
for launch in ("values_fwd", "pool_values_fwd", "token_bwd"):
    for compiled in record("sm_90", case.launches[launch]):
        print(compiled.kernel, compiled.fits, compiled.matrix)
"""


_PRODUCTS = """
import re
from ahead_of_time import record
from compile_cases import FAMILIES

case = next(case for case in FAMILIES["nystrom"].cases(widths=(64,)) if case.name.endswith("float32 plain"))
for arch in ("sm_80", "sm_90"):
    for compiled in record(arch, case.launches["products"]):
        ptx = compiled.assembly
        stored = ptx.rindex("st.global")
        print(arch, compiled.kernel, compiled.fits, "bar.sync" in ptx[stored:],
              len(re.findall(r"ld\\.global\\.nc|cp\\.async", ptx)))
"""


def run(script: str) -> list[list[str]]:
    """Printed rows, from a fresh Python without TRITON_INTERPRET: an interpreted kernel has nothing to compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCHMARKS, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_headline_kernels_use_wgmma_without_spills() -> None:
    rows = run(_HEADLINE)
    assert {fits for _, fits, _ in rows} == {"True"}
    assert {kernel for kernel, _, matrix in rows if matrix == "wgmma"} == {
        "nystrom_values_fwd_kernel", "nystrom_pool_values_fwd_kernel", "nystrom_read_fwd_kernel",
        "nystrom_landmark_bwd_kernel", "nystrom_token_bwd_kernel", "nystrom_products_kernel",
    }  # fmt: skip


def test_one_program_inverts_256_landmarks_through_barriers_and_coherent_loads() -> None:
    assert run(_PRODUCTS) == [[arch, "nystrom_products_kernel", "True", "True", "0"] for arch in ("sm_80", "sm_90")]


def test_planned_bytes_are_near_the_least() -> None:
    """Counted from the launch plans at B1 H8 N=262,144 D64 L256 bf16 on sm_90: q twice, k, v and the output once."""
    from compile_cases import FAMILIES

    floor = next(floor for floor in FAMILIES["nystrom"].floors() if floor.direction == "forward")
    assert floor.least_bytes == 5 * 8 * 262_144 * 64 * 2
    assert floor.least_bytes <= floor.planned_bytes <= 1.15 * floor.least_bytes
