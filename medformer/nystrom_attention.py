"""Nystrom self-attention over tokens [B, N, C], and readers for the weights of two published modules.

Axes: B batch, H heads, N tokens, D head width, C model width, L landmarks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medformer.attention import SelfAttention
from medformer.layout import without_layout
from medformer_kernels import nystrom_attention, nystrom_residual

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["NystromAttention"]


class NystromAttention(SelfAttention):
    """softmax attention through landmarks, F pinv(A) G V + depthwise convolution of V; linear in the tokens.

    Source: Xiong et al. 2021. What differs from the two published modules, and why:

    - The start value of the pseudo-inverse belongs to a sample and head. transformers and nystrom-attention take one
      over the whole batch, so that a sample's output depends on its batch-mates; with one sample and one head (or a
      start value that agrees) outputs agree.
    - Padded tokens leave landmarks, softmaxes and the convolution. transformers averages them into the landmarks;
      nystrom-attention cuts the segments over them, so that padding shifts every landmark, and gives nan for a sample
      of padding alone.
    - Any number of tokens is cut into equal segments. transformers fails unless the landmarks divide it;
      nystrom-attention pads with zero tokens in front, which then count as keys.
    - transformers turns to exact attention where the landmarks are as many as the tokens; here the same formula
      holds, and the two agree as far as the iteration converges.
    - Parameters of any floating-point dtype work; both others raise in pure bfloat16 or float16 (a float32 identity).

    Args:
        width: channels of a token.
        heads: number of heads.
        num_landmarks: L segments of the sequence, where the call gives no `grid`.
        landmark_grid: blocks by axis (z, y, x) for calls with a `grid`; None: `num_landmarks` along the sequence.
        head_width: channels of a head; None: `width / heads`.
        conv_kernel: size of the convolution along the sequence (33 is published), sizes (kz, ky, kx) over the
            grid, or None.
        prefix_tokens: class and register tokens in front, never averaged, their own output exact attention.
        pinv_iterations: steps of the pseudo-inverse.
        pinv_tolerance: residual at which a head stops early.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: LayerNorm queries and keys over each head.
        backend: of the kernel, 'auto', 'triton' or 'torch'.
    """

    _rows_alone = False  # the landmarks are means over the queries too

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        num_landmarks: int = 256,
        landmark_grid: Sequence[int] | None = None,
        head_width: int | None = None,
        conv_kernel: int | Sequence[int] | None = 33,
        prefix_tokens: int = 0,
        pinv_iterations: int = 6,
        pinv_tolerance: float | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(width, heads, qk_norm=qk_norm, head_width=head_width, qkv_bias=qkv_bias)
        if num_landmarks < 1:
            raise ValueError(f"NystromAttention: num_landmarks={num_landmarks} must be at least 1")
        self.num_landmarks = num_landmarks
        self.landmark_grid = None if landmark_grid is None else tuple(landmark_grid)
        self.prefix_tokens = prefix_tokens
        self.pinv_iterations = pinv_iterations
        self.pinv_tolerance = pinv_tolerance
        self.backend = backend
        self.conv_weight: nn.Parameter | None = None
        if conv_kernel is not None:
            sizes = (conv_kernel,) if isinstance(conv_kernel, int) else tuple(conv_kernel)
            if len(sizes) not in (1, 3) or any(size < 1 or size % 2 == 0 for size in sizes):
                raise ValueError(f"NystromAttention: conv_kernel={conv_kernel} must be an odd size, or three of them")
            # The range of torch's own convolution.
            bound = math.prod(sizes) ** -0.5
            self.conv_weight = nn.Parameter(torch.empty(heads, *sizes).uniform_(-bound, bound))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, grid: Sequence[int] | None = None
    ) -> Tensor:
        """`grid`, (gz, gy, gx) or (gy, gx), is needed for `landmark_grid` and a 3D `conv_kernel`."""
        return nystrom_attention(
            q, k, v, conv_weight=None if self.conv_weight is None else self.conv_weight.to(v.dtype),
            key_padding_mask=key_padding_mask, backend=self.backend,
            num_landmarks=self.num_landmarks if self.landmark_grid is None else None,
            landmark_grid=self.landmark_grid, grid=grid if self._needs_grid else None,
            prefix_tokens=self.prefix_tokens, pinv_iterations=self.pinv_iterations, pinv_tolerance=self.pinv_tolerance,
        )  # fmt: skip

    @torch.no_grad()
    def residual(
        self,
        x: Float[Tensor, "B N C"],
        *,
        key_padding_mask: Bool[Tensor, "B N"] | None = None,
        grid: Sequence[int] | None = None,
    ) -> Float[Tensor, "B H"]:
        """What the iterations leave of the pseudo-inverse, |A Z A - A| / |A|, by sample and head."""
        q, k, _ = self._split(x)
        return nystrom_residual(
            q, k, key_padding_mask=key_padding_mask, prefix_tokens=self.prefix_tokens,
            num_landmarks=self.num_landmarks if self.landmark_grid is None else None,
            landmark_grid=self.landmark_grid, grid=None if self.landmark_grid is None else grid,
            pinv_iterations=self.pinv_iterations, pinv_tolerance=self.pinv_tolerance,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(without_layout(fn), recurse)

    @property
    def _needs_grid(self) -> bool:
        return self.landmark_grid is not None or (self.conv_weight is not None and self.conv_weight.ndim == 4)

    @classmethod
    def from_transformers(cls, state: Mapping[str, Tensor], *, heads: int, num_landmarks: int) -> NystromAttention:
        """Read `NystromformerAttention.state_dict()` of transformers (its residual and LayerNorm are not part of it).

        Raises:
            ValueError: a weight is missing.
        """
        prefix = "self." if "self.query.weight" in state else ""
        names = [f"{prefix}{name}" for name in ("query", "key", "value")]
        _require("from_transformers", state, [f"{name}.{kind}" for name in names for kind in ("weight", "bias")])
        qkv = torch.cat([state[f"{name}.weight"] for name in names])
        conv = state.get(f"{prefix}conv.weight")
        module = cls(
            qkv.shape[1], heads, num_landmarks=num_landmarks, head_width=qkv.shape[0] // (3 * heads),
            conv_kernel=None if conv is None else conv.shape[2],
        ).to(qkv)  # fmt: skip
        weights = {"qkv.weight": qkv, "qkv.bias": torch.cat([state[f"{name}.bias"] for name in names])}
        if "output.dense.weight" in state:
            weights |= {"proj.weight": state["output.dense.weight"], "proj.bias": state["output.dense.bias"]}
        else:  # NystromformerSelfAttention alone ends before any projection
            inner = qkv.shape[0] // 3
            weights |= {"proj.weight": torch.eye(inner).to(qkv), "proj.bias": torch.zeros(inner).to(qkv)}
        module.load_state_dict(weights | ({} if conv is None else {"conv_weight": conv[:, 0, :, 0]}))
        return module

    @classmethod
    def from_nystrom_attention(
        cls, state: Mapping[str, Tensor], *, heads: int, num_landmarks: int, pinv_iterations: int = 6
    ) -> NystromAttention:
        """Read `nystrom_attention.NystromAttention.state_dict()` (PyPI nystrom-attention, lucidrains).

        Raises:
            ValueError: a weight is missing.
        """
        _require("from_nystrom_attention", state, ["to_qkv.weight", "to_out.0.weight", "to_out.0.bias"])
        qkv, conv = state["to_qkv.weight"], state.get("res_conv.weight")
        module = cls(
            qkv.shape[1], heads, num_landmarks=num_landmarks, head_width=qkv.shape[0] // (3 * heads),
            conv_kernel=None if conv is None else conv.shape[2], pinv_iterations=pinv_iterations, qkv_bias=False,
        ).to(qkv)  # fmt: skip
        weights = {"qkv.weight": qkv, "proj.weight": state["to_out.0.weight"], "proj.bias": state["to_out.0.bias"]}
        module.load_state_dict(weights | ({} if conv is None else {"conv_weight": conv[:, 0, :, 0]}))
        return module


def _require(reader: str, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"NystromAttention.{reader}: the state has no {', '.join(missing)}; it holds {sorted(state)}")
