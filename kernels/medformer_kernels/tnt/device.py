"""Device code that the kernels of the inner block share: rows in and out of memory, LayerNorm without its affine part,
what is dropped, a head's attention, GELU.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import LOG2E

_INV_SQRT2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def hash32(u):
    """lowbias32, as in `dropping`."""
    u = u ^ (u >> 16)
    u = u * 0x7FEB352D
    u = u ^ (u >> 15)
    u = u * 0x846CA68B
    return u ^ (u >> 16)


@triton.jit
def drop(
    branch, SEED, BRANCH: tl.constexpr, sequence, position, offs_c, drop_threshold, path_threshold, drop_scale,
    path_scale, C: tl.constexpr, DROP: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    """A branch [R, C] times `dropping.factor`."""
    if DROP or PATH:
        seed = tl.load(SEED)
        high = (seed >> 32).to(tl.uint32) + BRANCH
        key = hash32((seed & 0xFFFFFFFF).to(tl.uint32) ^ hash32(high))
        keys = hash32(key + sequence.to(tl.uint32))
        if PATH:
            whole = hash32(keys ^ hash32(tl.zeros_like(keys)))
            kept = (whole >> 1).to(tl.int32) >= path_threshold
            branch *= tl.where(kept, path_scale, 0.0)[:, None]
        if DROP:
            place = (position * C + 1)[:, None] + offs_c[None, :]
            kept = (hash32(keys[:, None] ^ hash32(place.to(tl.uint32))) >> 1).to(tl.int32) >= drop_threshold
            branch *= tl.where(kept, drop_scale, 0.0)
    return branch


@triton.jit
def read(
    X, row0, sequence, position, stride_s, stride_n, stride_c, offs_row, offs_c, ok,
    C: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """A tile of rows in float32; the part of its place outside the tile in 64 bits."""
    if DENSE:
        place = X + row0 * C + (offs_row[:, None] * C + offs_c[None, :])
    else:
        rows = sequence.to(tl.int64) * stride_s + position.to(tl.int64) * stride_n
        place = X + rows[:, None] + (offs_c * stride_c)[None, :]
    return tl.load(place, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def write(X, row0, offs_row, offs_c, ok, x, C: tl.constexpr):
    tl.store(X + row0 * C + (offs_row[:, None] * C + offs_c[None, :]), x.to(X.dtype.element_ty), mask=ok)


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
def head_part(xhat, QKV_W, QKV_B, row0, offs_d, d_ok, offs_c, c_ok, C: tl.constexpr):
    """Queries, keys or values [R, D] of one head in the dtype of the products, and their weights [D, C]."""
    w = matrix(QKV_W, row0, offs_d, d_ok, offs_c, c_ok, C)
    bias = tl.load(QKV_B + row0 + offs_d, mask=d_ok, other=0.0)
    return (tl.dot(xhat, tl.trans(w), input_precision="ieee") + bias[None, :]).to(xhat.dtype), w


@triton.jit
def attention_weights(q, k, local, scale):
    """softmax(q k^T / sqrt(D)) [R, R] within each sequence, in the dtype of the products; `scale` is 1 / sqrt(D)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    s = tl.where(local[:, None] == local[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])  # a row always sees itself
    return (p / tl.sum(p, 1)[:, None]).to(q.dtype)


@triton.jit
def attention_backward(p, dp, scale):
    """Gradient of q k^T from weights p and their gradient dp."""
    mean = tl.sum(p.to(tl.float32) * dp, 1)
    return (p.to(tl.float32) * (dp - mean[:, None]) * scale).to(p.dtype)


@triton.jit
def normal_cdf(u):
    """GELU(u) is u times this."""
    return 0.5 * (1.0 + tl.math.erf(u * _INV_SQRT2))


@triton.jit
def gelu_slope(u, cdf):
    return cdf + u * _INV_SQRT_2PI * tl.exp2(u * u * (-0.5 * LOG2E))


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
