"""What every backbone answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Features"]


@dataclass(frozen=True)
class Features:
    """What a backbone knows about a batch, after its final norm."""

    cls: Float[Tensor, "B C"]
    """The class token, or the mean of the patch tokens where the model has none."""
    registers: Float[Tensor, "B R C"]
    """The register tokens."""
    patches: Float[Tensor, "B N C"]
    """The patch tokens, x fastest."""
    grid: tuple[int, ...]
    """(gz, gy, gx) or (gy, gx); its product is N."""
