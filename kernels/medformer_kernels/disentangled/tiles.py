"""Device code of disentangled attention: the place of a tile, its scores with their bias, the gradient of its table.

Axes: M own tokens of a program, N tokens of the tile that it walks over. `grid` is (columns of a table, where y and x
begin in it, GY, GX, lines of all, lines of an own tile).
"""

import triton
import triton.language as tl

from medformer_kernels._triton import fold, fold_seed, kept

# Lines of x among the own tokens, at most: the columns of the smallest matrix product.
LINES = 16
# Tokens of a line among them, at most.
BLOCK_X = 64
_LINES = tl.constexpr(LINES)


@triton.jit
def own_tile(tile, tokens, grid, dtype: tl.constexpr, META: tl.constexpr):
    """The own tokens of a program, `own` below: (first token, its line and x, which tokens exist, the tokens of the
    tile counted from the first, matrices that pick the line and the x of each): some lines of a grid, or of some lines
    BLOCK_X tokens."""
    _cols, _cy, _cx, _GY, GX, lines, own_lines = grid
    offs = tl.arange(0, META.BLOCK_M)
    if META.GRID:
        parts = tl.cdiv(GX, META.BLOCK_X)
        line = tile // parts * own_lines
        x0 = tile % parts * META.BLOCK_X
        width = tl.minimum(GX, META.BLOCK_X)
        r, x = offs // width, offs % width
        ok = (r < tl.minimum(lines - line, own_lines)) & (x < GX - x0)
        first, offs = line * GX + x0, r * GX + x
    else:
        first, line, x0, r, x = tile * META.BLOCK_M, tile * 0, tile * 0, offs * 0, offs
        ok = offs < tokens - first
    hot = (r[:, None] == tl.arange(0, _LINES)[None, :]).to(dtype)
    x_hot = (x[:, None] == tl.arange(0, META.BLOCK_X)[None, :]).to(dtype)
    return first, line, x0, ok, offs, hot, x_hot


@triton.jit
def walk_tile(tile, tokens, GX, offs, META: tl.constexpr):
    """(first token, its line, which of `offs` exist, x of each), with offs `walk` below: one line, or part of one."""
    if META.GRID:
        if META.WALK_PART:
            parts = tl.cdiv(GX, META.BLOCK_N)
            line = tile // parts
            x = (tile % parts) * META.BLOCK_N
            return line * GX + x, line, offs < GX - x, x + offs
        else:
            return tile * GX, tile, offs < GX, offs
    else:
        return tile * META.BLOCK_N, tile * 0, offs < tokens - tile * META.BLOCK_N, offs


@triton.jit
def tile_walked(token, GX, META: tl.constexpr):
    """The tile of `walk_tile` that holds a token."""
    if META.GRID:
        if META.WALK_PART:
            return token // GX * tl.cdiv(GX, META.BLOCK_N) + token % GX // META.BLOCK_N
        else:
            return token // GX
    else:
        return token // META.BLOCK_N


@triton.jit
def by_x(TABLE, own, grid, x, x_ok):
    """[own tokens, columns of x] of the table."""
    rows = TABLE + tl.cast(own[0], tl.int64) * grid[0] + own[4][:, None] * grid[0]
    return tl.load(rows + (grid[2] + x)[None, :], mask=own[3][:, None] & x_ok[None, :], other=0.0)


@triton.jit
def _by_line(TABLE, walk, line, grid):
    """[tokens walked over, LINES]: what the table holds for the z and the y of the lines of a tile, summed."""
    first, _line, ok, _x, offs = walk
    cols, cy, _cx, GY, _GX, lines, own_lines = grid
    r = tl.arange(0, _LINES)
    at = line + r
    mask = ok[:, None] & ((r < own_lines) & (at < lines))[None, :]
    rows = TABLE + tl.cast(first, tl.int64) * cols + offs[:, None] * cols
    z = tl.load(rows + (at // GY)[None, :], mask=mask, other=0.0)
    y = tl.load(rows + (cy + at % GY)[None, :], mask=mask, other=0.0)
    return (z.to(tl.float32) + y.to(tl.float32)).to(TABLE.dtype.element_ty)


@triton.jit
def bucket_index(BUCKETS, own, walk, ok, keys, OWN_KEYS: tl.constexpr):
    """[M, N] rows of the tables for the distance query - key."""
    distance = own[:, None] - walk[None, :]
    if OWN_KEYS:
        distance = -distance
    return tl.load(BUCKETS + distance + (keys - 1), mask=ok, other=0)


@triton.jit
def exponents(
    x_own, x_walk, own_x_columns, T, U, index, pair_ok, own, walk, grid, exponent_scale,
    HAS_T: tl.constexpr, HAS_U: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """(e [M, N], by_row [M]) in base 2, whose sum is the score. T belongs to the own tokens, U to those walked over.

    A tile walked over has one z and one y, so that T adds a number a row and one tile by x, the same for all lines
    (`own_x_columns`, scaled) unless they are longer than the tile. U takes two products with the constant matrices of
    the own tokens' lines and x.
    """
    own_first, own_line, own_x0, own_ok, offs_m, own_hot, own_x_hot = own
    walk_first, walk_line, walk_ok, walk_x, offs_n = walk
    cols, cy, cx, GY, _GX, _lines, _own_lines = grid
    s = tl.dot(x_own, tl.trans(x_walk), input_precision=META.PRECISION)
    by_row = tl.zeros(own_ok.shape, tl.float32)
    if META.GRID and HAS_U:
        by_line = _by_line(U, walk, own_line, grid)
        s = tl.dot(own_hot, tl.trans(by_line), s, input_precision=META.PRECISION)
        column = tl.arange(0, META.BLOCK_X)  # the table has as many; those behind the line's end hold 0
        rows = U + tl.cast(walk_first, tl.int64) * cols + offs_n[:, None] * cols
        u = tl.load(rows + (cx + own_x0 + column)[None, :], mask=walk_ok[:, None], other=0.0)
        s = tl.dot(own_x_hot, tl.trans(u), s, input_precision=META.PRECISION)
    if META.BUCKET:
        if HAS_T:
            rows = T + (tl.cast(own_first, tl.int64) + offs_m)[:, None] * cols
            s += tl.load(rows + index, mask=pair_ok, other=0.0)
        if HAS_U:
            rows = U + (tl.cast(walk_first, tl.int64) + offs_n)[None, :] * cols
            s += tl.load(rows + index, mask=pair_ok, other=0.0)
    e = s * exponent_scale
    if META.GRID and HAS_T:
        row = T + (tl.cast(own_first, tl.int64) + offs_m) * cols
        z = tl.load(row + walk_line // GY, mask=own_ok, other=0.0)
        y = tl.load(row + (cy + walk_line % GY), mask=own_ok, other=0.0)
        by_row = (z.to(tl.float32) + y.to(tl.float32)) * exponent_scale
        if META.WALK_PART:
            t = by_x(T, own, grid, walk_x, walk_ok)
            own_x_columns = t.to(tl.float32) * exponent_scale
    if META.GRID:
        e += own_x_columns
    return e, by_row


@triton.jit
def _add_to(pointers, mask, x):
    """+= where only this program writes; the barrier orders it before the next tile's."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + x, mask=mask)
    tl.debug_barrier()


@triton.jit
def take(ds, dtx, DT, index, pair_ok, own, walk, grid, scale, META: tl.constexpr):
    """Adds the gradient of the own tokens' table for one tile of ds; that by x is returned where it is one tile."""
    own_first, _line, _x0, own_ok, offs_m, _hot, _x_hot = own
    _first, walk_line, walk_ok, walk_x, _offs = walk
    cols, cy, cx, GY, _GX, _lines, _own_lines = grid
    row = DT + (tl.cast(own_first, tl.int64) + offs_m) * cols
    if META.GRID:
        by_line = tl.sum(ds, 1) * scale
        _add_to(row + walk_line // GY, own_ok, by_line)
        _add_to(row + (cy + walk_line % GY), own_ok, by_line)
        if META.WALK_PART:
            _add_to(row[:, None] + (cx + walk_x)[None, :], own_ok[:, None] & walk_ok[None, :], ds * scale)
        else:
            dtx += ds
    if META.BUCKET:
        first = tl.min(tl.min(tl.where(pair_ok, index, 2147483647), 1), 0)
        last = tl.max(tl.max(tl.where(pair_ok, index, -1), 1), 0)
        for bucket in range(first, last + 1):
            _add_to(row + bucket, own_ok, tl.sum(tl.where(index == bucket, ds, 0.0), 1) * scale)
    return dtx


@triton.jit
def kept_by_dropout(SEED, b, h, queries, keys, drop_below, OWN_KEYS: tl.constexpr):
    """[own, walk]: whether dropout keeps the weight."""
    rows = fold(fold(fold(fold_seed(SEED), b), h), queries)
    if OWN_KEYS:
        return kept(fold(rows[None, :], keys[:, None]), drop_below)
    else:
        return kept(fold(rows[:, None], keys[None, :]), drop_below)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
