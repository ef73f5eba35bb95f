"""FAVOR+ kernels on a GPU. Needs torch, triton, numpy and pytest only."""

from __future__ import annotations

import pytest
import torch

from medformer_kernels import orthogonal_features, performer_attention, performer_attention_reference
from tests import launches

pytestmark = [pytest.mark.gpu, launches.performer_forward]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * std).to(dtype).requires_grad_()


def results(function, q, k, v, omega, **kwargs) -> list[torch.Tensor]:
    out = function(q, k, v, omega, **kwargs)
    dout = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


@launches.performer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("width", "features"), [(16, 64), (64, 256), (72, 300), (128, 640), (160, 300), (256, 256)])
@pytest.mark.parametrize(("masked", "eps"), [(False, 0.0), (True, 1e-3)])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, width, features, masked, eps):
    q, k, v = (draw(2, 3, n, width, dtype=dtype) for n in (257, 1000, 1000))
    omega = orthogonal_features(features, width, device="cuda")
    mask = torch.rand(2, 1000, device="cuda") > 0.3 if masked else None
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    kwargs = {"key_padding_mask": mask, "eps": eps}
    expected = results(performer_attention_reference, q64, k64, v64, omega.double(), **kwargs)
    plain = results(performer_attention_reference, q, k, v, omega.to(dtype), **kwargs)
    actual = results(performer_attention, q, k, v, omega, backend="triton", **kwargs)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), actual, plain, expected, strict=True):
        allowed = 2 * (b - c).abs().max() + 2 * torch.finfo(dtype).eps * c.abs().max() + 1e-6
        assert (a - c).abs().max() <= allowed, name


@launches.performer
@pytest.mark.parametrize("std", [1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_whole_volume_of_tokens_stays_finite_in_little_memory(dtype, std):
    q, k, v = (draw(1, 8, 262_144, 64, dtype=dtype, std=std) for _ in range(3))
    omega = orthogonal_features(256, 64, device="cuda")
    tensor = q.numel() * q.element_size()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = performer_attention(q, k, v, omega)
    assert torch.cuda.max_memory_allocated() - before <= tensor + (64 << 20)
    out.backward(torch.ones_like(out))
    for x in (out, q.grad, k.grad, v.grad):
        assert x is not None
        assert x.isfinite().all()


@launches.performer
def test_more_than_65535_heads_run():
    q, k, v = (draw(8193, 8, 33, 16) for _ in range(3))
    omega = orthogonal_features(32, 16, device="cuda")
    out, *gradients = results(performer_attention, q, k, v, omega)
    q, k, v = (x[-1:].detach().requires_grad_() for x in (q, k, v))
    last, *last_gradients = results(performer_attention, q, k, v, omega)
    torch.testing.assert_close(out[-1:], last)
    assert all(x.isfinite().all() for x in gradients + last_gradients)


def test_offsets_beyond_two_billion_elements_are_right():
    tokens = 2**31 // (8 * 64) + 4096
    x = draw(1, 8, tokens, 64)
    omega = orthogonal_features(64, 64, device="cuda")
    with torch.no_grad():
        out = performer_attention(x, x, x, omega)
        tail = performer_attention(x[:, -1:, -1024:], x[:, -1:], x[:, -1:], omega)
    torch.testing.assert_close(out[:, -1:, -1024:], tail, rtol=2e-2, atol=2e-2)


@launches.performer
def test_equal_inputs_give_equal_bits():
    q, k, v = (draw(1, 4, 20_000, 64) for _ in range(3))
    omega = orthogonal_features(256, 64, device="cuda")
    first, second = results(performer_attention, q, k, v, omega), results(performer_attention, q, k, v, omega)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_many_documents_are_as_if_each_were_alone():
    q, k, v = (draw(1, 4, 3000, 64).detach() for _ in range(3))
    omega = orthogonal_features(256, 64, device="cuda")
    ends = [0, 1, 1, 40, 700, 701, 3000]
    out = performer_attention(q, k, v, omega, cu_seqlens=torch.tensor(ends), backend="triton")
    for start, end in ((0, 1), (1, 40), (40, 700), (700, 701), (701, 3000)):
        alone = performer_attention(*(x[:, :, start:end] for x in (q, k, v)), omega, backend="triton")
        torch.testing.assert_close(out[:, :, start:end], alone, rtol=2e-2, atol=2e-2)


def test_runs_inside_a_cuda_graph():
    q, k, v = (draw(1, 4, 1000, 64).detach() for _ in range(3))
    omega = orthogonal_features(256, 64, device="cuda")
    expected = performer_attention(q, k, v, omega)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = performer_attention(q, k, v, omega)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@launches.performer
def test_inductor_compiles_one_graph_for_all_lengths():
    omega = orthogonal_features(256, 64, device="cuda")
    compiled = torch.compile(performer_attention, fullgraph=True, dynamic=True)
    for tokens in (1000, 1777):
        q, k, v = (draw(1, 4, tokens, 64) for _ in range(3))
        for a, b in zip(results(compiled, q, k, v, omega), results(performer_attention, q, k, v, omega), strict=True):
            torch.testing.assert_close(a, b)
