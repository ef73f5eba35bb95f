"""FAVOR+ with a state for each block of a token grid, each query block reading its own mixture of them.

One state of M x (Dv + 1) numbers for all keys is what a query of plain FAVOR+ reads, however many keys there are.
Here the grid is cut into blocks, whose states N_b = sum phi(k) v^T and Z_b = sum phi(k) are kept apart, and a query of
block a reads

    out = phi(q) sum_b w(b - a) N_b / phi(q) sum_b w(b - a) Z_b

with weights w > 0 of the blocks' offset that can be learned: a product over the axes, so that mixing costs
2 M (Dv + 1) FLOP for each block and each block along an axis. With equal weights it is plain FAVOR+.

Blocks lie side by side as samples, so that both passes are the operators of `ops`, on any device.

Source: Zhang et al. 2026 (MHLA, arXiv 2601.07832) mix the states of blocks. Differs: positive features of FAVOR+ in
place of their feature map; weights by offset, so that any grid can be read; class and register tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels._dispatch import resolve_backend
from medformer_kernels._tracing import certain, standard
from medformer_kernels.performer.arguments import prepare, without_kernel
from medformer_kernels.performer.ops import performer_read, performer_state
from medformer_kernels.performer.reference import performer_features

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["performer_block_attention", "performer_block_attention_reference"]


def performer_block_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    omega: Float[Tensor, "*H M D"],
    log_weights: Float[Tensor, "axes H offsets"],
    *,
    grid: Sequence[int],
    block: Sequence[int],
    prefix_tokens: int = 0,
    key_padding_mask: Bool[Tensor, "B N"] | None = None,
    feature: str = "softmax",
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"]:
    """FAVOR+ attention over a grid through the states of its blocks; linear in the tokens.

    Args:
        q: queries: `prefix_tokens` first, then the grid, last axis fastest.
        k: keys.
        v: values, whose width may differ.
        omega: random features (`orthogonal_features`), shared by all heads or for each.
        log_weights: by axis and head, the logarithm of the weight of offsets -R to R, in blocks: of the block that is
            read less the block that reads. Relative to the largest of them, whose weight is 1, as that of prefix
            tokens. Offsets beyond R take the weight of R. All equal: plain FAVOR+.
        grid: tokens of each axis.
        block: tokens of a block along each axis; blocks at the end of an axis may be smaller.
        prefix_tokens: class and register tokens in front; they read every block alike, and all read them.
        key_padding_mask: any pattern, True = a real key. A query without one gives 0.
        feature: 'softmax' or 'hyperbolic'.
        backend: 'triton', 'torch' or 'auto', as for `performer_attention`.

    Memory: blocks x M x (Dv + 1) float32 numbers a head, in three copies with gradients. A block whose keys all weigh
    less than e^-80 of the heaviest block's, by a feature, counts as empty for that feature.

    Raises:
        ValueError: an argument does not fit the others.
    """
    call, window, log_weights = _prepare(
        "performer_block_attention", q, k, v, omega, log_weights, grid, block, prefix_tokens, key_padding_mask, feature
    )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    omega = call.omega
    unsupported = without_kernel(q, v, omega, False, feature)
    backend = "standard" if standard() else resolve_backend("performer_block_attention", backend, q, unsupported)
    with torch.autocast(q.device.type, enabled=False):
        folded_mask = _folded_mask(key_padding_mask, q, grid, window, prefix_tokens)
        folded_k, folded_v, folded_q = (_fold(x[:, :, prefix_tokens:], grid, window) for x in (k, v, q))
        values, lse = _state(folded_k, folded_v, omega, folded_mask, backend)
        counts = _counts(grid, window)
        values, lse = values.unflatten(0, (-1, *counts)), lse.unflatten(0, (-1, *counts))
        axes, ones = tuple(range(1, 1 + len(counts))), (1,) * len(counts)
        top, front = lse.detach().amax(axes), None
        if prefix_tokens:
            ahead = None if key_padding_mask is None else key_padding_mask[:, :prefix_tokens]
            front = _state(k[:, :, :prefix_tokens], v[:, :, :prefix_tokens], omega, ahead, backend)
            top = torch.maximum(top, front[1].detach())
        top = top.masked_fill(top == -math.inf, 0)
        tops = top.unflatten(0, (-1, *ones))
        blocks = _weighed(values, lse, tops)
        mixed, whole = _mix(blocks, log_weights.to(blocks.dtype)), blocks.sum(axes)
        if front is not None:
            first = _weighed(*front, top)
            mixed, whole = mixed + first.unflatten(0, (-1, *ones)), whole + first
        values, lse = (x.flatten(0, len(counts)) for x in _divided(mixed, tops.expand(mixed.shape[:-1])))
        out = _unfold(_read(folded_q, omega, values, lse, backend), grid, window)
        if front is None:
            return out
        values, lse = _divided(whole, top)
        return torch.cat([_read(q[:, :, :prefix_tokens], omega, values, lse, backend), out], 2)


def performer_block_attention_reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    omega: Float[Tensor, "*H M D"],
    log_weights: Float[Tensor, "axes H offsets"],
    *,
    grid: Sequence[int],
    block: Sequence[int],
    prefix_tokens: int = 0,
    key_padding_mask: Bool[Tensor, "B N"] | None = None,
    feature: str = "softmax",
) -> Float[Tensor, "B H N Dv"]:
    """The definition, with the N x N weights phi(q) phi(k)^T w written out."""
    call, window, log_weights = _prepare(
        "performer_block_attention_reference", q, k, v, omega, log_weights, grid, block, prefix_tokens,
        key_padding_mask, feature,
    )  # fmt: skip
    log_q, log_k = (performer_features(x, call.omega) for x in (q, k))
    pairs = torch.logsumexp(log_q.unsqueeze(-2) + log_k.unsqueeze(-3), -1)
    reach = log_weights.shape[-1] // 2
    bias = q.new_zeros((q.shape[1], q.shape[2], q.shape[2]))
    places = torch.cartesian_prod(*(torch.arange(g, device=q.device) // w for g, w in zip(grid, window, strict=True)))
    for axis, place in enumerate(places.view(-1, len(grid)).unbind(1)):
        offsets = (place[None] - place[:, None]).clamp(-reach, reach) + reach
        bias[:, prefix_tokens:, prefix_tokens:] += log_weights[axis].to(q.dtype)[:, offsets]
    pairs = pairs + bias
    if key_padding_mask is not None:
        pairs = pairs.masked_fill(~key_padding_mask[:, None, None], -math.inf)
        v = v.masked_fill(~key_padding_mask[:, None, :, None], 0)
    empty = (pairs == -math.inf).all(-1, keepdim=True)
    return pairs.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v


def _prepare(name, q, k, v, omega, log_weights, grid, block, prefix_tokens, key_padding_mask, feature):
    """(the checked call, tokens of a block along each axis, at most those of the grid, log weights of at most 0)."""

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{name}: {message}")

    if feature not in ("softmax", "hyperbolic"):
        fail(f"feature={feature!r} must be 'softmax' or 'hyperbolic'")
    call = prepare(name, q, k, v, omega, key_padding_mask=key_padding_mask, feature=feature)
    if q.shape[:3] != k.shape[:3]:
        fail(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; both must be (B, H, N, D) of the same B, H and N")
    if len(grid) == 0 or len(block) != len(grid) or min(block) < 1:
        fail(f"block={tuple(block)} must be one positive number of tokens for each axis of grid={tuple(grid)}")
    if prefix_tokens < 0 or prefix_tokens + math.prod(grid) != q.shape[2]:
        fail(f"grid={tuple(grid)} behind prefix_tokens={prefix_tokens} must be the {q.shape[2]} tokens of q")
    shape = (len(grid), q.shape[1])
    if log_weights.ndim != 3 or log_weights.shape[:2] != shape or log_weights.shape[2] % 2 == 0:
        fail(
            f"log_weights has shape {tuple(log_weights.shape)}; it must be ({shape[0]}, {shape[1]}, 2 R + 1), a "
            "weight for each axis, head and offset"
        )
    window = [min(b, g) if isinstance(g, int) else b for b, g in zip(block, grid, strict=True)]
    return call, window, log_weights - log_weights.amax(-1, keepdim=True)


def _fold(x: Tensor, grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """(B, H, grid, D) to (B blocks, H, tokens of a block, D), zeros behind the end of an axis."""
    batch, heads, width, axes = x.shape[0], x.shape[1], x.shape[-1], len(grid)
    x = x.unflatten(2, tuple(grid))
    counts = _counts(grid, window)
    if not _whole(grid, window):
        spare = [c * w - g for c, w, g in zip(counts, window, grid, strict=True)]
        x = F.pad(x, [0, 0, *(n for pad in reversed(spare) for n in (0, pad))])
    x = x.reshape(batch, heads, *(n for pair in zip(counts, window, strict=True) for n in pair), width)
    x = x.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2), 2 + 2 * axes)
    return x.reshape(-1, heads, math.prod(window), width)


def _unfold(x: Tensor, grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """The inverse of `_fold`: (B, H, N, D), without what was added."""
    axes, counts = len(grid), _counts(grid, window)
    x = x.view(-1, *counts, x.shape[1], *window, x.shape[-1])
    interleaved = (n for axis in range(axes) for n in (1 + axis, 2 + axes + axis))
    x = x.permute(0, 1 + axes, *interleaved, 2 + 2 * axes)
    x = x.reshape(*x.shape[:2], *(c * w for c, w in zip(counts, window, strict=True)), x.shape[-1])
    if not _whole(grid, window):
        for axis, size in enumerate(grid, start=2):
            x = x.narrow(axis, 0, size)
        x = x.clone(memory_format=torch.contiguous_format)  # `flatten` asks for the strides, which a graph may not know
    return x.flatten(2, 1 + axes)


def _counts(grid: Sequence[int], window: Sequence[int]) -> list[int]:
    """Blocks along each axis."""
    return [(g + w - 1) // w for g, w in zip(grid, window, strict=True)]


def _whole(grid: Sequence[int], window: Sequence[int]) -> bool:
    """Whether every block is full; False where a graph leaves that open."""
    return all(certain(g % w == 0) for g, w in zip(grid, window, strict=True))


def _folded_mask(
    mask: Tensor | None, q: Tensor, grid: Sequence[int], window: Sequence[int], prefix_tokens: int
) -> Tensor | None:
    """(B blocks, tokens of a block), True for a real key; None where all are."""
    if mask is None:
        if _whole(grid, window):
            return None
        mask = torch.ones((q.shape[0], q.shape[2]), dtype=torch.bool, device=q.device)
    return _fold(mask[:, None, prefix_tokens:, None], grid, window)[:, 0, :, 0].contiguous()


def _state(k: Tensor, v: Tensor, omega: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    if backend != "standard":
        values, lse, _ = performer_state(k, v, omega, mask, False, backend)
        return values, lse
    exponents = performer_features(k, omega)
    if mask is not None:
        exponents = exponents.masked_fill(~mask[:, None, :, None], -math.inf)
        v = v.masked_fill(~mask[:, None, :, None], 0)
    lse = torch.logsumexp(exponents, -2)
    base = lse.masked_fill(lse == -math.inf, 0)
    return (exponents - base.unsqueeze(-2)).exp().mT @ v, lse


def _read(q: Tensor, omega: Tensor, values: Tensor, lse: Tensor, backend: str) -> Tensor:
    if backend != "standard":
        return performer_read(q, omega, values, lse, None, None, backend)[0]
    exponents = (q * q.shape[-1] ** -0.25) @ omega.to(q.dtype).mT + lse.unsqueeze(-2)
    empty = (lse == -math.inf).all(-1)[..., None, None]
    return exponents.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ values


def _weighed(values: Tensor, lse: Tensor, top: Tensor) -> Tensor:
    """(..., M, Dv + 1): N and, last, Z of each feature, relative to exp(top)."""
    total = (lse - top).exp().unsqueeze(-1)
    return torch.cat([values * total, total], -1)


def _divided(rows: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """(values, lse) of what `_weighed` makes, once summed; -inf where nothing was there."""
    total = rows[..., -1]
    empty = total == 0
    lse = total.masked_fill(empty, 1).log() + top
    return rows[..., :-1] / total.masked_fill(empty, 1).unsqueeze(-1), lse.masked_fill(empty, -math.inf)


def _mix(blocks: Tensor, log_weights: Tensor) -> Tensor:
    """blocks (B, by axis, H, M, Dv + 1), mixed along one axis after the other."""
    reach = log_weights.shape[-1] // 2
    for axis, by_head in enumerate(log_weights, start=1):
        place = torch.arange(blocks.shape[axis], device=blocks.device)
        weights = by_head[:, (place[None] - place[:, None]).clamp(-reach, reach) + reach].exp()  # (H, reads, is read)
        moved = blocks.movedim((axis, log_weights.shape[0] + 1), (-2, 0))  # (H, B, other axes, M, this axis, Dv + 1)
        blocks = torch.einsum("hij,h...jd->h...id", weights, moved).movedim((-2, 0), (axis, log_weights.shape[0] + 1))
    return blocks
