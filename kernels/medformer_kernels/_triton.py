"""Device code that every kernel family shares: tiles of rows in and out of memory, and one step of a softmax."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(pointer, row0, row_stride, offs_row, offs_col, col_stride, row_ok, col_ok):
    """Tile of rows row0 + offs_row; the large part of the offset in 64 bits, the part inside the tile in 32."""
    base = pointer + tl.cast(row0, tl.int64) * row_stride
    mask = row_ok[:, None] & col_ok[None, :]
    return tl.load(base + offs_row[:, None] * row_stride + offs_col[None, :] * col_stride, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, row0, row_stride, offs_row, offs_col, col_stride, row_ok, col_ok, x):
    base = pointer + tl.cast(row0, tl.int64) * row_stride
    mask = row_ok[:, None] & col_ok[None, :]
    tl.store(
        base + offs_row[:, None] * row_stride + offs_col[None, :] * col_stride,
        x.to(pointer.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def softmax_step(top, total, acc, e, values, PRECISION: tl.constexpr):
    """One more tile of a running softmax: exponents e [R, C] in base 2 and their values [C, W].

    Row maxima `top` [R], denominators `total` [R] and sums `acc` [R, W] are float32; a row of -inf stays empty.
    """
    new_top = tl.maximum(top, tl.max(e, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(e - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def softmax_merge(top, total, acc, part_top, part_total, part_acc):
    """One more part of a running softmax, as flash decoding merges its splits."""
    new_top = tl.maximum(top, part_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp2(top - base)
    weight = tl.exp2(part_top - base)
    return new_top, total * decay + part_total * weight, acc * decay[:, None] + part_acc * weight[:, None]


@triton.jit
def divide_rows(acc, total):
    """acc [R, W] / total [R]; 0 where the denominator is."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
