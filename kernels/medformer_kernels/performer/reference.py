"""FAVOR+ as it is defined: features, reference attention and the random projections.

Everything here is plain PyTorch that also runs in float64 and is meant to be read as the definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels.performer.arguments import Call, Feature, prepare

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "default_num_features",
    "orthogonal_features",
    "performer_attention_reference",
    "performer_features",
]


def default_num_features(head_dim: int) -> int:
    """Number of random features for a head width: D ln D rounded to a multiple of 64.

    Source: Choromanski et al. 2021, theorem 4 (M of the order of D ln D). Differs: rounded to 64, so that
    matrix tiles are full (D=64 gives 256, where published code takes 266).
    """
    if head_dim < 1:
        raise ValueError(f"default_num_features: head_dim={head_dim} must be at least 1")
    return 64 * max(1, round(head_dim * math.log(head_dim) / 64))


def orthogonal_features(
    num_features: int,
    head_dim: int,
    *,
    heads: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*H M D"]:
    """Draw omega: blocks of D orthogonal rows whose lengths are chi-distributed with D degrees of freedom.

    Shape (M, D), or (H, M, D) when `heads` is given (a draw of its own per head). The same seed gives the
    same omega on the same kind of device.

    Source: Choromanski et al. 2021, section 3.2 (regular orthogonal random features).
    """
    if num_features < 1:
        raise ValueError(f"orthogonal_features: num_features={num_features} must be at least 1")
    if head_dim < 1:
        raise ValueError(f"orthogonal_features: head_dim={head_dim} must be at least 1")
    if heads is not None and heads < 1:
        raise ValueError(f"orthogonal_features: heads={heads} must be at least 1 (or None to share one omega)")
    generator = torch.Generator(device=device or "cpu").manual_seed(seed)
    lead = () if heads is None else (heads,)
    blocks = -(-num_features // head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, device=device, dtype=torch.float32)

    directions, triangle = torch.linalg.qr(normal(blocks, head_dim, head_dim))
    # The sign of R's diagonal makes Q uniform over the orthogonal group (Mezzadri 2007).
    directions = directions * torch.sign(torch.diagonal(triangle, dim1=-2, dim2=-1)).unsqueeze(-2)
    directions = directions.transpose(-1, -2).reshape(*lead, blocks * head_dim, head_dim)[..., :num_features, :]
    lengths = normal(num_features, head_dim).norm(dim=-1, keepdim=True)
    return (directions * lengths).to(dtype).contiguous()


def performer_features(x: Float[Tensor, "B H N D"], omega: Float[Tensor, "*H M D"]) -> Float[Tensor, "B H N M"]:
    """Logarithm of the positive softmax features: omega x' - |x'|^2 / 2 with x' = x / D^(1/4).

    Without the 1/sqrt(M) and without a stabiliser, both of which cancel in the attention. Materialises
    N x M values: for inspection and attention maps, not for training.

    Source: Choromanski et al. 2021, lemma 1 (the positive estimator).
    """
    x = x * x.shape[-1] ** -0.25
    return x @ omega.to(x.dtype).transpose(-1, -2) - x.square().sum(-1, keepdim=True) / 2


def performer_attention_reference(
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
) -> Float[Tensor, "B H N Dv"]:
    """The definition: out = phi(q) (phi(k)^T v) / (phi(q) sum_j phi(k_j)), features materialised.

    Without `eps` the stabilisers cancel, so each side takes the safest (its own maximum). With `eps` the value
    depends on them, and they are the published ones: phi(q) = exp(u - |q'|^2/2 - max_m u) + eps per query and
    phi(k) = exp(u - |k'|^2/2 - max_{n,m} u) + eps over the valid keys of a head, u = omega x'. Stabilisers carry
    no gradient. A query without a valid key gives 0. Elementwise features are phi(x) = feature(omega x') + eps.

    With `causal` the sums run over the keys up to the query's own; the N x S weights are materialised too.

    Source: Choromanski et al. 2021, eq. (5) and (6); (11) for the causal form.
    """
    call = prepare(
        "performer_attention_reference", q, k, v, omega, causal=causal, key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens, feature=feature, eps=eps,
    )  # fmt: skip
    return _reference(call) if call.ends is None else torch.cat([_reference(part) for part in call.documents()], 2)


def _reference(call: Call) -> Tensor:
    q, eps, key_padding_mask = call.q, call.eps, call.mask
    k, v, omega, _ = call.shared_heads(repeat_keys=True)
    if key_padding_mask is not None:
        v = v.masked_fill(~key_padding_mask[:, None, :, None], 0)
    if call.function is not None:
        return _elementwise_reference(q, k, v, omega, call)
    log_q, log_k = performer_features(q, omega), performer_features(k, omega)
    if key_padding_mask is not None:
        log_k = log_k.masked_fill(~key_padding_mask[:, None, :, None], -math.inf)
    if call.causal:
        return _causal_reference(log_q, log_k, v)
    if eps == 0:
        stabiliser_k = log_k.detach().amax(-2, keepdim=True)
        # A constant per feature on the key side goes back in on the query side.
        stabiliser_k = stabiliser_k.masked_fill(stabiliser_k == -math.inf, 0)
        shifted = log_q + stabiliser_k
        stabiliser_q = shifted.detach().amax(-1, keepdim=True)
        phi_q, phi_k = (shifted - stabiliser_q).exp(), (log_k - stabiliser_k).exp()
    else:
        half_q, half_k = (x.square().sum(-1, keepdim=True) * (x.shape[-1] ** -0.5 / 2) for x in (q, k))
        phi_q = (log_q - (log_q + half_q).detach().amax(-1, keepdim=True)).exp() + eps
        u_max = (log_k + half_k).detach().amax((-1, -2), keepdim=True)
        phi_k = (log_k - u_max.masked_fill(u_max == -math.inf, 0)).exp() + eps
        if key_padding_mask is not None:
            phi_k = phi_k.masked_fill(~key_padding_mask[:, None, :, None], 0)
    state, normaliser = phi_k.transpose(-1, -2) @ v, phi_k.sum(-2).unsqueeze(-1)
    denominator = phi_q @ normaliser
    return (phi_q @ state) / denominator.masked_fill(denominator == 0, 1)


def _causal_reference(log_q: Tensor, log_k: Tensor, v: Tensor) -> Tensor:
    """softmax over j <= i of log sum_m exp(log_q_im + log_k_jm), with a maximum of its own for each query and key."""
    stabiliser_q, stabiliser_k = (x.detach().amax(-1, keepdim=True) for x in (log_q, log_k))
    stabiliser_k = stabiliser_k.masked_fill(stabiliser_k == -math.inf, 0)
    weights = (log_q - stabiliser_q).exp() @ (log_k - stabiliser_k).exp().transpose(-1, -2)
    absent = weights.new_ones(weights.shape[-2:], dtype=torch.bool).triu(1) | (weights == 0)
    log_weights = weights.masked_fill(absent, 1).log() + stabiliser_k.transpose(-1, -2)
    log_weights = log_weights.masked_fill(absent, -math.inf)
    without_key = absent.all(-1, keepdim=True)
    return log_weights.masked_fill(without_key, 0).softmax(-1).masked_fill(without_key, 0) @ v


def _elementwise_reference(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, call: Call) -> Tensor:
    assert call.function is not None
    omega = omega.to(q.dtype).transpose(-1, -2)
    phi_q, phi_k = (call.function((x * x.shape[-1] ** -0.25) @ omega) + call.eps for x in (q, k))
    weights = phi_q @ phi_k.transpose(-1, -2)
    if call.mask is not None:
        weights = weights.masked_fill(~call.mask[:, None, None], 0)
    if call.causal:
        weights = weights.tril()
    total = weights.sum(-1, keepdim=True)
    return (weights @ v) / total.masked_fill(total == 0, 1)
