"""The pseudo-inverse and its gradient on a GPU, as products that one program a head works off (`inverse_kernels`).

The formulae are those of `inverse`, every step whole, Y = A Z not taken for symmetric:

    T2 = 15 I - Y (7 I - Y), T3 = 13 I - Y T2, Z <- Z T3 / 4, and at last out = Z X.

Back, with G the gradient of Z after a step: dT3 = Z^T G / 4, dT2 = -Y^T dT3,
dY = -dT3 T2^T - dT2 (7 I - Y)^T + Y^T dT2, dA += dY Z^T and dZ = G T3^T / 4 + A^T dY.
"""

# Triton's kernel[grid](...) is not the call that a type checker sees.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medformer_kernels._dispatch import Chip, tf32x3
from medformer_kernels._operators import constants
from medformer_kernels.nystrom.inverse import start, start_backward
from medformer_kernels.nystrom.inverse_kernels import nystrom_products_kernel
from medformer_kernels.nystrom.plans import inverse_tile

__all__ = ["solve", "solve_backward"]

_FIELDS = 14
# Slots of the scratch. Of the forward pass; Z takes turns with OTHER.
_A, _X, _OUT, _Y, _T2, _T3, _Z, _OTHER = range(8)
# More of the backward pass: dZ takes turns with OTHER; _Z is Z_0, and Z_1 to Z_n come last.
_DOUT, _DT2, _DY, _DA, _G = range(8, 13)
_WIDE = (_X, _OUT, _DOUT)
"""[L, W]; the others are [L, L]."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """out = factor x y + addend_factor addend + diagonal I; matrices by slot."""

    x: int
    y: int
    out: int
    x_transposed: bool = False
    y_transposed: bool = False
    factor: float = 1.0
    """A multiple of 1/4."""
    addend: int = 0
    addend_factor: int = 0
    diagonal: int = 0

    def fields(self, landmarks: int, width: int) -> list[int]:
        """As the kernel reads them."""
        leading_x, leading_y = (width if slot in _WIDE else landmarks for slot in (self.x, self.y))
        inner = landmarks if self.x_transposed else leading_x
        columns = landmarks if self.y_transposed else leading_y
        factors = (self.x, self.x_transposed, leading_x, self.y, self.y_transposed, leading_y)
        sums = (int(4 * self.factor), self.addend, self.addend_factor, self.diagonal)
        return [*factors, self.out, landmarks, inner, columns, *sums]


def _polynomials(z: int) -> Iterator[Product]:
    yield Product(x=_A, y=z, out=_Y)
    yield Product(x=_Y, y=_Y, out=_T2, addend=_Y, addend_factor=-7, diagonal=15)
    yield Product(x=_Y, y=_T2, out=_T3, factor=-1, diagonal=13)


def _forward(iterations: int) -> Iterator[Product]:
    z, other = _Z, _OTHER
    for _ in range(iterations):
        yield from _polynomials(z)
        yield Product(x=z, y=_T3, out=other, factor=0.25)
        z, other = other, z
    yield Product(x=z, y=_X, out=_OUT)


def _backward(iterations: int) -> Iterator[Product]:
    """Ends with dZ_0 in _G or _OTHER, as the number of iterations is even or odd, and dX in _OUT."""
    history = [_Z, *range(_G + 1, _G + 1 + iterations)]
    for z, after in itertools.pairwise(history):
        yield from _polynomials(z)
        yield Product(x=z, y=_T3, out=after, factor=0.25)
    yield Product(x=history[-1], y=_DOUT, out=_OUT, x_transposed=True)
    g, other = _G, _OTHER
    yield Product(x=_DOUT, y=_X, out=g, y_transposed=True)
    for step in reversed(range(iterations)):
        z = history[step]
        first = step == iterations - 1  # Y, T2 and T3 are still those of the last step made
        yield from () if first else _polynomials(z)
        yield Product(x=z, y=g, out=other, x_transposed=True, factor=0.25)
        yield Product(x=_Y, y=other, out=_DT2, x_transposed=True, factor=-1)
        yield Product(x=other, y=_T2, out=_DY, y_transposed=True, factor=-1, addend=_DT2, addend_factor=-7)
        yield Product(x=_DT2, y=_Y, out=_DY, y_transposed=True, addend=_DY, addend_factor=1)
        yield Product(x=_Y, y=_DT2, out=_DY, x_transposed=True, addend=_DY, addend_factor=1)
        yield Product(x=_DY, y=z, out=_DA, y_transposed=True, addend=_DA, addend_factor=int(not first))
        yield Product(x=g, y=_T3, out=other, y_transposed=True, factor=0.25)
        yield Product(x=_A, y=_DY, out=other, x_transposed=True, addend=other, addend_factor=1)
        g, other = other, g


@functools.cache
def _table(back: bool, iterations: int, landmarks: int, width: int) -> tuple[tuple[int, ...], ...]:
    products = _backward(iterations) if back else _forward(iterations)
    return tuple(tuple(p.fields(landmarks, width)) for p in products)


def _run(chip: Chip, given: dict[int, Tensor], iterations: int, back: bool) -> Tensor:
    """The scratch (B, H, slots, size) after every product."""
    a, x = given[_A], given[_X]
    landmarks, width = x.shape[-2:]
    table = constants(_table(back, iterations, landmarks, width), torch.int32, x.device)
    slots = _G + 1 + iterations if back else _OTHER + 1
    scratch = a.new_empty((*a.shape[:2], slots, landmarks * max(landmarks, width)))
    for slot, matrix in given.items():
        _matrix(scratch, slot, matrix.shape[-1], landmarks).copy_(matrix)
    entry = inverse_tile(chip)
    blocks = {"BLOCK": entry["block_m"], "BLOCK_K": entry["block_n"], "FIELDS": _FIELDS, "PRECISION": tf32x3(chip)}
    launch = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"]}
    sizes = (slots, scratch.shape[-1], table.shape[0])
    nystrom_products_kernel[(a.shape[0] * a.shape[1],)](scratch, table, *sizes, **blocks, **launch)
    return scratch


def _matrix(scratch: Tensor, slot: int, columns: int, landmarks: int) -> Tensor:
    return scratch[:, :, slot, : landmarks * columns].unflatten(-1, (landmarks, columns))


def solve(chip: Chip, a: Tensor, x: Tensor, iterations: int) -> Tensor:
    """pinv(a) x."""
    scratch = _run(chip, {_A: a, _X: x, _Z: start(a)}, iterations, back=False)
    # A copy always: a view would keep the whole scratch.
    return _matrix(scratch, _OUT, x.shape[-1], x.shape[-2]).clone(memory_format=torch.contiguous_format)


def solve_backward(chip: Chip, a: Tensor, x: Tensor, dout: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """(da, dx) of `solve`, as `inverse_times_backward` gives them."""
    number, width = x.shape[-2:]
    scratch = _run(chip, {_A: a, _X: x, _DOUT: dout, _Z: start(a)}, iterations, back=True)
    dstart = _matrix(scratch, _OTHER if iterations % 2 else _G, number, number)
    da = _matrix(scratch, _DA, number, number) if iterations else torch.zeros_like(a)
    dx = _matrix(scratch, _OUT, width, number).clone(memory_format=torch.contiguous_format)
    return start_backward(a, dstart, da), dx
