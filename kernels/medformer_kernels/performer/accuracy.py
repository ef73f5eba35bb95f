"""How far FAVOR+ is from the exact attention it estimates, measured on the user's own queries, keys and values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels.performer import performer_attention
from medformer_kernels.performer.arguments import prepare
from medformer_kernels.performer.reference import default_num_features, orthogonal_features

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["approximation_error"]


@torch.no_grad()
def approximation_error(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv S D"],
    v: Float[Tensor, "B Hkv S Dv"],
    omega: Float[Tensor, "*H M D"] | None = None,
    *,
    num_features: int | None = None,
    draws: int = 4,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    feature: str = "softmax",
    queries: int = 256,
) -> Float[Tensor, "B H"]:
    """Relative error |FAVOR+ - exact| / |exact| (Frobenius norm over the queries), by sample and head.

    0 is exact; near 1, the output has as little to do with softmax attention as 0 has. `exact` is
    softmax(q k^T / sqrt(D)) v in float32 (float64 for float64 inputs).

    Args:
        omega: the random features to judge; None averages over `draws` fresh draws of `num_features` (default: that
            of the head width) with seeds 0, 1, ...
        queries: at most so many queries, spread evenly over all, are compared. The exact side holds queries x S
            weights for each head.
    """

    exact_dtype = torch.promote_types(q.dtype, torch.float32)
    for name, number in (("draws", draws), ("queries", queries)):
        if number < 1:
            raise ValueError(f"approximation_error: {name}={number} must be at least 1")
    if omega is None:
        num_features = default_num_features(q.shape[-1]) if num_features is None else num_features
        omegas = [
            orthogonal_features(num_features, q.shape[-1], seed=seed, device=q.device, dtype=exact_dtype)
            for seed in range(draws)
        ]
    else:
        omegas = [omega]
    arguments = {"causal": causal, "key_padding_mask": key_padding_mask, "feature": feature}
    prepare("approximation_error", q, k, v, omegas[0], **arguments)
    chosen = torch.linspace(0, q.shape[2] - 1, min(queries, q.shape[2]), device=q.device).round().long()
    with torch.autocast(q.device.type, enabled=False):
        exact = _exact_attention(q, k, v, chosen, causal, key_padding_mask, exact_dtype)
    errors = []
    for drawn in omegas:
        if causal:
            out = performer_attention(q, k, v, drawn, **arguments)[:, :, chosen]
        else:
            out = performer_attention(q[:, :, chosen], k, v, drawn, **arguments)
        errors.append((out.to(exact_dtype) - exact).flatten(2).norm(dim=-1))
    return torch.stack(errors).mean(0) / exact.flatten(2).norm(dim=-1)


def _exact_attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, causal: bool, key_padding_mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    q, k, v = q[:, :, chosen].to(dtype), k.to(dtype), v.to(dtype)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.arange(k.shape[2], device=k.device) > chosen[:, None], -math.inf)
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None, None], -math.inf)
        v = v.masked_fill(~key_padding_mask[:, None, :, None], 0)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v
