"""Adds the tables of `tables` to a block of scores, and takes their gradients from it: no index of N x N, no atomics.

A block is some query rows of one head against keys 0..n. `t` is (rows, columns) of those queries, `u` of all keys:
(S, buckets) or (columns of the grid, S), as each reads it best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.disentangled.tables import Grid

__all__ = ["BucketBias", "GridBias", "NoBias"]


@dataclass(frozen=True, kw_only=True)
class NoBias:
    """Content and absolute positions only."""

    queries: int
    columns_first: ClassVar[bool] = False
    """Whether `u` is (columns, S)."""
    most_rows: ClassVar[int] = 128
    """Of a block."""
    keys_first: ClassVar[bool] = False
    """Whether a block of scores is stored key by key."""

    def blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Query rows that are done together, about `rows` of them."""
        for start in range(0, self.queries, rows):
            yield start, min(start + rows, self.queries)

    def keys_below(self, stop: int) -> int:
        """Keys to compute where only those before `stop` count."""
        return stop

    def block(self, start: int, rows: int, keys: int) -> Any:
        """What `add` and `take` need of a block, the same for all heads."""

    def add(self, s: Tensor, t: Tensor | None, u: Tensor | None, block: Any) -> None:
        """s (rows, keys) += bias."""

    def take(self, ds: Tensor, dt: Tensor | None, du: Tensor | None, block: Any) -> None:
        """dt = and du += the gradients of the tables for ds (rows, keys)."""


class _BucketBlock(NamedTuple):
    low: int
    """Keys before this one take the bucket `before`."""
    high: int
    """Keys from this one on take the bucket `behind`."""
    before: int
    behind: int
    index: Tensor
    """(high - low, rows): the bucket of each pair between, by key."""
    diagonals: Tensor
    """(high - low + rows - 1,): the bucket of each distance between, falling."""


class _GridBlock(NamedTuple):
    prefix: bool
    """The queries are prefix tokens."""
    x: slice
    """Columns of u for the x of a line's queries."""
    z: Tensor
    """Column of u for the z of each line of queries."""
    y: Tensor


@dataclass(frozen=True, kw_only=True)
class BucketBias(NoBias):
    """bias(i, j) = T[i, buckets[i - j + S - 1]] + U[j, buckets[i - j + S - 1]].

    Far keys, whose distances all fall into the first or the last run of equal buckets, take one column of the tables.
    """

    buckets: Tensor
    """(N + S - 1,) int64"""
    first_run: int
    """Equal entries at the start of `buckets`."""
    last_run: int
    windows: Tensor
    """(distances, most_rows): the buckets from each distance between the runs on, the last distance first."""
    keys_first: ClassVar[bool] = True
    most_rows: ClassVar[int] = 64  # at 128 the diagonals of a block fall onto the same cache lines

    @classmethod
    def of(cls, queries: int, buckets: Tensor) -> BucketBias:
        changes = (buckets[1:] != buckets[:-1]).nonzero().flatten()
        first, last = len(buckets), len(buckets)
        if len(changes):
            first, last = int(changes[0]) + 1, len(buckets) - 1 - int(changes[-1])
        between = slice(max(0, first - cls.most_rows + 1), len(buckets) - last)
        windows = F.pad(buckets, (0, cls.most_rows - 1)).unfold(0, cls.most_rows, 1)[between].flip(0)
        return cls(queries=queries, buckets=buckets, first_run=first, last_run=last, windows=windows)

    def block(self, start: int, rows: int, keys: int) -> _BucketBlock:
        all_keys = len(self.buckets) + 1 - self.queries
        low = min(keys, max(0, start - self.queries + self.last_run + 1))
        high = min(keys, max(low, start + rows + all_keys - 1 - self.first_run))
        # Entry e of `buckets` is distance e - (S - 1); key j and row r are start + r - j apart.
        first = start + all_keys - 1
        skipped = len(self.buckets) - self.last_run - 1 - first
        index = self.windows[skipped + low : skipped + high, :rows]
        diagonals = self.buckets[first - high + 1 : first - low + rows].flip(0)
        return _BucketBlock(low, high, int(self.buckets[-1]), int(self.buckets[0]), index, diagonals)

    def add(self, s: Tensor, t: Tensor | None, u: Tensor | None, block: _BucketBlock) -> None:
        low, high, before, behind, index, diagonals = block
        by_key = s.mT
        if t is not None:
            by_key[:low] += t[:, before]
            by_key[high:] += t[:, behind]
            # A row of T by distance, then its diagonals: no gather. The last query comes first, so that strides rise.
            rows = len(t)
            by_distance = t.flip(0).mT.contiguous().index_select(0, diagonals)
            by_key[low:high] += by_distance.as_strided((high - low, rows), (rows, rows + 1)).flip(1)
        if u is not None:
            by_key[:low] += u[:low, before, None]
            by_key[low:high] += u[low:high].gather(1, index)
            by_key[high:] += u[high : len(by_key), behind, None]

    def take(self, ds: Tensor, dt: Tensor | None, du: Tensor | None, block: _BucketBlock) -> None:
        low, high, before, behind, index, diagonals = block
        by_key = ds.mT
        if dt is not None:
            rows = len(dt)
            by_distance = ds.new_zeros(len(diagonals), rows)
            by_distance.as_strided((high - low, rows), (rows, rows + 1)).copy_(by_key[low:high].flip(1))
            by_bucket = ds.new_zeros(dt.shape[1], rows).index_add_(0, diagonals, by_distance)
            by_bucket[before] += by_key[:low].sum(0).flip(0)
            by_bucket[behind] += by_key[high:].sum(0).flip(0)
            dt.copy_(by_bucket.mT.flip(0))
        if du is not None:
            du[low:high].scatter_add_(1, index, by_key[low:high])
            du[:low, before] += by_key[:low].sum(1)
            du[high : len(by_key), behind] += by_key[high:].sum(1)


@dataclass(frozen=True, kw_only=True)
class GridBias(NoBias):
    """Sums over an axis or broadcasts along it, for whole rows of x (or part of one)."""

    grid: Grid
    columns_first: ClassVar[bool] = True

    def blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        p, width = self.grid.prefix, self.grid.size[2]
        if p:
            yield 0, p
        if width <= rows:
            whole = rows // width * width
            for start in range(p, self.queries, whole):
                yield start, min(start + whole, self.queries)
            return
        for row in range(p, self.queries, width):
            for start in range(row, row + width, rows):
                yield start, min(start + rows, row + width)

    def keys_below(self, stop: int) -> int:
        plane = self.grid.size[1] * self.grid.size[2]
        return self.grid.prefix + max(-(-(stop - self.grid.prefix) // plane), 0) * plane

    def _volume(self, s: Tensor) -> Tensor:
        """(rows, z, y, x) of the keys on the grid."""
        return s[:, self.grid.prefix :].unflatten(1, (-1, *self.grid.size[1:]))

    def block(self, start: int, rows: int, keys: int) -> _GridBlock:
        _, gy, gx = self.grid.size
        first_z, first_y, first_x = self.grid.offsets
        first = start - self.grid.prefix
        line = torch.arange(max(first, 0) // gx, (max(first, 0) + rows - 1) // gx + 1)
        x = first_x + first % gx
        return _GridBlock(first < 0, slice(x, x + min(gx, rows)), first_z + line // gy, first_y + line % gy)

    def add(self, s: Tensor, t: Tensor | None, u: Tensor | None, block: _GridBlock) -> None:
        p, (first_z, first_y, first_x) = self.grid.prefix, self.grid.offsets
        volume, keys = self._volume(s), s.shape[1]
        if t is not None:
            s[:, :p] += t[:, :p]
            volume += t[:, first_z : first_z + volume.shape[1], None, None]
            volume += (t[:, first_y:first_x, None] + t[:, None, first_x:]).unsqueeze(1)
        if u is None:
            return
        u = u[:, :keys]
        if block.prefix:
            s += u[:p]
            return
        lines = s.unflatten(0, (len(block.z), -1))
        lines += u[block.x]
        lines += (u[block.z] + u[block.y]).unsqueeze(1)

    def take(self, ds: Tensor, dt: Tensor | None, du: Tensor | None, block: _GridBlock) -> None:
        p, (first_z, first_y, first_x) = self.grid.prefix, self.grid.offsets
        volume, keys = self._volume(ds), ds.shape[1]
        if dt is not None:
            planes = volume.shape[1]
            dt[:, :p] = ds[:, :p]
            dt[:, first_z : first_z + planes] = volume.flatten(2).sum(2)
            dt[:, first_z + planes : first_y] = 0
            plane = volume.sum(1)
            dt[:, first_y:first_x] = plane.sum(2)
            dt[:, first_x:] = plane.sum(1)
        if du is None:
            return
        du = du[:, :keys]
        if block.prefix:
            du[:p] += ds
            return
        lines = ds.unflatten(0, (len(block.z), -1))
        du[block.x] += lines.sum(0)
        by_line = lines.sum(1)
        du.index_add_(0, block.z.to(du.device), by_line)
        du.index_add_(0, block.y.to(du.device), by_line)
