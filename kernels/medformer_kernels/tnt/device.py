"""Device code that the kernels of the inner block share: rows in and out of memory, LayerNorm without its affine part,
what is dropped, a head's attention, GELU.

A tile `at` is (its first row of all, the sequence and position of each row, rows and channels of the tile, mask).
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E, fold, fold_seed, kept

_INV_SQRT2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def drop(branch, SEED, BRANCH: tl.constexpr, at, dropping, META: tl.constexpr):
    """A branch [R, C] times `dropping.factor`; `dropping` holds both thresholds and both scales."""
    _row0, sequence, position, _offs_row, offs_c, _ok = at
    drop_below, path_below, drop_scales = dropping
    if META.DROP or META.PATH:
        numbers = fold(fold(fold_seed(SEED), tl.full([], BRANCH, tl.uint32)), sequence)
        if META.PATH:
            whole = fold(numbers, tl.full([], 0, tl.uint32))
            branch *= tl.where(kept(whole, path_below), drop_scales[1], 0.0)[:, None]
        if META.DROP:
            place = (position * META.C + 1)[:, None] + offs_c[None, :]
            branch *= tl.where(kept(fold(numbers[:, None], place), drop_below), drop_scales[0], 0.0)
    return branch


@triton.jit
def read(X, at, C: tl.constexpr, DENSE: tl.constexpr):
    """A tile of rows in float32; the part of its place outside the tile in 64 bits."""
    if DENSE:
        x = read_dense(X.data, at, C)
    else:
        _row0, sequence, position, _offs_row, offs_c, ok = at
        rows = sequence.to(tl.int64) * X.b + position.to(tl.int64) * X.n
        x = tl.load(X.data + rows[:, None] + (offs_c * X.d)[None, :], mask=ok, other=0.0).to(tl.float32)
    return x


@triton.jit
def _dense(X, at, C: tl.constexpr):
    row0, _sequence, _position, offs_row, offs_c, _ok = at
    return X + row0 * C + (offs_row[:, None] * C + offs_c[None, :])


@triton.jit
def read_dense(X, at, C: tl.constexpr):
    return tl.load(_dense(X, at, C), mask=at[5], other=0.0).to(tl.float32)


@triton.jit
def write(X, at, x, C: tl.constexpr):
    tl.store(_dense(X, at, C), x.to(X.dtype.element_ty), mask=at[5])


@triton.jit
def normalise(x, c_ok, eps, C: tl.constexpr):
    """(xhat, 1 / deviation) of rows x [R, C] in float32; 0 beyond C."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(c_ok[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normalise_backward(dxhat, xhat, rstd, C: tl.constexpr):
    mean = tl.sum(dxhat, 1) / C
    slope = tl.sum(dxhat * xhat, 1) / C
    return (dxhat - mean[:, None] - xhat * slope[:, None]) * rstd[:, None]


@triton.jit
def matrix(W, row0, offs_row, row_ok, offs_col, col_ok, COLUMNS: tl.constexpr):
    """Tile of a weight, rows row0 + offs_row of COLUMNS each."""
    mask = row_ok[:, None] & col_ok[None, :]
    return tl.load(W + row0 * COLUMNS + offs_row[:, None] * COLUMNS + offs_col[None, :], mask=mask, other=0.0)


@triton.jit
def _head_part(xhat, QKV_W, QKV_B, row0, offs_d, d_ok, offs_c, c_ok, C: tl.constexpr):
    """Queries, keys or values [R, D] of one head in the dtype of the products, and their weights [D, C]."""
    w = matrix(QKV_W, row0, offs_d, d_ok, offs_c, c_ok, C)
    bias = tl.load(QKV_B + row0 + offs_d, mask=d_ok, other=0.0)
    return (tl.dot(xhat, tl.trans(w), input_precision="ieee") + bias[None, :]).to(xhat.dtype), w


@triton.jit
def _attention_weights(q, k, local, scale):
    """softmax(q k^T / sqrt(D)) [R, R] within each sequence, in the dtype of the products; `scale` is 1 / sqrt(D)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    s = tl.where(local[:, None] == local[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])  # a row always sees itself
    return (p / tl.sum(p, 1)[:, None]).to(q.dtype)


@triton.jit
def head(xhat, QKV_W, QKV_B, h, local, scale, offs_d, offs_c, META: tl.constexpr):
    """(q, k, weights, v, then the weights of q, k and v) of head h."""
    D: tl.constexpr = META.C // META.H
    d_ok = offs_d < D
    c_ok = offs_c < META.C
    q, wq = _head_part(xhat, QKV_W, QKV_B, h * D, offs_d, d_ok, offs_c, c_ok, META.C)  # [R, D], [D, C]
    k, wk = _head_part(xhat, QKV_W, QKV_B, META.C + h * D, offs_d, d_ok, offs_c, c_ok, META.C)
    p = _attention_weights(q, k, local, scale)  # [R, R]
    v, wv = _head_part(xhat, QKV_W, QKV_B, 2 * META.C + h * D, offs_d, d_ok, offs_c, c_ok, META.C)
    return q, k, p, v, wq, wk, wv


@triton.jit
def attention_backward(p, dp, scale):
    """Gradient of q k^T from weights p and their gradient dp."""
    mean = tl.sum(p.to(tl.float32) * dp, 1)
    return (p.to(tl.float32) * (dp - mean[:, None]) * scale).to(p.dtype)


@triton.jit
def normal_cdf(u, DTYPE: tl.constexpr):
    """GELU(u) is u times this; exact where products are float32.

    For 16 bits an odd polynomial (ours, by reweighted least squares), within 1.42e-5 of the probability; beyond
    4.1875 it is 0 or 1. GELU is within 6e-5, where rounding a number of size 1 to bfloat16 costs up to 4e-3. 12
    instructions a number where erf takes 29, which were three quarters of the MLP's.
    """
    if DTYPE.is_fp32():
        cdf = 0.5 * (1.0 + tl.math.erf(u * _INV_SQRT2))
    else:
        u = tl.clamp(u, -4.1875, 4.1875)
        w = u * u
        q = 6.04225281e-11 * w - 4.59408156e-09
        q = q * w + 1.54043548e-07
        q = q * w - 3.05707863e-06
        q = q * w + 4.08861270e-05
        q = q * w - 3.96464602e-04
        q = q * w + 2.87514459e-03
        q = q * w - 1.59395412e-02
        q = q * (w - 17.53515625) + 0.119402985  # exactly 0 or 1 at the ends
        cdf = u * q + 0.5
    return cdf


@triton.jit
def gelu_slope(u, cdf):
    return cdf + u * _INV_SQRT_2PI * tl.exp2(u * u * (-0.5 * LOG2E))


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false
