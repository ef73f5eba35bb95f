"""What every shipped kernel compiles to, without a GPU: registers, spills, shared memory, matrix unit, occupancy, and
what its hot loop costs.

    python benchmarks/compile_report.py                      # every family, chip, width and dtype
    python benchmarks/compile_report.py --arch sm_90 --width 64 --markdown report.md
    python benchmarks/compile_report.py --headlines          # the shapes of the targets alone, predicted ms
    python benchmarks/compile_report.py --triton /tmp/triton36   # by pip install --target /tmp/triton36 triton==3.6.0

Exits with 1 if a kernel spills, has products that wait for each other (ptxas: "wgmma.mma_async instructions are
serialized"), needs more shared memory than the chip has, or, in a 16-bit dtype on sm_90, misses the wgmma instructions.
Cycles of a loop and milliseconds come from the model of `machine_code`: no GPU has run them. Behind the table stand the
counted FLOP and bytes of each family against its floor: the largest of FLOP / 790 TFLOP/s, bytes / 4.3 TB/s and
exponentials / 3.9 T/s (one H200, measured by its lender).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does by default; saying so silences a warning

if __name__ == "__main__" and "--triton" in sys.argv[1:-1]:  # before it is imported: the same command over that one
    place = sys.argv.index("--triton")
    folder = Path(sys.argv[place + 1]).resolve()
    if not (folder / "triton" / "__init__.py").exists():
        sys.exit(f"compile_report: --triton {folder} holds no triton; pip install --target {folder} triton==3.6.0")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    os.execv(sys.executable, [sys.executable, *sys.argv[:place], *sys.argv[place + 2 :]])

import torch
import triton
from tqdm import tqdm

from ahead_of_time import TARGETS, Compiled, record
from compile_cases import FAMILIES, Case, Floor
from compile_cases.headlines import HEADLINES
from predict import predicted

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
    "loop cycles",
    "limit",
    "tensor",
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
    if compiled.code.serialised:
        return f"its {compiled.code.products} wgmma wait for each other"
    if compiled.shared > limit:
        return f"{compiled.shared} B of shared memory, the chip has {limit}"
    if compiled.multiplies and compiled.arch == "sm_90" and dtype.itemsize == 2 and compiled.matrix != "wgmma":
        return f"matrix instruction is {compiled.matrix}, not wgmma"
    return None


def row(family: str, case: Case, compiled: Compiled) -> tuple[str, ...]:
    tile = "x".join(str(value) for key, value in compiled.tiles.items() if value and key.startswith("BLOCK"))
    hot = compiled.code.hot
    loop = (f"{max(hot.cycles.values()):.0f}", hot.limit, f"{hot.tensor_share:.2f}")
    return (
        family, case.name, compiled.kernel.removesuffix("_kernel"), compiled.arch, tile, str(compiled.num_warps),
        str(compiled.num_stages), str(compiled.registers), str(compiled.spills), f"{compiled.shared / 1024:.0f}",
        compiled.matrix, str(compiled.occupancy), *(loop if compiled.arch == "sm_90" else ("", "", "")),
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
        bound = max(floor.times, key=lambda name: floor.times[name])
        rows.append((
            floor.shape, floor.direction, f"{floor.flop / 1e9:.0f}", f"{floor.exponentials / 1e9:.2f}",
            f"{floor.planned_bytes / 1e9:.2f}", f"{floor.least_bytes / 1e9:.2f}",
            f"{floor.planned_bytes / floor.least_bytes:.2f}", f"{floor.ms:.2f}", bound,
        ))  # fmt: skip
    return table(_FLOOR_COLUMNS, rows)


def headline_table(lines: dict[str, list[dict[str, Any]]]) -> str:
    """Predicted ms of each pass that has a target, and of its kernels."""
    rows = []
    for name, kernels in lines.items():
        headline = HEADLINES[name]
        low, high = (sum(kernel[key] for kernel in kernels) for key in ("low_ms", "high_ms"))
        floor, goal = (
            f"{x:.3f}" if x else "" for x in (headline.floor.ms if headline.floor else None, headline.goal_ms)
        )
        rows.append((name, "", f"{low:.3f}", f"{high:.3f}", floor, goal, "", "", "", "", "", ""))
        for kernel in kernels:
            shown = ("registers", "spills", "occupancy", "waves", "loop_cycles")
            marks = "serialised" if kernel["serialised"] else kernel["limit"]
            rows.append((
                "", kernel["kernel"].removesuffix("_kernel"), f"{kernel['low_ms']:.3f}", f"{kernel['high_ms']:.3f}", "",
                "", *(str(kernel[key]) for key in shown), marks,
            ))  # fmt: skip
    header = (
        "pass", "kernel", "low ms", "high ms", "floor ms", "goal ms", "registers", "spills", "programs/unit", "waves",
        "loop cycles", "limit",
    )  # fmt: skip
    return f"Model of one H200, no GPU has run it, triton {triton.__version__}\n\n" + table(header, rows)


@cache
def _cases(family: str) -> dict[str, Case]:
    return {case.name: case for case in FAMILIES[family].cases()}


def _compile(family: str, name: str, arch: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows and problems of a case, in a process of its own."""
    case, rows, problems = _cases(family)[name], [], []
    for compiled in compile_case(arch, case):
        rows.append(row(family, case, compiled))
        why = problem(compiled, case.dtype)
        if why is not None:
            problems.append(f"{compiled.kernel} on {arch}, {case.name}: {why}")
    return rows, problems


def _predict(name: str) -> list[dict[str, Any]]:
    return predicted(HEADLINES[name], "sm_90")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), action="append", help="default: all")
    parser.add_argument("--arch", choices=sorted(TARGETS), action="append", help="default: all")
    parser.add_argument("--width", type=int, action="append", help="head width; default: all")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--headlines", action="store_true", help="only the predictions at the shapes of the targets")
    parser.add_argument("--triton", type=Path, metavar="DIR", help="folder of another triton than the installed one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    families = {name: FAMILIES[name] for name in arguments.family or FAMILIES}
    work = [
        (name, case.name, arch)
        for name, family in families.items()
        for case in family.cases(widths=tuple(w for w in family.widths if not arguments.width or w in arguments.width))
        if arguments.case in case.name
        for arch in arguments.arch or TARGETS
        if case.runs_on(arch) and not arguments.headlines
    ]
    chosen = arguments.width or arguments.case or "sm_90" not in (arguments.arch or TARGETS)
    named = [name for name, line in HEADLINES.items() if line.family in families and not chosen]
    rows, problems = [], []
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        guesses = dict(zip(named, (pool.submit(_predict, name) for name in named), strict=True))
        cases = [pool.submit(_compile, *item) for item in work]
        for future in tqdm([*guesses.values(), *cases], desc="compiling", unit="case", disable=None):
            future.result()
        for future in cases:
            more, wrong = future.result()
            rows += more
            problems += wrong
        lines = {name: future.result() for name, future in guesses.items()}
    for name, kernels in lines.items():
        bad = [line for line in kernels if line["spills"] or line["serialised"]]
        problems += [f"{line['kernel']} of {name}: spills ({line['spills']}) or serialised" for line in bad]
    floors = floor_table([floor for f in families.values() for floor in f.floors()])
    parts = [table(_COLUMNS, rows)] * bool(rows) + [headline_table(lines)] * bool(lines) + [floors]
    text = "\n\n".join(parts)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    print(f"\n{len(rows)} kernels compiled with triton {triton.__version__}, {len(problems)} problems")
    for line in problems:
        print(f"PROBLEM {line}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
