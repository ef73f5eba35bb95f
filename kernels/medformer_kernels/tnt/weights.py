"""The tensors of one inner block, and what must hold between them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["MATRICES", "NAMES", "TNTInnerWeights"]


@dataclass(frozen=True, kw_only=True)
class TNTInnerWeights:
    """Parameters of one inner transformer block, as `nn.LayerNorm` and `nn.Linear` hold them; f is the MLP's width."""

    norm1_weight: Float[Tensor, " c"]
    norm1_bias: Float[Tensor, " c"]
    qkv_weight: Float[Tensor, "3c c"]
    """Queries, keys, values; within each, head by head."""
    qkv_bias: Float[Tensor, "3c"] | None = None
    proj_weight: Float[Tensor, "c c"]
    proj_bias: Float[Tensor, " c"] | None = None
    norm2_weight: Float[Tensor, " c"]
    norm2_bias: Float[Tensor, " c"]
    fc1_weight: Float[Tensor, "f c"]
    fc1_bias: Float[Tensor, " f"] | None = None
    fc2_weight: Float[Tensor, "c f"]
    fc2_bias: Float[Tensor, " c"] | None = None

    def tensors(self) -> list[Tensor | None]:
        """In the order of `NAMES`."""
        return [getattr(self, name) for name in NAMES]

    def check(self, function: str, x: Tensor) -> None:
        """Raise ValueError, naming `function` and the tensor, where these do not fit tokens `x` (S, n, c)."""
        width, hidden = x.shape[-1], self.fc1_weight.shape[0]
        shapes = {"qkv_weight": (3 * width, width), "qkv_bias": (3 * width,), "proj_weight": (width, width)}
        shapes |= {"fc1_weight": (hidden, width), "fc1_bias": (hidden,), "fc2_weight": (width, hidden)}
        for name, tensor in zip(NAMES, self.tensors(), strict=True):
            if tensor is None:
                continue
            expected = shapes.get(name, (width,))
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{function}: weights.{name} has shape {tuple(tensor.shape)}; with x of width c={width} and an MLP "
                    f"of width f={hidden} it must be {expected}"
                )
            if tensor.device != x.device or not tensor.is_floating_point():
                raise ValueError(
                    f"{function}: weights.{name} is {tensor.dtype} on {tensor.device}; it must be floating point on "
                    f"{x.device}, as x is"
                )
        dtypes = {getattr(self, name).dtype for name in MATRICES}
        if len(dtypes) > 1:
            raise ValueError(
                f"{function}: the matrices in weights are {' and '.join(sorted(map(str, dtypes)))}; they must share "
                "one dtype"
            )
        (dtype,) = dtypes
        if dtype != x.dtype and x.dtype != torch.float32:
            raise ValueError(
                f"{function}: x is {x.dtype} but the matrices in weights are {dtype}; they must agree, or x be float32"
            )

    def cast(self, dtype: torch.dtype) -> TNTInnerWeights:
        """With the matrices and their biases in `dtype`: what autocast does to a linear layer."""
        changed = {
            name: None if tensor is None else tensor.to(dtype)
            for name, tensor in zip(NAMES, self.tensors(), strict=True)
            if not name.startswith("norm")
        }
        return TNTInnerWeights(**{name: changed.get(name, getattr(self, name)) for name in NAMES})  # type: ignore[arg-type]


NAMES = tuple(field.name for field in fields(TNTInnerWeights))
MATRICES = ("qkv_weight", "proj_weight", "fc1_weight", "fc2_weight")
