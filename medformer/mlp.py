"""The feed-forward half of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear, exact GELU, linear.

    Args:
        width: channels of a token.
        hidden: channels between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        return self.fc2(self.act(self.fc1(x)))
