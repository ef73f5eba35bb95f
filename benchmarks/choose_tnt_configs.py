"""Choose the tiles of the inner block without a GPU: the first that compiles without a spill, onto the matrix unit.

    python benchmarks/choose_tnt_configs.py --arch sm_90

adds what is missing to kernels/medformer_kernels/configs/tnt.json. Its own script because a tile here is keyed by
width, head and rows, and not by one width as in `choose_configs.py`. What no candidate holds has no entry, and is
named: the gradients of a shape, or all of it.
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
from compile_cases.tnt import OUTER_SHAPES, SHAPES, launches, outer_launches
from config_files import dump
from medformer_kernels import _dispatch
from medformer_kernels.tnt.plans import KERNELS, OUTER_KERNELS

PATH = Path(_dispatch.__file__).parent / "configs" / "tnt.json"
# (block_f, num_warps, split), best guess first: two programs of 4 warps hide more than one of 8, and two launches read
# the tokens twice.
TILES = [(32, 4, False), (16, 4, False), (32, 8, False), (16, 8, False), (32, 4, True), (32, 8, True), (16, 8, True)]
ATTENTION_TILES = [(32, 4, False), (32, 8, False), (32, 4, True), (32, 8, True)]
# More channels of the weights are fewer passes over the tokens.
MLP_DW_TILES = [(64, 4, False), (64, 8, False), (32, 4, False), (32, 8, False), (16, 8, False)]
OUTER_TILES = [(128, 4, False), (128, 8, False), (64, 4, False), (32, 4, False), (32, 8, False), (16, 8, False)]
Key = tuple[int, int, int]


def _needs(kernel: str, itemsize: int, key: Key) -> tuple[Key, list[tuple[int, int, int]]]:
    """(width, head, rows) of an entry of a kernel, and the (tokens, width, heads) that it must hold."""
    if kernel in OUTER_KERNELS:
        return (key[0], 0, 64 if itemsize == 2 else 32), OUTER_SHAPES[key[0]]
    if not kernel.startswith("mlp"):
        return key, SHAPES[itemsize][key]
    # The gradients of the MLP know no sequences, and no heads.
    shapes = {shape[1]: shape for (width, _, _), held in SHAPES[itemsize].items() if width == key[0] for shape in held}
    return (key[0], 0, 64 if itemsize == 2 else 32), list(shapes.values())


def _tiles(kernel: str) -> list[tuple[int, int, bool]]:
    if kernel.startswith("outer"):
        return OUTER_TILES
    if kernel == "mlp_dw":
        return MLP_DW_TILES
    tiles = ATTENTION_TILES if kernel.startswith("attn") else TILES
    return [tile for tile in tiles if not (tile[2] and kernel == "mlp_dx")]


def choose(
    kernel: str, arch: str, itemsize: int, key: Key, shapes: list[tuple[int, int, int]]
) -> dict[str, Any] | None:
    width, head, rows = key
    for block_f, num_warps, split in _tiles(kernel):
        entry: dict[str, Any] = {
            "itemsize": itemsize, "width": width, "head": head, "block_r": rows, "block_f": block_f,
            "num_warps": num_warps, "num_stages": 1,
        }  # fmt: skip
        entry |= {"split": True} if split else {}
        # The other kernels of the same launch are planned, not compiled.
        tables = {name: {arch: [entry | {"head": 128, "block_r": 128}]} for name in KERNELS + OUTER_KERNELS}
        tables[kernel] = {arch: [entry]}
        with patch.object(_dispatch, "load_configs", lambda _, tables=tables: tables):
            dtypes = (torch.bfloat16, torch.float16) if itemsize == 2 else (torch.float32,)
            variants = itertools.product((True, False), dtypes, shapes)  # the fuller one spills more often
            if all(_fits(kernel, arch, *variant) for variant in variants):
                return entry
    return None


def _fits(kernel: str, arch: str, full: bool, dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    launch = outer_launches if kernel in OUTER_KERNELS else launches
    compiled = record(arch, launch(*shape, dtype, full)[kernel], f"tnt_{kernel}_kernel")
    return all(c.fits and (arch != "sm_90" or dtype.itemsize == 4 or c.matrix == "wgmma") for c in compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(TARGETS), action="append", help="default: all")
    parser.add_argument("--kernel", choices=KERNELS + OUTER_KERNELS, action="append", help="default: all")
    parser.add_argument("--itemsize", choices=(2, 4), type=int, action="append", help="bytes of a number; default: all")
    parser.add_argument(
        "--tile", nargs=3, type=int, metavar=("WIDTH", "HEAD", "ROWS"), action="append",
        help="of `compile_cases.tnt.SHAPES`; default: all",
    )  # fmt: skip
    arguments = parser.parse_args()
    for arch, itemsize in itertools.product(arguments.arch or TARGETS, arguments.itemsize or (2, 4)):
        for shape in SHAPES[itemsize]:  # all kernels of one before the next: what is chosen first is complete first
            if arguments.tile and list(shape) not in arguments.tile:
                continue
            for kernel in arguments.kernel or KERNELS + OUTER_KERNELS:
                key, shapes = _needs(kernel, itemsize, shape)
                if any(name(entry) == (itemsize, *key) for entry in read().get(kernel, {}).get(arch, [])):
                    continue
                entry = choose(kernel, arch, itemsize, key, shapes)
                print(kernel, arch, itemsize, key, entry or "NO TILE", flush=True)
                if entry is None and kernel in ("fwd", "attn_dx"):
                    break  # without these no other of them is of use
                if entry is not None:
                    tables = read()  # again: others may write it meanwhile
                    tables.setdefault(kernel, {}).setdefault(arch, []).append(entry)
                    PATH.write_text(dump(tables))


def read() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def name(entry: dict[str, Any]) -> tuple[int, ...]:
    return tuple(entry[name] for name in ("itemsize", "width", "head", "block_r"))


if __name__ == "__main__":
    main()
