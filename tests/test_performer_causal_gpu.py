"""Causal FAVOR+ in its Triton kernels on a GPU. Needs torch, numpy and pytest only."""

from __future__ import annotations

import pytest
import torch

from medformer_kernels import orthogonal_features, performer_attention, performer_attention_reference
from medformer_kernels.performer.arguments import without_kernel
from tests import launches

pytestmark = [pytest.mark.gpu, launches.causal_forward]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * std).to(dtype).requires_grad_()


def results(function, q, k, v, omega, **kwargs) -> list[torch.Tensor]:
    out = function(q, k, v, omega, causal=True, **kwargs)
    dout = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


@launches.causal
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("masked", "width"), [(False, 64), (True, 64), (True, 128), (False, 200)])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, masked, width):
    q, k, v = (draw(2, 2, 1500, width, dtype=dtype) for _ in range(3))
    omega = orthogonal_features(256, width, device="cuda")
    if missing := without_kernel(q, v, omega, True, "softmax"):
        pytest.skip(f"no kernel for {missing}")
    mask = torch.rand(2, 1500, device="cuda") > 0.3 if masked else None
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = results(performer_attention_reference, *exact, omega.double(), key_padding_mask=mask)
    plain = results(performer_attention_reference, q, k, v, omega.to(dtype), key_padding_mask=mask)
    actual = results(performer_attention, q, k, v, omega, key_padding_mask=mask, backend="triton")
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), actual, plain, expected, strict=True):
        allowed = 2 * (b - c).abs().max() + 2 * torch.finfo(dtype).eps * c.abs().max() + 1e-6
        assert (a - c).abs().max() <= allowed, name


@launches.causal
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_whole_volume_of_tokens_stays_finite_in_little_memory(std):
    q, k, v = (draw(1, 8, 262_144, 64, std=std) for _ in range(3))
    omega = orthogonal_features(256, 64, device="cuda")
    tensor = q.numel() * q.element_size()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = performer_attention(q, k, v, omega, causal=True)
    assert torch.cuda.max_memory_allocated() - before <= 2 * tensor + (128 << 20)  # out, and the states of the slices
    out.backward(torch.ones_like(out))
    for x in (out, q.grad, k.grad, v.grad):
        assert x is not None
        assert x.isfinite().all()


def test_documents_run_side_by_side_and_a_captured_graph_replays():
    q, k, v = (draw(1, 2, 3000, 64).detach() for _ in range(3))
    omega = orthogonal_features(128, 64, device="cuda")
    ends = torch.tensor([0, 100, 100, 1700, 3000])
    out = performer_attention(q, k, v, omega, causal=True, cu_seqlens=ends, backend="triton")
    for start, end in ((0, 100), (100, 1700), (1700, 3000)):
        alone = performer_attention(*(x[:, :, start:end] for x in (q, k, v)), omega, causal=True, backend="triton")
        torch.testing.assert_close(out[:, :, start:end], alone, rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    expected = performer_attention(q, k, v, omega, causal=True, backend="triton")
    with torch.cuda.graph(graph):
        captured = performer_attention(q, k, v, omega, causal=True, backend="triton")
    graph.replay()
    assert torch.equal(captured, expected)
