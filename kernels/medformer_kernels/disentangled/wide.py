"""Relative position as a wider dot product: PyTorch's own fused attention, no gather, no N x N.

softmax(q k^T + bias) with bias(i, j) = sum over columns of j of T[i] + sum over columns of i of U[j] is
softmax of [q, T, onehot(i)] [k, onehot(j), U]^T exactly. Extra memory: 2 (gz + gy + gx) numbers a token and side.
Runs wherever scaled_dot_product_attention does; differentiable by autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.disentangled.tables import Grid, Operands

__all__ = ["wide"]


def wide(
    x: Operands, v: Tensor, grid: Grid | None, *, scale: float, causal: bool, key_padding_mask: Tensor | None
) -> Tensor:
    """See `disentangled_attention`; grid or absolute positions, no dropout."""
    q, k = [x.q], [x.k]
    if grid is not None and (x.t is not None or x.u is not None):
        one_hot = grid.one_hot(x.q)
        if x.t is not None:
            q.append(x.t)
            k.append(one_hot.expand(*x.k.shape[:2], -1, -1))
        if x.u is not None:
            q.append(one_hot.expand(*x.q.shape[:2], -1, -1))
            k.append(x.u)
    left, right = torch.cat(q, -1), torch.cat(k, -1)
    width_v = v.shape[-1]
    # PyTorch's fused attention needs one width for all three, and falls back to an N x N matrix without.
    width = max(left.shape[-1], width_v)
    left, right, v = (F.pad(y, (0, width - y.shape[-1])) for y in (left, right, v))
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(left, right, v, is_causal=causal, scale=scale)[..., :width_v]
    padded = ~key_padding_mask[:, None, :, None]
    right, v = right.masked_fill(padded, 0), v.masked_fill(padded, 0)
    allowed = key_padding_mask[:, None, None]
    if causal:
        allowed = allowed & torch.ones(left.shape[2], right.shape[2], dtype=torch.bool, device=v.device).tril()
    # A query without a key would be nan on some backends: let it read what is 0.
    without_key = ~allowed.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(left, right, v, attn_mask=allowed | without_key, scale=scale)
    return out[..., :width_v].masked_fill(without_key, 0)
