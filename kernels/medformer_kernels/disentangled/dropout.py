"""Which weights dropout keeps: a hash of (seed, batch and head, query, key), the same in PyTorch and in the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_mask", "threshold"]

_WORD = 0xFFFFFFFF


def threshold(dropout: float) -> int:
    """A weight is dropped where its 31-bit number lies below this."""
    return round(dropout * 2**31)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit of the result hangs on every bit of `x`.

    Source: the constants are those of C. Wellons' `lowbias32`, found by search for the least bias.
    """
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _WORD
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def keep_mask(
    seed: Tensor,
    dropout: float,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    head0: int = 0,
    row0: int = 0,
    key0: int = 0,
) -> Tensor:
    """Bool (B, H, N, S) or, for the head `head0` of all B H and rows from `row0` on, (N, S): True = kept."""
    rows, keys = shape[-2:]
    heads = torch.arange(head0, head0 + (shape[0] * shape[1] if len(shape) == 4 else 1), device=device)
    i = torch.arange(row0, row0 + rows, device=device)
    stream = _mixed((heads ^ (seed & _WORD)) & _WORD)[:, None]
    by_row = _mixed(stream ^ i)
    number = _mixed(by_row[..., None] ^ torch.arange(key0, key0 + keys, device=device)) >> 1
    return (number >= threshold(dropout)).view(shape)
