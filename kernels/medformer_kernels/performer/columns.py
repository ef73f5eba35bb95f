"""Device code for heads wider than a tile: tiles of rows, BLOCK_D columns at a time.

Rows are named by a tuple `at`: (pointer, first row, row stride, rows of the tile, column stride, which of them exist).
Kernels hold the first BLOCK_D columns of their operands, which of narrow heads are all; these functions read the others
from memory where they need them, and a program writes one block of columns of its output (`split_columns`). So the
registers of a program do not grow with the head.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import load_rows, store_rows


@triton.jit
def split_columns(pid, COLUMNS: tl.constexpr):
    """(the program without its last axis, which of COLUMNS blocks of columns it writes)."""
    if COLUMNS == 1:
        return pid, 0
    else:
        return pid // COLUMNS, pid % COLUMNS


@triton.jit
def load_tile(at, offs_d, D):
    """Columns offs_d of the rows; 0 where either is not there."""
    X, row0, stride, offs, stride_d, ok = at
    return load_rows(X, row0, stride, offs, offs_d, stride_d, ok, offs_d < D)


@triton.jit
def store_tile(at, offs_d, D, x):
    X, row0, stride, offs, stride_d, ok = at
    store_rows(X, row0, stride, offs, offs_d, stride_d, ok, offs_d < D, x)


@triton.jit
def product(x, y, x_at, y_at, offs_d, D: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T over all D columns, of which x and y hold those of offs_d, the first."""
    result = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    for d0 in tl.static_range(offs_d.shape[0], D, offs_d.shape[0]):
        x_d = load_tile(x_at, d0 + offs_d, D).to(x.dtype)
        y_d = load_tile(y_at, d0 + offs_d, D).to(y.dtype)
        result = tl.dot(x_d, tl.trans(y_d), result, input_precision=PRECISION)
    return result


@triton.jit
def row_products(x, y, x_at, y_at, offs_d, D: tl.constexpr):
    """sum_d x_nd y_nd over all D columns, of which x and y hold those of offs_d, the first."""
    result = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    for d0 in tl.static_range(offs_d.shape[0], D, offs_d.shape[0]):
        x_d = load_tile(x_at, d0 + offs_d, D).to(tl.float32)
        y_d = load_tile(y_at, d0 + offs_d, D).to(tl.float32)
        result += tl.sum(x_d * y_d, 1)
    return result


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
