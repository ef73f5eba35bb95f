"""What each branch is multiplied by: its elements and its sequences have the places (branch, sequence, element + 1)
and (branch, sequence, 0) of `_dropout`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medformer_kernels._dropout import kept

__all__ = ["ATTENTION", "MLP", "factor"]

ATTENTION, MLP = 0, 1
"""The two branches of a block."""


def factor(
    seed: Tensor | None, branch: int, first: int, shape: tuple[int, int, int], dropout: float, drop_path: float
) -> Tensor | None:
    """What a branch of sequences first, first + 1, ... is multiplied by: (s, n, c) or (s, 1, 1) float32, None for 1."""
    if seed is None:
        return None
    sequences, tokens, width = shape
    place = (branch, (first, first + sequences))
    result = torch.ones((), device=seed.device)
    if drop_path:
        result = result * (kept(seed, drop_path, *place, 0).view(-1, 1, 1) / (1.0 - drop_path))
    if dropout:
        result = result * (kept(seed, dropout, *place, (1, tokens * width + 1)).view(shape) / (1.0 - dropout))
    return result
