"""The Triton kernels of FAVOR+'s gradients; names and rules are those of `kernels`."""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, moved, of_head
from medformer_kernels.performer.columns import load_tile, product, row_products, split_columns, store_tile
from medformer_kernels.performer.kernels import RUNTIME, slice_bounds, state_of


@triton.jit(do_not_specialize=RUNTIME)
def performer_read_dq_kernel(
    Q, OMEGA, SLICES, STATE, EXTRA, OUTPUTS, GRADIENTS, H, N, M, slices, documents, scale, META: tl.constexpr
):
    """dq_i = sum_m ds_im omega_m / D^(1/4) with ds_im = p_im (dout_i values_m - delta_i), delta_i = dout_i out_i."""
    VALUES, LSE = STATE
    OUT, OUT_LSE = OUTPUTS
    DOUT, DQ, DELTA, EXTRA_WEIGHT = GRADIENTS
    pid, column = split_columns(tl.program_id(0), tl.cdiv(META.D, META.BLOCK_D))
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    n0, end, _first, _last = slice_bounds(SLICES, pid % slices, slices, META.BLOCK_N, N, META.VARLEN)
    state = state_of(SLICES, bh, pid % slices, documents, META.VARLEN)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_c = column * META.BLOCK_D + offs_d  # the columns written
    offs_dv = tl.arange(0, META.BLOCK_DV)
    n_ok = n0 + offs_n < end
    first_ok = n0 + offs_n < tl.where(column == 0, end, 0)
    Q = of_head(Q, b, h)
    q_at = (Q.data, n0, Q.n, offs_n, Q.d, n_ok)
    q = load_tile(q_at, offs_d, META.D)
    DOUT = of_head(DOUT, b, h)
    dout_at = (DOUT.data, n0, DOUT.n, offs_n, DOUT.d, n_ok)
    dout = load_tile(dout_at, offs_dv, META.DV)
    OUT += bh * N * META.DV
    out_at = (OUT, n0, META.DV, offs_n, 1, n_ok)
    out = load_tile(out_at, offs_dv, META.DV)
    delta = row_products(dout, out, dout_at, out_at, offs_dv, META.DV)
    tl.store(DELTA + bh * N + n0 + offs_n, delta, mask=first_ok)
    out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=0.0) * LOG2E
    base = tl.where(out_lse == float("-inf"), 0.0, out_lse)
    exponent_scale = scale * LOG2E
    extra = tl.zeros([META.BLOCK_N], tl.float32)
    ds_total = tl.zeros([META.BLOCK_N], tl.float32)
    if META.HAS_EXTRA:
        square = row_products(q, q, q_at, q_at, offs_d, META.D)
        extra = square * (scale * scale * 0.5 * LOG2E) + tl.load(EXTRA[1] + bh) * LOG2E - base
    OMEGA = moved(OMEGA, h * OMEGA.h)
    VALUES += state * M * META.DV
    LSE += state * M

    acc = tl.zeros([META.BLOCK_N, META.BLOCK_D], tl.float32)
    u_top = tl.full([META.BLOCK_N], float("-inf"), tl.float32)
    for m0 in range(0, M, META.BLOCK_M):
        m_ok = m0 + offs_m < M
        omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
        omega = load_tile(omega_at, offs_d, META.D)
        values_at = (VALUES, m0, META.DV, offs_m, 1, m_ok)
        values = load_tile(values_at, offs_dv, META.DV)
        lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        u = product(q, omega, q_at, omega_at, offs_d, META.D, META.PRECISION) * exponent_scale  # [BLOCK_N, BLOCK_M]
        if META.HAS_EXTRA:
            u_top = tl.maximum(u_top, tl.max(tl.where(m_ok[None, :], u, float("-inf")), 1))
        p = tl.exp2(u + lse[None, :] - base[:, None])
        dp = product(dout, values, dout_at, values_at, offs_dv, META.DV, META.PRECISION)
        ds = p * (dp - delta[:, None])
        if META.HAS_EXTRA:
            ds_total += tl.sum(ds, 1)
        if META.D > META.BLOCK_D:
            omega = load_tile(omega_at, offs_c, META.D)
        acc = tl.dot(ds.to(q.dtype), omega, acc, input_precision=META.PRECISION)
    acc *= scale
    if META.HAS_EXTRA:
        weight = tl.exp2(extra + u_top)
        tl.store(EXTRA_WEIGHT + bh * N + n0 + offs_n, weight, mask=first_ok)
        # read again rather than held in registers through the loop
        q32 = load_tile(q_at, offs_c, META.D).to(tl.float32)
        # ds of all features and of the extra one add up to 0; its own formula would cancel where its weight is near 1
        acc -= (scale * scale * ds_total)[:, None] * q32
    DQ = of_head(DQ, b, h)
    store_tile((DQ.data, n0, DQ.n, offs_n, DQ.d, n_ok), offs_c, META.D, acc)


@triton.jit(do_not_specialize=RUNTIME)
def performer_read_dstate_kernel(
    Q, OMEGA, SLICES, LSE, OUT_LSE, GRADIENTS, H, N, M, slice_length, slices, documents, scale, META: tl.constexpr
):
    """dvalues_m = sum_i p_im dout_i and sum_i p_im delta_i (for dlse_m = dvalues_m values_m - it), one slice."""
    DOUT, DELTA, PART_DVALUES, PART_PDELTA = GRADIENTS
    m_blocks = tl.cdiv(M, META.BLOCK_M)
    pid, column = split_columns(tl.program_id(0), tl.cdiv(META.DV, META.BLOCK_DV))
    m0 = (pid % m_blocks) * META.BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = column * META.BLOCK_DV + tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < M
    Q = of_head(Q, b, h)
    DOUT = of_head(DOUT, b, h)
    OMEGA = moved(OMEGA, h * OMEGA.h)
    omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
    omega = load_tile(omega_at, offs_d, META.D)
    LSE += state_of(SLICES, bh, slice_index, documents, META.VARLEN) * M
    lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
    exponent_scale = scale * LOG2E

    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    pdelta = tl.zeros([META.BLOCK_M], tl.float32)
    start, end, _first, _last = slice_bounds(SLICES, slice_index, slices, slice_length, N, META.VARLEN)
    for n0 in range(start, end, META.BLOCK_N):
        n_ok = n0 + offs_n < end
        q_at = (Q.data, n0, Q.n, offs_n, Q.d, n_ok)
        q = load_tile(q_at, offs_d, META.D)
        dout_at = (DOUT.data, n0, DOUT.n, offs_n, DOUT.d, n_ok)
        dout = load_tile(dout_at, offs_dv, META.DV)
        out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=float("inf")) * LOG2E
        base = tl.where(out_lse == float("-inf"), 0.0, out_lse)
        delta = tl.load(DELTA + bh * N + n0 + offs_n, mask=n_ok, other=0.0)
        u = product(omega, q, omega_at, q_at, offs_d, META.D, META.PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(u + lse[:, None] - base[None, :])
        pdelta += tl.sum(p * delta[None, :], 1)
        acc = tl.dot(p.to(q.dtype), dout, acc, input_precision=META.PRECISION)
    part = (bh * slices + slice_index) * M
    store_tile((PART_DVALUES + part * META.DV, m0, META.DV, offs_m, 1, m_ok), offs_dv, META.DV, acc)
    tl.store(PART_PDELTA + part + m0 + offs_m, pdelta, mask=m0 + offs_m < tl.where(column == 0, M, 0))


@triton.jit(do_not_specialize=RUNTIME)
def performer_state_bwd_kernel(
    K, V, OMEGA, MASK, SLICES, STATE, DK, DV_OUT, H, S, M, slices, documents, scale, weight_bits, META: tl.constexpr
):
    """dv_n = sum_m p_mn dvalues_m; de_mn = p_mn (dvalues_m v_n + shift_m); dk = (omega^T de - k' sum_m de) / D^(1/4).

    p is about 1/S and dvalues a sum over all queries: in float16 both leave its range. So p is scaled up by
    2^weight_bits, dvalues and shift arrive divided by UNIT (their largest value in the head), and both are undone in
    float32.
    """
    LSE, DVALUES, SHIFT, UNIT = STATE
    pid, column = split_columns(tl.program_id(0), max(tl.cdiv(META.D, META.BLOCK_D), tl.cdiv(META.DV, META.BLOCK_DV)))
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    s0, end, _first, _last = slice_bounds(SLICES, pid % slices, slices, META.BLOCK_N, S, META.VARLEN)
    state = state_of(SLICES, bh, pid % slices, documents, META.VARLEN)
    offs_s = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    offs_c = column * META.BLOCK_D + offs_d  # the columns written, of dk and of dv
    offs_cv = column * META.BLOCK_DV + offs_dv
    s_in = s0 + offs_s < end
    s_ok = s_in
    if META.HAS_MASK:
        mask_row = MASK.data + b * MASK.b
        s_ok &= tl.load(mask_row + (s0 + offs_s).to(tl.int64) * MASK.n, mask=s_in, other=0) != 0
    K = of_head(K, b, h)
    k_at = (K.data, s0, K.n, offs_s, K.d, s_ok)
    k = load_tile(k_at, offs_d, META.D)
    V = of_head(V, b, h)
    v_at = (V.data, s0, V.n, offs_s, V.d, s_ok)
    v = load_tile(v_at, offs_dv, META.DV)
    square = row_products(k, k, k_at, k_at, offs_d, META.D)
    base = tl.where(s_ok, weight_bits - square * (scale * scale * 0.5 * LOG2E), float("-inf"))
    exponent_scale = scale * LOG2E
    OMEGA = moved(OMEGA, h * OMEGA.h)
    LSE += state * M
    DVALUES += state * M * META.DV
    SHIFT += state * M

    dk = tl.zeros([META.BLOCK_N, META.BLOCK_D], tl.float32)
    dv = tl.zeros([META.BLOCK_N, META.BLOCK_DV], tl.float32)
    de_sum = tl.zeros([META.BLOCK_N], tl.float32)
    for m0 in range(0, M, META.BLOCK_M):
        m_ok = m0 + offs_m < M
        omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
        omega = load_tile(omega_at, offs_d, META.D)
        dvalues_at = (DVALUES, m0, META.DV, offs_m, 1, m_ok)
        dvalues = load_tile(dvalues_at, offs_dv, META.DV)
        lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        shift = tl.load(SHIFT + m0 + offs_m, mask=m_ok, other=0.0)
        u = product(k, omega, k_at, omega_at, offs_d, META.D, META.PRECISION) * exponent_scale  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(u - lse[None, :] + base[:, None])
        dvalues_c = dvalues
        if META.DV > META.BLOCK_DV:
            dvalues_c = load_tile(dvalues_at, offs_cv, META.DV)
        dv = tl.dot(p.to(k.dtype), dvalues_c, dv, input_precision=META.PRECISION)
        dp = product(v, dvalues, v_at, dvalues_at, offs_dv, META.DV, META.PRECISION)
        de = p * (dp + shift[None, :])
        de_sum += tl.sum(de, 1)
        if META.D > META.BLOCK_D:
            omega = load_tile(omega_at, offs_c, META.D)
        dk = tl.dot(de.to(k.dtype), omega, dk, input_precision=META.PRECISION)
    unit = tl.load(UNIT + state) * tl.exp2(-weight_bits)
    # read again rather than held in registers through the loop
    k32 = load_tile(k_at, offs_c, META.D).to(tl.float32)
    dk = (dk - k32 * (scale * de_sum)[:, None]) * (scale * unit)
    DK = of_head(DK, b, h)
    DV_OUT = of_head(DV_OUT, b, h)
    store_tile((DK.data, s0, DK.n, offs_s, DK.d, s_in), offs_c, META.D, dk)
    store_tile((DV_OUT.data, s0, DV_OUT.n, offs_s, DV_OUT.d, s_in), offs_cv, META.DV, dv * unit)


@triton.jit(do_not_specialize=RUNTIME)
def performer_omega_kernel(
    X, Y, OMEGA, MASK, SLICES, STATE, DOMEGA, H, N, M, slice_length, slices, documents, scale, bits, META: tl.constexpr
):
    """What one slice of the keys (or queries) adds to omega's gradient: sum_n de_mn x'_n, de as in the passes that give
    dk (KEYS: X, Y = K, V, and VALUES = dvalues / UNIT) and dq (X, Y = Q, dout)."""
    VALUES, LSE, SHIFT, UNIT, OUT_LSE, DELTA = STATE
    m_blocks = tl.cdiv(M, META.BLOCK_M)
    pid, column = split_columns(tl.program_id(0), tl.cdiv(META.D, META.BLOCK_D))
    m0 = (pid % m_blocks) * META.BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_c = column * META.BLOCK_D + offs_d  # the columns written
    offs_dv = tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < M
    X = of_head(X, b, h)
    Y = of_head(Y, b, h)
    MASK = moved(MASK, b * MASK.b)
    OMEGA = moved(OMEGA, h * OMEGA.h)
    omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
    omega = load_tile(omega_at, offs_d, META.D)
    state = state_of(SLICES, bh, slice_index, documents, META.VARLEN)
    VALUES += state * M * META.DV
    values_at = (VALUES, m0, META.DV, offs_m, 1, m_ok)
    values = load_tile(values_at, offs_dv, META.DV)
    lse = tl.load(LSE + state * M + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E
    if META.KEYS:
        lse = bits - tl.where(lse == float("-inf"), float("inf"), lse)
        shift = tl.load(SHIFT + state * M + m0 + offs_m, mask=m_ok, other=0.0)

    acc = tl.zeros([META.BLOCK_M, META.BLOCK_D], tl.float32)
    start, end, _first, _last = slice_bounds(SLICES, slice_index, slices, slice_length, N, META.VARLEN)
    for n0 in range(start, end, META.BLOCK_N):
        n_ok = n0 + offs_n < end
        if META.HAS_MASK:
            n_ok &= tl.load(MASK.data + (n0 + offs_n).to(tl.int64) * MASK.n, mask=n_ok, other=0) != 0
        x_at = (X.data, n0, X.n, offs_n, X.d, n_ok)
        x = load_tile(x_at, offs_d, META.D)  # [BLOCK_N, BLOCK_D]
        y_at = (Y.data, n0, Y.n, offs_n, Y.d, n_ok)
        y = load_tile(y_at, offs_dv, META.DV)  # [BLOCK_N, BLOCK_DV]
        u = product(omega, x, omega_at, x_at, offs_d, META.D, META.PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        de = product(values, y, values_at, y_at, offs_dv, META.DV, META.PRECISION)
        if META.KEYS:
            square = row_products(x, x, x_at, x_at, offs_d, META.D)
            token_shift = tl.where(n_ok, square * -half_scale, float("-inf"))
            de += shift[:, None]
        else:
            out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=float("inf")) * LOG2E
            token_shift = -tl.where(out_lse == float("-inf"), float("inf"), out_lse)
            de -= tl.load(DELTA + bh * N + n0 + offs_n, mask=n_ok, other=0.0)[None, :]
        de *= tl.exp2(u + lse[:, None] + token_shift[None, :])
        if META.D > META.BLOCK_D:
            x = load_tile(x_at, offs_c, META.D)
        acc = tl.dot(de.to(x.dtype), x, acc, input_precision=META.PRECISION)
    if META.KEYS:
        acc *= tl.load(UNIT + state) * tl.exp2(-bits)
    part = (bh * slices + slice_index) * M
    store_tile((DOMEGA + part * META.D, m0, META.D, offs_m, 1, m_ok), offs_c, META.D, acc * scale)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
