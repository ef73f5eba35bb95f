"""The inner block in plain PyTorch, a few hundred sequences at a time, so that everything between its two ends stays in
the cache; backward computes each chunk again.

Attention over so few and so narrow tokens is a question of layout. Tokens of one head lie either as rows (n, D) or as
columns (D, n): with columns the products of up to `_COLUMNS` tokens are up to three times as fast in float32, and so
is the softmax, which then runs along them side by side. Longer sequences take PyTorch's fused attention forward.
16-bit inputs keep LayerNorm, softmax and the residual in float32, and all of attention too where columns are faster.
Measured with `benchmarks/bench_tnt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medformer_kernels.tnt.dropping import ATTENTION, MLP, factor
from medformer_kernels.tnt.weights import NAMES, TNTInnerWeights

__all__ = ["backward", "forward"]

# Up to so many tokens a head is laid out in columns.
_COLUMNS = 32
# Numbers of x in a chunk, for each thread.
_CHUNK = 1 << 17


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
        weight = getattr(self.w, f"{name}_weight")
        return F.linear(x.to(weight.dtype), weight, getattr(self.w, f"{name}_bias"))

    def norm(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = getattr(self.w, f"{name}_weight").to(x.dtype), getattr(self.w, f"{name}_bias").to(x.dtype)
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)


def forward(
    x: Tensor, w: TNTInnerWeights, seed: Tensor | None, num_heads: int, eps: float, dropout: float, drop_path: float
) -> Tensor:
    """See `reference.reference`."""
    block = _Block(w=w, seed=seed, heads=num_heads, eps=eps, dropout=dropout, drop_path=drop_path)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for first, chunk in _chunks(x):
        out[first : first + chunk.shape[0]] = _forward(block, chunk, first)
    return out


def _chunks(x: Tensor) -> list[tuple[int, Tensor]]:
    exact = torch.promote_types(x.dtype, torch.float32)
    length = max(1, _CHUNK * torch.get_num_threads() // max(1, x.shape[1] * x.shape[2]))
    return [(first, x[first : first + length].to(exact).contiguous()) for first in range(0, x.shape[0], length)]


def _forward(block: _Block, x: Tensor, first: int) -> Tensor:
    qkv = block.linear(block.norm(x, "norm1")[0], "qkv")
    x = _add(x, block.linear(_attention(block, qkv), "proj"), block.factor(ATTENTION, first, x))
    hidden = F.gelu(block.linear(block.norm(x, "norm2")[0], "fc1"))
    return _add(x, block.linear(hidden, "fc2"), block.factor(MLP, first, x))


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
    return heads.merge(heads.product(heads.softmax(heads.product(q, k.mT)), v))


class _Heads:
    """Where the tokens of each head lie, (s H, n, D) as rows or as the transpose of columns, and products of that."""

    def __init__(self, qkv: Tensor, heads: int) -> None:
        self.sequences, self.tokens, width = qkv.shape
        self.heads, self.width = heads, width // 3 // heads
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
        merged = torch.empty(
            (self.sequences, self.tokens, len(xs), self.heads, self.width), dtype=xs[0].dtype, device=xs[0].device
        )
        for part, x in enumerate(xs):
            merged[:, :, part] = x.unflatten(0, (self.sequences, self.heads)).transpose(1, 2)
        return merged.flatten(2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, whose memory is laid out as the heads are."""
        return torch.bmm(b.mT, a.mT).mT if self.columns else torch.bmm(a, b)

    def softmax(self, scores: Tensor) -> Tensor:
        scores = scores * self.width**-0.5
        return scores.mT.softmax(1).mT if self.columns else scores.softmax(2)

    def softmax_backward(self, dweights: Tensor, weights: Tensor) -> Tensor:
        if self.columns:
            dscores = torch.ops.aten._softmax_backward_data(dweights.mT, weights.mT, 1, weights.dtype).mT
        else:
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, 2, weights.dtype)
        return dscores * self.width**-0.5


def backward(
    dout: Tensor,
    x: Tensor,
    w: TNTInnerWeights,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout: float,
    drop_path: float,
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
        dx[rows] = _backward(block, chunk, dout[rows].to(exact), first, sums)
    return dx, sums


def _backward(block: _Block, x: Tensor, dout: Tensor, first: int, sums: dict[str, Tensor]) -> Tensor:
    product = block.w.qkv_weight.dtype
    normed1, mean1, rstd1 = block.norm(x, "norm1")
    normed1 = normed1.to(product)
    qkv = block.linear(normed1, "qkv")
    heads = _Heads(qkv, block.heads)
    q, k, v = heads.split(qkv)
    weights = heads.softmax(heads.product(q, k.mT))
    mixed = heads.merge(heads.product(weights, v)).to(product)
    factor1, factor2 = block.factor(ATTENTION, first, x), block.factor(MLP, first, x)
    middle = _add(x, block.linear(mixed, "proj"), factor1)
    normed2, mean2, rstd2 = block.norm(middle, "norm2")
    normed2 = normed2.to(product)
    before = block.linear(normed2, "fc1")

    dbranch = (dout if factor2 is None else dout * factor2).to(product)
    dhidden = _linear_backward(block, "fc2", dbranch, F.gelu(before), sums)
    dbefore = torch.ops.aten.gelu_backward(dhidden, before)
    dnormed = _linear_backward(block, "fc1", dbefore, normed2, sums)
    dmiddle = dout + _norm_backward(block, "norm2", dnormed, middle, mean2, rstd2, sums)

    dbranch = (dmiddle if factor1 is None else dmiddle * factor1).to(product)
    (dmixed,) = heads.split(_linear_backward(block, "proj", dbranch, mixed, sums), 1)
    dv = heads.product(weights.mT, dmixed)
    dscores = heads.softmax_backward(heads.product(dmixed, v.mT), weights)
    dqkv = heads.merge(heads.product(dscores, k), heads.product(dscores.mT, q), dv).to(product)
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
