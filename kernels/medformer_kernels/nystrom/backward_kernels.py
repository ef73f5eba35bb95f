"""The Triton kernels of the backward pass of Nystrom attention, but for its inverse; `backward` launches them.

    nystrom_delta_kernel         BLOCK_N queries: delta = sum(dout * attention)
    nystrom_conv_weight_kernel   BLOCK_N tokens: the gradient of the convolution's weights, partial sums
    nystrom_landmark_bwd_kernel  BLOCK_M landmarks over one slice of keys (or queries): their gradients, partial sums
    nystrom_token_bwd_kernel     BLOCK_N keys (or queries): dK and dV (or dQ), with what comes back through the means

Weights are computed again; dtypes and names as in `forward_kernels`.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, load_rows, moved, of_head, store_rows
from medformer_kernels.nystrom.forward_kernels import CONV_PAD, RUNTIME, convolve, overlap

_CONV_PAD = tl.constexpr(CONV_PAD)


@triton.jit
def _unpool(
    acc, DMEANS, TOTAL, token, ok, offs_d, d_ok, tokens_x, cells_x, D, P, GZ, GY, GX, LZ, LY, LX, VOLUME: tl.constexpr
):
    """acc + what the gradient of the means is for grid tokens (or ranks): each is in at most two cells an axis."""
    z = token // (GX * GY)
    y = token // GX % GY
    x = token % GX
    if not VOLUME:
        x = token
    steps = 8 if VOLUME else 2
    for step in range(0, steps):  # not unrolled: eight tiles at once overfill the registers
        cx = (x.to(tl.int64) * cells_x // tokens_x).to(tl.int32) + step % 2
        weight = overlap(x, cx, tokens_x, cells_x)
        inside = ok & (cx < cells_x)
        cell = cx
        if VOLUME:
            cy = (y.to(tl.int64) * LY // GY).to(tl.int32) + step // 2 % 2
            cz = (z.to(tl.int64) * LZ // GZ).to(tl.int32) + step // 4
            weight *= overlap(y, cy, GY, LY) * overlap(z, cz, GZ, LZ)
            inside &= (cy < LY) & (cz < LZ)
            cell = (cz * LY + cy) * LX + cx
        inside &= weight > 0.0
        total = tl.load(TOTAL + cell, mask=inside, other=1.0)
        weight = tl.where(inside, weight / tl.where(total > 0.0, total, 1.0), 0.0)
        rows = DMEANS + (P + cell)[:, None] * D + offs_d[None, :]
        acc += weight[:, None] * tl.load(rows, mask=inside[:, None] & d_ok[None, :], other=0.0)
    return acc


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_delta_kernel(OUT, DOUT, V, WEIGHT, MASK, DELTA, H, N, DV, GY, GX, KZ, KY, KX, META: tl.constexpr):
    """delta_i = dout_i (out_i - convolution_i)."""
    n_blocks = tl.cdiv(N, META.BLOCK_N)
    pid = tl.program_id(0)
    n0 = (pid % n_blocks) * META.BLOCK_N
    bh = (pid // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    n_ok = n0 + offs_n < N
    dv_ok = offs_dv < DV
    convolved = tl.zeros([META.BLOCK_N, META.BLOCK_DV], tl.float32)
    if META.HAS_CONV:
        V = of_head(V, b, h)
        MASK = moved(MASK, b * MASK.b)
        WEIGHT += h * (KZ * KY * (KX + 2 * _CONV_PAD))
        convolved = convolve(convolved, V, WEIGHT, MASK, n0, N, DV, GY, GX, KZ, KY, KX, META.HAS_MASK, META)
    OUT = of_head(OUT, b, h)
    DOUT = of_head(DOUT, b, h)
    out = load_rows(OUT.data, n0, OUT.n, offs_n, offs_dv, 1, n_ok, dv_ok).to(tl.float32) - convolved
    dout = load_rows(DOUT.data, n0, DOUT.n, offs_n, offs_dv, DOUT.d, n_ok, dv_ok).to(tl.float32)
    tl.store(DELTA + bh * N + n0 + offs_n, tl.sum(dout * out, 1), mask=n_ok)


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_conv_weight_kernel(DOUT, V, MASK, PART_DWEIGHT, H, N, DV, GY, GX, KZ, KY, KX, META: tl.constexpr):
    """This block's sum_i dout_i v_(i + tap) for each tap of the convolution."""
    n_blocks = tl.cdiv(N, META.BLOCK_N)
    pid = tl.program_id(0)
    n0 = (pid % n_blocks) * META.BLOCK_N
    bh = (pid // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    token = n0 + offs_n
    n_ok = token < N
    dv_ok = offs_dv < DV
    DOUT = of_head(DOUT, b, h)
    V = of_head(V, b, h)
    MASK = moved(MASK, b * MASK.b)
    dout = load_rows(DOUT.data, n0, DOUT.n, offs_n, offs_dv, DOUT.d, n_ok, dv_ok).to(tl.float32)
    taps = KZ * KY * KX
    for tap in range(0, taps):
        dz = tap // (KY * KX) - KZ // 2
        dy = tap // KX % KY - KY // 2
        dx = tap % KX - KX // 2
        shift = (dz * GY + dy) * GX + dx
        x = token % GX + dx
        y = token // GX % GY + dy
        z = token // (GX * GY) + dz
        ok = n_ok & (x >= 0) & (x < GX) & (y >= 0) & (y < GY) & (z >= 0) & (z * GY * GX < N)
        if META.HAS_MASK:
            ok &= tl.load(MASK.data + (token + shift).to(tl.int64) * MASK.n, mask=ok, other=0) != 0
        v = load_rows(V.data, n0 + shift, V.n, offs_n, offs_dv, V.d, ok, dv_ok).to(tl.float32)
        tl.store(PART_DWEIGHT + pid.to(tl.int64) * taps + tap, tl.sum(tl.sum(dout * v, 1), 0))


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_landmark_bwd_kernel(
    X, Y, ROWS, VALUES, ROW_LSE, SHIFT, VALID, COLUMN_LSE, DELTA, UNIT, MASK, PART_DROWS, PART_DVALUES, H, N, L, D, DV,
    slice_length, slices, scale, weight_bits, META: tl.constexpr,
):  # fmt: skip
    """Gradients of landmarks over one slice of the tokens.

    KEYS: X, Y = K, V, ROWS = Q~, VALUES = dvalues / UNIT; p_ln = softmax over the keys of a landmark, and
    de_ln = p_ln (dvalues_l v_n + shift_l); dQ~_l = sum_n de_ln k_n. Otherwise X, Y = Q, dout, ROWS = K~, VALUES =
    solved / UNIT; p_li = softmax over the landmarks of a query, de_li = p_li (solved_l dout_i - delta_i),
    dK~_l = sum_i de_li q_i and dsolved_l = sum_i p_li dout_i.
    """
    m_blocks = tl.cdiv(L, META.BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % m_blocks) * META.BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    m_in = m0 + offs_m < L
    m_ok = m_in
    if META.HAS_VALID:
        m_ok &= tl.load(VALID + b * L + m0 + offs_m, mask=m_in, other=0) != 0
    X = of_head(X, b, h)
    Y = of_head(Y, b, h)
    rows = load_rows(ROWS + bh * L * D, m0, D, offs_m, offs_d, 1, m_ok, offs_d < D)
    values = load_rows(VALUES + bh * L * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV)
    exponent_scale = scale * LOG2E
    unit = tl.load(UNIT + bh)
    row_bias = tl.where(m_ok, 0.0, float("-inf"))
    if META.KEYS:
        row_lse = tl.load(ROW_LSE + bh * L + m0 + offs_m, mask=m_ok, other=float("inf")) * LOG2E
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) - weight_bits
        shift = tl.load(SHIFT + bh * L + m0 + offs_m, mask=m_ok, other=0.0)

    drows = tl.zeros([META.BLOCK_M, META.BLOCK_D], tl.float32)
    dvalues = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    start = slice_index * slice_length
    end = tl.minimum(start + slice_length, N)
    for n0 in range(start, end, META.BLOCK_N):
        n_in = n0 + offs_n < end
        n_ok = n_in
        if META.HAS_MASK:
            mask_row = MASK.data + b * MASK.b
            n_ok &= tl.load(mask_row + (n0 + offs_n).to(tl.int64) * MASK.n, mask=n_in, other=0) != 0
        x = load_rows(X.data, n0, X.n, offs_n, offs_d, X.d, n_ok, offs_d < D)  # [BLOCK_N, BLOCK_D]
        if META.KEYS:
            y = load_rows(Y.data, n0, Y.n, offs_n, offs_dv, Y.d, n_ok, offs_dv < DV)
        else:
            y = load_rows(Y.data, n0, Y.n, offs_n, offs_dv, Y.d, n_in, offs_dv < DV)
        e = tl.dot(rows, tl.trans(x), input_precision=META.PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(values, tl.trans(y), input_precision=META.PRECISION)
        if META.KEYS:
            p = tl.exp2(e - row_lse[:, None] + tl.where(n_ok, 0.0, float("-inf"))[None, :])
            de = p * (dp + shift[:, None])
        else:
            lse = tl.load(COLUMN_LSE + bh * N + n0 + offs_n, mask=n_in, other=float("inf")) * LOG2E
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            delta = tl.load(DELTA + bh * N + n0 + offs_n, mask=n_in, other=0.0) / unit
            p = tl.exp2(e - lse[None, :] + row_bias[:, None])
            de = p * (dp - delta[None, :])
            dvalues = tl.dot(p.to(y.dtype), y, dvalues, input_precision=META.PRECISION)
        drows = tl.dot(de.to(x.dtype), x, drows, input_precision=META.PRECISION)
    part = (bh * slices + slice_index) * L
    factor = scale * unit
    if META.KEYS:
        factor *= tl.exp2(-weight_bits)
    else:
        store_rows(PART_DVALUES + part * DV, m0, DV, offs_m, offs_dv, 1, m_in, offs_dv < DV, dvalues)
    store_rows(PART_DROWS + part * D, m0, D, offs_m, offs_d, 1, m_in, offs_d < D, drows * factor)


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_token_bwd_kernel(
    X, Y, ROWS, VALUES, ROW_LSE, SHIFT, VALID, COLUMN_LSE, DELTA, UNIT, MASK, RANK, COUNT, DMEANS, TOTAL, DOUT, WEIGHT,
    DX, DY, H, N, L, D, DV, P, GZ, GY, GX, LZ, LY, LX, CY, CX, KZ, KY, KX, skipped, scale, weight_bits,
    META: tl.constexpr,
):  # fmt: skip
    """dK and dV (KEYS; X, Y = K, V), or dQ (X, Y = Q, dout), of BLOCK_N tokens; see `nystrom_landmark_bwd_kernel`.

    As epilogues what comes back through the landmarks (DMEANS, the gradient of the means) and, for V, through the
    convolution (DOUT, WEIGHT flipped). The first `skipped` tokens are the prefix and not of the grid.
    """
    n_blocks = tl.cdiv(N, META.BLOCK_N)
    pid = tl.program_id(0)
    n0 = (pid % n_blocks) * META.BLOCK_N
    bh = (pid // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    n_in = n0 + offs_n < N
    n_ok = n_in
    d_ok = offs_d < D
    dv_ok = offs_dv < DV
    if META.HAS_MASK:
        mask_row = MASK.data + b * MASK.b
        n_ok &= tl.load(mask_row + (n0 + offs_n).to(tl.int64) * MASK.n, mask=n_in, other=0) != 0
    x = load_rows(X.data + b * X.b + h * X.h, n0, X.n, offs_n, offs_d, X.d, n_ok, d_ok)
    y = load_rows(Y.data + b * Y.b + h * Y.h, n0, Y.n, offs_n, offs_dv, Y.d, n_ok, dv_ok)
    exponent_scale = scale * LOG2E
    unit = tl.load(UNIT + bh)
    ROWS += bh * L * D
    VALUES += bh * L * DV
    if not META.KEYS:
        lse = tl.load(COLUMN_LSE + bh * N + n0 + offs_n, mask=n_in, other=float("inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(DELTA + bh * N + n0 + offs_n, mask=n_in, other=0.0) / unit

    dx = tl.zeros([META.BLOCK_N, META.BLOCK_D], tl.float32)
    dy = tl.zeros([META.BLOCK_N, META.BLOCK_DV], tl.float32)
    for m0 in range(0, L, META.BLOCK_M):
        m_ok = m0 + offs_m < L
        if META.HAS_VALID:
            m_ok &= tl.load(VALID + b * L + m0 + offs_m, mask=m_ok, other=0) != 0
        rows = load_rows(ROWS, m0, D, offs_m, offs_d, 1, m_ok, d_ok)
        values = load_rows(VALUES, m0, DV, offs_m, offs_dv, 1, m_ok, dv_ok)
        e = tl.dot(x, tl.trans(rows), input_precision=META.PRECISION) * exponent_scale  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(y, tl.trans(values), input_precision=META.PRECISION)
        if META.KEYS:
            row_lse = tl.load(ROW_LSE + bh * L + m0 + offs_m, mask=m_ok, other=float("inf")) * LOG2E
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) - weight_bits
            shift = tl.load(SHIFT + bh * L + m0 + offs_m, mask=m_ok, other=0.0)
            p = tl.exp2(e - row_lse[None, :])
            dy = tl.dot(p.to(x.dtype), values, dy, input_precision=META.PRECISION)
            de = p * (dp + shift[None, :])
        else:
            p = tl.exp2(e - lse[:, None] + tl.where(m_ok, 0.0, float("-inf"))[None, :])
            de = p * (dp - delta[:, None])
        dx = tl.dot(de.to(x.dtype), rows, dx, input_precision=META.PRECISION)
    if META.KEYS:
        unit *= tl.exp2(-weight_bits)
    dx *= scale * unit
    token = n0 + offs_n - skipped
    if META.HAS_MEANS:
        tokens_x = GX
        cells_x = LX
        position = token
        if META.RANKED:
            tokens_x = tl.load(COUNT + b)
            cells_x = tl.maximum(tl.minimum(cells_x, tokens_x), 1)
            tokens_x = tl.maximum(tokens_x, 1)
            position = tl.load(RANK + b * (N - skipped) + token, mask=n_in & (token >= 0), other=0)
        cells = LZ * LY * LX
        DMEANS += bh * (P + cells) * D
        dx = _unpool(
            dx, DMEANS, TOTAL + bh * cells, position, n_ok & (token >= 0), offs_d, d_ok,
            tokens_x, cells_x, D, P, GZ, GY, GX, LZ, LY, LX, META.VOLUME,
        )  # fmt: skip
    DX = of_head(DX, b, h)
    dx = tl.where(n_ok[:, None], dx, 0.0)
    store_rows(DX.data, n0, DX.n, offs_n, offs_d, DX.d, n_in, d_ok, dx)
    if META.KEYS:
        dy *= unit
        if META.HAS_CONV:
            DOUT = of_head(DOUT, b, h)
            WEIGHT += h * (KZ * KY * (KX + 2 * _CONV_PAD))
            dy = convolve(dy, DOUT, WEIGHT, MASK, n0 - skipped, N - skipped, DV, CY, CX, KZ, KY, KX, False, META)
        DY = of_head(DY, b, h)
        dy = tl.where(n_ok[:, None], dy, 0.0)
        store_rows(DY.data, n0, DY.n, offs_n, offs_dv, DY.d, n_in, dv_ok, dy)


# Inside a kernel Triton's language, not Python's, gives operators, calls and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
