"""Choose the tiles of the inner block without a GPU: the first that compiles without a spill, onto the matrix unit.

    python benchmarks/choose_tnt_configs.py --arch sm_90

adds what is missing to kernels/medformer_kernels/configs/tnt.json. Its own script because a tile here is keyed by
width, head and rows, and not by one width as in `choose_configs.py`. A shape that no candidate holds has no entry, and
is refused by name.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ahead_of_time import TARGETS, record
from compile_cases.tnt import SHAPES, launches
from config_files import dump
from medformer_kernels import _dispatch
from medformer_kernels.tnt.plans import KERNELS

PATH = Path(_dispatch.__file__).parent / "configs" / "tnt.json"
# (block_f, num_warps, num_stages), best guess first.
TILES = [(64, 4, 2), (32, 4, 2), (32, 4, 1), (32, 8, 1), (16, 8, 1)]


def candidates(kernel: str, itemsize: int, width: int, first: dict[str, Any] | None) -> list[dict[str, int]]:
    """What to try; `first` what the same shape took on another chip."""
    names = ("block_f", "num_warps", "num_stages")
    tiles = [] if first is None else [{name: first[name] for name in names}]
    for block_f, num_warps, num_stages in TILES:
        if (block_f, itemsize, width) <= (32, 2, 128) or (block_f == 64 and itemsize == 2 and width <= 32):
            tile: dict[str, Any] = dict(
                zip(names, (32 if kernel.startswith("attn") else block_f, num_warps, num_stages), strict=True)
            )
            if tile not in tiles and (itemsize == 2 or num_stages == 1):
                tiles.append(tile)
    return tiles


def choose(kernel: str, arch: str, dtype: torch.dtype, key: tuple[int, int, int], first: Any) -> dict[str, Any] | None:
    width, head, rows = key
    shape = SHAPES[dtype.itemsize][key]
    for tile in candidates(kernel, dtype.itemsize, width, first):
        entry = {"itemsize": dtype.itemsize, "width": width, "head": head, "block_r": rows, **tile}
        # The other kernels of the same launch are planned, not compiled.
        table = {name: {arch: [entry | {"block_r": 64 if name == "mlp_dw" else rows}]} for name in KERNELS}
        with patch.object(_dispatch, "load_configs", lambda _, table=table: table):
            if all(_fits(kernel, arch, dtype, shape, full) for full in (False, True)):
                return entry
    return None


def _fits(kernel: str, arch: str, dtype: torch.dtype, shape: tuple[int, int, int], full: bool) -> bool:
    (compiled,) = record(arch, launches(*shape, dtype, full)[kernel], f"tnt_{kernel}_kernel")
    return compiled.fits and (arch != "sm_90" or dtype.itemsize == 4 or compiled.matrix == "wgmma")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(TARGETS), action="append", help="default: all")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: all")
    arguments = parser.parse_args()
    for arch, dtype in itertools.product(arguments.arch or TARGETS, (torch.bfloat16, torch.float32)):
        for width, head, rows in SHAPES[dtype.itemsize]:
            for kernel in arguments.kernel or KERNELS:
                # The gradient of the MLP's weights looks at no sequences.
                name = (dtype.itemsize, width, head, 64 if kernel == "mlp_dw" else rows)
                tables = read()
                table = tables.setdefault(kernel, {})
                if any(key(entry) == name for entry in table.get(arch, [])):
                    continue
                known = [entry for entries in table.values() for entry in entries if key(entry) == name]
                entry = choose(kernel, arch, dtype, (width, head, rows), known[0] if known else None)
                print(kernel, arch, dtype, (width, head, rows), entry or "NO TILE", flush=True)
                if entry is None:
                    break  # a shape needs every kernel
                tables = read()  # again: others may choose beside us
                tables.setdefault(kernel, {}).setdefault(arch, []).append(entry | {"block_r": name[3]})
                PATH.write_text(dump(tables))


def read() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def key(entry: dict[str, Any]) -> tuple[int, ...]:
    return tuple(entry[name] for name in ("itemsize", "width", "head", "block_r"))


if __name__ == "__main__":
    main()
