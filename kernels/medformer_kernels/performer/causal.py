"""Causal FAVOR+ in plain PyTorch, on any device: chunks of tokens in order, with a carried state of M x (Dv + 1).

With u_im = omega_m q'_i and e_jm = omega_m k'_j - |k'_j|^2 / 2 (base 2 below), query i weighs key j <= i by
w_ij = sum_m exp(u_im + e_jm). Keys of earlier chunks are read from the carried state, whose features are each kept
relative to a maximum of their own; keys of the query's own chunk are taken one by one, in the log domain:

    log w_ij = log B_ij + r_i + t_j    with r_i = max_m u_im, t_j = max_m e_jm and
    B_ij = sum_m exp(u_im - r_i) exp(e_jm - t_j)    a product of two tiles of features

so that each query and each key has a stabiliser of its own and no later key can push an earlier one below the range.
The two parts merge as flash attention merges its blocks.

Gradients, with L_i the log of the denominator, P_ij = w_ij / exp(L_i) and delta_i = dout_i out_i:

    du_im = exp(u_im - L_i) sum_{j <= i} exp(e_jm) (dout_i v_j - delta_i)     in order, with the same carried state
    de_jm = exp(e_jm) sum_{i >= j} exp(u_im - L_i) (dout_i v_j - delta_i)     in reverse, with a state of the queries
    dv_j  = sum_{i >= j} P_ij dout_i                                          in reverse

B stays in range while max_m u_im - min_m u_im is below 69 nats, in float32 (N(0, 1) inputs reach 30); a chunk with a
wider query forms its pairs in float64, good to 620.

Cost, forward: 8 B H N M D + 2 B H N C (M + D) FLOP and 4 B H N M exponentials for chunks of C tokens; backward about
three times that. Memory beyond inputs and outputs is a few tiles of chunk x M values, whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medformer_kernels.performer import chunked
from medformer_kernels.performer.chunked import LOG2E, columns, key_chunk, scaled_omega, value_chunk

__all__ = ["backward", "forward"]

# Tokens of a chunk: the pairs inside it cost as much as the state once it reaches the head width.
_CHUNK = 64
# Bits that the exponents of a query may span, so that neither the product of two features nor its gradient leaves the
# range of the dtype.
_SPAN = {torch.float32: 100.0, torch.float64: 900.0}


def forward(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, Dv), log of its denominator (B, H, N)); see `ops.performer_causal`."""
    prefix = _State(q, omega, v.shape[-1])
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    out_lse = q.new_empty(q.shape[:3], dtype=prefix.sums.dtype)
    for pairs in _pairs(q, k, v, omega, key_padding_mask):
        carried = pairs.u + prefix.top
        top = torch.maximum(carried.amax(-1), pairs.log_weights.amax(-1))
        top.masked_fill_(top == -math.inf, 0)
        values_1 = columns(pairs.v, 1.0)
        sums = carried.sub_(top.unsqueeze(-1)).exp2_() @ prefix.sums
        sums += (pairs.log_weights - top.unsqueeze(-1)).exp2_() @ values_1
        total = sums[..., -1]
        out[:, :, pairs.chunk] = sums[..., :-1] / total.masked_fill(total == 0, 1).unsqueeze(-1)
        out_lse[:, :, pairs.chunk] = (top + total.log2()) / LOG2E
        prefix.add(pairs.e, values_1)
    return out, out_lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    out: Tensor,
    out_lse: Tensor,
    dout: Tensor,
    with_omega: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, domega (B, H, M, D), 0 unless `with_omega`); see `ops.performer_causal_backward`."""
    scale = q.shape[-1] ** -0.5
    omega_1 = columns(scaled_omega(omega, q, 1.0), 1.0)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    domega = torch.zeros_like(omega_1[..., :-1])

    prefix = _State(q, omega, v.shape[-1])  # sums of exp(e) v and -exp(e)
    for pairs in _pairs(q, k, v, omega, key_padding_mask):
        values_1 = columns(pairs.v, -1.0)
        queries = _Queries(pairs, values_1, out, out_lse, dout)
        du = (queries.dout_delta @ prefix.sums.transpose(-1, -2)).mul_((queries.u_lse + prefix.top).exp2_())
        du += (queries.gains @ pairs.phi_k).mul_(pairs.phi_q).to(du.dtype)
        dq[:, :, pairs.chunk] = du @ omega_1[..., :-1]
        if with_omega:
            domega += du.transpose(-1, -2) @ pairs.q
        prefix.add(pairs.e, values_1)

    suffix = _State(q, omega, v.shape[-1])  # sums of exp(u - L) dout and exp(u - L) delta
    for pairs in _pairs(q, k, v, omega, key_padding_mask, reverse=True):
        values_1 = columns(pairs.v, -1.0)
        queries = _Queries(pairs, values_1, out, out_lse, dout)
        weights = (pairs.e + suffix.top).exp2_()
        dv_chunk = weights @ suffix.sums[..., :-1]
        dv_chunk += queries.weights.transpose(-1, -2) @ queries.dout_delta[..., :-1]
        de = (values_1 @ suffix.sums.transpose(-1, -2)).mul_(weights)
        de += (queries.gains.transpose(-1, -2) @ pairs.phi_q).mul_(pairs.phi_k).to(de.dtype)
        dk_chunk = de @ omega_1
        dk_chunk = dk_chunk[..., :-1] - pairs.k * (scale * dk_chunk[..., -1:])
        dk[:, :, pairs.chunk] = _sum_groups(dk_chunk, k.shape[1])
        dv[:, :, pairs.chunk] = _sum_groups(dv_chunk, v.shape[1])
        if with_omega:
            domega += de.transpose(-1, -2) @ pairs.k
        suffix.add(queries.u_lse, queries.dout_delta)
    return dq, dk, dv, domega.mul_(q.shape[-1] ** -0.25)


class _State:
    """Sums over tokens n of exp2(exponent_mn) x_n, each feature m relative to its own maximum `top`."""

    def __init__(self, q: Tensor, omega: Tensor, width_v: int) -> None:
        shape, dtype = (*q.shape[:2], omega.shape[-2]), chunked.compute_dtype(q)
        self.sums = q.new_zeros((*shape, width_v + 1), dtype=dtype)
        self.top = q.new_full((*shape[:2], 1, shape[2]), -math.inf, dtype=dtype)

    def add(self, exponents: Tensor, x: Tensor) -> None:
        new_top = torch.maximum(self.top, exponents.amax(-2, keepdim=True))
        base = new_top.masked_fill(new_top == -math.inf, 0)
        self.sums.mul_((self.top - base).exp2_().transpose(-1, -2))
        self.sums += (exponents - base).exp2_().transpose(-1, -2) @ x
        self.top = new_top


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """A chunk of C tokens and every pair of a query and a key inside it; exponents in base 2."""

    chunk: slice
    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor
    e: Tensor
    phi_q: Tensor
    """exp2(u - r)."""
    phi_k: Tensor
    """exp2(e - t)."""
    shift: Tensor
    """(C, C): r_i + t_j, in the dtype of the features; -inf where the key is later than the query."""
    log_weights: Tensor
    """(C, C): log2 w_ij."""


def _pairs(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, reverse: bool = False
) -> Iterator[_Pairs]:
    (batch, heads, tokens, _), groups = q.shape, q.shape[1] // k.shape[1]
    omega_q = scaled_omega(omega, q, LOG2E)
    omega_k = columns(omega_q, -1.0).transpose(-1, -2)
    omega_q, dtype = omega_q.transpose(-1, -2), omega_q.dtype
    step = min(_CHUNK, chunked.chunk_length(batch * heads * omega.shape[-2]))
    later = torch.ones(step, step, dtype=torch.bool, device=q.device).triu(1)
    starts = range(0, tokens, step)
    for start in reversed(starts) if reverse else starts:
        chunk = slice(start, min(start + step, tokens))
        k_chunk, half = (_repeat_groups(x, groups) for x in key_chunk(k, key_padding_mask, chunk, dtype))
        q_chunk = q[:, :, chunk].to(dtype)
        u, e = q_chunk @ omega_q, columns(k_chunk, half) @ omega_k
        r, t = u.amax(-1, keepdim=True), e.amax(-1, keepdim=True)
        wide = bool((r - u.amin(-1, keepdim=True) > _SPAN[dtype]).any())
        pair_dtype = torch.float64 if wide else dtype
        r, t = r.to(pair_dtype), t.masked_fill_(t == -math.inf, 0).to(pair_dtype)  # -inf: a masked key
        phi_q, phi_k = (u - r).exp2_(), (e - t).exp2_()
        size = chunk.stop - start
        shift = (r + t.transpose(-1, -2)).masked_fill_(later[:size, :size], -math.inf)
        yield _Pairs(
            chunk=chunk,
            q=q_chunk,
            k=k_chunk,
            v=_repeat_groups(value_chunk(v, key_padding_mask, chunk, dtype), groups),
            u=u,
            e=e,
            phi_q=phi_q,
            phi_k=phi_k,
            shift=shift,
            log_weights=(phi_q @ phi_k.transpose(-1, -2)).log2_().add_(shift).to(dtype),
        )


class _Queries:
    """What both backward passes need of the queries of a chunk."""

    def __init__(self, pairs: _Pairs, values_1: Tensor, out: Tensor, out_lse: Tensor, dout: Tensor) -> None:
        dtype = pairs.u.dtype
        dout, out = dout[:, :, pairs.chunk].to(dtype), out[:, :, pairs.chunk].to(dtype)
        delta = (dout * out).sum(-1)
        lse = (out_lse[:, :, pairs.chunk] * LOG2E).unsqueeze(-1)
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # a query without any key: every weight 0
        self.dout_delta = columns(dout, delta)
        self.u_lse = pairs.u - lse
        self.weights = (pairs.log_weights - lse).exp2_()
        """P_ij."""
        gains = (pairs.shift - lse).clamp_(max=_SPAN[pairs.shift.dtype]).exp2_()
        self.gains = gains.mul_(self.dout_delta @ values_1.transpose(-1, -2))
        """d(loss) / d(B_ij)."""


def _repeat_groups(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _sum_groups(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
