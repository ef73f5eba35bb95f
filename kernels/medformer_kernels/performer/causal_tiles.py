"""Device code of the causal FAVOR+ kernels: features of a chunk, its pairs, and the state that passes it.

Tiles are of BLOCK_N tokens and BLOCK_M features; u are the exponents of queries, e of keys, in base 2. Rows `at` are
those of `columns`: operands hold the first columns of a head, all of a narrow one.
"""

import triton
import triton.language as tl

from medformer_kernels.performer.columns import load_tile, product, row_products, store_tile

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
def key_shift(k, k_at, half_scale, offs_d, D: tl.constexpr):
    """-|k'|^2 / 2 by key; -inf for a masked one."""
    return tl.where(k_at[5], row_products(k, k, k_at, k_at, offs_d, D) * -half_scale, float("-inf"))


@triton.jit
def key_ok(MASK, ok, n0, offs_n, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        ok &= tl.load(MASK.data + (n0 + offs_n).to(tl.int64) * MASK.n, mask=ok, other=0) != 0
    return ok


@triton.jit
def exponents(x, omega, x_at, omega_at, exponent_scale, shift, offs_d, META: tl.constexpr):
    """omega_m x'_n + shift_n [BLOCK_N, BLOCK_M]; -inf for a feature beyond the last."""
    u = product(x, omega, x_at, omega_at, offs_d, META.D, META.PRECISION) * exponent_scale
    return tl.where(omega_at[5][None, :], u + shift[:, None], float("-inf"))


@triton.jit
def next_weights(lse, e):
    """(lse, p, kept, inverse) of a state after a chunk of exponents e [BLOCK_N, BLOCK_M]: in its means the tokens of
    the chunk now have the shares p inverse, the state before has kept inverse."""
    top = tl.maximum(lse, tl.max(e, 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    kept = tl.exp2(lse - base)
    p = tl.exp2(e - base[None, :])
    total = kept + tl.sum(p, 0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return base + tl.log2(total), p, kept, inverse


@triton.jit
def advance(values, p, kept, inverse, x, PRECISION: tl.constexpr):
    """One block of columns of the means of a state after a chunk with values x."""
    return tl.dot(tl.trans(p.to(x.dtype)), x, values * kept[:, None], input_precision=PRECISION) * inverse[:, None]


@triton.jit
def advance_all(values, p, kept, inverse, x, values_at, x_at, offs_dv, META: tl.constexpr):
    """All columns of the means of a state, in memory; values and x hold the first."""
    store_tile(values_at, offs_dv, META.DV, advance(values, p, kept, inverse, x, META.PRECISION))
    for d0 in tl.static_range(META.BLOCK_DV, META.DV, META.BLOCK_DV):
        values = load_tile(values_at, d0 + offs_dv, META.DV)
        x = load_tile(x_at, d0 + offs_dv, META.DV)
        store_tile(values_at, d0 + offs_dv, META.DV, advance(values, p, kept, inverse, x, META.PRECISION))


@triton.jit
def _exact_pairs(u, e, offs_n):
    """log2 sum_m exp2(u_im + e_jm) [BLOCK_N, BLOCK_N], whatever the exponents span."""
    pairs = tl.full([u.shape[0], u.shape[0]], float("-inf"), tl.float32)
    for j in range(0, u.shape[0]):
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
def exact_du(u, e, gains, offs_n):
    """sum_{j <= i} exp2(u_im + e_jm) gains_ij [BLOCK_N, BLOCK_M]."""
    du = tl.zeros(u.shape, tl.float32)
    for j in range(0, u.shape[0]):
        key = offs_n == j
        x = u + tl.max(tl.where(key[:, None], e, float("-inf")), 0)[None, :]
        weights = tl.exp2(tl.where((offs_n >= j)[:, None], x, float("-inf")))
        du += weights * tl.sum(tl.where(key[None, :], gains, 0.0), 1)[:, None]
    return du


@triton.jit
def exact_de(u, e, gains, offs_n):
    """sum_{i >= j} exp2(u_im + e_jm) gains_ij [BLOCK_N, BLOCK_M]."""
    de = tl.zeros(u.shape, tl.float32)
    for j in range(0, u.shape[0]):
        key = offs_n == j
        x = u + tl.max(tl.where(key[:, None], e, float("-inf")), 0)[None, :]
        weights = tl.exp2(tl.where((offs_n >= j)[:, None], x, float("-inf")))
        gain = tl.sum(tl.where(key[None, :], gains, 0.0), 1)
        de = tl.where(key[:, None], tl.sum(weights * gain[:, None], 0)[None, :], de)
    return de


@triton.jit
def exact_logs(
    q, k, q_at, k_at, OMEGA, M, exponent_scale, q_shift, k_shift, offs_n, offs_m, offs_d, META: tl.constexpr
):
    """log2 of every pair's weight [BLOCK_N, BLOCK_N], whatever its exponents span; later keys too."""
    logs = tl.full([META.BLOCK_N, META.BLOCK_N], float("-inf"), tl.float32)
    for m0 in tl.range(0, M, META.BLOCK_M, disable_licm=True):
        omega_at = (OMEGA.data, m0, OMEGA.n, offs_m, 1, m0 + offs_m < M)
        omega = load_tile(omega_at, offs_d, META.D)
        u = exponents(q, omega, q_at, omega_at, exponent_scale, q_shift, offs_d, META)
        e = exponents(k, omega, k_at, omega_at, exponent_scale, k_shift, offs_d, META)
        logs = _add_logs(logs, _exact_pairs(u, e, offs_n))
    return logs


@triton.jit
def tops(TOPS, token, n_in, n_ok):
    """(largest exponent of each query, of each key, whether a query spans more than SPAN bits), from the forward."""
    U_TOP, U_LOW, E_TOP = TOPS
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
def add_to_omega(domega_at, dx, x, offs_d, META: tl.constexpr):
    """Columns offs_d of DOMEGA_m += sum_n dx_nm x_n: the partial sum of this slice, in memory of its own."""
    domega = load_tile(domega_at, offs_d, META.D)
    domega = tl.dot(tl.trans(ranged(dx, x)), ranged(x, x), domega, input_precision=META.RANGED_PRECISION)
    store_tile(domega_at, offs_d, META.D, domega)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
