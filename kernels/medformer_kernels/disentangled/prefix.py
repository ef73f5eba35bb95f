"""Class and register tokens: few rows and columns, in plain PyTorch; the kernels handle the grid only.

The prefix queries read every key through a dense matrix of P x S; what the queries of the grid read from the prefix
keys (N x P) is merged with the kernel's result by log-sum-exp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medformer_kernels import _dropout
from medformer_kernels.disentangled.arguments import Call
from medformer_kernels.disentangled.ops import disentangled_forward
from medformer_kernels.disentangled.tables import Operands

__all__ = ["attend_with_prefix"]


def attend_with_prefix(call: Call, x: Operands) -> Tensor:
    """softmax over prefix and grid, for all queries."""
    assert call.grid is not None
    p = call.grid.prefix
    exact = torch.promote_types(x.q.dtype, torch.float32)
    q, k, v = x.q.to(exact), x.k.to(exact), call.v.to(exact)
    t, u = (None if y is None else y.to(exact) for y in (x.t, x.u))
    kept = None
    if call.dropout > 0 and call.seed is not None:
        batch, heads, tokens = ((0, n) for n in q.shape[:3])
        rows = _dropout.kept(call.seed, call.dropout, batch, heads, (0, p), tokens)
        columns = _dropout.kept(call.seed, call.dropout, batch, heads, (p, tokens[1]), (0, p))
        kept = tuple(y.to(exact) / (1 - call.dropout) for y in (rows, columns))

    # prefix queries, all keys
    scores = q[:, :, :p] @ k.mT
    if t is not None:
        scores = scores + t[:, :, :p] @ call.grid.one_hot(t).mT
    if u is not None:
        scores = scores + u[..., :p].mT
    scores = scores * call.scale
    absent = torch.zeros(p, k.shape[2], dtype=torch.bool, device=q.device)
    if call.causal:
        absent = torch.ones_like(absent).triu(1)
    if call.mask is not None:
        absent = absent | ~call.mask[:, None, None]
        v = v.masked_fill(~call.mask[:, None, :, None], 0)
    absent = absent.expand(scores.shape)
    without_key = absent.all(-1, keepdim=True)
    weights = scores.masked_fill(absent, -math.inf).masked_fill(without_key, 0).softmax(-1).masked_fill(absent, 0)
    first = (weights if kept is None else weights * kept[0]) @ v

    # queries of the grid: prefix keys, and the kernel for the rest
    grid = [0, *call.grid.size]
    inner, lse = disentangled_forward(
        x.q[:, :, p:], x.k[:, :, p:], call.v[:, :, p:], None if x.t is None else x.t[:, :, p:, p:],
        None if x.u is None else x.u[:, :, p:, p:], None, None if call.mask is None else call.mask[:, p:], call.seed,
        grid, call.scale, call.causal, call.dropout, p, "triton",
    )  # fmt: skip
    scores = q[:, :, p:] @ k[:, :, :p].mT
    if t is not None:
        scores = scores + t[:, :, p:, :p]
    if u is not None:  # all z columns of a prefix key are the same
        scores = scores + u[:, :, None, :p, p]
    scores = scores * call.scale
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask[:, None, None, :p], -math.inf)
    # Shifted by hand: logsumexp of keys that are all padded has no gradient.
    top = torch.maximum(scores.detach().amax(-1), lse.detach()).unsqueeze(-1)
    top = top.masked_fill(top == -math.inf, 0)
    weights, share = (scores - top).exp(), (lse.unsqueeze(-1) - top).exp()
    total = weights.sum(-1, keepdim=True) + share
    rest = inner * share + (weights if kept is None else weights * kept[1]) @ v[:, :, :p]
    rest = rest / total.masked_fill(total == 0, 1)
    return torch.cat((first, rest), 2).to(x.q.dtype)
