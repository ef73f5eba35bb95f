"""How far from float64 a kernel may be."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def assert_as_good_as_pytorch(
    made: Iterable[Tensor], plain: Iterable[Tensor], exact: Iterable[Tensor], names: Iterable[str]
) -> None:
    """FlashAttention's rule: each result at most twice as far from the exact one as plain PyTorch's in its dtype.

    The most that rounding the exact result to that dtype can cost counts as nothing, and so do a few units of the
    float32 that kernels compute in, where plain PyTorch happens to be nearly exact: of the result, or of inputs of
    size 1 where terms of that size cancel. Distances are Euclidean.
    """
    eps = torch.finfo(torch.float32).eps
    for name, mine, usual, right in zip(names, made, plain, exact, strict=True):
        free = torch.finfo(mine.dtype).eps / 2 * right.norm() + eps * (4 * right.norm() + right.numel() ** 0.5)
        error, allowed = (mine - right).norm(), 2 * (usual - right).norm() + free
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} of {right.norm():.3g}"
