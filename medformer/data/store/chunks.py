"""The chunks of a compressed array as ranges of its file: where each lies, its hash, and how it is unpacked.

With them a crop of a scan on a server is a few requests of ranges, each checked on its own. The format is blosc2's: a
chunk is a unit of compression, and holds its blocks one after the other, padded to whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.store.arrays import load_blosc2, open_array
from medformer.data.store.pieces import digest

__all__ = ["Chunked", "Grid", "table_of", "unpack"]

_WIDTH = 16  # bytes of a chunk's hash


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How an array lies in chunks."""

    shape: tuple[int, int, int]
    dtype: str
    chunks: tuple[int, int, int]
    """Voxels of a chunk."""
    blocks: tuple[int, int, int]
    """And of the blocks in it."""

    def __post_init__(self) -> None:
        sizes = (*self.shape, *self.chunks, *self.blocks)
        if len(sizes) != 9 or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(f"a grid of {self.shape}, {self.chunks} and {self.blocks} must be of three sizes each")
        if np.dtype(self.dtype).kind not in "iuf":
            raise ValueError(f"voxels of {self.dtype!r} must be numbers")

    @property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))


def table_of(path: Path) -> tuple[Grid, np.ndarray]:
    """Of a .b2nd file: its grid, and offset, length and hash (two words) of each chunk, [n, 4] uint64.

    Length 0 is a chunk of zeros, which has no bytes of its own. Raises ScanError where that does not give the array.
    """
    array = open_array(path)
    grid = Grid(
        shape=tuple(array.shape), dtype=np.dtype(array.dtype).str, chunks=tuple(array.chunks),
        blocks=tuple(array.blocks),
    )  # fmt: skip
    whole, at = path.read_bytes(), 0
    table = np.zeros((array.schunk.nchunks, 4), np.uint64)
    for number, row in enumerate(table):
        packed = array.schunk.get_chunk(number)
        found = whole.find(packed, at)
        if found >= 0:
            at = found + len(packed)
            words = np.frombuffer(bytes.fromhex(digest(packed, _WIDTH)), ">u8")
            row[:] = [found, len(packed), *words.astype(np.uint64)]
        elif np.any(unpack(packed, grid)):
            raise ScanError(f"{path.name}: chunk {number} is not found in its file; prepare the scan again")
    return grid, table


def unpack(packed: bytes, grid: Grid) -> np.ndarray:
    """The voxels of a chunk, padded to whole blocks."""
    values = np.frombuffer(load_blosc2().decompress2(packed), grid.dtype)
    counts = [-(-n // b) for n, b in zip(grid.chunks, grid.blocks, strict=True)]
    return values.reshape(*counts, *grid.blocks).transpose(0, 3, 1, 4, 2, 5).reshape(
        [n * b for n, b in zip(counts, grid.blocks, strict=True)]
    )  # fmt: skip


class Chunked:
    """An array [Z, Y, X] whose chunks are fetched when a box of it is cut.

    Args:
        fetch: offset, length and hash of some chunks to their bytes.
    """

    def __init__(
        self, grid: Grid, table: np.ndarray, fetch: Callable[[list[tuple[int, int, str]]], Sequence[bytes]]
    ) -> None:
        if table.shape != (math.prod(grid.counts), 4) or table.dtype != np.uint64:
            raise ScanError(f"a table of {table.shape} for {math.prod(grid.counts)} chunks; prepare the store again")
        self.grid, self.table, self.fetch = grid, table, fetch
        self.shape, self.dtype = grid.shape, np.dtype(grid.dtype)

    def __getitem__(self, box: Any) -> np.ndarray:
        """`box`: three slices with a step of 1, or an ellipsis."""
        slices = (slice(None),) * 3 if box is Ellipsis else box
        start, stop = zip(*(s.indices(n)[:2] for s, n in zip(slices, self.shape, strict=True)), strict=True)
        ranges = [
            range(a // c, -(-b // c)) if b > a else range(0)
            for a, b, c in zip(start, stop, self.grid.chunks, strict=True)
        ]
        places = [(z, y, x) for z in ranges[0] for y in ranges[1] for x in ranges[2]]
        rows = [self.table[np.ravel_multi_index(place, self.grid.counts)] for place in places]
        wanted = [(int(at), int(size), f"{int(a):016x}{int(b):016x}") for at, size, a, b in rows if size]
        packed = iter(self.fetch(wanted))
        out = np.zeros([max(b - a, 0) for a, b in zip(start, stop, strict=True)], self.dtype)
        for place, row in zip(places, rows, strict=True):
            if not row[1]:
                continue
            chunk = unpack(next(packed), self.grid)
            corner = [p * c for p, c in zip(place, self.grid.chunks, strict=True)]
            low = [max(a, c) for a, c in zip(start, corner, strict=True)]
            high = [min(b, c + n) for b, c, n in zip(stop, corner, self.grid.chunks, strict=True)]
            into = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            out[into] = chunk[tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))]
        return out
