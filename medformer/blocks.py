"""The pre-norm transformer block and its regularisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medformer.attention import SelfAttention
from medformer.mlp import MLP, GatedMLP
from medformer.moe import SwitchMLP

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["Block"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width: channels of a token.
        attention: mixes the tokens.
        mlp: works on each token.
        drop_path: probability with which a sample skips each branch in training (stochastic depth,
            Huang et al. 2016).
        layer_scale: start value of a learned gain per channel on each branch (Touvron et al. 2021), or None.
        norm_eps: added to the variance in both norms.
    """

    def __init__(
        self,
        width: int,
        attention: SelfAttention,
        mlp: MLP | GatedMLP | SwitchMLP,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = mlp
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
        self.scale2 = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
        self.drop_path = drop_path

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
        rotary: Float[Tensor, "2 N W"] | None = None,
        grid: Sequence[int] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """As `SelfAttention.forward`."""
        mixed = self.attention(self.norm1(x), key_padding_mask=key_padding_mask, rotary=rotary, grid=grid)
        x = x + self._regularise(mixed, self.scale1)
        normed = self.norm2(x)
        if isinstance(self.mlp, SwitchMLP):  # whose experts have no room for padding
            branch = self.mlp(normed, key_padding_mask=key_padding_mask)
        else:
            branch = self.mlp(normed)
        return x + self._regularise(branch, self.scale2)

    def _regularise(self, branch: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            branch = branch * scale
        if self.drop_path == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.drop_path
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
        return branch * (kept.to(branch.dtype) / keep)
