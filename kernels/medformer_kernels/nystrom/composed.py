"""Nystrom attention on any device in plain PyTorch: two scaled-dot-product attentions around the small inverse.

Nothing of size N x L exists where PyTorch's attention is fused (CPU, CUDA flash); large heads on a CPU have their own,
`attend_by_head`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels._operators import transformed
from medformer_kernels.nystrom.attend import attend_by_head, attends_by_head
from medformer_kernels.nystrom.inverse import inverse_times
from medformer_kernels.nystrom.landmarks import Cells, pool
from medformer_kernels.nystrom.reference import depthwise_convolution, masked_softmax

__all__ = ["attend", "composed", "landmarks"]


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Cells,
    q_landmarks: Tensor | None,
    k_landmarks: Tensor | None,
    conv_weight: Tensor | None,
    key_padding_mask: Tensor | None,
    pinv_iterations: int,
    pinv_tolerance: float | None,
) -> Tensor:
    """See `nystrom_attention`."""
    if q.dtype == torch.float16:
        # The inverse of a nearly singular matrix and what it hands to the gradient leave the range of float16.
        q_landmarks = None if q_landmarks is None else q_landmarks.float()
        k_landmarks = None if k_landmarks is None else k_landmarks.float()
        small = (cells, q_landmarks, k_landmarks, conv_weight, key_padding_mask, pinv_iterations, pinv_tolerance)
        return composed(q.float(), k.float(), v.float(), *small).half()
    if key_padding_mask is not None:
        padding = ~key_padding_mask[:, None, :, None]
        # Not only weight 0: a masked key may hold anything, and 0 * nan is nan.
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        if q_landmarks is None:
            q = q.masked_fill(padding, 0)
    q_landmarks, k_landmarks, valid = landmarks(q, k, cells, q_landmarks, k_landmarks, key_padding_mask)
    pairs_valid = None if valid is None else (valid.unsqueeze(2) & valid.unsqueeze(1)).unsqueeze(1)
    exact = torch.promote_types(q.dtype, torch.float32)
    values = attend(q_landmarks, k, v, key_padding_mask)
    scores = (q_landmarks.to(exact) * q.shape[-1] ** -0.5) @ k_landmarks.to(exact).mT
    a = masked_softmax(scores, pairs_valid)
    solved = inverse_times(a, values.to(exact), pinv_iterations, pinv_tolerance)
    out = attend(q[:, :, cells.prefix :], k_landmarks, solved.to(q.dtype), valid)
    if conv_weight is not None:
        convolved = _convolution(v[:, :, cells.prefix :], conv_weight.to(v.dtype), cells.conv_grid or cells.grid)
        # Only in place where nothing keeps the attention's output for its gradient.
        out = out + convolved if torch.is_grad_enabled() or transformed() else out.add_(convolved)
    return out if cells.prefix == 0 else torch.cat((values[:, :, : cells.prefix], out), 2)


def landmarks(
    q: Tensor,
    k: Tensor,
    cells: Cells,
    q_landmarks: Tensor | None,
    k_landmarks: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q_landmarks, k_landmarks, which are landmarks (B, L) or None for all), those of the prefix first."""
    if q_landmarks is None or k_landmarks is None:
        q_landmarks, valid = pool(q, cells, key_padding_mask)
        return q_landmarks, pool(k, cells, key_padding_mask)[0], valid
    if cells.prefix == 0:
        return q_landmarks, k_landmarks, None
    q_landmarks = torch.cat((q[:, :, : cells.prefix], q_landmarks), 2)
    k_landmarks = torch.cat((k[:, :, : cells.prefix], k_landmarks), 2)
    if key_padding_mask is None:
        return q_landmarks, k_landmarks, None
    own = key_padding_mask[:, : cells.prefix]
    return q_landmarks, k_landmarks, F.pad(own, (0, k_landmarks.shape[2] - cells.prefix), value=True)


def attend(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the valid keys (B, S); 0 without any."""
    # PyTorch has no batching rule for its own attention on a CPU.
    if attends_by_head(q, k) or (transformed() and q.is_cpu and q.dtype == torch.float32):
        return attend_by_head(q, k, v, key_valid)[0]
    width, width_v = q.shape[-1], v.shape[-1]
    widest = max(width, width_v)
    if width != width_v:  # fused only for equal widths; zeros change nothing
        q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    mask = empty = None
    if key_valid is not None:
        key_valid = key_valid[:, None, None]
        empty = ~key_valid.any(-1, keepdim=True)
        mask = (key_valid | empty).expand(-1, -1, q.shape[2], -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)
    if empty is not None:
        out = out.masked_fill(empty, 0)
    return out[..., :width_v]


def _convolution(v: Tensor, weight: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """As `depthwise_convolution`, without moving the heads to the end where the kernel is that of a sequence."""
    if grid[:2] != (1, 1):
        return depthwise_convolution(v, weight, grid)
    taps = weight[:, weight.shape[1] // 2, weight.shape[2] // 2]
    return _SequenceConvolution.apply(v, taps) if v.is_cpu and not transformed() else _along_sequence(v, taps)


def _along_sequence(v: Tensor, taps: Tensor) -> Tensor:
    return F.conv2d(v, taps[:, None, :, None], padding=(taps.shape[1] // 2, 0), groups=taps.shape[0])


class _SequenceConvolution(torch.autograd.Function):
    """On a CPU heads go last: a quarter of the time (7 for 29 ms at H=8 N=4096 D=64 on one core).

    The gradient of the taps is a few matrix products here; that of PyTorch's convolution costs 9 ms of the same.
    """

    @staticmethod
    def forward(ctx, v: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(v, taps)
        return _along_sequence(v.contiguous(memory_format=torch.channels_last), taps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
        v, taps = ctx.saved_tensors
        dv = dtaps = None
        if ctx.needs_input_grad[0]:
            dv = _along_sequence(dout.contiguous(memory_format=torch.channels_last), taps.flip(1))
        if ctx.needs_input_grad[1]:
            dtaps = _taps_gradient(dout, v, taps.shape[1]).to(taps.dtype)
        return dv, dtaps


def _taps_gradient(dout: Tensor, v: Tensor, taps: int) -> Tensor:
    """sum_i dout_i v_(i + tap - taps // 2): 64 tokens times those they reach, where a diagonal is a tap."""
    size, reach, tokens = 64, taps // 2, v.shape[2]
    exact = torch.promote_types(v.dtype, torch.float32)
    rest = -tokens % size
    blocks = F.pad(dout, (0, 0, 0, rest)).unflatten(2, (-1, size))  # B H blocks size D
    windows = F.pad(v, (0, 0, reach, reach + rest)).unfold(2, size + 2 * reach, size)  # B H blocks D size+2*reach
    products = dout.new_zeros((v.shape[1], size, size + 2 * reach), dtype=exact)
    for block, window in zip(blocks.split(16, 2), windows.split(16, 2), strict=True):
        products += (block.to(exact) @ window.to(exact)).sum((0, 2))
    row = torch.arange(size, device=v.device).unsqueeze(1)
    return products[:, row, row + torch.arange(taps, device=v.device)].sum(1)
