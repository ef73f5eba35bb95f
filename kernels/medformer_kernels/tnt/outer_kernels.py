"""The Triton kernels of the step from inner to outer tokens; `outer` launches them and says what they compute.

S windows of N tokens of C channels, E channels of the outer token. W (E, N C) and B (E,) come with gain and shift of
the LayerNorm folded in, so that tiles hold xhat. A tile is BLOCK_R windows; one token of them at a time is normalised
and multiplied, so that the normalised tokens do not reach memory.

    tnt_outer_fwd_kernel   BLOCK_E channels of a tile
    tnt_outer_dx_kernel    one token of every window of a tile
    tnt_outer_dw_kernel    BLOCK_E channels by one token, over one slice of the tiles: partial sums
"""

import triton
import triton.language as tl

from medformer_kernels.tnt.device import normalise, normalise_backward

_RUNTIME = ["S", "N", "tiles", "slice_length"]


@triton.jit
def _token(X, row0, rows, token, stride_s, stride_n, stride_c, offs_c, ok):
    """One token of the windows row0 + rows [R, C] in float32."""
    place = X + tl.cast(row0, tl.int64) * stride_s + tl.cast(token, tl.int64) * stride_n
    offsets = rows.to(tl.int64)[:, None] * stride_s + (offs_c * stride_c)[None, :]
    return tl.load(place + offsets, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_outer_fwd_kernel(
    X, W, B, OUTER, OUT, x_stride_s, x_stride_n, x_stride_c, outer_stride_s, outer_stride_e, S, N, tiles, eps,
    C: tl.constexpr, E: tl.constexpr, ADD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out = outer + sum_i xhat_i W_i^T + b."""
    E_BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    row0 = tl.cast(tl.program_id(0) // E_BLOCKS, tl.int64) * BLOCK_R
    e0 = (tl.program_id(0) % E_BLOCKS) * BLOCK_E
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_e = tl.arange(0, BLOCK_E)
    c_ok = offs_c < C
    e_ok = e0 + offs_e < E
    row_ok = row0 + offs_r < S
    acc = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for token in tl.range(0, N, disable_licm=True):
        x = _token(X, row0, offs_r, token, x_stride_s, x_stride_n, x_stride_c, offs_c, row_ok[:, None] & c_ok[None, :])
        xhat, _ = normalise(x, c_ok, eps, C)
        w = tl.load(
            W + tl.cast(e0, tl.int64) * N * C + offs_e[:, None] * (N * C) + (token * C + offs_c)[None, :],
            mask=e_ok[:, None] & c_ok[None, :], other=0.0,
        )  # [E, C]  # fmt: skip
        acc = tl.dot(xhat.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    acc += tl.load(B + e0 + offs_e, mask=e_ok, other=0.0)[None, :]
    ok = row_ok[:, None] & e_ok[None, :]
    if ADD:
        place = OUTER + row0 * outer_stride_s + offs_r.to(tl.int64)[:, None] * outer_stride_s
        acc += tl.load(place + ((e0 + offs_e) * outer_stride_e)[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(OUT + row0 * E + offs_r[:, None] * E + (e0 + offs_e)[None, :], acc.to(OUT.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_outer_dx_kernel(
    DOUT, X, W, DX, x_stride_s, x_stride_n, x_stride_c, S, N, tiles, eps,
    C: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx_i = LN backward of dout W_i; dout is dense."""
    row0 = tl.cast(tl.program_id(0) // N, tl.int64) * BLOCK_R
    token = tl.program_id(0) % N
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_e = tl.arange(0, BLOCK_E)
    c_ok = offs_c < C
    row_ok = row0 + offs_r < S
    dxhat = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for e0 in tl.range(0, E, BLOCK_E, disable_licm=True):
        e_ok = e0 + offs_e < E
        dout = tl.load(
            DOUT + row0 * E + offs_r[:, None] * E + (e0 + offs_e)[None, :],
            mask=row_ok[:, None] & e_ok[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            W + tl.cast(e0, tl.int64) * N * C + offs_e[:, None] * (N * C) + (token * C + offs_c)[None, :],
            mask=e_ok[:, None] & c_ok[None, :], other=0.0,
        )  # [E, C]  # fmt: skip
        dxhat = tl.dot(dout.to(w.dtype), w, dxhat, input_precision="ieee")
    ok = row_ok[:, None] & c_ok[None, :]
    x = _token(X, row0, offs_r, token, x_stride_s, x_stride_n, x_stride_c, offs_c, ok)
    xhat, rstd = normalise(x, c_ok, eps, C)
    dx = normalise_backward(dxhat, xhat, rstd, C)
    place = DX + (row0 * N + token) * C + offs_r[:, None] * (N * C) + offs_c[None, :]
    tl.store(place, dx.to(DX.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_outer_dw_kernel(
    DOUT, X, DW, DB, x_stride_s, x_stride_n, x_stride_c, S, N, tiles, slice_length, eps,
    C: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dw_i = dout^T xhat_i, db = sum dout, over a slice of the tiles."""
    E_BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    e0 = (tl.program_id(0) % E_BLOCKS) * BLOCK_E
    token = tl.program_id(0) // E_BLOCKS % N
    part = tl.program_id(0) // (E_BLOCKS * N)
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_e = tl.arange(0, BLOCK_E)
    c_ok = offs_c < C
    e_ok = e0 + offs_e < E
    dw = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_E], tl.float32)
    for tile in tl.range(part * slice_length, tl.minimum((part + 1) * slice_length, tiles), disable_licm=True):
        row0 = tl.cast(tile, tl.int64) * BLOCK_R
        row_ok = row0 + offs_r < S
        x = _token(X, row0, offs_r, token, x_stride_s, x_stride_n, x_stride_c, offs_c, row_ok[:, None] & c_ok[None, :])
        xhat, _ = normalise(x, c_ok, eps, C)
        dout = tl.load(
            DOUT + row0 * E + offs_r[:, None] * E + (e0 + offs_e)[None, :],
            mask=row_ok[:, None] & e_ok[None, :], other=0.0,
        )  # fmt: skip
        db += tl.sum(dout.to(tl.float32), 0)
        dw = tl.dot(tl.trans(dout), xhat.to(dout.dtype), dw, input_precision="ieee")
    part = tl.cast(part, tl.int64)
    place = (part * E + e0) * N * C + offs_e[:, None] * (N * C) + (token * C + offs_c)[None, :]
    tl.store(DW + place, dw, mask=e_ok[:, None] & c_ok[None, :])
    if token == 0:
        tl.store(DB + part * E + e0 + offs_e, db, mask=e_ok)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
