"""Self-attention over tokens: exact softmax, or FAVOR+ (Performer) whose cost is linear in the tokens.

Shape legend: B batch, H heads, N tokens, D head width, C = H * D model width, M random features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer.linear import Linear
from medformer.position import rotate
from medformer_kernels import (
    default_num_features,
    orthogonal_features,
    performer_attention,
    performer_block_attention,
)
from medformer_kernels._tracing import certain

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["PerformerAttention", "SelfAttention", "SoftmaxAttention", "exact_attention", "masked_attention"]

HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
# Keys times head width up to which PyTorch's gradient takes a CPU longer in 16 bits than in 32: 2 to 9 times as
# long at 64 keys and below (misc/LOG.md).
_SHORT = 16_384
# Offsets in blocks, along an axis, that have weights of their own.
_REACH = 8
# Odd, and 2^32 over the golden ratio: seeds of successive draws are far apart in the 32 bits that CPU generators keep.
_GOLDEN = 0x9E3779B1


class SelfAttention(nn.Module):
    """What the attentions share: projections, the optional norm of queries and keys, rotary positions, heads, maps.

    A kind of attention is a function `_attend` of q, k and v, linear in v.

    Args:
        width: channels of a token.
        heads: must divide `width`, unless `head_width` is given.
        qk_norm: LayerNorm queries and keys over each head.
        head_width: channels of a head; None: `width / heads`.
        qkv_bias: whether queries, keys and values have a bias.
    """

    _rows_alone = True
    """A query's output does not depend on the other queries."""

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool = False, head_width: int | None = None, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or (head_width is None and width % heads):
            raise ValueError(f"{type(self).__name__}: heads={heads} must divide width={width}, or give head_width")
        self.heads = heads
        self.head_width = width // heads if head_width is None else head_width
        inner = heads * self.head_width
        self.qkv = Linear(width, 3 * inner, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_width, eps=1e-6) if qk_norm else None
        self.k_norm = nn.LayerNorm(self.head_width, eps=1e-6) if qk_norm else None
        self.proj = Linear(inner, width)

    @torch.no_grad()
    def start_alike(self, deviation: float) -> None:
        """Draw the projection of the queries anew and copy it to the keys: a token reads its like from the first step.

        Args:
            deviation: of an entry of a query, for tokens of unit variance.
        """
        q, k, _ = self.qkv.weight.chunk(3)
        k.copy_(q.normal_(std=deviation * self.qkv.in_features**-0.5))
        if self.qkv.bias is not None:
            q, k, _ = self.qkv.bias.chunk(3)
            k.copy_(q.zero_())

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
        rotary: Float[Tensor, "2 N W"] | None = None,
        grid: Sequence[int] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Mix the tokens.

        Args:
            x: tokens.
            key_padding_mask: True where a token is real; False tokens are never read (their own output
                means nothing). A sample with no real token mixes to 0 before the last projection.
            rotary: of `RotaryPosition`, turning queries and keys by where they are.
            grid: tokens of each axis, z first, behind the class and register tokens; for attentions that look at it.
        """
        _check_mask(self, x, key_padding_mask)
        q, k, v = self._split(x, rotary)
        out = self._attend(q, k, v, key_padding_mask, grid)
        return self.proj(out.transpose(1, 2).flatten(2))

    def attention_rows(
        self,
        x: Float[Tensor, "B N C"],
        queries: Sequence[int] = (0,),
        *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
        rotary: Float[Tensor, "2 N W"] | None = None,
        grid: Sequence[int] | None = None,
    ) -> Float[Tensor, "B H Q N"]:
        """Weights with which the chosen tokens read every token: rows sum to 1, or are 0 without a real token.

        Exact for every attention, in float32 or better: the output is linear in the values, so its gradient by them
        is the row. Memory is linear in N.
        """
        chosen = [range(x.shape[1])[query] for query in queries]
        if self._rows_alone:
            weights = torch.eye(len(chosen), device=x.device)
        else:
            weights, chosen = F.one_hot(torch.tensor(chosen, device=x.device), x.shape[1]), None
        return self._pull(x, weights.expand(x.shape[0], -1, -1), chosen, key_padding_mask, rotary, grid)

    def pull_back(
        self,
        x: Float[Tensor, "B N C"],
        weights: Float[Tensor, "B Q N"],
        *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
        rotary: Float[Tensor, "2 N W"] | None = None,
        grid: Sequence[int] | None = None,
    ) -> Float[Tensor, "B H Q N"]:
        """`weights` times the attention matrix of each head, which is not written out: for rollouts."""
        return self._pull(x, weights, None, key_padding_mask, rotary, grid)

    def _pull(
        self, x: Tensor, weights: Tensor, chosen: list[int] | None, key_padding_mask: Tensor | None,
        rotary: Tensor | None, grid: Sequence[int] | None,
    ) -> Tensor:  # fmt: skip
        """weights (B, Q, queries) A over the chosen queries (None: all), as many rows at a time as a head is wide."""
        _check_mask(self, x, key_padding_mask)
        with torch.inference_mode(False), torch.no_grad():
            q, k, _ = self._split(x, rotary)
            exact = torch.promote_types(q.dtype, torch.float32)
            q, k = (q if chosen is None else q[:, :, chosen]).to(exact), k.to(exact)
        autocast = torch.autocast(x.device.type, enabled=False)
        with torch.inference_mode(False), autocast, torch.enable_grad():
            v = torch.zeros_like(k).requires_grad_()
            out = self._attend(q, k, v, key_padding_mask, grid)
            rows = []
            for some in weights.to(exact).split(v.shape[-1], dim=1):
                seed = F.pad(some.mT, (0, v.shape[-1] - some.shape[1]))[:, None].expand_as(out)
                (dv,) = torch.autograd.grad(out, v, seed, retain_graph=True)
                rows.append(dv[..., : some.shape[1]].mT)
        return torch.cat(rows, dim=2)

    def _split(self, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to three strided (B, H, N, D) views of one buffer."""
        if x.ndim != 3 or x.shape[2] != self.qkv.in_features:
            width = self.qkv.in_features
            raise ValueError(f"{type(self).__name__}: x has shape {tuple(x.shape)}; it must be (B, N, {width})")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            # Autocast runs the norm in float32: return to the width of v.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, grid: Sequence[int] | None
    ) -> Tensor:
        raise NotImplementedError


class SoftmaxAttention(SelfAttention):
    """Exact attention, softmax(q k^T / sqrt(D)) v; quadratic in the tokens.

    Runs xformers' memory-efficient kernel on CUDA where xformers is installed and there is no key padding
    mask, and `torch.nn.functional.scaled_dot_product_attention` otherwise.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        qk_norm: LayerNorm queries and keys over each head.
    """

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, grid: Sequence[int] | None = None
    ) -> Tensor:
        if _use_xformers(q, key_padding_mask):
            from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

            return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return masked_attention(q, k, v, key_padding_mask)


class PerformerAttention(SelfAttention):
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
        state_blocks: tokens along each axis of the blocks whose states are kept apart, for calls with a `grid`: a token
            reads those of near blocks more, by learned weights for each head, axis and offset up to `_REACH` blocks
            (`medformer_kernels.performer_block_attention`). They start at a factor of e^-0.5 a block. None: one state.
        prefix_tokens: class and register tokens in front, where there are `state_blocks`.
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
        state_blocks: Sequence[int] | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__(width, heads, qk_norm=qk_norm)
        if causal and state_blocks is not None:
            raise ValueError(
                f"PerformerAttention: state_blocks={state_blocks} has no causal form; leave one of them out"
            )
        head_dim = width // heads
        if num_features is None:
            num_features = default_num_features(head_dim)
        self.seed, self.causal = seed, causal
        self.state_blocks = None if state_blocks is None else tuple(state_blocks)
        self.prefix_tokens = prefix_tokens
        if state_blocks is not None:
            distance = torch.arange(-_REACH, _REACH + 1).abs()
            self.block_log_weights = nn.Parameter(distance.mul(-0.5).repeat(len(state_blocks), heads, 1))
        self._rows_alone = not causal and state_blocks is None
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

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, grid: Sequence[int] | None = None
    ) -> Tensor:
        omega = self.omega.to(q.dtype) if self.omega.dtype.itemsize < q.dtype.itemsize else self.omega
        if self.state_blocks is None:
            return performer_attention(q, k, v, omega, causal=self.causal, key_padding_mask=key_padding_mask)
        if grid is None:
            raise ValueError(
                f"PerformerAttention: state_blocks={self.state_blocks} needs `grid`, the tokens of each axis"
            )
        return performer_block_attention(
            q, k, v, omega, self.block_log_weights, grid=grid, block=self.state_blocks,
            prefix_tokens=self.prefix_tokens, key_padding_mask=key_padding_mask,
        )  # fmt: skip


def masked_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    key_padding_mask: Bool[Tensor, "B S"] | None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """softmax(scale q k^T) v over the real keys, `scale` 1 / sqrt(D) if None; 0 in a sample without any."""
    if key_padding_mask is None:
        return exact_attention(q, k, v, scale=scale)
    # Not only weight 0: a masked key may hold anything, and 0 * nan is nan.
    padding = ~key_padding_mask[:, None, :, None]
    k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    # Backends disagree about a row without any key: it reads all of them, and is cleared.
    empty = ~key_padding_mask.any(dim=1)[:, None, None, None]
    mask = (key_padding_mask[:, None, None] | empty).expand(-1, -1, q.shape[2], -1)
    return exact_attention(q, k, v, mask=mask, scale=scale).masked_fill(empty, 0.0)


def exact_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    *,
    mask: Bool[Tensor, "B 1 N S"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """softmax(scale q k^T) v by PyTorch, in float32 where 16 bits are slower: on a CPU, the gradient of few keys."""
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = certain(k.shape[2] * k.shape[3] <= _SHORT)  # not in a graph that leaves the size open
    if q.is_cpu and learning and q.dtype.itemsize == 2 and few:
        with torch.autocast("cpu", enabled=False):  # which would make it 16 bits again
            wide = (q.float(), k.float(), v.float())
            return F.scaled_dot_product_attention(*wide, mask, is_causal=causal, scale=scale).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


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
