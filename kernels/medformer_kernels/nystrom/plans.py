"""How the Nystrom kernels are cut up: tiles and slices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import AttentionPlan, Chip
from medformer_kernels.nystrom.landmarks import Cells

__all__ = ["KeyWalk", "has_walk", "inverse_tile", "key_walk", "launch_plan", "one_program"]

# Places in tiles that the walk over cells may take for a token; above that two reads of the keys are the better choice.
_MOST_PLACES = 1.25


def launch_plan(
    kernel: str, *, chip: Chip, landmarks: int, width: int, itemsize: int, tokens: int, batch_heads: int
) -> AttentionPlan:
    """How `kernel` ('values_fwd', 'pool_values_fwd', 'read_fwd', 'landmark_bwd', 'token_bwd') is launched.

    `width` is the larger of D and Dv. Deterministic; the tiles come from configs/nystrom.json.
    """
    entry = _dispatch.tile("nystrom", kernel, chip, width, itemsize)
    shape = {"rows": landmarks, "tokens": tokens, "batch_heads": batch_heads}
    return _dispatch.launch_plan(entry, chip=chip, **shape, sliced=kernel not in ("read_fwd", "token_bwd"))


@dataclass(frozen=True)
class KeyWalk:
    """How `nystrom_pool_values_fwd_kernel` goes over the keys."""

    plan: AttentionPlan
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
    entries = _dispatch.tiles("nystrom", "pool_values_fwd", chip)
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
    shape = {"landmarks": landmarks, "width": width, "itemsize": itemsize, "tokens": tokens, "batch_heads": batch_heads}
    plan, apart = (launch_plan(kernel, chip=chip, **shape) for kernel in ("pool_values_fwd", "values_fwd"))
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
            slices = -(-cells.count // slice_length) + (cells.prefix > 0)
            return KeyWalk(plan, group, length, size, slice_length, slices)
        group *= 2
    return None


def inverse_tile(chip: Chip) -> dict[str, int]:
    """The tile of `nystrom_products_kernel`."""
    return _dispatch.tiles("nystrom", "products", chip)[0]


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
