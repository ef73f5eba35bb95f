"""Choose tiles without a GPU: the largest that compile without a spill, within shared memory, onto the matrix unit.

    python benchmarks/choose_configs.py performer --arch sm_90 --kernel state_bwd

writes kernels/medformer_kernels/configs/<family>.json. Largest first is a rule of thumb (bytes read again fall with
the tile), not a measurement; where a GPU is at hand, time the candidates instead and keep the winner.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import torch

from ahead_of_time import TARGETS, record
from compile_cases import FAMILIES
from config_files import dump
from medformer_kernels import _dispatch

# By (itemsize, width): (block_m, block_n, num_warps, num_stages) and, where a program holds only so many columns of a
# wide head, columns; best guess first. Tiles beyond these overfill the registers, and then the assembler alone takes
# minutes.
CANDIDATES = {
    (2, 64): [
        (256, 64, 8, 3), (256, 32, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 8, 3), (64, 128, 8, 2),
        (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2),
    ],
    (2, 128): [
        (256, 32, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2),
        (64, 64, 4, 2), (32, 128, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (64, 16, 8, 1), (64, 16, 4, 1), (32, 64, 4, 2),
        (32, 32, 8, 1), (32, 32, 4, 2), (32, 32, 4, 1),
    ],
    (4, 64): [
        (64, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1), (32, 16, 8, 1), (16, 16, 4, 1),
        (16, 16, 8, 1),
    ],
    (4, 128): [(32, 32, 4, 1), (32, 32, 8, 2), (16, 16, 4, 1), (16, 16, 8, 2), (16, 32, 4, 1, 64), (16, 16, 4, 1, 64)],
    (2, 256): [
        (128, 128, 8, 2, 64), (128, 64, 8, 2, 128), (128, 64, 8, 2, 64), (64, 128, 8, 2, 64), (64, 64, 4, 2, 64),
        (64, 64, 4, 1, 64), (64, 32, 4, 1, 64), (32, 64, 4, 1, 64), (32, 32, 4, 1, 64), (16, 32, 4, 1, 64),
    ],
    (4, 256): [
        (64, 32, 4, 2, 64), (32, 32, 4, 2, 64), (32, 32, 4, 1, 64), (16, 32, 4, 1, 64), (16, 16, 4, 1, 64),
        (16, 16, 4, 1, 32),
    ],
}  # fmt: skip
# Tokens of a chunk first here: the state is read and written once for each.
CAUSAL_CANDIDATES = {
    (2, 64): [(64, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
    (2, 128): [
        (32, 64, 4, 1, 64), (16, 64, 4, 1, 64), (16, 64, 4, 1, 32), (16, 64, 8, 1, 64), (16, 64, 8, 1, 32),
        (16, 32, 8, 1, 32), (32, 16, 4, 1, 32), (16, 16, 4, 1, 32), (16, 16, 4, 1, 16),
    ],
    (2, 256): [
        (16, 64, 4, 1, 64), (16, 64, 8, 1, 64), (16, 64, 4, 1, 32), (16, 64, 8, 1, 32), (16, 64, 4, 1, 16),
        (16, 32, 4, 1, 32), (16, 16, 4, 1, 32), (16, 16, 4, 1, 16),
    ],
    (4, 64): [(32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1, 32), (16, 16, 4, 1, 16)],
    (4, 128): [(16, 16, 4, 1, 64), (16, 16, 4, 1, 32), (16, 16, 4, 1, 16)],
    (4, 256): [(16, 16, 4, 1, 64), (16, 16, 4, 1, 32), (16, 16, 4, 1, 16)],
}  # fmt: skip


def fits(entry: dict[str, int], family: str, kernel: str, arch: str, width: int, dtype: torch.dtype) -> bool:
    """Whether `entry` fits in every variant (masked or not) of this kernel, width and dtype; no if there is none."""
    # Also for every kernel that a launch starts along with this one, on every chip: a family may ask which have a tile.
    table = defaultdict(lambda: {chip: [entry] for chip in TARGETS})
    with patch.object(_dispatch, "load_configs", lambda _: table):
        launches = [
            case.launches[kernel]
            for case in FAMILIES[family].cases(widths=(width,))
            if case.dtype == dtype and kernel in case.launches and case.runs_on(arch)
        ]
        for launch in launches:
            for compiled in record(arch, launch, f"{family}_{kernel}_kernel"):
                on_matrix_unit = arch != "sm_90" or dtype == torch.float32 or compiled.matrix == "wgmma"
                if not (compiled.fits and on_matrix_unit):
                    return False
    return bool(launches)


def choose(family: str, kernel: str, arch: str, width: int, dtype: torch.dtype) -> dict[str, int] | None:
    """The first candidate that fits, or None."""
    candidates = CAUSAL_CANDIDATES if kernel.startswith("causal") else CANDIDATES
    keys = ("block_m", "block_n", "num_warps", "num_stages", "columns")
    for candidate in candidates[dtype.itemsize, width]:
        entry = {"itemsize": dtype.itemsize, "width": width} | dict(zip(keys, candidate, strict=False))
        if fits(entry, family, kernel, arch, width, dtype):
            return entry
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES.keys() - {"tnt"}), help="of tnt: choose_tnt_configs.py")
    parser.add_argument("--arch", choices=sorted(TARGETS), action="append", help="default: all")
    parser.add_argument("--kernel", action="append", help="configuration key; default: all")
    parser.add_argument("--width", type=int, action="append", help="head width; default: all of the family")
    arguments = parser.parse_args()
    path = Path(_dispatch.__file__).parent / "configs" / f"{arguments.family}.json"
    widths = arguments.width or FAMILIES[arguments.family].widths
    kernels = arguments.kernel or list(dict.fromkeys(k for c in FAMILIES[arguments.family].cases() for k in c.launches))
    for arch, kernel in itertools.product(arguments.arch or TARGETS, kernels):
        for width, dtype in itertools.product(widths, (torch.bfloat16, torch.float32)):
            entry = choose(arguments.family, kernel, arch, width, dtype)
            if entry is None:
                print(f"{kernel} {arch}: no candidate fits width {width} {dtype}", flush=True)
                continue
            print(kernel, arch, entry, flush=True)
            table = json.loads(path.read_text()) if path.exists() else {}  # read again: others may write it meanwhile
            entries = table.setdefault(kernel, {}).setdefault(arch, [])
            entries[:] = [e for e in entries if (e["itemsize"], e["width"]) != (entry["itemsize"], width)] + [entry]
            entries.sort(key=lambda e: (e["width"], e["itemsize"]))
            path.write_text(dump(table))


if __name__ == "__main__":
    main()
