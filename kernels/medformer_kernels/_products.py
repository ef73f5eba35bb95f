"""Matrix products on a CPU at the speed it has.

PyTorch multiplies float32 matrices with MKL, which takes its AVX2 kernels on a CPU that is not Intel's: 107 GFLOP/s on
one core of an AMD EPYC with AVX-512, where oneDNN, which PyTorch holds too, makes 230. oneDNN is reached through the
operator to which torch.compile lowers linear layers; where there is none, and for matrices too small to be worth the
call, these functions are `@`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medformer_kernels._operators import followed, operator
from medformer_kernels._tracing import certain, constant

__all__ = ["ONEDNN", "multiply", "one_by_one", "product", "worth_a_call"]

# (x, weight, bias, "none", [], "") to a linear layer's output; None where PyTorch was built without it.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Multiplications of a product from which oneDNN's call costs less than it saves.
_LEAST = 1 << 21
# The same for each of a batch where there are threads: MKL wakes them once for all products, a loop once for each.
_LEAST_OF_MANY = 1 << 25


def worth_a_call(rows: int, inner: int, columns: int) -> bool:
    """Whether a product of this size is better made by oneDNN.

    False for sizes that a graph leaves open: a graph with a branch by their product would serve one side of it only.
    """
    return ONEDNN is not None and certain(rows * inner * columns >= _LEAST)


def one_by_one(rows: int, inner: int, columns: int) -> bool:
    """Whether products of this size are better made by oneDNN one by one than in a batch; see `worth_a_call`."""
    if ONEDNN is None:
        return False
    return certain(rows * inner * columns >= (_LEAST if _threads() == 1 else _LEAST_OF_MANY))


@constant  # torch.compile cannot trace it
def _threads() -> int:
    return torch.get_num_threads()


def product(x: Tensor, y: Tensor) -> Tensor:
    """x (..., n, k) times y (..., k, m); no autograd."""
    n, k, m = x.shape[-2], x.shape[-1], y.shape[-1]
    alone = x.numel() == n * k
    if not (x.is_cpu and x.dtype == torch.float32 and (worth_a_call if alone else one_by_one)(n, k, m)):
        return x @ y
    if alone:
        return _linear(x.reshape(n, k), y.reshape(k, m)).view(*x.shape[:-1], m)
    pairs = zip(x.reshape(-1, n, k), y.reshape(-1, k, m), strict=True)
    return torch.stack([_linear(*pair) for pair in pairs]).view(*x.shape[:-1], m)


def _product_fake(x, y):
    return x.new_empty((*x.shape[:-1], y.shape[-1]))


@operator("product", _product_fake, public="nystrom_pinv", definition="x @ y", samples=("x", "y"))
def _product(x: Tensor, y: Tensor) -> Tensor:
    return product(x, y).contiguous()


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """`product` for code that torch.compile traces (one operator for all matrices) or autograd may follow (`@`)."""
    large = one_by_one(x.shape[-2], x.shape[-1], y.shape[-1])
    return _product(x, y) if x.is_cpu and large and not followed(x, y) else x @ y


def _linear(x: Tensor, y: Tensor) -> Tensor:
    """x y as a linear layer, whose weights may have any strides while x must be contiguous: where x is the transpose of
    a large matrix, (y^T x^T)^T costs less than a copy of it."""
    assert ONEDNN is not None
    if not x.is_contiguous() and x.mT.is_contiguous() and y.shape[1] < x.shape[0]:
        return ONEDNN(y.mT, x, None, "none", [], "").mT
    return ONEDNN(x, y.mT, None, "none", [], "")
