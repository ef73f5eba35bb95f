"""The inner block in plain PyTorch, a few hundred sequences at a time, so that everything between its two ends stays in
the cache. Forward keeps two tensors of the size of x for backward (`Kept`), which computes the rest of a chunk again:
memory fresh from the system costs more than the arithmetic.

Attention over so few and so narrow tokens is a question of layout. Tokens of one head are either rows (n, D) or
columns (D, n): with columns the products of up to `_COLUMNS` tokens are up to three times as fast in float32, and so
is the softmax, which then runs along them side by side. Longer sequences take PyTorch's fused attention forward.
16-bit inputs keep LayerNorm, softmax and the residual in float32, and all of attention too where columns are faster.
Measured with `benchmarks/bench_tnt.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels._linear import linear
from medformer_kernels._products import product
from medformer_kernels.tnt.dropping import ATTENTION, MLP, factor
from medformer_kernels.tnt.weights import NAMES, TNTInnerWeights

__all__ = ["Kept", "backward", "forward"]

# Up to so many tokens a head is laid out in columns.
_COLUMNS = 32
# Numbers of x in a chunk, for each thread; twice that where there are threads, as every operation has to wake them.
_CHUNK = 1 << 17


class Kept(NamedTuple):
    """What forward keeps for backward: (S, n, c) each."""

    middle: Tensor
    """Between attention and MLP, in float32 or better."""
    mixed: Tensor
    """In front of the projection."""

    @classmethod
    def empty(cls, x: Tensor, product: torch.dtype) -> Kept:
        exact = torch.promote_types(x.dtype, torch.float32)
        return cls(*(x.new_empty(x.shape, dtype=dtype) for dtype in (exact, product)))


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

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self.w, f"{name}_weight"), getattr(self.w, f"{name}_bias")
        return linear(x.to(weight.dtype), weight, bias)

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
    kept: Kept | None,
) -> Tensor:
    """See `reference.reference`; fills `kept` where there is one."""
    block = _Block(w=w, seed=seed, heads=num_heads, eps=eps, dropout=dropout, drop_path=drop_path)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for first, chunk in _chunks(x):
        rows = slice(first, first + chunk.shape[0])
        mixed = _attention(block, block.linear(block.norm(chunk, "norm1")[0], "qkv"))
        middle = torch.empty_like(chunk) if kept is None else kept.middle[rows]
        _add(chunk, block.linear(mixed, "proj"), block.factor(ATTENTION, first, chunk), out=middle)
        if kept is not None:
            kept.mixed[rows] = mixed
        branch = block.linear(F.gelu(block.linear(block.norm(middle, "norm2")[0], "fc1")), "fc2")
        _add(middle, branch, block.factor(MLP, first, chunk), out=out[rows])
    return out


def _chunks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    exact = torch.promote_types(x.dtype, torch.float32)
    threads = torch.get_num_threads()
    count = max(1, round(x.numel() / (_CHUNK * threads * min(2, threads))))  # even: no short one at the end
    length = max(1, -(-x.shape[0] // count))
    for first in range(0, x.shape[0], length):
        yield first, x[first : first + length].to(exact).contiguous()


def _add(x: Tensor, branch: Tensor, multiplier: Tensor | None, *, out: Tensor) -> None:
    """out = x + multiplier branch."""
    torch.add(x, branch if multiplier is None else branch * multiplier, out=out)


def _attention(block: _Block, qkv: Tensor) -> Tensor:
    """(s, n, 3c) to (s, n, c)."""
    sequences, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if tokens > _COLUMNS and qkv.dtype == torch.float32:
        q, k, v = qkv.view(sequences, tokens, 3, block.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(sequences, tokens, width)
    heads = _Heads(qkv, block.heads)
    q, k, v = heads.split(qkv)
    return heads.merge(heads.product(heads.weights(q, k), v))


class _Heads:
    """The tokens of each head, (s H, n, D) as rows or as the transpose of columns, and products of that."""

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

    def merge(self, *xs: Tensor) -> Tensor:
        """The opposite of `split`."""
        shape = (self.sequences, self.tokens, len(xs), self.heads, self.width)
        merged = torch.empty(shape, dtype=xs[0].dtype, device=xs[0].device)
        for part, x in enumerate(xs):
            merged[:, :, part] = x.unflatten(0, (self.sequences, self.heads)).transpose(1, 2)
        return merged.flatten(2)

    def product(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """scale a @ b, whose memory is laid out as the heads are."""
        if self.columns:
            a, b = b.mT, a.mT
        result = torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
        return result.mT if self.columns else result

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) over keys."""
        scores = self.laid_out(self.product(q, k.mT, self.scale))
        return self.laid_out(torch.softmax(scores, 1 if self.columns else 2))

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
    kept: Kept,
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
    for first, chunk in _chunks(x):
        rows = slice(first, first + chunk.shape[0])
        part = Kept(kept.middle[rows], kept.mixed[rows])
        _backward(block, chunk, dout[rows].to(exact), first, part, sums, dx[rows])
    return dx, sums


def _backward(
    block: _Block, x: Tensor, dout: Tensor, first: int, kept: Kept, sums: dict[str, Tensor], dx: Tensor
) -> None:
    """Fills dx and adds to `sums`."""
    low = block.w.qkv_weight.dtype
    middle, mixed = kept
    factor1, factor2 = block.factor(ATTENTION, first, x), block.factor(MLP, first, x)

    normed, mean, rstd = block.norm(middle, "norm2")
    normed = normed.to(low)
    before = block.linear(normed, "fc1")
    dbranch = (dout if factor2 is None else dout * factor2).to(low)
    dhidden = _linear_backward(block, "fc2", dbranch, F.gelu(before), sums)
    dbefore = torch.ops.aten.gelu_backward(dhidden, before)
    dnormed = _linear_backward(block, "fc1", dbefore, normed, sums)
    dmiddle = dout + _norm_backward(block, "norm2", dnormed, middle, mean, rstd, sums)

    normed, mean, rstd = block.norm(x, "norm1")
    normed = normed.to(low)
    qkv = block.linear(normed, "qkv")
    heads = _Heads(qkv, block.heads)
    q, k, v = heads.split(qkv)
    weights = heads.weights(q, k)
    dbranch = (dmiddle if factor1 is None else dmiddle * factor1).to(low)
    (dmixed,) = heads.split(_linear_backward(block, "proj", dbranch, mixed, sums), 1)
    dv = heads.product(weights.mT, dmixed)
    dscores = heads.softmax_backward(heads.product(dmixed, v.mT), weights)
    dq, dk = heads.product(dscores, k, heads.scale), heads.product(dscores.mT, q, heads.scale)
    dqkv = heads.merge(dq, dk, dv).to(low)
    dnormed = _linear_backward(block, "qkv", dqkv, normed, sums)
    torch.add(dmiddle, _norm_backward(block, "norm1", dnormed, x, mean, rstd, sums), out=dx)


def _linear_backward(block: _Block, name: str, dy: Tensor, x: Tensor, sums: dict[str, Tensor]) -> Tensor:
    weight = getattr(block.w, f"{name}_weight")
    dy_rows = dy.flatten(0, 1)
    sums[f"{name}_weight"] += product(dy_rows.t(), x.flatten(0, 1))
    if f"{name}_bias" in sums:
        sums[f"{name}_bias"] += dy_rows.sum(0, dtype=sums[f"{name}_bias"].dtype)
    return product(dy_rows, weight).view(x.shape)


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
