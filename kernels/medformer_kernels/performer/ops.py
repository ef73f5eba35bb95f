"""FAVOR+ as `torch.library` operators and their gradients: two for the bidirectional form, one for the causal.

Bidirectional FAVOR+ is two softmax attentions that share omega. With x' = x / D^(1/4) and
e_mn = omega_m k'_n - |k'_n|^2 / 2:

    key pass    values_m = sum_n softmax_n(e_mn) v_n          lse_m = log sum_n exp(e_mn)
    query pass  out_i    = sum_m softmax_m(omega_m q'_i + lse_m) values_m

which is phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) exactly, since |q'|^2 / 2, the stabilisers and 1/sqrt(M) cancel.
Every exponent is taken relative to a maximum of its own feature or query, so that nothing under- or overflows in
any dtype, and (values, lse), of M x (Dv + 1) numbers a head, is all that passes between the two. The causal
form, where query i reads keys 0 to i, is derived in `causal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from medformer_kernels._operators import operator
from medformer_kernels.performer import causal, chunked

__all__ = [
    "performer_causal",
    "performer_causal_backward",
    "performer_read",
    "performer_read_backward",
    "performer_state",
    "performer_state_backward",
]


def _implementation(backend: str, boundaries: Sequence[int] | None):
    """The module of a backend, and what its functions take last: documents side by side only in the kernels."""
    if backend == "torch":
        assert boundaries is None, "documents run one by one in PyTorch"
        return chunked, ()
    from medformer_kernels.performer import fused  # Triton decides at import whether it interprets

    return fused, (boundaries,)


def _state_axes(x: Tensor, boundaries: Sequence[int] | None) -> tuple[int, ...]:
    """(B, H), and the number of documents if there is more than one."""
    return (*x.shape[:2], *(() if boundaries is None or len(boundaries) <= 2 else (len(boundaries) - 1,)))


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _omega_gradient(domega: Tensor, omega: Tensor) -> Tensor:
    """(B, H, M, D) summed over what shares omega."""
    return domega.sum((0, 1) if omega.ndim == 2 else 0).to(omega.dtype)


def _omega_buffer(like: Tensor, x: Tensor, omega: Tensor, with_omega: bool) -> Tensor:
    return like.new_empty((*x.shape[:2], *omega.shape[-2:]) if with_omega else (0,))


def _state_fake(k, v, omega, key_padding_mask, with_max, backend, boundaries=None):
    axes, num_features, dtype = _state_axes(k, boundaries), omega.shape[-2], _state_dtype(k)
    return (
        k.new_empty((*axes, num_features, v.shape[-1]), dtype=dtype),
        k.new_empty((*axes, num_features), dtype=dtype),
        k.new_empty(k.shape[:2], dtype=dtype),
    )


@operator("performer_state", _state_fake, public="performer_attention", samples=("k", "v", "key_padding_mask"))
def performer_state(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    with_max: bool,
    backend: str,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Key pass: (values (B, H, M, Dv), lse (B, H, M), max over n and m of omega_m k'_n (B, H)), in float32.

    The maximum is only computed `with_max` (else -inf). A head without a valid key has values 0 and lse -inf.
    `boundaries` of documents, 0 first and S last, for the kernels: then a state of each, (B, H, documents, M, ...).
    """
    implementation, last = _implementation(backend, boundaries)
    return implementation.state(k, v, omega, key_padding_mask, with_max, *last)


def _state_backward_fake(
    k, v, omega, key_padding_mask, values, lse, dvalues, dlse, with_omega, backend, boundaries=None
):
    return torch.empty_like(k), torch.empty_like(v), _omega_buffer(values, k, omega, with_omega)


@operator(
    "performer_state_backward", _state_backward_fake, public="performer_attention", gradient=True,
    samples=("k", "v", "key_padding_mask", "values", "lse", "dvalues", "dlse"),
)  # fmt: skip
def performer_state_backward(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    values: Tensor,
    lse: Tensor,
    dvalues: Tensor,
    dlse: Tensor,
    with_omega: bool,
    backend: str,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk, dv, domega (B, H, M, D) or empty). With p = softmax_n(e): dv_n = sum_m p_mn dvalues_m and
    de_mn = p_mn (dvalues_m v_n - dvalues_m values_m + dlse_m); dk = (omega^T de - k' sum_m de) / D^(1/4);
    domega_m = sum_n de_mn k'_n."""
    arguments = (k, v, omega, key_padding_mask, values, lse, dvalues, dlse)
    implementation, last = _implementation(backend, boundaries)
    return implementation.state_backward(*arguments, with_omega, *last)


def _setup_state(ctx, inputs, output):
    k, v, omega, key_padding_mask, _, ctx.backend, ctx.boundaries = inputs
    values, lse, exponent_max = output
    ctx.save_for_backward(k, v, omega, key_padding_mask, values, lse)
    ctx.mark_non_differentiable(exponent_max)


def _state_autograd(ctx, dvalues, dlse, _):
    k, v, omega, key_padding_mask, values, lse = ctx.saved_tensors
    with_omega = ctx.needs_input_grad[2]
    dk, dv, domega = performer_state_backward(
        k, v, omega, key_padding_mask, values, lse, dvalues, dlse, with_omega, ctx.backend, ctx.boundaries
    )
    return dk, dv, _omega_gradient(domega, omega) if with_omega else None, None, None, None, None


performer_state.register_autograd(_state_autograd, setup_context=_setup_state)


def _read_fake(q, omega, values, lse, extra_values, extra_lse, backend, boundaries=None):
    return q.new_empty((*q.shape[:3], values.shape[-1])), lse.new_empty(q.shape[:3])


@operator(
    "performer_read",
    _read_fake,
    public="performer_attention",
    samples=("q", "values", "lse", "extra_values", "extra_lse"),
)
def performer_read(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_values: Tensor | None,
    extra_lse: Tensor | None,
    backend: str,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Query pass: (out (B, H, N, Dv), log of its denominator (B, H, N)); `boundaries` as for the state.

    `extra_values` (B, H, Dv) and `extra_lse` (B, H) add one feature of exponent
    |q'_i|^2 / 2 + max_m omega_m q'_i + extra_lse: the published epsilon, as it is added to exp(u - |q'|^2/2 - max u).
    """
    implementation, last = _implementation(backend, boundaries)
    return implementation.read(q, omega, values, lse, extra_values, extra_lse, *last)


def _read_backward_fake(
    q, omega, values, lse, extra_values, extra_lse, out, out_lse, dout, with_omega, backend, boundaries=None
):
    extra = values.new_empty((*values.shape[:2], values.shape[-1]))
    return (
        torch.empty_like(q),
        torch.empty_like(values),
        torch.empty_like(lse),
        extra,
        lse.new_empty(lse.shape[:2]),
        _omega_buffer(values, q, omega, with_omega),
    )


@operator(
    "performer_read_backward", _read_backward_fake, public="performer_attention", gradient=True,
    samples=("q", "values", "lse", "extra_values", "extra_lse", "out", "out_lse", "dout"),
)  # fmt: skip
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
    with_omega: bool,
    backend: str,
    boundaries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dvalues, dlse, dextra_values, dextra_lse, domega (B, H, M, D) or empty); the extra two are 0 where there
    is no extra feature.

    With p = softmax_m: dvalues_m = sum_i p_im dout_i, ds_im = p_im dout_i (values_m - out_i), dlse_m = sum_i ds_im,
    dq_i = sum_m ds_im omega_m / D^(1/4), domega_m = sum_i ds_im q'_i. The maximum inside the extra exponent is a
    constant.
    """
    arguments = (q, omega, values, lse, extra_values, extra_lse, out, out_lse, dout)
    implementation, last = _implementation(backend, boundaries)
    return implementation.read_backward(*arguments, with_omega, *last)


def _setup_read(ctx, inputs, output):
    q, omega, values, lse, extra_values, extra_lse, ctx.backend, ctx.boundaries = inputs
    out, out_lse = output
    ctx.save_for_backward(q, omega, values, lse, extra_values, extra_lse, out, out_lse)
    ctx.mark_non_differentiable(out_lse)


def _read_autograd(ctx, dout, _):
    *saved, out, out_lse = ctx.saved_tensors
    omega, with_omega = saved[1], ctx.needs_input_grad[1]
    dq, dvalues, dlse, dextra_values, dextra_lse, domega = performer_read_backward(
        *saved, out, out_lse, dout, with_omega, ctx.backend, ctx.boundaries
    )
    domega = _omega_gradient(domega, omega) if with_omega else None
    if saved[-1] is None:
        return dq, domega, dvalues, dlse, None, None, None, None
    return dq, domega, dvalues, dlse, dextra_values, dextra_lse, None, None


performer_read.register_autograd(_read_autograd, setup_context=_setup_read)


def _document_slices(boundaries: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(boundaries) if start < end] or [slice(0, 0)]


def _causal_fake(q, k, v, omega, key_padding_mask, boundaries, backend):
    dtype = _state_dtype(q)
    tops = q.new_empty((3, *q.shape[:3]) if backend == "triton" else (0,), dtype=dtype)
    return (
        q.new_empty((*q.shape[:3], v.shape[-1])),
        q.new_empty(q.shape[:3], dtype=dtype),
        tops.transpose(0, 1) if backend == "triton" else tops,
    )


@operator("performer_causal", _causal_fake, public="performer_attention", samples=("q", "k", "v", "key_padding_mask"))
def performer_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    boundaries: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, H, N, Dv), log of its denominator (B, H, N), tops): query i over the keys of its document up to i.

    `boundaries` of the documents, 0 first and N last; [0, N] for one. k and v may have fewer heads, each shared by as
    many consecutive heads of q. tops (B, 3, H, N), of the kernels only: the largest and the smallest exponent of each
    query and the largest of each key, in base 2.
    """
    if backend == "triton":
        from medformer_kernels.performer import causal_fused

        return causal_fused.forward(q, k, v, omega, key_padding_mask, boundaries)
    parts = []
    for part in _document_slices(boundaries):
        mask = None if key_padding_mask is None else key_padding_mask[:, part]
        parts.append(causal.forward(q[:, :, part], k[:, :, part], v[:, :, part], omega, mask))
    out, out_lse = parts[0] if len(parts) == 1 else (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out, out_lse, out_lse.new_empty(0)


def _causal_backward_fake(q, k, v, omega, key_padding_mask, boundaries, out, out_lse, tops, dout, with_omega, backend):
    domega = _omega_buffer(out_lse, q, omega, with_omega)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), domega


@operator(
    "performer_causal_backward", _causal_backward_fake, public="performer_attention", gradient=True,
    samples=("q", "k", "v", "key_padding_mask", "out", "out_lse", "tops", "dout"),
)  # fmt: skip
def performer_causal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    boundaries: Sequence[int],
    out: Tensor,
    out_lse: Tensor,
    tops: Tensor,
    dout: Tensor,
    with_omega: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, domega (B, H, M, D) or empty)."""
    if backend == "triton":
        from medformer_kernels.performer import causal_fused

        return causal_fused.backward(q, k, v, omega, key_padding_mask, boundaries, out, out_lse, tops, dout, with_omega)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    domega = _omega_buffer(out_lse, q, omega, with_omega).zero_()
    for part in _document_slices(boundaries):
        mask = None if key_padding_mask is None else key_padding_mask[:, part]
        inputs = (q[:, :, part], k[:, :, part], v[:, :, part], omega, mask)
        made = (out[:, :, part], out_lse[:, :, part], dout[:, :, part])
        dq[:, :, part], dk[:, :, part], dv[:, :, part], part_domega = causal.backward(*inputs, *made, with_omega)
        if with_omega:
            domega += part_domega
    return dq, dk, dv, domega


def _setup_causal(ctx, inputs, output):
    *tensors, ctx.boundaries, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _causal_autograd(ctx, dout, *_):
    *inputs, out, out_lse, tops = ctx.saved_tensors
    omega, with_omega = inputs[3], ctx.needs_input_grad[3]
    dq, dk, dv, domega = performer_causal_backward(
        *inputs, ctx.boundaries, out, out_lse, tops, dout, with_omega, ctx.backend
    )
    return dq, dk, dv, _omega_gradient(domega, omega) if with_omega else None, None, None, None


performer_causal.register_autograd(_causal_autograd, setup_context=_setup_causal)
