"""Disentangled attention: what is compiled and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import WIDTHS, Case, Cost, Family, Floor
from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, block
from medformer_kernels.disentangled import fused
from medformer_kernels.disentangled.tables import Inputs
from medformer_kernels.disentangled.tiles import BLOCK_X, LINES

__all__ = ["FAMILY"]

# AMD GPUs and wider float32 take PyTorch: what was tried there spilled.
_ARCHS = ("sm_80", "sm_90", "sm_100")


def cases(*, widths: tuple[int, ...] = WIDTHS) -> Iterator[Case]:
    """B=1 H=8, c2c + c2p + p2c: a grid with everything on, ones of longer lines, buckets."""

    def case(name: str, width: int, dtype: torch.dtype, grid: tuple[int, ...], full: bool) -> Case:
        tokens, columns = (grid[0] * grid[1] * grid[2], sum(grid)) if grid else (4096, 512)
        x = torch.empty(1, 8, tokens, width, dtype=dtype, device="meta")
        table = torch.empty(1, 8, tokens, columns, dtype=dtype, device="meta")
        lse = torch.empty(1, 8, tokens, device="meta")
        buckets = None if grid else torch.empty(2 * tokens - 1, dtype=torch.int32, device="meta")
        mask = torch.empty(1, tokens, dtype=torch.bool, device="meta") if full else None
        seed = torch.empty((), dtype=torch.int64, device="meta") if full else None
        settings = ([0, *grid] if grid else [], 0.07, full, 0.1 if full else 0.0, 0)
        inputs = Inputs(x, x, x, table, table, buckets, mask, seed, *settings)

        def backward() -> None:
            fused.backward(inputs, x, lse, x, lse if full else None)

        return Case(
            name=f"{name} D={width} {str(dtype)[6:]}",
            width=width,
            dtype=dtype,
            launches={
                "fwd": lambda: fused.forward(inputs),
                "dq": backward,
                "dkv": backward,
            },
            archs=_ARCHS,
        )

    for width in widths:
        for dtype in (torch.bfloat16, torch.float32) if width == 64 else (torch.bfloat16,):
            yield case("grid 32^3", width, dtype, (32, 32, 32), False)
            yield case("grid 32^3 causal mask dropout", width, dtype, (32, 32, 32), True)
            yield case("grid 16x16x64", width, dtype, (16, 16, 64), False)
            yield case("grid 8x8x200", width, dtype, (8, 8, 200), False)
            yield case("buckets", width, dtype, (), False)


def costs(*, chip: Chip, batch_heads: int, grid: tuple[int, int, int], width: int, itemsize: int) -> dict[str, Cost]:
    """Cost by kernel over a grid with c2c, c2p and p2c; products with constant matrices included."""
    gz, gy, gx = grid
    tokens, columns = gz * gy * gx, sum(-(-g // 16) * 16 for g in grid)
    pair = 2 * batch_heads * tokens * tokens
    bias = LINES + min(block(gx), BLOCK_X)  # of the table walked over: by line, by x
    launches = fused.dkv_launches(width)
    # (products of a head's width, launches, tensors of the own tokens): read and written once
    work = {"fwd": (2, 1, 3), "dq": (3, 1, 5), "dkv": (3 + len(launches), len(launches), 5)}
    result = {}
    for kernel, (products, times, tensors) in work.items():
        own = tensors * width * itemsize + columns * (itemsize if kernel == "fwd" else itemsize + 4)
        tile = _dispatch.tile("disentangled", kernel, chip, width, itemsize)
        # A head is walked over once for each wave of programs: within one all read the same tiles, from the cache.
        programs = batch_heads * -(-tokens // tile["block_m"])
        waves = -(-programs // (2 * chip.units))
        walked = times * waves * (2 * width + columns) * itemsize
        result[kernel] = Cost(
            flop=pair * (products * width + times * bias),
            exponentials=times * pair // 2,
            bytes=tokens * (batch_heads * own + walked),
        )
    return result


def floors() -> Iterator[Floor]:
    """B=1 H=8 32^3 tokens D=64 bf16 on an H200, c2c + c2p + p2c."""
    grid, heads, width = (32, 32, 32), 8, 64
    tokens = 32**3
    by_kernel = costs(chip=TARGETS["sm_90"].chip, batch_heads=heads, grid=grid, width=width, itemsize=2)
    row = heads * tokens * width * 2
    table = heads * tokens * 96 * 2
    passes = {
        "forward": (("fwd",), 4 * row + 2 * table),  # q k v, out; T U
        "backward": (("dq", "dkv"), 8 * row + 4 * table),  # q k v out dout, dq dk dv; T U dT dU
    }
    for direction, (kernels, least) in passes.items():
        yield Floor.of(
            "disentangled B1 H8 32^3 D64 c2c c2p p2c bf16", direction, (by_kernel[kernel] for kernel in kernels), least
        )


FAMILY = Family(cases=cases, floors=floors)
