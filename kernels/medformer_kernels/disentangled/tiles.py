"""Device code of disentangled attention: where a tile lies, its scores with their bias, the gradient of its table.

Axes: M own tokens of a program, N tokens of the tile that it walks over.
"""

import triton
import triton.language as tl

# Lines of x among the own tokens, at most: the columns of the smallest matrix product.
LINES = 16
# Tokens of a line among them, at most.
BLOCK_X = 64
_LINES = tl.constexpr(LINES)


@triton.jit
def own_tile(tile, tokens, GX, lines, tile_lines, offs, BLOCK: tl.constexpr, BLOCK_X: tl.constexpr, GRID: tl.constexpr):
    """(first token, line and x of it, tokens of a tile counted from the first, which of them exist, their lines and x
    counted from the first's): some lines of a grid, or of some lines BLOCK_X tokens."""
    if GRID:
        parts = tl.cdiv(GX, BLOCK_X)
        line = tile // parts * tile_lines
        x = tile % parts * BLOCK_X
        width = tl.minimum(GX, BLOCK_X)
        own_line, own_x = offs // width, offs % width
        ok = (own_line < tl.minimum(lines - line, tile_lines)) & (own_x < GX - x)
        return line * GX + x, line, x, own_line * GX + own_x, ok, own_line, own_x
    else:
        return tile * BLOCK, tile * 0, tile * 0, offs, offs < tokens - tile * BLOCK, offs * 0, offs


@triton.jit
def walk_tile(tile, tokens, GX, offs, BLOCK: tl.constexpr, GRID: tl.constexpr, PART: tl.constexpr):
    """(first token, its line, which of `offs` exist, x of each): one line of a grid, or part of one."""
    if GRID:
        if PART:
            parts = tl.cdiv(GX, BLOCK)
            line = tile // parts
            x = (tile % parts) * BLOCK
            return line * GX + x, line, offs < GX - x, x + offs
        else:
            return tile * GX, tile, offs < GX, offs
    else:
        return tile * BLOCK, tile * 0, offs < tokens - tile * BLOCK, offs


@triton.jit
def tile_walked(token, GX, BLOCK: tl.constexpr, GRID: tl.constexpr, PART: tl.constexpr):
    """The tile of `walk_tile` that holds a token."""
    if GRID:
        if PART:
            return token // GX * tl.cdiv(GX, BLOCK) + token % GX // BLOCK
        else:
            return token // GX
    else:
        return token // BLOCK


@triton.jit
def by_x(TABLE, first, cols, offs, ok, column, x, x_ok):
    """[rows, columns of x] of the table."""
    rows = TABLE + tl.cast(first, tl.int64) * cols + offs[:, None] * cols
    return tl.load(rows + (column + x)[None, :], mask=ok[:, None] & x_ok[None, :], other=0.0)


@triton.jit
def _by_line(TABLE, first, cols, offs, ok, line, lines, tile_lines, cy, GY):
    """[rows, LINES]: what the table holds for the z and the y of the lines of a tile, summed."""
    r = tl.arange(0, _LINES)
    at = line + r
    mask = ok[:, None] & ((r < tile_lines) & (at < lines))[None, :]
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
    x_own, x_walk, own_x_columns, T, U, index, pair_ok, own_hot, own_x_hot,
    own_first, own_line, own_x0, own_ok, walk_first, walk_line, walk_ok, walk_x,
    offs_m, offs_n, cols, cy, cx, GY, lines, own_lines, exponent_scale,
    BLOCK_X: tl.constexpr, GRID: tl.constexpr, WALK_PART: tl.constexpr, BUCKET: tl.constexpr,
    HAS_T: tl.constexpr, HAS_U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(e [M, N], by_row [M]) in base 2, whose sum is the score. T belongs to the own tokens, U to those walked over.

    A tile walked over has one z and one y, so that T adds a number a row and one tile by x, the same for all lines
    (`own_x_columns`, scaled) unless they are longer than the tile. U takes two products with the constant matrices of
    the own tokens' lines and x.
    """
    s = tl.dot(x_own, tl.trans(x_walk), input_precision=PRECISION)
    by_row = tl.zeros(own_ok.shape, tl.float32)
    if GRID and HAS_U:
        by_line = _by_line(U, walk_first, cols, offs_n, walk_ok, own_line, lines, own_lines, cy, GY)
        s = tl.dot(own_hot, tl.trans(by_line), s, input_precision=PRECISION)
        column = tl.arange(0, BLOCK_X)  # the table has as many; those behind the line's end hold 0
        rows = U + tl.cast(walk_first, tl.int64) * cols + offs_n[:, None] * cols
        u = tl.load(rows + (cx + own_x0 + column)[None, :], mask=walk_ok[:, None], other=0.0)
        s = tl.dot(own_x_hot, tl.trans(u), s, input_precision=PRECISION)
    if BUCKET:
        if HAS_T:
            rows = T + (tl.cast(own_first, tl.int64) + offs_m)[:, None] * cols
            s += tl.load(rows + index, mask=pair_ok, other=0.0)
        if HAS_U:
            rows = U + (tl.cast(walk_first, tl.int64) + offs_n)[None, :] * cols
            s += tl.load(rows + index, mask=pair_ok, other=0.0)
    e = s * exponent_scale
    if GRID and HAS_T:
        row = T + (tl.cast(own_first, tl.int64) + offs_m) * cols
        z = tl.load(row + walk_line // GY, mask=own_ok, other=0.0)
        y = tl.load(row + (cy + walk_line % GY), mask=own_ok, other=0.0)
        by_row = (z.to(tl.float32) + y.to(tl.float32)) * exponent_scale
        if WALK_PART:
            t = by_x(T, own_first, cols, offs_m, own_ok, cx, walk_x, walk_ok)
            own_x_columns = t.to(tl.float32) * exponent_scale
    if GRID:
        e += own_x_columns
    return e, by_row


@triton.jit
def _add_to(pointers, mask, x):
    """+= where only this program writes; the barrier orders it before the next tile's."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + x, mask=mask)
    tl.debug_barrier()


@triton.jit
def take(
    ds, dtx, DT, index, pair_ok, own_first, own_ok, walk_line, walk_ok, walk_x, offs_m, cols, cy, cx, GY, scale,
    GRID: tl.constexpr, WALK_PART: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of the own tokens' table for one tile of ds; that by x is returned where it is one tile."""
    row = DT + (tl.cast(own_first, tl.int64) + offs_m) * cols
    if GRID:
        by_line = tl.sum(ds, 1) * scale
        _add_to(row + walk_line // GY, own_ok, by_line)
        _add_to(row + (cy + walk_line % GY), own_ok, by_line)
        if WALK_PART:
            _add_to(row[:, None] + (cx + walk_x)[None, :], own_ok[:, None] & walk_ok[None, :], ds * scale)
        else:
            dtx += ds
    if BUCKET:
        first = tl.min(tl.min(tl.where(pair_ok, index, 2147483647), 1), 0)
        last = tl.max(tl.max(tl.where(pair_ok, index, -1), 1), 0)
        for bucket in range(first, last + 1):
            _add_to(row + bucket, own_ok, tl.sum(tl.where(index == bucket, ds, 0.0), 1) * scale)
    return dtx


@triton.jit
def _mixed(x):
    """See `dropout`: the same words."""
    x = x ^ (x >> 16)
    x = x * tl.full([], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def kept_by_dropout(SEED, bh, queries, keys, drop_below, OWN_KEYS: tl.constexpr):
    """[own, walk]: whether dropout keeps the weight."""
    stream = _mixed(bh.to(tl.uint32) ^ tl.load(SEED).to(tl.uint32))
    by_row = _mixed(stream ^ queries.to(tl.uint32))
    if OWN_KEYS:
        number = by_row[None, :] ^ keys.to(tl.uint32)[:, None]
    else:
        number = by_row[:, None] ^ keys.to(tl.uint32)[None, :]
    return (_mixed(number) >> 1).to(tl.int32) >= drop_below


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
