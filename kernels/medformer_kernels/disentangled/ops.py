"""Disentangled attention as a `torch.library` operator, and its gradient.

    s_ij = scale (q_i . k_j + bias_ij)     out_i = sum_j softmax_j(s_ij) v_j     lse_i = log sum_j exp(s_ij)

where the bias comes from two small tables (`tables`): grid = [prefix, gz, gy, gx], `buckets`, or neither. Backward,
with p recomputed from lse: dv_j = sum_i p_ij dout_i; ds_ij = p_ij (dout_i . v_j - dout_i . out_i + dlse_i);
dq_i = scale sum_j ds_ij k_j; dk_j = scale sum_i ds_ij q_i; dt[i, c] = scale sum of ds_ij over the keys j of column c;
du[j, c] = scale sum of ds_ij over the queries i of column c. Dropout multiplies p (and dout_i . v_j) by its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medformer_kernels._operators import operator
from medformer_kernels.disentangled import chunked
from medformer_kernels.disentangled.tables import Inputs

__all__ = ["disentangled_backward", "disentangled_forward"]


def _implementation(backend: str):
    if backend == "torch":
        return chunked
    from medformer_kernels.disentangled import fused  # Triton decides at import whether it interprets

    return fused


def _drops(arguments: dict[str, Any]) -> bool:
    """Which weights are dropped depends on the sample's place in the batch."""
    return arguments["seed"] is not None


def _forward_fake(q, k, v, *_):
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=exact)


@operator(
    "disentangled_forward", _forward_fake, public="disentangled_attention",
    samples=("q", "k", "v", "t", "u", "key_padding_mask"), per_sample=_drops,
)  # fmt: skip
def disentangled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tensor | None,
    u: Tensor | None,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    grid: Sequence[int],
    scale: float,
    causal: bool,
    dropout: float,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, Dv), lse (B, H, N) in float32, or float64 for float64). A query without a key: 0 and -inf.

    `offset` is the place of the first query and key among all tokens; only dropout needs it.
    """
    x = Inputs(q, k, v, t, u, buckets, key_padding_mask, seed, list(grid), scale, causal, dropout, offset)
    return _implementation(backend).forward(x)


def _backward_fake(q, k, v, t, u, *_):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0) if t is None else t.new_empty(t.shape),
        k.new_empty(0) if u is None else u.new_empty(u.shape),
    )


@operator(
    "disentangled_backward", _backward_fake, public="disentangled_attention", gradient=True,
    samples=("q", "k", "v", "t", "u", "key_padding_mask", "out", "lse", "dout", "dlse"), per_sample=_drops,
)  # fmt: skip
def disentangled_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tensor | None,
    u: Tensor | None,
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grid: Sequence[int],
    scale: float,
    causal: bool,
    dropout: float,
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dt, du); the last two empty for tables that are not there."""
    x = Inputs(q, k, v, t, u, buckets, key_padding_mask, seed, list(grid), scale, causal, dropout, offset)
    dq, dk, dv, dt, du = _implementation(backend).backward(x, out, lse, dout, dlse)
    return dq, dk, dv, q.new_empty(0) if dt is None else dt, k.new_empty(0) if du is None else du


def _setup(ctx, inputs, output):
    tensors, ctx.settings = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dt, du = disentangled_backward(*tensors, out, lse, dout, dlse, *ctx.settings)
    t, u = tensors[3:5]
    return dq, dk, dv, None if t is None else dt, None if u is None else du, *(None,) * 9


disentangled_forward.register_autograd(_autograd, setup_context=_setup)
