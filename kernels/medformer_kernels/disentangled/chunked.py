"""Disentangled attention in plain PyTorch, a block of queries of one head at a time: flat memory, no N x N.

Float16 and bfloat16 are computed in float32. See `ops` for what it computes.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from medformer_kernels._dropout import kept
from medformer_kernels.disentangled.bias import BucketBias, GridBias, NoBias
from medformer_kernels.disentangled.tables import Grid, Inputs

__all__ = ["backward", "forward"]

# Numbers in a block of scores: what a core's second-level cache holds.
_BLOCK = 1 << 18
# Scores are in base 2: exp2 takes a tenth of the time of exp.
_LOG2E = 1 / math.log(2)


def _bias(x: Inputs) -> NoBias:
    queries = x.q.shape[2]
    if x.buckets is not None:
        return BucketBias.of(queries, x.buckets.long())
    if x.grid:
        prefix, gz, gy, gx = x.grid
        return GridBias(queries=queries, grid=Grid(size=(gz, gy, gx), prefix=prefix))
    return NoBias(queries=queries)


class _Head:
    """One head of the inputs in the dtype of the sums, as its blocks read them."""

    def __init__(self, x: Inputs, bias: NoBias, b: int, h: int) -> None:
        exact = torch.promote_types(x.q.dtype, torch.float32)
        self.bias, self.causal, self.dropout, self.offset = bias, x.causal, x.dropout, x.offset
        self.place = None if x.seed is None else (x.seed, b, h)
        self.scale = x.scale * _LOG2E
        self.q, self.k, self.v = (y[b, h].to(exact) for y in (x.q, x.k, x.v))
        self.t, self.u = (None if y is None else y[b, h].to(exact) for y in (x.t, x.u))
        self.padded = None if x.mask is None else ~x.mask[b]
        if self.padded is not None:
            self.k, self.v = (y.masked_fill(self.padded[:, None], 0) for y in (self.k, self.v))
            self.u = None if self.u is None else self.u.masked_fill(self.padded[:, None], 0)
        if self.u is not None and bias.columns_first:
            self.u = self.u.mT.contiguous()

    def product(self, rows: Tensor, keys: Tensor) -> Tensor:
        """rows keys^T, in the order of memory that the bias likes."""
        return (keys @ rows.mT).mT if self.bias.keys_first else rows @ keys.mT

    def scores(self, start: int, stop: int, keys: int, block: Any) -> Tensor:
        """Scores of the block in base 2, -inf where no key may be read."""
        s = self.product(self.q[start:stop], self.k[:keys])
        self.bias.add(s, None if self.t is None else self.t[start:stop], self.u, block)
        s *= self.scale
        if self.causal:
            i, j = (torch.arange(a, b, device=s.device) for a, b in ((start, stop), (0, keys)))
            s.masked_fill_(j > i[:, None], -math.inf)
        if self.padded is not None:
            s.masked_fill_(self.padded[:keys], -math.inf)
        return s

    def dropped(self, s: Tensor, start: int) -> Tensor:
        """0 or 1 / (1 - dropout) for each weight of the block."""
        assert self.place is not None
        (seed, *head), rows, keys, first = self.place, *s.shape, self.offset
        axes = ((first + start, first + start + rows), (first, first + keys))
        return kept(seed, self.dropout, *head, *axes).to(s.dtype) / (1 - self.dropout)


def _blocks(bias: NoBias, keys: int, causal: bool) -> list[tuple[int, int, int, Any]]:
    """(first query, last query + 1, keys, what the bias needs), the same for all heads."""
    made = []
    for start, stop in bias.blocks(max(16, min(bias.most_rows, _BLOCK // keys))):
        below = bias.keys_below(stop) if causal else keys
        made.append((start, stop, below, bias.block(start, stop - start, below)))
    return made


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    """2^(s - lse) in place; 0 for a row without a key."""
    return s.sub_(lse.masked_fill(lse == -math.inf, 0).unsqueeze(1)).exp2_()


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """(out in the dtype of q, lse): see `ops.disentangled_forward`."""
    batch, heads, queries, _ = x.q.shape
    exact = torch.promote_types(x.q.dtype, torch.float32)
    out = x.q.new_empty((batch, heads, queries, x.v.shape[3]))
    lse = x.q.new_empty((batch, heads, queries), dtype=exact)
    bias = _bias(x)
    blocks = _blocks(bias, x.k.shape[2], x.causal)
    for b, h in itertools.product(range(batch), range(heads)):
        head = _Head(x, bias, b, h)
        for start, stop, keys, block in blocks:
            s = head.scores(start, stop, keys, block)
            top = s.amax(1)
            p = _weights(s, top)
            total = p.sum(1)
            lse[b, h, start:stop] = (top + total.log2()) / _LOG2E
            total = total.masked_fill_(total == 0, 1)
            if x.dropout > 0:
                p *= head.dropped(p, start)
            out[b, h, start:stop] = (p @ head.v[:keys]).div_(total.unsqueeze(1))
    return out, lse


def backward(
    x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dt, du): see `ops.disentangled_backward`."""
    batch, heads, *_ = x.q.shape
    exact = torch.promote_types(x.q.dtype, torch.float32)
    dq, dk, dv = (y.new_zeros(y.shape, dtype=exact) for y in (x.q, x.k, x.v))
    dt, du = (None if y is None else y.new_zeros(y.shape, dtype=exact) for y in (x.t, x.u))
    bias = _bias(x)
    if du is not None and bias.columns_first:
        du = du.mT.contiguous()
    blocks = _blocks(bias, x.k.shape[2], x.causal)
    for b, h in itertools.product(range(batch), range(heads)):
        head = _Head(x, bias, b, h)
        dout_own = dout[b, h].to(exact)
        delta = (dout_own * out[b, h]).sum(1)
        if dlse is not None:
            delta = delta - dlse[b, h]
        for start, stop, keys, block in blocks:
            do = dout_own[start:stop]
            p = _weights(head.scores(start, stop, keys, block), lse[b, h, start:stop] * _LOG2E)
            dp = head.product(do, head.v[:keys])
            if x.dropout > 0:
                factor = head.dropped(p, start)
                dp *= factor
                dv[b, h, :keys].addmm_((p * factor).mT, do)
            else:
                dv[b, h, :keys].addmm_(p.mT, do)
            ds = dp.sub_(delta[start:stop, None]).mul_(p).mul_(x.scale)
            dq[b, h, start:stop] = ds @ head.k[:keys]
            dk[b, h, :keys].addmm_(ds.mT, head.q[start:stop])
            bias.take(ds, None if dt is None else dt[b, h, start:stop], None if du is None else du[b, h], block)
        if x.mask is not None:
            for y in (dk, dv):
                y[b, h].masked_fill_(~x.mask[b, :, None], 0)
    if du is not None and bias.columns_first:
        du = du.mT
    dq, dk, dv = (y.to(x.q.dtype) for y in (dq, dk, dv))
    dt, du = (None if y is None else y.to(x.q.dtype).contiguous() for y in (dt, du))
    return dq, dk, dv, dt, du
