"""Linear attention with features f(omega x') + eps for any elementwise f (ReLU among them), in plain PyTorch.

Chunks of tokens, each recomputed in the backward pass (`torch.utils.checkpoint`), so that features never exist for
more than one chunk. There is no stabiliser: f must not overflow. The causal form keeps one state of M x (Dv + 1)
values for each chunk until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medformer_kernels._operators import transformed
from medformer_kernels.performer.arguments import Call
from medformer_kernels.performer.chunked import chunk_length, columns, compute_dtype, scaled_omega

__all__ = ["attention"]

_CAUSAL_CHUNK = 128


def attention(call: Call) -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) sum_j phi(k_j)), j up to the query's own position if causal."""
    assert call.function is not None
    q, function, eps = call.q, call.function, call.eps
    k, v, omega, _ = call.shared_heads(repeat_keys=True)
    dtype = compute_dtype(q)
    omega = scaled_omega(omega, q, 1.0).transpose(-1, -2)

    def features(x: Tensor) -> Tensor:
        return function(x.to(dtype) @ omega) + eps

    def key_features(k: Tensor, mask: Tensor | None) -> Tensor:
        return features(k) if mask is None else features(k).masked_fill(~mask[:, None, :, None], 0)

    def values_1(v: Tensor, mask: Tensor | None) -> Tensor:
        v = v.to(dtype)
        return columns(v if mask is None else v.masked_fill(~mask[:, None, :, None], 0), 1.0)

    def add(state: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return state + key_features(k, mask).transpose(-1, -2) @ values_1(v, mask)

    def read(state: Tensor, q: Tensor) -> Tensor:
        return _divide(features(q) @ state).to(q.dtype)

    def causal_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        phi_k, rows = key_features(k, mask), values_1(v, mask)
        phi_q = features(q)
        sums = (phi_q @ phi_k.transpose(-1, -2)).tril() @ rows + phi_q @ state
        return _divide(sums).to(q.dtype), state + phi_k.transpose(-1, -2) @ rows

    step = chunk_length(q.shape[0] * q.shape[1] * omega.shape[-1])
    if call.causal:
        step = min(step, _CAUSAL_CHUNK)
    state = q.new_zeros((*q.shape[:2], omega.shape[-1], v.shape[-1] + 1), dtype=dtype)
    masks = [None] * -(-k.shape[2] // step) if call.mask is None else call.mask.split(step, 1)
    keys = zip(k.split(step, 2), v.split(step, 2), masks, strict=True)
    queries, outs = q.split(step, 2), []
    if call.causal:
        for q_chunk, (k_chunk, v_chunk, mask) in zip(queries, keys, strict=True):
            out, state = _recomputed(causal_step, state, q_chunk, k_chunk, v_chunk, mask)
            outs.append(out)
        return torch.cat(outs, 2)
    for k_chunk, v_chunk, mask in keys:
        state = _recomputed(add, state, k_chunk, v_chunk, mask)
    return torch.cat([_recomputed(read, state, q_chunk) for q_chunk in queries], 2)


def _recomputed(function: Callable, *args):
    # Transforms of torch.func know no checkpoints.
    return function(*args) if transformed() else checkpoint(function, *args, use_reentrant=False)


def _divide(sums: Tensor) -> Tensor:
    total = sums[..., -1:]
    return sums[..., :-1] / total.masked_fill(total == 0, 1)
