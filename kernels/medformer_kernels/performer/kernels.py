"""The Triton kernels of FAVOR+; `fused` launches them, `ops` derives what they compute.

H heads, N queries, S keys, M features, D and DV widths. A program owns the named block of one head:

    performer_state_fwd_kernel    BLOCK_M features over one slice of the keys: reads K, V once
    performer_merge_kernel        BLOCK_M features: merges the slices, as flash decoding merges its splits
    performer_read_fwd_kernel     BLOCK_N queries, walking over the features: reads Q once
    (and in `backward_kernels`)
    performer_read_dq_kernel      BLOCK_N queries: dQ, and delta = sum(dout * out) for the next
    performer_read_dstate_kernel  BLOCK_M features over one slice of the queries: dvalues and dlse as partial sums
    performer_state_bwd_kernel    BLOCK_N keys, walking over the features: dK, dV
    performer_omega_kernel        BLOCK_M features over one slice of keys, or of queries: domega as partial sums

Of heads wider than BLOCK_D or BLOCK_DV a program writes one block of columns (`columns`). Each of several documents
(VARLEN) has slices of its own, which SLICES lists, and a state of its own, along the axis of length `documents`.
Features live in registers only. Products run on the matrix units in the dtype of q, k, v (float32 as three tf32
products on NVIDIA), all else in float32, exponents in base 2. No atomics: equal inputs give equal bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, divide_rows, moved, of_head, softmax_merge, softmax_step
from medformer_kernels.performer.columns import load_tile, product, row_products, split_columns, store_tile

# Lengths and slices never specialise a kernel: the first call on a new length compiles nothing.
RUNTIME = ["N", "S", "M", "slice_length", "slices", "documents", "groups"]


class Meta(NamedTuple):
    """What a kernel of FAVOR+ is compiled for: widths, tiles, and flags that its docstring explains."""

    D: int = 0
    DV: int = 0
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_D: int = 0
    BLOCK_DV: int = 0
    PRECISION: str = "ieee"
    RANGED_PRECISION: str = "ieee"
    HAS_MASK: bool = False
    HAS_EXTRA: bool = False
    VARLEN: bool = False
    WITH_MAX: bool = False
    CARRIED: bool = False
    QUERIES: bool = False
    KEYS: bool = False
    REVERSE: bool = False
    OF_OMEGA: bool = False


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
    K, V, OMEGA, MASK, SLICES, ROWS, STATE, H, groups, S, M, slice_length, slices, scale, META: tl.constexpr
):
    """values_m = sum_n softmax_n(e_mn) v_n and lse_m over the keys of one slice; e_mn = omega_m k'_n - |k'_n|^2 / 2.

    WITH_MAX: TOP is the maximum of omega_m k'_n. CARRIED, for the causal form: nothing where no later slice of the
    document reads it. QUERIES: K, V are Q, dout; e_mn = omega_m q'_n - OUT_LSE_n, the earlier slices are those that
    read, and TOP is the mean of DELTA.
    """
    OUT_LSE, DELTA = ROWS
    VALUES, LSE, TOP = STATE
    m_blocks = tl.cdiv(M, META.BLOCK_M)
    pid, column = split_columns(tl.program_id(0), tl.cdiv(META.DV, META.BLOCK_DV))
    m0 = (pid % m_blocks) * META.BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = pid // (m_blocks * slices)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    h_kv = h // groups
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_s = tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = column * META.BLOCK_DV + tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < M
    first_ok = m0 + offs_m < tl.where(column == 0, M, 0)
    K = of_head(K, b, h_kv)
    V = of_head(V, b, h_kv)
    OMEGA = moved(OMEGA, h * OMEGA.h)
    # omega [BLOCK_M, BLOCK_D] stays on chip for the whole slice
    omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
    omega = load_tile(omega_at, offs_d, META.D)
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E

    top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_M], tl.float32)
    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    u_top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    delta_sum = tl.zeros([META.BLOCK_M], tl.float32)
    start, end, first, last = slice_bounds(SLICES, slice_index, slices, slice_length, S, META.VARLEN)
    if META.CARRIED:
        unread = last
        if META.QUERIES:
            unread = first
        end = tl.where(unread, start, end)
    for s0 in range(start, end, META.BLOCK_N):
        s_ok = s0 + offs_s < end
        if META.HAS_MASK:
            s_ok &= tl.load(MASK.data + b * MASK.b + (s0 + offs_s) * MASK.n, mask=s_ok, other=0) != 0
        k_at = (K.data, s0, K.n, offs_s, K.d, s_ok)
        k = load_tile(k_at, offs_d, META.D)  # [BLOCK_N, BLOCK_D]
        v_at = (V.data, s0, V.n, offs_s, V.d, s_ok)
        v = load_tile(v_at, offs_dv, META.DV)  # [BLOCK_N, BLOCK_DV]
        if META.QUERIES:
            out_lse = tl.load(OUT_LSE + bh.to(tl.int64) * S + s0 + offs_s, mask=s_ok, other=float("inf")) * LOG2E
            shift = -tl.where(out_lse == float("-inf"), float("inf"), out_lse)  # no key: every weight 0
        else:
            square = row_products(k, k, k_at, k_at, offs_d, META.D)
            shift = tl.where(s_ok, square * -half_scale, float("-inf"))
        u = product(omega, k, omega_at, k_at, offs_d, META.D, META.PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        if META.WITH_MAX:
            u_top = tl.maximum(u_top, tl.max(tl.where(s_ok[None, :], u, float("-inf")), 1))
        e = u + shift[None, :]
        old_top = top
        top, total, acc = softmax_step(top, total, acc, e, v, META.PRECISION)
        if META.QUERIES:
            delta = tl.load(DELTA + bh.to(tl.int64) * S + s0 + offs_s, mask=s_ok, other=0.0)
            base = tl.where(top == float("-inf"), 0.0, top)
            delta_sum = delta_sum * tl.exp2(old_top - base) + tl.sum(tl.exp2(e - base[:, None]) * delta[None, :], 1)
    out = (bh.to(tl.int64) * slices + slice_index) * M
    values = divide_rows(acc, total)
    store_tile((VALUES + out * META.DV, m0, META.DV, offs_m, 1, m_ok), offs_dv, META.DV, values)
    tl.store(LSE + out + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=first_ok)
    if META.QUERIES:
        tl.store(TOP + out + m0 + offs_m, delta_sum / tl.where(total == 0.0, 1.0, total), mask=first_ok)
    if META.WITH_MAX:
        u_top = tl.max(tl.where(m_ok, u_top, float("-inf")), 0)
        tl.store(TOP + pid.to(tl.int64), u_top / LOG2E, mask=column == 0)


@triton.jit(do_not_specialize=RUNTIME)
def performer_merge_kernel(PART_VALUES, PART_LSE, ENDS, VALUES, LSE, M, slices, documents, META: tl.constexpr):
    """lse = log sum_s exp(lse_s); values = sum_s exp(lse_s - lse) values_s: the slices of one head and document.

    ENDS (documents + 1): the first slice of each document, and their number.
    """
    m_blocks = tl.cdiv(M, META.BLOCK_M)
    pid = tl.program_id(0)
    document = (pid // m_blocks) % documents
    bh = (pid // (m_blocks * documents)).to(tl.int64)
    m0 = (pid % m_blocks) * META.BLOCK_M
    first, last = 0, slices
    if META.VARLEN:
        first, last = tl.load(ENDS + document), tl.load(ENDS + document + 1)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < M
    top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_M], tl.float32)
    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    for s in range(first, last):
        part = (bh * slices + s) * M
        lse = tl.load(PART_LSE + part + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        values = load_tile((PART_VALUES + part * META.DV, m0, META.DV, offs_m, 1, m_ok), offs_dv, META.DV)
        top, total, acc = softmax_merge(top, total, acc, lse, 1.0, values)
    acc = divide_rows(acc, total)
    out = (bh * documents + document) * M
    store_tile((VALUES + out * META.DV, m0, META.DV, offs_m, 1, m_ok), offs_dv, META.DV, acc)
    tl.store(LSE + out + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=m_ok)


@triton.jit(do_not_specialize=RUNTIME)
def performer_read_fwd_kernel(
    Q, OMEGA, SLICES, VALUES, LSE, EXTRA, OUT, OUT_LSE, H, N, M, slices, documents, scale, META: tl.constexpr
):
    """out_i = sum_m softmax_m(omega_m q'_i + lse_m) values_m for BLOCK_N queries, and the log of its denominator."""
    pid, column = split_columns(tl.program_id(0), tl.cdiv(META.DV, META.BLOCK_DV))
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    n0, end, _first, _last = slice_bounds(SLICES, pid % slices, slices, META.BLOCK_N, N, META.VARLEN)
    state = state_of(SLICES, bh, pid % slices, documents, META.VARLEN)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = column * META.BLOCK_DV + tl.arange(0, META.BLOCK_DV)
    n_ok = n0 + offs_n < end
    Q = of_head(Q, b, h)
    q_at = (Q.data, n0, Q.n, offs_n, Q.d, n_ok)
    q = load_tile(q_at, offs_d, META.D)
    exponent_scale = scale * LOG2E
    OMEGA = moved(OMEGA, h * OMEGA.h)
    VALUES += state * M * META.DV
    LSE += state * M

    top = tl.full([META.BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_N], tl.float32)
    acc = tl.zeros([META.BLOCK_N, META.BLOCK_DV], tl.float32)
    u_top = tl.full([META.BLOCK_N], float("-inf"), tl.float32)
    square = tl.zeros([META.BLOCK_N], tl.float32)
    if META.HAS_EXTRA:
        square = row_products(q, q, q_at, q_at, offs_d, META.D)
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
        e = u + lse[None, :]
        top, total, acc = softmax_step(top, total, acc, e, values, META.PRECISION)
    if META.HAS_EXTRA:
        # |q'|^2 / 2 + max_m u + extra_lse
        extra = square * (scale * scale * 0.5 * LOG2E) + u_top + tl.load(EXTRA[1] + bh) * LOG2E
        extra_values = tl.load(EXTRA[0] + bh * META.DV + offs_dv, mask=offs_dv < META.DV, other=0.0)
        top, total, acc = softmax_merge(top, total, acc, extra, 1.0, extra_values[None, :])
    acc = divide_rows(acc, total)
    store_tile((OUT + bh * N * META.DV, n0, META.DV, offs_n, 1, n_ok), offs_dv, META.DV, acc)
    tl.store(
        OUT_LSE + bh * N + n0 + offs_n, (top + tl.log2(total)) / LOG2E, mask=n0 + offs_n < tl.where(column == 0, end, 0)
    )


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
