"""FAVOR+ as two `torch.library` operators and their gradients.

FAVOR+ is two softmax attentions that share omega. With e_mn = omega_m k'_n - |k'_n|^2 / 2 (x' = x / D^(1/4)):

    key pass    values_m = sum_n softmax_n(e_mn) v_n          lse_m = log sum_n exp(e_mn)
    query pass  out_i    = sum_m softmax_m(omega_m q'_i + lse_m) values_m

which is phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) exactly, since |q'|^2 / 2, the stabilisers and 1/sqrt(M) cancel.
Every exponent is taken relative to a maximum of its own feature or query, so that nothing under- or overflows in
any dtype, and (values, lse), of M x (Dv + 1) numbers a head, is all that passes between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medformer_kernels.performer import chunked

__all__ = ["performer_read", "performer_read_backward", "performer_state", "performer_state_backward"]


def _implementation(backend: str):
    if backend == "torch":
        return chunked
    from medformer_kernels.performer import fused  # Triton decides at import whether it interprets

    return fused


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("medformer::performer_state", mutates_args=())
def performer_state(
    k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, with_max: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Key pass: (values (B, H, M, Dv), lse (B, H, M), max over n and m of omega_m k'_n (B, H)), in float32.

    The maximum is only computed `with_max` (else -inf). A head without a valid key has values 0 and lse -inf.
    """
    return _implementation(backend).state(k, v, omega, key_padding_mask, with_max)


@performer_state.register_fake
def _(k, v, omega, key_padding_mask, with_max, backend):
    batch, heads, num_features, dtype = *k.shape[:2], omega.shape[-2], _state_dtype(k)
    return (
        k.new_empty((batch, heads, num_features, v.shape[-1]), dtype=dtype),
        k.new_empty((batch, heads, num_features), dtype=dtype),
        k.new_empty((batch, heads), dtype=dtype),
    )


@torch.library.custom_op("medformer::performer_state_backward", mutates_args=())
def performer_state_backward(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    values: Tensor,
    lse: Tensor,
    dvalues: Tensor,
    dlse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dk, dv). With p = softmax_n(e): dv_n = sum_m p_mn dvalues_m and
    de_mn = p_mn (dvalues_m v_n - dvalues_m values_m + dlse_m); dk = (omega^T de - k' sum_m de) / D^(1/4)."""
    return _implementation(backend).state_backward(k, v, omega, key_padding_mask, values, lse, dvalues, dlse)


@performer_state_backward.register_fake
def _(k, v, omega, key_padding_mask, values, lse, dvalues, dlse, backend):
    return torch.empty_like(k), torch.empty_like(v)


def _setup_state(ctx, inputs, output):
    k, v, omega, key_padding_mask, _, ctx.backend = inputs
    values, lse, exponent_max = output
    ctx.save_for_backward(k, v, omega, key_padding_mask, values, lse)
    ctx.mark_non_differentiable(exponent_max)


def _state_autograd(ctx, dvalues, dlse, _):
    k, v, omega, key_padding_mask, values, lse = ctx.saved_tensors
    dk, dv = performer_state_backward(k, v, omega, key_padding_mask, values, lse, dvalues, dlse, ctx.backend)
    return dk, dv, None, None, None, None


performer_state.register_autograd(_state_autograd, setup_context=_setup_state)


@torch.library.custom_op("medformer::performer_read", mutates_args=())
def performer_read(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_values: Tensor | None,
    extra_lse: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Query pass: (out (B, H, N, Dv), log of its denominator (B, H, N)).

    `extra_values` (B, H, Dv) and `extra_lse` (B, H) add one feature of exponent
    |q'_i|^2 / 2 + max_m omega_m q'_i + extra_lse: the published epsilon, as it stands beside exp(u - |q'|^2/2 - max u).
    """
    return _implementation(backend).read(q, omega, values, lse, extra_values, extra_lse)


@performer_read.register_fake
def _(q, omega, values, lse, extra_values, extra_lse, backend):
    return q.new_empty((*q.shape[:3], values.shape[-1])), lse.new_empty(q.shape[:3])


@torch.library.custom_op("medformer::performer_read_backward", mutates_args=())
def performer_read_backward(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_values: Tensor | None,
    extra_lse: Tensor | None,
    out: Tensor,
    out_lse: Tensor,
    dout: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dvalues, dlse, dextra_values, dextra_lse); the last two are 0 where there is no extra feature.

    With p = softmax_m: dvalues_m = sum_i p_im dout_i, ds_im = p_im dout_i (values_m - out_i), dlse_m = sum_i ds_im and
    dq_i = sum_m ds_im omega_m / D^(1/4). The maximum inside the extra exponent is a constant.
    """
    return _implementation(backend).read_backward(q, omega, values, lse, extra_values, extra_lse, out, out_lse, dout)


@performer_read_backward.register_fake
def _(q, omega, values, lse, extra_values, extra_lse, out, out_lse, dout, backend):
    extra = values.new_empty((*values.shape[:2], values.shape[-1]))
    return (
        torch.empty_like(q),
        torch.empty_like(values),
        torch.empty_like(lse),
        extra,
        lse.new_empty(lse.shape[:2]),
    )


def _setup_read(ctx, inputs, output):
    q, omega, values, lse, extra_values, extra_lse, ctx.backend = inputs
    out, out_lse = output
    ctx.save_for_backward(q, omega, values, lse, extra_values, extra_lse, out, out_lse)
    ctx.mark_non_differentiable(out_lse)


def _read_autograd(ctx, dout, _):
    *saved, out, out_lse = ctx.saved_tensors
    dq, dvalues, dlse, dextra_values, dextra_lse = performer_read_backward(*saved, out, out_lse, dout, ctx.backend)
    if saved[-1] is None:
        return dq, None, dvalues, dlse, None, None, None
    return dq, None, dvalues, dlse, dextra_values, dextra_lse, None


performer_read.register_autograd(_read_autograd, setup_context=_setup_read)


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "performer_attention: double backward is not implemented; use performer_attention_reference, or torch.no_grad "
        "around the first gradient"
    )


for _op in (performer_state_backward, performer_read_backward):
    _op.register_autograd(_refuse_double_backward)
