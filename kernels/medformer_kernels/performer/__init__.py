"""FAVOR+ (Performer) attention: softmax attention estimated in linear time and constant memory.

reference      the definition, in plain PyTorch
arguments      checks, and the forms that reduce to the plain one (grouped heads, documents, two-sided features)
chunked        bidirectional, PyTorch          causal         causal, PyTorch
fused          bidirectional, Triton launches  kernels        its kernels, with backward_kernels
causal_fused   causal, Triton launches         causal_kernels its kernels, of causal_tiles
columns        heads wider than a tile, in the kernels of both
ops            `torch.library` operators over these, with their gradients
elementwise    ReLU and other features that are no exponentials
decode         causal, one token at a time     accuracy       FAVOR+ measured against exact attention
blocks         a state for each block of a token grid, over the operators of `ops`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels._dispatch import resolve_backend
from medformer_kernels._tracing import standard
from medformer_kernels.performer import elementwise
from medformer_kernels.performer.arguments import Call, Feature, prepare, without_kernel
from medformer_kernels.performer.blocks import performer_block_attention, performer_block_attention_reference
from medformer_kernels.performer.decode import PerformerState, performer_prefill, performer_step
from medformer_kernels.performer.ops import performer_causal, performer_read, performer_state
from medformer_kernels.performer.reference import (
    default_num_features,
    orthogonal_features,
    performer_attention_reference,
    performer_features,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "PerformerState",
    "default_num_features",
    "orthogonal_features",
    "performer_attention",
    "performer_attention_reference",
    "performer_block_attention",
    "performer_block_attention_reference",
    "performer_features",
    "performer_prefill",
    "performer_step",
]


def performer_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv S D"],
    v: Float[Tensor, "B Hkv S Dv"],
    omega: Float[Tensor, "*H M D"],
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    cu_seqlens: Int[Tensor, " docs+1"] | Sequence[int] | None = None,
    feature: Feature = "softmax",
    eps: float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"]:
    """FAVOR+ attention; features never reach memory, forward or backward.

    Args:
        q: queries; each of the Hkv heads of `k` and `v` serves H / Hkv consecutive heads of `q`. Tensors in
            (B, tokens, H, width) order raise an error where shapes show it: the heads of q are the tokens of k and its
            tokens the heads of k, or an omega for each head, the mask or `cu_seqlens` do not fit. All three alike, with
            one omega for all heads, do not show it.
        k: keys.
        v: values, whose width may differ.
        omega: random features (`orthogonal_features`), shared by all heads or for each head: of `q`, or of `k` and
            `v`. With one for each head of `q` and fewer key heads, the bidirectional form repeats k and v in memory.
            It may require a gradient.
        causal: query i reads keys 0 to i only; needs N = S and, for exponential features, eps = 0.
        key_padding_mask: any pattern, True = a real key. A query without one gives 0.
        cu_seqlens: boundaries of documents laid end to end along the tokens, 0 first and N last: none reads another.
            A tensor is read on the host, which waits for its device; a list or tuple of int is not. The kernels run
            them side by side (with `eps`, and in PyTorch, one after the other).
        feature: 'softmax' (positive features); 'hyperbolic' (those of omega and of -omega: lower variance, twice
            the cost); 'relu', or a function of each value of omega x', both plus `eps`.
        eps: added to every feature.
        backend: 'triton', 'torch', or 'auto': Triton on a GPU, where it has a kernel. It has none for
            'relu', functions and heads too wide for its registers (`backend='triton'` says which): PyTorch everywhere.

    Raises:
        ValueError: an argument does not fit the others, or `backend` cannot run.
    """
    call = prepare(
        "performer_attention", q, k, v, omega, causal=causal, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens,
        feature=feature, eps=eps,
    )  # fmt: skip
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        call = replace(call, q=q.to(dtype), k=k.to(dtype), v=v.to(dtype))
    if standard():
        return performer_attention_reference(
            call.q, call.k, call.v, omega, causal=causal, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens,
            feature=feature, eps=eps,
        )  # fmt: skip
    unsupported = without_kernel(call.q, call.v, call.omega, causal, feature)
    backend = resolve_backend("performer_attention", backend, call.q, unsupported)
    # The dtype is settled: inside, autocast would round float32 states and exponents again.
    with torch.autocast(q.device.type, enabled=False):
        if causal and call.function is None:
            ends = call.ends or [0, q.shape[2]]
            return performer_causal(call.q, call.k, call.v, call.omega_of_queries, call.mask, ends, backend)[0]
        if call.ends is None or (backend == "triton" and eps == 0):
            return _attend(call, backend)
        outs = [_attend(part, backend) for part in call.documents()]
        return torch.cat(outs, 2) if outs else call.q.new_zeros((*q.shape[:3], v.shape[-1]))


def _attend(call: Call, backend: str) -> Tensor:
    if call.function is not None:
        return elementwise.attention(call)
    k, v, omega, groups = call.shared_heads(repeat_keys=False)
    values, lse, exponent_max = performer_state(k, v, omega, call.mask, call.eps > 0, backend, call.ends)
    state = (values, lse)
    if call.eps > 0:
        state = _add_epsilon(v, values, lse, exponent_max, call.mask, call.eps)
    if groups > 1:
        state = tuple(x.repeat_interleave(groups, 1) for x in state)
    values, lse, *extra = state
    return performer_read(call.q, call.omega_of_queries, values, lse, *(extra or (None, None)), backend, call.ends)[0]


def _add_epsilon(
    v: Tensor, values: Tensor, lse: Tensor, exponent_max: Tensor, key_padding_mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state of phi + eps from the state of phi: one more key of weight eps n and value mean(v), and one more
    feature that holds the sum over all features."""
    if key_padding_mask is None:
        count = torch.full_like(exponent_max[:, :1], v.shape[2])
        mean = v.mean(2, dtype=values.dtype)
    else:
        count = key_padding_mask.sum(1, keepdim=True).clamp_min(1).to(values.dtype)
        real = v.masked_fill(~key_padding_mask[:, None, :, None], 0)
        mean = real.sum(2, dtype=values.dtype) / count.unsqueeze(-1)
    # Without any valid key all values are 0: any finite weight keeps output and gradients 0.
    empty = exponent_max == -math.inf
    lse = lse.masked_fill(empty.unsqueeze(-1), 0)
    floor = ((eps * count).log() + exponent_max.masked_fill(empty, 0)).unsqueeze(-1)
    total = torch.logaddexp(lse, floor)
    share = (floor - total).exp().unsqueeze(-1)
    values = values * (1 - share) + mean.unsqueeze(-2) * share
    extra_lse = torch.logsumexp(total, -1)
    weights = torch.softmax(total, -1)
    extra_values = (weights.unsqueeze(-1) * values).sum(-2)
    return values, total, extra_values, extra_lse + math.log(eps)
