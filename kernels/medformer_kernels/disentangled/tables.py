"""The relative terms as small tables, T of the queries and U of the keys.

With delta = i - j by axis, L_i and M_j the vectors that meet the position tables and E_a the product of the tables:

    bias(i, j) = sum over columns c of j: T[i, c]  +  sum over columns c of i: U[j, c]
    T[i, (a, c)] = L_i . rel_k_a[coord_a(i) - c] + E_a[coord_a(i) - c]      U[j, (a, c)] = M_j . rel_q_a[c - coord_a(j)]

A token of the grid has three columns, (z, y, x); a prefix token has one of its own. For buckets along a sequence
bias(i, j) = T[i, bucket(i - j)] + U[j, bucket(i - j)]. Plain differentiable PyTorch, matrix products only: the
gradients of the position tables are deterministic wherever matrix products are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.disentangled.terms import Weights

__all__ = ["Grid", "Inputs", "Operands", "operands"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Tokens of a volume, x fastest, behind `prefix` tokens without a position."""

    size: tuple[int, int, int]
    """(gz, gy, gx)"""
    prefix: int

    @property
    def inner(self) -> int:
        return math.prod(self.size)

    @property
    def offsets(self) -> tuple[int, int, int]:
        """First column of each axis."""
        return self.prefix, self.prefix + self.size[0], self.prefix + self.size[0] + self.size[1]

    @property
    def columns(self) -> int:
        return self.prefix + sum(self.size)

    def coordinates(self, device: torch.device) -> Tensor:
        """(3, tokens of the grid) int64."""
        return torch.stack(torch.meshgrid(*(torch.arange(g, device=device) for g in self.size), indexing="ij")).flatten(
            1
        )

    def one_hot(self, like: Tensor) -> Tensor:
        """(prefix + tokens, columns): 1 in every column of a token."""
        # Compared, not F.one_hot, which ONNX fixes to the size at hand.
        parts = [
            (c[:, None] == torch.arange(g, device=like.device)).to(torch.int64)
            for c, g in zip(self.coordinates(like.device), self.size, strict=True)
        ]
        inner = F.pad(torch.cat(parts, -1), (self.prefix, 0))
        own = F.pad(torch.eye(self.prefix, device=like.device, dtype=inner.dtype), (0, sum(self.size)))
        return torch.cat((own, inner)).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What every implementation computes: softmax(scale (q k^T + bias of t and u)) v."""

    q: Tensor
    """(B, H, N, W); with absolute positions W may be wider than a head."""
    k: Tensor
    t: Tensor | None
    """(B, H, N, columns or buckets)"""
    u: Tensor | None
    """(B, H, S, columns or buckets)"""


@dataclass(frozen=True)
class Inputs:
    """The arguments of the operators, as their implementations take them: see `ops.disentangled_forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    t: Tensor | None
    u: Tensor | None
    buckets: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    grid: list[int]
    scale: float
    causal: bool
    dropout: float
    offset: int


def operands(
    q: Tensor,
    k: Tensor,
    weights: Weights,
    *,
    rel_k: list[Tensor] | None,
    rel_q: list[Tensor] | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    prefix_k: Tensor | None,
    prefix_q: Tensor | None,
    grid: Grid | None,
) -> Operands:
    """All chosen terms as one dot product and two tables. rel_*: (H, 2g - 1, D) by axis, or one of (H, R, D)."""
    left = _weighted((q, weights.cp if rel_k else 0), (pos_q, weights.pp if rel_k else 0))
    right = _weighted((k, weights.pc if rel_q else 0), (pos_k, weights.pp if rel_q else 0))
    both = weights.pp if rel_k and rel_q else 0
    t = u = None
    if grid is None:
        if rel_k is not None and (left is not None or both):
            own = None if not both or rel_q is None else (rel_k[0] * rel_q[0]).sum(-1) * both
            t = _bucket_table(left, rel_k[0], own, q)
        if rel_q is not None and right is not None:
            u = _bucket_table(right, rel_q[0], None, k)
    else:
        if rel_k is not None and (left is not None or both):
            own = own_prefix = None
            if both and rel_q is not None:
                own = [(a * b).sum(-1) * both for a, b in zip(rel_k, rel_q, strict=True)]
                if prefix_k is not None and prefix_q is not None:
                    own_prefix = (prefix_k * prefix_q).sum(-1) * both
            t = _grid_table(left, rel_k, prefix_k, own, own_prefix, grid, q, keys=False)
        if rel_q is not None and right is not None:
            u = _grid_table(right, rel_q, prefix_q, None, None, grid, k, keys=True)
    q, k = _content(q, k, weights, pos_q, pos_k)
    return Operands(q=q, k=k, t=t, u=u)


def _weighted(*parts: tuple[Tensor | None, int]) -> Tensor | None:
    total = None
    for x, weight in parts:
        if x is not None and weight:
            x = x if weight == 1 else x * weight
            total = x if total is None else total + x
    return total


def _content(
    q: Tensor, k: Tensor, weights: Weights, pos_q: Tensor | None, pos_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """wcc q.k + wcp q.pk + wpc pq.k + wpp pq.pk as one dot product, no wider than it must be."""
    cc, cp, pc, pp = weights.cc, weights.cp, weights.pc, weights.pp
    if pos_k is None:
        cp = pp = 0
    if pos_q is None:
        pc = pp = 0
    if not (cc or cp or pc or pp):
        return torch.zeros_like(q), k
    if not (cp or pp):  # (cc q + pc pq) . k
        return _sum((q, cc), (pos_q, pc), like=q), k
    if not (pc or pp):  # q . (cc k + cp pk)
        return q, _sum((k, cc), (pos_k, cp), like=k)
    if cc * pp == cp * pc:  # a matrix of rank 1 is the product of a column and a row
        scale = math.gcd(cc, cp) or math.gcd(pc, pp)
        row = (cc // scale, cp // scale) if cc or cp else (pc // scale, pp // scale)
        whole = row[0] or row[1]
        column = ((cc if row[0] else cp) // whole, (pc if row[0] else pp) // whole)
        return _sum((q, column[0]), (pos_q, column[1]), like=q), _sum((k, row[0]), (pos_k, row[1]), like=k)
    first, second = _sum((q, cc), (pos_q, pc), like=q), _sum((q, cp), (pos_q, pp), like=q)
    assert pos_k is not None
    return torch.cat((first, second), -1), torch.cat((k, pos_k.expand_as(k)), -1)


def _sum(*parts: tuple[Tensor | None, int], like: Tensor) -> Tensor:
    total = _weighted(*parts)
    assert total is not None
    return total.expand_as(like)


def _bucket_table(vectors: Tensor | None, table: Tensor, own: Tensor | None, like: Tensor) -> Tensor:
    result = None if vectors is None else vectors @ table.mT
    if own is not None:
        own = own.unsqueeze(1)
        result = own if result is None else result + own
    assert result is not None
    return result.expand(*like.shape[:3], -1)


def _grid_table(
    vectors: Tensor | None,
    tables: list[Tensor],
    prefix_table: Tensor | None,
    own: list[Tensor] | None,
    own_prefix: Tensor | None,
    grid: Grid,
    like: Tensor,
    *,
    keys: bool,
) -> Tensor:
    """(B, H, tokens, columns): see the top of the file. A key looks back: its distances have the other sign."""
    batch, heads, _, _ = like.shape
    p = grid.prefix
    inner = None if vectors is None else vectors[:, :, p:].unflatten(2, grid.size)
    parts = []
    for axis, table in enumerate(tables):
        size = grid.size[axis]
        part = None
        if inner is not None:
            window = _windows((table if keys else table.flip(1)).mT, size).transpose(1, 2)  # (H, g own, D, g other)
            part = _along(inner, window, axis)
        if own is not None:
            values = _windows(own[axis].flip(1), size)  # (H, g own, g other)
            shape = [1] * 3
            shape[axis] = size
            values = values.view(heads, *shape, size)
            part = values if part is None else part + values
        assert part is not None
        parts.append(part.expand(batch, heads, *grid.size, size))
    table = torch.cat(parts, -1).flatten(2, 4)
    if p == 0:
        return table
    return _with_prefix(table, vectors, prefix_table, own_prefix, grid, keys=keys)


def _windows(x: Tensor, size: int) -> Tensor:
    """(..., 2 size - 1) to (..., size, size): entry [i, j] is x[size - 1 - i + j].

    In rows one longer than x, laid end to end, these lie at size - 1 + i (2 size - 1) + j. `unfold` is made for this,
    and ties an exported program to one size.
    """
    rows = F.pad(x, (0, 1)).unsqueeze(-2).expand(*x.shape[:-1], size, 2 * size).flatten(-2)
    rows = rows[..., size - 1 : size - 1 + size * (2 * size - 1)]
    return rows.unflatten(-1, (size, 2 * size - 1))[..., :size]


def _along(inner: Tensor, window: Tensor, axis: int) -> Tensor:
    """(B, H, z, y, x, D) times (H, g, D, g) along one axis: (B, H, z, y, x, g)."""
    if axis == 0:
        return (inner.flatten(3, 4) @ window).unflatten(3, inner.shape[3:5])
    if axis == 1:
        return inner @ window.unsqueeze(1)
    swapped = inner.permute(0, 1, 4, 2, 3, 5)
    return (swapped.flatten(3, 4) @ window).unflatten(3, inner.shape[2:4]).permute(0, 1, 3, 4, 2, 5)


def _with_prefix(
    table: Tensor, vectors: Tensor | None, prefix_table: Tensor | None, own: Tensor | None, grid: Grid, *, keys: bool
) -> Tensor:
    """Columns and rows for prefix tokens. prefix_table (H, 2, P, D): [0] for pairs whose key is the prefix token,
    [1] for pairs of a prefix query and a key of the grid."""
    p, columns = grid.prefix, sum(grid.size)
    batch, heads, inner, _ = table.shape
    if prefix_table is None:
        return F.pad(table, (p, 0, p, 0))
    zero = table.new_zeros(())

    def product(x: Tensor | None, vector: Tensor, values: Tensor | None) -> Tensor:
        result = zero if x is None else x @ vector.mT
        return result if values is None else result + values.unsqueeze(1)

    def spread(scalar: Tensor) -> Tensor:
        """A value a row into the z columns of that row: every key of the grid has exactly one."""
        return F.pad(scalar.unsqueeze(-1).expand(*scalar.shape, grid.size[0]), (0, columns - grid.size[0]))

    first = None if vectors is None else vectors[:, :, :p]
    rest = None if vectors is None else vectors[:, :, p:]
    to, off = prefix_table[:, 0], prefix_table[:, 1]
    own_to, own_off = (None, None) if own is None else (own[:, 0], own[:, 1])
    diagonal_off = zero if first is None else (first * off).sum(-1)
    if not keys:
        # rows: query; columns: key
        corner = product(first, to, own_to).expand(batch, heads, p, p)
        side = product(rest, to, own_to).expand(batch, heads, inner, p)
        scalar = (diagonal_off + (zero if own_off is None else own_off)).expand(batch, heads, p)
    else:
        # rows: key; columns: query. A prefix key is met by prefix_q[0] whoever asks.
        diagonal_to = zero if first is None else (first * to).sum(-1)
        corner = diagonal_to.unsqueeze(-1).expand(batch, heads, p, p)
        side = product(rest, off, None).expand(batch, heads, inner, p)
        scalar = diagonal_to.expand(batch, heads, p)
    top = torch.cat((corner, spread(scalar)), -1)
    return torch.cat((top, torch.cat((side, table), -1)), 2)
