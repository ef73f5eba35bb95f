"""Self-attention over tokens: exact softmax, or FAVOR+ (Performer) whose cost is linear in the tokens.

Shape legend: B batch, H heads, N tokens, D head width, C = H * D model width, M random features.
"""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer_kernels import (
    default_num_features,
    orthogonal_features,
    performer_attention,
    performer_features,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["PerformerAttention", "SoftmaxAttention"]

HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
# Keys whose features are held at once while one attention row is computed: 4096 * M floats a head.
ROW_CHUNK = 4096
# Odd, and 2^32 over the golden ratio: seeds of successive draws lie far apart in the 32 bits that CPU generators keep.
_GOLDEN = 0x9E3779B1


class _Attention(nn.Module):
    """What both attentions share: the projections, the optional norm of queries and keys, the heads."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{type(self).__name__}: heads={heads} must divide width={width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B N C"], *, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """Mix the tokens.

        Args:
            x: tokens.
            key_padding_mask: True where a token is real; False tokens are read by nobody (their own output
                means nothing). A sample with no real token mixes to 0 before the last projection.
        """
        _check_mask(self, x, key_padding_mask)
        q, k, v = self._split(x)
        out = self._attend(q, k, v, key_padding_mask)
        return self.proj(out.transpose(1, 2).flatten(2))

    def attention_row(
        self,
        x: Float[Tensor, "B N C"],
        *,
        query: int = 0,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B H N"]:
        """Weights with which token `query` reads every token: a row sums to 1, or is 0 without a real token.

        Exact for both attentions, in float32 or better; memory is linear in N.
        """
        _check_mask(self, x, key_padding_mask)
        q, k, _ = self._split(x)
        exact = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            log_weight = self._log_row(q[:, :, query].to(exact), k.to(exact))
            if key_padding_mask is None:
                return log_weight.softmax(dim=-1)
            padding = ~key_padding_mask[:, None]
            return log_weight.masked_fill(padding, -torch.inf).softmax(dim=-1).masked_fill(padding, 0.0)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to three strided (B, H, N, D) views of one buffer."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            # Autocast runs the norm in float32: return to the width of v.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _log_row(self, q: Float[Tensor, "B H D"], k: Float[Tensor, "B H N D"]) -> Float[Tensor, "B H N"]:
        """Logarithm of the unnormalised weight of each key for one query."""
        raise NotImplementedError


class SoftmaxAttention(_Attention):
    """Exact attention, softmax(q k^T / sqrt(D)) v; quadratic in the tokens.

    Runs xformers' memory-efficient kernel on CUDA where xformers is installed and there is no key padding
    mask, and `torch.nn.functional.scaled_dot_product_attention` otherwise.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        qk_norm: LayerNorm queries and keys over each head.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if _use_xformers(q, key_padding_mask):
            from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

            return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if key_padding_mask is None:
            return F.scaled_dot_product_attention(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_padding_mask[:, None, None])
        # Backends disagree about a row without any key.
        return out.masked_fill(~key_padding_mask.any(dim=1)[:, None, None, None], 0.0)

    def _log_row(self, q: Tensor, k: Tensor) -> Tensor:
        return (k @ q[..., None])[..., 0] / math.sqrt(q.shape[-1])


class PerformerAttention(_Attention):
    """FAVOR+ attention, phi(q) (phi(K)^T V) / phi(q) sum phi(k); linear in the tokens.

    The random features are drawn from `seed`, separately for each head, and saved with the weights; `redraw` draws
    the next. Source: Choromanski et al. 2021. An estimate of softmax attention: close while queries and keys are
    short, coarse once their norms grow (then `qk_norm` or more features help). `approximation_error` of
    `medformer_kernels.performer` measures it.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        num_features: random features per head, M; None takes D ln D rounded to a multiple of 64.
        qk_norm: LayerNorm queries and keys over each head.
        seed: of the random features.
        causal: a token reads itself and those before it only.
        train_features: make the random features parameters, which then are never redrawn.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        num_features: int | None = None,
        qk_norm: bool = False,
        seed: int = 0,
        causal: bool = False,
        train_features: bool = False,
    ) -> None:
        super().__init__(width, heads, qk_norm=qk_norm)
        head_dim = width // heads
        if num_features is None:
            num_features = default_num_features(head_dim)
        self.seed, self.causal = seed, causal
        omega = orthogonal_features(num_features, head_dim, heads=heads, seed=seed)
        self.omega: Tensor
        self.draws: Tensor
        if train_features:
            self.omega = nn.Parameter(omega)
        else:
            self.register_buffer("omega", omega)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def redraw(self) -> None:
        """Replace the random features by the next draw, on their device; call it between steps, not inside one.

        Draw n follows from `seed` and n, and n is saved with the weights: a resumed run goes on with the same draws.
        """
        if isinstance(self.omega, nn.Parameter):
            raise ValueError("PerformerAttention.redraw: train_features=True trains the features; they are not redrawn")
        self.draws += 1
        heads, num_features, head_dim = self.omega.shape
        seed = (self.seed + int(self.draws) * _GOLDEN) % 2**63
        drawn = orthogonal_features(num_features, head_dim, heads=heads, seed=seed, device=self.omega.device)
        self.omega.copy_(drawn)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        return performer_attention(q, k, v, self.omega, causal=self.causal, key_padding_mask=key_padding_mask)

    def attention_row(
        self,
        x: Float[Tensor, "B N C"],
        *,
        query: int = 0,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B H N"]:
        if not self.causal:
            return super().attention_row(x, query=query, key_padding_mask=key_padding_mask)
        _check_mask(self, x, key_padding_mask)
        seen = range(x.shape[1])[query] + 1
        mask = None if key_padding_mask is None else key_padding_mask[:, :seen]
        row = super().attention_row(x[:, :seen], query=seen - 1, key_padding_mask=mask)
        return F.pad(row, (0, x.shape[1] - seen))

    def _log_row(self, q: Tensor, k: Tensor) -> Tensor:
        log_q = performer_features(q[:, :, None], self.omega)
        rows = [
            torch.logsumexp(log_q + performer_features(keys, self.omega), dim=-1) for keys in k.split(ROW_CHUNK, dim=2)
        ]
        return torch.cat(rows, dim=-1)


def _use_xformers(q: Tensor, key_padding_mask: Tensor | None) -> bool:
    """Whether xformers serves this call: installed, CUDA, no mask, a dtype it has kernels for."""
    return HAS_XFORMERS and q.is_cuda and key_padding_mask is None and q.dtype != torch.float64


def _check_mask(module: nn.Module, x: Tensor, key_padding_mask: Tensor | None) -> None:
    if key_padding_mask is None:
        return
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"{type(module).__name__}: key_padding_mask of shape {tuple(key_padding_mask.shape)} and dtype "
            f"{key_padding_mask.dtype} must be bool of shape {tuple(x.shape[:2])}, True where a token is real"
        )
