"""The feed-forward half of a block, dense or gated; `moe` holds the one made of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer.linear import Linear

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["MLP", "GatedMLP"]


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which CLIP was trained with."""

    def forward(self, x: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Linear, activation, linear.

    Args:
        width: channels of a token.
        hidden: channels between the two layers.
        activation: exact GELU, its tanh approximation, or `QuickGELU`.
    """

    def __init__(
        self, width: int, hidden: int, *, activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    ) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.act = (
            QuickGELU() if activation == "quick_gelu" else nn.GELU("tanh" if activation == "gelu_tanh" else "none")
        )
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """fc2(silu(a) * b) with (a, b) = fc1(x). Source: Shazeer 2020, SwiGLU, with biases as in DINOv2.

    Args:
        width: channels of a token.
        hidden: channels between the two layers, after the gate.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 2 * hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)
