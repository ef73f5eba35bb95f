"""The Triton kernels of the patch embedding; `fused` launches them, `ops` derives what they compute.

N tokens on a grid of (grid_z, grid_y, grid_x), E width, C channels (C * windows for a raw scan), T taps of one patch.
A program owns the named block of one sample:

    patch_embed_fwd_kernel        BLOCK_N tokens x BLOCK_E widths: gathers, multiplies, and all of the epilogue
    patch_embed_norm_kernel       BLOCK_N tokens x all E: the norm, where E is too wide for the first to hold
    patch_embed_norm_bwd_kernel   a slice of the tokens: dy, and partial sums of dnorm_weight, dnorm_bias, dbias
    patch_embed_dw_kernel         BLOCK_K patch elements x BLOCK_E widths over a slice of the tokens: partial dweight
    patch_embed_dx_kernel         BLOCK_N voxels of one residue modulo the stride x BLOCK_C channels: gathers tokens

Patch elements are walked in one of two orders. WIDE (C at least a tile): taps outside, channels inside, so that a
tile sees one tap, whose place and bounds are scalars. Narrow: the order of the weight, (c, kz, ky, kx) flat, so that
a tile is full whatever C is. The model (C, E, kernel, stride, padding, dilation) is compiled in; volumes are not.

Products run on the matrix units in the dtype of the weight (float32 as three tf32 products on NVIDIA), all else in
float32. No atomics: equal inputs give equal bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Sizes and strides of volumes never specialise a kernel: the first call on a new size compiles nothing.
_RUNTIME = [f"{name}_{axis}" for name in ("x_stride", "size", "grid") for axis in "zyx"]
_RUNTIME += ["x_stride_b", "x_stride_c", "dy_stride_b", "dy_stride_n", "dy_stride_e", "offset", "rows"]
_RUNTIME += ["slice_length", "slices"]


class Meta(NamedTuple):
    """What a kernel is compiled for: the model, the layout of its input (see `fused`), tiles.

    Kernel K, stride S, padding P and dilation D of each axis.
    """

    C: int = 0
    E: int = 0
    KZ: int = 1
    KY: int = 1
    KX: int = 1
    SZ: int = 1
    SY: int = 1
    SX: int = 1
    PZ: int = 0
    PY: int = 0
    PX: int = 0
    DZ: int = 1
    DY: int = 1
    DX: int = 1
    X_UNIT: str = ""
    ALIGNMENT: int = 1
    WINDOWS: int = 1
    DY_UNIT: bool = False
    DY_ALIGNMENT: int = 1
    MODE: str = ""
    PADDED: bool = False
    WIDE: bool = False
    NORM: str = ""
    PRECISION: str = "ieee"
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    BLOCK_E: int = 0
    BLOCK_C: int = 0


@triton.jit
def _bounded(i, size, MODE: tl.constexpr):
    """A voxel index under padding by 'replicate' or 'reflect'."""
    if MODE == "reflect":
        i = tl.abs(i)
        i = size - 1 - tl.abs(size - 1 - i)
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def _along_n(v, K_FIRST: tl.constexpr):
    return v[None, :] if K_FIRST else v[:, None]


@triton.jit
def _along_k(v, K_FIRST: tl.constexpr):
    return v[:, None] if K_FIRST else v[None, :]


@triton.jit
def _origin(n, grid_y, grid_x, META: tl.constexpr):
    """The first voxel (z, y, x) of the patches of tokens n, in the padded volume."""
    z = n // (grid_y * grid_x) * META.SZ - META.PZ
    y = n // grid_x % grid_y * META.SY - META.PY
    return z, y, n % grid_x * META.SX - META.PX


@triton.jit
def _gather(X, COEFFICIENTS, strides, size, origin, n_ok, i, like, K_FIRST: tl.constexpr, META: tl.constexpr):
    """Tile i of the patches of BLOCK_N tokens, [BLOCK_N, BLOCK_K] in the dtype `like`, padding and windows done.

    K_FIRST gives its transpose: neighbouring threads then read along x, else along the patch (channels-last).
    Offsets are 64-bit: each token's part once, each patch element's part once, their sum per element.
    """
    x_stride_c, x_stride_z, x_stride_y, x_stride_x = strides
    size_z, size_y, size_x = size
    origin_z, origin_y, origin_x = origin
    T: tl.constexpr = META.KZ * META.KY * META.KX
    offs_k = tl.arange(0, META.BLOCK_K)
    if META.WIDE:
        C_BLOCKS: tl.constexpr = (META.C + META.BLOCK_K - 1) // META.BLOCK_K
        tap = i // C_BLOCKS
        c = (i % C_BLOCKS) * META.BLOCK_K + offs_k
        k_ok = c < META.C
        dz = tap // (META.KY * META.KX) * META.DZ + tl.zeros([1], tl.int32)
        dy = tap // META.KX % META.KY * META.DY + tl.zeros([1], tl.int32)
        dx = tap % META.KX * META.DX + tl.zeros([1], tl.int32)
    else:
        k = i * META.BLOCK_K + offs_k
        k_ok = k < META.C * T
        c = k // T
        dz = k // (META.KY * META.KX) % META.KZ * META.DZ
        dy = k // META.KX % META.KY * META.DY
        dx = k % META.KX * META.DX
    z = _along_n(origin_z, K_FIRST) + _along_k(dz, K_FIRST)
    y = _along_n(origin_y, K_FIRST) + _along_k(dy, K_FIRST)
    x = _along_n(origin_x, K_FIRST) + _along_k(dx, K_FIRST)
    ok = _along_n(n_ok, K_FIRST) & _along_k(k_ok, K_FIRST)
    if META.WINDOWS == 1:
        channel = c.to(tl.int64) * x_stride_c
    else:
        channel = (c // META.WINDOWS).to(tl.int64) * x_stride_c
    if META.PADDED and META.MODE != "zeros":
        z, y, x = _bounded(z, size_z, META.MODE), _bounded(y, size_y, META.MODE), _bounded(x, size_x, META.MODE)
        place = z.to(tl.int64) * x_stride_z + y.to(tl.int64) * x_stride_y + x.to(tl.int64) * x_stride_x
        pointers = X + (place + _along_k(channel, K_FIRST))
    else:
        if META.PADDED:
            ok &= (z >= 0) & (z < size_z) & (y >= 0) & (y < size_y) & (x >= 0) & (x < size_x)
        base = (
            origin_z.to(tl.int64) * x_stride_z + origin_y.to(tl.int64) * x_stride_y + origin_x.to(tl.int64) * x_stride_x
        )
        step = dz.to(tl.int64) * x_stride_z + dy.to(tl.int64) * x_stride_y + dx.to(tl.int64) * x_stride_x
        pointers = X + _along_n(base, K_FIRST) + _along_k(channel + step, K_FIRST)
    voxels = tl.load(pointers, mask=ok, other=0)
    if COEFFICIENTS is not None:
        at = COEFFICIENTS + c % META.WINDOWS * 4
        v = voxels.to(tl.float32) * _along_k(tl.load(at), K_FIRST) + _along_k(tl.load(at + 1), K_FIRST)
        low, high = _along_k(tl.load(at + 2), K_FIRST), _along_k(tl.load(at + 3), K_FIRST)
        v = tl.where(v < low, low, v)  # comparisons keep NaN
        v = tl.where(v > high, high, v)
        voxels = tl.where(ok, v, 0.0)
    return voxels.to(like)


@triton.jit
def _normalised(y, e_ok, eps, E: tl.constexpr, NORM: tl.constexpr):
    """(y less its mean if 'layer', times 1/sigma; 1/sigma) of rows [BLOCK_N, BLOCK_E], 0 beyond E."""
    if NORM == "layer":
        y = tl.where(e_ok[None, :], y - (tl.sum(y, 1) / E)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(y * y, 1) / E + eps)
    return y * scale[:, None], scale


@triton.jit
def _affine(y, AFFINE, offs_e, e_ok):
    NORM_WEIGHT, NORM_BIAS = AFFINE
    if NORM_WEIGHT is not None:
        y *= tl.load(NORM_WEIGHT + offs_e, mask=e_ok, other=0.0).to(tl.float32)[None, :]
    if NORM_BIAS is not None:
        y += tl.load(NORM_BIAS + offs_e, mask=e_ok, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _positioned(y, POSITION, n, n_ok, grid_y, grid_x, offs_e, e_ok, E: tl.constexpr):
    """y plus the position of tokens n: of one table of all tokens, or one table an axis."""
    TABLE, TABLE_Y, TABLE_X = POSITION
    ok = n_ok[:, None] & e_ok[None, :]
    if TABLE_Y is not None:
        z, py, px = n // (grid_y * grid_x), n // grid_x % grid_y, n % grid_x
        y += tl.load(TABLE + z[:, None] * E + offs_e[None, :], mask=ok, other=0.0).to(tl.float32)
        y += tl.load(TABLE_Y + py[:, None] * E + offs_e[None, :], mask=ok, other=0.0).to(tl.float32)
        y += tl.load(TABLE_X + px[:, None] * E + offs_e[None, :], mask=ok, other=0.0).to(tl.float32)
    elif TABLE is not None:
        rows = TABLE + n.to(tl.int64)[:, None] * E
        y += tl.load(rows + offs_e[None, :], mask=ok, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=_RUNTIME)
def patch_embed_fwd_kernel(
    X, COEFFICIENTS, WEIGHT, BIAS, AFFINE, POSITION, OUT, Y, x_stride_b, x_stride_c, x_stride_z, x_stride_y, x_stride_x,
    size_z, size_y, size_x, grid_z, grid_y, grid_x, offset, eps, META: tl.constexpr,
):  # fmt: skip
    """tokens_n = norm(bias + sum_k weight_k patch_nk) + position_n for BLOCK_N tokens; y before the norm to Y if given.

    WEIGHT is (patch elements, E). Strides come divided by ALIGNMENT, which the compiler can then count on; X_UNIT names
    the axis ('c', 'x', '') whose stride is 1.
    """
    N = grid_z * grid_y * grid_x
    n_blocks = tl.cdiv(N, META.BLOCK_N)
    E_BLOCKS: tl.constexpr = (META.E + META.BLOCK_E - 1) // META.BLOCK_E
    pid = tl.program_id(0)
    offs_e = pid % E_BLOCKS * META.BLOCK_E + tl.arange(0, META.BLOCK_E)
    n = pid // E_BLOCKS % n_blocks * META.BLOCK_N + tl.arange(0, META.BLOCK_N)
    b = (pid // (E_BLOCKS * n_blocks)).to(tl.int64)
    n_ok, e_ok = n < N, offs_e < META.E
    strides = _strides(x_stride_c, x_stride_z, x_stride_y, x_stride_x, META.X_UNIT, META.ALIGNMENT)
    size = (size_z, size_y, size_x)
    X += b * x_stride_b * META.ALIGNMENT
    origin = _origin(n, grid_y, grid_x, META)

    K: tl.constexpr = META.C * META.KZ * META.KY * META.KX
    C_BLOCKS: tl.constexpr = (META.C + META.BLOCK_K - 1) // META.BLOCK_K
    STEPS: tl.constexpr = (
        META.KZ * META.KY * META.KX * C_BLOCKS if META.WIDE else (K + META.BLOCK_K - 1) // META.BLOCK_K
    )
    K_FIRST: tl.constexpr = META.X_UNIT != "c"
    acc = tl.zeros([META.BLOCK_N, META.BLOCK_E], tl.float32)
    for i in range(0, STEPS):
        patches = _gather(X, COEFFICIENTS, strides, size, origin, n_ok, i, WEIGHT.dtype.element_ty, K_FIRST, META)
        if META.WIDE:
            c = i % C_BLOCKS * META.BLOCK_K + tl.arange(0, META.BLOCK_K)  # pyright: ignore[reportOperatorIssue]
            k, k_ok = i // C_BLOCKS * META.C + c, c < META.C
        else:
            k = i * META.BLOCK_K + tl.arange(0, META.BLOCK_K)
            k_ok = k < K
        weight = tl.load(WEIGHT + k[:, None] * META.E + offs_e[None, :], mask=k_ok[:, None] & e_ok[None, :], other=0.0)
        if K_FIRST:
            patches = tl.trans(patches)
        acc = tl.dot(patches, weight, acc, input_precision=META.PRECISION)

    if BIAS is not None:
        acc += tl.load(BIAS + offs_e, mask=e_ok, other=0.0).to(tl.float32)[None, :]
    ok = n_ok[:, None] & e_ok[None, :]
    if Y is not None:
        rows = (b * N + n)[:, None] * META.E
        tl.store(Y + rows + offs_e[None, :], acc.to(Y.dtype.element_ty), mask=ok)
    if OUT is not None:
        if META.NORM != "":
            acc, _ = _normalised(acc, e_ok, eps, META.E, META.NORM)
            acc = _affine(acc, AFFINE, offs_e, e_ok)
        acc = _positioned(acc, POSITION, n, n_ok, grid_y, grid_x, offs_e, e_ok, META.E)
        rows = (b * (N + offset) + offset + n)[:, None] * META.E
        tl.store(OUT + rows + offs_e[None, :], acc.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def _strides(c, z, y, x, X_UNIT: tl.constexpr, ALIGNMENT: tl.constexpr):
    c, z, y, x = c * ALIGNMENT, z * ALIGNMENT, y * ALIGNMENT, x * ALIGNMENT
    if X_UNIT == "c":
        c = 1
    elif X_UNIT == "x":
        x = 1
    return c, z, y, x


@triton.jit(do_not_specialize=_RUNTIME)
def patch_embed_norm_kernel(Y, AFFINE, POSITION, OUT, grid_z, grid_y, grid_x, offset, eps, META: tl.constexpr):
    """tokens_n = norm(y_n) + position_n for BLOCK_N tokens."""
    N = grid_z * grid_y * grid_x
    n_blocks = tl.cdiv(N, META.BLOCK_N)
    pid = tl.program_id(0)
    n = pid % n_blocks * META.BLOCK_N + tl.arange(0, META.BLOCK_N)
    b = (pid // n_blocks).to(tl.int64)
    offs_e = tl.arange(0, META.BLOCK_E)
    n_ok, e_ok = n < N, offs_e < META.E
    ok = n_ok[:, None] & e_ok[None, :]
    y = tl.load(Y + (b * N + n)[:, None] * META.E + offs_e[None, :], mask=ok, other=0.0).to(tl.float32)
    y, _ = _normalised(y, e_ok, eps, META.E, META.NORM)
    y = _affine(y, AFFINE, offs_e, e_ok)
    y = _positioned(y, POSITION, n, n_ok, grid_y, grid_x, offs_e, e_ok, META.E)
    rows = (b * (N + offset) + offset + n)[:, None] * META.E
    tl.store(OUT + rows + offs_e[None, :], y.to(OUT.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_RUNTIME)
def patch_embed_norm_bwd_kernel(
    DTOKENS, Y, NORM_WEIGHT, DY, PARTIAL, dy_stride_b, dy_stride_n, dy_stride_e, rows, offset, slice_length, slices,
    eps, META: tl.constexpr,
):  # fmt: skip
    """dy = (g - xhat mean(g xhat) [- mean(g)]) / sigma with g = dtokens norm_weight, over one slice of one sample.

    PARTIAL (programs, 3, E): sums over the slice of dtokens xhat, dtokens and dy. DTOKENS has `rows` rows of patches
    behind `offset` others, with the strides named dy_stride.
    """
    pid = tl.program_id(0)
    b = (pid // slices).to(tl.int64)
    start = pid % slices * slice_length
    end = tl.minimum(start + slice_length, rows)
    offs_e = tl.arange(0, META.BLOCK_E)
    e_ok = offs_e < META.E
    DTOKENS += b * dy_stride_b
    dweight = tl.zeros([META.BLOCK_E], tl.float32)
    dbias = tl.zeros([META.BLOCK_E], tl.float32)
    dy_sum = tl.zeros([META.BLOCK_E], tl.float32)
    for n0 in range(start, end, META.BLOCK_N):
        n = n0 + tl.arange(0, META.BLOCK_N)
        ok = (n < end)[:, None] & e_ok[None, :]
        at = (b * rows + n)[:, None] * META.E + offs_e[None, :]
        y = tl.load(Y + at, mask=ok, other=0.0).to(tl.float32)
        y, scale = _normalised(y, e_ok, eps, META.E, META.NORM)
        place = (n + offset).to(tl.int64)[:, None] * dy_stride_n + offs_e.to(tl.int64)[None, :] * dy_stride_e
        g = tl.load(DTOKENS + place, mask=ok, other=0.0).to(tl.float32)
        dweight += tl.sum(g * y, 0)
        dbias += tl.sum(g, 0)
        g = _affine(g, (NORM_WEIGHT, None), offs_e, e_ok)
        dy = g - y * (tl.sum(g * y, 1) / META.E)[:, None]
        if META.NORM == "layer":
            dy -= (tl.sum(g, 1) / META.E)[:, None]
        dy = tl.where(ok, dy * scale[:, None], 0.0)
        dy_sum += tl.sum(dy, 0)
        tl.store(DY + at, dy.to(DY.dtype.element_ty), mask=ok)
    part = PARTIAL + pid.to(tl.int64) * 3 * META.E
    tl.store(part + offs_e, dweight, mask=e_ok)
    tl.store(part + META.E + offs_e, dbias, mask=e_ok)
    tl.store(part + 2 * META.E + offs_e, dy_sum, mask=e_ok)


@triton.jit(do_not_specialize=_RUNTIME)
def patch_embed_dw_kernel(
    X, COEFFICIENTS, DY, PARTIAL, x_stride_b, x_stride_c, x_stride_z, x_stride_y, x_stride_x, size_z, size_y, size_x,
    grid_z, grid_y, grid_x, dy_stride_b, dy_stride_n, dy_stride_e, offset, slice_length, slices, META: tl.constexpr,
):  # fmt: skip
    """PARTIAL (samples * slices, patch elements, E): sum over a slice of the tokens of patch_nk dy_n.

    Strides of X and DY come divided by their alignments.
    """
    N = grid_z * grid_y * grid_x
    C_BLOCKS: tl.constexpr = (META.C + META.BLOCK_K - 1) // META.BLOCK_K
    K: tl.constexpr = META.C * META.KZ * META.KY * META.KX
    K_BLOCKS: tl.constexpr = (
        META.KZ * META.KY * META.KX * C_BLOCKS if META.WIDE else (K + META.BLOCK_K - 1) // META.BLOCK_K
    )
    E_BLOCKS: tl.constexpr = (META.E + META.BLOCK_E - 1) // META.BLOCK_E
    pid = tl.program_id(0)
    i = pid % K_BLOCKS
    offs_e = pid // K_BLOCKS % E_BLOCKS * META.BLOCK_E + tl.arange(0, META.BLOCK_E)
    part = pid // (K_BLOCKS * E_BLOCKS)
    b = (part // slices).to(tl.int64)
    start = part % slices * slice_length
    end = tl.minimum(start + slice_length, N)
    e_ok = offs_e < META.E
    strides = _strides(x_stride_c, x_stride_z, x_stride_y, x_stride_x, META.X_UNIT, META.ALIGNMENT)
    size = (size_z, size_y, size_x)
    X += b * x_stride_b * META.ALIGNMENT
    DY += b * dy_stride_b * META.DY_ALIGNMENT
    dy_stride_n *= META.DY_ALIGNMENT
    if META.DY_UNIT:
        dy_stride_e = 1
    K_FIRST: tl.constexpr = META.X_UNIT != "c"
    acc = tl.zeros([META.BLOCK_K, META.BLOCK_E], tl.float32)
    for n0 in range(start, end, META.BLOCK_N):
        n = n0 + tl.arange(0, META.BLOCK_N)
        n_ok = n < end
        origin = _origin(n, grid_y, grid_x, META)
        place = (n + offset).to(tl.int64)[:, None] * dy_stride_n + offs_e[None, :] * dy_stride_e
        dy = tl.load(DY + place, mask=n_ok[:, None] & e_ok[None, :], other=0.0)
        patches = _gather(X, COEFFICIENTS, strides, size, origin, n_ok, i, dy.dtype, K_FIRST, META)
        if not K_FIRST:
            patches = tl.trans(patches)
        acc = tl.dot(patches, dy, acc, input_precision=META.PRECISION)
    if META.WIDE:
        c = i % C_BLOCKS * META.BLOCK_K + tl.arange(0, META.BLOCK_K)
        k, k_ok = i // C_BLOCKS * META.C + c, c < META.C
    else:
        k = i * META.BLOCK_K + tl.arange(0, META.BLOCK_K)
        k_ok = k < K
    rows = PARTIAL + part.to(tl.int64) * K * META.E
    tl.store(rows + k[:, None] * META.E + offs_e[None, :], acc, mask=k_ok[:, None] & e_ok[None, :])


@triton.jit(do_not_specialize=_RUNTIME)
def patch_embed_dx_kernel(
    DY, WEIGHT, BIAS, DX_OUT, dy_stride_b, dy_stride_n, dy_stride_e, offset, size_z, size_y, size_x, grid_z, grid_y,
    grid_x, META: tl.constexpr,
):  # fmt: skip
    """dx_{c, v} = bias_c + sum of weight_{c, tap} dy_n over the taps and tokens n that see v; DX_OUT is contiguous.

    The voxels of a program share v + padding modulo the stride, so a tap meets all of them or none: no tap is
    computed in vain. WEIGHT is (taps, E, C). Strides of DY come divided by DY_ALIGNMENT.
    """
    C_BLOCKS: tl.constexpr = (META.C + META.BLOCK_C - 1) // META.BLOCK_C
    cells_z, cells_y, cells_x = (
        tl.cdiv(size_z + META.PZ, META.SZ),
        tl.cdiv(size_y + META.PY, META.SY),
        tl.cdiv(size_x + META.PX, META.SX),
    )
    cells = cells_z * cells_y * cells_x
    blocks = tl.cdiv(cells, META.BLOCK_N)
    pid = tl.program_id(0)
    c = pid % C_BLOCKS * META.BLOCK_C + tl.arange(0, META.BLOCK_C)
    residue = pid // C_BLOCKS % (META.SZ * META.SY * META.SX)
    j = pid // (C_BLOCKS * META.SZ * META.SY * META.SX) % blocks * META.BLOCK_N + tl.arange(0, META.BLOCK_N)
    b = (pid // (C_BLOCKS * META.SZ * META.SY * META.SX * blocks)).to(tl.int64)
    rz, ry, rx = residue // (META.SY * META.SX), residue // META.SX % META.SY, residue % META.SX
    # the cell of a voxel is (v + padding) // stride, its residue the rest
    qz, qy, qx = j // (cells_y * cells_x), j // cells_x % cells_y, j % cells_x
    vz, vy, vx = qz * META.SZ + rz - META.PZ, qy * META.SY + ry - META.PY, qx * META.SX + rx - META.PX
    v_ok = (j < cells) & (vz >= 0) & (vz < size_z) & (vy >= 0) & (vy < size_y) & (vx >= 0) & (vx < size_x)
    c_ok = c < META.C
    DY += b * dy_stride_b * META.DY_ALIGNMENT
    dy_stride_n *= META.DY_ALIGNMENT
    if META.DY_UNIT:
        dy_stride_e = 1
    E_STEPS: tl.constexpr = (META.E + META.BLOCK_K - 1) // META.BLOCK_K
    acc = tl.zeros([META.BLOCK_N, META.BLOCK_C], tl.float32)
    for tap in range(0, META.KZ * META.KY * META.KX):
        # v + padding = token * stride + k * dilation, the first term a multiple of the stride
        fz = rz - tap // (META.KY * META.KX) * META.DZ
        fy = ry - tap // META.KX % META.KY * META.DY
        fx = rx - tap % META.KX * META.DX  # pyright: ignore[reportOperatorIssue]
        if (fz % META.SZ == 0) & (fy % META.SY == 0) & (fx % META.SX == 0):
            # exact divisions, so that rounding towards zero or down is the same
            nz, ny, nx = qz + fz // META.SZ, qy + fy // META.SY, qx + fx // META.SX
            n_ok = v_ok & (nz >= 0) & (nz < grid_z) & (ny >= 0) & (ny < grid_y) & (nx >= 0) & (nx < grid_x)
            n = (nz * grid_y + ny) * grid_x + nx + offset
            for step in range(0, E_STEPS):
                e = step * META.BLOCK_K + tl.arange(0, META.BLOCK_K)
                e_ok = e < META.E
                place = n.to(tl.int64)[:, None] * dy_stride_n + e[None, :] * dy_stride_e
                dy = tl.load(DY + place, mask=n_ok[:, None] & e_ok[None, :], other=0.0)
                rows = WEIGHT + (tap * META.E + e)[:, None] * META.C
                weight = tl.load(rows + c[None, :], mask=e_ok[:, None] & c_ok[None, :], other=0.0)
                acc = tl.dot(dy, weight, acc, input_precision=META.PRECISION)
    if BIAS is not None:
        acc += tl.load(BIAS + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    volume = size_z.to(tl.int64) * size_y * size_x
    voxel = (vz.to(tl.int64) * size_y + vy) * size_x + vx
    place = (b * META.C + c)[None, :] * volume + voxel[:, None]
    tl.store(DX_OUT + place, acc.to(DX_OUT.dtype.element_ty), mask=v_ok[:, None] & c_ok[None, :])


# Inside a kernel Triton's language, not Python's, gives operators, calls and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
