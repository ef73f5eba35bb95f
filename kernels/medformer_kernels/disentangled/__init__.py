"""Disentangled attention: scores from content and position, each side either or both, in one, two and three dimensions.

reference      the definition, in plain PyTorch
arguments      checks                          terms          the nine terms as sums of four products
tables         relative terms as small tables  buckets        distances to rows of a table
chunked        PyTorch, flat memory            bias           tables added to blocks of scores, and their gradients
wide           PyTorch's fused attention over wider queries and keys
fused          Triton launches                 kernels        the Triton kernels, of device code in `tiles`
ops            `torch.library` operators over these, with their gradients
prefix         class and register tokens, outside the kernels
maps           attention maps and the share of each term
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medformer_kernels._dispatch import resolve_backend
from medformer_kernels._operators import first_order
from medformer_kernels._tracing import standard
from medformer_kernels.disentangled.arguments import Call, prepare
from medformer_kernels.disentangled.buckets import axis_expansion, axis_rows, log_buckets
from medformer_kernels.disentangled.maps import Maps, maps
from medformer_kernels.disentangled.ops import disentangled_forward
from medformer_kernels.disentangled.prefix import attend_with_prefix
from medformer_kernels.disentangled.reference import reference
from medformer_kernels.disentangled.tables import Operands, operands
from medformer_kernels.disentangled.terms import DEFAULT_TERMS, TERMS
from medformer_kernels.disentangled.wide import wide

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "DEFAULT_TERMS",
    "TERMS",
    "Maps",
    "axis_expansion",
    "axis_rows",
    "disentangled_attention",
    "disentangled_attention_reference",
    "disentangled_maps",
    "log_buckets",
]


def disentangled_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    *,
    grid: Sequence[int] | Sequence[Sequence[int]] | None = None,
    rel_k: Sequence[Float[Tensor, "H rows D"]] | Float[Tensor, "H R D"] | None = None,
    rel_q: Sequence[Float[Tensor, "H rows D"]] | Float[Tensor, "H R D"] | None = None,
    pos_q: Float[Tensor, "H N D"] | Float[Tensor, "B H N D"] | None = None,
    pos_k: Float[Tensor, "H S D"] | Float[Tensor, "B H S D"] | None = None,
    buckets: Int[Tensor, " N+S-1"] | None = None,
    terms: Sequence[str] = DEFAULT_TERMS,
    prefix_tokens: int = 0,
    prefix_k: Float[Tensor, "H 2 P D"] | None = None,
    prefix_q: Float[Tensor, "H 2 P D"] | None = None,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    cu_seqlens: Int[Tensor, " docs+1"] | Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"]:
    """softmax(scale * sum of the terms) v without an N x S matrix, forward or backward.

    A term is written 'query side' 2 'key side', each side c (content: q_i, k_j), p (position) or cp (their sum). The
    position is the sum of an absolute vector (`pos_q`, `pos_k`) and relative ones (`rel_q`, `rel_k`), whichever are
    given. Two relative positions meet by axis: p2p holds no product of one axis with another.

    Args:
        q: queries.
        k: keys.
        v: values, whose width may differ.
        grid: (gz, gy, gx), or (gy, gx), tokens of a volume, x fastest; or a list of them, for volumes laid end to end
            along the tokens, none of which reads another.
        rel_k: position vectors on the key side. With `grid` one table (H, 2 g - 1, D) an axis, (z, y, x) or (y, x),
            row delta + g - 1 for a query delta = i - j tokens behind the key, g the largest of several grids. With
            `buckets` one table (H, R, D).
        rel_q: position vectors on the query side, alike.
        pos_q: absolute position vectors of the queries.
        pos_k: absolute position vectors of the keys.
        buckets: the row of `rel_k` and `rel_q` for each distance i - j, from 1 - S to N - 1 (`log_buckets`).
        terms: any of c2c, c2p, p2c, p2p, cp2c, c2cp, cp2cp, cp2p, p2cp.
        prefix_tokens: class and register tokens in front of the grid (of each grid), without a position.
        prefix_k: their key-side position vectors: [:, 0] where the key is the prefix token, [:, 1] where the query is
            and the key lies on the grid. None: zero.
        prefix_q: the same on the query side.
        causal: query i reads keys 0 to i only.
        key_padding_mask: True = a real key; what the others hold, nan or inf too, is never read. A query without a
            key gives 0.
        cu_seqlens: boundaries of sequences laid end to end, 0 first and N last, for `buckets` or absolute positions;
            `buckets` then has an odd number of entries, enough for the longest. A tensor is read on the host, which
            waits for its device; a list or tuple of int is not.
        dropout: share of the weights that are dropped, the others scaled up.
        seed: of the dropout, 0 to 2^63 - 1, as a number or an int64 tensor of one element on the device of q: equal
            seeds drop equal weights, whatever computes them. None: drawn from torch's generator.
        scale: None for 1 / sqrt(D * number of terms).
        backend: 'triton', 'torch', or 'auto': Triton on an NVIDIA GPU, for heads up to 128 wide (float32: 64).

    Raises:
        ValueError: an argument does not fit the others, or `backend` cannot run.

    Source: He et al. 2021 (DeBERTa), eq. (2) to (4), for c2c, c2p and p2c. Differs: p2p counts in the scale only
    where it is computed.
    """
    calls = prepare(
        "disentangled_attention", q, k, v, grid=grid, rel_k=rel_k, rel_q=rel_q, pos_q=pos_q, pos_k=pos_k,
        buckets=buckets, terms=terms, prefix_tokens=prefix_tokens, prefix_k=prefix_k, prefix_q=prefix_q, causal=causal,
        key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, dropout=dropout, seed=seed, scale=scale,
    )  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        outs = [_attend(call, backend) for call in calls]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _attend(call: Call, backend: str) -> Tensor:
    x = operands(call.q, call.k, call.weights, **call.positions)
    width = max(x.q.shape[3], call.v.shape[3])
    # All three spill registers.
    unsupported = f"scores or values wider than 128 (here {width})" if width > 128 else None
    if width > 64 and call.q.dtype == torch.float32:
        unsupported = f"scores or values wider than 64 (here {width}) in float32"
    if torch.version.hip:
        unsupported = "AMD GPUs"
    backend = resolve_backend("disentangled_attention", backend, call.q, unsupported)
    buckets = call.buckets if x.t is not None or x.u is not None else None
    standalone = standard() or (backend == "torch" and call.q.is_cuda)
    if standalone and buckets is None and call.dropout == 0:
        tensors = (x.q, x.k, x.t, x.u, call.v)
        q, k, t, u, v = first_order("disentangled_attention", "disentangled_attention_reference", *tensors)
        return wide(
            Operands(q=q, k=k, t=t, u=u), v, call.grid, scale=call.scale, causal=call.causal, key_padding_mask=call.mask
        )
    if backend == "triton" and call.grid is not None and call.grid.prefix:
        return attend_with_prefix(call, x)
    grid = [] if call.grid is None else [call.grid.prefix, *call.grid.size]
    return disentangled_forward(
        x.q, x.k, call.v, x.t, x.u, buckets, call.mask, call.seed, grid, call.scale, call.causal, call.dropout, 0,
        backend,
    )[0]  # fmt: skip


def disentangled_attention_reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    **arguments,
) -> Float[Tensor, "B H N Dv"]:
    """The definition of `disentangled_attention`, every pair's position vector written out; takes its arguments."""
    calls = prepare("disentangled_attention_reference", q, k, v, **_DEFAULTS | arguments)
    outs = [
        reference(
            call.q, call.k, call.v, call.terms, scale=call.scale, causal=call.causal, key_padding_mask=call.mask,
            dropout=call.dropout, seed=call.seed, buckets=call.buckets, **call.positions,
        )
        for call in calls
    ]  # fmt: skip
    return torch.cat(outs, 2)


def disentangled_maps(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H S D"], *, queries: Int[Tensor, " Q"], **arguments
) -> Maps:
    """Attention of chosen queries, and what each term adds to it; takes the arguments of `disentangled_attention`.

    Raises:
        ValueError: an argument does not fit, a query is no token, or the batch is packed (take one document).
    """
    arguments = {name: x for name, x in arguments.items() if name not in ("dropout", "seed", "backend")}
    calls = prepare("disentangled_maps", q, k, k, **_DEFAULTS | arguments)
    if len(calls) > 1:
        raise ValueError(f"disentangled_maps: the batch packs {len(calls)} documents; pass one of them at a time")
    tokens = q.shape[2]
    if queries.ndim != 1 or queries.is_floating_point() or ((queries < 0) | (queries >= tokens)).any():
        raise ValueError(f"disentangled_maps: queries={queries} must be whole numbers (Q,) from 0 to {tokens - 1}")
    with torch.autocast(q.device.type, enabled=False):
        return maps(calls[0], queries)


_DEFAULTS = {
    "grid": None, "rel_k": None, "rel_q": None, "pos_q": None, "pos_k": None, "buckets": None, "terms": DEFAULT_TERMS,
}  # fmt: skip
