"""Nystrom attention on the Triton kernels as a `torch.library` operator, and its gradient.

    values = softmax_n(Q~ K^T / sqrt(D)) V        lse of its denominator
    A      = softmax(Q~ K~^T / sqrt(D))           solved = pinv(A) values
    out    = softmax_l(Q K~^T / sqrt(D)) solved + convolution(V)      out_lse of its denominator

Backward, with F and G recomputed from out_lse and lse: dsolved = F^T dout, dA and dvalues through the iteration,
dQ~ and dK~ from A, F and G, and the gradient through the means is added where dQ and dK are written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medformer_kernels._operators import operator
from medformer_kernels.nystrom.landmarks import Cells

__all__ = ["nystrom_backward", "nystrom_forward"]


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = sizes
    return z, y, x


def _cells(grid: Sequence[int], landmark_grid: Sequence[int], conv_grid: Sequence[int], prefix: int) -> Cells:
    return Cells(grid=_three(grid), landmark_grid=_three(landmark_grid), conv_grid=_three(conv_grid), prefix=prefix)


def _forward_fake(
    q, k, v, q_landmarks, k_landmarks, conv_weight, key_padding_mask, grid, landmark_grid, conv_grid, prefix, *_
):
    batch, heads, tokens, width = q.shape
    pooled = q_landmarks is None
    means = landmark_grid[0] * landmark_grid[1] * landmark_grid[2] if pooled else q_landmarks.shape[2]
    number = prefix + means
    has_valid = key_padding_mask is not None and (pooled or prefix > 0)
    small = {"dtype": torch.float32}
    landmarks = q.new_empty((batch, heads, number, width))
    values = q.new_empty((batch, heads, number, v.shape[3]), **small)
    return (
        q.new_empty((batch, heads, tokens, v.shape[3])),
        landmarks,
        torch.empty_like(landmarks),
        q.new_empty((batch, heads, means) if pooled else (0,), **small),
        q.new_empty((batch, number) if has_valid else (0,), dtype=torch.uint8),
        values,
        q.new_empty((batch, heads, number), **small),
        torch.empty_like(values),
        q.new_empty((batch, heads, tokens - prefix), **small),
    )


@operator(
    "nystrom_forward",
    _forward_fake,
    public="nystrom_attention",
    samples=("q", "k", "v", "q_landmarks", "k_landmarks", "key_padding_mask"),
)
def nystrom_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_landmarks: Tensor | None,
    k_landmarks: Tensor | None,
    conv_weight: Tensor | None,
    key_padding_mask: Tensor | None,
    grid: Sequence[int],
    landmark_grid: Sequence[int],
    conv_grid: Sequence[int],
    prefix: int,
    pinv_iterations: int,
    pinv_tolerance: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, q_landmarks, k_landmarks, total, valid, values, lse, solved, out_lse); see `fused.Forward`."""
    from medformer_kernels.nystrom import fused  # Triton decides at import whether it interprets

    cells, iteration = _cells(grid, landmark_grid, conv_grid, prefix), (pinv_iterations, pinv_tolerance)
    made = fused.forward(q, k, v, cells, q_landmarks, k_landmarks, conv_weight, key_padding_mask, *iteration)
    # An operator may not return its own inputs.
    own_q = made.q_landmarks.clone() if made.q_landmarks is q_landmarks else made.q_landmarks
    own_k = made.k_landmarks.clone() if made.k_landmarks is k_landmarks else made.k_landmarks
    return made.out, own_q, own_k, made.total, made.valid, made.values, made.lse, made.solved, made.out_lse


def _backward_fake(
    dout, q, k, v, conv_weight, key_padding_mask, made, pooled, grid, landmark_grid, conv_grid, prefix, *_
):
    batch, heads, _, width = q.shape
    given = q.new_empty((batch, heads, 0 if pooled else made[1].shape[2] - prefix, width))
    weight = q.new_empty((0,) if conv_weight is None else conv_weight.shape, dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), given, torch.empty_like(given), weight


@operator(
    "nystrom_backward",
    _backward_fake,
    public="nystrom_attention",
    gradient=True,
    samples=("dout", "q", "k", "v", "key_padding_mask", "made"),
    per_sample=lambda call: call["conv_weight"] is not None,
)
def nystrom_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv_weight: Tensor | None,
    key_padding_mask: Tensor | None,
    made: Sequence[Tensor],
    pooled: bool,
    grid: Sequence[int],
    landmark_grid: Sequence[int],
    conv_grid: Sequence[int],
    prefix: int,
    pinv_iterations: int,
    pinv_tolerance: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dq_landmarks, dk_landmarks, dconv_weight), empty for what is not an input.

    With F, G the softmaxes: dsolved_l = sum_i F_il dout_i; dF~_il = F_il (dout_i solved_l - delta_i) with
    delta_i = dout_i (out_i - convolution_i); dG~_ln = G_ln (dvalues_l v_n - dvalues_l values_l) (both before the
    softmax); dq_i = sum_l dF~_il k~_l, dk~_l = sum_i dF~_il q_i + ..., dk_n = sum_l dG~_ln q~_l, dv_n = sum_l G_ln
    dvalues_l, all scores times 1/sqrt(D).
    """
    from medformer_kernels.nystrom.backward import backward
    from medformer_kernels.nystrom.fused import Forward

    cells, iteration = _cells(grid, landmark_grid, conv_grid, prefix), (pinv_iterations, pinv_tolerance)
    dq, dk, dv, *given, dconv_weight = backward(
        dout, q, k, v, cells, pooled, conv_weight, key_padding_mask, Forward(*made), *iteration
    )
    dq_landmarks, dk_landmarks = (x.contiguous() if x.numel() else x.new_empty(x.shape) for x in given)
    return dq, dk, dv, dq_landmarks, dk_landmarks, dconv_weight


def _setup(ctx, inputs, output):
    q, k, v, q_landmarks, _, conv_weight, mask, *ctx.settings = inputs
    ctx.pooled = q_landmarks is None
    ctx.save_for_backward(q, k, v, conv_weight, mask, *output)
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, dout, *_):
    q, k, v, conv_weight, mask, *made = ctx.saved_tensors
    dq, dk, dv, dq_landmarks, dk_landmarks, dconv_weight = nystrom_backward(
        dout, q, k, v, conv_weight, mask, made, ctx.pooled, *ctx.settings
    )
    none = (None,) * 7
    dconv_weight = None if conv_weight is None else dconv_weight.to(conv_weight.dtype)
    if ctx.pooled:
        return dq, dk, dv, None, None, dconv_weight, *none
    return dq, dk, dv, dq_landmarks, dk_landmarks, dconv_weight, *none


nystrom_forward.register_autograd(_autograd, setup_context=_setup)
