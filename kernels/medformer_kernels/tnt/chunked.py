"""The inner block in plain PyTorch, a few hundred sequences at a time, so that everything between its two ends stays in
the cache. Backward takes what forward saved where that is no more than `SAVED_BYTES`; where it is more, it computes
each chunk again.

Attention over so few and so narrow tokens is a question of layout. Tokens of one head lie either as rows (n, D) or as
columns (D, n): with columns the products of up to `_COLUMNS` tokens are up to three times as fast in float32, and so
is the softmax, which then runs along them side by side. Longer sequences take PyTorch's fused attention forward.
16-bit inputs keep LayerNorm, softmax and the residual in float32, and all of attention too where columns are faster.
Measured with `benchmarks/bench_tnt.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.tnt.dropping import ATTENTION, MLP, factor
from medformer_kernels.tnt.weights import NAMES, TNTInnerWeights

__all__ = ["SAVED_BYTES", "Saved", "backward", "forward", "saved_bytes"]

# What one call may keep for its backward pass. Computing 4096 x 16 x 24 again costs a fifth of a step.
SAVED_BYTES = 128 << 20

# Up to so many tokens a head is laid out in columns.
_COLUMNS = 32
# Numbers of x in a chunk, for each thread.
_CHUNK = 1 << 17


class Saved(NamedTuple):
    """What forward may keep: each tensor whole, or of one chunk."""

    middle: Tensor
    """(S, n, c), between attention and MLP, in float32 or better."""
    qkv: Tensor
    """(S, n, 3c)."""
    weights: Tensor
    """Attention's, (S, H, n, n); transposed where heads lie in columns."""
    mixed: Tensor
    """(S, n, c), in front of the projection."""
    before: Tensor
    """(S, n, f), in front of the GELU."""

    @classmethod
    def empty(cls, x: Tensor, product: torch.dtype, hidden: int, heads: int) -> Saved:
        kept = _kept(x, product, hidden, heads)
        return cls(*(x.new_empty((x.shape[0], *shape), dtype=dtype) for shape, dtype in kept))

    def part(self, rows: slice) -> Saved:
        return Saved(*(tensor[rows] for tensor in self))


def saved_bytes(x: Tensor, product: torch.dtype, hidden: int, heads: int) -> int:
    """What `Saved` takes."""
    kept = _kept(x, product, hidden, heads)
    return x.shape[0] * sum(math.prod(shape) * dtype.itemsize for shape, dtype in kept)


def _kept(x: Tensor, product: torch.dtype, hidden: int, heads: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape a sequence and dtype of each field of `Saved`."""
    tokens, width = x.shape[1:]
    weights = torch.promote_types(product, torch.float32) if tokens <= _COLUMNS else product
    return [
        ((tokens, width), torch.promote_types(x.dtype, torch.float32)),
        ((tokens, 3 * width), product),
        ((heads, tokens, tokens), weights),
        ((tokens, width), product),
        ((tokens, hidden), product),
    ]


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One call: what is the same for all its chunks."""

    w: TNTInnerWeights
    seed: Tensor | None
    heads: int
    eps: float
    dropout: float
    drop_path: float

    def factor(self, branch: int, first: int, x: Tensor) -> Tensor | None:
        sequences, tokens, width = x.shape
        result = factor(self.seed, branch, first, (sequences, tokens, width), self.dropout, self.drop_path)
        return None if result is None else result.to(x.dtype)

    def linear(self, x: Tensor, name: str, out: Tensor | None = None) -> Tensor:
        weight, bias = getattr(self.w, f"{name}_weight"), getattr(self.w, f"{name}_bias")
        x = x.to(weight.dtype)
        if out is None:
            return F.linear(x, weight, bias)
        rows = out.view(-1, out.shape[-1])
        if bias is None:
            torch.mm(x.flatten(0, 1), weight.t(), out=rows)
        else:
            torch.addmm(bias, x.flatten(0, 1), weight.t(), out=rows)
        return out

    def norm(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = getattr(self.w, f"{name}_weight").to(x.dtype), getattr(self.w, f"{name}_bias").to(x.dtype)
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)


def forward(
    x: Tensor,
    w: TNTInnerWeights,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
    saved: Saved | None,
) -> Tensor:
    """See `reference.reference`; fills `saved` where there is one."""
    block = _Block(w=w, seed=seed, heads=num_heads, eps=eps, dropout=dropout, drop_path=drop_path)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for first, chunk in _chunks(x):
        rows = slice(first, first + chunk.shape[0])
        out[rows] = _forward(block, chunk, first, None if saved is None else saved.part(rows))
    return out


def _chunks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    exact = torch.promote_types(x.dtype, torch.float32)
    count = max(1, round(x.numel() / (_CHUNK * torch.get_num_threads())))  # even: no short one at the end
    length = max(1, -(-x.shape[0] // count))
    for first in range(0, x.shape[0], length):
        yield first, x[first : first + length].to(exact).contiguous()


def _forward(block: _Block, x: Tensor, first: int, saved: Saved | None) -> Tensor:
    if saved is None:
        mixed = _attention(block, block.linear(block.norm(x, "norm1")[0], "qkv"))
        middle = _add(x, block.linear(mixed, "proj"), block.factor(ATTENTION, first, x))
        before = block.linear(block.norm(middle, "norm2")[0], "fc1")
    else:
        middle, before = _fill(block, x, first, saved)
    return _add(middle, block.linear(F.gelu(before), "fc2"), block.factor(MLP, first, x))


def _fill(block: _Block, x: Tensor, first: int, saved: Saved) -> tuple[Tensor, Tensor]:
    """Compute all of `saved`; its `middle` and `before`."""
    qkv = block.linear(block.norm(x, "norm1")[0], "qkv", saved.qkv)
    heads = _Heads(qkv, block.heads)
    q, k, v = heads.split(qkv)
    weights = heads.softmax(heads.product(q, k.mT, heads.scale), saved.weights.flatten(0, 1))
    heads.merge(heads.product(weights, v), out=saved.mixed)
    branch = block.linear(saved.mixed, "proj")
    factor = block.factor(ATTENTION, first, x)
    if factor is None:
        torch.add(x, branch, out=saved.middle)
    else:
        torch.addcmul(x, branch.to(x.dtype), factor, out=saved.middle)
    return saved.middle, block.linear(block.norm(saved.middle, "norm2")[0], "fc1", saved.before)


def _add(x: Tensor, branch: Tensor, multiplier: Tensor | None) -> Tensor:
    return x + branch if multiplier is None else torch.addcmul(x, branch.to(x.dtype), multiplier)


def _attention(block: _Block, qkv: Tensor) -> Tensor:
    """(s, n, 3c) to (s, n, c)."""
    sequences, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if tokens > _COLUMNS and qkv.dtype == torch.float32:
        q, k, v = qkv.view(sequences, tokens, 3, block.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(sequences, tokens, width)
    heads = _Heads(qkv, block.heads)
    q, k, v = heads.split(qkv)
    return heads.merge(heads.product(heads.softmax(heads.product(q, k.mT, heads.scale)), v))


class _Heads:
    """Where the tokens of each head lie, (s H, n, D) as rows or as the transpose of columns, and products of that."""

    def __init__(self, qkv: Tensor, heads: int) -> None:
        self.sequences, self.tokens, width = qkv.shape
        self.heads, self.width = heads, width // 3 // heads
        self.scale = self.width**-0.5
        self.columns = self.tokens <= _COLUMNS
        self.dtype = torch.promote_types(qkv.dtype, torch.float32) if self.columns else qkv.dtype

    def split(self, x: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
        """(s, n, parts c) to `parts` tensors (s H, n, D)."""
        x = x.view(self.sequences, self.tokens, parts, self.heads, self.width)
        order = (2, 0, 3, 4, 1) if self.columns else (2, 0, 3, 1, 4)
        x = x.permute(order).to(self.dtype, memory_format=torch.contiguous_format).flatten(1, 2)
        return (x.mT if self.columns else x).unbind(0)

    def merge(self, *xs: Tensor, out: Tensor | None = None) -> Tensor:
        """The opposite of `split`."""
        if out is None:
            shape = (self.sequences, self.tokens, len(xs) * self.heads * self.width)
            out = torch.empty(shape, dtype=xs[0].dtype, device=xs[0].device)
        merged = out.view(self.sequences, self.tokens, len(xs), self.heads, self.width)
        for part, x in enumerate(xs):
            merged[:, :, part] = x.unflatten(0, (self.sequences, self.heads)).transpose(1, 2)
        return out

    def product(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """scale a @ b, whose memory is laid out as the heads are."""
        if self.columns:
            a, b = b.mT, a.mT
        result = torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
        return result.mT if self.columns else result

    def softmax(self, scores: Tensor, out: Tensor | None = None) -> Tensor:
        """Over keys; `out` (s H, n, n) in the layout of the heads."""
        axis = 1 if self.columns else 2
        return self.laid_out(torch.softmax(self.laid_out(scores), axis, out=out))

    def softmax_backward(self, dweights: Tensor, weights: Tensor) -> Tensor:
        axis = 1 if self.columns else 2
        dweights, weights = self.laid_out(dweights), self.laid_out(weights)
        return self.laid_out(torch.ops.aten._softmax_backward_data(dweights, weights, axis, weights.dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        """Between rows by columns and the layout of memory, both ways."""
        return x.mT if self.columns else x


def backward(
    dout: Tensor,
    x: Tensor,
    w: TNTInnerWeights,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
    saved: Saved | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(dx, gradients of the weights by name, in float32 or better)."""
    block = _Block(w=w, seed=seed, heads=num_heads, eps=eps, dropout=dropout, drop_path=drop_path)
    exact = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = {
        name: torch.zeros(tensor.shape, dtype=exact, device=x.device)
        for name, tensor in zip(NAMES, w.tensors(), strict=True)
        if tensor is not None
    }
    spare = None
    for first, chunk in _chunks(x):
        rows = slice(first, first + chunk.shape[0])
        if saved is not None:
            part = saved.part(rows)
        else:
            # One set of buffers for all chunks: memory fresh from the system costs more than what is written to it.
            spare = spare or Saved.empty(chunk, w.qkv_weight.dtype, w.fc1_weight.shape[0], num_heads)
            part = spare.part(slice(chunk.shape[0]))
            _fill(block, chunk, first, part)
        dx[rows] = _backward(block, chunk, dout[rows].to(exact), first, part, sums)
    return dx, sums


def _backward(block: _Block, x: Tensor, dout: Tensor, first: int, saved: Saved, sums: dict[str, Tensor]) -> Tensor:
    product = block.w.qkv_weight.dtype
    middle, qkv, weights, mixed, before = saved
    normed1, mean1, rstd1 = block.norm(x, "norm1")
    normed2, mean2, rstd2 = block.norm(middle, "norm2")
    normed1, normed2 = normed1.to(product), normed2.to(product)
    heads = _Heads(qkv, block.heads)
    q, k, v = heads.split(qkv)
    weights = heads.laid_out(weights.flatten(0, 1))
    factor1, factor2 = block.factor(ATTENTION, first, x), block.factor(MLP, first, x)

    dbranch = (dout if factor2 is None else dout * factor2).to(product)
    dhidden = _linear_backward(block, "fc2", dbranch, F.gelu(before), sums)
    dbefore = torch.ops.aten.gelu_backward(dhidden, before)
    dnormed = _linear_backward(block, "fc1", dbefore, normed2, sums)
    dmiddle = dout + _norm_backward(block, "norm2", dnormed, middle, mean2, rstd2, sums)

    dbranch = (dmiddle if factor1 is None else dmiddle * factor1).to(product)
    (dmixed,) = heads.split(_linear_backward(block, "proj", dbranch, mixed, sums), 1)
    dv = heads.product(weights.mT, dmixed)
    dscores = heads.softmax_backward(heads.product(dmixed, v.mT), weights)
    dq, dk = heads.product(dscores, k, heads.scale), heads.product(dscores.mT, q, heads.scale)
    dqkv = heads.merge(dq, dk, dv).to(product)
    dnormed = _linear_backward(block, "qkv", dqkv, normed1, sums)
    return dmiddle + _norm_backward(block, "norm1", dnormed, x, mean1, rstd1, sums)


def _linear_backward(block: _Block, name: str, dy: Tensor, x: Tensor, sums: dict[str, Tensor]) -> Tensor:
    weight = getattr(block.w, f"{name}_weight")
    rows = dy.flatten(0, 1)
    sums[f"{name}_weight"] += rows.t() @ x.flatten(0, 1)
    if f"{name}_bias" in sums:
        sums[f"{name}_bias"] += rows.sum(0, dtype=sums[f"{name}_bias"].dtype)
    return dy @ weight


def _norm_backward(
    block: _Block, name: str, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, sums: dict[str, Tensor]
) -> Tensor:
    weight, bias = getattr(block.w, f"{name}_weight").to(x.dtype), getattr(block.w, f"{name}_bias").to(x.dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(x.dtype), x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    sums[f"{name}_weight"] += dweight
    sums[f"{name}_bias"] += dbias
    return dx
