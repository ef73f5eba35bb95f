"""The Triton kernels of the step from inner to outer tokens; `outer` launches them and says what they compute.

S windows of N tokens of C channels, E channels of the outer token. W (E, N C) and B (E,) come with gain and shift of
the LayerNorm folded in, so that tiles hold xhat. A tile is BLOCK_R windows; one token of them at a time is normalised
and multiplied, so that the normalised tokens do not reach memory.

    tnt_outer_fwd_kernel   BLOCK_E channels of a tile
    tnt_outer_dx_kernel    one token of every window of a tile
    tnt_outer_dw_kernel    BLOCK_E channels by one token, over one slice of the tiles: partial sums
"""

from typing import NamedTuple

import triton
import triton.language as tl

from medformer_kernels._triton import Rows, constexprs  # noqa: F401  for outer.py, which imports no Triton by itself
from medformer_kernels.tnt.device import normalise, normalise_backward

_RUNTIME = ["S", "N", "tiles", "slice_length"]


class Meta(NamedTuple):
    """What a kernel is compiled for: widths and tiles."""

    C: int
    E: int
    BLOCK_R: int
    BLOCK_C: int
    BLOCK_E: int
    ADD: bool = False


@triton.jit
def _token(X, row0, rows, token, offs_c, ok):
    """One token of the windows row0 + rows [R, C] in float32."""
    place = X.data + tl.cast(row0, tl.int64) * X.b + tl.cast(token, tl.int64) * X.n
    offsets = rows.to(tl.int64)[:, None] * X.b + (offs_c * X.d)[None, :]
    return tl.load(place + offsets, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _weight(W, e0, offs_e, token, offs_c, ok, N, C: tl.constexpr):
    """Channels e0 + offs_e of the outer token by those of one inner token [E, C]."""
    place = W + tl.cast(e0, tl.int64) * N * C + offs_e[:, None] * (N * C) + (token * C + offs_c)[None, :]
    return tl.load(place, mask=ok, other=0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_outer_fwd_kernel(X, W, B, OUTER, OUT, S, N, eps, META: tl.constexpr):
    """out = outer + sum_i xhat_i W_i^T + b."""
    E_BLOCKS: tl.constexpr = (META.E + META.BLOCK_E - 1) // META.BLOCK_E
    row0 = tl.cast(tl.program_id(0) // E_BLOCKS, tl.int64) * META.BLOCK_R
    e0 = (tl.program_id(0) % E_BLOCKS) * META.BLOCK_E
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    offs_e = tl.arange(0, META.BLOCK_E)
    c_ok = offs_c < META.C
    e_ok = e0 + offs_e < META.E
    row_ok = row0 + offs_r < S
    acc = tl.zeros([META.BLOCK_R, META.BLOCK_E], tl.float32)
    for token in tl.range(0, N, disable_licm=True):
        x = _token(X, row0, offs_r, token, offs_c, row_ok[:, None] & c_ok[None, :])
        xhat, _ = normalise(x, c_ok, eps, META.C)
        w = _weight(W, e0, offs_e, token, offs_c, e_ok[:, None] & c_ok[None, :], N, META.C)
        acc = tl.dot(xhat.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    acc += tl.load(B + e0 + offs_e, mask=e_ok, other=0.0)[None, :]
    ok = row_ok[:, None] & e_ok[None, :]
    if META.ADD:
        place = OUTER.data + row0 * OUTER.b + offs_r.to(tl.int64)[:, None] * OUTER.b
        acc += tl.load(place + ((e0 + offs_e) * OUTER.d)[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(
        OUT + row0 * META.E + offs_r[:, None] * META.E + (e0 + offs_e)[None, :], acc.to(OUT.dtype.element_ty), mask=ok
    )


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_outer_dx_kernel(DOUT, X, W, DX, S, N, eps, META: tl.constexpr):
    """dx_i = LN backward of dout W_i; dout is dense."""
    row0 = tl.cast(tl.program_id(0) // N, tl.int64) * META.BLOCK_R
    token = tl.program_id(0) % N
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    offs_e = tl.arange(0, META.BLOCK_E)
    c_ok = offs_c < META.C
    row_ok = row0 + offs_r < S
    dxhat = tl.zeros([META.BLOCK_R, META.BLOCK_C], tl.float32)
    for e0 in tl.range(0, META.E, META.BLOCK_E, disable_licm=True):
        e_ok = e0 + offs_e < META.E
        place = DOUT + row0 * META.E + offs_r[:, None] * META.E + (e0 + offs_e)[None, :]
        dout = tl.load(place, mask=row_ok[:, None] & e_ok[None, :], other=0.0)
        w = _weight(W, e0, offs_e, token, offs_c, e_ok[:, None] & c_ok[None, :], N, META.C)
        dxhat = tl.dot(dout.to(w.dtype), w, dxhat, input_precision="ieee")
    ok = row_ok[:, None] & c_ok[None, :]
    x = _token(X, row0, offs_r, token, offs_c, ok)
    xhat, rstd = normalise(x, c_ok, eps, META.C)
    dx = normalise_backward(dxhat, xhat, rstd, META.C)
    place = DX + (row0 * N + token) * META.C + offs_r[:, None] * (N * META.C) + offs_c[None, :]
    tl.store(place, dx.to(DX.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_outer_dw_kernel(DOUT, X, DW, DB, S, N, tiles, slice_length, eps, META: tl.constexpr):
    """dw_i = dout^T xhat_i, db = sum dout, over a slice of the tiles."""
    E_BLOCKS: tl.constexpr = (META.E + META.BLOCK_E - 1) // META.BLOCK_E
    e0 = (tl.program_id(0) % E_BLOCKS) * META.BLOCK_E
    token = tl.program_id(0) // E_BLOCKS % N
    part = tl.program_id(0) // (E_BLOCKS * N)
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    offs_e = tl.arange(0, META.BLOCK_E)
    c_ok = offs_c < META.C
    e_ok = e0 + offs_e < META.E
    dw = tl.zeros([META.BLOCK_E, META.BLOCK_C], tl.float32)
    db = tl.zeros([META.BLOCK_E], tl.float32)
    for tile in tl.range(part * slice_length, tl.minimum((part + 1) * slice_length, tiles), disable_licm=True):
        row0 = tl.cast(tile, tl.int64) * META.BLOCK_R
        row_ok = row0 + offs_r < S
        x = _token(X, row0, offs_r, token, offs_c, row_ok[:, None] & c_ok[None, :])
        xhat, _ = normalise(x, c_ok, eps, META.C)
        place = DOUT + row0 * META.E + offs_r[:, None] * META.E + (e0 + offs_e)[None, :]
        dout = tl.load(place, mask=row_ok[:, None] & e_ok[None, :], other=0.0)
        db += tl.sum(dout.to(tl.float32), 0)
        dw = tl.dot(tl.trans(dout), xhat.to(dout.dtype), dw, input_precision="ieee")
    part = tl.cast(part, tl.int64)
    place = (part * META.E + e0) * N * META.C + offs_e[:, None] * (N * META.C) + (token * META.C + offs_c)[None, :]
    tl.store(DW + place, dw, mask=e_ok[:, None] & c_ok[None, :])
    if token == 0:
        tl.store(DB + part * META.E + e0 + offs_e, db, mask=e_ok)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
