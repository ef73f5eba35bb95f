"""Device code that kernel families share: tiles of rows in and out of memory, steps of a softmax, what is dropped."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

LOG2E = tl.constexpr(1.4426950408889634)


@functools.lru_cache(maxsize=None, typed=True)
def constexprs(meta: Any) -> Any:
    """The constants of a launch, a NamedTuple, each as a `tl.constexpr`: Triton 3.6 takes no bare ones from a tuple."""
    return meta if isinstance(moved, InterpretedFunction) else type(meta)(*map(tl.constexpr, meta))


class Rows(NamedTuple):
    """A tensor (B, H, N, D) as a kernel takes it: where it begins and its strides; 0 and 1 of axes that it lacks."""

    data: Any
    b: int = 0
    h: int = 0
    n: int = 0
    d: int = 1


def rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride())


def mask_rows(mask: Tensor | None, unused: Tensor) -> Rows:
    """A mask (B, N) as bytes; without one, what the kernel does not read."""
    return Rows(unused) if mask is None else Rows(mask.view(torch.uint8), b=mask.stride(0), n=mask.stride(1))


@triton.jit
def moved(x, offset):
    """The rows of x, `offset` further on."""
    return Rows(x.data + offset, x.b, x.h, x.n, x.d)


@triton.jit
def head_of(bh, H):
    """(b, h, bh) in 64 bits of head bh, divided in 32: a division of 64 bits takes a hundred instructions."""
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), bh.to(tl.int64)


@triton.jit
def of_head(x, b, h):
    return moved(x, b * x.b + h * x.h)


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


@triton.jit
def _hash(u):
    u = u ^ (u >> 16)
    u = u * 0x7FEB352D
    u = u ^ (u >> 15)
    u = u * 0x846CA68B
    return u ^ (u >> 16)


@triton.jit
def fold_seed(SEED):
    """The number of a seed in memory, over which words are folded: see `_dropout`."""
    seed = tl.load(SEED)
    return _hash((seed & 0xFFFFFFFF).to(tl.uint32) ^ _hash((seed >> 32).to(tl.uint32) + 0x9E3779B9))


@triton.jit
def fold(number, word):
    return _hash(number ^ _hash(word.to(tl.uint32) + 0x9E3779B9))


@triton.jit
def kept(number, threshold):
    return (number >> 1).to(tl.int32) >= threshold


# Inside a kernel Triton's language, not Python's, gives operators and indexing their types.
# pyright: reportOperatorIssue=false, reportArgumentType=false
