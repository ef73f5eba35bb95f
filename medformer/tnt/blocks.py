"""The parts of a TNT: the block inside a window, and the step from a window to its token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from medformer.linear import Linear
from medformer.mlp import MLP
from medformer_kernels import TNTInnerWeights, tnt_inner_block, tnt_inner_to_outer

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Fusion", "InnerBlock"]


class InnerBlock(nn.Module):
    """Attention and MLP, pre-norm and residual, within each of very many short sequences: one kernel on a GPU.

    Args:
        width: channels of a token.
        heads: must divide `width`.
        hidden: channels inside the MLP.
        qkv_bias: whether queries, keys and values have a bias.
        dropout: share of the elements that each branch drops in training.
        drop_path: share of the sequences that skip each branch in training.
        backend: of the kernel, 'auto', 'triton' or 'torch'.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.drop_path, self.backend = heads, dropout, drop_path, backend
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Float[Tensor, "S n c"]) -> Float[Tensor, "S n c"]:
        weights = TNTInnerWeights(
            norm1_weight=self.norm1.weight, norm1_bias=self.norm1.bias, qkv_weight=self.qkv.weight,
            qkv_bias=self.qkv.bias, proj_weight=self.proj.weight, proj_bias=self.proj.bias,
            norm2_weight=self.norm2.weight, norm2_bias=self.norm2.bias, fc1_weight=self.mlp.fc1.weight,
            fc1_bias=self.mlp.fc1.bias, fc2_weight=self.mlp.fc2.weight, fc2_bias=self.mlp.fc2.bias,
        )  # fmt: skip
        return tnt_inner_block(
            x, weights, num_heads=self.heads, eps=self.norm1.eps, dropout=self.dropout if self.training else 0.0,
            drop_path=self.drop_path if self.training else 0.0, backend=self.backend,
        )  # fmt: skip


class Fusion(nn.Module):
    """What a window of n tokens of width c adds to its own token of width C.

    Args:
        tokens: n.
        inner: c.
        width: C.
        form: 'token' (norm of each token, linear), 'window' (norm of the window, linear without bias, norm), 'stem'
            (norm of the window, linear, norm) or 'raw' (norm of each token; C = n c).
        backend: of the kernel behind 'token', 'auto', 'triton' or 'torch'.
    """

    def __init__(
        self,
        tokens: int,
        inner: int,
        width: int,
        form: Literal["token", "window", "stem", "raw"],
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.by_token = form in ("token", "raw")
        self.norm1 = nn.LayerNorm(inner if self.by_token else tokens * inner, eps=1e-6)
        self.proj = None if form == "raw" else Linear(tokens * inner, width, bias=form != "window")
        self.norm2 = nn.LayerNorm(width, eps=1e-6) if form in ("window", "stem") else None

    def forward(self, x: Float[Tensor, "S n c"], above: Float[Tensor, "S C"] | None = None) -> Float[Tensor, "S C"]:
        """What the windows add to their tokens; added to `above` where that is given."""
        if self.by_token and self.proj is not None:
            return tnt_inner_to_outer(
                x, above, norm_weight=self.norm1.weight, norm_bias=self.norm1.bias, weight=self.proj.weight,
                bias=self.proj.bias, eps=self.norm1.eps, backend=self.backend,
            )  # fmt: skip
        x = self.norm1(x).flatten(1) if self.by_token else self.norm1(x.flatten(1))
        x = x if self.proj is None else self.proj(x)
        x = x if self.norm2 is None else self.norm2(x)
        return x if above is None else above + x
