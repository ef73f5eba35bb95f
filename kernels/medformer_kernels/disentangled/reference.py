"""Disentangled attention as it is defined: a position vector for every pair of tokens. Also in float64; for small N."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medformer_kernels._dropout import kept
from medformer_kernels.disentangled.tables import Grid

__all__ = ["reference", "term_scores"]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: tuple[str, ...],
    *,
    scale: float,
    causal: bool,
    key_padding_mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    **positions,
) -> Tensor:
    """softmax over the keys of scale times the sum of `term_scores`, times v."""
    scores = torch.stack(list(term_scores(q, k, terms, **positions).values())).sum(0) * scale
    allowed = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None]
        v = v.masked_fill(~key_padding_mask[:, None, :, None], 0)
    without_key = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -math.inf).masked_fill(without_key, 0)
    p = scores.softmax(-1).masked_fill(~allowed, 0)
    if dropout > 0 and seed is not None:
        p = p * kept(seed, dropout, *((0, n) for n in p.shape)) / (1 - dropout)
    return p @ v


def term_scores(
    q: Tensor,
    k: Tensor,
    terms: tuple[str, ...],
    *,
    rel_k: list[Tensor] | None,
    rel_q: list[Tensor] | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    prefix_k: Tensor | None,
    prefix_q: Tensor | None,
    buckets: Tensor | None,
    grid: Grid | None,
) -> dict[str, Tensor]:
    """Each term's scores (B, H, N, S), before the scale.

    A position is a sum of parts: the absolute vector, and one relative vector an axis. Content meets every part. Of
    two positions the absolute part meets every part, and a relative part meets the one of its own axis (products
    across axes would need a table for pairs of distances).
    """
    key_parts = _relative(rel_k, prefix_k, buckets, grid, q.shape[2], k.shape[2])
    query_parts = _relative(rel_q, prefix_q, buckets, grid, q.shape[2], k.shape[2])

    def product(query: str, key: str) -> Tensor:
        total = q.new_zeros((*q.shape[:3], k.shape[2]))
        if query == "c" and key == "c":
            total = total + q @ k.mT
        if query == "c" and key == "p":
            total = total + (0 if pos_k is None else q @ pos_k.mT)
            for part in key_parts:
                total = total + torch.einsum("bhid,hijd->bhij", q, part)
        if query == "p" and key == "c":
            total = total + (0 if pos_q is None else pos_q @ k.mT)
            for part in query_parts:
                total = total + torch.einsum("hijd,bhjd->bhij", part, k)
        if query == "p" and key == "p":
            if pos_q is not None and pos_k is not None:
                total = total + pos_q @ pos_k.mT
            if pos_q is not None:
                for part in key_parts:
                    total = total + torch.einsum("...hid,hijd->...hij", pos_q, part)
            if pos_k is not None:
                for part in query_parts:
                    total = total + torch.einsum("hijd,...hjd->...hij", part, pos_k)
            for one, other in zip(query_parts, key_parts, strict=False):
                total = total + torch.einsum("hijd,hijd->hij", one, other)
        return total

    scores = {}
    for term in terms:
        left, right = term.split("2")
        scores[term] = torch.stack([product(one, other) for one in left for other in right]).sum(0)
    return scores


def _relative(
    tables: list[Tensor] | None,
    prefix_table: Tensor | None,
    buckets: Tensor | None,
    grid: Grid | None,
    queries: int,
    keys: int,
) -> list[Tensor]:
    """The position vector of every pair, (H, N, S, D), one tensor an axis; prefix tokens' own in the first."""
    if tables is None:
        return []
    if grid is None:
        assert buckets is not None
        i, j = (torch.arange(n, device=buckets.device) for n in (queries, keys))
        return [tables[0][:, buckets[i[:, None] - j + keys - 1].long()]]
    p, parts = grid.prefix, []
    for table, size, c in zip(tables, grid.size, grid.coordinates(tables[0].device), strict=True):
        part = table.new_zeros(table.shape[0], queries, keys, table.shape[-1])
        part[:, p:, p:] = table[:, c[:, None] - c + size - 1]
        parts.append(part)
    if p and prefix_table is not None:
        parts[0][:, :, :p] = prefix_table[:, 0].unsqueeze(1)
        parts[0][:, :p, p:] = prefix_table[:, 1].unsqueeze(2)
    return parts
