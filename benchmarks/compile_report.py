"""What every shipped kernel compiles to, without a GPU: registers, spills, shared memory, matrix unit, occupancy.

    python benchmarks/compile_report.py                      # every family, chip, width and dtype
    python benchmarks/compile_report.py --arch sm_90 --width 64 --markdown report.md

Exits with 1 if a kernel spills, needs more shared memory than the chip has, or, in a 16-bit dtype on sm_90, misses the
wgmma instructions. Behind the table stand the counted FLOP and bytes of each family against its floor: the largest of
FLOP / 790 TFLOP/s, bytes / 4.3 TB/s and exponentials / 3.9 T/s (one H200, measured by its lender).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does by default; saying so silences a warning

import torch
from tqdm import tqdm

from ahead_of_time import TARGETS, Compiled, record
from compile_cases import FAMILIES, Case, Floor

_COLUMNS = (
    "family",
    "case",
    "kernel",
    "chip",
    "tile",
    "warps",
    "stages",
    "registers",
    "spills",
    "shared KiB",
    "matrix",
    "programs/unit",
)
_FLOOR_COLUMNS = (
    "family and shape",
    "pass",
    "GFLOP",
    "G exp",
    "GB planned",
    "GB least",
    "planned/least",
    "floor ms",
    "bound by",
)


def compile_case(arch: str, case: Case) -> list[Compiled]:
    """Every kernel of a case on one chip, each launch once."""
    unique = {id(launch): launch for launch in case.launches.values()}
    return [compiled for launch in unique.values() for compiled in record(arch, launch)]


def problem(compiled: Compiled, dtype: torch.dtype) -> str | None:
    """Why a kernel must not ship, or None."""
    limit = TARGETS[compiled.arch].shared_limit
    if compiled.spills:
        return f"spills ({compiled.spills})"
    if compiled.shared > limit:
        return f"{compiled.shared} B of shared memory, the chip has {limit}"
    if compiled.multiplies and compiled.arch == "sm_90" and dtype.itemsize == 2 and compiled.matrix != "wgmma":
        return f"matrix instruction is {compiled.matrix}, not wgmma"
    return None


def row(family: str, case: Case, compiled: Compiled) -> tuple[str, ...]:
    tile = "x".join(str(value) for key, value in compiled.tiles.items() if key.startswith("BLOCK"))
    return (
        family, case.name, compiled.kernel.removesuffix("_kernel"), compiled.arch, tile, str(compiled.num_warps),
        str(compiled.num_stages), str(compiled.registers), str(compiled.spills), f"{compiled.shared / 1024:.0f}",
        compiled.matrix, str(compiled.occupancy),
    )  # fmt: skip


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, columns aligned so that it also reads well in a terminal."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def floor_table(floors: list[Floor]) -> str:
    rows = []
    for floor in floors:
        times = {"FLOP": floor.flop / 790e12, "bytes": floor.least_bytes / 4.3e12, "exp": floor.exponentials / 3.9e12}
        bound = max(times, key=lambda name: times[name])
        rows.append((
            floor.shape, floor.direction, f"{floor.flop / 1e9:.0f}", f"{floor.exponentials / 1e9:.2f}",
            f"{floor.planned_bytes / 1e9:.2f}", f"{floor.least_bytes / 1e9:.2f}",
            f"{floor.planned_bytes / floor.least_bytes:.2f}", f"{times[bound] * 1e3:.2f}", bound,
        ))  # fmt: skip
    return table(_FLOOR_COLUMNS, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append", help="default: all")
    parser.add_argument("--arch", choices=sorted(TARGETS), action="append", help="default: all")
    parser.add_argument("--width", type=int, action="append", help="head width; default: all")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    families = {name: FAMILIES[name] for name in arguments.family or FAMILIES}
    work = [
        (name, case, arch)
        for name, family in families.items()
        for case in family.cases(widths=tuple(w for w in family.widths if not arguments.width or w in arguments.width))
        if arguments.case in case.name
        for arch in arguments.arch or TARGETS
        if case.runs_on(arch)
    ]
    rows, problems = [], []
    for name, case, arch in tqdm(work, desc="compiling", unit="case", disable=None):
        for compiled in compile_case(arch, case):
            rows.append(row(name, case, compiled))
            why = problem(compiled, case.dtype)
            if why is not None:
                problems.append(f"{compiled.kernel} on {arch}, {case.name}: {why}")
    text = table(_COLUMNS, rows) + "\n\n" + floor_table([floor for f in families.values() for floor in f.floors()])
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    print(f"\n{len(rows)} kernels compiled, {len(problems)} problems")
    for line in problems:
        print(f"PROBLEM {line}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
