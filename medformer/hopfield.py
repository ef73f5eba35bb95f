"""Modern Hopfield networks: attention that may look again, until what it retrieves no longer changes.

    xi <- softmax(beta xi K^T) K until |change of xi| <= tolerance, or for `steps` steps;  out = softmax(beta xi K^T) V

beta, one a head and learned, is the inverse temperature: large, and a state falls to the nearest stored pattern; small,
and it falls to the mean of all. Source: Ramsauer et al. 2021, eq. (3) and (10). Zero steps are plain attention.
Shape legend: B batch, H heads, N state patterns, S stored patterns, D head width, C model width, Q learned queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medformer.attention import SelfAttention, masked_attention
from medformer.linear import Linear

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["HopfieldAttention", "HopfieldLayer", "HopfieldLookup", "HopfieldPooling", "hopfield_retrieve"]


def hopfield_retrieve(
    state: Float[Tensor, "B H N D"],
    stored: Float[Tensor, "B H S D"],
    values: Float[Tensor, "B H S Dv"],
    beta: Float[Tensor, " H"],
    *,
    steps: int | None = None,
    tolerance: float | None = 1e-4,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """What each state retrieves.

    A state that moved by at most `tolerance` rests from then on, whatever the others do. Memory is linear in N and S.

    Args:
        state: patterns to start from.
        stored: patterns to fall to.
        values: what is read at the end, from where the stored patterns are.
        beta: inverse temperature of each head, of states and patterns as they are (1 / sqrt(D) is plain attention).
        steps: most updates before the reading; 0 for plain attention, None for as many as it takes (which
            `torch.compile` breaks its graph for).
        tolerance: length of the change of a state at which it rests; None: never, all `steps` are taken, and nobody
            waits for a GPU to say that all rest.
        key_padding_mask: True where a stored pattern is real. Without one a state gives 0.
    """
    if steps is None and tolerance is None:
        raise ValueError("hopfield_retrieve: steps=None and tolerance=None would never end; give one of them")
    scaled = beta.to(state.dtype)[:, None, None]
    moving, step = None, 0
    while steps is None or step < steps:
        found = masked_attention(state * scaled, stored, stored, key_padding_mask, scale=1.0)
        step += 1
        if tolerance is None:
            state = found
            continue
        with torch.no_grad():
            exact = found.to(torch.promote_types(found.dtype, torch.float32))
            change = (exact - state).norm(dim=-1, keepdim=True)
            # Below the rounding of the state itself nothing would ever rest.
            moves = change > (8 * torch.finfo(found.dtype).eps * exact.norm(dim=-1, keepdim=True)).clamp(min=tolerance)
        state = found if moving is None else torch.where(moving, found, state)
        moving = moves if moving is None else moving & moves
        # With a limit a compiled graph takes all the steps, in which resting states stay where they are.
        if (steps is None or not torch.compiler.is_compiling()) and not moving.any():
            break
    return masked_attention(state * scaled, stored, values, key_padding_mask, scale=1.0)


class HopfieldAttention(SelfAttention):
    """Self-association: the tokens are the states and the stored patterns. Quadratic in the tokens.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        steps: most updates before the reading; 0 for attention with a learned temperature, None for no limit.
        tolerance: length of the change of a state at which it rests.
        beta: start value of each head's inverse temperature; None takes 1 / sqrt(D).
        qk_norm: LayerNorm states and stored patterns over each head.
    """

    def __init__(
        self, width: int, heads: int, *, steps: int | None = 3, tolerance: float = 1e-4, beta: float | None = None,
        qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, qk_norm=qk_norm)
        _check(type(self).__name__, steps=steps, tolerance=tolerance, beta=beta)
        self.steps = steps
        self.tolerance: float | None = tolerance
        self.log_beta = nn.Parameter(_log_beta(heads, self.head_width, beta))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, grid: Sequence[int] | None = None
    ) -> Tensor:
        return hopfield_retrieve(
            q, k, v, self.log_beta.exp(), steps=self.steps, tolerance=self.tolerance, key_padding_mask=key_padding_mask
        )


class HopfieldLayer(nn.Module):
    """Association of two sets: each state retrieves from the stored patterns that the call brings.

    Args:
        width: channels of a state, and of the output.
        heads: must divide `width`.
        stored_width: channels of a stored pattern; None: `width`.
        steps, tolerance, beta: as in `HopfieldAttention`.
    """

    def __init__(
        self, width: int, heads: int, *, stored_width: int | None = None, steps: int | None = None,
        tolerance: float = 1e-4, beta: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(type(self).__name__, steps=steps, tolerance=tolerance, beta=beta, width=width, heads=heads)
        self.heads, self.steps, self.tolerance = heads, steps, tolerance
        self.state = Linear(width, width)
        self.stored = Linear(width if stored_width is None else stored_width, 2 * width)
        self.proj = Linear(width, width)
        self.log_beta = nn.Parameter(_log_beta(heads, width // heads, beta))

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        stored: Float[Tensor, "B S Cs"],
        *,
        key_padding_mask: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """`key_padding_mask` is True where a stored pattern is real."""
        keys, values = self.stored(stored).chunk(2, dim=-1)
        return self._retrieve(_heads(self.state(x), self.heads), keys, values, key_padding_mask)

    def _retrieve(self, state: Tensor, keys: Tensor, values: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        out = hopfield_retrieve(
            state, _heads(keys, self.heads), _heads(values, self.heads), self.log_beta.exp(), steps=self.steps,
            tolerance=self.tolerance, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        return self.proj(out.transpose(1, 2).flatten(2))


class HopfieldPooling(HopfieldLayer):
    """A set to a few vectors: learned states, the same for every sample, retrieve from its tokens.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        queries: Q, vectors a sample is pooled to.
        steps, tolerance, beta: as in `HopfieldAttention`.
    """

    def __init__(
        self, width: int, heads: int, *, queries: int = 1, steps: int | None = None, tolerance: float = 1e-4,
        beta: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, steps=steps, tolerance=tolerance, beta=beta)
        if queries < 1:
            raise ValueError(f"HopfieldPooling: queries={queries} must be at least 1")
        self.state = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, width), std=0.02))

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B N C"], *, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B Q C"]:
        """`key_padding_mask` is True where a token is real."""
        keys, values = self.stored(x).chunk(2, dim=-1)
        return self._retrieve(
            _heads(self.state.to(keys.dtype).expand(x.shape[0], -1, -1), self.heads), keys, values, key_padding_mask
        )


class HopfieldLookup(HopfieldLayer):
    """A learned memory: every token retrieves from patterns that are parameters, for example prototypes of tissues.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        patterns: S, stored patterns.
        steps, tolerance, beta: as in `HopfieldAttention`.
    """

    def __init__(
        self, width: int, heads: int, *, patterns: int, steps: int | None = None, tolerance: float = 1e-4,
        beta: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, steps=steps, tolerance=tolerance, beta=beta)
        if patterns < 1:
            raise ValueError(f"HopfieldLookup: patterns={patterns} must be at least 1")
        self.stored = nn.Parameter(torch.randn(patterns, width))
        self.values = nn.Parameter(nn.init.trunc_normal_(torch.empty(patterns, width), std=0.02))

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:  # type: ignore[override]
        state = _heads(self.state(x), self.heads)
        keys, values = (t.to(x.dtype).expand(x.shape[0], -1, -1) for t in (self.stored, self.values))
        return self._retrieve(state, keys.to(state.dtype), values.to(state.dtype), None)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _log_beta(heads: int, head_width: int, beta: float | None) -> Tensor:
    return torch.full((heads,), math.log(head_width**-0.5 if beta is None else beta))


def _check(
    name: str, *, steps: int | None, tolerance: float, beta: float | None, width: int = 1, heads: int = 1
) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"{name}: heads={heads} must divide width={width}")
    if steps is not None and steps < 0:
        raise ValueError(f"{name}: steps={steps} must be at least 0, or None for no limit")
    if not tolerance >= 0 or (steps is None and tolerance == 0):
        raise ValueError(f"{name}: tolerance={tolerance} must be at least 0, and above it without a limit of steps")
    if beta is not None and not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"{name}: beta={beta} must be above 0")
