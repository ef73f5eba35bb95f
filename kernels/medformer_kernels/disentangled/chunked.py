"""Disentangled attention in plain PyTorch, a block of queries of one head at a time: flat memory, no N x N.

Float16 and bfloat16 are computed in float32. See `ops` for what it computes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medformer_kernels.disentangled.bias import BucketBias, GridBias, NoBias
from medformer_kernels.disentangled.dropout import keep_mask
from medformer_kernels.disentangled.tables import Grid

__all__ = ["backward", "forward"]

# Numbers in a block of scores: what a core's second-level cache holds.
_BLOCK = 1 << 18
# Scores are in base 2: exp2 takes a tenth of the time of exp.
_LOG2E = 1 / math.log(2)


def _bias(q: Tensor, buckets: Tensor | None, grid: list[int]) -> NoBias:
    if buckets is not None:
        return BucketBias.of(q.shape[2], buckets.long())
    if grid:
        prefix, gz, gy, gx = grid
        return GridBias(queries=q.shape[2], grid=Grid(size=(gz, gy, gx), prefix=prefix))
    return NoBias(queries=q.shape[2])


class _Head:
    """One head of the inputs in the dtype of the sums, as its blocks read them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, t: Tensor | None, u: Tensor | None, mask: Tensor | None, scale: float,
        bias: NoBias, index: int, causal: bool, dropout: float, seed: Tensor | None, offset: int,
    ) -> None:  # fmt: skip
        b, h = divmod(index, q.shape[1])
        exact = torch.promote_types(q.dtype, torch.float32)
        self.bias, self.index, self.causal, self.dropout, self.seed, self.offset = (
            bias,
            index,
            causal,
            dropout,
            seed,
            offset,
        )
        self.scale = scale * _LOG2E
        self.q, self.k, self.v = q[b, h].to(exact), k[b, h].to(exact), v[b, h].to(exact)
        self.t, self.u = (None if x is None else x[b, h].to(exact) for x in (t, u))
        self.padded = None if mask is None else ~mask[b]
        if self.padded is not None:
            self.k, self.v = (x.masked_fill(self.padded[:, None], 0) for x in (self.k, self.v))
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
        assert self.seed is not None
        keep = keep_mask(
            self.seed,
            self.dropout,
            tuple(s.shape),
            s.device,
            head0=self.index,
            row0=start + self.offset,
            key0=self.offset,
        )
        return keep.to(s.dtype) / (1 - self.dropout)


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


def forward(
    q: Tensor, k: Tensor, v: Tensor, t: Tensor | None, u: Tensor | None, buckets: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, grid: list[int], scale: float, causal: bool, dropout: float, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out in the dtype of q, lse): see `ops.disentangled_forward`."""
    batch, heads, queries, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((batch, heads, queries, v.shape[3]))
    lse = q.new_empty((batch, heads, queries), dtype=exact)
    bias = _bias(q, buckets, grid)
    blocks = _blocks(bias, k.shape[2], causal)
    for index in range(batch * heads):
        b, h = divmod(index, heads)
        head = _Head(q, k, v, t, u, mask, scale, bias, index, causal, dropout, seed, offset)
        for start, stop, keys, block in blocks:
            s = head.scores(start, stop, keys, block)
            top = s.amax(1)
            p = _weights(s, top)
            total = p.sum(1)
            lse[b, h, start:stop] = (top + total.log2()) / _LOG2E
            total = total.masked_fill_(total == 0, 1)
            if dropout > 0:
                p *= head.dropped(p, start)
            out[b, h, start:stop] = (p @ head.v[:keys]).div_(total.unsqueeze(1))
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, t: Tensor | None, u: Tensor | None, buckets: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, grid: list[int], scale: float,
    causal: bool, dropout: float, offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dt, du): see `ops.disentangled_backward`."""
    batch, heads, *_ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=exact) for x in (q, k, v))
    dt, du = (None if x is None else x.new_zeros(x.shape, dtype=exact) for x in (t, u))
    bias = _bias(q, buckets, grid)
    if du is not None and bias.columns_first:
        du = du.mT.contiguous()
    blocks = _blocks(bias, k.shape[2], causal)
    for index in range(batch * heads):
        b, h = divmod(index, heads)
        head = _Head(q, k, v, t, u, mask, scale, bias, index, causal, dropout, seed, offset)
        dout_own = dout[b, h].to(exact)
        delta = (dout_own * out[b, h]).sum(1)
        if dlse is not None:
            delta = delta - dlse[b, h]
        for start, stop, keys, block in blocks:
            do = dout_own[start:stop]
            p = _weights(head.scores(start, stop, keys, block), lse[b, h, start:stop] * _LOG2E)
            dp = head.product(do, head.v[:keys])
            if dropout > 0:
                kept = head.dropped(p, start)
                dp *= kept
                dv[b, h, :keys].addmm_((p * kept).mT, do)
            else:
                dv[b, h, :keys].addmm_(p.mT, do)
            ds = dp.sub_(delta[start:stop, None]).mul_(p).mul_(scale)
            dq[b, h, start:stop] = ds @ head.k[:keys]
            dk[b, h, :keys].addmm_(ds.mT, head.q[start:stop])
            bias.take(ds, None if dt is None else dt[b, h, start:stop], None if du is None else du[b, h], block)
        if mask is not None:
            for x in (dk, dv):
                x[b, h].masked_fill_(~mask[b, :, None], 0)
    if du is not None and bias.columns_first:
        du = du.mT
    dq, dk, dv = (x.to(q.dtype) for x in (dq, dk, dv))
    dt, du = (None if x is None else x.to(q.dtype).contiguous() for x in (dt, du))
    return dq, dk, dv, dt, du
