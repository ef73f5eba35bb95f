"""Which tiles the kernels of the inner block run with, and whether any holds a shape at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, Plan, block

__all__ = ["KERNELS", "OUTER_KERNELS", "TilePlan", "fits", "launch_plan"]

KERNELS = ("fwd", "mlp_dx", "mlp_dw", "attn_dx", "attn_dw")
OUTER_KERNELS = ("outer_fwd", "outer_dx", "outer_dw")
"""Of the step from inner to outer tokens, whose rows are windows."""
# Whose tiles hold whole sequences; those of the others are any rows.
_BY_SEQUENCE = ("fwd", "attn_dx", "attn_dw")


@dataclass(frozen=True, kw_only=True)
class TilePlan(Plan):
    """Tiles of one launch: `block_r` rows that hold `per_tile` sequences, `block_f` channels of the MLP at a time.

    Slices, of tiles, are there where programs share out weights.
    """

    block_r: int
    block_f: int
    per_tile: int
    tiles: int
    programs: int
    """Where programs share out tiles: how many; each walks over tiles / programs of them."""
    split: bool
    """Whether 'fwd', 'attn_dx' or 'attn_dw' takes two launches for its two halves."""


def _entry(kernel: str, chip: Chip, tokens: int, width: int, head: int, itemsize: int) -> dict[str, Any] | None:
    table = _dispatch.load_configs("tnt").get(kernel, {})
    # Tiles are cut to the registers of one generation (sm_80 and sm_86, not sm_90): on another they may spill.
    known = tuple(arch for arch in table if arch[:-1] == chip.arch[:-1])
    if not known:
        return None
    fitting = [
        entry
        for entry in table[_dispatch.nearest_arch(chip.arch, known)]
        if entry["itemsize"] == itemsize
        and entry["width"] >= block(width)
        and (kernel not in _BY_SEQUENCE or (entry["head"] >= block(head) and entry["block_r"] >= tokens))
    ]

    def cost(entry: dict[str, Any]) -> tuple[float, int, int]:
        """Rows computed for each that is kept, then how much wider than needed."""
        rows = entry["block_r"]
        filled = rows // tokens * tokens / rows if kernel in _BY_SEQUENCE else 1.0
        # Twice the rows are twice the masked scores: worth it only where they fill a tile better by a quarter.
        return rows**0.3219 / filled, entry["width"], entry["head"]

    return min(fitting, key=cost, default=None)


def fits(chip: Chip, tokens: int, width: int, head: int, itemsize: int, kernels: tuple[str, ...] = KERNELS) -> bool:
    """Whether each of `kernels` has a tile for sequences of `tokens` of `width`, heads of `head`."""
    return all(_entry(kernel, chip, tokens, width, head, itemsize) for kernel in kernels)


def launch_plan(
    kernel: str, *, chip: Chip, sequences: int, tokens: int, width: int, head: int, parts: int, itemsize: int
) -> TilePlan:
    """How a kernel of `KERNELS` is launched.

    `parts` of the weights have programs of their own in 'attn_dw': the heads. In 'mlp_dw' and 'outer_dw' it is the
    width of the MLP or the outer token, whose parts are those of `block_f`. Deterministic; tiles come from
    configs/tnt.json.
    """
    entry = _entry(kernel, chip, tokens, width, head, itemsize)
    assert entry is not None  # `fits` was asked
    rows = entry["block_r"]
    if kernel in ("mlp_dw", "outer_dw"):
        parts = -(-parts // entry["block_f"])
    if kernel in _BY_SEQUENCE:
        per_tile = rows // tokens
        tiles = -(-sequences // per_tile)
    else:
        per_tile, tiles = 0, -(-sequences * tokens // rows)
    slice_length, slices = _dispatch.cut(tiles, 1, _dispatch.parts_for(chip, parts))
    return TilePlan(
        block_r=rows,
        block_f=entry["block_f"],
        num_warps=entry["num_warps"],
        num_stages=entry["num_stages"],
        per_tile=per_tile,
        tiles=tiles,
        # Several times what a multiprocessor holds: programs that do not fill the last round cost a part of a round.
        programs=min(tiles, chip.units * max(1, 64 // entry["num_warps"])),
        split=entry.get("split", False),
        slice_length=slice_length,
        slices=slices,
    )
