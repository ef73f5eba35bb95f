"""The Triton kernels of FAVOR+'s gradients; names and rules are those of `kernels`."""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E
from medformer_kernels.performer.columns import load_tile, product, row_products, split_columns, store_tile
from medformer_kernels.performer.kernels import RUNTIME, slice_bounds, state_of


@triton.jit(do_not_specialize=RUNTIME)
def performer_read_dq_kernel(
    Q, OMEGA, SLICES, VALUES, LSE, EXTRA_VALUES, EXTRA_LSE, OUT, OUT_LSE, DOUT, DQ, DELTA, EXTRA_WEIGHT,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, omega_stride_h, omega_stride_m,
    dout_stride_b, dout_stride_h, dout_stride_n, dout_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_n, dq_stride_d,
    H, N, M, D: tl.constexpr, DV: tl.constexpr, slices, documents, scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_EXTRA: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = sum_m ds_im omega_m / D^(1/4) with ds_im = p_im (dout_i values_m - delta_i), delta_i = dout_i out_i."""
    pid, column = split_columns(tl.program_id(0), tl.cdiv(D, BLOCK_D))
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    n0, end, _first, _last = slice_bounds(SLICES, pid % slices, slices, BLOCK_N, N, VARLEN)
    state = state_of(SLICES, bh, pid % slices, documents, VARLEN)
    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = column * BLOCK_D + offs_d  # the columns written
    offs_dv = tl.arange(0, BLOCK_DV)
    n_ok = n0 + offs_n < end
    first_ok = n0 + offs_n < tl.where(column == 0, end, 0)
    Q += b * q_stride_b + h * q_stride_h
    q_at = (Q, n0, q_stride_n, offs_n, q_stride_d, n_ok)
    q = load_tile(q_at, offs_d, D)
    DOUT += b * dout_stride_b + h * dout_stride_h
    dout_at = (DOUT, n0, dout_stride_n, offs_n, dout_stride_d, n_ok)
    dout = load_tile(dout_at, offs_dv, DV)
    OUT += bh * N * DV
    out_at = (OUT, n0, DV, offs_n, 1, n_ok)
    out = load_tile(out_at, offs_dv, DV)
    delta = row_products(dout, out, dout_at, out_at, offs_dv, DV, BLOCK_DV)
    tl.store(DELTA + bh * N + n0 + offs_n, delta, mask=first_ok)
    out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=0.0) * LOG2E
    base = tl.where(out_lse == float("-inf"), 0.0, out_lse)
    exponent_scale = scale * LOG2E
    extra = tl.zeros([BLOCK_N], tl.float32)
    dextra = tl.zeros([BLOCK_N], tl.float32)
    if HAS_EXTRA:
        square = row_products(q, q, q_at, q_at, offs_d, D, BLOCK_D)
        extra = square * (scale * scale * 0.5 * LOG2E) + tl.load(EXTRA_LSE + bh) * LOG2E - base
        # one row, the same for every query
        EXTRA_VALUES += bh * DV
        extra_values = tl.load(EXTRA_VALUES + offs_dv, mask=offs_dv < DV, other=0.0)
        extra_at = (EXTRA_VALUES, 0, 0, offs_n, 1, n_ok)
        dextra = row_products(dout, extra_values[None, :], dout_at, extra_at, offs_dv, DV, BLOCK_DV) - delta
    OMEGA += h * omega_stride_h
    VALUES += state * M * DV
    LSE += state * M

    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    u_top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m_ok = m0 + offs_m < M
        omega_at = (OMEGA, m0, omega_stride_m, offs_m, 1, m_ok)
        omega = load_tile(omega_at, offs_d, D)
        values_at = (VALUES, m0, DV, offs_m, 1, m_ok)
        values = load_tile(values_at, offs_dv, DV)
        lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        u = product(q, omega, q_at, omega_at, offs_d, D, BLOCK_D, PRECISION) * exponent_scale  # [BLOCK_N, BLOCK_M]
        if HAS_EXTRA:
            u_top = tl.maximum(u_top, tl.max(tl.where(m_ok[None, :], u, float("-inf")), 1))
        p = tl.exp2(u + lse[None, :] - base[:, None])
        dp = product(dout, values, dout_at, values_at, offs_dv, DV, BLOCK_DV, PRECISION)
        ds = p * (dp - delta[:, None])
        if D > BLOCK_D:
            omega = load_tile(omega_at, offs_c, D)
        acc = tl.dot(ds.to(q.dtype), omega, acc, input_precision=PRECISION)
    acc *= scale
    if HAS_EXTRA:
        weight = tl.exp2(extra + u_top)
        tl.store(EXTRA_WEIGHT + bh * N + n0 + offs_n, weight, mask=first_ok)
        # read again rather than held in registers through the loop
        q32 = load_tile(q_at, offs_c, D).to(tl.float32)
        acc += (scale * scale * weight * dextra)[:, None] * q32
    DQ += b * dq_stride_b + h * dq_stride_h
    store_tile((DQ, n0, dq_stride_n, offs_n, dq_stride_d, n_ok), offs_c, D, acc)


@triton.jit(do_not_specialize=RUNTIME)
def performer_read_dstate_kernel(
    Q, OMEGA, SLICES, LSE, OUT_LSE, DOUT, DELTA, PART_DVALUES, PART_PDELTA,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, omega_stride_h, omega_stride_m,
    dout_stride_b, dout_stride_h, dout_stride_n, dout_stride_d,
    H, N, M, D: tl.constexpr, DV: tl.constexpr, slice_length, slices, documents, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dvalues_m = sum_i p_im dout_i and sum_i p_im delta_i (for dlse_m = dvalues_m values_m - it), one slice."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid, column = split_columns(tl.program_id(0), tl.cdiv(DV, BLOCK_DV))
    m0 = (pid % m_blocks) * BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = column * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    Q += b * q_stride_b + h * q_stride_h
    DOUT += b * dout_stride_b + h * dout_stride_h
    OMEGA += h * omega_stride_h
    omega_at = (OMEGA, m0, omega_stride_m, offs_m, 1, m_ok)
    omega = load_tile(omega_at, offs_d, D)
    LSE += state_of(SLICES, bh, slice_index, documents, VARLEN) * M
    lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
    exponent_scale = scale * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    pdelta = tl.zeros([BLOCK_M], tl.float32)
    start, end, _first, _last = slice_bounds(SLICES, slice_index, slices, slice_length, N, VARLEN)
    for n0 in range(start, end, BLOCK_N):
        n_ok = n0 + offs_n < end
        q_at = (Q, n0, q_stride_n, offs_n, q_stride_d, n_ok)
        q = load_tile(q_at, offs_d, D)
        dout_at = (DOUT, n0, dout_stride_n, offs_n, dout_stride_d, n_ok)
        dout = load_tile(dout_at, offs_dv, DV)
        out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=float("inf")) * LOG2E
        base = tl.where(out_lse == float("-inf"), 0.0, out_lse)
        delta = tl.load(DELTA + bh * N + n0 + offs_n, mask=n_ok, other=0.0)
        u = product(omega, q, omega_at, q_at, offs_d, D, BLOCK_D, PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(u + lse[:, None] - base[None, :])
        pdelta += tl.sum(p * delta[None, :], 1)
        acc = tl.dot(p.to(q.dtype), dout, acc, input_precision=PRECISION)
    part = (bh * slices + slice_index) * M
    store_tile((PART_DVALUES + part * DV, m0, DV, offs_m, 1, m_ok), offs_dv, DV, acc)
    tl.store(PART_PDELTA + part + m0 + offs_m, pdelta, mask=m0 + offs_m < tl.where(column == 0, M, 0))


@triton.jit(do_not_specialize=RUNTIME)
def performer_state_bwd_kernel(
    K, V, OMEGA, MASK, SLICES, LSE, DVALUES, SHIFT, UNIT, DK, DV_OUT,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_n, dk_stride_d,
    dv_stride_b, dv_stride_h, dv_stride_n, dv_stride_d,
    omega_stride_h, omega_stride_m, mask_stride_b, mask_stride_n,
    H, S, M, D: tl.constexpr, DV: tl.constexpr, slices, documents, scale, weight_bits,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_MASK: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv_n = sum_m p_mn dvalues_m; de_mn = p_mn (dvalues_m v_n + shift_m); dk = (omega^T de - k' sum_m de) / D^(1/4).

    p is about 1/S and dvalues a sum over all queries: in float16 both leave its range. So p is scaled up by
    2^weight_bits, dvalues and shift arrive divided by UNIT (their largest value in the head), and both are undone in
    float32.
    """
    pid, column = split_columns(tl.program_id(0), max(tl.cdiv(D, BLOCK_D), tl.cdiv(DV, BLOCK_DV)))
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    s0, end, _first, _last = slice_bounds(SLICES, pid % slices, slices, BLOCK_S, S, VARLEN)
    state = state_of(SLICES, bh, pid % slices, documents, VARLEN)
    offs_s = tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_c = column * BLOCK_D + offs_d  # the columns written, of dk and of dv
    offs_cv = column * BLOCK_DV + offs_dv
    s_in = s0 + offs_s < end
    s_ok = s_in
    if HAS_MASK:
        mask_row = MASK + b * mask_stride_b
        s_ok &= tl.load(mask_row + (s0 + offs_s).to(tl.int64) * mask_stride_n, mask=s_in, other=0) != 0
    K += b * k_stride_b + h * k_stride_h
    k_at = (K, s0, k_stride_n, offs_s, k_stride_d, s_ok)
    k = load_tile(k_at, offs_d, D)
    V += b * v_stride_b + h * v_stride_h
    v_at = (V, s0, v_stride_n, offs_s, v_stride_d, s_ok)
    v = load_tile(v_at, offs_dv, DV)
    square = row_products(k, k, k_at, k_at, offs_d, D, BLOCK_D)
    base = tl.where(s_ok, weight_bits - square * (scale * scale * 0.5 * LOG2E), float("-inf"))
    exponent_scale = scale * LOG2E
    OMEGA += h * omega_stride_h
    LSE += state * M
    DVALUES += state * M * DV
    SHIFT += state * M

    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    de_sum = tl.zeros([BLOCK_S], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m_ok = m0 + offs_m < M
        omega_at = (OMEGA, m0, omega_stride_m, offs_m, 1, m_ok)
        omega = load_tile(omega_at, offs_d, D)
        dvalues_at = (DVALUES, m0, DV, offs_m, 1, m_ok)
        dvalues = load_tile(dvalues_at, offs_dv, DV)
        lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        shift = tl.load(SHIFT + m0 + offs_m, mask=m_ok, other=0.0)
        u = product(k, omega, k_at, omega_at, offs_d, D, BLOCK_D, PRECISION) * exponent_scale  # [BLOCK_S, BLOCK_M]
        p = tl.exp2(u - lse[None, :] + base[:, None])
        dvalues_c = dvalues
        if DV > BLOCK_DV:
            dvalues_c = load_tile(dvalues_at, offs_cv, DV)
        dv = tl.dot(p.to(k.dtype), dvalues_c, dv, input_precision=PRECISION)
        dp = product(v, dvalues, v_at, dvalues_at, offs_dv, DV, BLOCK_DV, PRECISION)
        de = p * (dp + shift[None, :])
        de_sum += tl.sum(de, 1)
        if D > BLOCK_D:
            omega = load_tile(omega_at, offs_c, D)
        dk = tl.dot(de.to(k.dtype), omega, dk, input_precision=PRECISION)
    unit = tl.load(UNIT + state) * tl.exp2(-weight_bits)
    # read again rather than held in registers through the loop
    k32 = load_tile(k_at, offs_c, D).to(tl.float32)
    dk = (dk - k32 * (scale * de_sum)[:, None]) * (scale * unit)
    DK += b * dk_stride_b + h * dk_stride_h
    DV_OUT += b * dv_stride_b + h * dv_stride_h
    store_tile((DK, s0, dk_stride_n, offs_s, dk_stride_d, s_in), offs_c, D, dk)
    store_tile((DV_OUT, s0, dv_stride_n, offs_s, dv_stride_d, s_in), offs_cv, DV, dv * unit)


@triton.jit(do_not_specialize=RUNTIME)
def performer_omega_kernel(
    X, Y, OMEGA, MASK, SLICES, VALUES, LSE, SHIFT, OUT_LSE, DELTA, UNIT, PART_DOMEGA,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d,
    y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    omega_stride_h, omega_stride_m, mask_stride_b, mask_stride_n,
    H, N, M, D: tl.constexpr, DV: tl.constexpr, slice_length, slices, documents, scale, weight_bits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KEYS: tl.constexpr, HAS_MASK: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one slice of the keys (or queries) adds to omega's gradient: sum_n de_mn x'_n, de as in the passes that give
    dk (KEYS: X, Y = K, V, and VALUES = dvalues / UNIT) and dq (X, Y = Q, dout)."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid, column = split_columns(tl.program_id(0), tl.cdiv(D, BLOCK_D))
    m0 = (pid % m_blocks) * BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = column * BLOCK_D + offs_d  # the columns written
    offs_dv = tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    X += b * x_stride_b + h * x_stride_h
    Y += b * y_stride_b + h * y_stride_h
    MASK += b * mask_stride_b
    OMEGA += h * omega_stride_h
    omega_at = (OMEGA, m0, omega_stride_m, offs_m, 1, m_ok)
    omega = load_tile(omega_at, offs_d, D)
    state = state_of(SLICES, bh, slice_index, documents, VARLEN)
    VALUES += state * M * DV
    values_at = (VALUES, m0, DV, offs_m, 1, m_ok)
    values = load_tile(values_at, offs_dv, DV)
    lse = tl.load(LSE + state * M + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E
    if KEYS:
        lse = weight_bits - tl.where(lse == float("-inf"), float("inf"), lse)
        shift = tl.load(SHIFT + state * M + m0 + offs_m, mask=m_ok, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start, end, _first, _last = slice_bounds(SLICES, slice_index, slices, slice_length, N, VARLEN)
    for n0 in range(start, end, BLOCK_N):
        n_ok = n0 + offs_n < end
        if HAS_MASK:
            n_ok &= tl.load(MASK + (n0 + offs_n).to(tl.int64) * mask_stride_n, mask=n_ok, other=0) != 0
        x_at = (X, n0, x_stride_n, offs_n, x_stride_d, n_ok)
        x = load_tile(x_at, offs_d, D)  # [BLOCK_N, BLOCK_D]
        y_at = (Y, n0, y_stride_n, offs_n, y_stride_d, n_ok)
        y = load_tile(y_at, offs_dv, DV)  # [BLOCK_N, BLOCK_DV]
        u = product(omega, x, omega_at, x_at, offs_d, D, BLOCK_D, PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        de = product(values, y, values_at, y_at, offs_dv, DV, BLOCK_DV, PRECISION)
        if KEYS:
            square = row_products(x, x, x_at, x_at, offs_d, D, BLOCK_D)
            token_shift = tl.where(n_ok, square * -half_scale, float("-inf"))
            de += shift[:, None]
        else:
            out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=float("inf")) * LOG2E
            token_shift = -tl.where(out_lse == float("-inf"), float("inf"), out_lse)
            de -= tl.load(DELTA + bh * N + n0 + offs_n, mask=n_ok, other=0.0)[None, :]
        de *= tl.exp2(u + lse[:, None] + token_shift[None, :])
        if D > BLOCK_D:
            x = load_tile(x_at, offs_c, D)
        acc = tl.dot(de.to(x.dtype), x, acc, input_precision=PRECISION)
    if KEYS:
        acc *= tl.load(UNIT + state) * tl.exp2(-weight_bits)
    part = (bh * slices + slice_index) * M
    store_tile((PART_DOMEGA + part * D, m0, D, offs_m, 1, m_ok), offs_c, D, acc * scale)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
