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

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, divide_rows, load_rows, store_rows
from medformer_kernels.disentangled.tiles import (
    LINES,
    bucket_index,
    by_x,
    exponents,
    kept_by_dropout,
    own_tile,
    take,
    tile_walked,
    walk_tile,
)

# Lengths and grids never specialise a kernel: the first call on a new length compiles nothing (a new power of two of
# the line, up to the tile, does).
_RUNTIME = ["N", "S", "cols16", "cy16", "cx16", "GY", "GX", "lines", "own_lines", "own_tiles", "walk_tiles", "prefix",
            "drop_below"]  # fmt: skip
_LINES = tl.constexpr(LINES)


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_fwd_kernel(
    Q, K, V, T, U, BUCKETS, MASK, SEED, OUT, LSE,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    mask_stride_b, mask_stride_n,
    H, N, S, cols16, cy16, cx16, GY, GX, lines, own_lines, own_tiles, walk_tiles,
    prefix, drop_below, keep_scale, scale, W: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_X: tl.constexpr,
    GRID: tl.constexpr, WALK_PART: tl.constexpr, BUCKET: tl.constexpr, HAS_T: tl.constexpr, HAS_U: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j softmax_j(scale (q_i k_j + bias)) v_j, and lse_i."""
    pid = tl.program_id(0)
    bh = (pid // own_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    dtype: tl.constexpr = Q.dtype.element_ty
    cols, cy, cx = cols16 * 16, cy16 * 16, cx16 * 16
    exponent_scale = scale * LOG2E
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column, r = tl.arange(0, BLOCK_X), tl.arange(0, _LINES)
    own_first, own_line, own_x0, offs_m, own_ok, own_lines_in, own_x = own_tile(
        pid % own_tiles, N, GX, lines, own_lines, tl.arange(0, BLOCK_M), BLOCK_M, BLOCK_X, GRID
    )
    own_hot = (own_lines_in[:, None] == r[None, :]).to(dtype)
    own_x_hot = (own_x[:, None] == column[None, :]).to(dtype)
    Q += b * q_stride_b + h * q_stride_h
    K += b * k_stride_b + h * k_stride_h
    V += b * v_stride_b + h * v_stride_h
    T += bh * N * cols
    U += bh * S * cols
    q = load_rows(Q, own_first, q_stride_n, offs_m, offs_d, q_stride_d, own_ok, offs_d < W)  # [BLOCK_M, BLOCK_D]
    tx = tl.zeros([1, BLOCK_N], tl.float32)  # by x: the same for all tiles that are whole lines
    if GRID and not WALK_PART:
        if HAS_T:
            tx = by_x(T, own_first, cols, offs_m, own_ok, cx, offs_n, offs_n < GX).to(tl.float32) * exponent_scale
        if not HAS_MASK:
            tx += tl.where(offs_n < GX, 0.0, float("-inf"))[None, :]

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = walk_tiles
    if CAUSAL:
        last = tl.max(tl.where(own_ok, own_first + offs_m, 0), 0)
        end = tile_walked(last, GX, BLOCK_N, GRID, WALK_PART) + 1
    for tile in range(0, end):
        first, line, ok, walk_x = walk_tile(tile, S, GX, offs_n, BLOCK_N, GRID, WALK_PART)
        if HAS_MASK:
            mask_row = MASK + b * mask_stride_b + tl.cast(first, tl.int64) * mask_stride_n
            ok &= tl.load(mask_row + offs_n * mask_stride_n, mask=ok, other=0) != 0
        k = load_rows(K, first, k_stride_n, offs_n, offs_d, k_stride_d, ok, offs_d < W)  # [BLOCK_N, BLOCK_D]
        v = load_rows(V, first, v_stride_n, offs_n, offs_dv, v_stride_d, ok, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
        pair_ok = own_ok[:, None] & ok[None, :]
        index = 0
        if BUCKET:
            index = bucket_index(BUCKETS, own_first + offs_m, first + offs_n, pair_ok, S, False)
        e, by_row = exponents(
            q, k, tx, T, U, index, pair_ok, own_hot, own_x_hot,
            own_first, own_line, own_x0, own_ok, first, line, ok, walk_x,
            offs_m, offs_n, cols, cy, cx, GY, lines, own_lines, exponent_scale,
            BLOCK_X, GRID, WALK_PART, BUCKET, HAS_T, HAS_U, PRECISION,
        )  # fmt: skip
        if HAS_MASK or WALK_PART or not GRID:
            e += tl.where(ok, 0.0, float("-inf"))[None, :]
        if CAUSAL:
            e = tl.where((own_first + offs_m)[:, None] >= (first + offs_n)[None, :], e, float("-inf"))
        new_top = tl.maximum(top, tl.max(e, 1) + by_row)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(e - (base - by_row)[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        if DROPOUT:
            kept = kept_by_dropout(SEED, bh, prefix + own_first + offs_m, prefix + first + offs_n, drop_below, False)
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
    H, N, S, cols16, cy16, cx16, GY, GX, lines, own_lines, own_tiles, walk_tiles,
    prefix, drop_below, keep_scale, scale, W: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_X: tl.constexpr,
    GRID: tl.constexpr, WALK_PART: tl.constexpr, BUCKET: tl.constexpr, HAS_T: tl.constexpr, HAS_U: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DLSE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = sum_j ds_ij k_j and dt_i = sums of ds_ij by column, ds_ij = scale p_ij (dout_i v_j - delta_i)."""
    pid = tl.program_id(0)
    bh = (pid // own_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    dtype: tl.constexpr = Q.dtype.element_ty
    cols, cy, cx = cols16 * 16, cy16 * 16, cx16 * 16
    exponent_scale = scale * LOG2E
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column, r = tl.arange(0, BLOCK_X), tl.arange(0, _LINES)
    own_first, own_line, own_x0, offs_m, own_ok, own_lines_in, own_x = own_tile(
        pid % own_tiles, N, GX, lines, own_lines, tl.arange(0, BLOCK_M), BLOCK_M, BLOCK_X, GRID
    )
    own_hot = (own_lines_in[:, None] == r[None, :]).to(dtype)
    own_x_hot = (own_x[:, None] == column[None, :]).to(dtype)
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
    tx = tl.zeros([1, BLOCK_N], tl.float32)
    if GRID and not WALK_PART:
        if HAS_T:
            tx = by_x(T, own_first, cols, offs_m, own_ok, cx, offs_n, offs_n < GX).to(tl.float32) * exponent_scale
        if not HAS_MASK:
            tx += tl.where(offs_n < GX, 0.0, float("-inf"))[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dtx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = walk_tiles
    if CAUSAL:
        last = tl.max(tl.where(own_ok, own_first + offs_m, 0), 0)
        end = tile_walked(last, GX, BLOCK_N, GRID, WALK_PART) + 1
    for tile in range(0, end):
        first, line, ok, walk_x = walk_tile(tile, S, GX, offs_n, BLOCK_N, GRID, WALK_PART)
        if HAS_MASK:
            mask_row = MASK + b * mask_stride_b + tl.cast(first, tl.int64) * mask_stride_n
            ok &= tl.load(mask_row + offs_n * mask_stride_n, mask=ok, other=0) != 0
        k = load_rows(K, first, k_stride_n, offs_n, offs_d, k_stride_d, ok, offs_d < W)  # [BLOCK_N, BLOCK_D]
        v = load_rows(V, first, v_stride_n, offs_n, offs_dv, v_stride_d, ok, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
        pair_ok = own_ok[:, None] & ok[None, :]
        index = 0
        if BUCKET:
            index = bucket_index(BUCKETS, own_first + offs_m, first + offs_n, pair_ok, S, False)
        e, by_row = exponents(
            q, k, tx, T, U, index, pair_ok, own_hot, own_x_hot,
            own_first, own_line, own_x0, own_ok, first, line, ok, walk_x,
            offs_m, offs_n, cols, cy, cx, GY, lines, own_lines, exponent_scale,
            BLOCK_X, GRID, WALK_PART, BUCKET, HAS_T, HAS_U, PRECISION,
        )  # fmt: skip
        if HAS_MASK or WALK_PART or not GRID:
            e += tl.where(ok, 0.0, float("-inf"))[None, :]
        if CAUSAL:
            e = tl.where((own_first + offs_m)[:, None] >= (first + offs_n)[None, :], e, float("-inf"))
        p = tl.exp2(e - (base - by_row)[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            kept = kept_by_dropout(SEED, bh, prefix + own_first + offs_m, prefix + first + offs_n, drop_below, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(dtype), k, acc, input_precision=PRECISION)
        if HAS_T:
            dtx = take(
                ds, dtx, DT, index, pair_ok, own_first, own_ok, line, ok, walk_x, offs_m, cols, cy, cx, GY, scale,
                GRID, WALK_PART, BUCKET,
            )  # fmt: skip
    store_rows(DQ + bh * N * W, own_first, W, offs_m, offs_d, 1, own_ok, offs_d < W, acc * scale)
    if GRID and HAS_T and not WALK_PART:
        store_rows(DT + cx, own_first, cols, offs_m, offs_n, 1, own_ok, offs_n < GX, dtx * scale)


@triton.jit(do_not_specialize=_RUNTIME)
def disentangled_dkv_kernel(
    Q, K, V, T, U, BUCKETS, MASK, SEED, LSE, DOUT, DELTA, DK, DV_OUT, DU,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    do_stride_b, do_stride_h, do_stride_n, do_stride_d, mask_stride_b, mask_stride_n,
    H, N, S, cols16, cy16, cx16, GY, GX, lines, own_lines, own_tiles, walk_tiles,
    prefix, drop_below, keep_scale, scale, W: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_X: tl.constexpr,
    GRID: tl.constexpr, WALK_PART: tl.constexpr, BUCKET: tl.constexpr, HAS_T: tl.constexpr, HAS_U: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
):  # fmt: skip
    """dk_j = sum_i ds_ij q_i, du_j = sums of ds_ij by column (HAS_DK), dv_j = sum_i p_ij dout_i (HAS_DV)."""
    pid = tl.program_id(0)
    bh = (pid // own_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    dtype: tl.constexpr = Q.dtype.element_ty
    cols, cy, cx = cols16 * 16, cy16 * 16, cx16 * 16
    exponent_scale = scale * LOG2E
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column, r = tl.arange(0, BLOCK_X), tl.arange(0, _LINES)
    own_first, own_line, own_x0, offs_m, own_in, own_lines_in, own_x = own_tile(
        pid % own_tiles, S, GX, lines, own_lines, tl.arange(0, BLOCK_M), BLOCK_M, BLOCK_X, GRID
    )
    own_hot = (own_lines_in[:, None] == r[None, :]).to(dtype)
    own_x_hot = (own_x[:, None] == column[None, :]).to(dtype)
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
    ux = tl.zeros([1, BLOCK_N], tl.float32)
    if GRID and HAS_U and not WALK_PART:
        ux = by_x(U, own_first, cols, offs_m, own_ok, cx, offs_n, offs_n < GX).to(tl.float32) * exponent_scale

    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    dux = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = 0
    if CAUSAL:
        start = tile_walked(own_first, GX, BLOCK_N, GRID, WALK_PART)
    for tile in range(start, walk_tiles):
        first, line, ok, walk_x = walk_tile(tile, N, GX, offs_n, BLOCK_N, GRID, WALK_PART)
        q = load_rows(Q, first, q_stride_n, offs_n, offs_d, q_stride_d, ok, offs_d < W)  # [BLOCK_N, BLOCK_D]
        do = load_rows(DOUT, first, do_stride_n, offs_n, offs_dv, do_stride_d, ok, offs_dv < DV)
        lse = tl.load(LSE + bh * N + first + offs_n, mask=ok, other=0.0) * LOG2E
        delta = tl.load(DELTA + bh * N + first + offs_n, mask=ok, other=0.0)
        base = tl.where(ok & (lse > float("-inf")), lse, float("inf"))  # p = 0 of queries that are not there
        pair_ok = own_ok[:, None] & ok[None, :]
        index = 0
        if BUCKET:
            index = bucket_index(BUCKETS, own_first + offs_m, first + offs_n, pair_ok, S, True)
        e, by_row = exponents(
            k, q, ux, U, T, index, pair_ok, own_hot, own_x_hot,
            own_first, own_line, own_x0, own_ok, first, line, ok, walk_x,
            offs_m, offs_n, cols, cy, cx, GY, lines, own_lines, exponent_scale,
            BLOCK_X, GRID, WALK_PART, BUCKET, HAS_U, HAS_T, PRECISION,
        )  # fmt: skip
        if CAUSAL:
            e = tl.where((own_first + offs_m)[:, None] <= (first + offs_n)[None, :], e, float("-inf"))
        p = tl.exp2(e + by_row[:, None] - base[None, :])
        kept = pair_ok
        if DROPOUT:
            kept = kept_by_dropout(SEED, bh, prefix + first + offs_n, prefix + own_first + offs_m, drop_below, True)
        if HAS_DV:
            dropped = p
            if DROPOUT:
                dropped = tl.where(kept, p * keep_scale, 0.0)
            dv = tl.dot(dropped.to(dtype), do, dv, input_precision=PRECISION)
        if HAS_DK:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(kept, dp * keep_scale, 0.0)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(dtype), q, dk, input_precision=PRECISION)
            if HAS_U:
                dux = take(
                    ds, dux, DU, index, pair_ok, own_first, own_ok, line, ok, walk_x, offs_m, cols, cy, cx, GY, scale,
                    GRID, WALK_PART, BUCKET,
                )  # fmt: skip
    if HAS_MASK:  # a row holds one key's sums: those of padded keys are dropped here, not in each tile
        dk = tl.where(own_ok[:, None], dk, 0.0)
        dv = tl.where(own_ok[:, None], dv, 0.0)
    if HAS_DV:
        store_rows(DV_OUT + bh * S * DV, own_first, DV, offs_m, offs_dv, 1, own_in, offs_dv < DV, dv)
    if HAS_DK:
        store_rows(DK + bh * S * W, own_first, W, offs_m, offs_d, 1, own_in, offs_d < W, dk * scale)
        if GRID and HAS_U and not WALK_PART:
            store_rows(DU + cx, own_first, cols, offs_m, offs_n, 1, own_ok, offs_n < GX, dux * scale)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
