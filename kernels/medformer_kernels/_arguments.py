"""Checks of arguments that several families take: boundaries of documents, and the order of the axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

__all__ = ["boundaries", "order_hint"]


def boundaries(
    cu_seqlens: Tensor | Sequence[int] | None, tokens: int, fail: Callable[[str], NoReturn], *, empty: bool
) -> list[int] | None:
    """`cu_seqlens` as numbers: where documents begin, and the end of the last, `tokens`.

    A tensor is read on the host, which waits for its device; a list or tuple is not. `empty` documents may be allowed.
    """
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            shape = tuple(cu_seqlens.shape)
            fail(f"cu_seqlens is {cu_seqlens.dtype} of shape {shape}; it must be int32 or int64 (documents + 1,)")
        cuts = cu_seqlens.tolist()
    else:
        whole = isinstance(cu_seqlens, list | tuple) and all(
            isinstance(cut, int | torch.SymInt) and not isinstance(cut, bool) for cut in cu_seqlens
        )
        if not whole:
            fail(f"cu_seqlens={cu_seqlens!r} must be a list or tuple of whole numbers, or a tensor of them")
        cuts = list(cu_seqlens)
    falls = any(start > end or (start == end and not empty) for start, end in pairwise(cuts))
    if len(cuts) < (1 if empty else 2) or cuts[0] != 0 or cuts[-1] != tokens or falls:
        fail(f"cu_seqlens={cuts} must rise from 0 to the {tokens} tokens")
    return cuts


def order_hint(x: Tensor, tokens: int) -> str:
    """What an error about a number of tokens adds where x (B, H, tokens, width) has that many on the axis of heads."""
    if tokens != x.shape[1] or tokens == x.shape[2]:
        return ""
    return f"; axis 1 of {tuple(x.shape)} is that long: transpose(1, 2) what is (B, tokens, H, width)"
