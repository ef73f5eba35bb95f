"""The Triton kernels of the inner block; `fused` launches them, `ops` says what they compute.

S sequences of N tokens, C channels, H heads of D = C / H, F channels inside the MLP. A tile is BLOCK_R rows that hold
`per_tile` whole sequences, packed without gaps; scores between sequences are masked, so that nothing passes from one
to another. Programs are persistent: each walks over many tiles.

    tnt_fwd_kernel        a tile, from the first LayerNorm to the last residual; every head, then every part of the MLP
    tnt_mlp_dx_kernel     a tile: the gradient in the middle of the block, and sums for LayerNorm 2 and fc2's bias
    tnt_mlp_dw_kernel     BLOCK_F hidden channels over one slice of the rows: gradients of fc1 and fc2, partial sums
    tnt_attn_dx_kernel    a tile: dx, and sums for LayerNorm 1 and the bias of the projection
    tnt_attn_dw_kernel    one head over one slice of the tiles: gradients of qkv and projection, partial sums

A head narrower than 16 (or not a power of two) is padded in registers, by masked loads of its weights: nothing is
packed in memory, and weights come from the cache. Products run on the matrix units in the dtype of the weights
(float32 in plain registers: three tf32 products
spill), all else in float32, exponents in base 2. No atomics: equal inputs give
equal bits.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E

# Lengths never specialise a kernel: the first call on a new length compiles nothing.
_RUNTIME = ["S", "N", "per_tile", "tiles", "slice_length", "drop_threshold", "path_threshold"]
_INV_SQRT2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _hash(u):
    """lowbias32, as in `dropping`."""
    u = u ^ (u >> 16)
    u = u * 0x7FEB352D
    u = u ^ (u >> 15)
    u = u * 0x846CA68B
    return u ^ (u >> 16)


@triton.jit
def _factor(
    SEED, BRANCH: tl.constexpr, sequence, position, offs_c, drop_threshold, path_threshold, drop_scale, path_scale,
    C: tl.constexpr, DROP: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """What a branch is multiplied by [R, C]; see `dropping.factor`."""
    seed = tl.load(SEED)
    high = (seed >> 32).to(tl.uint32) + BRANCH
    key = _hash((seed & 0xFFFFFFFF).to(tl.uint32) ^ _hash(high))
    keys = _hash(key + sequence.to(tl.uint32))
    factor = tl.full([sequence.shape[0], offs_c.shape[0]], 1.0, tl.float32)
    if PATH:
        whole = _hash(keys ^ _hash(tl.zeros_like(keys)))
        kept = (whole >> 1).to(tl.int32) >= path_threshold
        factor *= tl.where(kept, path_scale, 0.0)[:, None]
    if DROP:
        place = (position * C + 1)[:, None] + offs_c[None, :]
        kept = (_hash(keys[:, None] ^ _hash(place.to(tl.uint32))) >> 1).to(tl.int32) >= drop_threshold
        factor *= tl.where(kept, drop_scale, 0.0)
    return factor


@triton.jit
def _read(
    X, row0, sequence, position, stride_s, stride_n, stride_c, offs_row, offs_c, ok,
    C: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """A tile of rows in float32; the part of its place outside the tile in 64 bits."""
    if DENSE:
        place = X + row0 * C + (offs_row[:, None] * C + offs_c[None, :])
    else:
        rows = sequence.to(tl.int64) * stride_s + position.to(tl.int64) * stride_n
        place = X + rows[:, None] + (offs_c * stride_c)[None, :]
    return tl.load(place, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _write(X, row0, offs_row, offs_c, ok, x, C: tl.constexpr):
    tl.store(X + row0 * C + (offs_row[:, None] * C + offs_c[None, :]), x.to(X.dtype.element_ty), mask=ok)


@triton.jit
def _normalise(x, c_ok, eps, C: tl.constexpr):
    """(xhat, 1 / deviation) of rows x [R, C] in float32; 0 beyond C."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(c_ok[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _normalise_backward(dxhat, xhat, rstd, C: tl.constexpr):
    mean = tl.sum(dxhat, 1) / C
    slope = tl.sum(dxhat * xhat, 1) / C
    return (dxhat - mean[:, None] - xhat * slope[:, None]) * rstd[:, None]


@triton.jit
def _matrix(W, row0, offs_row, row_ok, offs_col, col_ok, COLUMNS: tl.constexpr):
    """Tile of a weight, rows row0 + offs_row of COLUMNS each."""
    mask = row_ok[:, None] & col_ok[None, :]
    return tl.load(W + row0 * COLUMNS + offs_row[:, None] * COLUMNS + offs_col[None, :], mask=mask, other=0.0)


@triton.jit
def _vector(V, offs, ok, PRESENT: tl.constexpr):
    """A bias in float32, 0 where there is none."""
    if PRESENT:
        return tl.load(V + offs, mask=ok, other=0.0).to(tl.float32)
    return tl.zeros([offs.shape[0]], tl.float32)


@triton.jit
def _head_qkv(
    normed, QKV_W, QKV_B, h, offs_d, d_ok, offs_c, c_ok,
    C: tl.constexpr, D: tl.constexpr, QKV_BIAS: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values [R, D] of one head in the dtype of the products, and its weights [D, C]."""
    wq = _matrix(QKV_W, h * D, offs_d, d_ok, offs_c, c_ok, C)  # [D, C]
    q = tl.dot(normed, tl.trans(wq), input_precision="ieee") + _vector(QKV_B, h * D + offs_d, d_ok, QKV_BIAS)[None, :]
    wk = _matrix(QKV_W, C + h * D, offs_d, d_ok, offs_c, c_ok, C)
    k = (
        tl.dot(normed, tl.trans(wk), input_precision="ieee")
        + _vector(QKV_B, C + h * D + offs_d, d_ok, QKV_BIAS)[None, :]
    )
    wv = _matrix(QKV_W, 2 * C + h * D, offs_d, d_ok, offs_c, c_ok, C)
    v = (
        tl.dot(normed, tl.trans(wv), input_precision="ieee")
        + _vector(QKV_B, 2 * C + h * D + offs_d, d_ok, QKV_BIAS)[None, :]
    )
    return q.to(normed.dtype), k.to(normed.dtype), v.to(normed.dtype), wq, wk, wv


@triton.jit
def _weights(q, k, same, scale):
    """softmax(q k^T / sqrt(D)) [R, R] within each sequence; `scale` is log2(e) / sqrt(D)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(same, s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])  # a row always sees itself
    return p / tl.sum(p, 1)[:, None]


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_fwd_kernel(
    X, NORM1_W, NORM1_B, QKV_W, QKV_B, PROJ_W, PROJ_B, NORM2_W, NORM2_B, FC1_W, FC1_B, FC2_W, FC2_B, SEED, OUT, MIDDLE,
    x_stride_s, x_stride_n, x_stride_c, S, N, per_tile, tiles, eps, scale,
    drop_threshold, path_threshold, drop_scale, path_scale,
    C: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
    QKV_BIAS: tl.constexpr, PROJ_BIAS: tl.constexpr, FC1_BIAS: tl.constexpr, FC2_BIAS: tl.constexpr,
    DROP: tl.constexpr, PATH: tl.constexpr, DENSE: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out = y + f2 (fc2(GELU(fc1(LN2(y))))), y = x + f1 proj(attention(LN1(x))), tile by tile."""
    D: tl.constexpr = C // H
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    offs_f = tl.arange(0, BLOCK_F)
    c_ok = offs_c < C
    d_ok = offs_d < D
    local = offs_r // N
    position = offs_r % N
    same = local[:, None] == local[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sequence = tile * per_tile + local
        row0 = tl.cast(tile, tl.int64) * (per_tile * N)
        ok = ((local < per_tile) & (sequence < S))[:, None] & c_ok[None, :]
        x = _read(
            X, row0, sequence, position, x_stride_s, x_stride_n, x_stride_c, offs_r, offs_c, ok, C, DENSE
        )  # [R, C]
        xhat, _ = _normalise(x, c_ok, eps, C)
        normed = xhat * _vector(NORM1_W, offs_c, c_ok, True)[None, :] + _vector(NORM1_B, offs_c, c_ok, True)[None, :]
        normed = normed.to(QKV_W.dtype.element_ty)
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for h in range(0, H):
            q, k, v, _wq, _wk, _wv = _head_qkv(normed, QKV_W, QKV_B, h, offs_d, d_ok, offs_c, c_ok, C, D, QKV_BIAS)
            p = _weights(q, k, same, scale * LOG2E)
            o = tl.dot(p.to(v.dtype), v, input_precision="ieee")  # [R, D]
            wo = _matrix(PROJ_W + h * D, 0, offs_c, c_ok, offs_d, d_ok, C)  # [C out, D]
            acc = tl.dot(o.to(wo.dtype), tl.trans(wo), acc, input_precision="ieee")
        branch = acc + _vector(PROJ_B, offs_c, c_ok, PROJ_BIAS)[None, :]
        if DROP or PATH:
            branch *= _factor(
                SEED,
                0,
                sequence,
                position,
                offs_c,
                drop_threshold,
                path_threshold,
                drop_scale,
                path_scale,
                C,
                DROP,
                PATH,
            )
        # x is read again rather than held in registers through the heads
        x = branch + _read(
            X, row0, sequence, position, x_stride_s, x_stride_n, x_stride_c, offs_r, offs_c, ok, C, DENSE
        )
        if SAVE:
            _write(MIDDLE, row0, offs_r, offs_c, ok, x, C)
        xhat, _ = _normalise(x, c_ok, eps, C)
        normed = xhat * _vector(NORM2_W, offs_c, c_ok, True)[None, :] + _vector(NORM2_B, offs_c, c_ok, True)[None, :]
        normed = normed.to(FC1_W.dtype.element_ty)
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for f0 in range(0, F, BLOCK_F):
            f_ok = f0 + offs_f < F
            w1 = _matrix(FC1_W, f0, offs_f, f_ok, offs_c, c_ok, C)  # [F, C]
            u = tl.dot(normed, tl.trans(w1), input_precision="ieee")
            u += _vector(FC1_B, f0 + offs_f, f_ok, FC1_BIAS)[None, :]
            gelu = u * 0.5 * (1.0 + tl.math.erf(u * _INV_SQRT2))
            w2 = _matrix(FC2_W + f0, 0, offs_c, c_ok, offs_f, f_ok, F)  # [C out, F]
            acc = tl.dot(gelu.to(w2.dtype), tl.trans(w2), acc, input_precision="ieee")
        branch = acc + _vector(FC2_B, offs_c, c_ok, FC2_BIAS)[None, :]
        if DROP or PATH:
            branch *= _factor(
                SEED,
                1,
                sequence,
                position,
                offs_c,
                drop_threshold,
                path_threshold,
                drop_scale,
                path_scale,
                C,
                DROP,
                PATH,
            )
        _write(OUT, row0, offs_r, offs_c, ok, x + branch, C)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_mlp_dx_kernel(
    DOUT, MIDDLE, NORM2_W, NORM2_B, FC1_W, FC1_B, FC2_W, SEED, DMIDDLE, SUMS,
    dout_stride_s, dout_stride_n, dout_stride_c, S, N, per_tile, tiles, eps,
    drop_threshold, path_threshold, drop_scale, path_scale,
    C: tl.constexpr, F: tl.constexpr, FC1_BIAS: tl.constexpr,
    DROP: tl.constexpr, PATH: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dy = dout + LN2 backward of fc1^T (GELU'(u) fc2^T (f2 dout)); sums of dLN2 xhat, dLN2 and f2 dout by program."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_f = tl.arange(0, BLOCK_F)
    c_ok = offs_c < C
    local = offs_r // N
    position = offs_r % N
    gain = _vector(NORM2_W, offs_c, c_ok, True)
    sum_gain = tl.zeros([BLOCK_C], tl.float32)
    sum_shift = tl.zeros([BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sequence = tile * per_tile + local
        row0 = tl.cast(tile, tl.int64) * (per_tile * N)
        ok = ((local < per_tile) & (sequence < S))[:, None] & c_ok[None, :]
        y = _read(MIDDLE, row0, sequence, position, 0, 0, 1, offs_r, offs_c, ok, C, True)
        xhat, _ = _normalise(y, c_ok, eps, C)
        normed = (xhat * gain[None, :] + _vector(NORM2_B, offs_c, c_ok, True)[None, :]).to(FC1_W.dtype.element_ty)
        dbranch = _read(
            DOUT, row0, sequence, position, dout_stride_s, dout_stride_n, dout_stride_c, offs_r, offs_c, ok, C, DENSE
        )
        if DROP or PATH:
            dbranch *= _factor(
                SEED,
                1,
                sequence,
                position,
                offs_c,
                drop_threshold,
                path_threshold,
                drop_scale,
                path_scale,
                C,
                DROP,
                PATH,
            )
        sum_bias += tl.sum(dbranch, 0)
        dbranch = dbranch.to(FC1_W.dtype.element_ty)
        dnormed = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for f0 in range(0, F, BLOCK_F):
            f_ok = f0 + offs_f < F
            w1 = _matrix(FC1_W, f0, offs_f, f_ok, offs_c, c_ok, C)  # [F, C]
            u = tl.dot(normed, tl.trans(w1), input_precision="ieee")
            u += _vector(FC1_B, f0 + offs_f, f_ok, FC1_BIAS)[None, :]
            w2 = _matrix(FC2_W + f0, 0, offs_c, c_ok, offs_f, f_ok, F)  # [C out, F]
            du = tl.dot(dbranch, w2, input_precision="ieee")
            du *= 0.5 * (1.0 + tl.math.erf(u * _INV_SQRT2)) + u * _INV_SQRT_2PI * tl.exp2(u * u * (-0.5 * LOG2E))
            dnormed = tl.dot(du.to(w1.dtype), w1, dnormed, input_precision="ieee")
        # What the loop did not need is read again rather than held in registers through it.
        y = _read(MIDDLE, row0, sequence, position, 0, 0, 1, offs_r, offs_c, ok, C, True)
        xhat, rstd = _normalise(y, c_ok, eps, C)
        sum_gain += tl.sum(dnormed * xhat, 0)
        sum_shift += tl.sum(dnormed, 0)
        dy = _read(
            DOUT, row0, sequence, position, dout_stride_s, dout_stride_n, dout_stride_c, offs_r, offs_c, ok, C, DENSE
        )
        dy += _normalise_backward(dnormed * gain[None, :], xhat, rstd, C)
        _write(DMIDDLE, row0, offs_r, offs_c, ok, dy, C)
    SUMS += tl.program_id(0).to(tl.int64) * (3 * C)
    tl.store(SUMS + offs_c, sum_gain, mask=c_ok)
    tl.store(SUMS + C + offs_c, sum_shift, mask=c_ok)
    tl.store(SUMS + 2 * C + offs_c, sum_bias, mask=c_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_mlp_dw_kernel(
    DOUT, MIDDLE, NORM2_W, NORM2_B, FC1_W, FC1_B, FC2_W, SEED, DFC1, DFC1_B, DFC2,
    dout_stride_s, dout_stride_n, dout_stride_c, S, N, tiles, slice_length, eps,
    drop_threshold, path_threshold, drop_scale, path_scale,
    C: tl.constexpr, F: tl.constexpr, FC1_BIAS: tl.constexpr,
    DROP: tl.constexpr, PATH: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dfc1 = du^T LN2(y), dfc1_bias = sum du, dfc2^T = GELU(u)^T (f2 dout): BLOCK_F of F, over a slice of the tiles."""
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    f0 = (tl.program_id(0) % F_BLOCKS) * BLOCK_F
    part = tl.program_id(0) // F_BLOCKS
    offs_f = tl.arange(0, BLOCK_F)
    f_ok = f0 + offs_f < F
    c_ok = offs_c < C
    w1 = _matrix(FC1_W, f0, offs_f, f_ok, offs_c, c_ok, C)  # [F, C]
    w2 = _matrix(FC2_W + f0, 0, offs_c, c_ok, offs_f, f_ok, F)  # [C out, F]
    dfc1 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    dfc2 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_F], tl.float32)
    rows = tl.cast(S, tl.int64) * N
    for tile in range(part * slice_length, tl.minimum((part + 1) * slice_length, tiles)):
        # The MLP knows no sequences: a tile is BLOCK_R rows of all.
        row0 = tl.cast(tile, tl.int64) * BLOCK_R
        row = row0 + offs_r
        sequence = row // N
        position = (row % N).to(tl.int32)
        ok = (row < rows)[:, None] & c_ok[None, :]
        y = _read(MIDDLE, row0, sequence, position, 0, 0, 1, offs_r, offs_c, ok, C, True)
        xhat, _ = _normalise(y, c_ok, eps, C)
        normed = xhat * _vector(NORM2_W, offs_c, c_ok, True)[None, :] + _vector(NORM2_B, offs_c, c_ok, True)[None, :]
        normed = normed.to(w1.dtype)
        dbranch = _read(
            DOUT, row0, sequence, position, dout_stride_s, dout_stride_n, dout_stride_c, offs_r, offs_c, ok, C, DENSE
        )
        if DROP or PATH:
            dbranch *= _factor(
                SEED,
                1,
                sequence,
                position,
                offs_c,
                drop_threshold,
                path_threshold,
                drop_scale,
                path_scale,
                C,
                DROP,
                PATH,
            )
        dbranch = dbranch.to(w1.dtype)
        u = tl.dot(normed, tl.trans(w1), input_precision="ieee")
        u += _vector(FC1_B, f0 + offs_f, f_ok, FC1_BIAS)[None, :]
        cumulative = 0.5 * (1.0 + tl.math.erf(u * _INV_SQRT2))
        dfc2 = tl.dot(tl.trans((u * cumulative).to(w1.dtype)), dbranch, dfc2, input_precision="ieee")
        du = tl.dot(dbranch, w2, input_precision="ieee")
        du *= cumulative + u * _INV_SQRT_2PI * tl.exp2(u * u * (-0.5 * LOG2E))
        dbias += tl.sum(du, 0)  # rows beyond the last have du = 0: their dout is
        dfc1 = tl.dot(tl.trans(du.to(w1.dtype)), normed, dfc1, input_precision="ieee")
    ok = f_ok[:, None] & c_ok[None, :]
    place = tl.cast(part, tl.int64) * (F * C) + (f0 + offs_f)[:, None] * C + offs_c[None, :]
    tl.store(DFC1 + place, dfc1, mask=ok)
    tl.store(DFC2 + place, dfc2, mask=ok)
    tl.store(DFC1_B + tl.cast(part, tl.int64) * F + f0 + offs_f, dbias, mask=f_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_attn_dx_kernel(
    DMIDDLE, X, NORM1_W, NORM1_B, QKV_W, QKV_B, PROJ_W, SEED, DX, SUMS,
    x_stride_s, x_stride_n, x_stride_c, S, N, per_tile, tiles, eps, scale,
    drop_threshold, path_threshold, drop_scale, path_scale,
    C: tl.constexpr, H: tl.constexpr, QKV_BIAS: tl.constexpr,
    DROP: tl.constexpr, PATH: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = dy + LN1 backward of (dq wq + dk wk + dv wv); sums of dLN1 xhat, dLN1 and f1 dy by program."""
    D: tl.constexpr = C // H
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    c_ok = offs_c < C
    d_ok = offs_d < D
    local = offs_r // N
    position = offs_r % N
    same = local[:, None] == local[None, :]
    gain = _vector(NORM1_W, offs_c, c_ok, True)
    sum_gain = tl.zeros([BLOCK_C], tl.float32)
    sum_shift = tl.zeros([BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sequence = tile * per_tile + local
        row0 = tl.cast(tile, tl.int64) * (per_tile * N)
        ok = ((local < per_tile) & (sequence < S))[:, None] & c_ok[None, :]
        x = _read(X, row0, sequence, position, x_stride_s, x_stride_n, x_stride_c, offs_r, offs_c, ok, C, DENSE)
        xhat, _ = _normalise(x, c_ok, eps, C)
        normed = (xhat * gain[None, :] + _vector(NORM1_B, offs_c, c_ok, True)[None, :]).to(QKV_W.dtype.element_ty)
        dbranch = _read(DMIDDLE, row0, sequence, position, 0, 0, 1, offs_r, offs_c, ok, C, True)
        if DROP or PATH:
            dbranch *= _factor(
                SEED,
                0,
                sequence,
                position,
                offs_c,
                drop_threshold,
                path_threshold,
                drop_scale,
                path_scale,
                C,
                DROP,
                PATH,
            )
        sum_bias += tl.sum(dbranch, 0)
        dbranch = dbranch.to(QKV_W.dtype.element_ty)
        dnormed = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for h in range(0, H):
            q, k, v, wq, wk, wv = _head_qkv(normed, QKV_W, QKV_B, h, offs_d, d_ok, offs_c, c_ok, C, D, QKV_BIAS)
            p = _weights(q, k, same, scale * LOG2E)
            wo = _matrix(PROJ_W + h * D, 0, offs_c, c_ok, offs_d, d_ok, C)  # [C out, D]
            do = tl.dot(dbranch, wo, input_precision="ieee").to(v.dtype)  # [R, D]
            dv = tl.dot(tl.trans(p.to(v.dtype)), do, input_precision="ieee").to(v.dtype)
            dnormed = tl.dot(dv, wv, dnormed, input_precision="ieee")
            ds = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (ds - tl.sum(p * ds, 1)[:, None]) * scale
            ds = ds.to(v.dtype)
            dq = tl.dot(ds, k, input_precision="ieee").to(v.dtype)
            dnormed = tl.dot(dq, wq, dnormed, input_precision="ieee")
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee").to(v.dtype)
            dnormed = tl.dot(dk, wk, dnormed, input_precision="ieee")
        x = _read(X, row0, sequence, position, x_stride_s, x_stride_n, x_stride_c, offs_r, offs_c, ok, C, DENSE)
        xhat, rstd = _normalise(x, c_ok, eps, C)
        sum_gain += tl.sum(dnormed * xhat, 0)
        sum_shift += tl.sum(dnormed, 0)
        dx = _read(DMIDDLE, row0, sequence, position, 0, 0, 1, offs_r, offs_c, ok, C, True)
        dx += _normalise_backward(dnormed * gain[None, :], xhat, rstd, C)
        _write(DX, row0, offs_r, offs_c, ok, dx, C)
    SUMS += tl.program_id(0).to(tl.int64) * (3 * C)
    tl.store(SUMS + offs_c, sum_gain, mask=c_ok)
    tl.store(SUMS + C + offs_c, sum_shift, mask=c_ok)
    tl.store(SUMS + 2 * C + offs_c, sum_bias, mask=c_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_attn_dw_kernel(
    DMIDDLE, X, NORM1_W, NORM1_B, QKV_W, QKV_B, PROJ_W, SEED, DQKV, DQKV_B, DPROJ,
    x_stride_s, x_stride_n, x_stride_c, S, N, per_tile, tiles, slice_length, eps, scale,
    drop_threshold, path_threshold, drop_scale, path_scale,
    C: tl.constexpr, H: tl.constexpr, QKV_BIAS: tl.constexpr,
    DROP: tl.constexpr, PATH: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dqkv^T = LN1(x)^T (dq, dk, dv), dproj = (f1 dy)^T o, and their biases: one head, over one slice of the tiles."""
    D: tl.constexpr = C // H
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    h = tl.program_id(0) % H
    part = tl.program_id(0) // H
    c_ok = offs_c < C
    d_ok = offs_d < D
    local = offs_r // N
    position = offs_r % N
    same = local[:, None] == local[None, :]
    # [C, D], so that the long axis is the one a matrix instruction wants long
    dwq = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dwk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dwv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dwo = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dbq = tl.zeros([BLOCK_D], tl.float32)
    dbk = tl.zeros([BLOCK_D], tl.float32)
    dbv = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(part * slice_length, tl.minimum((part + 1) * slice_length, tiles)):
        sequence = tile * per_tile + local
        row0 = tl.cast(tile, tl.int64) * (per_tile * N)
        row_ok = (local < per_tile) & (sequence < S)
        ok = row_ok[:, None] & c_ok[None, :]
        x = _read(X, row0, sequence, position, x_stride_s, x_stride_n, x_stride_c, offs_r, offs_c, ok, C, DENSE)
        xhat, _ = _normalise(x, c_ok, eps, C)
        normed = xhat * _vector(NORM1_W, offs_c, c_ok, True)[None, :] + _vector(NORM1_B, offs_c, c_ok, True)[None, :]
        normed = normed.to(QKV_W.dtype.element_ty)
        dbranch = _read(DMIDDLE, row0, sequence, position, 0, 0, 1, offs_r, offs_c, ok, C, True)
        if DROP or PATH:
            dbranch *= _factor(
                SEED,
                0,
                sequence,
                position,
                offs_c,
                drop_threshold,
                path_threshold,
                drop_scale,
                path_scale,
                C,
                DROP,
                PATH,
            )
        dbranch = dbranch.to(QKV_W.dtype.element_ty)
        q, k, v, _wq, _wk, _wv = _head_qkv(normed, QKV_W, QKV_B, h, offs_d, d_ok, offs_c, c_ok, C, D, QKV_BIAS)
        p = _weights(q, k, same, scale * LOG2E)
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee").to(v.dtype)
        dwo = tl.dot(tl.trans(dbranch), o, dwo, input_precision="ieee")
        wo = _matrix(PROJ_W + h * D, 0, offs_c, c_ok, offs_d, d_ok, C)  # [C out, D]
        do = tl.dot(dbranch, wo, input_precision="ieee").to(v.dtype)  # [R, D]
        dv = tl.dot(tl.trans(p.to(v.dtype)), do, input_precision="ieee")
        dbv += tl.sum(dv, 0)
        dwv = tl.dot(tl.trans(normed), dv.to(v.dtype), dwv, input_precision="ieee")
        ds = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (ds - tl.sum(p * ds, 1)[:, None]) * scale).to(v.dtype)
        dq = tl.dot(ds, k, input_precision="ieee")
        dbq += tl.sum(dq, 0)
        dwq = tl.dot(tl.trans(normed), dq.to(v.dtype), dwq, input_precision="ieee")
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
        dbk += tl.sum(dk, 0)
        dwk = tl.dot(tl.trans(normed), dk.to(v.dtype), dwk, input_precision="ieee")
    ok = c_ok[:, None] & d_ok[None, :]
    DQKV += tl.cast(part, tl.int64) * (3 * C * C)
    place = (h * D + offs_d)[None, :] * C + offs_c[:, None]  # rows of qkv are outputs
    tl.store(DQKV + place, dwq, mask=ok)
    tl.store(DQKV + C * C + place, dwk, mask=ok)
    tl.store(DQKV + 2 * C * C + place, dwv, mask=ok)
    tl.store(DPROJ + tl.cast(part, tl.int64) * (C * C) + offs_c[:, None] * C + (h * D + offs_d)[None, :], dwo, mask=ok)
    DQKV_B += tl.cast(part, tl.int64) * (3 * C) + h * D
    tl.store(DQKV_B + offs_d, dbq, mask=d_ok)
    tl.store(DQKV_B + C + offs_d, dbk, mask=d_ok)
    tl.store(DQKV_B + 2 * C + offs_d, dbv, mask=d_ok)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
