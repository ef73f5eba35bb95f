"""Device code of the causal FAVOR+ kernels: features of a chunk, its pairs, and the state that passes it.

Tiles are of BLOCK_N tokens and BLOCK_M features; u are the exponents of queries, e of keys, in base 2.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import load_rows, store_rows

# Bits that the exponents of a query may span, so that no product of two features leaves the range of float32.
SPAN = tl.constexpr(100.0)


@triton.jit
def ranged(x, like):
    """x for a matrix product, in a dtype with float32's range: features of float16 heads stay float32."""
    if like.dtype == tl.bfloat16:
        return x.to(tl.bfloat16)
    else:
        return x.to(tl.float32)


@triton.jit
def key_shift(k, ok, half_scale):
    """-|k'|^2 / 2 by key; -inf for a masked one."""
    k32 = k.to(tl.float32)
    return tl.where(ok, tl.sum(k32 * k32, 1) * -half_scale, float("-inf"))


@triton.jit
def key_ok(MASK, mask_stride_n, ok, n0, offs_n, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        ok &= tl.load(MASK + (n0 + offs_n).to(tl.int64) * mask_stride_n, mask=ok, other=0) != 0
    return ok


@triton.jit
def exponents(x, omega, exponent_scale, shift, m_ok, PRECISION: tl.constexpr):
    """omega_m x'_n + shift_n [BLOCK_N, BLOCK_M]; -inf for a feature beyond the last."""
    u = tl.dot(x, tl.trans(omega), input_precision=PRECISION) * exponent_scale
    return tl.where(m_ok[None, :], u + shift[:, None], float("-inf"))


@triton.jit
def advance(values, lse, e, x, PRECISION: tl.constexpr):
    """(values, lse) after a chunk of exponents e [BLOCK_N, BLOCK_M] with values x; the shares of the chunk's tokens in
    these means, and of the state before."""
    top = tl.maximum(lse, tl.max(e, 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    kept = tl.exp2(lse - base)
    p = tl.exp2(e - base[None, :])
    total = kept + tl.sum(p, 0)
    acc = tl.dot(tl.trans(p.to(x.dtype)), x, values * kept[:, None], input_precision=PRECISION)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return acc * inverse[:, None], base + tl.log2(total), p * inverse[None, :], kept * inverse


@triton.jit
def _exact_pairs(u, e, offs_n, BLOCK_N: tl.constexpr):
    """log2 sum_m exp2(u_im + e_jm) [BLOCK_N, BLOCK_N], whatever the exponents span."""
    pairs = tl.full([BLOCK_N, BLOCK_N], float("-inf"), tl.float32)
    for j in range(0, BLOCK_N):
        key = offs_n == j
        x = u + tl.max(tl.where(key[:, None], e, float("-inf")), 0)[None, :]
        top = tl.max(x, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        row = base + tl.log2(tl.sum(tl.exp2(x - base[:, None]), 1))
        pairs = tl.where(key[None, :], row[:, None], pairs)
    return pairs


@triton.jit
def _add_logs(x, y):
    top = tl.maximum(x, y)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log2(tl.exp2(x - base) + tl.exp2(y - base))


@triton.jit
def exact_du(u, e, gains, offs_n, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """sum_{j <= i} exp2(u_im + e_jm) gains_ij [BLOCK_N, BLOCK_M]."""
    du = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for j in range(0, BLOCK_N):
        key = offs_n == j
        x = u + tl.max(tl.where(key[:, None], e, float("-inf")), 0)[None, :]
        weights = tl.exp2(tl.where((offs_n >= j)[:, None], x, float("-inf")))
        du += weights * tl.sum(tl.where(key[None, :], gains, 0.0), 1)[:, None]
    return du


@triton.jit
def exact_de(u, e, gains, offs_n, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """sum_{i >= j} exp2(u_im + e_jm) gains_ij [BLOCK_N, BLOCK_M]."""
    de = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for j in range(0, BLOCK_N):
        key = offs_n == j
        x = u + tl.max(tl.where(key[:, None], e, float("-inf")), 0)[None, :]
        weights = tl.exp2(tl.where((offs_n >= j)[:, None], x, float("-inf")))
        gain = tl.sum(tl.where(key[None, :], gains, 0.0), 1)
        de = tl.where(key[:, None], tl.sum(weights * gain[:, None], 0)[None, :], de)
    return de


@triton.jit
def exact_logs(
    q, k, OMEGA, omega_stride_m, M, exponent_scale, q_shift, k_shift, offs_n, offs_m, offs_d, d_ok,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of every pair's weight [BLOCK_N, BLOCK_N], whatever its exponents span; later keys too."""
    logs = tl.full([BLOCK_N, BLOCK_N], float("-inf"), tl.float32)
    for m0 in tl.range(0, M, BLOCK_M, disable_licm=True):
        m_ok = m0 + offs_m < M
        omega = load_rows(OMEGA, m0, omega_stride_m, offs_m, offs_d, 1, m_ok, d_ok)
        u = exponents(q, omega, exponent_scale, q_shift, m_ok, PRECISION)
        e = exponents(k, omega, exponent_scale, k_shift, m_ok, PRECISION)
        logs = _add_logs(logs, _exact_pairs(u, e, offs_n, BLOCK_N))
    return logs


@triton.jit
def tops(U_TOP, U_LOW, E_TOP, token, n_in, n_ok):
    """(largest exponent of each query, of each key, whether a query spans more than SPAN bits), from the forward."""
    u_top = tl.load(U_TOP + token, mask=n_in, other=0.0)
    span = u_top - tl.load(U_LOW + token, mask=n_in, other=0.0)
    e_top = tl.load(E_TOP + token, mask=n_ok, other=0.0)  # of a masked key -inf, which nothing may be relative to
    return u_top, e_top, tl.max(span, 0) > SPAN


@triton.jit
def scale_of_pairs(u_top, e_top, out_lse, wide):
    """What phi_q phi_k^T of a chunk lacks to be P_ij; 0 where the exact sums stand in its place."""
    log_scale = (u_top - out_lse)[:, None] + e_top[None, :]
    return tl.exp2(tl.where(wide, float("-inf"), tl.minimum(log_scale, SPAN)))  # above only for j > i


@triton.jit
def add_to_omega(DOMEGA, m0, D, offs_m, offs_d, m_ok, d_ok, dx, x, PRECISION: tl.constexpr):
    """DOMEGA_m += sum_n dx_nm x_n: the partial sum of this slice, in memory of its own."""
    domega = load_rows(DOMEGA, m0, D, offs_m, offs_d, 1, m_ok, d_ok)
    domega = tl.dot(tl.trans(ranged(dx, x)), ranged(x, x), domega, input_precision=PRECISION)
    store_rows(DOMEGA, m0, D, offs_m, offs_d, 1, m_ok, d_ok, domega)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
