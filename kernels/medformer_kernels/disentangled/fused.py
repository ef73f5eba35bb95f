"""Launches of the kernels of disentangled attention: tiles and tables.

A tile of configs/disentangled.json may say what holds for some calls only, as the compiler spills elsewhere:
`dropout_block_n`, its tokens walked over where there is dropout; `plain_stages`, its stages without dropout and causal
mask, where a line of a grid is one tile and begins at a multiple of 16 tokens; `bucket_max_registers`.

Tested in Triton's interpreter (float32, float16) and compiled ahead of time for every tile shipped
(`benchmarks/compile_report.py`). Not yet run on a GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Plan, block, chip_of
from medformer_kernels._dropout import threshold
from medformer_kernels._triton import constexprs, mask_rows, rows
from medformer_kernels.disentangled.kernels import (
    Meta,
    disentangled_dkv_kernel,
    disentangled_dq_kernel,
    disentangled_fwd_kernel,
)
from medformer_kernels.disentangled.tables import Inputs
from medformer_kernels.disentangled.tiles import BLOCK_X, LINES

__all__ = ["backward", "dkv_launches", "forward"]


# Own tokens of a program at most where tables are gathered: more spill.
_BUCKET_ROWS = 128


def dkv_launches(width: int) -> tuple[str, ...]:
    """What each launch gives: the gradients of keys ('k', with their table's) and of values ('v').

    Of wide heads the registers hold one of the two only; the second launch takes the scores' product once more.
    """
    return ("kv",) if width <= 64 else ("k", "v")


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """T and U as the kernels read them: axes from multiples of 16 numbers on, x filled up with 0 to blocks."""

    t: Tensor | None
    u: Tensor | None
    starts: tuple[int, ...]
    """First column of each axis; (0,) for buckets."""
    sizes: tuple[int, ...]
    columns: int

    @classmethod
    def of(cls, t: Tensor | None, u: Tensor | None, grid: list[int]) -> _Tables:
        either = t if t is not None else u
        sizes = tuple(grid[1:]) if grid else (0 if either is None else either.shape[3],)
        starts, end = [], 0
        for axis, size in enumerate(sizes):
            starts.append(end)
            multiple = min(block(size), BLOCK_X) if axis == 2 else 16
            end += -(-size // multiple) * multiple
        made = cls(t=None, u=None, starts=tuple(starts), sizes=sizes, columns=end)
        t, u = made._packed(t), made._packed(u)
        return cls(t=t, u=u, starts=made.starts, sizes=sizes, columns=end)

    def _packed(self, x: Tensor | None) -> Tensor | None:
        if x is None or (x.shape[3] == self.columns and x.is_contiguous() and x.data_ptr() % 16 == 0):
            return x
        packed = x.new_zeros((*x.shape[:3], self.columns))
        for start, part in zip(self.starts, x.split(self.sizes, 3), strict=True):
            packed[..., start : start + part.shape[3]] = part
        return packed

    def unpacked(self, dx: Tensor | None, like: Tensor | None) -> Tensor | None:
        """The gradient of a table, without what pads it."""
        if dx is None or like is None:
            return None
        parts = [dx[..., start : start + size] for start, size in zip(self.starts, self.sizes, strict=True)]
        return torch.cat(parts, 3).to(like.dtype)


class _Call:
    """What all three launches share."""

    def __init__(self, x: Inputs) -> None:
        assert not x.grid or x.grid[0] == 0, "prefix tokens are attended to outside of the kernels"
        self.x, self.tables = x, _Tables.of(x.t, x.u, x.grid)
        buckets = x.q if x.buckets is None else x.buckets.int().contiguous()
        t, u, seed = (x.q if y is None else y for y in (self.tables.t, self.tables.u, x.seed))
        # Q to SEED; a tensor that is not there is never read.
        self.inputs = (rows(x.q), rows(x.k), rows(x.v), t, u, buckets, mask_rows(x.mask, x.q), seed)

    def launch(self, kernel: str, **flags: bool) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        """(programs, numbers, constants) of 'fwd', 'dq' or 'dkv'."""
        x = self.x
        batch, heads, queries, width = x.q.shape
        keys, width_v = x.v.shape[2:]
        gridded = bool(x.grid) and (self.tables.t is not None or self.tables.u is not None)
        entry = _dispatch.tile("disentangled", kernel, chip_of(x.q), max(width, width_v), x.q.element_size())
        own, walk, stages = entry["block_m"], entry["block_n"], entry["num_stages"]
        if x.dropout:  # its random numbers take registers
            walk = entry.get("dropout_block_n", walk)
        if x.buckets is not None:
            own = min(own, _BUCKET_ROWS)
        own_tokens, walk_tokens = (keys, queries) if kernel == "dkv" else (queries, keys)
        if gridded:
            gy, gx = x.grid[2:]
            lines = x.grid[1] * gy
            walk = min(walk, block(gx))  # no more than a line
            block_x = min(block(gx), BLOCK_X, own)
            own_lines = min(LINES, own // min(gx, block_x))
            own_tiles = -(-lines // own_lines) * -(-gx // block_x)
        else:  # a line is a tile
            gy, gx, lines, own_lines, block_x = 1, walk, -(-walk_tokens // walk), 1, 16
            own_tiles = -(-own_tokens // own)
        aligned = gx % 16 == 0 and walk_tokens % 16 == 0
        if gridded and aligned and gx <= walk and not x.causal and not x.dropout:
            stages = entry.get("plain_stages", stages)
        starts = self.tables.starts if len(self.tables.starts) == 3 else (0, 0, 0)
        table = (self.tables.columns // 16, starts[1] // 16, starts[2] // 16)
        walks = (gy, gx, lines, own_lines, own_tiles)
        dropping = (x.offset, threshold(x.dropout), 1 / (1 - x.dropout))
        meta = Meta(
            W=width,
            DV=width_v,
            BLOCK_M=own,
            BLOCK_N=walk,
            BLOCK_D=block(width),
            BLOCK_DV=block(width_v),
            BLOCK_X=block_x,
            GRID=gridded,
            ALIGNED=aligned,
            BUCKET=x.buckets is not None,
            HAS_T=self.tables.t is not None,
            HAS_U=self.tables.u is not None,
            HAS_MASK=x.mask is not None,
            CAUSAL=x.causal,
            DROPOUT=x.dropout > 0,
            PRECISION="ieee",  # float32 as three tf32 products spills whatever the tile
            **flags,
        )
        numbers = (heads, queries, keys, *table, *walks, *dropping, x.scale)
        registers = entry.get("bucket_max_registers" if meta.BUCKET else "max_registers", entry.get("max_registers"))
        plan = Plan(num_warps=entry["num_warps"], num_stages=stages, max_registers=registers)
        return batch * heads * own_tiles, numbers, {"META": constexprs(meta), **plan.launch}


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse): see `ops.disentangled_forward`."""
    call, q = _Call(x), x.q
    out = q.new_empty((*q.shape[:3], x.v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    programs, numbers, constants = call.launch("fwd")
    disentangled_fwd_kernel[(programs,)](call.inputs, out, lse, *numbers, **constants)
    return out, lse


def backward(
    x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dt, du): see `ops.disentangled_backward`."""
    call = _Call(x)
    tables = call.tables
    delta, base = torch.empty_like(lse), torch.empty_like(lse)
    dq, dk, dv = (y.new_empty(y.shape) for y in (x.q, x.k, x.v))
    dt, du = (
        None if y is None else y.new_zeros((*y.shape[:3], tables.columns), dtype=torch.float32)
        for y in (tables.t, tables.u)
    )
    programs, numbers, constants = call.launch("dq", HAS_DLSE=dlse is not None)
    gradients = (rows(dout), lse if dlse is None else dlse.contiguous(), delta, base, dq, delta if dt is None else dt)
    disentangled_dq_kernel[(programs,)](call.inputs, out, lse, *gradients, *numbers, **constants)
    gradients = (rows(dout), delta, base, dk, dv, delta if du is None else du)
    for outputs in dkv_launches(max(x.q.shape[3], x.v.shape[3])):
        programs, numbers, constants = call.launch("dkv", HAS_DK="k" in outputs, HAS_DV="v" in outputs)
        disentangled_dkv_kernel[(programs,)](call.inputs, *gradients, *numbers, **constants)
    return dq, dk, dv, tables.unpacked(dt, x.t), tables.unpacked(du, x.u)
