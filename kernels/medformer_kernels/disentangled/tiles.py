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
# Lines of a plane that are walked over plane after plane: their gradient by y stays in registers.
ROUND = 8
_ROUND = tl.constexpr(ROUND)


@triton.jit
def own_tile(tile, tokens, grid, dtype: tl.constexpr, META: tl.constexpr):
    """The own tokens of a program, `own` below: (first token, its x, which tokens exist, the tokens of the tile counted
    from the first, matrices that pick the line and the x of each, z and y of its lines and which exist): some lines of
    a grid, or of some lines BLOCK_X tokens."""
    _cols, _cy, _cx, GY, GX, lines, own_lines = grid
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
    at = line + tl.arange(0, _LINES)
    own_line = (at // GY, at % GY, (tl.arange(0, _LINES) < own_lines) & (at < lines))
    return first, x0, ok, offs, hot, x_hot, own_line


@triton.jit
def walk_tile(z, y, x0, tokens, grid, offs, META: tl.constexpr):
    """(first token, z and y of its line, which of `offs` exist, x of each), with offs `walk` below: a line from x0 on.

    Without a grid a line is a tile of GX = BLOCK_N tokens.
    """
    _cols, _cy, _cx, GY, GX, _lines, _own_lines = grid
    first = (z * GY + y) * GX + x0
    end = GX - x0
    if not META.GRID:
        end = tokens - first
    if META.ALIGNED:
        first, end = tl.multiple_of(first, 16), tl.multiple_of(end, 16)
    return first, z, y, offs < end, x0 + offs


@triton.jit
def lines_until(token, x0, GX):
    """Lines whose tile from x0 on begins no later than `token`."""
    return (token - x0 + GX) // GX


@triton.jit
def lines_before(lines, y0, height, GY):
    """How many of the first `lines` lines are among those of y0 to y0 + height in each plane."""
    return lines // GY * height + tl.minimum(tl.maximum(lines % GY - y0, 0), height)


@triton.jit
def by_x(TABLE, own, grid, x, x_ok):
    """[own tokens, columns of x] of the table."""
    rows = TABLE + tl.cast(own[0], tl.int64) * grid[0] + own[3][:, None] * grid[0]
    return tl.load(rows + (grid[2] + x)[None, :], mask=own[2][:, None] & x_ok[None, :], other=0.0)


@triton.jit
def _by_line(TABLE, walk, own_line, grid):
    """[tokens walked over, LINES]: what the table holds for the z and the y of the own lines, summed."""
    first, _z, _y, ok, _x, offs = walk
    at_z, at_y, line_ok = own_line
    rows = TABLE + tl.cast(first, tl.int64) * grid[0] + offs[:, None] * grid[0]
    mask = ok[:, None] & line_ok[None, :]
    z = tl.load(rows + at_z[None, :], mask=mask, other=0.0)
    y = tl.load(rows + (grid[1] + at_y)[None, :], mask=mask, other=0.0)
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
    (`own_x_columns`, scaled). U takes two products with the constant matrices of the own tokens' lines and x.
    """
    own_first, own_x0, own_ok, offs_m, own_hot, own_x_hot, own_line = own
    walk_first, walk_z, walk_y, walk_ok, _walk_x, offs_n = walk
    cols, cy, cx, _GY, _GX, _lines, _own_lines = grid
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
        z = tl.load(row + walk_z, mask=own_ok, other=0.0)
        y = tl.load(row + (cy + walk_y), mask=own_ok, other=0.0)
        by_row = (z.to(tl.float32) + y.to(tl.float32)) * exponent_scale
    if META.GRID:
        e += own_x_columns
    return e, by_row


@triton.jit
def add_to(pointers, mask, x):
    """+= where only this program writes; the barrier orders it before what is added there next."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + x, mask=mask)
    tl.debug_barrier()


@triton.jit
def take_line(ds, gradient, DT, own, z, r, last, grid, scale):
    """(by x [M, N], by y of ROUND lines [M, ROUND], by z [M]) of the table's gradient, with the tile of line r of those
    lines. What is by z leaves for memory with the last tile of its plane: without a barrier, for which a loop would not
    be pipelined; `add_by_y` has one between two tiles that add to the same place."""
    by_x, by_y, by_z = gradient
    by_line = tl.sum(ds, 1)
    by_x += ds
    by_y += by_line[:, None] * (r == tl.arange(0, _ROUND)).to(tl.float32)[None, :]
    by_z += by_line
    if last:
        at = DT + (tl.cast(own[0], tl.int64) + own[3]) * grid[0] + z
        tl.store(at, tl.load(at, mask=own[2], other=0.0) + by_z * scale, mask=own[2])
    return by_x, by_y, tl.where(last, 0.0, by_z)


@triton.jit
def add_by_y(by_y, DT, own, y0, height, grid, scale):
    r = tl.arange(0, _ROUND)
    rows = DT + (tl.cast(own[0], tl.int64) + own[3]) * grid[0]
    add_to(rows[:, None] + (grid[1] + y0 + r)[None, :], own[2][:, None] & (r < height)[None, :], by_y * scale)


@triton.jit
def take_buckets(ds, DT, index, pair_ok, own, grid, scale):
    """Adds the gradient of the own tokens' table over buckets for one tile of ds."""
    row = DT + (tl.cast(own[0], tl.int64) + own[3]) * grid[0]
    first = tl.min(tl.min(tl.where(pair_ok, index, 2147483647), 1), 0)
    last = tl.max(tl.max(tl.where(pair_ok, index, -1), 1), 0)
    for bucket in range(first, last + 1):
        add_to(row + bucket, own[2], tl.sum(tl.where(index == bucket, ds, 0.0), 1) * scale)


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
