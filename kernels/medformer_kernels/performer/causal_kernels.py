"""The Triton kernels of causal FAVOR+; `causal_fused` launches them, `causal` derives what they compute.

A program walks the chunks of one slice of one head. What it carries from chunk to chunk, for each feature the mean of
the values and the log of their weights, is kept in memory of its own (M x (Dv + 1) float32, read and written once a
chunk: it stays in the cache), so that features and widths may be of any number:

    performer_state_fwd_kernel    (in `kernels`) the state of each slice alone, of keys, or backward of queries
    performer_scan_kernel         BLOCK_M features: from these the state before each slice, or after it, in place
    performer_causal_fwd_kernel   one slice in order: out
    performer_causal_dq_kernel    one slice in order: dQ
    performer_causal_dkv_kernel   one slice in reverse: dK, dV

Pairs inside a chunk are products of two tiles of features, each relative to the maximum of its own query or key; where
a query spans more than SPAN bits, such a product would underflow and the pairs are summed one key at a time instead.
Of heads wider than a tile the outputs are made one block of columns after the other, each with the features again; the
last of these rounds moves the state on. Exponents are in base 2. No atomics: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, divide_rows, moved, of_head, softmax_merge, softmax_step
from medformer_kernels.performer.causal_tiles import (
    SPAN,
    add_to_omega,
    advance,
    advance_all,
    exact_de,
    exact_du,
    exact_logs,
    exponents,
    key_ok,
    key_shift,
    next_weights,
    ranged,
    scale_of_pairs,
    tops,
)
from medformer_kernels.performer.columns import load_tile, product, row_products, store_tile
from medformer_kernels.performer.kernels import slice_bounds

# Lengths and slices never specialise a kernel: the first call on a new length compiles nothing.
_RUNTIME = ["N", "M", "slice_length", "slices", "groups"]


@triton.jit(do_not_specialize=_RUNTIME)
def performer_scan_kernel(VALUES, LSE, EXTRA, SLICES, M, slices, META: tl.constexpr):
    """In the place of each slice's own state that of all before it (REVERSE: after it) in its document; lse to base 2.

    The last slice of a document has no state of its own (REVERSE: the first): it is never read. EXTRA, one more value
    of each feature, only in REVERSE.
    """
    m_blocks = tl.cdiv(M, META.BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // m_blocks).to(tl.int64)
    m0 = (pid % m_blocks) * META.BLOCK_M
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < M
    top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_M], tl.float32)
    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    extra = tl.zeros([META.BLOCK_M], tl.float32)
    for step in range(0, slices):
        s = step
        if META.REVERSE:
            s = slices - 1 - step
        _start, _end, first, last = slice_bounds(SLICES, s, slices, 0, 0, META.VARLEN)
        fresh = first
        own = last
        if META.REVERSE:
            fresh = last
            own = first
        top = tl.where(fresh, float("-inf"), top)
        total = tl.where(fresh, 0.0, total)
        acc = tl.where(fresh, 0.0, acc)
        part = (bh * slices + s) * M
        part_ok = m0 + offs_m < tl.where(own, 0, M)
        lse = tl.load(LSE + part + m0 + offs_m, mask=part_ok, other=float("-inf")) * LOG2E
        values = load_tile((VALUES + part * META.DV, m0, META.DV, offs_m, 1, part_ok), offs_dv, META.DV)
        store_tile((VALUES + part * META.DV, m0, META.DV, offs_m, 1, m_ok), offs_dv, META.DV, divide_rows(acc, total))
        tl.store(LSE + part + m0 + offs_m, top + tl.log2(total), mask=m_ok)
        if META.REVERSE:
            extra = tl.where(fresh, 0.0, extra)
            part_extra = tl.load(EXTRA + part + m0 + offs_m, mask=part_ok, other=0.0)
            tl.store(EXTRA + part + m0 + offs_m, extra / tl.where(total == 0.0, 1.0, total), mask=m_ok)
            new_top = tl.maximum(top, lse)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            extra = extra * tl.exp2(top - base) + part_extra * tl.exp2(lse - base)
        top, total, acc = softmax_merge(top, total, acc, lse, 1.0, values)


@triton.jit(do_not_specialize=_RUNTIME)
def performer_causal_fwd_kernel(
    INPUTS, SLICES, STATE, OUTPUTS, H, groups, N, M, slice_length, slices, scale, META: tl.constexpr
):
    """out_i = sum_{j <= i} w_ij v_j / sum_{j <= i} w_ij, w_ij = sum_m exp(u_im + e_jm), and the log of the denominator.

    Earlier chunks are read from the state, one softmax over the features; then the chunk itself is one more tile of it.
    """
    Q, K, V, OMEGA, MASK = INPUTS
    VALUES, LSE = STATE
    TOPS, OUT, OUT_LSE = OUTPUTS
    pid = tl.program_id(0)
    slice_index = pid % slices
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    h_kv = h // groups
    start, end, _first, _last = slice_bounds(SLICES, slice_index, slices, slice_length, N, META.VARLEN)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E
    Q = of_head(Q, b, h)
    K = of_head(K, b, h_kv)
    V = of_head(V, b, h_kv)
    MASK = moved(MASK, b * MASK.b)
    OMEGA = moved(OMEGA, h * OMEGA.h)
    VALUES += (bh * slices + slice_index) * M * META.DV
    LSE += (bh * slices + slice_index) * M
    for n0 in tl.range(start, end, META.BLOCK_N, disable_licm=True):
        n_in = n0 + offs_n < end
        n_ok = key_ok(MASK, n_in, n0, offs_n, META.HAS_MASK)
        q_at = (Q.data, n0, Q.n, offs_n, Q.d, n_in)
        k_at = (K.data, n0, K.n, offs_n, K.d, n_ok)
        v_at = (V.data, n0, V.n, offs_n, V.d, n_ok)
        q = load_tile(q_at, offs_d, META.D)
        k = load_tile(k_at, offs_d, META.D)
        shift = key_shift(k, k_at, half_scale, offs_d, META.D)
        no_shift = tl.zeros([META.BLOCK_N], tl.float32)
        for c0 in tl.range(0, META.DV, META.BLOCK_DV, disable_licm=True):
            offs_c = c0 + offs_dv
            v = load_tile(v_at, offs_c, META.DV)
            top = tl.full([META.BLOCK_N], float("-inf"), tl.float32)
            total = tl.zeros([META.BLOCK_N], tl.float32)
            acc = tl.zeros([META.BLOCK_N, META.BLOCK_DV], tl.float32)
            pairs = tl.zeros([META.BLOCK_N, META.BLOCK_N], tl.float32)
            u_top = tl.full([META.BLOCK_N], float("-inf"), tl.float32)
            u_low = tl.full([META.BLOCK_N], float("inf"), tl.float32)
            e_top = tl.full([META.BLOCK_N], float("-inf"), tl.float32)
            for m0 in tl.range(0, M, META.BLOCK_M, disable_licm=True):
                m_ok = m0 + offs_m < M
                omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
                omega = load_tile(omega_at, offs_d, META.D)
                values_at = (VALUES, m0, META.DV, offs_m, 1, m_ok)
                values = load_tile(values_at, offs_c, META.DV)
                lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf"))
                u = exponents(q, omega, q_at, omega_at, exponent_scale, no_shift, offs_d, META)
                top, total, acc = softmax_step(top, total, acc, u + lse[None, :], values.to(v.dtype), META.PRECISION)
                e = exponents(k, omega, k_at, omega_at, exponent_scale, shift, offs_d, META)
                u_low = tl.minimum(u_low, tl.min(tl.where(m_ok[None, :], u, float("inf")), 1))
                new_u_top = tl.maximum(u_top, tl.max(u, 1))
                new_e_top = tl.maximum(e_top, tl.max(e, 1))
                e_base = tl.where(new_e_top == float("-inf"), 0.0, new_e_top)
                phi_q = ranged(tl.exp2(u - new_u_top[:, None]), q)
                phi_k = ranged(tl.exp2(e - e_base[:, None]), q)
                pairs *= tl.exp2(u_top - new_u_top)[:, None] * tl.exp2(e_top - e_base)[None, :]
                pairs = tl.dot(phi_q, tl.trans(phi_k), pairs, input_precision=META.RANGED_PRECISION)
                u_top = new_u_top
                e_top = new_e_top
                new_lse, p, kept, inverse = next_weights(lse, e)
                store_tile(values_at, offs_c, META.DV, advance(values, p, kept, inverse, v, META.PRECISION))
                if c0 + META.BLOCK_DV >= META.DV:
                    tl.store(LSE + m0 + offs_m, new_lse, mask=m_ok)
            logs = tl.log2(pairs) + u_top[:, None] + e_top[None, :]
            if tl.max(u_top - u_low, 0) > SPAN:
                logs = exact_logs(
                    q, k, q_at, k_at, OMEGA, M, exponent_scale, no_shift, shift, offs_n, offs_m, offs_d, META
                )
            logs = tl.where((n0 + offs_n)[:, None] >= (n0 + offs_n)[None, :], logs, float("-inf"))
            top, total, acc = softmax_step(top, total, acc, logs, v, META.PRECISION)
            U_TOP, U_LOW, E_TOP = TOPS
            tl.store(U_TOP + bh * N + n0 + offs_n, u_top, mask=n_in)
            tl.store(U_LOW + bh * N + n0 + offs_n, u_low, mask=n_in)
            tl.store(E_TOP + bh * N + n0 + offs_n, e_top, mask=n_in)
            store_tile((OUT + bh * N * META.DV, n0, META.DV, offs_n, 1, n_in), offs_c, META.DV, divide_rows(acc, total))
            tl.store(OUT_LSE + bh * N + n0 + offs_n, (top + tl.log2(total)) / LOG2E, mask=n_in)
        tl.debug_barrier()  # the state that one thread wrote, another reads


@triton.jit(do_not_specialize=_RUNTIME)
def performer_causal_dq_kernel(
    INPUTS, SLICES, STATE, OUTPUTS, GRADIENTS, H, groups, N, M, slice_length, slices, scale, META: tl.constexpr
):
    """dq_i = sum_m du_im omega_m / D^(1/4), du_im = exp(u_im - L_i) sum_{j <= i} exp(e_jm) (dout_i v_j - delta_i).

    Also delta_i = dout_i out_i, which the passes after this one read. OF_OMEGA: sum_i du_im q_i for omega's gradient in
    the place of dq; the two do not fit in the registers together.
    """
    Q, K, V, OMEGA, MASK = INPUTS
    VALUES, LSE = STATE
    TOPS, OUT, OUT_LSE = OUTPUTS
    DELTA, DOUT, DQ, DOMEGA = GRADIENTS
    pid = tl.program_id(0)
    slice_index = pid % slices
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    h_kv = h // groups
    start, end, _first, _last = slice_bounds(SLICES, slice_index, slices, slice_length, N, META.VARLEN)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E
    Q = of_head(Q, b, h)
    K = of_head(K, b, h_kv)
    V = of_head(V, b, h_kv)
    DOUT = of_head(DOUT, b, h)
    DQ = of_head(DQ, b, h)
    MASK = moved(MASK, b * MASK.b)
    OMEGA = moved(OMEGA, h * OMEGA.h)
    VALUES += (bh * slices + slice_index) * M * META.DV
    LSE += (bh * slices + slice_index) * M
    DOMEGA += (bh * slices + slice_index) * M * META.D
    for n0 in tl.range(start, end, META.BLOCK_N, disable_licm=True):
        n_in = n0 + offs_n < end
        n_ok = key_ok(MASK, n_in, n0, offs_n, META.HAS_MASK)
        q_at = (Q.data, n0, Q.n, offs_n, Q.d, n_in)
        k_at = (K.data, n0, K.n, offs_n, K.d, n_ok)
        v_at = (V.data, n0, V.n, offs_n, V.d, n_ok)
        q = load_tile(q_at, offs_d, META.D)
        k = load_tile(k_at, offs_d, META.D)
        v = load_tile(v_at, offs_dv, META.DV)
        dout_at = (DOUT.data, n0, DOUT.n, offs_n, DOUT.d, n_in)
        dout = load_tile(dout_at, offs_dv, META.DV)
        out_at = (OUT + bh * N * META.DV, n0, META.DV, offs_n, 1, n_in)
        delta = row_products(dout, load_tile(out_at, offs_dv, META.DV), dout_at, out_at, offs_dv, META.DV)
        tl.store(DELTA + bh * N + n0 + offs_n, delta, mask=n_in)
        out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_in, other=float("inf")) * LOG2E
        out_lse = tl.where(out_lse == float("-inf"), float("inf"), out_lse)  # no key: every weight 0
        gains = product(dout, v, dout_at, v_at, offs_dv, META.DV, META.PRECISION) - delta[:, None]  # [BLOCK_N, BLOCK_N]
        u_top, e_top, wide = tops(TOPS, bh * N + n0 + offs_n, n_in, n_ok)
        causal = (n0 + offs_n)[:, None] >= (n0 + offs_n)[None, :]
        gains = tl.where(causal, gains, 0.0)
        pair_scale = scale_of_pairs(u_top, e_top, out_lse, wide)
        scaled = ranged(gains * pair_scale, q)
        shift = key_shift(k, k_at, half_scale, offs_d, META.D)
        for c0 in tl.range(0, META.D, META.BLOCK_D, disable_licm=True):
            offs_c = c0 + offs_d
            q_c = q
            if META.OF_OMEGA and META.D > META.BLOCK_D:
                q_c = load_tile(q_at, offs_c, META.D)
            dq = tl.zeros([META.BLOCK_N, META.BLOCK_D], tl.float32)
            if wide:
                for m0 in tl.range(0, M, META.BLOCK_M, disable_licm=True):
                    m_ok = m0 + offs_m < M
                    omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
                    omega = load_tile(omega_at, offs_d, META.D)
                    u = exponents(q, omega, q_at, omega_at, exponent_scale, -out_lse, offs_d, META)
                    e = exponents(k, omega, k_at, omega_at, exponent_scale, shift, offs_d, META)
                    du = exact_du(u, e, gains, offs_n)
                    if META.OF_OMEGA:
                        add_to_omega((DOMEGA, m0, META.D, offs_m, 1, m_ok), du, q_c, offs_c, META)
                    else:
                        if META.D > META.BLOCK_D:
                            omega = load_tile(omega_at, offs_c, META.D)
                        dq = tl.dot(ranged(du, q), ranged(omega, q), dq, input_precision=META.RANGED_PRECISION)
                tl.debug_barrier()
            for m0 in tl.range(0, M, META.BLOCK_M, disable_licm=True):
                m_ok = m0 + offs_m < M
                omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
                omega = load_tile(omega_at, offs_d, META.D)
                values_at = (VALUES, m0, META.DV, offs_m, 1, m_ok)
                values = load_tile(values_at, offs_dv, META.DV)
                lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf"))
                e = exponents(k, omega, k_at, omega_at, exponent_scale, shift, offs_d, META)
                phi_k = ranged(tl.exp2(e - e_top[:, None]), q)
                sums = tl.dot(scaled, phi_k, input_precision=META.RANGED_PRECISION)
                u = exponents(q, omega, q_at, omega_at, exponent_scale, -u_top, offs_d, META)
                du = tl.exp2(u) * sums
                dp = product(dout, values.to(v.dtype), dout_at, values_at, offs_dv, META.DV, META.PRECISION)
                du += tl.exp2(u + lse[None, :] + (u_top - out_lse)[:, None]) * (dp - delta[:, None])
                if META.OF_OMEGA:
                    add_to_omega((DOMEGA, m0, META.D, offs_m, 1, m_ok), du, q_c, offs_c, META)
                else:
                    if META.D > META.BLOCK_D:
                        omega = load_tile(omega_at, offs_c, META.D)
                    dq = tl.dot(ranged(du, q), ranged(omega, q), dq, input_precision=META.RANGED_PRECISION)
                if c0 + META.BLOCK_D >= META.D:
                    new_lse, weights, kept, inverse = next_weights(lse, e)
                    advance_all(values, weights, kept, inverse, v, values_at, v_at, offs_dv, META)
                    tl.store(LSE + m0 + offs_m, new_lse, mask=m_ok)
            if not META.OF_OMEGA:
                store_tile((DQ.data, n0, DQ.n, offs_n, DQ.d, n_in), offs_c, META.D, dq * scale)
        tl.debug_barrier()  # the state that one thread wrote, another reads


@triton.jit(do_not_specialize=_RUNTIME)
def performer_causal_dkv_kernel(
    INPUTS, SLICES, STATE, OUTPUTS, GRADIENTS, H, groups, N, M, slice_length, slices, scale, META: tl.constexpr
):
    """dk_j = (omega^T de_j - k'_j sum_m de_jm) / D^(1/4) and dv_j = sum_{i >= j} P_ij dout_i, one head of q each.

    de_jm = exp(e_jm) sum_{i >= j} exp(u_im - L_i) (dout_i v_j - delta_i). The state is that of the queries: for each
    feature the mean of dout (VALUES) and of delta (EXTRA), weighted by exp(u_im - L_i), and the log of the weights.
    OF_OMEGA: sum_j de_jm k_j in the place of both.
    """
    Q, K, V, OMEGA, MASK = INPUTS
    VALUES, LSE, EXTRA = STATE
    TOPS, OUT_LSE = OUTPUTS
    DELTA, DOUT, DK, DV_OUT, DOMEGA = GRADIENTS
    pid = tl.program_id(0)
    slice_index = pid % slices
    bh = (pid // slices).to(tl.int64)
    b, h = bh // H, bh % H
    h_kv = h // groups
    start, end, _first, _last = slice_bounds(SLICES, slice_index, slices, slice_length, N, META.VARLEN)
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    exponent_scale = scale * LOG2E
    half_scale = scale * scale * 0.5 * LOG2E
    Q = of_head(Q, b, h)
    K = of_head(K, b, h_kv)
    V = of_head(V, b, h_kv)
    DOUT = of_head(DOUT, b, h)
    DK = of_head(DK, b, h)
    DV_OUT = of_head(DV_OUT, b, h)
    MASK = moved(MASK, b * MASK.b)
    OMEGA = moved(OMEGA, h * OMEGA.h)
    VALUES += (bh * slices + slice_index) * M * META.DV
    LSE += (bh * slices + slice_index) * M
    EXTRA += (bh * slices + slice_index) * M
    DOMEGA += (bh * slices + slice_index) * M * META.D
    chunks = tl.cdiv(end - start, META.BLOCK_N)
    for chunk in tl.range(0, chunks, disable_licm=True):
        n0 = start + (chunks - 1 - chunk) * META.BLOCK_N
        n_in = n0 + offs_n < end
        n_ok = key_ok(MASK, n_in, n0, offs_n, META.HAS_MASK)
        q_at = (Q.data, n0, Q.n, offs_n, Q.d, n_in)
        k_at = (K.data, n0, K.n, offs_n, K.d, n_ok)
        v_at = (V.data, n0, V.n, offs_n, V.d, n_ok)
        q = load_tile(q_at, offs_d, META.D)
        k = load_tile(k_at, offs_d, META.D)
        v = load_tile(v_at, offs_dv, META.DV)
        dout_at = (DOUT.data, n0, DOUT.n, offs_n, DOUT.d, n_in)
        dout = load_tile(dout_at, offs_dv, META.DV)
        delta = tl.load(DELTA + bh * N + n0 + offs_n, mask=n_in, other=0.0)
        out_lse = tl.load(OUT_LSE + bh * N + n0 + offs_n, mask=n_in, other=float("inf")) * LOG2E
        out_lse = tl.where(out_lse == float("-inf"), float("inf"), out_lse)  # no key: every weight 0
        u_top, e_top, wide = tops(TOPS, bh * N + n0 + offs_n, n_in, n_ok)
        causal = (n0 + offs_n)[:, None] >= (n0 + offs_n)[None, :]
        shift = key_shift(k, k_at, half_scale, offs_d, META.D)
        pair_scale = scale_of_pairs(u_top, e_top, out_lse, wide)
        if not META.OF_OMEGA:
            # dV and dK one after the other: both at once overfill the registers.
            for c0 in tl.range(0, META.DV, META.BLOCK_DV, disable_licm=True):
                offs_c = c0 + offs_dv
                dv = tl.zeros([META.BLOCK_N, META.BLOCK_DV], tl.float32)
                pairs = tl.zeros([META.BLOCK_N, META.BLOCK_N], tl.float32)
                for m0 in tl.range(0, M, META.BLOCK_M, disable_licm=True):
                    m_ok = m0 + offs_m < M
                    omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
                    omega = load_tile(omega_at, offs_d, META.D)
                    values_at = (VALUES, m0, META.DV, offs_m, 1, m_ok)
                    values = load_tile(values_at, offs_c, META.DV)
                    lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf"))
                    e = exponents(k, omega, k_at, omega_at, exponent_scale, shift, offs_d, META)
                    dv = tl.dot(
                        ranged(tl.exp2(e + lse[None, :]), q),
                        ranged(values, q),
                        dv,
                        input_precision=META.RANGED_PRECISION,
                    )
                    phi_k = ranged(tl.exp2(e - e_top[:, None]), q)
                    phi_q = ranged(
                        tl.exp2(exponents(q, omega, q_at, omega_at, exponent_scale, -u_top, offs_d, META)),
                        q,
                    )
                    pairs = tl.dot(phi_q, tl.trans(phi_k), pairs, input_precision=META.RANGED_PRECISION)
                pairs *= pair_scale
                if wide:
                    logs = exact_logs(
                        q, k, q_at, k_at, OMEGA, M, exponent_scale, -out_lse, shift, offs_n, offs_m, offs_d, META
                    )
                    pairs = tl.exp2(tl.minimum(logs, SPAN))
                pairs = tl.where(causal, pairs, 0.0)
                dout_c = dout
                if META.DV > META.BLOCK_DV:
                    dout_c = load_tile(dout_at, offs_c, META.DV)
                dv = tl.dot(tl.trans(pairs.to(dout.dtype)), dout_c, dv, input_precision=META.PRECISION)
                store_tile((DV_OUT.data, n0, DV_OUT.n, offs_n, DV_OUT.d, n_in), offs_c, META.DV, dv)
        gains = product(dout, v, dout_at, v_at, offs_dv, META.DV, META.PRECISION) - delta[:, None]
        gains = tl.where(causal, gains, 0.0)
        scaled = tl.trans(ranged(gains * pair_scale, q))
        for c0 in tl.range(0, META.D, META.BLOCK_D, disable_licm=True):
            offs_c = c0 + offs_d
            k_c = k
            if META.OF_OMEGA and META.D > META.BLOCK_D:
                k_c = load_tile(k_at, offs_c, META.D)
            dk = tl.zeros([META.BLOCK_N, META.BLOCK_D], tl.float32)
            de_sum = tl.zeros([META.BLOCK_N], tl.float32)
            if wide:
                for m0 in tl.range(0, M, META.BLOCK_M, disable_licm=True):
                    m_ok = m0 + offs_m < M
                    omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
                    omega = load_tile(omega_at, offs_d, META.D)
                    u = exponents(q, omega, q_at, omega_at, exponent_scale, -out_lse, offs_d, META)
                    e = exponents(k, omega, k_at, omega_at, exponent_scale, shift, offs_d, META)
                    de = exact_de(u, e, gains, offs_n)
                    de_sum += tl.sum(de, 1)
                    if META.OF_OMEGA:
                        add_to_omega((DOMEGA, m0, META.D, offs_m, 1, m_ok), de, k_c, offs_c, META)
                    else:
                        if META.D > META.BLOCK_D:
                            omega = load_tile(omega_at, offs_c, META.D)
                        dk = tl.dot(ranged(de, q), ranged(omega, q), dk, input_precision=META.RANGED_PRECISION)
                tl.debug_barrier()
            for m0 in tl.range(0, M, META.BLOCK_M, disable_licm=True):
                m_ok = m0 + offs_m < M
                omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m_ok)
                omega = load_tile(omega_at, offs_d, META.D)
                values_at = (VALUES, m0, META.DV, offs_m, 1, m_ok)
                values = load_tile(values_at, offs_dv, META.DV)
                lse = tl.load(LSE + m0 + offs_m, mask=m_ok, other=float("-inf"))
                extra = tl.load(EXTRA + m0 + offs_m, mask=m_ok, other=0.0)
                e = exponents(k, omega, k_at, omega_at, exponent_scale, shift, offs_d, META)
                dp = product(ranged(v, q), ranged(values, q), v_at, values_at, offs_dv, META.DV, META.RANGED_PRECISION)
                de = tl.exp2(e + lse[None, :]) * (dp - extra[None, :])
                u = exponents(q, omega, q_at, omega_at, exponent_scale, -u_top, offs_d, META)
                sums = tl.dot(scaled, ranged(tl.exp2(u), q), input_precision=META.RANGED_PRECISION)
                de += tl.exp2(e - e_top[:, None]) * sums
                de_sum += tl.sum(de, 1)
                if META.OF_OMEGA:
                    add_to_omega((DOMEGA, m0, META.D, offs_m, 1, m_ok), de, k_c, offs_c, META)
                else:
                    if META.D > META.BLOCK_D:
                        omega = load_tile(omega_at, offs_c, META.D)
                    dk = tl.dot(ranged(de, q), ranged(omega, q), dk, input_precision=META.RANGED_PRECISION)
                if c0 + META.BLOCK_D >= META.D:
                    new_lse, weights, kept, inverse = next_weights(lse, u + (u_top - out_lse)[:, None])
                    extra = (extra * kept + tl.sum(weights * delta[:, None], 0)) * inverse
                    advance_all(values, weights, kept, inverse, dout, values_at, dout_at, offs_dv, META)
                    tl.store(LSE + m0 + offs_m, new_lse, mask=m_ok)
                    tl.store(EXTRA + m0 + offs_m, extra, mask=m_ok)
            if not META.OF_OMEGA:
                # read again rather than held in registers through the loops
                k32 = load_tile(k_at, offs_c, META.D).to(tl.float32)
                dk = (dk - k32 * (scale * de_sum)[:, None]) * scale
                store_tile((DK.data, n0, DK.n, offs_n, DK.d, n_in), offs_c, META.D, dk)
        tl.debug_barrier()  # the state that one thread wrote, another reads


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
