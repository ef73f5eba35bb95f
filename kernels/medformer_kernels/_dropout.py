"""What dropout drops: a hash of seed and place, the same in PyTorch and in the kernels (`_triton` holds its twin).

h(u) is a bijection of 32-bit words (Wellons 2018, "lowbias32"). A place is a row of words, as (sample, head, query,
key); its number is folded over them, k <- h(k ^ h(word + g)), from k = h(low ^ h(high + g)) of the seed, g the golden
ratio. Words and seeds of equal values thus stand for different places. A place is dropped where the upper 31 bits of
its number is below p 2^31. Nothing else matters: not tiles, chunks or threads.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["kept", "seed_tensor", "threshold"]

_WORD, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9
Word = TypeVar("Word", Tensor, int)


def seed_tensor(function: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """`seed` as an int64 tensor () on `device`; None draws one from torch's generator.

    Raises:
        ValueError: it is out of range, or a tensor that is not what it must be.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"{function}: seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; a tensor must be "
                f"int64 of one element on {device}"
            )
        return seed.reshape(())
    if seed is None:
        return torch.randint(2**62, (), device=device)
    if not 0 <= seed < 2**63:
        raise ValueError(f"{function}: seed={seed} must be at least 0 and below 2**63")
    return torch.full((), seed, dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Places whose 31-bit number is below it are dropped."""
    return min(round(p * 2**31), 2**31 - 1)


def kept(seed: Tensor, p: float, *words: int | tuple[int, int]) -> Tensor:
    """Bool, True = kept, of the places with these words; (start, stop) are those of an axis of the result."""
    axes = sum(isinstance(word, tuple) for word in words)
    number = _hash(seed ^ _hash((seed >> 32) + _GOLDEN))
    for word in words:
        if isinstance(word, tuple):
            axes -= 1
            each = torch.arange(*word, device=seed.device).view(-1, *[1] * axes)
            number = _hash(number ^ _hash(each + _GOLDEN))
        else:
            number = _hash(number ^ _hash(word + _GOLDEN))
    return number >> 1 >= threshold(p)


def _hash(u: Word) -> Word:
    u = u & _WORD
    u = u ^ (u >> 16)
    u = (u * 0x7FEB352D) & _WORD
    u = u ^ (u >> 15)
    u = (u * 0x846CA68B) & _WORD
    return u ^ (u >> 16)
