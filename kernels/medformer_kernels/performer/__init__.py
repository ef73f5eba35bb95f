"""FAVOR+ (Performer) attention: softmax attention estimated in linear time and constant memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels._dispatch import resolve_backend
from medformer_kernels.performer.ops import performer_read, performer_state
from medformer_kernels.performer.reference import (
    default_num_features,
    orthogonal_features,
    performer_attention_reference,
    performer_features,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = [
    "default_num_features",
    "orthogonal_features",
    "performer_attention",
    "performer_attention_reference",
    "performer_features",
]


def performer_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    omega: Float[Tensor, "*H M D"],
    *,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    eps: float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"]:
    """Bidirectional FAVOR+ attention; features never reach memory, forward or backward."""
    _check(q, k, v, omega, key_padding_mask, eps)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    backend = resolve_backend("performer_attention", backend, q, _unsupported(max(q.shape[3], v.shape[3]), eps))
    values, lse, exponent_max = performer_state(k, v, omega, key_padding_mask, eps > 0, backend)
    if eps == 0:
        return performer_read(q, omega, values, lse, None, None, backend)[0]
    values, lse, extra_values, extra_lse = _add_epsilon(v, values, lse, exponent_max, key_padding_mask, eps)
    return performer_read(q, omega, values, lse, extra_values, extra_lse, backend)[0]


def _unsupported(width: int, eps: float) -> str | None:
    """What the Triton kernels do not take: tiles of these do not fit in the registers."""
    if width > 256:
        return f"heads wider than 256 (here {width})"
    return f"eps > 0 with heads wider than 128 (here {width})" if eps > 0 and width > 128 else None


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


def _check(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, eps: float) -> None:
    def fail(message: str) -> None:
        raise ValueError(f"performer_attention: {message}")

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(f"{name} has shape {tuple(x.shape)}; it must be (B, H, tokens, width)")
        if not x.is_floating_point():
            fail(f"{name} is {x.dtype}; it must be a floating-point tensor")
        if x.dtype != q.dtype or x.device != q.device:
            fail(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; they must agree")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        fail(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be (B, H, S, D) of the same B, H and D")
    if v.shape[:3] != k.shape[:3]:
        fail(f"v has shape {tuple(v.shape)}; with k {tuple(k.shape)} it must be (B, H, S, Dv) of the same B, H and S")
    heads, width = q.shape[1], q.shape[3]
    if omega.ndim not in (2, 3) or omega.shape[-1] != width or omega.shape[:-2] not in ((), (heads,)):
        fail(f"omega has shape {tuple(omega.shape)}; it must be (M, {width}) or ({heads}, M, {width})")
    if omega.shape[-2] == 0:
        fail("omega has M=0 features; it must have at least 1")
    if omega.device != q.device:
        fail(f"omega is on {omega.device} but q is on {q.device}; move it there")
    if omega.requires_grad:
        fail("omega requires a gradient, which is not implemented; pass omega.detach()")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            fail(f"key_padding_mask is {key_padding_mask.dtype}; it must be bool, True = a real key")
        shape = (k.shape[0], k.shape[2])
        if key_padding_mask.shape != shape:
            fail(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be (B, S) = {shape}")
        if key_padding_mask.device != q.device:
            fail(f"key_padding_mask is on {key_padding_mask.device} but q is on {q.device}; move it there")
    if not eps >= 0:
        fail(f"eps={eps} must be at least 0")
