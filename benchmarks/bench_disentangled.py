"""Disentangled attention against transformers' DeBERTa-v2, FlashDeBERTa, FlexAttention, SDPA with a bias and without.

c2c + c2p + p2c. On `buckets` (DeBERTa-v2's 256 logarithmic buckets of 512 distances) all implementations compute the
same function, checked before it is timed; on `grid` (tables by axis) ours and SDPA with a dense bias do. Exact
attention without a bias is another function and stands here as the lower bound. Peers get q, k, v and projected tables:
their projections are replaced by what they would give.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measuring import DEVICE, cpu_peak_memory_mib, floor_ms, peak_memory_mib, training_step
from medformer_kernels import disentangled_attention, log_buckets
from medformer_kernels.disentangled.arguments import prepare
from medformer_kernels.disentangled.tables import operands
from medformer_kernels.disentangled.wide import wide

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HEADS, WIDTH, BUCKETS, DISTANCE = 8, 64, 256, 512
SCALE = (3 * WIDTH) ** -0.5
GRIDS = {1024: (4, 16, 16), 2048: (8, 16, 16), 4096: (16, 16, 16), 32_768: (32, 32, 32)}
LENGTHS = (2048, 4096, 32_768) if ON_GPU else (1024, 2048, 4096)
# An N x N bias of 8 heads takes 17 GB at 32,768 tokens.
DENSE_LIMIT = 4096
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Positions:
    """The tables of one benchmark, as leaves that take gradients."""

    def __init__(self, tokens: int, dtype: torch.dtype = DTYPE) -> None:
        torch.manual_seed(1)
        self.grid = GRIDS[tokens]
        self.buckets = log_buckets(tokens, num_buckets=BUCKETS, max_distance=DISTANCE).to(DEVICE)
        options: dict[str, Any] = {"device": DEVICE, "dtype": dtype, "requires_grad": True}
        self.key, self.query = (torch.randn(HEADS, 2 * BUCKETS, WIDTH, **options) for _ in range(2))
        self.grid_key, self.grid_query = (
            [torch.randn(HEADS, 2 * g - 1, WIDTH, **options) for g in self.grid] for _ in range(2)
        )

    def leaves(self) -> list[Tensor]:
        return [self.key, self.query, *self.grid_key, *self.grid_query]


def buckets_medformer(at: Positions) -> Attention:
    return lambda q, k, v: disentangled_attention(q, k, v, buckets=at.buckets, rel_k=at.key, rel_q=at.query)


def grid_medformer(at: Positions) -> Attention:
    return lambda q, k, v: disentangled_attention(q, k, v, grid=at.grid, rel_k=at.grid_key, rel_q=at.grid_query)


def grid_medformer_wide(at: Positions) -> Attention:
    """The same through scaled_dot_product_attention over wider queries and keys."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = prepare(
            "bench", q, k, v, grid=at.grid, rel_k=at.grid_key, rel_q=at.grid_query, pos_q=None, pos_k=None,
            buckets=None, terms=("c2c", "c2p", "p2c"),
        )[0]  # fmt: skip
        x = operands(call.q, call.k, call.weights, **call.positions)
        return wide(x, v, call.grid, scale=call.scale, causal=False, key_padding_mask=None)

    return attention


def grid_sdpa_dense_bias(at: Positions) -> Attention:
    """Scores of every pair, gathered by axis, in front of scaled_dot_product_attention."""
    _limit(at)
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(g) for g in at.grid), indexing="ij")).flatten(1).to(DEVICE)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.zeros((), device=q.device, dtype=q.dtype)
        for c, g, key, query in zip(coordinates, at.grid, at.grid_key, at.grid_query, strict=True):
            index = (c[:, None] - c + g - 1).expand(*q.shape[:2], -1, -1)
            bias = bias + (q @ key.mT).gather(3, index) + (k @ query.mT).gather(3, index.mT).mT
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias * SCALE, scale=SCALE)

    return attention


def buckets_sdpa_dense_bias(at: Positions) -> Attention:
    _limit(at)
    i = torch.arange(len(at.buckets) // 2 + 1, device=DEVICE)
    index = at.buckets[i[:, None] - i + len(i) - 1]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = index.expand(*q.shape[:2], -1, -1)
        bias = (q @ at.key.mT).gather(3, pairs) + (k @ at.query.mT).gather(3, pairs.mT).mT
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias * SCALE, scale=SCALE)

    return attention


class _Given(nn.Module):
    """In place of a projection: hands out what the benchmark gave."""

    def __init__(self, value: Tensor | None = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor | None:
        return self.value


def buckets_transformers(at: Positions) -> Attention:
    """DebertaV2's DisentangledSelfAttention, eager (transformers has no other)."""
    pytest.importorskip("transformers", reason="pip install transformers")
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    _limit(at)
    config = DebertaV2Config(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, relative_attention=True, position_buckets=BUCKETS,
        max_relative_positions=DISTANCE, pos_att_type=["c2p", "p2c"], share_att_key=False, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = DisentangledSelfAttention(config).to(DEVICE, DTYPE)
    parts = [_Given() for _ in range(5)]
    for name, part in zip(("query", "key", "value", "pos_key", "pos_query"), parts, strict=True):
        setattr(module, f"{name}_proj", part)
    unused = torch.zeros(2 * BUCKETS, 1, device=DEVICE, dtype=DTYPE)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = (x.transpose(0, 1).unsqueeze(0) for x in (at.key, at.query))
        for part, x in zip(parts, (*(x.transpose(1, 2) for x in (q, k, v)), *tables), strict=True):
            part.value = x.flatten(2)
        every = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        out = module(parts[0].value, every, rel_embeddings=unused)[0]
        return out.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)

    return attention


def buckets_flashdeberta(at: Positions) -> Attention:
    if not ON_GPU:
        pytest.skip("FlashDeBERTa's kernels need a GPU")
    ops = pytest.importorskip("flashdeberta.ops.flash_attention", reason="pip install flashdeberta")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = torch.full((q.shape[0],), q.shape[2], device=q.device)
        return ops.flash_attention_with_disentangled(
            q, k, v, lengths, q @ at.key.mT, k @ at.query.mT, False, SCALE, BUCKETS, DISTANCE
        )

    return attention


def buckets_flex_attention(at: Positions) -> Attention:
    """FlexAttention whose score function reads the two tables; compiling it takes a minute on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    half = len(at.buckets) // 2

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, u = q @ at.key.mT * SCALE, k @ at.query.mT * SCALE

        def score(s, b, h, i, j):
            bucket = at.buckets[i - j + half]
            return s + t[b, h, i, bucket] + u[b, h, j, bucket]

        return compiled(q, k, v, score_mod=score, scale=SCALE)

    return attention


def without_bias(at: Positions) -> Attention:
    """The lower bound: content only."""
    return F.scaled_dot_product_attention


def _limit(at: Positions) -> None:
    tokens = at.grid[0] * at.grid[1] * at.grid[2]
    if tokens > DENSE_LIMIT:
        pytest.skip(f"an N x N bias at {tokens} tokens does not fit")


def _skip_without_backward(implementation: Callable[[Positions], Attention]) -> None:
    if implementation is buckets_flex_attention and not ON_GPU:
        pytest.skip("FlexAttention has no backward on a CPU")


IMPLEMENTATIONS = (
    buckets_medformer, buckets_transformers, buckets_sdpa_dense_bias, buckets_flashdeberta, buckets_flex_attention,
    grid_medformer, grid_medformer_wide, grid_sdpa_dense_bias, without_bias,
)  # fmt: skip
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
lengths = pytest.mark.parametrize("tokens", LENGTHS, ids=lambda n: f"N{n}")


def prepared(
    implementation: Callable[[Positions], Attention], tokens: int
) -> tuple[Attention, list[Tensor], Positions]:
    """The implementation, and inputs on which its output agrees with ours in float64 (1024 or 2048 tokens)."""
    check = min(tokens, LENGTHS[0])
    at = Positions(check)
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, check, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    if implementation is not without_bias:
        exact = Positions(check, torch.float64)
        with torch.no_grad():
            for one, other in zip(exact.leaves(), at.leaves(), strict=True):
                one.copy_(other)
            right = (grid_medformer if implementation.__name__.startswith("grid") else buckets_medformer)(exact)
            expected = right(*(x.double() for x in inputs))
            out = implementation(at)(*inputs).double()
        assert (out - expected).norm() <= (0.03 if torch.bfloat16 == DTYPE else 1e-5) * expected.norm()
    at = Positions(tokens)
    inputs = [torch.randn(1, HEADS, tokens, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    return implementation(at), inputs, at


def floor(tokens: int, products: int) -> float:
    """Products of the scores and values alone on this machine, ms."""
    moved = 4 * HEADS * tokens * WIDTH * DTYPE.itemsize
    return floor_ms(DTYPE, flop=products * 2 * HEADS * tokens * tokens * WIDTH, moved=moved)


def shape(tokens: int) -> str:
    return f"B1 H{HEADS} N{tokens} {'x'.join(map(str, GRIDS[tokens]))} D{WIDTH} {str(DTYPE)[6:]}"


@lengths
@implementations
def bench_disentangled_forward(timed, implementation, tokens):
    attention, inputs, _ = prepared(implementation, tokens)

    timed(torch.no_grad()(lambda: attention(*inputs)), floor_ms=floor(tokens, 2), shape=shape(tokens))


@lengths
@implementations
def bench_disentangled_step(timed, implementation, tokens):
    """Forward and backward, to q, k, v and the tables."""
    _skip_without_backward(implementation)
    attention, inputs, at = prepared(implementation, tokens)
    inputs = [x.requires_grad_() for x in inputs]
    dout = torch.randn_like(inputs[2])

    timed(training_step(attention, inputs, dout, *at.leaves()), floor_ms=floor(tokens, 9), shape=shape(tokens))


_MEMORY = """
import sys
sys.path.insert(0, {benchmarks!r})
import torch
import bench_disentangled as bench
torch.manual_seed(0)
at = bench.Positions({tokens})
attention = bench.{implementation}(at)
inputs = [torch.randn(1, bench.HEADS, {tokens}, bench.WIDTH, requires_grad=True) for _ in range(3)]
dout = torch.randn_like(inputs[2])
# measure
{measured}
"""


@lengths
@implementations
@pytest.mark.parametrize("direction", ["forward", "step"])
def bench_disentangled_memory(timed, implementation, tokens, direction):
    """Peak memory beyond the inputs (in extra_info)."""
    _skip_without_backward(implementation)  # and forward alone would count the compiler
    attention, inputs, _ = prepared(implementation, tokens)
    inputs = [x.requires_grad_() for x in inputs]
    dout = torch.randn_like(inputs[2])

    def run() -> None:
        if direction == "step":
            attention(*inputs).backward(dout)
            return
        with torch.no_grad():
            attention(*inputs)

    if ON_GPU:
        peak = peak_memory_mib(run)
    else:
        forward = "with torch.no_grad():\n    attention(*inputs)"
        script = _MEMORY.format(
            benchmarks=str(Path(__file__).parent), implementation=implementation.__name__, tokens=tokens,
            measured=forward if direction == "forward" else "attention(*inputs).backward(dout)",
        )  # fmt: skip
        peak = cpu_peak_memory_mib(script)
    timed(run, shape=shape(tokens), peak_mib=round(peak, 1))
