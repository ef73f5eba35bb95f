"""Windows over a grid of tokens, overlapping, padded and dilated as those of a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["window_grid", "windows"]


def window_grid(
    level: int, grid: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """How many windows there are along each axis of `grid`.

    Raises:
        ValueError: an axis is shorter than one window; names the level.
    """
    counts = []
    for size, k, s, p, d in zip(grid, kernel, stride, padding, dilation, strict=True):
        reach = d * (k - 1) + 1
        if size + 2 * p < reach:
            below = "voxels" if level == 0 else f"tokens of level {level - 1}"
            raise ValueError(
                f"TNT: level {level}: a window reaching over {reach} {below} does not fit the grid {tuple(grid)} with "
                f"padding {p}; give a larger input, or this level a smaller window"
            )
        counts.append((size + 2 * p - reach) // s + 1)
    return tuple(counts)


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """(B, *grid, P) to (B, *windows, n P): the n tokens of each window end to end, x fastest; 0 beyond the grid."""
    axes = len(kernel)
    if any(padding):
        x = F.pad(x, [0, 0, *(p for p in reversed(padding) for _ in range(2))])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(1 + axis, d * (k - 1) + 1, s)[..., ::d]
    # (B, *windows, P, *kernel)
    x = x.movedim(1 + axes, -1)
    return x.flatten(1 + axes)
