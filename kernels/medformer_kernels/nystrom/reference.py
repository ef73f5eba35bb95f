"""Nystrom attention as it is defined: every matrix written out. Also runs in float64; meant to be read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.nystrom.inverse import nystrom_pinv
from medformer_kernels.nystrom.landmarks import Cells, landmark_weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["depthwise_convolution", "masked_softmax", "nystrom_matrices", "reference"]


def masked_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over the last axis where `valid`; a row without a valid entry is 0."""
    if valid is None:
        return scores.softmax(-1)
    return scores.masked_fill(~valid, -math.inf).softmax(-1).masked_fill(~valid, 0)


def nystrom_matrices(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    cells: Cells,
    q_landmarks: Tensor | None = None,
    k_landmarks: Tensor | None = None,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
) -> tuple[Float[Tensor, "B H N L"], Float[Tensor, "B H L L"], Float[Tensor, "B H L S"]]:
    """The three softmax matrices (F, A, G) with attention = F pinv(A) G; N x L numbers: for inspection and tests."""
    scale = q.shape[-1] ** -0.5
    valid = key_valid = None
    if key_padding_mask is not None:
        key_valid = key_padding_mask[:, None, None]
        k = k.masked_fill(~key_valid.transpose(-1, -2), 0)
    if q_landmarks is None or k_landmarks is None:
        weights = landmark_weights(cells, key_padding_mask=key_padding_mask, device=q.device).unsqueeze(1).to(q.dtype)
        if key_padding_mask is not None:
            q = q.masked_fill(~key_padding_mask[:, None, :, None], 0)
        q_landmarks, k_landmarks = weights @ q, weights @ k
        if key_padding_mask is not None:
            valid = (weights > 0).any(-1).unsqueeze(-2)
    elif cells.prefix:
        q_landmarks = torch.cat((q[:, :, : cells.prefix], q_landmarks), 2)
        k_landmarks = torch.cat((k[:, :, : cells.prefix], k_landmarks), 2)
        if key_padding_mask is not None:
            given = key_padding_mask.new_ones((k.shape[0], k_landmarks.shape[2] - cells.prefix))
            valid = torch.cat((key_padding_mask[:, : cells.prefix], given), 1)[:, None, None]
    f = masked_softmax(q @ k_landmarks.mT * scale, valid)
    a = masked_softmax(q_landmarks @ k_landmarks.mT * scale, None if valid is None else valid & valid.mT)
    g = masked_softmax(q_landmarks @ k.mT * scale, key_valid)
    return f, a, g


def depthwise_convolution(
    v: Float[Tensor, "B H N Dv"], weight: Float[Tensor, "H kz ky kx"], grid: tuple[int, int, int]
) -> Float[Tensor, "B H N Dv"]:
    """Each head's values convolved (cross-correlated) over the grid with one kernel, zeros outside."""
    batch, heads, tokens, width = v.shape
    volume = v.permute(0, 3, 1, 2).reshape(batch * width, heads, *grid)
    padding = [size // 2 for size in weight.shape[1:]]
    out = F.conv3d(volume, weight.unsqueeze(1), padding=padding, groups=heads)
    return out.view(batch, width, heads, tokens).permute(0, 2, 3, 1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Cells,
    q_landmarks: Tensor | None,
    k_landmarks: Tensor | None,
    conv_weight: Tensor | None,
    key_padding_mask: Tensor | None,
    pinv_iterations: int | None,
    pinv_tolerance: float | None,
) -> Tensor:
    """See `nystrom_attention_reference`; `pinv_iterations=None` takes the exact pseudo-inverse."""
    f, a, g = nystrom_matrices(q, k, cells, q_landmarks, k_landmarks, key_padding_mask)
    if pinv_iterations is None:
        z = torch.linalg.pinv(a)
    else:
        z, _ = nystrom_pinv(a, iterations=pinv_iterations, tolerance=pinv_tolerance)
    if key_padding_mask is not None:
        v = v.masked_fill(~key_padding_mask[:, None, :, None], 0)
    values = g @ v
    out = f @ (z @ values)
    if cells.prefix:
        # Class tokens attend exactly: their own landmark row is softmax attention over all keys.
        out = torch.cat((values[:, :, : cells.prefix], out[:, :, cells.prefix :]), 2)
    if conv_weight is not None:
        convolved = depthwise_convolution(
            v[:, :, cells.prefix :], conv_weight.to(v.dtype), cells.conv_grid or cells.grid
        )
        out = torch.cat((out[:, :, : cells.prefix], out[:, :, cells.prefix :] + convolved), 2)
    return out
