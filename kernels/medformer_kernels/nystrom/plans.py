"""How the Nystrom kernels are cut up, and what they cost: tiles, slices, counted bytes and operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, Plan
from medformer_kernels.nystrom.landmarks import Cells

__all__ = ["Cost", "KeyWalk", "costs", "has_walk", "inverse_tile", "key_walk", "launch_plan", "one_program"]

# Places in tiles that the walk over cells may take for a token; above that two reads of the keys are the better choice.
_MOST_PLACES = 1.25


def launch_plan(
    kernel: str, *, chip: Chip, landmarks: int, width: int, itemsize: int, tokens: int, batch_heads: int
) -> Plan:
    """How `kernel` ('values_fwd', 'pool_values_fwd', 'read_fwd', 'landmark_bwd', 'token_bwd') is launched.

    `width` is the larger of D and Dv. Deterministic; the tiles come from configs/nystrom.json.
    """
    return _dispatch.launch_plan(
        _dispatch.tile("nystrom", kernel, chip, width, itemsize), chip=chip, rows=landmarks, tokens=tokens,
        batch_heads=batch_heads, sliced=kernel not in ("read_fwd", "token_bwd"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KeyWalk:
    """How `nystrom_pool_values_fwd_kernel` goes over the keys."""

    plan: Plan
    group: int
    """Cells of a tile."""
    length: int
    """Tokens of each of them in a tile."""
    cell_size: int
    """Most tokens of a cell."""
    slice_length: int
    """Cells of a slice."""
    slices: int


def has_walk(chip: Chip, width: int, itemsize: int) -> bool:
    """Whether `nystrom_pool_values_fwd_kernel` has a tile: not on AMD, nor for 16-bit heads wider than 64."""
    if not chip.arch.startswith("sm_"):
        return False
    table = _dispatch.load_configs("nystrom")["pool_values_fwd"]
    entries = table[_dispatch.nearest_arch(chip.arch, tuple(table))]
    return any(entry["itemsize"] == itemsize and entry["width"] >= _dispatch.block(width) for entry in entries)


def key_walk(
    cells: Cells, *, ranked: bool, chip: Chip, landmarks: int, width: int, itemsize: int, tokens: int, batch_heads: int
) -> KeyWalk | None:
    """A walk cell by cell, which makes K~ of the first attention's read of the keys; None where two reads are better.

    They are where the walk has no tile, or a smaller one and so more reads; where too few cells are there to fill the
    chip; and where tiles would be filled badly, as with small cells, or with blocks that do not divide the axes of a
    volume and so share whole planes of tokens. `ranked`: cells are cut over the real tokens.
    """
    if not has_walk(chip, width, itemsize):
        return None
    plan, apart = (
        launch_plan(
            kernel, chip=chip, landmarks=landmarks, width=width, itemsize=itemsize, tokens=tokens,
            batch_heads=batch_heads,
        ) for kernel in ("pool_values_fwd", "values_fwd")
    )  # fmt: skip
    divide = all(g % number == 0 for g, number in zip(cells.grid, cells.landmark_grid, strict=True)) and not ranked
    if -(-landmarks // plan.block_m) > -(-landmarks // apart.block_m) or not (divide or cells.sequence):
        return None
    size = -(-math.prod(cells.grid) // cells.count) + (not divide)  # a cell may reach over both its ends
    group = 1
    while group <= plan.block_n:
        length = plan.block_n // group
        places = -(-size // length) * length * cells.count
        groups = -(-cells.count // group)
        if places <= _MOST_PLACES * math.prod(cells.grid) and groups >= plan.slices:
            slice_length = -(-groups // plan.slices) * group
            return KeyWalk(
                plan=plan, group=group, length=length, cell_size=size, slice_length=slice_length,
                slices=-(-cells.count // slice_length) + (cells.prefix > 0),
            )  # fmt: skip
        group *= 2
    return None


def inverse_tile(chip: Chip) -> dict[str, int]:
    """The tile of `nystrom_products_kernel`."""
    table = _dispatch.load_configs("nystrom")["products"]
    return table[_dispatch.nearest_arch(chip.arch, tuple(table))][0]


def one_program(chip: Chip, landmarks: int, batch_heads: int) -> bool:
    """Whether each head's pseudo-inverse is one program; otherwise, batched products on the whole chip.

    One program of 256 landmarks does 2.4 GFLOP of tf32 in six steps: about a millisecond of one multiprocessor, whether
    one head is there or one for each of them. Batched products cost some 50 launches, and share the FLOP out. So few
    heads of more than 128 landmarks (an eighth of that work) go by launches. Counted, not measured. Not on AMD, where
    the barrier that the products rely on has been read in no manual, and tested on no chip.
    """
    if not chip.arch.startswith("sm_"):
        return False
    return landmarks <= 128 or (landmarks <= 256 and 2 * batch_heads >= chip.units)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one launch does: operations, exponentials, and bytes to and from memory (rows of landmarks, and
    matrices of landmarks by landmarks, are not counted: they stay in the cache)."""

    flop: int
    exponentials: int
    bytes: int


def costs(
    *, chip: Chip, batch_heads: int, tokens: int, landmarks: int, width: int, itemsize: int, iterations: int = 6
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass over N = S = `tokens`, Dv = D, without a convolution."""

    def plan(kernel: str) -> Plan:
        return launch_plan(
            kernel, chip=chip, landmarks=landmarks, width=width, itemsize=itemsize, tokens=tokens,
            batch_heads=batch_heads,
        )  # fmt: skip

    rows = batch_heads * tokens
    tensor, product = rows * width * itemsize, 2 * rows * landmarks * width
    partial = batch_heads * landmarks * (width + 1) * 4
    values_plan, landmark_plan = plan("values_fwd"), plan("landmark_bwd")
    values_passes, landmark_passes = (-(-landmarks // p.block_m) for p in (values_plan, landmark_plan))
    walk = key_walk(
        Cells(grid=(1, 1, tokens), landmark_grid=(1, 1, landmarks)), ranked=False, chip=chip, landmarks=landmarks,
        width=width, itemsize=itemsize, tokens=tokens, batch_heads=batch_heads,
    )  # fmt: skip
    slices = (walk or values_plan).slices
    values_slices = slices * 2 + 1 if slices > 1 else 1
    exponentials = rows * landmarks
    return {
        "pool": Cost(flop=4 * rows * width, exponentials=0, bytes=tensor if walk else 2 * tensor),
        "values_fwd": Cost(
            flop=2 * product, exponentials=exponentials, bytes=values_passes * 2 * tensor + values_slices * partial
        ),
        "inverse": Cost(flop=8 * iterations * batch_heads * landmarks**3, exponentials=0, bytes=0),
        "read_fwd": Cost(flop=2 * product, exponentials=exponentials, bytes=2 * tensor + rows * 4),
        "delta": Cost(flop=2 * rows * width, exponentials=0, bytes=2 * tensor + rows * 4),
        "landmark_bwd": Cost(
            flop=7 * product,
            exponentials=2 * exponentials,
            bytes=landmark_passes * (4 * tensor + 8 * rows) + 6 * landmark_plan.slices * partial,
        ),
        "token_bwd": Cost(flop=7 * product, exponentials=2 * exponentials, bytes=7 * tensor + 8 * rows),
    }
