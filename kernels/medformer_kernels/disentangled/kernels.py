"""The Triton kernels of disentangled attention; `fused` launches them, `ops` derives what they compute.

H heads, N queries, S keys, W and DV widths. A program owns BLOCK_M tokens of one head and walks over the others in
tiles of BLOCK_N:

    disentangled_fwd_kernel   owns queries: out and lse
    disentangled_dq_kernel    owns queries: dQ, dT, and delta = sum(dout * out) - dlse for the next
    disentangled_dkv_kernel   owns keys: dK, dV, dU

Over a grid a tile holds whole lines of x (or, of long lines, part of one), so that the tables need no gather: its bias
is one product with a constant matrix of lines (T_z + T_y by line), one with a constant matrix of columns (U_x), and the
tile T_x, loaded once for all tiles. The tables' gradients go the same way back: each program alone adds to the rows of
its own tokens. With buckets the tables are gathered, and gradients are summed bucket by bucket of a tile.

Products of float16 and bfloat16 run on the matrix units, those of float32 in plain float32; all else in float32,
exponents in base 2. No atomics: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, divide_rows, load_rows, store_rows

# Lengths and grids never specialise a kernel: the first call on a new length compiles nothing (a new power of two of
# the line, up to the tile, does).
_RUNTIME = ["N", "S", "cols16", "cy16", "cx16", "GY", "GX", "lines", "own_lines", "walk_lines", "own_tiles",
            "walk_tiles", "prefix", "drop_below"]  # fmt: skip
# Lines of x in a tile, at most: the columns of the smallest matrix product.
LINES = 16
_LINES = tl.constexpr(LINES)


@triton.jit
def _place(
    tile, tokens, GX, lines, tile_lines, offs, BLOCK: tl.constexpr, GRID: tl.constexpr, LONG: tl.constexpr
):  # fmt: skip
    """(first token, its line, its x, which of `offs` exist, line of each within the tile, x of each) of a tile."""
    if GRID:
        if LONG:
            parts = tl.cdiv(GX, BLOCK)
            line = tile // parts
            x = (tile % parts) * BLOCK
            count = tl.minimum(GX - x, BLOCK)
            own_line = offs * 0
            own_x = x + offs
        else:
            line = tile * tile_lines
            x = tile * 0
            count = tl.minimum(lines - line, tile_lines) * GX
            own_line = offs // GX
            own_x = offs % GX
        first = line * GX + x
    else:
        line = tile * 0
        x = tile * 0
        first = tile * BLOCK
        count = tl.minimum(tokens - first, BLOCK)
        own_line = offs * 0
        own_x = offs
    return first, line, x, offs < count, own_line, own_x


@triton.jit
def _tile_of(token, GX, tile_lines, BLOCK: tl.constexpr, GRID: tl.constexpr, LONG: tl.constexpr):
    """The tile that holds a token."""
    if GRID:
        if LONG:
            return token // GX * tl.cdiv(GX, BLOCK) + token % GX // BLOCK
        else:
            return token // GX // tile_lines
    else:
        return token // BLOCK


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
def _by_x(TABLE, first, cols, offs, ok, column, x, x_ok):
    """[rows, columns of x] of the table."""
    rows = TABLE + tl.cast(first, tl.int64) * cols + offs[:, None] * cols
    return tl.load(rows + (column + x)[None, :], mask=ok[:, None] & x_ok[None, :], other=0.0)


@triton.jit
def _index(BUCKETS, own, walk, ok, keys, OWN_KEYS: tl.constexpr):
    """[own, walk] rows of the tables for the distance query - key."""
    distance = own[:, None] - walk[None, :]
    if OWN_KEYS:
        distance = -distance
    return tl.load(BUCKETS + distance + (keys - 1), mask=ok, other=0)


@triton.jit
def _scores(
    x_own, x_walk, tx, T, U, index, pair_ok, own_hot, own_x_hot, walk_hot,
    own_first, own_line, own_x0, own_ok, own_x, walk_first, walk_line, walk_x0, walk_ok, walk_x,
    offs_m, offs_n, cols, cy, cx, GY, GX, lines, own_lines, walk_lines,
    BLOCK_X: tl.constexpr, GRID: tl.constexpr, LONG: tl.constexpr, BUCKET: tl.constexpr, HAS_T: tl.constexpr,
    HAS_U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] products plus bias, before the scale. T belongs to the own tokens, U to those walked over."""
    s = tl.dot(x_own, tl.trans(x_walk), input_precision=PRECISION)
    if GRID:
        if HAS_T:
            by_line = _by_line(T, own_first, cols, offs_m, own_ok, walk_line, lines, walk_lines, cy, GY)
            s = tl.dot(by_line, walk_hot, s, input_precision=PRECISION)
            if LONG:
                tx = _by_x(T, own_first, cols, offs_m, own_ok, cx, walk_x, walk_ok)
            s += tx
        if HAS_U:
            by_line = _by_line(U, walk_first, cols, offs_n, walk_ok, own_line, lines, own_lines, cy, GY)
            s = tl.dot(own_hot, tl.trans(by_line), s, input_precision=PRECISION)
            if LONG:
                s += tl.trans(_by_x(U, walk_first, cols, offs_n, walk_ok, cx, own_x, own_ok))
            else:
                column = tl.arange(0, BLOCK_X)
                by_x = _by_x(U, walk_first, cols, offs_n, walk_ok, cx, column, column < GX)
                s = tl.dot(own_x_hot, tl.trans(by_x), s, input_precision=PRECISION)
    if BUCKET:
        if HAS_T:
            rows = T + (tl.cast(own_first, tl.int64) + offs_m)[:, None] * cols
            s += tl.load(rows + index, mask=pair_ok, other=0.0)
        if HAS_U:
            rows = U + (tl.cast(walk_first, tl.int64) + offs_n)[None, :] * cols
            s += tl.load(rows + index, mask=pair_ok, other=0.0)
    return s


@triton.jit
def _add_to(pointers, mask, x):
    """+= where only this program writes; the barrier orders it before the next tile's."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + x, mask=mask)
    tl.debug_barrier()


@triton.jit
def _take(
    ds, dtx, DT, index, pair_ok, own_first, own_ok, walk_line, walk_ok, line_in_tile, walk_x, walk_x_hot, offs_m,
    cols, cy, cx, GY, lines, walk_lines,
    GRID: tl.constexpr, LONG: tl.constexpr, BUCKET: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of the own tokens' table for one tile of ds; that along x is returned where lines are short."""
    rows = DT + (tl.cast(own_first, tl.int64) + offs_m)[:, None] * cols
    if GRID:
        low = ds.to(DTYPE)
        r = tl.arange(0, _LINES)
        z0 = walk_line // GY
        y0 = walk_line % GY
        at = walk_line + line_in_tile
        # y within the tile, counted from its first and around the end of the axis: each y has one column
        y_hot = (((at % GY - y0 + GY) % GY)[:, None] == r[None, :]).to(DTYPE)
        by_y = tl.dot(low, y_hot, input_precision=PRECISION)
        y_ok = (r < walk_lines) & (r < GY)
        _add_to(rows + (cy + (y0 + r) % GY)[None, :], own_ok[:, None] & y_ok[None, :], by_y)
        z_hot = ((at // GY - z0)[:, None] == r[None, :]).to(DTYPE)
        by_z = tl.dot(low, z_hot, input_precision=PRECISION)
        z_ok = (r < walk_lines) & ((z0 + r) * GY < lines)
        _add_to(rows + (z0 + r)[None, :], own_ok[:, None] & z_ok[None, :], by_z)
        if LONG:
            _add_to(rows + (cx + walk_x)[None, :], own_ok[:, None] & walk_ok[None, :], ds)
        else:
            dtx = tl.dot(low, walk_x_hot, dtx, input_precision=PRECISION)
    if BUCKET:
        first = tl.min(tl.min(tl.where(pair_ok, index, 2147483647), 1), 0)
        last = tl.max(tl.max(tl.where(pair_ok, index, -1), 1), 0)
        row = DT + (tl.cast(own_first, tl.int64) + offs_m) * cols
        for bucket in range(first, last + 1):
            _add_to(row + bucket, own_ok, tl.sum(tl.where(index == bucket, ds, 0.0), 1))
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
def _kept(SEED, bh, queries, keys, drop_below, OWN_KEYS: tl.constexpr):
    """[own, walk]: whether dropout keeps the weight."""
    stream = _mixed(bh.to(tl.uint32) ^ tl.load(SEED).to(tl.uint32))
    by_row = _mixed(stream ^ queries.to(tl.uint32))
    if OWN_KEYS:
        number = by_row[None, :] ^ keys.to(tl.uint32)[:, None]
    else:
        number = by_row[:, None] ^ keys.to(tl.uint32)[None, :]
    return (_mixed(number) >> 1).to(tl.int32) >= drop_below


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_fwd_kernel(
    Q, K, V, T, U, BUCKETS, MASK, SEED, OUT, LSE,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    mask_stride_b, mask_stride_n,
    H, N, S, W, DV, cols16, cy16, cx16, GY, GX, lines, own_lines, walk_lines, own_tiles, walk_tiles,
    prefix, drop_below, keep_scale, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_X: tl.constexpr,
    GRID: tl.constexpr, LONG: tl.constexpr, BUCKET: tl.constexpr, HAS_T: tl.constexpr, HAS_U: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j softmax_j(scale (q_i k_j + bias)) v_j, and lse_i."""
    pid = tl.program_id(0)
    bh = (pid // own_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    dtype: tl.constexpr = Q.dtype.element_ty
    cols, cy, cx = cols16 * 16, cy16 * 16, cx16 * 16
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column, r = tl.arange(0, BLOCK_X), tl.arange(0, _LINES)
    own_first, own_line, own_x0, own_ok, own_lines_in, own_x = _place(
        pid % own_tiles, N, GX, lines, own_lines, offs_m, BLOCK_M, GRID, LONG
    )
    short = _place(0, S, GX, lines, walk_lines, offs_n, BLOCK_N, GRID, LONG)
    line_in_tile, short_x = short[4], short[5]
    own_hot = (own_lines_in[:, None] == r[None, :]).to(dtype)
    own_x_hot = (own_x[:, None] == column[None, :]).to(dtype)
    walk_hot = (line_in_tile[None, :] == r[:, None]).to(dtype)
    Q += b * q_stride_b + h * q_stride_h
    K += b * k_stride_b + h * k_stride_h
    V += b * v_stride_b + h * v_stride_h
    T += bh * N * cols
    U += bh * S * cols
    q = load_rows(Q, own_first, q_stride_n, offs_m, offs_d, q_stride_d, own_ok, offs_d < W)  # [BLOCK_M, BLOCK_D]
    tx = tl.zeros([1, 1], tl.float32)
    if GRID and HAS_T and not LONG:
        tx = _by_x(T, own_first, cols, offs_m, own_ok, cx, short_x, short_x < GX)  # [BLOCK_M, BLOCK_N]
    exponent_scale = scale * LOG2E

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = walk_tiles
    if CAUSAL:
        last = tl.max(tl.where(own_ok, own_first + offs_m, 0), 0)
        end = _tile_of(last, GX, walk_lines, BLOCK_N, GRID, LONG) + 1
    for tile in range(0, end):
        first, line, x0, ok, _line, walk_x = _place(tile, S, GX, lines, walk_lines, offs_n, BLOCK_N, GRID, LONG)
        if HAS_MASK:
            mask_row = MASK + b * mask_stride_b + tl.cast(first, tl.int64) * mask_stride_n
            ok &= tl.load(mask_row + offs_n * mask_stride_n, mask=ok, other=0) != 0
        k = load_rows(K, first, k_stride_n, offs_n, offs_d, k_stride_d, ok, offs_d < W)  # [BLOCK_N, BLOCK_D]
        v = load_rows(V, first, v_stride_n, offs_n, offs_dv, v_stride_d, ok, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
        pair_ok = own_ok[:, None] & ok[None, :]
        index = 0
        if BUCKET:
            index = _index(BUCKETS, own_first + offs_m, first + offs_n, pair_ok, S, False)
        e = _scores(
            q, k, tx, T, U, index, pair_ok, own_hot, own_x_hot, walk_hot,
            own_first, own_line, own_x0, own_ok, own_x, first, line, x0, ok, walk_x,
            offs_m, offs_n, cols, cy, cx, GY, GX, lines, own_lines, walk_lines,
            BLOCK_X, GRID, LONG, BUCKET, HAS_T, HAS_U, PRECISION,
        )  # fmt: skip
        e = e * exponent_scale + tl.where(ok, 0.0, float("-inf"))[None, :]
        if CAUSAL:
            e = tl.where((own_first + offs_m)[:, None] >= (first + offs_n)[None, :], e, float("-inf"))
        new_top = tl.maximum(top, tl.max(e, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(e - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        if DROPOUT:
            kept = _kept(SEED, bh, prefix + own_first + offs_m, prefix + first + offs_n, drop_below, False)
            p = tl.where(kept, p * keep_scale, 0.0)
        acc = tl.dot(p.to(dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
    lse = top + tl.log2(tl.where(total == 0.0, 1.0, total))
    out = OUT + bh * N * DV
    store_rows(out, own_first, DV, offs_m, offs_dv, 1, own_ok, offs_dv < DV, divide_rows(acc, total))
    tl.store(LSE + bh * N + own_first + offs_m, lse / LOG2E, mask=own_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_dq_kernel(
    Q, K, V, T, U, BUCKETS, MASK, SEED, OUT, LSE, DOUT, DLSE, DELTA, DQ, DT,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    do_stride_b, do_stride_h, do_stride_n, do_stride_d, mask_stride_b, mask_stride_n,
    H, N, S, W, DV, cols16, cy16, cx16, GY, GX, lines, own_lines, walk_lines, own_tiles, walk_tiles,
    prefix, drop_below, keep_scale, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_X: tl.constexpr,
    GRID: tl.constexpr, LONG: tl.constexpr, BUCKET: tl.constexpr, HAS_T: tl.constexpr, HAS_U: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DLSE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = sum_j ds_ij k_j and dt_i = sums of ds_ij by column, ds_ij = scale p_ij (dout_i v_j - delta_i)."""
    pid = tl.program_id(0)
    bh = (pid // own_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    dtype: tl.constexpr = Q.dtype.element_ty
    cols, cy, cx = cols16 * 16, cy16 * 16, cx16 * 16
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column, r = tl.arange(0, BLOCK_X), tl.arange(0, _LINES)
    own_first, own_line, own_x0, own_ok, own_lines_in, own_x = _place(
        pid % own_tiles, N, GX, lines, own_lines, offs_m, BLOCK_M, GRID, LONG
    )
    short = _place(0, S, GX, lines, walk_lines, offs_n, BLOCK_N, GRID, LONG)
    line_in_tile, short_x = short[4], short[5]
    own_hot = (own_lines_in[:, None] == r[None, :]).to(dtype)
    own_x_hot = (own_x[:, None] == column[None, :]).to(dtype)
    walk_hot = (line_in_tile[None, :] == r[:, None]).to(dtype)
    walk_x_hot = (short_x[:, None] == column[None, :]).to(dtype)
    Q += b * q_stride_b + h * q_stride_h
    K += b * k_stride_b + h * k_stride_h
    V += b * v_stride_b + h * v_stride_h
    DOUT += b * do_stride_b + h * do_stride_h
    T += bh * N * cols
    U += bh * S * cols
    DT += bh * N * cols
    q = load_rows(Q, own_first, q_stride_n, offs_m, offs_d, q_stride_d, own_ok, offs_d < W)  # [BLOCK_M, BLOCK_D]
    do = load_rows(DOUT, own_first, do_stride_n, offs_m, offs_dv, do_stride_d, own_ok, offs_dv < DV)
    out = load_rows(OUT + bh * N * DV, own_first, DV, offs_m, offs_dv, 1, own_ok, offs_dv < DV)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + bh * N + own_first + offs_m, mask=own_ok, other=0.0)
    tl.store(DELTA + bh * N + own_first + offs_m, delta, mask=own_ok)
    lse = tl.load(LSE + bh * N + own_first + offs_m, mask=own_ok, other=0.0) * LOG2E
    base = tl.where(lse == float("-inf"), 0.0, lse)
    tx = tl.zeros([1, 1], tl.float32)
    if GRID and HAS_T and not LONG:
        tx = _by_x(T, own_first, cols, offs_m, own_ok, cx, short_x, short_x < GX)
    exponent_scale = scale * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dtx = tl.zeros([BLOCK_M, BLOCK_X], tl.float32)
    end = walk_tiles
    if CAUSAL:
        last = tl.max(tl.where(own_ok, own_first + offs_m, 0), 0)
        end = _tile_of(last, GX, walk_lines, BLOCK_N, GRID, LONG) + 1
    for tile in range(0, end):
        first, line, x0, ok, _line, walk_x = _place(tile, S, GX, lines, walk_lines, offs_n, BLOCK_N, GRID, LONG)
        if HAS_MASK:
            mask_row = MASK + b * mask_stride_b + tl.cast(first, tl.int64) * mask_stride_n
            ok &= tl.load(mask_row + offs_n * mask_stride_n, mask=ok, other=0) != 0
        k = load_rows(K, first, k_stride_n, offs_n, offs_d, k_stride_d, ok, offs_d < W)  # [BLOCK_N, BLOCK_D]
        v = load_rows(V, first, v_stride_n, offs_n, offs_dv, v_stride_d, ok, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
        pair_ok = own_ok[:, None] & ok[None, :]
        index = 0
        if BUCKET:
            index = _index(BUCKETS, own_first + offs_m, first + offs_n, pair_ok, S, False)
        e = _scores(
            q, k, tx, T, U, index, pair_ok, own_hot, own_x_hot, walk_hot,
            own_first, own_line, own_x0, own_ok, own_x, first, line, x0, ok, walk_x,
            offs_m, offs_n, cols, cy, cx, GY, GX, lines, own_lines, walk_lines,
            BLOCK_X, GRID, LONG, BUCKET, HAS_T, HAS_U, PRECISION,
        )  # fmt: skip
        e = e * exponent_scale + tl.where(ok, 0.0, float("-inf"))[None, :]
        if CAUSAL:
            e = tl.where((own_first + offs_m)[:, None] >= (first + offs_n)[None, :], e, float("-inf"))
        p = tl.exp2(e - base[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(SEED, bh, prefix + own_first + offs_m, prefix + first + offs_n, drop_below, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None]) * scale
        acc = tl.dot(ds.to(dtype), k, acc, input_precision=PRECISION)
        if HAS_T:
            dtx = _take(
                ds, dtx, DT, index, pair_ok, own_first, own_ok, line, ok, line_in_tile, walk_x, walk_x_hot, offs_m,
                cols, cy, cx, GY, lines, walk_lines, GRID, LONG, BUCKET, dtype, PRECISION,
            )  # fmt: skip
    store_rows(DQ + bh * N * W, own_first, W, offs_m, offs_d, 1, own_ok, offs_d < W, acc)
    if GRID and HAS_T and not LONG:
        store_rows(DT + cx, own_first, cols, offs_m, column, 1, own_ok, column < GX, dtx)


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_dkv_kernel(
    Q, K, V, T, U, BUCKETS, MASK, SEED, LSE, DOUT, DELTA, DK, DV_OUT, DU,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    do_stride_b, do_stride_h, do_stride_n, do_stride_d, mask_stride_b, mask_stride_n,
    H, N, S, W, DV, cols16, cy16, cx16, GY, GX, lines, own_lines, walk_lines, own_tiles, walk_tiles,
    prefix, drop_below, keep_scale, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_X: tl.constexpr,
    GRID: tl.constexpr, LONG: tl.constexpr, BUCKET: tl.constexpr, HAS_T: tl.constexpr, HAS_U: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_j = sum_i ds_ij q_i, dv_j = sum_i p_ij dout_i and du_j = sums of ds_ij by column; rows of a tile are keys."""
    pid = tl.program_id(0)
    bh = (pid // own_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    dtype: tl.constexpr = Q.dtype.element_ty
    cols, cy, cx = cols16 * 16, cy16 * 16, cx16 * 16
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column, r = tl.arange(0, BLOCK_X), tl.arange(0, _LINES)
    own_first, own_line, own_x0, own_in, own_lines_in, own_x = _place(
        pid % own_tiles, S, GX, lines, own_lines, offs_m, BLOCK_M, GRID, LONG
    )
    short = _place(0, N, GX, lines, walk_lines, offs_n, BLOCK_N, GRID, LONG)
    line_in_tile, short_x = short[4], short[5]
    own_hot = (own_lines_in[:, None] == r[None, :]).to(dtype)
    own_x_hot = (own_x[:, None] == column[None, :]).to(dtype)
    walk_hot = (line_in_tile[None, :] == r[:, None]).to(dtype)
    walk_x_hot = (short_x[:, None] == column[None, :]).to(dtype)
    own_ok = own_in
    if HAS_MASK:
        mask_row = MASK + b * mask_stride_b + tl.cast(own_first, tl.int64) * mask_stride_n
        own_ok &= tl.load(mask_row + offs_m * mask_stride_n, mask=own_in, other=0) != 0
    Q += b * q_stride_b + h * q_stride_h
    K += b * k_stride_b + h * k_stride_h
    V += b * v_stride_b + h * v_stride_h
    DOUT += b * do_stride_b + h * do_stride_h
    T += bh * N * cols
    U += bh * S * cols
    DU += bh * S * cols
    k = load_rows(K, own_first, k_stride_n, offs_m, offs_d, k_stride_d, own_ok, offs_d < W)  # [BLOCK_M, BLOCK_D]
    v = load_rows(V, own_first, v_stride_n, offs_m, offs_dv, v_stride_d, own_ok, offs_dv < DV)
    ux = tl.zeros([1, 1], tl.float32)
    if GRID and HAS_U and not LONG:
        ux = _by_x(U, own_first, cols, offs_m, own_ok, cx, short_x, short_x < GX)
    exponent_scale = scale * LOG2E

    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    dux = tl.zeros([BLOCK_M, BLOCK_X], tl.float32)
    start = 0
    if CAUSAL:
        start = _tile_of(own_first, GX, walk_lines, BLOCK_N, GRID, LONG)
    for tile in range(start, walk_tiles):
        first, line, x0, ok, _line, walk_x = _place(tile, N, GX, lines, walk_lines, offs_n, BLOCK_N, GRID, LONG)
        q = load_rows(Q, first, q_stride_n, offs_n, offs_d, q_stride_d, ok, offs_d < W)  # [BLOCK_N, BLOCK_D]
        do = load_rows(DOUT, first, do_stride_n, offs_n, offs_dv, do_stride_d, ok, offs_dv < DV)
        lse = tl.load(LSE + bh * N + first + offs_n, mask=ok, other=0.0) * LOG2E
        delta = tl.load(DELTA + bh * N + first + offs_n, mask=ok, other=0.0)
        base = tl.where(lse == float("-inf"), 0.0, lse)
        pair_ok = own_ok[:, None] & ok[None, :]
        index = 0
        if BUCKET:
            index = _index(BUCKETS, own_first + offs_m, first + offs_n, pair_ok, S, True)
        e = _scores(
            k, q, ux, U, T, index, pair_ok, own_hot, own_x_hot, walk_hot,
            own_first, own_line, own_x0, own_ok, own_x, first, line, x0, ok, walk_x,
            offs_m, offs_n, cols, cy, cx, GY, GX, lines, own_lines, walk_lines,
            BLOCK_X, GRID, LONG, BUCKET, HAS_U, HAS_T, PRECISION,
        )  # fmt: skip
        e = e * exponent_scale
        allowed = pair_ok
        if CAUSAL:
            allowed &= (own_first + offs_m)[:, None] <= (first + offs_n)[None, :]
        p = tl.exp2(tl.where(allowed, e - base[None, :], float("-inf")))
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            kept = _kept(SEED, bh, prefix + first + offs_n, prefix + own_first + offs_m, drop_below, True)
            dp = tl.where(kept, dp * keep_scale, 0.0)
            dropped = tl.where(kept, p * keep_scale, 0.0)
        dv = tl.dot(dropped.to(dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :]) * scale
        dk = tl.dot(ds.to(dtype), q, dk, input_precision=PRECISION)
        if HAS_U:
            dux = _take(
                ds, dux, DU, index, pair_ok, own_first, own_in, line, ok, line_in_tile, walk_x, walk_x_hot, offs_m,
                cols, cy, cx, GY, lines, walk_lines, GRID, LONG, BUCKET, dtype, PRECISION,
            )  # fmt: skip
    store_rows(DK + bh * S * W, own_first, W, offs_m, offs_d, 1, own_in, offs_d < W, dk)
    store_rows(DV_OUT + bh * S * DV, own_first, DV, offs_m, offs_dv, 1, own_in, offs_dv < DV, dv)
    if GRID and HAS_U and not LONG:
        store_rows(DU + cx, own_first, cols, offs_m, column, 1, own_in, column < GX, dux)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
