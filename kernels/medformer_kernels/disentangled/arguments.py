"""Checks, and the forms of the arguments that every implementation takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from medformer_kernels._arguments import boundaries, order_hint
from medformer_kernels._dropout import seed_tensor
from medformer_kernels.disentangled.tables import Grid
from medformer_kernels.disentangled.terms import Weights, check_terms

__all__ = ["Call", "documents", "prepare"]

Fail = Callable[[str], NoReturn]


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one call, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    terms: tuple[str, ...]
    rel_k: list[Tensor] | None
    rel_q: list[Tensor] | None
    pos_q: Tensor | None
    pos_k: Tensor | None
    prefix_k: Tensor | None
    prefix_q: Tensor | None
    buckets: Tensor | None
    grid: Grid | None
    causal: bool
    mask: Tensor | None
    dropout: float
    seed: Tensor | None
    scale: float

    @property
    def weights(self) -> Weights:
        return Weights.of(self.terms)

    @property
    def positions(self) -> dict:
        """Everything about positions, by the names of `tables.operands`."""
        names = ("rel_k", "rel_q", "pos_q", "pos_k", "prefix_k", "prefix_q", "grid")
        return {name: getattr(self, name) for name in names}


def prepare(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | Sequence[Sequence[int]] | None,
    rel_k: Tensor | Sequence[Tensor] | None,
    rel_q: Tensor | Sequence[Tensor] | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    buckets: Tensor | None,
    terms: Sequence[str],
    prefix_tokens: int = 0,
    prefix_k: Tensor | None = None,
    prefix_q: Tensor | None = None,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
) -> list[Call]:
    """One call, or one a document of a packed batch; see `disentangled_attention`.

    Raises:
        ValueError: an argument does not fit the others.
    """

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{function}: {message}")

    chosen = check_terms(function, terms)
    weights = Weights.of(chosen)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape[1:]:
            fail(f"{name} has shape {tuple(x.shape)}; it must be (B, H, tokens, width), none of them 0 but B")
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            fail(f"{name} is {x.dtype} on {x.device}; q, k and v must share a floating-point dtype and a device")
    batch, heads, tokens, width = q.shape
    keys = k.shape[2]
    if k.shape != (batch, heads, keys, width):
        fail(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be (B, H, S, D) of the same B, H and D")
    if v.shape[:3] != k.shape[:3]:
        fail(f"v has shape {tuple(v.shape)}; with k {tuple(k.shape)} it must be (B, H, S, Dv) of the same B, H and S")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != (batch, keys):
            given = f"{key_padding_mask.dtype} {tuple(key_padding_mask.shape)}"
            hint = order_hint(k, key_padding_mask.shape[-1])
            fail(f"key_padding_mask is {given}; it must be bool {(batch, keys)}, True = a real key{hint}")
        if key_padding_mask.device != q.device:
            fail(f"key_padding_mask is on {key_padding_mask.device} but q is on {q.device}; move it there")
    if not 0 <= dropout < 1:
        fail(f"dropout={dropout} must be at least 0 and less than 1")
    if causal and keys != tokens:
        fail(f"causal needs as many keys as queries, not {keys} and {tokens}")
    if grid is not None and buckets is not None:
        fail("give grid, for positions by axis, or buckets, for distances along a sequence, not both")
    if prefix_tokens < 0 or (prefix_tokens and grid is None):
        fail(f"prefix_tokens={prefix_tokens} must be at least 0, and needs grid, the tokens behind them")
    if scale is not None and not math.isfinite(scale):
        fail(f"scale={scale} must be finite, or None for 1 / sqrt(D * number of terms)")

    grids = None if grid is None else _grids(grid, fail)
    cuts = boundaries(cu_seqlens, tokens, fail, empty=False)
    if grids is not None and isinstance(grid, Sequence) and isinstance(grid[0], Sequence):
        if cuts is not None:
            fail("give one grid a document, or cu_seqlens, not both")
        cuts = [0]
        for size in grids:
            cuts.append(cuts[-1] + prefix_tokens + math.prod(size))
        if cuts[-1] != tokens:
            fail(
                f"grids {grids}, each behind prefix_tokens={prefix_tokens}, hold {cuts[-1]} tokens in all, but q has "
                f"{tokens}; the two must agree"
            )
    elif grids is not None:
        if cuts is not None:
            fail("cu_seqlens does not go with a single grid; give a list of grids, one a document")
        inner = math.prod(grids[0])
        if inner + prefix_tokens != tokens:
            fail(
                f"grid={grids[0]} holds {inner} tokens, but q has {tokens} with prefix_tokens={prefix_tokens}; "
                f"the product must be {tokens - prefix_tokens}{order_hint(q, inner + prefix_tokens)}"
            )
    if (grids is not None or cuts is not None) and keys != tokens:
        fail(f"grid and cu_seqlens need as many keys as queries, not {keys} and {tokens}")

    axes = None if grids is None else [max(size[a] for size in grids) for a in range(3)]
    rel_k, rel_q = (
        _tables(name, x, axes, buckets, heads, width, fail) for name, x in (("rel_k", rel_k), ("rel_q", rel_q))
    )
    rows = [x[0].shape[1] for x in (rel_k, rel_q) if x is not None]
    if buckets is not None:
        _check_buckets(buckets, rows, tokens, keys, cuts, fail)
    for name, x, count in (("pos_q", pos_q, tokens), ("pos_k", pos_k, keys)):
        if x is not None and x.shape not in ((heads, count, width), (batch, heads, count, width)):
            wanted = (heads, count, width)
            fail(f"{name} has shape {tuple(x.shape)}; it must be (H, tokens, D) = {wanted}, or with B in front")
    for name, x, table in (("prefix_k", prefix_k, rel_k), ("prefix_q", prefix_q, rel_q)):
        if x is not None and x.shape != (heads, 2, prefix_tokens, width):
            wanted = (heads, 2, prefix_tokens, width)
            fail(f"{name} has shape {tuple(x.shape)}; it must be (H, 2, prefix_tokens, D) = {wanted}")
        if x is not None and table is None:
            fail(f"{name} needs rel_{name[-1]}, the vectors of the grid that it goes with")
    for needed, tables, absolute, side, letter in (
        (weights.key_position, rel_k, pos_k, "key", "k"),
        (weights.query_position, rel_q, pos_q, "query", "q"),
    ):
        if needed and tables is None and absolute is None:
            fail(f"terms={chosen} need a position of the {side}; give rel_{letter} or pos_{letter}, or other terms")
        if not needed and (tables is not None or absolute is not None):
            fail(f"terms={chosen} use no position of the {side}; drop rel_{letter} and pos_{letter}, or add terms")

    dtype = q.dtype
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    def cast_all(x: list[Tensor] | None) -> list[Tensor] | None:
        return None if x is None else [y.to(dtype) for y in x]

    call = Call(
        q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), terms=chosen, rel_k=cast_all(rel_k), rel_q=cast_all(rel_q),
        pos_q=_four(cast(pos_q)), pos_k=_four(cast(pos_k)), prefix_k=cast(prefix_k), prefix_q=cast(prefix_q),
        buckets=buckets, grid=None if grids is None else Grid(size=grids[0], prefix=prefix_tokens), causal=causal,
        mask=key_padding_mask, dropout=dropout, seed=seed_tensor(function, seed, q.device) if dropout > 0 else None,
        scale=(width * len(chosen)) ** -0.5 if scale is None else scale,
    )  # fmt: skip
    return [call] if cuts is None else documents(call, cuts, grids)


def documents(call: Call, cuts: list[int], grids: list[tuple[int, int, int]] | None) -> list[Call]:
    """A packed batch as a call a document; a smaller grid takes the middle rows of the tables."""
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        piece = slice(start, stop)
        grid = None
        rel_k, rel_q, buckets = call.rel_k, call.rel_q, call.buckets
        if grids is not None and call.grid is not None:
            grid = Grid(size=grids[number], prefix=call.grid.prefix)
            rel_k, rel_q = (
                None if x is None else [_middle(y, 2 * g - 1) for y, g in zip(x, grid.size, strict=True)]
                for x in (rel_k, rel_q)
            )
        elif buckets is not None:
            buckets = _middle(buckets.unsqueeze(0), 2 * (stop - start) - 1).squeeze(0)
        parts.append(
            replace(
                call, q=call.q[:, :, piece], k=call.k[:, :, piece], v=call.v[:, :, piece], grid=grid, rel_k=rel_k,
                rel_q=rel_q, buckets=buckets, mask=None if call.mask is None else call.mask[:, piece],
                pos_q=None if call.pos_q is None else call.pos_q[:, :, piece],
                pos_k=None if call.pos_k is None else call.pos_k[:, :, piece],
                seed=None if call.seed is None else call.seed + number * 0x3C6EF372,
            )
        )  # fmt: skip
    return parts


def _middle(x: Tensor, rows: int) -> Tensor:
    start = (x.shape[1] - rows) // 2
    return x[:, start : start + rows]


def _four(x: Tensor | None) -> Tensor | None:
    return x.unsqueeze(0) if x is not None and x.ndim == 3 else x


def _grids(grid: Sequence, fail: Fail) -> list[tuple[int, int, int]]:
    several = list(grid) if len(grid) and isinstance(grid[0], Sequence) else [grid]
    result = []
    for size in several:
        full = (*(1,) * (3 - len(size)), *(torch.sym_int(g) for g in size))
        if len(full) != 3 or len(size) < 1 or any(g < 1 for g in full):
            fail(f"grid={tuple(size)} must be (gz, gy, gx) or (gy, gx), each at least 1")
        result.append(full)
    return result


def _tables(
    name: str, x: Tensor | Sequence[Tensor] | None, axes: list[int] | None, buckets: Tensor | None, heads: int,
    width: int, fail: Fail,
) -> list[Tensor] | None:  # fmt: skip
    if x is None:
        return None
    if axes is None:
        if buckets is None:
            fail(f"{name} needs grid, for a table an axis, or buckets, for one along the sequence")
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] != heads or x.shape[2] != width:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            fail(f"{name} is {shape}; with buckets it must be one tensor (H, R, D) = ({heads}, R, {width})")
        return [x]
    if isinstance(x, Tensor):
        fail(f"{name} is one tensor; with grid it must be a tensor (H, 2 g - 1, D) for each of (z, y, x)")
    tables = list(x)
    if len(tables) == 2 and axes[0] == 1:  # a picture has no z
        tables.insert(0, tables[0].new_zeros(heads, 1, width))
    wanted = [(heads, 2 * g - 1, width) for g in axes]
    if [tuple(y.shape) for y in tables] != wanted:
        fail(f"{name} has shapes {[tuple(y.shape) for y in tables]}; with grid they must be (H, 2 g - 1, D) = {wanted}")
    return tables


def _check_buckets(
    buckets: Tensor, rows: list[int], tokens: int, keys: int, cuts: list[int] | None, fail: Fail
) -> None:
    if not rows:
        fail("buckets are of no use without rel_k or rel_q, (H, R, D)")
    if len(set(rows)) > 1:
        fail(f"rel_k has {rows[0]} rows and rel_q {rows[1]}; buckets point into both, so they must agree")
    if buckets.ndim != 1 or buckets.dtype not in (torch.int32, torch.int64):
        fail(f"buckets is {buckets.dtype} {tuple(buckets.shape)}; it must be int32 or int64 (N + S - 1,)")
    if cuts is None and len(buckets) != tokens + keys - 1:
        fail(f"buckets has {len(buckets)} entries; it must have N + S - 1 = {tokens + keys - 1}, distance 1 - S first")
    if cuts is not None:
        longest = max(b - a for a, b in itertools.pairwise(cuts))
        if len(buckets) % 2 == 0 or len(buckets) < 2 * longest - 1:
            least = 2 * longest - 1
            fail(f"buckets has {len(buckets)} entries; with cu_seqlens it must have an odd number, {least} or more")
