"""The Triton kernels of disentangled attention; `fused` launches them, `ops` derives what they compute.

H heads, N queries, S keys, W and DV widths. A program owns BLOCK_M tokens of one head and walks over the others in
tiles of BLOCK_N:

    disentangled_fwd_kernel   owns queries: out and lse
    disentangled_dq_kernel    owns queries: dQ, dT, and delta = sum(dout * out) - dlse for the next
    disentangled_dkv_kernel   owns keys: dK and dU, dV, or all three

Over a grid the own tokens are whole lines of x and a tile walked over is one line (or, of long lines, part of one), so
that the tables need no gather (`tiles`). Each program alone adds to the rows of its own tokens in their gradients. With
buckets the tables are gathered, and gradients are summed bucket by bucket of a tile.

Products of float16 and bfloat16 run on the matrix units, those of float32 in plain float32; all else in float32,
exponents in base 2. No atomics: equal inputs give equal bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, divide_rows, head_of, load_rows, moved, of_head, store_rows
from medformer_kernels.disentangled.tiles import (
    ROUND,
    add_by_y,
    bucket_index,
    by_x,
    exponents,
    kept_by_dropout,
    lines_before,
    lines_until,
    own_tile,
    take_buckets,
    take_line,
    walk_tile,
)

_ROUND = tl.constexpr(ROUND)

# Lengths and grids never specialise a kernel: the first call on a new length compiles nothing (a new power of two of
# the line, up to the tile, does).
_RUNTIME = ["N", "S", "cols16", "cy16", "cx16", "GY", "GX", "lines", "own_lines", "own_tiles", "prefix"]
_RUNTIME += ["drop_below"]


class Meta(NamedTuple):
    """What a kernel of disentangled attention is compiled for: widths, tiles, and which terms there are."""

    W: int
    DV: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_X: int
    GRID: bool
    """Tokens form a grid: tiles are lines of x."""
    ALIGNED: bool
    """Tiles walked over begin at multiples of 16 tokens, in each head."""
    BUCKET: bool
    HAS_T: bool
    HAS_U: bool
    HAS_MASK: bool
    CAUSAL: bool
    DROPOUT: bool
    PRECISION: str
    HAS_DLSE: bool = False
    HAS_DK: bool = False
    HAS_DV: bool = False


@triton.jit
def _scores(
    z, y, x0, q, tx, K, V, TABLES, MASK, own, offs_n, offs_d, offs_dv, S, grid, exponent_scale, META: tl.constexpr
):
    """A tile of keys and its scores e + by_row in base 2, -inf where no key may be read: see `tiles.exponents`."""
    T, U, BUCKETS = TABLES
    first, z, y, ok, walk_x = walk_tile(z, y, x0, S, grid, offs_n, META)
    if META.HAS_MASK:
        mask_row = MASK.data + tl.cast(first, tl.int64) * MASK.n
        ok &= tl.load(mask_row + offs_n * MASK.n, mask=ok, other=0) != 0
    k = load_rows(K.data, first, K.n, offs_n, offs_d, K.d, ok, offs_d < META.W)  # [BLOCK_N, BLOCK_D]
    v = load_rows(V.data, first, V.n, offs_n, offs_dv, V.d, ok, offs_dv < META.DV)  # [BLOCK_N, BLOCK_DV]
    own_tokens = own[0] + own[3]
    pair_ok = own[2][:, None] & ok[None, :]
    index = offs_n  # not read without buckets
    if META.BUCKET:
        index = bucket_index(BUCKETS, own_tokens, first + offs_n, pair_ok, S, False)
    walk = (first, z, y, ok, walk_x, offs_n)
    e, by_row = exponents(q, k, tx, T, U, index, pair_ok, own, walk, grid, exponent_scale, META.HAS_T, META.HAS_U, META)
    if META.HAS_MASK or not META.GRID:
        e += tl.where(ok, 0.0, float("-inf"))[None, :]
    if META.CAUSAL:
        e = tl.where(own_tokens[:, None] >= (first + offs_n)[None, :], e, float("-inf"))
    return v, e, by_row, k, walk, pair_ok, index


@triton.jit
def _by_x_of_keys(T, own, x, grid, exponent_scale, META: tl.constexpr):
    """What T adds by x to the scores of every tile of these x, -inf behind the line's end."""
    tx = tl.zeros([1, META.BLOCK_N], tl.float32)
    if META.GRID:
        if META.HAS_T:
            tx = by_x(T, own, grid, x, x < grid[4]).to(tl.float32) * exponent_scale
        if not META.HAS_MASK:
            tx += tl.where(x < grid[4], 0.0, float("-inf"))[None, :]
    return tx


@triton.jit
def _lines_of_keys(own, x0, GX, lines, META: tl.constexpr):
    """How many lines of keys are walked over."""
    end = lines
    if META.CAUSAL:
        end = tl.minimum(lines, lines_until(tl.max(tl.where(own[2], own[0] + own[3], 0), 0), x0, GX))
    return end


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_fwd_kernel(
    INPUTS, OUT, LSE, H, N, S, cols16, cy16, cx16, GY, GX, lines, own_lines, own_tiles, prefix, drop_below,
    keep_scale, scale, META: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j softmax_j(scale (q_i k_j + bias)) v_j, and lse_i."""
    Q, K, V, T, U, BUCKETS, MASK, SEED = INPUTS
    pid = tl.program_id(0)
    b, h, bh = head_of(pid // own_tiles, H)
    dtype: tl.constexpr = Q.data.dtype.element_ty
    cols = cols16 * 16
    grid = (cols, cy16 * 16, cx16 * 16, GY, GX, lines, own_lines)
    exponent_scale = scale * LOG2E
    offs_n, offs_d, offs_dv = tl.arange(0, META.BLOCK_N), tl.arange(0, META.BLOCK_D), tl.arange(0, META.BLOCK_DV)
    own = own_tile(pid % own_tiles, N, grid, dtype, META)
    own_first, own_ok, offs_m = own[0], own[2], own[3]
    Q = of_head(Q, b, h)
    K = of_head(K, b, h)
    V = of_head(V, b, h)
    MASK = moved(MASK, b * MASK.b)
    T += bh * N * cols
    U += bh * S * cols
    q = load_rows(Q.data, own_first, Q.n, offs_m, offs_d, Q.d, own_ok, offs_d < META.W)  # [BLOCK_M, BLOCK_D]

    top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_M], tl.float32)
    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    for x0 in range(0, GX, META.BLOCK_N):
        tx = _by_x_of_keys(T, own, x0 + offs_n, grid, exponent_scale, META)
        z, y = 0, 0
        for _ in range(0, _lines_of_keys(own, x0, GX, lines, META)):
            v, e, by_row, _k, walk, _pair_ok, _index = _scores(
                z,
                y,
                x0,
                q,
                tx,
                K,
                V,
                (T, U, BUCKETS),
                MASK,
                own,
                offs_n,
                offs_d,
                offs_dv,
                S,
                grid,
                exponent_scale,
                META,
            )
            new_top = tl.maximum(top, tl.max(e, 1) + by_row)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(e - (base - by_row)[:, None])
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(p, 1)
            if META.DROPOUT:
                kept = kept_by_dropout(
                    SEED, b, h, prefix + own_first + offs_m, prefix + walk[0] + offs_n, drop_below, False
                )
                p = tl.where(kept, p * keep_scale, 0.0)
            acc = tl.dot(p.to(dtype), v, acc * decay[:, None], input_precision=META.PRECISION)
            top = new_top
            y += 1
            z, y = tl.where(y == GY, z + 1, z), tl.where(y == GY, 0, y)
    lse = top + tl.log2(tl.where(total == 0.0, 1.0, total))
    out = OUT + bh * N * META.DV
    store_rows(out, own_first, META.DV, offs_m, offs_dv, 1, own_ok, offs_dv < META.DV, divide_rows(acc, total))
    tl.store(LSE + bh * N + own_first + offs_m, lse / LOG2E, mask=own_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_dq_kernel(
    INPUTS, OUT, LSE, DOUT, DLSE, DELTA, BASE, DQ, DT, H, N, S, cols16, cy16, cx16, GY, GX, lines, own_lines, own_tiles,
    prefix, drop_below, keep_scale, scale, META: tl.constexpr,
):  # fmt: skip
    """dq_i = sum_j ds_ij k_j and dt_i = sums of ds_ij by column, ds_ij = scale p_ij (dout_i v_j - delta_i).

    For the next kernel: delta_i, and lse_i in base 2, or inf of a query without a key, whose p are then 0.
    """
    Q, K, V, T, U, BUCKETS, MASK, SEED = INPUTS
    pid = tl.program_id(0)
    b, h, bh = head_of(pid // own_tiles, H)
    dtype: tl.constexpr = Q.data.dtype.element_ty
    cols = cols16 * 16
    grid = (cols, cy16 * 16, cx16 * 16, GY, GX, lines, own_lines)
    exponent_scale = scale * LOG2E
    offs_n, offs_d, offs_dv = tl.arange(0, META.BLOCK_N), tl.arange(0, META.BLOCK_D), tl.arange(0, META.BLOCK_DV)
    own = own_tile(pid % own_tiles, N, grid, dtype, META)
    own_first, own_ok, offs_m = own[0], own[2], own[3]
    Q = of_head(Q, b, h)
    K = of_head(K, b, h)
    V = of_head(V, b, h)
    MASK = moved(MASK, b * MASK.b)
    DOUT = of_head(DOUT, b, h)
    T += bh * N * cols
    U += bh * S * cols
    DT += bh * N * cols
    q = load_rows(Q.data, own_first, Q.n, offs_m, offs_d, Q.d, own_ok, offs_d < META.W)  # [BLOCK_M, BLOCK_D]
    do = load_rows(DOUT.data, own_first, DOUT.n, offs_m, offs_dv, DOUT.d, own_ok, offs_dv < META.DV)
    out = load_rows(OUT + bh * N * META.DV, own_first, META.DV, offs_m, offs_dv, 1, own_ok, offs_dv < META.DV)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if META.HAS_DLSE:
        delta -= tl.load(DLSE + bh * N + own_first + offs_m, mask=own_ok, other=0.0)
    tl.store(DELTA + bh * N + own_first + offs_m, delta, mask=own_ok)
    lse = tl.load(LSE + bh * N + own_first + offs_m, mask=own_ok, other=0.0) * LOG2E
    base = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(BASE + bh * N + own_first + offs_m, base, mask=own_ok)

    acc = tl.zeros([META.BLOCK_M, META.BLOCK_D], tl.float32)
    for x0 in range(0, GX, META.BLOCK_N):
        tx = _by_x_of_keys(T, own, x0 + offs_n, grid, exponent_scale, META)
        end = _lines_of_keys(own, x0, GX, lines, META)
        dtx = tl.zeros([META.BLOCK_M, META.BLOCK_N], tl.float32)
        for y0 in range(0, GY, _ROUND):
            height = tl.minimum(GY - y0, _ROUND)
            count = lines_before(end, y0, height, GY)
            dty = tl.zeros([META.BLOCK_M, _ROUND], tl.float32)
            dtz = tl.zeros([META.BLOCK_M], tl.float32)
            z, r = 0, 0
            for i in range(0, count):
                v, e, by_row, k, walk, pair_ok, index = _scores(
                    z, y0 + r, x0, q, tx, K, V, (T, U, BUCKETS), MASK, own, offs_n, offs_d, offs_dv, S, grid,
                    exponent_scale, META
                )  # fmt: skip
                p = tl.exp2(e - (base - by_row)[:, None])
                dp = tl.dot(do, tl.trans(v), input_precision=META.PRECISION)
                if META.DROPOUT:
                    kept = kept_by_dropout(
                        SEED, b, h, prefix + own_first + offs_m, prefix + walk[0] + offs_n, drop_below, False
                    )
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                ds = p * (dp - delta[:, None])
                acc = tl.dot(ds.to(dtype), k, acc, input_precision=META.PRECISION)
                if META.HAS_T and META.GRID:
                    last = (r == height - 1) | (i == count - 1)
                    dtx, dty, dtz = take_line(ds, (dtx, dty, dtz), DT, own, z, r, last, grid, scale)
                if META.HAS_T and META.BUCKET:
                    take_buckets(ds, DT, index, pair_ok, own, grid, scale)
                z, r = tl.where(r == height - 1, z + 1, z), tl.where(r == height - 1, 0, r + 1)
            if META.HAS_T and META.GRID:
                add_by_y(dty, DT, own, y0, height, grid, scale)
        if META.HAS_T and META.GRID:
            x = x0 + offs_n
            store_rows(DT + grid[2], own_first, cols, offs_m, x, 1, own_ok, x < GX, dtx * scale)
    store_rows(DQ, bh * N + own_first, META.W, offs_m, offs_d, 1, own_ok, offs_d < META.W, acc * scale)


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_dkv_kernel(
    INPUTS, DOUT, DELTA, BASE, DK, DV_OUT, DU, H, N, S, cols16, cy16, cx16, GY, GX, lines, own_lines, own_tiles,
    prefix, drop_below, keep_scale, scale, META: tl.constexpr,
):  # fmt: skip
    """dk_j = sum_i ds_ij q_i, du_j = sums of ds_ij by column (HAS_DK), dv_j = sum_i p_ij dout_i (HAS_DV)."""
    Q, K, V, T, U, BUCKETS, MASK, SEED = INPUTS
    pid = tl.program_id(0)
    b, h, bh = head_of(pid // own_tiles, H)
    dtype: tl.constexpr = Q.data.dtype.element_ty
    cols = cols16 * 16
    grid = (cols, cy16 * 16, cx16 * 16, GY, GX, lines, own_lines)
    exponent_scale = scale * LOG2E
    offs_n, offs_d, offs_dv = tl.arange(0, META.BLOCK_N), tl.arange(0, META.BLOCK_D), tl.arange(0, META.BLOCK_DV)
    own = own_tile(pid % own_tiles, S, grid, dtype, META)
    own_first, own_x0, own_in, offs_m, own_hot, own_x_hot, own_line = own
    own_ok = own_in
    if META.HAS_MASK:
        mask_row = MASK.data + b * MASK.b + tl.cast(own_first, tl.int64) * MASK.n
        own_ok &= tl.load(mask_row + offs_m * MASK.n, mask=own_in, other=0) != 0
    own = (own_first, own_x0, own_ok, offs_m, own_hot, own_x_hot, own_line)
    Q = of_head(Q, b, h)
    K = of_head(K, b, h)
    V = of_head(V, b, h)
    DOUT = of_head(DOUT, b, h)
    T += bh * N * cols
    U += bh * S * cols
    DU += bh * S * cols
    k = load_rows(K.data, own_first, K.n, offs_m, offs_d, K.d, own_ok, offs_d < META.W)  # [BLOCK_M, BLOCK_D]
    v = load_rows(V.data, own_first, V.n, offs_m, offs_dv, V.d, own_ok, offs_dv < META.DV)

    dk = tl.zeros([META.BLOCK_M, META.BLOCK_D], tl.float32)
    dv = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    head = bh * N
    if META.ALIGNED:
        head = tl.multiple_of(head, 16)
    start = 0
    if META.CAUSAL:
        start = own_first // GX
    for x0 in range(0, GX, META.BLOCK_N):
        ux = tl.zeros([1, META.BLOCK_N], tl.float32)
        if META.GRID and META.HAS_U:
            ux = by_x(U, own, grid, x0 + offs_n, x0 + offs_n < GX).to(tl.float32) * exponent_scale
        dux = tl.zeros([META.BLOCK_M, META.BLOCK_N], tl.float32)
        for y0 in range(0, GY, _ROUND):
            height = tl.minimum(GY - y0, _ROUND)
            count = lines_before(lines, y0, height, GY)
            duy = tl.zeros([META.BLOCK_M, _ROUND], tl.float32)
            duz = tl.zeros([META.BLOCK_M], tl.float32)
            begin = lines_before(start, y0, height, GY)
            z, r = begin // height, begin % height
            for i in range(begin, count):
                first, z, y, ok, walk_x = walk_tile(z, y0 + r, x0, N, grid, offs_n, META)
                q = load_rows(Q.data, first, Q.n, offs_n, offs_d, Q.d, ok, offs_d < META.W)  # [BLOCK_N, BLOCK_D]
                do = load_rows(DOUT.data, first, DOUT.n, offs_n, offs_dv, DOUT.d, ok, offs_dv < META.DV)
                base = tl.load(BASE + head + first + offs_n, mask=ok, other=float("inf"))
                delta = tl.load(DELTA + head + first + offs_n, mask=ok, other=0.0)
                pair_ok = own_ok[:, None] & ok[None, :]
                index = 0
                if META.BUCKET:
                    index = bucket_index(BUCKETS, own_first + offs_m, first + offs_n, pair_ok, S, True)
                walk = (first, z, y, ok, walk_x, offs_n)
                e, by_row = exponents(
                    k, q, ux, U, T, index, pair_ok, own, walk, grid, exponent_scale, META.HAS_U, META.HAS_T, META
                )
                if META.CAUSAL:
                    e = tl.where((own_first + offs_m)[:, None] <= (first + offs_n)[None, :], e, float("-inf"))
                p = tl.exp2(e + by_row[:, None] - base[None, :])
                kept = pair_ok
                if META.DROPOUT:
                    kept = kept_by_dropout(
                        SEED, b, h, prefix + first + offs_n, prefix + own_first + offs_m, drop_below, True
                    )
                if META.HAS_DV:
                    dropped = p
                    if META.DROPOUT:
                        dropped = tl.where(kept, p * keep_scale, 0.0)
                    dv = tl.dot(dropped.to(dtype), do, dv, input_precision=META.PRECISION)
                if META.HAS_DK:
                    dp = tl.dot(v, tl.trans(do), input_precision=META.PRECISION)
                    if META.DROPOUT:
                        dp = tl.where(kept, dp * keep_scale, 0.0)
                    ds = p * (dp - delta[None, :])
                    dk = tl.dot(ds.to(dtype), q, dk, input_precision=META.PRECISION)
                    if META.HAS_U and META.GRID:
                        last = (r == height - 1) | (i == count - 1)
                        dux, duy, duz = take_line(ds, (dux, duy, duz), DU, own, z, r, last, grid, scale)
                    if META.HAS_U and META.BUCKET:
                        take_buckets(ds, DU, index, pair_ok, own, grid, scale)
                z, r = tl.where(r == height - 1, z + 1, z), tl.where(r == height - 1, 0, r + 1)
            if META.HAS_DK and META.HAS_U and META.GRID:
                add_by_y(duy, DU, own, y0, height, grid, scale)
        if META.HAS_DK and META.HAS_U and META.GRID:
            x = x0 + offs_n
            store_rows(DU + grid[2], own_first, cols, offs_m, x, 1, own_ok, x < GX, dux * scale)
    if META.HAS_MASK:  # a row holds one key's sums: those of padded keys are dropped here, not in each tile
        dk = tl.where(own_ok[:, None], dk, 0.0)
        dv = tl.where(own_ok[:, None], dv, 0.0)
    if META.HAS_DV:
        store_rows(DV_OUT + bh * S * META.DV, own_first, META.DV, offs_m, offs_dv, 1, own_in, offs_dv < META.DV, dv)
    if META.HAS_DK:
        store_rows(DK + bh * S * META.W, own_first, META.W, offs_m, offs_d, 1, own_in, offs_d < META.W, dk * scale)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
