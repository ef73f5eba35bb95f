"""FAVOR+ on any device in plain PyTorch, in chunks of tokens: features never exist for more than one chunk.

The same two passes and the same saved tensors as the Triton kernels (see `fused`), so that a forward pass of one and
a backward pass of the other fit together. Arithmetic is float32, or float64 for float64 inputs.

Whatever is added to, or summed over, a tile of chunk x M values rides in its matrix products as one more column or
row, which spares a pass over the tile. What is left between the products is one exponential and, backward, one
multiplication. Exponents are in base 2: `torch.exp2` on a CPU takes a third of the time of `torch.exp`.

Cost, forward: 8 B H N M D FLOP in products and 2 B H N M exponentials; memory beyond inputs and outputs is two tiles
of `_TILE_VALUES` values, whatever N is. Large heads go one after the other: a product of two matrices has a faster
way than a batch of them (`product`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from medformer_kernels._products import one_by_one, product

__all__ = [
    "LOG2E",
    "chunk_length",
    "columns",
    "compute_dtype",
    "key_chunk",
    "read",
    "read_backward",
    "scaled_omega",
    "state",
    "state_backward",
    "value_chunk",
]

# Values in one tile of chunk x M, times B x H where heads are computed together: 4096 tokens for 256 features.
_TILE_VALUES = 1 << 20
LOG2E = math.log2(math.e)


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def scaled_omega(omega: Tensor, x: Tensor, factor: float) -> Tensor:
    """omega * factor / D^(1/4) as (B, H, M, D) in the compute dtype."""
    omega = omega.to(compute_dtype(x)) * (factor * omega.shape[-1] ** -0.25)
    return omega.expand(*x.shape[:2], -1, -1).contiguous()


def chunk_length(values_per_token: int) -> int:
    """Tokens of a chunk whose tile holds `_TILE_VALUES` values."""
    return max(16, _TILE_VALUES // max(1, values_per_token))


def _heads(x: Tensor, omega: Tensor, key_padding_mask: Tensor | None) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
    """(index of samples and heads, their omega and mask) of what is computed together: one head where its products are
    large, else all."""
    omega = omega.expand(*x.shape[:2], -1, -1)
    if not (x.is_cpu and one_by_one(x.shape[2], *omega.shape[-2:])):
        yield ..., omega, key_padding_mask
        return
    for b, h in itertools.product(range(x.shape[0]), range(x.shape[1])):
        index = slice(b, b + 1), slice(h, h + 1)
        yield index, omega[index], None if key_padding_mask is None else key_padding_mask[b : b + 1]


def _chunks(x: Tensor, num_features: int) -> Iterator[slice]:
    tokens, step = x.shape[2], chunk_length(x.shape[0] * x.shape[1] * num_features)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def columns(x: Tensor, *columns: Tensor | float) -> Tensor:
    """x (..., n, d) with columns appended: each a number or a tensor (..., n) that broadcasts to it."""
    out = x.new_empty((*x.shape[:-1], x.shape[-1] + len(columns)))
    out[..., : x.shape[-1]] = x
    for index, column in enumerate(columns, start=x.shape[-1]):
        out[..., index] = column
    return out


def key_chunk(k: Tensor, key_padding_mask: Tensor | None, chunk: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(keys, their |k'|^2 / 2 in base 2) of a chunk; a masked key is 0 and at distance infinity."""
    factor = LOG2E * k.shape[-1] ** -0.5 / 2
    k = k[:, :, chunk].to(dtype)
    if key_padding_mask is None:
        return k, k.square().sum(-1).mul_(factor)
    masked = ~key_padding_mask[:, None, chunk]
    k = k.masked_fill(masked.unsqueeze(-1), 0)
    return k, k.square().sum(-1).mul_(factor).masked_fill_(masked, math.inf)


def value_chunk(v: Tensor, key_padding_mask: Tensor | None, chunk: slice, dtype: torch.dtype) -> Tensor:
    v = v[:, :, chunk].to(dtype)
    return v if key_padding_mask is None else v.masked_fill(~key_padding_mask[:, None, chunk, None], 0)


def state(
    k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, with_max: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Key pass; see `ops.performer_state`."""
    shape, dtype = (*k.shape[:2], omega.shape[-2]), compute_dtype(k)
    values, lse = k.new_empty((*shape, v.shape[-1]), dtype=dtype), k.new_empty(shape, dtype=dtype)
    exponent_max = k.new_empty(shape[:2], dtype=dtype)
    for at, omega_at, mask in _heads(k, omega, key_padding_mask):
        values[at], lse[at], exponent_max[at] = _state(k[at], v[at], omega_at, mask, with_max)
    return values, lse, exponent_max


def _state(
    k: Tensor, v: Tensor, omega: Tensor, key_padding_mask: Tensor | None, with_max: bool
) -> tuple[Tensor, Tensor, Tensor]:
    omega_1 = columns(scaled_omega(omega, k, LOG2E), -1.0).transpose(-1, -2)
    dtype, num_features = omega_1.dtype, omega.shape[-2]
    sums = k.new_zeros((*k.shape[:2], num_features, v.shape[-1] + 1), dtype=dtype)  # values and, last, weights
    top = k.new_full((*k.shape[:2], 1, num_features), -math.inf, dtype=dtype)
    exponent_max = k.new_full(k.shape[:2], -math.inf, dtype=dtype)
    for chunk in _chunks(k, num_features):
        k_chunk, half = key_chunk(k, key_padding_mask, chunk, dtype)
        exponents = product(columns(k_chunk, half), omega_1)
        if with_max:
            u = exponents + half.masked_fill(half == math.inf, 0).unsqueeze(-1)
            exponent_max = torch.maximum(exponent_max, u.amax((-1, -2)))
        new_top = torch.maximum(top, exponents.amax(-2, keepdim=True))
        base = new_top.masked_fill(new_top == -math.inf, 0)
        weights = exponents.sub_(base).exp2_()
        sums.mul_((top - base).exp2_().transpose(-1, -2))
        sums += product(weights.mT, columns(value_chunk(v, key_padding_mask, chunk, dtype), 1.0))
        top = new_top
    values, total = sums[..., :-1], sums[..., -1]
    values = values / total.masked_fill(total == 0, 1).unsqueeze(-1)
    return values, (top.squeeze(-2) + total.log2()) / LOG2E, exponent_max / LOG2E


def state_backward(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    values: Tensor,
    lse: Tensor,
    dvalues: Tensor,
    dlse: Tensor,
    with_omega: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk, dv, domega (B, H, M, D), empty unless `with_omega`); see `ops.performer_state_backward`."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    domega = values.new_empty((*k.shape[:2], *omega.shape[-2:]) if with_omega else 0)
    for at, omega_at, mask in _heads(k, omega, key_padding_mask):
        part = _state_backward(
            k[at], v[at], omega_at, mask, values[at], lse[at], dvalues[at], dlse[at], with_omega, dk[at], dv[at]
        )
        if with_omega:
            domega[at] = part
    return dk, dv, domega


def _state_backward(
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    key_padding_mask: Tensor | None,
    values: Tensor,
    lse: Tensor,
    dvalues: Tensor,
    dlse: Tensor,
    with_omega: bool,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """domega; fills dk and dv."""
    scale = k.shape[-1] ** -0.5
    base = lse.masked_fill(lse == -math.inf, 0) * -LOG2E
    omega_lse = columns(scaled_omega(omega, k, LOG2E), -1.0, base).transpose(-1, -2)
    omega_1 = columns(scaled_omega(omega, k, 1.0), 1.0)
    dvalues_shift = columns(dvalues, dlse - (dvalues * values).sum(-1)).transpose(-1, -2)
    domega = torch.zeros_like(omega_1[..., :-1])
    for chunk in _chunks(k, omega.shape[-2]):
        k_chunk, half = key_chunk(k, key_padding_mask, chunk, omega_1.dtype)
        weights = product(columns(k_chunk, half, 1.0), omega_lse).exp2_()
        dv[:, :, chunk] = product(weights, dvalues)
        v_chunk = value_chunk(v, key_padding_mask, chunk, omega_1.dtype)
        dexponents = product(columns(v_chunk, 1.0), dvalues_shift).mul_(weights)
        if with_omega:
            domega += product(dexponents.mT, k_chunk)
        dk_chunk = product(dexponents, omega_1)
        dk[:, :, chunk] = dk_chunk[..., :-1] - k_chunk * (scale * dk_chunk[..., -1:])
    return domega.mul_(scale**0.5)


def _extra_exponent(q: Tensor, u: Tensor, extra_lse: Tensor) -> Tensor:
    """Exponent (base 2) of the constant feature `eps`, per query (B, H, c): see `ops.performer_read`."""
    half = q.square().sum(-1) * (LOG2E * q.shape[-1] ** -0.5 / 2)
    return half + u.amax(-1) + extra_lse.unsqueeze(-1) * LOG2E


def read(
    q: Tensor, omega: Tensor, values: Tensor, lse: Tensor, extra_values: Tensor | None, extra_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Query pass; see `ops.performer_read`."""
    out = q.new_empty((*q.shape[:3], values.shape[-1]))
    out_lse = q.new_empty(q.shape[:3], dtype=lse.dtype)
    for at, omega_at, _ in _heads(q, omega, None):
        extra = () if extra_values is None or extra_lse is None else (extra_values[at], extra_lse[at])
        _read(q[at], omega_at, values[at], lse[at], extra, out[at], out_lse[at])
    return out, out_lse


def _read(
    q: Tensor, omega: Tensor, values: Tensor, lse: Tensor, extra_state: tuple[Tensor, ...], out: Tensor, out_lse: Tensor
) -> None:
    """Fills out and out_lse."""
    lse = lse * LOG2E
    omega_lse = columns(scaled_omega(omega, q, LOG2E), lse).transpose(-1, -2)
    values_1 = columns(values, 1.0)
    for chunk in _chunks(q, omega.shape[-2]):
        q_chunk = q[:, :, chunk].to(lse.dtype)
        exponents = product(columns(q_chunk, 1.0), omega_lse)
        top = exponents.amax(-1)
        extra = extra_values = None
        if extra_state:
            extra_values, extra_lse = extra_state
            extra = _extra_exponent(q_chunk, exponents - lse.unsqueeze(-2), extra_lse)
            top = torch.maximum(top, extra)
        top.masked_fill_(top == -math.inf, 0)
        sums = product(exponents.sub_(top.unsqueeze(-1)).exp2_(), values_1)
        out_chunk, total = sums[..., :-1], sums[..., -1]
        if extra is not None and extra_values is not None:
            weight = (extra - top).exp2_()
            total = total + weight
            out_chunk = out_chunk + weight.unsqueeze(-1) * extra_values.unsqueeze(-2)
        out[:, :, chunk] = out_chunk / total.masked_fill(total == 0, 1).unsqueeze(-1)
        out_lse[:, :, chunk] = (top + total.log2()) / LOG2E


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
    with_omega: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dvalues, dlse, dextra_values, dextra_lse, domega (B, H, M, D), empty unless `with_omega`); see
    `ops.performer_read_backward`."""
    dq, dvalues, dlse = torch.empty_like(q), torch.empty_like(values), torch.empty_like(lse)
    dextra_values, dextra_lse = torch.zeros_like(values[..., 0, :]), torch.zeros_like(lse[..., 0])
    domega = values.new_empty((*q.shape[:2], *omega.shape[-2:]) if with_omega else 0)
    for at, omega_at, _ in _heads(q, omega, None):
        extra = () if extra_values is None or extra_lse is None else (extra_values[at], extra_lse[at])
        dextra = (dextra_values[at], dextra_lse[at])
        made = (out[at], out_lse[at], dout[at])
        dvalues[at], dlse[at], part = _read_backward(
            q[at], omega_at, values[at], lse[at], extra, *made, with_omega, dq[at], dextra
        )
        if with_omega:
            domega[at] = part
    return dq, dvalues, dlse, dextra_values, dextra_lse, domega


def _read_backward(
    q: Tensor,
    omega: Tensor,
    values: Tensor,
    lse: Tensor,
    extra_state: tuple[Tensor, ...],
    out: Tensor,
    out_lse: Tensor,
    dout: Tensor,
    with_omega: bool,
    dq: Tensor,
    dextra_state: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dvalues, dlse, domega); fills dq and adds to `dextra_state`."""
    scale = q.shape[-1] ** -0.5
    dtype, omega_1, lse = lse.dtype, scaled_omega(omega, q, 1.0), lse * LOG2E
    omega_lse = columns(scaled_omega(omega, q, LOG2E), lse, -1.0).transpose(-1, -2)
    values_1 = columns(values, -1.0).transpose(-1, -2)
    domega = torch.zeros_like(omega_1)
    sums = values.new_zeros((*values.shape[:3], values.shape[3] + 1))  # p^T dout and, last, p^T delta
    for chunk in _chunks(q, omega.shape[-2]):
        q_chunk, dout_chunk = q[:, :, chunk].to(dtype), dout[:, :, chunk].to(dtype)
        delta = (dout_chunk * out[:, :, chunk].to(dtype)).sum(-1)
        base = out_lse[:, :, chunk] * LOG2E
        base = base.masked_fill(base == -math.inf, 0)
        exponents = product(columns(q_chunk, 1.0, base), omega_lse)
        extra = extra_values = None
        if extra_state:
            extra_values, extra_lse = extra_state
            u = exponents - lse.unsqueeze(-2) + base.unsqueeze(-1)
            extra = (_extra_exponent(q_chunk, u, extra_lse) - base).exp2_().unsqueeze(-1)
        weights = exponents.exp2_()
        dout_delta = columns(dout_chunk, delta)
        sums += product(weights.mT, dout_delta)
        dexponents = product(dout_delta, values_1).mul_(weights)
        if with_omega:
            domega += product(dexponents.mT, q_chunk)
        dq_chunk = product(dexponents, omega_1)
        if extra is not None and extra_values is not None:
            dextra_values, dextra_lse = dextra_state
            dextra_values += (extra * dout_chunk).sum(-2)
            dextra = extra * (dout_chunk @ extra_values.unsqueeze(-1) - delta.unsqueeze(-1))
            dextra_lse += dextra.sum((-1, -2))
            dq_chunk += dextra * scale * q_chunk
        dq[:, :, chunk] = dq_chunk
    dvalues = sums[..., :-1].contiguous()
    dlse = (dvalues * values).sum(-1) - sums[..., -1]
    return dvalues, dlse, domega.mul_(scale**0.5)
