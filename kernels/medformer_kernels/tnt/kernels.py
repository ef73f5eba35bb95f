"""The Triton kernels of the inner block; `fused` launches them, `ops` says what they compute.

S sequences of N tokens, C channels, H heads of D = C / H, F channels inside the MLP. A tile is BLOCK_R rows that hold
`per_tile` whole sequences, packed without gaps; scores between sequences are masked, so that nothing passes from one
to another. The gradients of the MLP know no sequences: their tiles are any BLOCK_R rows. Programs are persistent: each
walks over many tiles.

    tnt_fwd_kernel        a tile, from the first LayerNorm to the last residual; every head, then every part of the MLP
    tnt_mlp_dx_kernel     a tile: the gradient in the middle of the block
    tnt_mlp_dw_kernel     BLOCK_F hidden channels over one slice of the rows: gradients of fc1 and fc2, partial sums
    tnt_attn_dx_kernel    a tile: dx
    tnt_attn_dw_kernel    one head over one slice of the tiles: gradients of qkv and projection, partial sums

QKV_W, QKV_B, FC1_W and FC1_B come with gain and shift of the LayerNorm in front folded in (`fused.fold`): tiles hold
xhat, and no vector of C numbers stays in registers. A head narrower than 16 (or not a power of two) is padded in
registers, by masked loads of its weights: nothing is packed in memory, and weights come from the cache. Products run
on the matrix units in the dtype of the weights (float32 in plain registers: three tf32 products spill), all else in
float32, exponents in base 2. No atomics: equal inputs give equal bits.

Loops carry `disable_licm`: what the compiler moves in front of them (addresses, masks, weights of the first product) it
holds in registers through them, and spills.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from medformer_kernels.tnt.device import (
    attention_backward,
    drop,
    gelu_slope,
    head,
    matrix,
    normal_cdf,
    normalise,
    normalise_backward,
    read,
    read_dense,
    write,
)

# Lengths never specialise a kernel: the first call on a new length compiles nothing.
_RUNTIME = ["S", "N", "per_tile", "tiles", "slice_length", "drop_below", "path_below"]


class Meta(NamedTuple):
    """What a kernel of the inner block is compiled for: widths, tiles, and flags that its docstring explains."""

    C: int
    BLOCK_R: int
    BLOCK_C: int
    DENSE: bool
    """X, or DOUT, is contiguous."""
    DROP: bool
    PATH: bool
    H: int = 0
    F: int = 0
    BLOCK_D: int = 0
    BLOCK_F: int = 0
    PROJ_BIAS: bool = False
    FC2_BIAS: bool = False
    SAVE: bool = False
    ATTENTION: bool = False
    MLP: bool = False
    VALUES: bool = False
    SCORES: bool = False


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_fwd_kernel(
    X, ATTN, MLP, SEED, OUT, MIDDLE, S, N, per_tile, tiles, eps, scale, drop_below, path_below, drop_scales,
    META: tl.constexpr,
):  # fmt: skip
    """out = y + f2 (fc2(GELU(fc1(LN2(y))))), y = x + f1 proj(attention(LN1(x))), tile by tile.

    ATTENTION, MLP: a launch for both where registers hold it, or two with y in memory between them.
    """
    D: tl.constexpr = META.C // META.H
    QKV_W, QKV_B, PROJ_W, PROJ_B = ATTN
    FC1_W, FC1_B, FC2_W, FC2_B = MLP
    dropping = (drop_below, path_below, drop_scales)
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    offs_d = tl.arange(0, META.BLOCK_D)
    offs_f = tl.arange(0, META.BLOCK_F)
    c_ok = offs_c < META.C
    d_ok = offs_d < D
    local = offs_r // N
    position = offs_r % N
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        sequence = tile * per_tile + local
        row0 = tl.cast(tile, tl.int64) * (per_tile * N)
        ok = ((local < per_tile) & (sequence < S))[:, None] & c_ok[None, :]
        at = (row0, sequence, position, offs_r, offs_c, ok)
        if META.ATTENTION:
            x = read(X, at, META.C, META.DENSE)
            xhat, _ = normalise(x, c_ok, eps, META.C)
            xhat = xhat.to(QKV_W.dtype.element_ty)  # [R, C]
            branch = tl.zeros([META.BLOCK_R, META.BLOCK_C], tl.float32)
            for h in tl.range(0, META.H, disable_licm=True):
                _q, _k, p, v, _wq, _wk, _wv = head(xhat, QKV_W, QKV_B, h, local, scale, offs_d, offs_c, META)
                o = tl.dot(p, v, input_precision="ieee")  # [R, D]
                wo = matrix(PROJ_W + h * D, 0, offs_c, c_ok, offs_d, d_ok, META.C)  # [C out, D]
                branch = tl.dot(o.to(wo.dtype), tl.trans(wo), branch, input_precision="ieee")
            if META.PROJ_BIAS:
                branch += tl.load(PROJ_B + offs_c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
            branch = drop(branch, SEED, 0, at, dropping, META)
            # x is read again rather than held in registers through the heads
            x = branch + read(X, at, META.C, META.DENSE)
            if META.SAVE:
                write(MIDDLE, at, x, META.C)
        else:
            x = read_dense(MIDDLE, at, META.C)
        if META.MLP:
            xhat, _ = normalise(x, c_ok, eps, META.C)
            xhat = xhat.to(FC1_W.dtype.element_ty)
            branch = tl.zeros([META.BLOCK_R, META.BLOCK_C], tl.float32)
            for f0 in tl.range(0, META.F, META.BLOCK_F, disable_licm=True):
                f_ok = f0 + offs_f < META.F
                w1 = matrix(FC1_W, f0, offs_f, f_ok, offs_c, c_ok, META.C)  # [F, C]
                u = tl.dot(xhat, tl.trans(w1), input_precision="ieee")
                u += tl.load(FC1_B + f0 + offs_f, mask=f_ok, other=0.0)[None, :]
                w2 = matrix(FC2_W + f0, 0, offs_c, c_ok, offs_f, f_ok, META.F)  # [C out, F]
                branch = tl.dot(
                    (u * normal_cdf(u, FC1_W.dtype.element_ty)).to(w2.dtype),
                    tl.trans(w2),
                    branch,
                    input_precision="ieee",
                )
            if META.FC2_BIAS:
                branch += tl.load(FC2_B + offs_c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
            branch = drop(branch, SEED, 1, at, dropping, META)
            write(OUT, at, x + branch, META.C)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_mlp_dx_kernel(
    DOUT, MIDDLE, MLP, SEED, DMIDDLE, S, N, tiles, eps, drop_below, path_below, drop_scales, META: tl.constexpr
):
    """dy = dout + LN2 backward of fc1^T (GELU'(u) fc2^T (f2 dout))."""
    FC1_W, FC1_B, FC2_W = MLP
    dropping = (drop_below, path_below, drop_scales)
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    offs_f = tl.arange(0, META.BLOCK_F)
    c_ok = offs_c < META.C
    rows = tl.cast(S, tl.int64) * N
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        # The MLP knows no sequences: a tile is BLOCK_R rows of all.
        row0 = tl.cast(tile, tl.int64) * META.BLOCK_R
        row = row0 + offs_r
        sequence = row // N
        position = (row % N).to(tl.int32)
        ok = (row < rows)[:, None] & c_ok[None, :]
        at = (row0, sequence, position, offs_r, offs_c, ok)
        y = read_dense(MIDDLE, at, META.C)
        xhat, _ = normalise(y, c_ok, eps, META.C)
        xhat = xhat.to(FC1_W.dtype.element_ty)
        dbranch = read(DOUT, at, META.C, META.DENSE)
        dbranch = drop(dbranch, SEED, 1, at, dropping, META).to(FC1_W.dtype.element_ty)
        dxhat = tl.zeros([META.BLOCK_R, META.BLOCK_C], tl.float32)
        for f0 in tl.range(0, META.F, META.BLOCK_F, disable_licm=True):
            f_ok = f0 + offs_f < META.F
            w1 = matrix(FC1_W, f0, offs_f, f_ok, offs_c, c_ok, META.C)  # [F, C]
            u = tl.dot(xhat, tl.trans(w1), input_precision="ieee")
            u += tl.load(FC1_B + f0 + offs_f, mask=f_ok, other=0.0)[None, :]
            w2 = matrix(FC2_W + f0, 0, offs_c, c_ok, offs_f, f_ok, META.F)  # [C out, F]
            du = tl.dot(dbranch, w2, input_precision="ieee") * gelu_slope(u, normal_cdf(u, FC1_W.dtype.element_ty))
            dxhat = tl.dot(du.to(w1.dtype), w1, dxhat, input_precision="ieee")
        # What the loop did not need is read again rather than held in registers through it.
        y = read_dense(MIDDLE, at, META.C)
        xhat, rstd = normalise(y, c_ok, eps, META.C)
        dy = normalise_backward(dxhat, xhat, rstd, META.C)
        dy += read(DOUT, at, META.C, META.DENSE)
        write(DMIDDLE, at, dy, META.C)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_mlp_dw_kernel(
    DOUT, MIDDLE, MLP, SEED, GRADIENTS, S, N, tiles, slice_length, eps, drop_below, path_below, drop_scales,
    META: tl.constexpr,
):  # fmt: skip
    """dfc1 = du^T xhat2, dfc2^T = GELU(u)^T (f2 dout), and their biases: BLOCK_F of F, over a slice of the tiles."""
    F_BLOCKS: tl.constexpr = (META.F + META.BLOCK_F - 1) // META.BLOCK_F
    FC1_W, FC1_B, FC2_W = MLP
    DFC1, DFC1_B, DFC2, DFC2_B = GRADIENTS
    dropping = (drop_below, path_below, drop_scales)
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    f0 = (tl.program_id(0) % F_BLOCKS) * META.BLOCK_F
    part = tl.program_id(0) // F_BLOCKS
    offs_f = tl.arange(0, META.BLOCK_F)
    f_ok = f0 + offs_f < META.F
    c_ok = offs_c < META.C
    w1 = matrix(FC1_W, f0, offs_f, f_ok, offs_c, c_ok, META.C)  # [F, C]
    w2 = matrix(FC2_W + f0, 0, offs_c, c_ok, offs_f, f_ok, META.F)  # [C out, F]
    dfc1 = tl.zeros([META.BLOCK_F, META.BLOCK_C], tl.float32)
    dfc2 = tl.zeros([META.BLOCK_F, META.BLOCK_C], tl.float32)
    dfc1_bias = tl.zeros([META.BLOCK_F], tl.float32)
    dfc2_bias = tl.zeros([META.BLOCK_C], tl.float32)
    rows = tl.cast(S, tl.int64) * N
    for tile in tl.range(part * slice_length, tl.minimum((part + 1) * slice_length, tiles), disable_licm=True):
        row0 = tl.cast(tile, tl.int64) * META.BLOCK_R
        row = row0 + offs_r
        sequence = row // N
        position = (row % N).to(tl.int32)
        ok = (row < rows)[:, None] & c_ok[None, :]
        at = (row0, sequence, position, offs_r, offs_c, ok)
        y = read_dense(MIDDLE, at, META.C)
        xhat, _ = normalise(y, c_ok, eps, META.C)
        xhat = xhat.to(w1.dtype)
        dbranch = read(DOUT, at, META.C, META.DENSE)
        dbranch = drop(dbranch, SEED, 1, at, dropping, META)
        dfc2_bias += tl.sum(dbranch, 0)
        dbranch = dbranch.to(w1.dtype)
        u = tl.dot(xhat, tl.trans(w1), input_precision="ieee")
        u += tl.load(FC1_B + f0 + offs_f, mask=f_ok, other=0.0)[None, :]
        cdf = normal_cdf(u, FC1_W.dtype.element_ty)
        dfc2 = tl.dot(tl.trans((u * cdf).to(w1.dtype)), dbranch, dfc2, input_precision="ieee")
        du = tl.dot(dbranch, w2, input_precision="ieee") * gelu_slope(u, cdf)
        dfc1_bias += tl.sum(du, 0)  # rows beyond the last have du = 0: their dout is
        dfc1 = tl.dot(tl.trans(du.to(w1.dtype)), xhat, dfc1, input_precision="ieee")
    part = tl.cast(part, tl.int64)
    ok = f_ok[:, None] & c_ok[None, :]
    place = part * (META.F * META.C) + (f0 + offs_f)[:, None] * META.C + offs_c[None, :]
    tl.store(DFC1 + place, dfc1, mask=ok)
    tl.store(DFC2 + place, dfc2, mask=ok)
    tl.store(DFC1_B + part * META.F + f0 + offs_f, dfc1_bias, mask=f_ok)
    if f0 == 0:
        tl.store(DFC2_B + part * META.C + offs_c, dfc2_bias, mask=c_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_attn_dx_kernel(
    DMIDDLE, X, ATTN, SEED, DX, S, N, per_tile, tiles, eps, scale, drop_below, path_below, drop_scales,
    META: tl.constexpr,
):  # fmt: skip
    """dx = dy + LN1 backward of (dq wq + dk wk + dv wv).

    VALUES: of values; SCORES: of queries and keys, added to the dx in memory if alone. A launch for both where
    registers hold it, or two.
    """
    D: tl.constexpr = META.C // META.H
    QKV_W, QKV_B, PROJ_W = ATTN
    dropping = (drop_below, path_below, drop_scales)
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    offs_d = tl.arange(0, META.BLOCK_D)
    c_ok = offs_c < META.C
    d_ok = offs_d < D
    local = offs_r // N
    position = offs_r % N
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        sequence = tile * per_tile + local
        row0 = tl.cast(tile, tl.int64) * (per_tile * N)
        ok = ((local < per_tile) & (sequence < S))[:, None] & c_ok[None, :]
        at = (row0, sequence, position, offs_r, offs_c, ok)
        x = read(X, at, META.C, META.DENSE)
        xhat, _ = normalise(x, c_ok, eps, META.C)
        xhat = xhat.to(QKV_W.dtype.element_ty)
        dbranch = read_dense(DMIDDLE, at, META.C)
        dbranch = drop(dbranch, SEED, 0, at, dropping, META).to(QKV_W.dtype.element_ty)
        dxhat = tl.zeros([META.BLOCK_R, META.BLOCK_C], tl.float32)
        for h in tl.range(0, META.H, disable_licm=True):
            q, k, p, v, wq, wk, wv = head(xhat, QKV_W, QKV_B, h, local, scale, offs_d, offs_c, META)
            wo = matrix(PROJ_W + h * D, 0, offs_c, c_ok, offs_d, d_ok, META.C)  # [C out, D]
            do = tl.dot(dbranch, wo, input_precision="ieee").to(v.dtype)  # [R, D]
            if META.VALUES:
                dv = tl.dot(tl.trans(p), do, input_precision="ieee").to(v.dtype)
                dxhat = tl.dot(dv, wv, dxhat, input_precision="ieee")
            if META.SCORES:
                ds = tl.dot(do, tl.trans(v), input_precision="ieee")
                ds = attention_backward(p, ds, scale)
                dq = tl.dot(ds, k, input_precision="ieee").to(v.dtype)
                dxhat = tl.dot(dq, wq, dxhat, input_precision="ieee")
                dk = tl.dot(tl.trans(ds), q, input_precision="ieee").to(v.dtype)
                dxhat = tl.dot(dk, wk, dxhat, input_precision="ieee")
        x = read(X, at, META.C, META.DENSE)
        xhat, rstd = normalise(x, c_ok, eps, META.C)
        dx = normalise_backward(dxhat, xhat, rstd, META.C)
        dx += read_dense(DMIDDLE if META.VALUES else DX, at, META.C)
        write(DX, at, dx, META.C)


@triton.jit(do_not_specialize=_RUNTIME)
def tnt_attn_dw_kernel(
    DMIDDLE, X, ATTN, SEED, GRADIENTS, S, N, per_tile, tiles, slice_length, eps, scale, drop_below, path_below,
    drop_scales, META: tl.constexpr,
):  # fmt: skip
    """dqkv = (dq, dk, dv)^T xhat1, dproj = (f1 dy)^T o, and their biases: one head, over one slice of the tiles.

    VALUES: of values and projection; SCORES: of queries and keys. A launch for both where registers hold it, or two.
    """
    D: tl.constexpr = META.C // META.H
    QKV_W, QKV_B, PROJ_W = ATTN
    DQKV, DQKV_B, DPROJ, DPROJ_B = GRADIENTS
    dropping = (drop_below, path_below, drop_scales)
    offs_r = tl.arange(0, META.BLOCK_R)
    offs_c = tl.arange(0, META.BLOCK_C)
    offs_d = tl.arange(0, META.BLOCK_D)
    h = tl.program_id(0) % META.H
    part = tl.program_id(0) // META.H
    c_ok = offs_c < META.C
    d_ok = offs_d < D
    local = offs_r // N
    position = offs_r % N
    # [C, D], so that the long axis is the one that matrix instructions need long
    dwq = tl.zeros([META.BLOCK_C, META.BLOCK_D], tl.float32)
    dwk = tl.zeros([META.BLOCK_C, META.BLOCK_D], tl.float32)
    dwv = tl.zeros([META.BLOCK_C, META.BLOCK_D], tl.float32)
    dwo = tl.zeros([META.BLOCK_C, META.BLOCK_D], tl.float32)
    dbq = tl.zeros([META.BLOCK_D], tl.float32)
    dbk = tl.zeros([META.BLOCK_D], tl.float32)
    dbv = tl.zeros([META.BLOCK_D], tl.float32)
    dbo = tl.zeros([META.BLOCK_C], tl.float32)
    for tile in tl.range(part * slice_length, tl.minimum((part + 1) * slice_length, tiles), disable_licm=True):
        sequence = tile * per_tile + local
        row0 = tl.cast(tile, tl.int64) * (per_tile * N)
        ok = ((local < per_tile) & (sequence < S))[:, None] & c_ok[None, :]
        at = (row0, sequence, position, offs_r, offs_c, ok)
        x = read(X, at, META.C, META.DENSE)
        xhat, _ = normalise(x, c_ok, eps, META.C)
        xhat = xhat.to(QKV_W.dtype.element_ty)
        dbranch = read_dense(DMIDDLE, at, META.C)
        dbranch = drop(dbranch, SEED, 0, at, dropping, META)
        if META.VALUES:
            dbo += tl.sum(dbranch, 0)
        dbranch = dbranch.to(QKV_W.dtype.element_ty)
        q, k, p, v, _wq, _wk, _wv = head(xhat, QKV_W, QKV_B, h, local, scale, offs_d, offs_c, META)
        wo = matrix(PROJ_W + h * D, 0, offs_c, c_ok, offs_d, d_ok, META.C)  # [C out, D]
        do = tl.dot(dbranch, wo, input_precision="ieee").to(v.dtype)  # [R, D]
        if META.VALUES:
            o = tl.dot(p, v, input_precision="ieee").to(v.dtype)
            dwo = tl.dot(tl.trans(dbranch), o, dwo, input_precision="ieee")
            dv = tl.dot(tl.trans(p), do, input_precision="ieee")
            dbv += tl.sum(dv, 0)
            dwv = tl.dot(tl.trans(xhat), dv.to(v.dtype), dwv, input_precision="ieee")
        if META.SCORES:
            ds = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = attention_backward(p, ds, scale)
            dq = tl.dot(ds, k, input_precision="ieee")
            dbq += tl.sum(dq, 0)
            dwq = tl.dot(tl.trans(xhat), dq.to(v.dtype), dwq, input_precision="ieee")
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
            dbk += tl.sum(dk, 0)
            dwk = tl.dot(tl.trans(xhat), dk.to(v.dtype), dwk, input_precision="ieee")
    part = tl.cast(part, tl.int64)
    ok = c_ok[:, None] & d_ok[None, :]
    DQKV += part * (3 * META.C * META.C)
    DQKV_B += part * (3 * META.C) + h * D
    place = (h * D + offs_d)[None, :] * META.C + offs_c[:, None]  # rows of qkv are outputs
    if META.SCORES:
        tl.store(DQKV + place, dwq, mask=ok)
        tl.store(DQKV + META.C * META.C + place, dwk, mask=ok)
        tl.store(DQKV_B + offs_d, dbq, mask=d_ok)
        tl.store(DQKV_B + META.C + offs_d, dbk, mask=d_ok)
    if META.VALUES:
        tl.store(DQKV + 2 * META.C * META.C + place, dwv, mask=ok)
        tl.store(DQKV_B + 2 * META.C + offs_d, dbv, mask=d_ok)
        tl.store(DPROJ + part * (META.C * META.C) + offs_c[:, None] * META.C + (h * D + offs_d)[None, :], dwo, mask=ok)
        if h == 0:
            tl.store(DPROJ_B + part * META.C + offs_c, dbo, mask=c_ok)


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
