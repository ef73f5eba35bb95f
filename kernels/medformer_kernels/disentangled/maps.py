"""What a head looks at, and which term made it: written out for chosen queries only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medformer_kernels.disentangled.arguments import Call
from medformer_kernels.disentangled.tables import operands
from medformer_kernels.disentangled.terms import Weights

__all__ = ["Maps", "maps"]


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Attention of chosen queries (Q of them)."""

    weights: Tensor
    """(B, H, Q, S): after the softmax."""
    terms: dict[str, Tensor]
    """(B, H, Q, S) by term: what it adds to the score, scale included; their sum is the score."""

    def share(self) -> dict[str, Tensor]:
        """(B, H) by term: its part of the variation of the scores under the weights, from their covariance; parts sum
        to 1 and one that works against the others is negative."""
        score = torch.stack(list(self.terms.values())).sum(0)
        centred = score - (self.weights * score).sum(-1, keepdim=True)
        total = (self.weights * centred * centred).sum((-2, -1))
        total = total.masked_fill(total == 0, 1)
        return {name: (self.weights * centred * x).sum((-2, -1)) / total for name, x in self.terms.items()}


def maps(call: Call, queries: Tensor) -> Maps:
    """The maps of `queries` (Q,) of one call, in at least float32. Memory: B H Q S numbers a term."""
    exact = torch.promote_types(call.q.dtype, torch.float32)

    def cast(x):
        return None if x is None else [y.to(exact) for y in x] if isinstance(x, list) else x.to(exact)

    names = ("q", "k", "rel_k", "rel_q", "pos_q", "pos_k", "prefix_k", "prefix_q")
    call = replace(call, **{name: cast(getattr(call, name)) for name in names})
    none = Weights(cc=0, cp=0, pc=0, pp=0)
    pairs = {one + other for term in call.terms for one in term.split("2")[0] for other in term.split("2")[1]}
    products = {pair: _scores(call, replace(none, **{pair: 1}), queries) * call.scale for pair in pairs}
    terms = {}
    for term in call.terms:
        left, right = term.split("2")
        terms[term] = torch.stack([products[one + other] for one in left for other in right]).sum(0)
    scores = torch.stack(list(terms.values())).sum(0)
    keys = torch.arange(scores.shape[-1], device=queries.device)
    absent = keys > queries[:, None] if call.causal else torch.zeros_like(scores, dtype=torch.bool)
    if call.mask is not None:
        absent = absent | ~call.mask[:, None, None]
    absent = absent.expand(scores.shape)
    without_key = absent.all(-1, keepdim=True)
    weights = scores.masked_fill(absent, -math.inf).masked_fill(without_key, 0).softmax(-1).masked_fill(absent, 0)
    return Maps(weights=weights, terms=terms)


def _scores(call: Call, weights: Weights, queries: Tensor) -> Tensor:
    """(B, H, Q, S) of one product, without the scale."""
    x = operands(call.q, call.k, weights, **call.positions)
    scores = x.q[:, :, queries] @ x.k.mT
    if call.grid is not None:
        one_hot = call.grid.one_hot(x.q)
        if x.t is not None:
            scores = scores + x.t[:, :, queries] @ one_hot.mT
        if x.u is not None:
            scores = scores + one_hot[queries] @ x.u.mT
    elif call.buckets is not None:
        keys = x.k.shape[2]
        index = call.buckets.long()[queries[:, None] - torch.arange(keys, device=queries.device) + keys - 1]
        index = index.expand(*scores.shape[:2], -1, -1)
        if x.t is not None:
            scores = scores + x.t[:, :, queries].gather(3, index)
        if x.u is not None:
            scores = scores + x.u.gather(3, index.mT).mT
    return scores
