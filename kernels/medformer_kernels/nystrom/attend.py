"""Softmax attention in float32 on a CPU, one head at a time: what is left of it are matrix products (`product`).

For the two attentions of Nystrom's, of few queries and of few keys. Scores exist for a tile of some queries and keys
and are made again backward; their exponents are in base 2 (`torch.exp2` takes a fifth of the time of `torch.exp`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from medformer_kernels._operators import operator
from medformer_kernels._products import one_by_one, product

__all__ = ["attend_by_head", "attends_by_head"]

# Scores in one tile, and how many of the longer axis at least.
_TILE_VALUES, _LEAST = 1 << 20, 256
_LOG2E = math.log2(math.e)


def attends_by_head(q: Tensor, k: Tensor) -> bool:
    return q.is_cpu and q.dtype == torch.float32 and one_by_one(q.shape[2], q.shape[3], k.shape[2])


def _fake(q, k, v, key_valid):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])


@operator("attend_by_head", _fake, public="nystrom_attention", samples=("q", "k", "v", "key_valid"))
def attend_by_head(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(softmax(q k^T / sqrt(D)) v, log2 of its denominator (B, H, N)) over the keys of `key_valid` (B, S); 0 without
    any."""
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])
    for b, h, queries, key_blocks in _tiles(q, k):
        top, total, sums = q.new_full((), -math.inf), q.new_zeros(()), q.new_zeros(())
        for keys in key_blocks:
            scores = _scores(q[b, h, queries], k[b, h, keys], None if key_valid is None else key_valid[b, keys])
            old, top = top, torch.maximum(top, scores.amax(-1))
            base = top.masked_fill(top == -math.inf, 0)
            weights = scores.sub_(base.unsqueeze(-1)).exp2_()
            kept = (old - base).exp2_()
            total = total * kept + weights.sum(-1)
            sums = sums * kept.unsqueeze(-1) + product(weights, v[b, h, keys])
        out[b, h, queries] = sums / total.masked_fill(total == 0, 1).unsqueeze(-1)
        lse[b, h, queries] = (base + total.log2()).masked_fill_(total == 0, math.inf)  # then every weight is 0
    return out, lse


def _backward_fake(q, k, v, key_valid, out, lse, dout):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operator(
    "attend_by_head_backward",
    _backward_fake,
    public="nystrom_attention",
    gradient=True,
    samples=("q", "k", "v", "key_valid", "out", "lse", "dout"),
)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[3] ** -0.5
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for b, h, queries, key_blocks in _tiles(q, k):
        q_block, dout_block = q[b, h, queries], dout[b, h, queries].contiguous()
        delta = (dout_block * out[b, h, queries]).sum(-1, keepdim=True)
        for keys in key_blocks:
            k_block = k[b, h, keys]
            scores = _scores(q_block, k_block, None if key_valid is None else key_valid[b, keys])
            weights = scores.sub_(lse[b, h, queries].unsqueeze(-1)).exp2_()
            _add(dv[b, h, keys], product(weights.mT, dout_block), 1.0, queries.start == 0)
            dscores = product(dout_block, v[b, h, keys].mT).sub_(delta).mul_(weights)
            _add(dq[b, h, queries], product(dscores, k_block), scale, keys.start == 0)
            _add(dk[b, h, keys], product(dscores.mT, q_block), scale, queries.start == 0)
    return dq, dk, dv


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


attend_by_head.register_autograd(
    lambda ctx, dout, _: (*_backward(*ctx.saved_tensors, dout), None), setup_context=_setup
)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice, list[slice]]]:
    """(sample, head, queries, blocks of keys) of what has one softmax."""
    tokens_q, tokens_k = q.shape[2], k.shape[2]
    size_k = min(tokens_k, max(_LEAST, _TILE_VALUES // min(tokens_q, _LEAST)))
    size_q = max(_LEAST, _TILE_VALUES // size_k)
    blocks = [slice(start, start + size_k) for start in range(0, tokens_k, size_k)]
    for b, h, start in itertools.product(range(q.shape[0]), range(q.shape[1]), range(0, tokens_q, size_q)):
        yield b, h, slice(start, start + size_q), blocks


def _add(out: Tensor, x: Tensor, factor: float, first: bool) -> None:
    """out += factor x, or without `out` the first time: zeros would cost a pass of their own."""
    if first:
        torch.mul(x, factor, out=out)
    else:
        out.add_(x, alpha=factor)


def _scores(q: Tensor, k: Tensor, key_valid: Tensor | None) -> Tensor:
    """In base 2. The shorter of both is scaled: it costs less than the scores."""
    factor = _LOG2E * q.shape[1] ** -0.5
    scores = product(q * factor, k.mT) if q.shape[0] <= k.shape[0] else product(q, k.mT * factor)
    return scores if key_valid is None else scores.masked_fill_(~key_valid, -math.inf)
