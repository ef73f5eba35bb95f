"""Expire-Span: causal attention in which every token learns how long it is remembered.

A token h_i lives e_i = L sigmoid(w . h_i + b) steps and then fades over R more:

    m_ti = clip(1 + (e_i - (t - i)) / R, 0, 1)     a'_ti = m_ti a_ti / sum_j m_tj a_tj,  a = softmax(q k^T / sqrt(D))

Source: Sukhbaatar et al. 2021, eq. (4) to (9). Differs: the softmax is taken over the living only, so that a forgotten
key of large score cannot underflow the rest (the renormalised weights are the same).
Shape legend: B batch, H heads, N tokens, D head width, C = H * D model width, M remembered tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from medformer.linear import Linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = ["ExpireSpanAttention", "Memory"]


class Memory(NamedTuple):
    """The tokens that a later query may still read. Without them `step` tokens were seen."""

    k: Float[Tensor, "B H M D"]
    v: Float[Tensor, "B H M D"]
    span: Float[Tensor, "B M"]
    """Steps that a token lives; -inf where a place holds none."""
    born: Int[Tensor, "B M"]
    step: int
    """Tokens seen so far: the age of a memory is `step - born`."""


class ExpireSpanAttention(nn.Module):
    """Causal attention over the tokens that have not expired.

    The sequence runs in chunks; between them expired tokens leave the memory, so that time and memory follow the spans
    that were learned and not the length. `torch.compile` cannot have sizes that depend on values: there only what no
    span can reach is dropped, and the result is the same.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        max_span: L, the longest life in tokens.
        ramp: R, tokens over which a memory fades.
        initial_span: fraction of `max_span` that every token lives at the start.
        chunk: tokens that are computed at once.

    Attributes:
        span_loss: after a call, the mean over queries of sum e_i / (R L) over the memories on their ramp, about the
            mean span of what expires as a fraction of `max_span`. Add a small multiple of it to the loss: nothing else
            makes spans short. None before the first call.
        peak_memory: most tokens remembered between two chunks of the last call.
    """

    def __init__(
        self, width: int, heads: int, *, max_span: int, ramp: int = 32, initial_span: float = 0.1, chunk: int = 128
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"ExpireSpanAttention: heads={heads} must divide width={width}")
        for name, value in (("max_span", max_span), ("ramp", ramp), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"ExpireSpanAttention: {name}={value} must be at least 1 token")
        if not 0 < initial_span < 1:
            raise ValueError(f"ExpireSpanAttention: initial_span={initial_span} must be between 0 and 1 (of max_span)")
        self.heads, self.max_span, self.ramp, self.chunk = heads, max_span, ramp, chunk
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        # No nn.Linear: a model that draws all its linear layers again would scatter the spans.
        self.span_weight = nn.Parameter(torch.zeros(width))
        self.span_bias = nn.Parameter(torch.tensor(-math.log(1 / initial_span - 1)))
        self.span_loss: Tensor | None = None
        self.peak_memory = 0

    def forward(
        self, x: Float[Tensor, "B N C"], *, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """Mix the tokens; token t reads those of 0 to t that live.

        Args:
            x: tokens.
            key_padding_mask: True where a token is real; False tokens are never read.
        """
        return self.extend(x, key_padding_mask=key_padding_mask)[0]

    def extend(
        self, x: Float[Tensor, "B N C"], memory: Memory | None = None, *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> tuple[Float[Tensor, "B N C"], Memory]:  # fmt: skip
        """Mix the next tokens of a sequence, of which `memory` remembers the part before; and the memory after them.

        `forward` in pieces: pieces of any length, down to one token, give what one call gives. Sets `span_loss` to that
        of these tokens.
        """
        _check_mask(x, key_padding_mask)
        q, k, v = self._split(x)
        span = self._spans(x, key_padding_mask)
        if memory is None:
            empty = k[:, :, :0]
            memory = Memory(empty, v[:, :, :0], span[:, :0], torch.zeros_like(span[:, :0], dtype=torch.int64), 0)
        outs, loss, self.peak_memory = [], span.new_zeros(()), 0
        for start in range(0, x.shape[1], self.chunk):
            here = slice(start, start + self.chunk)
            now = memory.step + torch.arange(span[:, here].shape[1], device=x.device)
            memory = Memory(
                torch.cat([memory.k, k[:, :, here]], dim=2),
                torch.cat([memory.v, v[:, :, here]], dim=2),
                torch.cat([memory.span, span[:, here]], dim=1),
                torch.cat([memory.born, now.expand(x.shape[0], -1)], dim=1),
                memory.step + now.shape[0],
            )
            alive = self._alive(memory, now)
            weights = _living_softmax(q[:, :, here], memory.k, alive[:, None])
            outs.append(weights.to(v.dtype) @ memory.v)
            fading = (alive > 0) & (alive < 1)
            loss = loss + torch.where(fading, memory.span[:, None], 0.0).sum()
            memory = self._trim(memory)
            self.peak_memory = max(self.peak_memory, memory.k.shape[2])
        queries = max(x.shape[0] * x.shape[1], 1)
        self.span_loss = loss / (queries * self.ramp * self.max_span)
        out = torch.cat(outs, dim=2) if outs else q
        return self.proj(out.transpose(1, 2).flatten(2)), memory

    def attention_rows(
        self, x: Float[Tensor, "B N C"], queries: Sequence[int] = (-1,), *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B H Q N"]:  # fmt: skip
        """Weights with which the chosen tokens read every token; a row sums to 1, or is 0 without a real token."""
        _check_mask(x, key_padding_mask)
        q, k, v = self._split(x)
        now = torch.arange(x.shape[1], device=x.device)
        memory = Memory(k, v, self._spans(x, key_padding_mask), now.expand(x.shape[0], -1), x.shape[1])
        chosen = list(queries)
        return _living_softmax(q[:, :, chosen], k, self._alive(memory, now[chosen])[:, None])

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last call, which holds its graph and can be neither copied nor pickled."""
        return self.__dict__ | {"span_loss": None}

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _spans(self, x: Tensor, key_padding_mask: Tensor | None) -> Float[Tensor, "B N"]:
        """Steps that each token lives, in float32 or better: a span of thousands does not fit in bfloat16."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            span = self.max_span * (x.to(exact) @ self.span_weight.to(exact) + self.span_bias.to(exact)).sigmoid()
        return span if key_padding_mask is None else span.masked_fill(~key_padding_mask, -torch.inf)

    def _alive(self, memory: Memory, now: Int[Tensor, " N"]) -> Float[Tensor, "B N M"]:
        """m_ti, and 0 for memories younger than the query."""
        age = now[:, None] - memory.born[:, None]
        return (1 + (memory.span[:, None] - age) / self.ramp).clamp(0, 1).masked_fill(age < 0, 0.0)

    def _within_reach(self, memory: Memory) -> Memory:
        """Without the tokens that are older than any token gets, whatever the spans: shapes follow from shapes."""
        reach = self.max_span + self.ramp
        return Memory(
            memory.k[:, :, -reach:], memory.v[:, :, -reach:], memory.span[:, -reach:], memory.born[:, -reach:],
            memory.step,
        )  # fmt: skip

    def _trim(self, memory: Memory) -> Memory:
        """Without the tokens that no later query can read."""
        if torch.compiler.is_compiling():
            return self._within_reach(memory)
        alive = memory.span + self.ramp > memory.step - memory.born
        kept = int(alive.sum(dim=1).max()) if alive.numel() else 0
        if kept == memory.k.shape[2]:
            return memory
        # The living first, in their order; samples that have fewer keep some of the dead, which stay dead.
        order = (~alive).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
        index = order[:, None, :, None].expand(-1, memory.k.shape[1], -1, memory.k.shape[3])
        return Memory(
            memory.k.gather(2, index), memory.v.gather(2, index), memory.span.gather(1, order),
            memory.born.gather(1, order), memory.step,
        )  # fmt: skip


def _living_softmax(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H M D"], alive: Float[Tensor, "B 1 N M"]
) -> Float[Tensor, "B H N M"]:
    """alive softmax(q k^T / sqrt(D)), each row divided by its sum; 0 where nothing lives."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(exact) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(alive == 0, -torch.inf)
    top = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp() * alive
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(exact).tiny)


def _check_mask(x: Tensor, key_padding_mask: Tensor | None) -> None:
    if key_padding_mask is not None and (key_padding_mask.dtype != torch.bool or key_padding_mask.shape != x.shape[:2]):
        raise ValueError(
            f"ExpireSpanAttention: key_padding_mask of shape {tuple(key_padding_mask.shape)} and dtype "
            f"{key_padding_mask.dtype} must be bool of shape {tuple(x.shape[:2])}, True where a token is real"
        )
