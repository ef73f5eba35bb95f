"""The Triton kernels of FAVOR+; `fused` launches them, `ops` derives what they compute.

H heads, N queries, S keys, M features, D and DV widths. A program owns the named block of one head:

    performer_state_fwd_kernel    BLOCK_M features over one slice of the keys: reads K, V once
    performer_merge_kernel        BLOCK_M features: merges the slices, as flash decoding merges its splits
    performer_read_fwd_kernel     BLOCK_N queries, walking over the features: reads Q once
    performer_read_dq_kernel      BLOCK_N queries: dQ, and delta = sum(dout * out) for the next
    performer_read_dstate_kernel  BLOCK_M features over one slice of the queries: dvalues and dlse as partial sums
    performer_state_bwd_kernel    BLOCK_S keys, walking over the features: dK, dV
    performer_omega_kernel        BLOCK_M features over one slice of keys, or of queries: domega as partial sums

Features live in registers only. Products run on the matrix units in the dtype of q, k, v (float32 as three tf32
products on NVIDIA), all else in float32, exponents in base 2. No atomics: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, divide_rows, load_rows, softmax_merge, softmax_step, store_rows

# Lengths and slices never specialise a kernel: the first call on a new length compiles nothing.
_RUNTIME = ["N", "S", "M", "slice_length", "slices", "groups"]


@triton.jit
def slice_bounds(SLICES, index, slices, slice_length, tokens, VARLEN: tl.constexpr):
    """(start, end, whether it begins, whether it ends a document) of a slice; VARLEN: as SLICES (slices, 4) has it."""
    if VARLEN:
        SLICES += index * 4
        return tl.load(SLICES), tl.load(SLICES + 1), tl.load(SLICES + 2) != 0, tl.load(SLICES + 3) != 0
    else:
        start = index * slice_length
        return start, tl.minimum(start + slice_length, tokens), index == 0, index == slices - 1


@triton.jit(do_not_specialize=_RUNTIME)
def performer_state_fwd_kernel(
    K, V, OMEGA, MASK, SLICES, OUT_LSE, DELTA, VALUES, LSE, TOP,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    omega_stride_h, omega_stride_m, mask_stride_b, mask_stride_n,
    H, groups, S, M, D, DV, slice_length, slices, scale,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_MASK: tl.constexpr, WITH_MAX: tl.constexpr, CARRIED: tl.constexpr, QUERIES: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """values_m = sum_n softmax_n(e_mn) v_n and lse_m over the keys of one slice; e_mn = omega_m k'_n - |k'_n|^2 / 2.

    WITH_MAX: TOP is the maximum of omega_m k'_n. CARRIED, for the causal form: nothing where no later slice of the
    document reads it. QUERIES: K, V are Q, dout; e_mn = omega_m q'_n - OUT_LSE_n, the earlier slices are those that
    read, and TOP is the mean of DELTA.
    """
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % m_blocks) * BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = pid // (m_blocks * slices)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    h_kv = h // groups
    offs_m = tl.arange(0, BLOCK_M)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    K += b * k_stride_b + h_kv * k_stride_h
    V += b * v_stride_b + h_kv * v_stride_h
    # omega [BLOCK_M, BLOCK_D] stays on chip for the whole slice
    omega = load_rows(OMEGA + h * omega_stride_h, m0, omega_stride_m, offs_m, offs_d, 1, m_ok, offs_d < D)
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    u_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    delta_sum = tl.zeros([BLOCK_M], tl.float32)
    start, end, first, last = slice_bounds(SLICES, slice_index, slices, slice_length, S, VARLEN)
    if CARRIED:
        unread = last
        if QUERIES:
            unread = first
        end = tl.where(unread, start, end)
    for s0 in range(start, end, BLOCK_S):
        s_ok = s0 + offs_s < end
        if HAS_MASK:
            s_ok &= tl.load(MASK + b * mask_stride_b + (s0 + offs_s) * mask_stride_n, mask=s_ok, other=0) != 0
        k = load_rows(K, s0, k_stride_n, offs_s, offs_d, k_stride_d, s_ok, offs_d < D)  # [BLOCK_S, BLOCK_D]
        v = load_rows(V, s0, v_stride_n, offs_s, offs_dv, v_stride_d, s_ok, offs_dv < DV)  # [BLOCK_S, BLOCK_DV]
        if QUERIES:
            out_lse = tl.load(OUT_LSE + bh.to(tl.int64) * S + s0 + offs_s, mask=s_ok, other=float("inf")) * LOG2E
            shift = -tl.where(out_lse == float("-inf"), float("inf"), out_lse)  # no key: every weight 0
        else:
            k32 = k.to(tl.float32)
            shift = tl.where(s_ok, tl.sum(k32 * k32, 1) * -half_scale, float("-inf"))
        u = tl.dot(omega, tl.trans(k), input_precision=PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_S]
        if WITH_MAX:
            u_top = tl.maximum(u_top, tl.max(tl.where(s_ok[None, :], u, float("-inf")), 1))
        e = u + shift[None, :]
        old_top = top
        top, total, acc = softmax_step(top, total, acc, e, v, PRECISION)
        if QUERIES:
            delta = tl.load(DELTA + bh.to(tl.int64) * S + s0 + offs_s, mask=s_ok, other=0.0)
            base = tl.where(top == float("-inf"), 0.0, top)
            delta_sum = delta_sum * tl.exp2(old_top - base) + tl.sum(tl.exp2(e - base[:, None]) * delta[None, :], 1)
    out = (bh.to(tl.int64) * slices + slice_index) * M
    values = divide_rows(acc, total)
    store_rows(VALUES + out * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV, values)
    tl.store(LSE + out + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=m_ok)
    if QUERIES:
        tl.store(TOP + out + m0 + offs_m, delta_sum / tl.where(total == 0.0, 1.0, total), mask=m_ok)
    if WITH_MAX:
        u_top = tl.max(tl.where(m_ok, u_top, float("-inf")), 0)
        tl.store(TOP + pid.to(tl.int64), u_top / LOG2E)


@triton.jit(do_not_specialize=_RUNTIME)
def performer_merge_kernel(
    PART_VALUES, PART_LSE, VALUES, LSE, M, DV, slices, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """lse = log sum_s exp(lse_s); values = sum_s exp(lse_s - lse) values_s: the slices of one head."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // m_blocks).to(tl.int64)
    m0 = (pid % m_blocks) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for s in range(0, slices):
        part = (bh * slices + s) * M
        lse = tl.load(PART_LSE + part + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        values = load_rows(PART_VALUES + part * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV)
        top, total, acc = softmax_merge(top, total, acc, lse, 1.0, values)
    acc = divide_rows(acc, total)
    store_rows(VALUES + bh * M * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV, acc)
    tl.store(LSE + bh * M + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=m_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def performer_read_fwd_kernel(
    Q, OMEGA, VALUES, LSE, EXTRA_VALUES, EXTRA_LSE, OUT, OUT_LSE,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, omega_stride_h, omega_stride_m,
    H, N, M, D, DV, scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_m softmax_m(omega_m q'_i + lse_m) values_m for BLOCK_N queries, and the log of its denominator."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n0 = (pid % n_blocks) * BLOCK_N
    bh = (pid // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    n_ok = n0 + offs_n < N
    Q += b * q_stride_b + h * q_stride_h
    q = load_rows(Q, n0, q_stride_n, offs_n, offs_d, q_stride_d, n_ok, offs_d < D)
    exponent_scale = scale * LOG2E
    OMEGA += h * omega_stride_h
    VALUES += bh * M * DV
    LSE += bh * M

    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    u_top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m_ok = m0 + offs_m < M
        omega = load_rows(OMEGA, m0, omega_stride_m, offs_m, offs_d, 1, m_ok, offs_d < D)
        values = load_rows(VALUES, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV)
        lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        u = tl.dot(q, tl.trans(omega), input_precision=PRECISION) * exponent_scale  # [BLOCK_N, BLOCK_M]
        if HAS_EXTRA:
            u_top = tl.maximum(u_top, tl.max(tl.where(m_ok[None, :], u, float("-inf")), 1))
        e = u + lse[None, :]
        top, total, acc = softmax_step(top, total, acc, e, values, PRECISION)
    if HAS_EXTRA:
        # |q'|^2 / 2 + max_m u + extra_lse; q is read again rather than held in registers through the loop
        q32 = load_rows(Q, n0, q_stride_n, offs_n, offs_d, q_stride_d, n_ok, offs_d < D).to(tl.float32)
        extra = tl.sum(q32 * q32, 1) * (scale * scale * 0.5 * LOG2E) + u_top + tl.load(EXTRA_LSE + bh) * LOG2E
        extra_values = tl.load(EXTRA_VALUES + bh * DV + offs_dv, mask=offs_dv < DV, other=0.0)
        top, total, acc = softmax_merge(top, total, acc, extra, 1.0, extra_values[None, :])
    acc = divide_rows(acc, total)
    store_rows(OUT + bh * N * DV, n0, DV, offs_n, offs_dv, 1, n_ok, offs_dv < DV, acc)
    tl.store(OUT_LSE + bh * N + n0 + offs_n, (top + tl.log2(total)) / LOG2E, mask=n_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def performer_read_dq_kernel(
    Q, OMEGA, VALUES, LSE, EXTRA_VALUES, EXTRA_LSE, OUT, OUT_LSE, DOUT, DQ, DELTA, EXTRA_WEIGHT,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, omega_stride_h, omega_stride_m,
    dout_stride_b, dout_stride_h, dout_stride_n, dout_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_n, dq_stride_d,
    H, N, M, D, DV, scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = sum_m ds_im omega_m / D^(1/4) with ds_im = p_im (dout_i values_m - delta_i), delta_i = dout_i out_i."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n0 = (pid % n_blocks) * BLOCK_N
    bh = (pid // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    n_ok = n0 + offs_n < N
    d_ok = offs_d < D
    dv_ok = offs_dv < DV
    Q += b * q_stride_b + h * q_stride_h
    q = load_rows(Q, n0, q_stride_n, offs_n, offs_d, q_stride_d, n_ok, d_ok)
    DOUT += b * dout_stride_b + h * dout_stride_h
    dout = load_rows(DOUT, n0, dout_stride_n, offs_n, offs_dv, dout_stride_d, n_ok, dv_ok)
    out = load_rows(OUT + bh * N * DV, n0, DV, offs_n, offs_dv, 1, n_ok, dv_ok)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + bh * N + n0 + offs_n, delta, mask=n_ok)
    out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=0.0) * LOG2E
    base = tl.where(out_lse == float("-inf"), 0.0, out_lse)
    exponent_scale = scale * LOG2E
    extra = tl.zeros([BLOCK_N], tl.float32)
    dextra = tl.zeros([BLOCK_N], tl.float32)
    if HAS_EXTRA:
        q32 = q.to(tl.float32)
        extra = tl.sum(q32 * q32, 1) * (scale * scale * 0.5 * LOG2E) + tl.load(EXTRA_LSE + bh) * LOG2E - base
        extra_values = tl.load(EXTRA_VALUES + bh * DV + offs_dv, mask=dv_ok, other=0.0)
        dextra = tl.sum(dout.to(tl.float32) * extra_values[None, :], 1) - delta
    OMEGA += h * omega_stride_h
    VALUES += bh * M * DV
    LSE += bh * M

    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    u_top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m_ok = m0 + offs_m < M
        omega = load_rows(OMEGA, m0, omega_stride_m, offs_m, offs_d, 1, m_ok, d_ok)
        values = load_rows(VALUES, m0, DV, offs_m, offs_dv, 1, m_ok, dv_ok)
        lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        u = tl.dot(q, tl.trans(omega), input_precision=PRECISION) * exponent_scale  # [BLOCK_N, BLOCK_M]
        if HAS_EXTRA:
            u_top = tl.maximum(u_top, tl.max(tl.where(m_ok[None, :], u, float("-inf")), 1))
        p = tl.exp2(u + lse[None, :] - base[:, None])
        dp = tl.dot(dout, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(q.dtype), omega, acc, input_precision=PRECISION)
    acc *= scale
    if HAS_EXTRA:
        weight = tl.exp2(extra + u_top)
        tl.store(EXTRA_WEIGHT + bh * N + n0 + offs_n, weight, mask=n_ok)
        # read again rather than held in registers through the loop
        q32 = load_rows(Q, n0, q_stride_n, offs_n, offs_d, q_stride_d, n_ok, d_ok).to(tl.float32)
        acc += (scale * scale * weight * dextra)[:, None] * q32
    DQ += b * dq_stride_b + h * dq_stride_h
    store_rows(DQ, n0, dq_stride_n, offs_n, offs_d, dq_stride_d, n_ok, d_ok, acc)


@triton.jit(do_not_specialize=_RUNTIME)
def performer_read_dstate_kernel(
    Q, OMEGA, LSE, OUT_LSE, DOUT, DELTA, PART_DVALUES, PART_PDELTA,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, omega_stride_h, omega_stride_m,
    dout_stride_b, dout_stride_h, dout_stride_n, dout_stride_d,
    H, N, M, D, DV, slice_length, slices, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dvalues_m = sum_i p_im dout_i and sum_i p_im delta_i (for dlse_m = dvalues_m values_m - it), one slice."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % m_blocks) * BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    Q += b * q_stride_b + h * q_stride_h
    DOUT += b * dout_stride_b + h * dout_stride_h
    omega = load_rows(OMEGA + h * omega_stride_h, m0, omega_stride_m, offs_m, offs_d, 1, m_ok, offs_d < D)
    lse = tl.load(LSE + bh * M + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
    exponent_scale = scale * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    pdelta = tl.zeros([BLOCK_M], tl.float32)
    start = slice_index * slice_length
    end = tl.minimum(start + slice_length, N)
    for n0 in range(start, end, BLOCK_N):
        n_ok = n0 + offs_n < end
        q = load_rows(Q, n0, q_stride_n, offs_n, offs_d, q_stride_d, n_ok, offs_d < D)
        dout = load_rows(DOUT, n0, dout_stride_n, offs_n, offs_dv, dout_stride_d, n_ok, offs_dv < DV)
        out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=float("inf")) * LOG2E
        base = tl.where(out_lse == float("-inf"), 0.0, out_lse)
        delta = tl.load(DELTA + bh * N + n0 + offs_n, mask=n_ok, other=0.0)
        u = tl.dot(omega, tl.trans(q), input_precision=PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(u + lse[:, None] - base[None, :])
        pdelta += tl.sum(p * delta[None, :], 1)
        acc = tl.dot(p.to(q.dtype), dout, acc, input_precision=PRECISION)
    part = (bh * slices + slice_index) * M
    store_rows(PART_DVALUES + part * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV, acc)
    tl.store(PART_PDELTA + part + m0 + offs_m, pdelta, mask=m_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def performer_state_bwd_kernel(
    K, V, OMEGA, MASK, LSE, DVALUES, SHIFT, UNIT, DK, DV_OUT,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_n, dk_stride_d,
    dv_stride_b, dv_stride_h, dv_stride_n, dv_stride_d,
    omega_stride_h, omega_stride_m, mask_stride_b, mask_stride_n,
    H, S, M, D, DV, scale, weight_bits,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv_n = sum_m p_mn dvalues_m; de_mn = p_mn (dvalues_m v_n + shift_m); dk = (omega^T de - k' sum_m de) / D^(1/4).

    p is about 1/S and dvalues a sum over all queries: in float16 both leave its range. So p is scaled up by
    2^weight_bits, dvalues and shift arrive divided by UNIT (their largest value in the head), and both are undone in
    float32.
    """
    s_blocks = tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    s0 = (pid % s_blocks) * BLOCK_S
    bh = (pid // s_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    s_in = s0 + offs_s < S
    s_ok = s_in
    d_ok = offs_d < D
    dv_ok = offs_dv < DV
    if HAS_MASK:
        mask_row = MASK + b * mask_stride_b
        s_ok &= tl.load(mask_row + (s0 + offs_s).to(tl.int64) * mask_stride_n, mask=s_in, other=0) != 0
    K += b * k_stride_b + h * k_stride_h
    k = load_rows(K, s0, k_stride_n, offs_s, offs_d, k_stride_d, s_ok, d_ok)
    v = load_rows(V + b * v_stride_b + h * v_stride_h, s0, v_stride_n, offs_s, offs_dv, v_stride_d, s_ok, dv_ok)
    k32 = k.to(tl.float32)
    half = tl.sum(k32 * k32, 1) * (scale * scale * 0.5 * LOG2E)
    base = tl.where(s_ok, weight_bits - half, float("-inf"))
    exponent_scale = scale * LOG2E
    OMEGA += h * omega_stride_h
    LSE += bh * M
    DVALUES += bh * M * DV
    SHIFT += bh * M

    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    de_sum = tl.zeros([BLOCK_S], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m_ok = m0 + offs_m < M
        omega = load_rows(OMEGA, m0, omega_stride_m, offs_m, offs_d, 1, m_ok, d_ok)
        dvalues = load_rows(DVALUES, m0, DV, offs_m, offs_dv, 1, m_ok, dv_ok)
        lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        shift = tl.load(SHIFT + m0 + offs_m, mask=m_ok, other=0.0)
        u = tl.dot(k, tl.trans(omega), input_precision=PRECISION) * exponent_scale  # [BLOCK_S, BLOCK_M]
        p = tl.exp2(u - lse[None, :] + base[:, None])
        dv = tl.dot(p.to(k.dtype), dvalues, dv, input_precision=PRECISION)
        de = p * (tl.dot(v, tl.trans(dvalues), input_precision=PRECISION) + shift[None, :])
        de_sum += tl.sum(de, 1)
        dk = tl.dot(de.to(k.dtype), omega, dk, input_precision=PRECISION)
    unit = tl.load(UNIT + bh) * tl.exp2(-weight_bits)
    # read again rather than held in registers through the loop
    k32 = load_rows(K, s0, k_stride_n, offs_s, offs_d, k_stride_d, s_ok, d_ok).to(tl.float32)
    dk = (dk - k32 * (scale * de_sum)[:, None]) * (scale * unit)
    DK += b * dk_stride_b + h * dk_stride_h
    DV_OUT += b * dv_stride_b + h * dv_stride_h
    store_rows(DK, s0, dk_stride_n, offs_s, offs_d, dk_stride_d, s_in, d_ok, dk)
    store_rows(DV_OUT, s0, dv_stride_n, offs_s, offs_dv, dv_stride_d, s_in, dv_ok, dv * unit)


@triton.jit(do_not_specialize=_RUNTIME)
def performer_omega_kernel(
    X, Y, OMEGA, MASK, VALUES, LSE, SHIFT, OUT_LSE, DELTA, UNIT, PART_DOMEGA,
    x_stride_b, x_stride_h, x_stride_n, x_stride_d,
    y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    omega_stride_h, omega_stride_m, mask_stride_b, mask_stride_n,
    H, N, M, D, DV, slice_length, slices, scale, weight_bits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KEYS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one slice of the keys (or queries) adds to omega's gradient: sum_n de_mn x'_n, de as in the passes that give
    dk (KEYS: X, Y = K, V, and VALUES = dvalues / UNIT) and dq (X, Y = Q, dout)."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % m_blocks) * BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    X += b * x_stride_b + h * x_stride_h
    Y += b * y_stride_b + h * y_stride_h
    MASK += b * mask_stride_b
    omega = load_rows(OMEGA + h * omega_stride_h, m0, omega_stride_m, offs_m, offs_d, 1, m_ok, offs_d < D)
    values = load_rows(VALUES + bh * M * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV)
    lse = tl.load(LSE + bh * M + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E
    if KEYS:
        lse = weight_bits - tl.where(lse == float("-inf"), float("inf"), lse)
        shift = tl.load(SHIFT + bh * M + m0 + offs_m, mask=m_ok, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = slice_index * slice_length
    end = tl.minimum(start + slice_length, N)
    for n0 in range(start, end, BLOCK_N):
        n_ok = n0 + offs_n < end
        if HAS_MASK:
            n_ok &= tl.load(MASK + (n0 + offs_n).to(tl.int64) * mask_stride_n, mask=n_ok, other=0) != 0
        x = load_rows(X, n0, x_stride_n, offs_n, offs_d, x_stride_d, n_ok, offs_d < D)  # [BLOCK_N, BLOCK_D]
        y = load_rows(Y, n0, y_stride_n, offs_n, offs_dv, y_stride_d, n_ok, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
        u = tl.dot(omega, tl.trans(x), input_precision=PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        de = tl.dot(values, tl.trans(y), input_precision=PRECISION)
        if KEYS:
            x32 = x.to(tl.float32)
            token_shift = tl.where(n_ok, tl.sum(x32 * x32, 1) * -half_scale, float("-inf"))
            de += shift[:, None]
        else:
            out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_ok, other=float("inf")) * LOG2E
            token_shift = -tl.where(out_lse == float("-inf"), float("inf"), out_lse)
            de -= tl.load(DELTA + bh * N + n0 + offs_n, mask=n_ok, other=0.0)[None, :]
        de *= tl.exp2(u + lse[:, None] + token_shift[None, :])
        acc = tl.dot(de.to(x.dtype), x, acc, input_precision=PRECISION)
    if KEYS:
        acc *= tl.load(UNIT + bh) * tl.exp2(-weight_bits)
    part = (bh * slices + slice_index) * M
    store_rows(PART_DOMEGA + part * D, m0, D, offs_m, offs_d, 1, m_ok, offs_d < D, acc * scale)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
