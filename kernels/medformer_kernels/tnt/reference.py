"""The definition of the inner block, and of the step from inner to outer tokens: plain, float64-capable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.tnt.dropping import ATTENTION, MLP, factor
from medformer_kernels.tnt.weights import TNTInnerWeights

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["reference"]


def reference(
    x: Float[Tensor, "S n c"],
    w: TNTInnerWeights,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
) -> Float[Tensor, "S n c"]:
    """y = x + f1 proj(attention(LN(x))), out = y + f2 fc2(GELU(fc1(LN(y)))); f1, f2 drop elements and sequences."""
    sequences, tokens, width = x.shape
    product = w.qkv_weight.dtype
    normed = F.layer_norm(x, (width,), w.norm1_weight.to(x.dtype), w.norm1_bias.to(x.dtype), eps).to(product)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).view(sequences, tokens, 3, num_heads, width // num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    branch = F.linear(attention.transpose(1, 2).reshape(x.shape), w.proj_weight, w.proj_bias)
    x = x + _dropped(branch, factor(seed, ATTENTION, 0, (sequences, tokens, width), dropout, drop_path))
    normed = F.layer_norm(x, (width,), w.norm2_weight.to(x.dtype), w.norm2_bias.to(x.dtype), eps).to(product)
    branch = F.linear(F.gelu(F.linear(normed, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias)
    return x + _dropped(branch, factor(seed, MLP, 0, (sequences, tokens, width), dropout, drop_path))


def _dropped(branch: Tensor, multiplier: Tensor | None) -> Tensor:
    return branch if multiplier is None else branch * multiplier.to(branch.dtype)
