"""The Triton kernels of the forward pass of Nystrom attention, but for its inverse; `fused` launches them.

H heads, N queries, S keys, L landmarks, D and DV widths. A program owns the named block of one head:

    nystrom_pool_kernel        one landmark: the mean of its cell, read once
    nystrom_values_fwd_kernel  BLOCK_M landmarks over one slice of the keys: softmax(Q~ K^T) V; slices are merged
    nystrom_pool_values_fwd_kernel  the same and, of the same read of the keys, their means K~
    nystrom_merge_kernel       BLOCK_M landmarks: merges the slices, as flash decoding merges its splits
    nystrom_read_fwd_kernel    BLOCK_N queries, walking over the landmarks; the convolution as its epilogue

Weights live in registers only. Products run on the matrix units in the dtype of q, k, v (float32 as three tf32
products on NVIDIA), all else in float32, exponents in base 2. No atomics: equal inputs give equal bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from medformer_kernels._triton import (
    LOG2E,
    divide_rows,
    load_rows,
    moved,
    of_head,
    softmax_merge,
    softmax_step,
    store_rows,
)

# Lengths, slices and grids never specialise a kernel: the first call on a new length compiles nothing.
RUNTIME = ["N", "S", "L", "P", "GY", "GX", "LY", "LX", "GZ", "LZ", "CY", "CX", "KZ", "KY", "KX",
            "skipped", "group", "length", "cell_size", "slice_length", "slices"]  # fmt: skip
# Zeros around each row of the convolution's weights; at least the largest BLOCK_N + BLOCK_J.
CONV_PAD = 256
_CONV_PAD = tl.constexpr(CONV_PAD)


class Meta(NamedTuple):
    """What a kernel of Nystrom attention is compiled for: tiles, and flags that its docstring explains."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_D: int = 0
    BLOCK_DV: int = 0
    BLOCK_J: int = 0
    PRECISION: str = "ieee"
    HAS_MASK: bool = False
    HAS_VALID: bool = False
    HAS_MEANS: bool = False
    HAS_CONV: bool = False
    CONV_VOLUME: bool = False
    VOLUME: bool = False
    RANKED: bool = False
    KEYS: bool = False


@triton.jit
def overlap(token, cell, tokens, cells):
    """Share of a token in the mean of a cell along one axis; see `landmarks.axis_overlap`."""
    low = tl.maximum(token.to(tl.int64) * cells, cell.to(tl.int64) * tokens)
    high = tl.minimum((token + 1).to(tl.int64) * cells, (cell + 1).to(tl.int64) * tokens)
    return tl.maximum(high - low, 0).to(tl.float32) / tokens


@triton.jit
def _first_token(cell, tokens, cells):
    return (cell.to(tl.int64) * tokens // cells).to(tl.int32)


@triton.jit
def _end_token(cell, tokens, cells):
    return (((cell + 1).to(tl.int64) * tokens + cells - 1) // cells).to(tl.int32)


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_pool_kernel(X, ORDER, COUNT, MASK, OUT, TOTAL, H, N, D, P, GZ, GY, GX, LZ, LY, LX, META: tl.constexpr):
    """Mean of one cell of the grid, and the weight of its real tokens. RANKED: of a sequence, the real ones."""
    pid = tl.program_id(0)
    cells = LZ * LY * LX
    cell = pid % cells
    bh = (pid // cells).to(tl.int64)
    b, h = bh // H, bh % H
    cz = cell // (LY * LX)
    cy = cell // LX % LY
    cx = cell % LX
    tokens_x = GX
    cells_x = LX
    if META.RANKED:
        tokens_x = tl.load(COUNT + b)
        cells_x = tl.maximum(tl.minimum(cells_x, tokens_x), 1)
    z0 = _first_token(cz, GZ, LZ)
    y0 = _first_token(cy, GY, LY)
    x0 = _first_token(cx, tokens_x, cells_x)
    size_y = _end_token(cy, GY, LY) - y0
    size_x = _end_token(cx, tokens_x, cells_x) - x0
    if META.RANKED:
        size_x = tl.where(cx < cells_x, size_x, 0)
    size = (_end_token(cz, GZ, LZ) - z0) * size_y * size_x
    offs_s = tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D)
    d_ok = offs_d < D
    X = of_head(X, b, h)
    acc = tl.zeros([META.BLOCK_D], tl.float32)
    total = tl.zeros([META.BLOCK_N], tl.float32)
    row_size = tl.maximum(size_x, 1)
    plane_size = tl.maximum(size_y * size_x, 1)
    for t0 in range(0, size, META.BLOCK_N):
        t = t0 + offs_s
        ok = t < size
        z = z0 + t // plane_size
        y = y0 + t % plane_size // row_size
        x = x0 + t % row_size
        weight = overlap(z, cz, GZ, LZ) * overlap(y, cy, GY, LY) * overlap(x, cx, tokens_x, cells_x)
        if META.RANKED:
            token = tl.load(ORDER + b * N + x, mask=ok, other=0).to(tl.int64)
        else:
            token = (z.to(tl.int64) * GY + y) * GX + x
        if META.HAS_MASK:
            ok &= tl.load(MASK.data + b * MASK.b + (P + token) * MASK.n, mask=ok, other=0) != 0
        weight = tl.where(ok, weight, 0.0)
        rows = X.data + (P + token)[:, None] * X.n + offs_d[None, :] * X.d
        x_tile = tl.load(rows, mask=ok[:, None] & d_ok[None, :], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        acc += tl.sum(x_tile * weight[:, None], 0)
        total += weight
    weight_sum = tl.sum(total, 0)
    mean = acc / tl.where(weight_sum > 0.0, weight_sum, 1.0)
    row = bh * (P + cells) + P + cell
    tl.store(OUT + row * D + offs_d, mean.to(OUT.dtype.element_ty), mask=d_ok)
    tl.store(TOTAL + bh * cells + cell, weight_sum)


@triton.jit
def convolve(acc, X, WEIGHT, MASK, n0, N, DV, GY, GX, KZ, KY, KX, HAS_MASK: tl.constexpr, META: tl.constexpr):
    """acc + the cross-correlation of X with WEIGHT (KZ, KY, KX) at grid tokens n0..: one banded product a row of taps.

    X, WEIGHT and MASK point at the head (the sample) and at the first token of the grid. N tokens in the grid. Each row
    of WEIGHT has _CONV_PAD zeros on both sides, so that the band outside of the taps needs no mask.
    """
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_j = tl.arange(0, META.BLOCK_J)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    token = n0 + offs_n
    x = token % GX
    y = token // GX % GY
    z = token // (GX * GY)
    reach = KX // 2
    for row in range(0, KZ * KY):
        dz = row // KY - KZ // 2
        dy = row % KY - KY // 2
        shift = (dz * GY + dy) * GX
        row_ok = (token >= 0) & (token < N) & (y + dy >= 0) & (y + dy < GY) & (z + dz >= 0) & ((z + dz) * GY * GX < N)
        for j0 in range(-reach, META.BLOCK_N + reach, META.BLOCK_J):
            dx = (j0 + offs_j)[None, :] - offs_n[:, None]  # [BLOCK_N, BLOCK_J]
            band = tl.load(WEIGHT + row * (KX + 2 * _CONV_PAD) + _CONV_PAD + reach + dx)
            if META.CONV_VOLUME:  # along a sequence what lies outside is no source
                source_x = x[:, None] + dx
                band = tl.where((source_x >= 0) & (source_x < GX), band, 0.0)
            band = tl.where(row_ok[:, None], band, 0.0)
            source = n0 + shift + j0 + offs_j
            source_ok = (source >= 0) & (source < N)
            if HAS_MASK:
                source_ok &= tl.load(MASK.data + source.to(tl.int64) * MASK.n, mask=source_ok, other=0) != 0
            tile = load_rows(X.data, n0 + shift + j0, X.n, offs_j, offs_dv, X.d, source_ok, offs_dv < DV)
            acc = tl.dot(band.to(tile.dtype), tile, acc, input_precision=META.PRECISION)
    return acc


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_values_fwd_kernel(
    K, V, QL, MASK, VALUES, LSE, H, S, L, D, DV, slice_length, slices, scale, META: tl.constexpr
):
    """values_l = sum_n softmax_n(q~_l k_n) v_n and its lse_l over the keys of one slice."""
    m_blocks = tl.cdiv(L, META.BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % m_blocks) * META.BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_s = tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < L
    K = of_head(K, b, h)
    V = of_head(V, b, h)
    # landmarks [BLOCK_M, BLOCK_D] stay on chip for the whole slice
    landmarks = load_rows(QL + bh * L * D, m0, D, offs_m, offs_d, 1, m_ok, offs_d < D)
    exponent_scale = scale * LOG2E

    top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_M], tl.float32)
    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    start = slice_index * slice_length
    end = tl.minimum(start + slice_length, S)
    for s0 in range(start, end, META.BLOCK_N):
        s_ok = s0 + offs_s < end
        if META.HAS_MASK:
            mask_row = MASK.data + b * MASK.b
            s_ok &= tl.load(mask_row + (s0 + offs_s).to(tl.int64) * MASK.n, mask=s_ok, other=0) != 0
        k = load_rows(K.data, s0, K.n, offs_s, offs_d, K.d, s_ok, offs_d < D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(V.data, s0, V.n, offs_s, offs_dv, V.d, s_ok, offs_dv < DV)  # [BLOCK_N, BLOCK_DV]
        e = tl.dot(landmarks, tl.trans(k), input_precision=META.PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
        e += tl.where(s_ok, 0.0, float("-inf"))[None, :]
        top, total, acc = softmax_step(top, total, acc, e, v, META.PRECISION)
    out = (bh * slices + slice_index) * L
    values = divide_rows(acc, total)
    store_rows(VALUES + out * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV, values)
    tl.store(LSE + out + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=m_ok)


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_pool_values_fwd_kernel(
    K, V, QL, ORDER, COUNT, MASK, TOTAL, VALUES, LSE, KL, H, N, L, D, DV, P, GZ, GY, GX, LZ, LY, LX, group, length,
    cell_size, slice_length, slices, scale, META: tl.constexpr,
):  # fmt: skip
    """As `nystrom_values_fwd_kernel`, and of the same read the means of the keys, KL.

    The sum over keys has no order, so a program walks them cell by cell: a slice is a run of whole cells, and each mean
    is the work of one program. A tile holds `length` tokens of each of `group` cells. A token on a boundary (a sequence
    alone has those: the axes of a VOLUME divide here) is met in both its cells and attended in the first. With P prefix
    tokens one more slice attends those. N tokens in the grid; RANKED: of a sequence, the real ones, in ORDER.
    """
    m_blocks = tl.cdiv(L, META.BLOCK_M)
    pid = tl.program_id(0)
    m0 = (pid % m_blocks) * META.BLOCK_M
    slice_index = (pid // m_blocks) % slices
    bh = (pid // (m_blocks * slices)).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_s = tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < L
    d_ok = offs_d < D
    front = tl.cast(P, tl.int64)
    K = moved(K, b * K.b + h * K.h + front * K.n)
    V = moved(V, b * V.b + h * V.h + front * V.n)
    MASK = moved(MASK, b * MASK.b + front * MASK.n)
    # landmarks [BLOCK_M, BLOCK_D] stay on chip for the whole slice
    landmarks = load_rows(QL + bh * L * D, m0, D, offs_m, offs_d, 1, m_ok, d_ok)
    exponent_scale = scale * LOG2E

    tokens_x = GX
    cells_x = LX
    if META.RANKED:
        tokens_x = tl.load(COUNT + b)
        cells_x = tl.maximum(tl.minimum(cells_x, tokens_x), 1)
    cells = LZ * LY * LX
    size_z = GZ // LZ
    size_y = GY // LY
    size_x = GX // LX
    cell_share = (LZ * LY * cells_x).to(tl.float32) / (GZ * GY * tl.maximum(tokens_x, 1))  # of a token, as TOTAL counts
    in_grid = slice_index * slice_length < cells  # or the slice of the prefix
    first = tl.where(in_grid, slice_index * slice_length, 0)
    last = tl.where(in_grid, tl.minimum(first + slice_length, cells), 1)
    group = tl.where(in_grid, group, 1)
    length = tl.where(in_grid, length, META.BLOCK_N)
    cell_size = tl.where(in_grid, cell_size, P)
    member = offs_s // length
    lane = offs_s % length

    top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_M], tl.float32)
    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    for cell0 in range(first, last, group):
        cell = cell0 + member
        cell_ok = (member < group) & (cell < last)
        if META.RANKED:
            cell_ok &= cell < cells_x
        if META.VOLUME:
            z0 = cell // (LY * LX) * size_z
            y0 = cell // LX % LY * size_y
            x0 = cell % LX * size_x
            size = tl.where(cell_ok, cell_size, 0)
        else:
            # What of its first and last token belongs to the cell; all of what lies between.
            low = cell.to(tl.int64) * tokens_x
            x0 = _first_token(cell, tokens_x, cells_x)
            end = _end_token(cell, tokens_x, cells_x)
            share_first = ((x0.to(tl.int64) + 1) * cells_x - low).to(tl.float32) / cells_x
            share_last = (low + tokens_x - (end.to(tl.int64) - 1) * cells_x).to(tl.float32) / cells_x
            size = tl.where(in_grid, tl.where(cell_ok, end - x0, 0), P)
            x0 = tl.where(in_grid, x0, -P)
            skip = tl.where(in_grid & (share_first < 1.0), 1, 0)
        pooled = tl.zeros([META.BLOCK_N, META.BLOCK_D], tl.float32)
        for t0 in range(0, cell_size, length):
            t = t0 + lane
            ok = t < size
            if META.VOLUME:
                z = z0 + t // (size_y * size_x)
                y = y0 + t // size_x % size_y
                token = (z * GY + y) * GX + x0 + t % size_x
                token = tl.where(in_grid, token, t - P)
                attended = ok
            else:
                token = x0 + t
                attended = ok & (t >= skip)
            if META.RANKED:
                ranked = tl.load(ORDER + b * N + token, mask=ok & (token >= 0), other=0)
                token = tl.where(in_grid, ranked, token)
            if META.HAS_MASK:
                real = tl.load(MASK.data + token.to(tl.int64) * MASK.n, mask=ok, other=0) != 0
                ok &= real
                attended &= real
            k = load_rows(K.data, 0, K.n, token.to(tl.int64), offs_d, K.d, ok, d_ok)  # [BLOCK_N, BLOCK_D]
            v = load_rows(V.data, 0, V.n, token.to(tl.int64), offs_dv, V.d, ok, offs_dv < DV)
            if META.VOLUME:
                pooled += k.to(tl.float32)
            else:
                share = tl.where(t == 0, share_first, tl.where(t == size - 1, share_last, 1.0))
                pooled += k.to(tl.float32) * share[:, None]
            e = tl.dot(landmarks, tl.trans(k), input_precision=META.PRECISION) * exponent_scale  # [BLOCK_M, BLOCK_N]
            # A maximum of equal numbers: without it the compiler computes all indices again in e's layout, and spills.
            bias = tl.max(tl.where(attended[:, None] & d_ok[None, :], 0.0, float("-inf")), 1)
            top, total, acc = softmax_step(top, total, acc, e + bias[None, :], v, META.PRECISION)
        for index in range(0, tl.minimum(group, last - cell0)):
            mean = tl.sum(tl.where((member == index)[:, None], pooled, 0.0), 0)
            weight = tl.load(TOTAL + bh * cells + cell0 + index)
            mean = mean * cell_share / tl.where(weight > 0.0, weight, 1.0)
            row = (bh * L + P + cell0 + index) * D
            stored = offs_d < tl.where(in_grid & (m0 == 0), D, 0)
            tl.store(KL + row + offs_d, mean.to(KL.dtype.element_ty), mask=stored)
    out = (bh * slices + slice_index) * L
    values = divide_rows(acc, total)
    store_rows(VALUES + out * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV, values)
    tl.store(LSE + out + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=m_ok)


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_merge_kernel(PART_VALUES, PART_LSE, VALUES, LSE, L, DV, slices, META: tl.constexpr):
    """lse = log sum_s exp(lse_s); values = sum_s exp(lse_s - lse) values_s: the slices of one head, in their order."""
    m_blocks = tl.cdiv(L, META.BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // m_blocks).to(tl.int64)
    m0 = (pid % m_blocks) * META.BLOCK_M
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    m_ok = m0 + offs_m < L
    top = tl.full([META.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_M], tl.float32)
    acc = tl.zeros([META.BLOCK_M, META.BLOCK_DV], tl.float32)
    for s in range(0, slices):
        part = (bh * slices + s) * L
        lse = tl.load(PART_LSE + part + m0 + offs_m, mask=m_ok, other=float("-inf")) * LOG2E
        values = load_rows(PART_VALUES + part * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV)
        top, total, acc = softmax_merge(top, total, acc, lse, 1.0, values)
    store_rows(VALUES + bh * L * DV, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV, divide_rows(acc, total))
    tl.store(LSE + bh * L + m0 + offs_m, (top + tl.log2(total)) / LOG2E, mask=m_ok)


@triton.jit(do_not_specialize=RUNTIME)
def nystrom_read_fwd_kernel(
    Q, KL, VALID, VALUES, UNIT, MASK, V, WEIGHT, OUT, OUT_LSE, H, N, L, D, DV, GY, GX, KZ, KY, KX, scale,
    META: tl.constexpr,
):  # fmt: skip
    """out_i = UNIT sum_l softmax_l(q_i k~_l) values_l + convolution of V, and the log of the softmax's denominator."""
    n_blocks = tl.cdiv(N, META.BLOCK_N)
    pid = tl.program_id(0)
    n0 = (pid % n_blocks) * META.BLOCK_N
    bh = (pid // n_blocks).to(tl.int64)
    b, h = bh // H, bh % H
    offs_n = tl.arange(0, META.BLOCK_N)
    offs_m = tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_dv = tl.arange(0, META.BLOCK_DV)
    n_ok = n0 + offs_n < N
    q_ok = n_ok
    if META.HAS_MASK:
        MASK = moved(MASK, b * MASK.b)
        q_ok &= tl.load(MASK.data + (n0 + offs_n).to(tl.int64) * MASK.n, mask=n_ok, other=0) != 0
    q = load_rows(Q.data + b * Q.b + h * Q.h, n0, Q.n, offs_n, offs_d, Q.d, q_ok, offs_d < D)
    exponent_scale = scale * LOG2E
    KL += bh * L * D
    VALUES += bh * L * DV

    top = tl.full([META.BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([META.BLOCK_N], tl.float32)
    acc = tl.zeros([META.BLOCK_N, META.BLOCK_DV], tl.float32)
    for m0 in range(0, L, META.BLOCK_M):
        m_ok = m0 + offs_m < L
        if META.HAS_VALID:
            m_ok &= tl.load(VALID + b * L + m0 + offs_m, mask=m_ok, other=0) != 0
        landmarks = load_rows(KL, m0, D, offs_m, offs_d, 1, m_ok, offs_d < D)
        values = load_rows(VALUES, m0, DV, offs_m, offs_dv, 1, m_ok, offs_dv < DV)
        e = tl.dot(q, tl.trans(landmarks), input_precision=META.PRECISION) * exponent_scale  # [BLOCK_N, BLOCK_M]
        e += tl.where(m_ok, 0.0, float("-inf"))[None, :]
        top, total, acc = softmax_step(top, total, acc, e, values, META.PRECISION)
    acc = acc * (tl.load(UNIT + bh) / tl.where(total == 0.0, 1.0, total))[:, None]
    if META.HAS_CONV:
        V = of_head(V, b, h)
        WEIGHT += h * (KZ * KY * (KX + 2 * _CONV_PAD))
        acc = convolve(acc, V, WEIGHT, MASK, n0, N, DV, GY, GX, KZ, KY, KX, META.HAS_MASK, META)
    OUT = of_head(OUT, b, h)
    store_rows(OUT.data, n0, OUT.n, offs_n, offs_dv, 1, n_ok, offs_dv < DV, acc)
    tl.store(OUT_LSE + bh * N + n0 + offs_n, (top + tl.log2(total)) / LOG2E, mask=n_ok)


# Inside a kernel Triton's language, not Python's, gives operators, calls and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
