"""Which elements and which sequences a branch drops: a hash of seed and place, so that every implementation agrees.

h(u) is a bijection of 32-bit numbers (Wellons 2018, "lowbias32"). With the key of a branch,
k = h(low(seed) ^ h(high(seed) + branch)), and of a sequence, k_s = h(k + s), its element e is dropped where
h(k_s ^ h(e + 1)) < p 2^32, the whole sequence where h(k_s ^ h(0)) is below (both in steps of 2). What is dropped
depends on nothing else: not on tiles, chunks or threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ATTENTION", "MLP", "factor", "threshold"]

ATTENTION, MLP = 0, 1
"""The two branches of a block."""
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The hashes whose upper 31 bits are below it are dropped."""
    return min(round(p * 2**31), 2**31 - 1)


def factor(
    seed: Tensor | None, branch: int, first: int, shape: tuple[int, int, int], dropout: float, drop_path: float
) -> Tensor | None:
    """What a branch of sequences first, first + 1, ... is multiplied by: (s, n, c) or (s, 1, 1) float32, None for 1."""
    if seed is None:
        return None
    sequences, tokens, width = shape
    device = seed.device
    key = _hash((seed & _LOW) ^ _hash((seed >> 32) + branch))
    keys = _hash(key + torch.arange(first, first + sequences, device=device)).view(-1, 1, 1)
    result = torch.ones((), device=device)
    if drop_path:
        whole = _hash(keys ^ _hash(torch.zeros_like(seed)))
        result = result * ((whole >> 1 >= threshold(drop_path)) / (1.0 - drop_path))
    if dropout:
        places = torch.arange(1, tokens * width + 1, device=device).view(1, tokens, width)
        result = result * ((_hash(keys ^ _hash(places)) >> 1 >= threshold(dropout)) / (1.0 - dropout))
    return result


def _hash(u: Tensor) -> Tensor:
    """lowbias32 of int64 tensors that hold 32-bit numbers."""
    u = u & _LOW
    u = u ^ (u >> 16)
    u = (u * 0x7FEB352D) & _LOW
    u = u ^ (u >> 15)
    u = (u * 0x846CA68B) & _LOW
    return u ^ (u >> 16)
