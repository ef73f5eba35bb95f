"""The Triton kernel of the pseudo-inverse: one program works off all products of one head; see `products` for which.

A float32 matrix of 256 x 256 is 256 KB: more than a program holds on chip. Matrices are in a scratch of the program's
own, and a product walks over blocks of it. So what some threads of a program write others read, through global memory.
Why that is right: `tl.debug_barrier` is a barrier of all threads of the program (bar.sync in PTX: what was accessed
before it is performed for every thread behind it, in global memory too: PTX ISA, "bar, barrier"). A product reads only
what lies behind a barrier, and writes only what nothing else reads before the next one. Loads are plain ones: not
through the read-only cache (ld.global.nc), which is not coherent, and not fetched ahead (one stage), which could pass a
barrier. No other program touches the scratch. `tests/test_nystrom_compile.py` reads barrier and loads in the PTX.
"""

import triton
import triton.language as tl

from medformer_kernels._triton import load_rows, store_rows


@triton.jit
def _operand(X, transposed, leading, row0, column0, rows, columns, BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr):
    """A block of X, or of its transpose, whose rows are `leading` apart; loaded along its rows either way."""
    row, column = tl.arange(0, BLOCK_ROW), tl.arange(0, BLOCK_COLUMN)
    row_ok, column_ok = row0 + row < rows, column0 + column < columns
    if transposed != 0:
        block = tl.trans(load_rows(X + row0, column0, leading, column, row, 1, column_ok, row_ok))
    else:
        block = load_rows(X + column0, row0, leading, row, column, 1, row_ok, column_ok)
    return block


@triton.jit(do_not_specialize=["slots", "size", "number"])
def nystrom_products_kernel(
    MATRICES, PRODUCTS, slots, size, number,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, FIELDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT = factor X Y + addend ADDEND + diagonal I for each row of PRODUCTS, on the matrices of one head.

    MATRICES [slots, size] of each head; X, Y, ADDEND and OUT are slots. PRODUCTS holds `products.Product.fields`.
    """
    MATRICES += tl.program_id(0).to(tl.int64) * slots * size
    offs = tl.arange(0, BLOCK)
    for step in range(0, number):
        fields = PRODUCTS + step * FIELDS
        X = MATRICES + tl.load(fields).to(tl.int64) * size
        x_transposed, x_leading = tl.load(fields + 1), tl.load(fields + 2)
        Y = MATRICES + tl.load(fields + 3).to(tl.int64) * size
        y_transposed, y_leading = tl.load(fields + 4), tl.load(fields + 5)
        OUT = MATRICES + tl.load(fields + 6).to(tl.int64) * size
        rows, inner, columns = tl.load(fields + 7), tl.load(fields + 8), tl.load(fields + 9)
        factor = tl.load(fields + 10).to(tl.float32) * 0.25
        ADDEND = MATRICES + tl.load(fields + 11).to(tl.int64) * size
        addend, diagonal = tl.load(fields + 12).to(tl.float32), tl.load(fields + 13).to(tl.float32)
        column_blocks = tl.cdiv(columns, BLOCK)
        for block in range(0, tl.cdiv(rows, BLOCK) * column_blocks):
            row0 = block // column_blocks * BLOCK
            column0 = block % column_blocks * BLOCK
            acc = tl.zeros([BLOCK, BLOCK], tl.float32)
            for k0 in range(0, inner, BLOCK_K):
                x = _operand(X, x_transposed, x_leading, row0, k0, rows, inner, BLOCK, BLOCK_K)
                y = _operand(Y, y_transposed, y_leading, k0, column0, inner, columns, BLOCK_K, BLOCK)
                acc = tl.dot(x, y, acc, input_precision=PRECISION)
            acc *= factor
            acc += tl.where((row0 + offs)[:, None] == (column0 + offs)[None, :], diagonal, 0.0)
            column_ok = column0 + offs < columns
            # An addend of 0 is not read: it may never have been written.
            read = row0 + offs < tl.where(addend != 0.0, rows, 0)
            acc += addend * load_rows(ADDEND + column0, row0, columns, offs, offs, 1, read, column_ok)
            store_rows(OUT + column0, row0, columns, offs, offs, 1, row0 + offs < rows, column_ok, acc)
        tl.debug_barrier()


# Inside a kernel Triton's language, not Python's, gives operators, calls and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
