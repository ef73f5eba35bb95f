"""The Triton kernels of FAVOR+; `fused` launches them, `ops` derives what they compute.

H heads, N queries, S keys, M features, D and DV widths. A program owns the named block of one head:

    performer_state_fwd_kernel    BLOCK_M features over one slice of the keys: reads K, V once
    performer_merge_kernel        BLOCK_M features: merges the slices, as flash decoding merges its splits
    performer_read_fwd_kernel     BLOCK_N queries, walking over the features: reads Q once
    (and in `backward_kernels`)
    performer_read_dq_kernel      BLOCK_N queries: dQ, and delta = sum(dout * out) for the next
    performer_read_dstate_kernel  BLOCK_M features over one slice of the queries: dvalues and dlse as partial sums
    performer_state_bwd_kernel    BLOCK_S keys, walking over the features: dK, dV
    performer_omega_kernel        BLOCK_M features over one slice of keys, or of queries: domega as partial sums

Of heads wider than BLOCK_D or BLOCK_DV a program writes one block of columns (`columns`). Each of several documents
(VARLEN) has slices of its own, which SLICES lists, and a state of its own, along the axis of length `documents`.
Features live in registers only. Products run on the matrix units in the dtype of q, k, v (float32 as three tf32
products on NVIDIA), all else in float32, exponents in base 2. No atomics: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, divide_rows, softmax_merge, softmax_step
from medformer_kernels.performer.columns import load_tile, product, row_products, split_columns, store_tile

# Lengths and slices never specialise a kernel: the first call on a new length compiles nothing.
RUNTIME = ["N", "S", "M", "slice_length", "slices", "documents", "groups"]


@triton.jit
def slice_bounds(SLICES, index, slices, slice_length, tokens, VARLEN: tl.constexpr):
    """(start, end, whether it begins, whether it ends a document) of a slice; VARLEN: as SLICES (slices, 5) has it."""
    if VARLEN:
        SLICES += index * 5
        return (tl.load(SLICES), tl.load(SLICES + 1), tl.load(SLICES + 2) != 0, tl.load(SLICES + 3) != 0)
    else:
        start = index * slice_length
        return (start, tl.minimum(start + slice_length, tokens), index == 0, index == slices - 1)


@triton.jit
def state_of(SLICES, bh, index, documents, VARLEN: tl.constexpr):
    """Which state the tokens of a slice have: that of their head and document."""
    bh = bh.to(tl.int64)
    if VARLEN:
        return bh * documents + tl.load(SLICES + index * 5 + 4)
    else:
        return bh


@triton.jit(do_not_specialize=RUNTIME)
def performer_state_fwd_kernel(
    K, V, OMEGA, MASK, SLICES, OUT_LSE, DELTA, VALUES, LSE, TOP,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    omega_stride_h, omega_stride_m, mask_stride_b, mask_stride_n,
    H, groups, S, M, D: tl.constexpr, DV: tl.constexpr, slice_length, slices, scale,
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
    pid, column = split_columns(tl.program_id(0), tl.cdiv(DV, BLOCK_DV))
    m0 = (pid % m_blocks) * BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = pid // (m_blocks * slices)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    h_kv = h // groups
    offs_m = tl.arange(0, BLOCK_M)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = column * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    first_ok = m0 + offs_m < tl.where(column == 0, M, 0)
    K += b * k_stride_b + h_kv * k_stride_h
    V += b * v_stride_b + h_kv * v_stride_h
    OMEGA += h * omega_stride_h
    # omega [BLOCK_M, BLOCK_D] stays on chip for the whole slice
    omega_at = (OMEGA, m0, omega_stride_m, offs_m, 1, m_ok)
    omega = load_tile(omega_at, offs_d, D)
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
        k_at = (K, s0, k_stride_n, offs_s, k_stride_d, s_ok)
        k = load_tile(k_at, offs_d, D)  # [BLOCK_S, BLOCK_D]
        v_at = (V, s0, v_stride_n, offs_s, v_stride_d, s_ok)
        v = load_tile(v_at, offs_dv, DV)  # [BLOCK_S, BLOCK_DV]
        if QUERIES:
            out_lse = tl.load(OUT_LSE + bh.to(tl.int64) * S + s0 + offs_s, mask=s_ok, other=float("inf")) * LOG2E
            shift = -tl.where(out_lse == float("-inf"), float("inf"), out_lse)  # no key: every weight 0
        else:
            square = row_products(k, k, k_at, k_at, offs_d, D, BLOCK_D)
            shift = tl.where(s_ok, square * -half_scale, float("-inf"))
        u = product(omega, k, omega_at, k_at, offs_d, D, BLOCK_D, PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_S]
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
    store_tile((VALUES + out * DV, m0, DV, offs_m, 1, m_ok), offs_dv, DV, values)
    tl.store(LSE + out + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=first_ok)
    if QUERIES:
        tl.store(TOP + out + m0 + offs_m, delta_sum / tl.where(total == 0.0, 1.0, total), mask=first_ok)
    if WITH_MAX:
        u_top = tl.max(tl.where(m_ok, u_top, float("-inf")), 0)
        tl.store(TOP + pid.to(tl.int64), u_top / LOG2E, mask=column == 0)


@triton.jit(do_not_specialize=RUNTIME)
def performer_merge_kernel(
    PART_VALUES, PART_LSE, ENDS, VALUES, LSE, M, DV: tl.constexpr, slices, documents,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """lse = log sum_s exp(lse_s); values = sum_s exp(lse_s - lse) values_s: the slices of one head and document.

    ENDS (documents + 1): the first slice of each document, and their number.
    """
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    document = (pid // m_blocks) % documents
    bh = (pid // (m_blocks * documents)).to(tl.int64)
    m0 = (pid % m_blocks) * BLOCK_M
    first, last = 0, slices
    if VARLEN:
        first, last = tl.load(ENDS + document), tl.load(ENDS + document + 1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_ok = m0 + offs_m < M
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for s in range(first, last):
        part = (bh * slices + s) * M
        lse = tl.load(PART_LSE + part + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        values = load_tile((PART_VALUES + part * DV, m0, DV, offs_m, 1, m_ok), offs_dv, DV)
        top, total, acc = softmax_merge(top, total, acc, lse, 1.0, values)
    acc = divide_rows(acc, total)
    out = (bh * documents + document) * M
    store_tile((VALUES + out * DV, m0, DV, offs_m, 1, m_ok), offs_dv, DV, acc)
    tl.store(LSE + out + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=m_ok)


@triton.jit(do_not_specialize=RUNTIME)
def performer_read_fwd_kernel(
    Q, OMEGA, SLICES, VALUES, LSE, EXTRA_VALUES, EXTRA_LSE, OUT, OUT_LSE,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, omega_stride_h, omega_stride_m,
    H, N, M, D: tl.constexpr, DV: tl.constexpr, slices, documents, scale,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_EXTRA: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_m softmax_m(omega_m q'_i + lse_m) values_m for BLOCK_N queries, and the log of its denominator."""
    pid, column = split_columns(tl.program_id(0), tl.cdiv(DV, BLOCK_DV))
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    n0, end, _first, _last = slice_bounds(SLICES, pid % slices, slices, BLOCK_N, N, VARLEN)
    state = state_of(SLICES, bh, pid % slices, documents, VARLEN)
    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = column * BLOCK_DV + tl.arange(0, BLOCK_DV)
    n_ok = n0 + offs_n < end
    Q += b * q_stride_b + h * q_stride_h
    q_at = (Q, n0, q_stride_n, offs_n, q_stride_d, n_ok)
    q = load_tile(q_at, offs_d, D)
    exponent_scale = scale * LOG2E
    OMEGA += h * omega_stride_h
    VALUES += state * M * DV
    LSE += state * M

    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    u_top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    if HAS_EXTRA:
        square = row_products(q, q, q_at, q_at, offs_d, D, BLOCK_D)
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
        e = u + lse[None, :]
        top, total, acc = softmax_step(top, total, acc, e, values, PRECISION)
    if HAS_EXTRA:
        # |q'|^2 / 2 + max_m u + extra_lse
        extra = square * (scale * scale * 0.5 * LOG2E) + u_top + tl.load(EXTRA_LSE + bh) * LOG2E
        extra_values = tl.load(EXTRA_VALUES + bh * DV + offs_dv, mask=offs_dv < DV, other=0.0)
        top, total, acc = softmax_merge(top, total, acc, extra, 1.0, extra_values[None, :])
    acc = divide_rows(acc, total)
    store_tile((OUT + bh * N * DV, n0, DV, offs_n, 1, n_ok), offs_dv, DV, acc)
    tl.store(
        OUT_LSE + bh * N + n0 + offs_n, (top + tl.log2(total)) / LOG2E, mask=n0 + offs_n < tl.where(column == 0, end, 0)
    )


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
