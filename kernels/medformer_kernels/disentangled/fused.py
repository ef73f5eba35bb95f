"""Launches of the kernels of disentangled attention: tiles, tables, and the bytes and FLOP they come to.

Tested in Triton's interpreter (float32, float16) and compiled ahead of time for every tile shipped
(`benchmarks/compile_report.py`). Not yet run on a GPU.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medformer_kernels import _dispatch
from medformer_kernels._dispatch import Chip, block, chip_of, mask_arguments
from medformer_kernels.disentangled.dropout import threshold
from medformer_kernels.disentangled.kernels import (
    disentangled_dkv_kernel,
    disentangled_dq_kernel,
    disentangled_fwd_kernel,
)
from medformer_kernels.disentangled.tiles import BLOCK_X, LINES

__all__ = ["Cost", "backward", "costs", "forward"]


# Own tokens of a program at most where tables are gathered: more spill.
_BUCKET_ROWS = 128


def _dkv_launches(width: int) -> tuple[str, ...]:
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


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What all three launches share."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: _Tables
    buckets: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    grid: list[int]
    scale: float
    causal: bool
    dropout: float
    offset: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Q to SEED; a tensor that is not there is never read."""
        t, u = (self.q if x is None else x for x in (self.tables.t, self.tables.u))
        return (
            self.q, self.k, self.v, t, u, self.q if self.buckets is None else self.buckets,
            mask_arguments(self.mask, self.q)[0], self.q if self.seed is None else self.seed,
        )  # fmt: skip

    def strides(self, *others: Tensor) -> tuple[int, ...]:
        made: list[int] = []
        for x in (self.q, self.k, self.v, *others):
            made += x.stride()
        return (*made, *mask_arguments(self.mask, self.q)[1:])

    def launch(self, kernel: str) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        """(programs, whole-number arguments, constants) of 'fwd', 'dq' or 'dkv'."""
        batch, heads, queries, width = self.q.shape
        keys, width_v = self.v.shape[2:]
        gridded = bool(self.grid) and (self.tables.t is not None or self.tables.u is not None)
        entry = _dispatch.tile("disentangled", kernel, chip_of(self.q), max(width, width_v), self.q.element_size())
        own, walk = entry["block_m"], entry["block_n"]
        if self.buckets is not None:
            own = min(own, _BUCKET_ROWS)
        own_tokens, walk_tokens = (keys, queries) if kernel == "dkv" else (queries, keys)
        gy, gx, lines, own_lines, block_x, walk_part = 1, 1, 1, 1, 16, False
        if gridded:
            gy, gx = self.grid[2:]
            lines = self.grid[1] * gy
            walk = min(walk, block(gx))  # no more than a line
            walk_part = gx > walk
            block_x = min(block(gx), BLOCK_X, own)
            own_lines = min(LINES, own // min(gx, block_x))
            own_tiles = -(-lines // own_lines) * -(-gx // block_x)
            walk_tiles = lines * -(-gx // walk)
        else:
            own_tiles, walk_tiles = -(-own_tokens // own), -(-walk_tokens // walk)
        starts = self.tables.starts if len(self.tables.starts) == 3 else (0, 0, 0)
        numbers = (
            heads, queries, keys, self.tables.columns // 16, starts[1] // 16, starts[2] // 16, gy, gx,
            lines, own_lines, own_tiles, walk_tiles, self.offset, threshold(self.dropout),
            1 / (1 - self.dropout), self.scale,
        )  # fmt: skip
        constants = {
            "W": width, "DV": width_v, "BLOCK_M": own, "BLOCK_N": walk, "BLOCK_D": block(width),
            "BLOCK_DV": block(width_v), "BLOCK_X": block_x, "GRID": gridded, "WALK_PART": walk_part,
            "BUCKET": self.buckets is not None, "HAS_T": self.tables.t is not None,
            "HAS_U": self.tables.u is not None, "HAS_MASK": self.mask is not None, "CAUSAL": self.causal,
            "DROPOUT": self.dropout > 0,
            "PRECISION": "ieee",  # float32 as three tf32 products spills whatever the tile
            "num_warps": entry["num_warps"], "num_stages": entry["num_stages"],
        }  # fmt: skip
        return batch * heads * own_tiles, numbers, constants


def _call(
    q: Tensor, k: Tensor, v: Tensor, t: Tensor | None, u: Tensor | None, buckets: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, grid: list[int], scale: float, causal: bool, dropout: float, offset: int,
) -> _Call:  # fmt: skip
    assert not grid or grid[0] == 0, "prefix tokens are attended to outside of the kernels"
    return _Call(
        q=q, k=k, v=v, tables=_Tables.of(t, u, grid), buckets=None if buckets is None else buckets.int().contiguous(),
        mask=mask, seed=seed, grid=grid, scale=scale, causal=causal, dropout=dropout, offset=offset,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """(out, lse): see `ops.disentangled_forward`."""
    call = _call(q, k, v, *arguments)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    programs, numbers, constants = call.launch("fwd")
    disentangled_fwd_kernel[(programs,)](*call.tensors(), out, lse, *call.strides(), *numbers, **constants)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, t: Tensor | None, u: Tensor | None, buckets: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dt, du): see `ops.disentangled_backward`."""
    call = _call(q, k, v, t, u, buckets, mask, seed, *settings)
    tables = call.tables
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dt, du = (
        None if x is None else x.new_zeros((*x.shape[:3], tables.columns), dtype=torch.float32)
        for x in (tables.t, tables.u)
    )
    programs, numbers, constants = call.launch("dq")
    disentangled_dq_kernel[(programs,)](
        *call.tensors(), out, lse, dout, lse if dlse is None else dlse.contiguous(), delta, dq,
        delta if dt is None else dt, *call.strides(dout), *numbers, HAS_DLSE=dlse is not None, **constants,
    )  # fmt: skip
    programs, numbers, constants = call.launch("dkv")
    for outputs in _dkv_launches(max(q.shape[3], v.shape[3])):
        disentangled_dkv_kernel[(programs,)](
            *call.tensors(), lse, dout, delta, dk, dv, delta if du is None else du, *call.strides(dout), *numbers,
            HAS_DK="k" in outputs, HAS_DV="v" in outputs, **constants,
        )  # fmt: skip
    return dq, dk, dv, tables.unpacked(dt, t), tables.unpacked(du, u)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one launch does: operations on the matrix units, exponentials, bytes to and from memory."""

    flop: int
    exponentials: int
    bytes: int


def costs(
    *, chip: Chip, batch_heads: int, grid: tuple[int, int, int], width: int, itemsize: int
) -> dict[str, Cost]:  # fmt: skip
    """Cost by kernel over a grid with c2c, c2p and p2c; products with constant matrices included."""
    gz, gy, gx = grid
    tokens, columns = gz * gy * gx, sum(-(-g // 16) * 16 for g in grid)
    pair = 2 * batch_heads * tokens * tokens
    bias = LINES + min(block(gx), BLOCK_X)  # of the table walked over: by line, by x
    launches = _dkv_launches(width)
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
