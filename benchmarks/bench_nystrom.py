"""Nystrom attention against nystrom-attention, transformers, the two-SDPA composition and exact attention.

Every implementation gets the same q, k, v and, where it has one, the same 33-tap convolution; its output is checked
before it is timed. The peers are modules: their projections are made identities, so that they time attention alone.
Exact attention computes another function (what Nystrom attention estimates) and stands here for scale.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measuring import DEVICE, cpu_peak_memory_mib, floor_ms, peak_memory_mib, training_step
from medformer_kernels import nystrom_attention, nystrom_attention_reference, nystrom_pinv

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HEADS, WIDTH, LANDMARKS, TAPS = 8, 64, 256, 33
LENGTHS = (1024, 4096, 32_768, 262_144) if ON_GPU else (1024, 4096, 16_384)
# Exact attention takes 340 ms at 262,144 tokens on an H200 and seconds at 16,384 on two cores.
EXACT_LIMIT = 262_144 if ON_GPU else 4096
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def medformer(weight: Tensor, tokens: int) -> Attention:
    return lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=LANDMARKS, conv_weight=weight)


def medformer_volume(weight: Tensor, tokens: int) -> Attention:
    """Landmarks of a grid and a 3 x 3 x 3 convolution instead of a sequence's; nobody else has it."""
    side = round(tokens ** (1 / 3))
    if side**3 != tokens:
        pytest.skip(f"{tokens} tokens are no cube")
    taps = weight[:, : 3**3].reshape(HEADS, 3, 3, 3)
    return lambda q, k, v: nystrom_attention(q, k, v, grid=(side,) * 3, landmark_grid=(4, 8, 8), conv_weight=taps)


def composition(weight: Tensor, tokens: int) -> Attention:
    """What the kernel must beat: two scaled-dot-product attentions, batched products, a depthwise convolution."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_landmarks, k_landmarks = (x.unflatten(2, (LANDMARKS, -1)).mean(3) for x in (q, k))
        a = (q_landmarks.float() @ k_landmarks.float().mT * WIDTH**-0.5).softmax(-1)
        values = F.scaled_dot_product_attention(q_landmarks, k, v)
        solved = (nystrom_pinv(a)[0] @ values.float()).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k_landmarks, solved)
        kernel = weight[:, None, :, None].to(v.dtype)
        return out + F.conv2d(v, kernel, padding=(TAPS // 2, 0), groups=HEADS)

    return attention


class _Given(nn.Module):
    """In place of a projection: hands out what the benchmark gave."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor | None:
        return self.value


def nystrom_attention_pypi(weight: Tensor, tokens: int) -> Attention:
    peer = pytest.importorskip("nystrom_attention", reason="pip install nystrom-attention")
    if torch.float32 != DTYPE:
        pytest.skip("nystrom-attention raises in pure bfloat16: its identity matrix is float32")
    width = HEADS * WIDTH
    module = peer.NystromAttention(width, dim_head=WIDTH, heads=HEADS, num_landmarks=LANDMARKS).to(DEVICE, DTYPE)
    module.res_conv.weight = nn.Parameter(weight[:, None, :, None].detach().clone())
    module.to_qkv, module.to_out = _Given(), nn.Identity()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.to_qkv.value = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
        return module(module.to_qkv.value).unflatten(2, (HEADS, WIDTH)).transpose(1, 2)

    return attention


def transformers_nystromformer(weight: Tensor, tokens: int) -> Attention:
    pytest.importorskip("transformers", reason="pip install transformers")
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    if torch.float32 != DTYPE:
        pytest.skip("transformers' Nystromformer raises in pure bfloat16: its identity matrix is float32")
    if tokens % LANDMARKS or tokens == LANDMARKS:
        pytest.skip("transformers needs a length that the landmarks divide")
    config = NystromformerConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_landmarks=LANDMARKS, segment_means_seq_len=tokens,
        conv_kernel_size=TAPS, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = NystromformerSelfAttention(config).to(DEVICE, DTYPE)
    module.conv.weight = nn.Parameter(weight[:, None, :, None].detach().clone())
    parts = [_Given(), _Given(), _Given()]
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        setattr(module, name, part)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for part, x in zip(parts, (q, k, v), strict=True):
            part.value = x.transpose(1, 2).flatten(2)
        out = module(parts[0].value)[0]
        return out.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)

    return attention


def sdpa_exact(weight: Tensor, tokens: int) -> Attention:
    if tokens > EXACT_LIMIT:
        pytest.skip(f"exact attention over {tokens} tokens takes too long here")
    return F.scaled_dot_product_attention


IMPLEMENTATIONS = (
    medformer, medformer_volume, composition, nystrom_attention_pypi, transformers_nystromformer, sdpa_exact,
)  # fmt: skip
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
lengths = pytest.mark.parametrize("tokens", LENGTHS, ids=lambda n: f"N{n}")


def prepare(implementation: Callable[[Tensor, int], Attention], tokens: int) -> tuple[Attention, list[Tensor]]:
    """The implementation, and inputs on which its output was compared with the definition in float64."""
    torch.manual_seed(0)
    weight = torch.randn(HEADS, TAPS, device=DEVICE, dtype=DTYPE) / TAPS
    attention = implementation(weight, tokens)
    check = min(tokens, 4096)
    q, k, v = (torch.randn(1, HEADS, check, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(3))
    exact = [x.double() for x in (q, k, v)]
    if implementation is sdpa_exact:
        expected = F.scaled_dot_product_attention(exact[0], exact[1], exact[2])
    elif implementation is medformer_volume:
        side = round(check ** (1 / 3))
        if side**3 != check:
            pytest.skip(f"{check} tokens are no cube")
        expected = nystrom_attention_reference(
            *exact, grid=(side,) * 3, landmark_grid=(4, 8, 8),
            conv_weight=weight[:, :27].reshape(HEADS, 3, 3, 3).double(),
        )  # fmt: skip
    else:
        expected = nystrom_attention_reference(*exact, num_landmarks=LANDMARKS, conv_weight=weight.double())
    # The peers share the start value of the iteration over the heads: what six steps leave then differs a little.
    shared_start = implementation in (nystrom_attention_pypi, transformers_nystromformer)
    tolerance = 0.06 if torch.bfloat16 == DTYPE else 1e-3 if shared_start else 1e-5
    with torch.no_grad():
        out = implementation(weight, check)(q, k, v).double()
    assert (out - expected).norm() <= tolerance * expected.norm()
    return attention, [torch.randn(1, HEADS, tokens, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(3)]


def floor(tokens: int, products: int, exponentials: int, tensors: int) -> float:
    """ms of this machine for so many products with the landmarks, exponentials of each, and tensors moved."""
    rows = HEADS * tokens
    return floor_ms(
        DTYPE, flop=products * 2 * rows * LANDMARKS * WIDTH, moved=tensors * rows * WIDTH * DTYPE.itemsize,
        exponentials=exponentials * rows * LANDMARKS,
    )  # fmt: skip


def shape(tokens: int) -> str:
    return f"B1 H{HEADS} N{tokens} D{WIDTH} L{LANDMARKS} conv{TAPS} {str(DTYPE)[6:]}"


@lengths
@implementations
def bench_nystrom_forward(timed, implementation, tokens):
    attention, inputs = prepare(implementation, tokens)

    timed(torch.no_grad()(lambda: attention(*inputs)), floor_ms=floor(tokens, 4, 2, 6), shape=shape(tokens))


@lengths
@implementations
def bench_nystrom_step(timed, implementation, tokens):
    """Forward and backward."""
    attention, inputs = prepare(implementation, tokens)
    inputs = [x.requires_grad_() for x in inputs]
    dout = torch.randn_like(inputs[2])

    timed(training_step(attention, inputs, dout), floor_ms=floor(tokens, 18, 6, 21), shape=shape(tokens))


_MEMORY = """
import sys
sys.path.insert(0, {benchmarks!r})
import torch
import bench_nystrom as bench
torch.manual_seed(0)
weight = torch.randn(bench.HEADS, bench.TAPS) / bench.TAPS
attention = bench.{implementation}(weight, {tokens})
inputs = [torch.randn(1, bench.HEADS, {tokens}, bench.WIDTH, requires_grad=True) for _ in range(3)]
dout = torch.randn_like(inputs[2])
# measure
attention(*inputs).backward(dout)
"""


@lengths
@implementations
def bench_nystrom_memory(timed, implementation, tokens):
    """Peak memory of a forward and backward pass beyond the inputs, and that beyond outputs and gradients too."""
    attention, inputs = prepare(implementation, tokens)
    inputs = [x.requires_grad_() for x in inputs]
    dout = torch.randn_like(inputs[2])

    def step() -> None:
        attention(*inputs).backward(dout)

    if ON_GPU:
        peak = peak_memory_mib(step)
    else:
        script = _MEMORY.format(
            benchmarks=str(Path(__file__).parent), implementation=implementation.__name__, tokens=tokens
        )
        peak = cpu_peak_memory_mib(script)
    kept = 4 * inputs[0].numel() * DTYPE.itemsize / 2**20  # out, dq, dk, dv
    timed(step, shape=shape(tokens), peak_mib=round(peak, 1), beyond_outputs_mib=round(peak - kept, 1))
