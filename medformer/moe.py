"""Switch mixture of experts: every token goes through one of E MLPs, chosen by a router.

    p = softmax(W x),   e = argmax p,   out = p_e MLP_e(x)

An expert takes at most ceil(capacity_factor * N / E) tokens of a sample, the first in their order; the others give 0,
so that the residual carries them on. Source: Fedus et al. 2022, eq. (1) to (6); z-loss: Zoph et al. 2022, eq. (5).
Differs: capacity counts by sample and not by batch, so that no sample's output depends on its batch-mates.
Shape legend: B batch, N tokens, C model width, F hidden channels, E experts, K capacity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer_kernels._tracing import least

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["RouterStatistics", "SwitchMLP", "auxiliary_loss"]


class RouterStatistics(NamedTuple):
    """What the router did in the last call, over the real tokens of the batch; without gradients."""

    load: Float[Tensor, " E"]
    """Fraction of the tokens that chose each expert, before any was dropped."""
    dropped: Float[Tensor, ""]
    """Fraction of the tokens for which their expert had no room."""
    entropy: Float[Tensor, ""]
    """Mean entropy of the choice, in nats: ln E where the router does not decide, 0 where it is sure."""
    balance_loss: Float[Tensor, ""]
    """E sum_e load_e mean(p_e), before its coefficient: 1 when all experts share alike."""
    z_loss: Float[Tensor, ""]
    """mean(logsumexp(logits)^2), before its coefficient."""


class SwitchMLP(nn.Module):
    """Top-1 mixture of GELU MLPs; all experts run as one batched matrix product, without a loop over tokens or experts.

    Args:
        width: channels of a token.
        hidden: channels inside each expert.
        experts: E, at least 2.
        capacity_factor: room of an expert in training, as a multiple of an equal share.
        eval_capacity_factor: the same outside of training.
        balance_coefficient: of the load-balance loss in `aux_loss` (alpha).
        z_coefficient: of the router's z-loss in `aux_loss`.
        dropout: of the hidden channels of the experts, in training.
        jitter: in training the router sees its input times uniform noise of 1 - jitter to 1 + jitter; the experts see
            it as it is.

    Attributes:
        aux_loss: after a call, the weighted sum of both losses in float32; `auxiliary_loss` sums it over a model.
        statistics: after a call, what the router did.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        balance_coefficient: float = 1e-2,
        z_coefficient: float = 1e-3,
        dropout: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        if experts < 2:
            raise ValueError(f"SwitchMLP: experts={experts} must be at least 2; one expert is an MLP")
        for name, value in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"SwitchMLP: {name}={value} must be above 0")
        for name, value in (("dropout", dropout), ("jitter", jitter)):
            if not 0 <= value < 1:
                raise ValueError(f"SwitchMLP: {name}={value} must be at least 0 and below 1")
        self.experts = experts
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.dropout, self.jitter = dropout, jitter
        self.router = nn.Parameter(torch.empty(experts, width))
        self.weight1 = nn.Parameter(torch.empty(experts, width, hidden))
        self.bias1 = nn.Parameter(torch.zeros(experts, hidden))
        self.weight2 = nn.Parameter(torch.empty(experts, hidden, width))
        self.bias2 = nn.Parameter(torch.zeros(experts, width))
        for weight in (self.router, self.weight1, self.weight2):
            nn.init.trunc_normal_(weight, std=0.02)
        self.aux_loss: Tensor | None = None
        self.statistics: RouterStatistics | None = None

    def forward(
        self, x: Float[Tensor, "B N C"], *, key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """The chosen expert's output for each token, 0 for tokens that were dropped.

        Args:
            x: tokens.
            key_padding_mask: True where a token is real; the others take no room, count nowhere and give 0.
        """
        batch, tokens, _ = x.shape
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        logits = self._logits(x)
        choice = logits.argmax(dim=-1)
        chosen = F.one_hot(choice, self.experts)  # (B, N, E)
        capacity = room = least(self._share(tokens, factor), tokens)
        if key_padding_mask is not None:
            chosen = chosen * key_padding_mask[..., None]
            room = self._share(key_padding_mask.sum(dim=1, keepdim=True), factor)
        # Places of an expert are taken in the order of the tokens: class and register tokens, at the front, are safe.
        place = (chosen.cumsum(dim=1) * chosen).sum(dim=-1) - 1
        kept = (place >= 0) & (place < room)
        probability = self._account(logits, chosen, kept, key_padding_mask)
        # Dropped tokens share one place behind the last expert, which is never read.
        slot = torch.where(kept, choice * capacity + place, self.experts * capacity)
        index = slot[..., None].expand_as(x)
        buffer = x.new_zeros(batch, self.experts * capacity + 1, x.shape[2]).scatter(1, index, x)
        given = buffer[:, :-1].unflatten(1, (self.experts, capacity)).transpose(0, 1).flatten(1, 2)  # (E, B K, C)
        hidden = F.gelu(torch.baddbmm(self.bias1[:, None], given, self.weight1))
        hidden = F.dropout(hidden, self.dropout, self.training)
        out = torch.baddbmm(self.bias2[:, None], hidden, self.weight2)
        out = out.unflatten(1, (batch, capacity)).transpose(0, 1).flatten(1, 2)  # (B, E K, C)
        out = F.pad(out, (0, 0, 0, 1)).gather(1, index)
        return out * probability.gather(-1, choice[..., None]).to(out.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last call left, which holds its graph and can be neither copied nor pickled."""
        return self.__dict__ | {"aux_loss": None, "statistics": None}

    def _share(self, tokens: Any, factor: float) -> Any:
        """ceil(factor * tokens / E) of a number, symbol or tensor: in whole numbers, so that all three round alike."""
        return -(-tokens * round(factor * 2**16) // (self.experts * 2**16))

    def _logits(self, x: Tensor) -> Float[Tensor, "B N E"]:
        """Of the router, in float32 or better whatever autocast says."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            seen = x.to(exact)
            if self.training and self.jitter:
                # A new tensor: in place it would reach the experts wherever .to() copies nothing.
                seen = seen * torch.empty_like(seen).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(seen, self.router.to(exact))

    def _account(
        self, logits: Tensor, chosen: Tensor, kept: Tensor, key_padding_mask: Tensor | None
    ) -> Float[Tensor, "B N E"]:
        """The probabilities; sets `aux_loss` and `statistics`."""
        log_total = logits.logsumexp(dim=-1)
        log_probability = logits - log_total[..., None]
        probability = log_probability.exp()
        real = torch.ones_like(kept) if key_padding_mask is None else key_padding_mask
        count = real.sum().clamp(min=1)

        def mean(of: Tensor) -> Tensor:
            """Over the real tokens of the batch."""
            return torch.where(real[..., None], of, 0.0).sum(dim=(0, 1)) / count

        load = chosen.to(logits.dtype).sum(dim=(0, 1)) / count
        balance = self.experts * (load * mean(probability)).sum()
        z = mean(log_total.square()[..., None])[0]
        self.aux_loss = self.balance_coefficient * balance + self.z_coefficient * z
        self.statistics = RouterStatistics(
            load=load, dropped=mean(1.0 - kept[..., None].to(logits.dtype))[0],
            entropy=-mean(probability * log_probability).sum().detach(), balance_loss=balance.detach(),
            z_loss=z.detach(),
        )  # fmt: skip
        return probability


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """Sum of what the experts of a model ask to be added to the loss of its last call; 0.0 without experts."""
    losses = [m.aux_loss for m in model.modules() if isinstance(m, SwitchMLP) and m.aux_loss is not None]
    return torch.stack(losses).sum() if losses else 0.0
