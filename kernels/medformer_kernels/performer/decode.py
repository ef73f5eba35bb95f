"""Causal FAVOR+ one token at a time: a state of constant size instead of a growing cache of keys and values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from medformer_kernels._dispatch import resolve_backend
from medformer_kernels._operators import first_order
from medformer_kernels.performer.arguments import Call, Feature, prepare, without_kernel
from medformer_kernels.performer.chunked import compute_dtype
from medformer_kernels.performer.ops import performer_state
from medformer_kernels.performer.reference import performer_features

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["PerformerState", "performer_prefill", "performer_step"]


class PerformerState(NamedTuple):
    """All that FAVOR+ keeps of the tokens so far, M x (Dv + 1) numbers a head, in float32 (float64 for float64)."""

    values: Float[Tensor, "B H M Dv"]
    """Of each feature: the mean of the values, weighted by that feature of their keys."""
    lse: Float[Tensor, "B H M"]
    """Logarithm of the sum of those weights; -inf before the first token."""


def performer_prefill(
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    omega: Float[Tensor, "*H M D"],
    *,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    feature: Feature = "softmax",
    backend: str = "auto",
) -> PerformerState:
    """State after a prompt, in one pass; its outputs are `performer_attention(..., causal=True)`.

    An omega for each of several query heads that share a key head needs k and v repeated to them.
    """
    function = "performer_prefill"
    call = _prepare(function, k, k, v, omega, causal=True, key_padding_mask=key_padding_mask, feature=feature)
    backend = resolve_backend(function, backend, k, without_kernel(k, v, call.omega, False, feature))
    k, v, omega = first_order(function, "performer_features", k, v, call.omega)
    with torch.autocast(k.device.type, enabled=False):  # which would round the state
        values, lse, _ = performer_state(k, v, omega, key_padding_mask, False, backend)
    return PerformerState(values, lse)


def performer_step(
    state: PerformerState | None,
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B Hkv 1 D"],
    v: Float[Tensor, "B Hkv 1 Dv"],
    omega: Float[Tensor, "*H M D"],
    *,
    reset: Bool[Tensor, " B"] | None = None,
    feature: Feature = "softmax",
) -> tuple[Float[Tensor, "B H 1 Dv"], PerformerState]:
    """Output of the next token and the state after it: the causal form, token by token.

    Args:
        state: what the last step or `performer_prefill` returned; None before the first token.
        reset: samples of which this token begins a new document.

    Cost, whatever the number of tokens before: 4 B H M (D + Dv) FLOP. Plain PyTorch on every device.
    """
    function = "performer_step"
    call = _prepare(function, q, k, v, omega, feature=feature)
    if q.shape[2] != 1 or k.shape[2] != 1:
        raise ValueError(f"{function}: q and k hold {q.shape[2]} and {k.shape[2]} tokens; a step takes 1")
    with torch.autocast(q.device.type, enabled=False):  # which would round the state
        return _step(state, call, reset)


def _step(state: PerformerState | None, call: Call, reset: Tensor | None) -> tuple[Tensor, PerformerState]:
    q, (k, v, omega_k, groups) = call.q, call.shared_heads(repeat_keys=False)
    dtype = compute_dtype(q)
    log_k, v32 = performer_features(k.to(dtype), omega_k).squeeze(2), v.to(dtype)
    if state is None:
        values, lse = v32.expand(-1, -1, log_k.shape[-1], -1), log_k
    else:
        _check_state(state, v32, log_k, reset)
        before = state.lse if reset is None else state.lse.masked_fill(reset[:, None, None], -math.inf)
        lse = torch.logaddexp(before, log_k)
        # A convex step towards the new value: nothing can overflow.
        values = torch.lerp(state.values, v32, (log_k - lse).exp().unsqueeze(-1))
        if reset is not None:
            values = torch.where(reset[:, None, None, None], v32, values)
    state = PerformerState(values, lse)
    if groups > 1:
        values, lse = values.repeat_interleave(groups, 1), lse.repeat_interleave(groups, 1)
    log_q = performer_features(q.to(dtype), call.omega_of_queries)
    return (torch.softmax(log_q + lse.unsqueeze(2), -1) @ values).to(q.dtype), state


def _check_state(state: PerformerState, v: Tensor, log_k: Tensor, reset: Tensor | None) -> None:
    expected = (*log_k.shape, v.shape[-1])
    if state.values.shape != expected or state.lse.shape != expected[:3]:
        raise ValueError(f"performer_step: state.values has shape {tuple(state.values.shape)}; it must be {expected}")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != log_k.shape[:1]):
        raise ValueError(
            f"performer_step: reset is {reset.dtype} of shape {tuple(reset.shape)}; it must be bool ({log_k.shape[0]},)"
        )


def _prepare(function: str, *tensors: Tensor, feature: Feature, **arguments) -> Call:
    call = prepare(function, *tensors, feature=feature, **arguments)
    if call.function is not None:
        raise ValueError(f"{function}: feature={feature!r} has no decoding state here; use 'softmax' or 'hyperbolic'")
    return call
