"""FAVOR+ on any device in plain PyTorch, in chunks of tokens: features never exist for more than one chunk.

The same two passes and the same saved tensors as the Triton kernels (see `fused`), so that a forward pass
of one and a backward pass of the other fit together. Arithmetic is float32, or float64 for float64 inputs.

Cost, forward: 8 B H N M D FLOP in matrix products and 2 B H N M exponentials; memory beyond inputs and outputs
is one chunk of B H x `_CHUNK_VALUES` features, whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["read", "read_backward", "state", "state_backward"]

# Feature values alive at once: 8 heads x 256 features x 512 tokens. Measured on 2 cores at N=4096: half or double
# of it is within 5%.
_CHUNK_VALUES = 1 << 20


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scaled_omega(omega: Tensor, x: Tensor) -> Tensor:
    """omega / D^(1/4), transposed to (..., D, M): x @ it are the exponents of the features."""
    return (omega.to(_compute_dtype(x)) * omega.shape[-1] ** -0.25).transpose(-1, -2)


def _chunks(tokens: int, batch_heads: int, num_features: int) -> Iterator[slice]:
    step = max(16, _CHUNK_VALUES // max(1, batch_heads * num_features))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _key_exponents(
    k: Tensor, omega_t: Tensor, key_padding_mask: Tensor | None, chunk: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """(exponents (B, H, c, M), half squared norms (B, H, c, 1), k of the chunk), masked keys at -inf."""
    k = k[:, :, chunk].to(omega_t.dtype)
    if key_padding_mask is not None:
        valid = key_padding_mask[:, None, chunk, None]
        k = k.masked_fill(~valid, 0)
    half = k.square().sum(-1, keepdim=True).mul_(omega_t.shape[-2] ** -0.5 / 2)
    if key_padding_mask is not None:
        half = half.masked_fill_(~valid, math.inf)
    return (k @ omega_t).sub_(half), half, k


def _masked_values(v: Tensor, key_padding_mask: Tensor | None, chunk: slice, dtype: torch.dtype) -> Tensor:
    v = v[:, :, chunk].to(dtype)
    return v if key_padding_mask is None else v.masked_fill(~key_padding_mask[:, None, chunk, None], 0)


def state(
    k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, with_max: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Key pass; see `ops.performer_state`."""
    omega_t = _scaled_omega(omega, k)
    batch, heads, tokens, _ = k.shape
    num_features, dtype = omega.shape[-2], omega_t.dtype
    values = k.new_zeros((batch, heads, num_features, v.shape[-1]), dtype=dtype)
    top = k.new_full((batch, heads, 1, num_features), -math.inf, dtype=dtype)
    total = torch.zeros_like(top)
    exponent_max = k.new_full((batch, heads), -math.inf, dtype=dtype)
    for chunk in _chunks(tokens, batch * heads, num_features):
        exponents, half, _ = _key_exponents(k, omega_t, key_padding_mask, chunk)
        if with_max:
            finite = half.masked_fill(half == math.inf, 0)
            exponent_max = torch.maximum(exponent_max, (exponents + finite).amax((-1, -2)))
        new_top = torch.maximum(top, exponents.amax(-2, keepdim=True))
        base = new_top.masked_fill(new_top == -math.inf, 0)
        weights = exponents.sub_(base).exp_()
        decay = (top - base).exp_()
        total = total * decay + weights.sum(-2, keepdim=True)
        values.mul_(decay.transpose(-1, -2))
        values += weights.transpose(-1, -2) @ _masked_values(v, key_padding_mask, chunk, dtype)
        top = new_top
    values /= total.masked_fill(total == 0, 1).transpose(-1, -2)
    return values, (top + total.log()).squeeze(-2), exponent_max


def state_backward(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    values: Tensor,
    lse: Tensor,
    dvalues: Tensor,
    dlse: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dk, dv); see `ops.performer_state_backward`."""
    omega_t = _scaled_omega(omega, k)
    scale = omega.shape[-1] ** -0.5
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    shift = (dlse - (dvalues * values).sum(-1)).unsqueeze(-2)
    base = lse.masked_fill(lse == -math.inf, 0).unsqueeze(-2)
    for chunk in _chunks(k.shape[2], k.shape[0] * k.shape[1], omega.shape[-2]):
        exponents, _, k_chunk = _key_exponents(k, omega_t, key_padding_mask, chunk)
        weights = exponents.sub_(base).exp_()
        dv[:, :, chunk] = (weights @ dvalues).to(v.dtype)
        v_chunk = _masked_values(v, key_padding_mask, chunk, weights.dtype)
        dexponents = (v_chunk @ dvalues.transpose(-1, -2)).add_(shift).mul_(weights)
        dk_chunk = dexponents @ omega_t.transpose(-1, -2)
        dk_chunk -= k_chunk * dexponents.sum(-1, keepdim=True).mul_(scale)
        dk[:, :, chunk] = dk_chunk.to(k.dtype)
    return dk, dv


def _query_exponents(q: Tensor, omega_t: Tensor, lse: Tensor) -> Tensor:
    return (q @ omega_t).add_(lse.unsqueeze(-2))


def _extra_exponent(q: Tensor, u: Tensor, extra_lse: Tensor) -> Tensor:
    """Exponent of the constant feature `eps`, per query: see `ops.performer_read`."""
    half = q.square().sum(-1, keepdim=True) * (q.shape[-1] ** -0.5 / 2)
    return half + u.amax(-1, keepdim=True) + extra_lse[..., None, None]


def read(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_values: Tensor | None,
    extra_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Query pass; see `ops.performer_read`."""
    omega_t = _scaled_omega(omega, q)
    batch, heads, tokens, _ = q.shape
    out = q.new_empty((batch, heads, tokens, values.shape[-1]))
    out_lse = q.new_empty((batch, heads, tokens), dtype=omega_t.dtype)
    for chunk in _chunks(tokens, batch * heads, omega.shape[-2]):
        q_chunk = q[:, :, chunk].to(omega_t.dtype)
        if extra_lse is None:
            exponents, extra = _query_exponents(q_chunk, omega_t, lse), None
        else:
            u = q_chunk @ omega_t
            extra = _extra_exponent(q_chunk, u, extra_lse)
            exponents = u.add_(lse.unsqueeze(-2))
        top = exponents.amax(-1, keepdim=True)
        if extra is not None:
            top = torch.maximum(top, extra)
        top.masked_fill_(top == -math.inf, 0)
        weights = exponents.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out_chunk = weights @ values
        if extra is not None:
            extra_weight = extra.sub_(top).exp_()
            total += extra_weight
            out_chunk += extra_weight * extra_values.unsqueeze(-2)
        out[:, :, chunk] = out_chunk.div_(total.masked_fill(total == 0, 1)).to(q.dtype)
        out_lse[:, :, chunk] = (top + total.log()).squeeze(-1)
    return out, out_lse


def read_backward(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_values: Tensor | None,
    extra_lse: Tensor | None,
    out: Tensor,
    out_lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dvalues, dlse, dextra_values, dextra_lse); see `ops.performer_read_backward`."""
    omega_t = _scaled_omega(omega, q)
    dtype, scale = omega_t.dtype, omega.shape[-1] ** -0.5
    dq, dvalues, dlse = torch.empty_like(q), torch.zeros_like(values), torch.zeros_like(lse)
    dextra_values = values.new_zeros((*values.shape[:2], values.shape[-1]))
    dextra_lse = lse.new_zeros(lse.shape[:2])
    for chunk in _chunks(q.shape[2], q.shape[0] * q.shape[1], omega.shape[-2]):
        q_chunk, dout_chunk = q[:, :, chunk].to(dtype), dout[:, :, chunk].to(dtype)
        delta = (dout_chunk * out[:, :, chunk].to(dtype)).sum(-1, keepdim=True)
        base = out_lse[:, :, chunk].unsqueeze(-1)
        base = base.masked_fill(base == -math.inf, 0)
        u = q_chunk @ omega_t
        extra = None if extra_lse is None else _extra_exponent(q_chunk, u, extra_lse)
        weights = u.add_(lse.unsqueeze(-2)).sub_(base).exp_()
        dvalues += weights.transpose(-1, -2) @ dout_chunk
        dexponents = (dout_chunk @ values.transpose(-1, -2)).sub_(delta).mul_(weights)
        dlse += dexponents.sum(-2)
        dq_chunk = dexponents @ omega_t.transpose(-1, -2)
        if extra is not None:
            extra_weight = extra.sub_(base).exp_()
            dextra_values += (extra_weight * dout_chunk).sum(-2)
            dextra = ((dout_chunk * extra_values.unsqueeze(-2)).sum(-1, keepdim=True) - delta) * extra_weight
            dextra_lse += dextra.sum((-1, -2))
            dq_chunk += dextra * scale * q_chunk
        dq[:, :, chunk] = dq_chunk.to(q.dtype)
    return dq, dvalues, dlse, dextra_values, dextra_lse
