"""Memory formats: which parameters `nn.Module.to(memory_format=)` may lay out anew."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["without_layout"]


def without_layout(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply` over tensors seen as matrices: it moves and casts them, and keeps their layout.

    For modules with tables of 4 or 5 axes that are no weights of a convolution: torch takes every such parameter for
    one, and `channels_last_3d` raises on 4 axes.
    """

    def over_matrix(tensor: Tensor) -> Tensor:
        return fn(tensor.flatten(0, -2)).view(tensor.shape) if tensor.ndim > 2 else fn(tensor)

    return over_matrix
