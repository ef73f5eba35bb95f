"""Disentangled attention on a GPU, at sizes and in a dtype that the interpreter does not take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medformer_kernels import disentangled_attention, log_buckets
from tests import launches

pytestmark = [pytest.mark.gpu, launches.disentangled_forward]


def volume(
    grid: tuple[int, int, int], *, heads: int = 2, batch: int = 1, dtype=torch.bfloat16, width: int = 64
) -> dict:
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2]
    call: dict = {n: torch.randn(batch, heads, tokens, width, device="cuda", dtype=dtype) for n in "qkv"}
    tables = [torch.randn(heads, 2 * g - 1, width, device="cuda", dtype=dtype) for g in grid]
    return call | {"grid": grid, "rel_k": tables, "rel_q": [t.clone() for t in tables]}


def run(call: dict, backend: str, dtype: torch.dtype) -> list[Tensor]:
    def leaf(x):
        return x.detach().to(dtype).requires_grad_()

    fresh = {
        name: [leaf(y) for y in x] if isinstance(x, list) else leaf(x) if name in "qkv" or "rel" in name else x
        for name, x in call.items()
    }
    leaves = [y for x in fresh.values() for y in (x if isinstance(x, list) else [x]) if isinstance(y, Tensor)]
    leaves = [y for y in leaves if y.requires_grad]
    out = disentangled_attention(**fresh, backend=backend)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, device="cuda")
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@launches.disentangled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("grid", [(8, 8, 32), (5, 7, 20), (2, 3, 200)], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(grid: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_rule(volume(grid, dtype=dtype), dtype)


@launches.disentangled
@pytest.mark.parametrize("width", [72, 128])
def test_wide_heads_keep_the_rule(width: int) -> None:
    assert_rule(volume((5, 7, 20), width=width), torch.bfloat16)


def assert_rule(call: dict, dtype: torch.dtype) -> None:
    """FlashAttention's: output and gradients at most twice as far from float64 as PyTorch's in the same dtype."""
    exact = run(call, "torch", torch.float64)
    for mine, usual, right in zip(run(call, "triton", dtype), run(call, "torch", dtype), exact, strict=True):
        floor = 1e-5 * right.norm()
        assert (mine.double() - right).norm() <= 2 * (usual.double() - right).norm() + floor


@launches.disentangled
def test_buckets_match_in_float64() -> None:
    torch.manual_seed(0)
    call = {n: torch.randn(1, 2, 1024, 64, device="cuda") for n in "qkv"}
    call |= {name: torch.randn(2, 512, 64, device="cuda") for name in ("rel_k", "rel_q")}
    call["buckets"] = log_buckets(1024, num_buckets=256, max_distance=512).cuda()
    for mine, right in zip(run(call, "triton", torch.float32), run(call, "torch", torch.float64), strict=True):
        assert (mine.double() - right).norm() <= 1e-4 * right.norm()


@launches.disentangled
def test_equal_inputs_give_equal_bits() -> None:
    call = volume((8, 16, 16))
    for one, other in zip(run(call, "triton", torch.bfloat16), run(call, "triton", torch.bfloat16), strict=True):
        assert torch.equal(one, other)


def test_takes_more_heads_than_a_grid_axis_holds() -> None:
    call = volume((1, 2, 4), batch=40_000, heads=2, width=16)
    out = disentangled_attention(**call)
    part = disentangled_attention(**call | {n: call[n][-1:] for n in "qkv"})
    assert torch.equal(out[-1:], part)


@launches.disentangled
def test_memory_stays_linear() -> None:
    call = volume((16, 32, 32), heads=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(call, "triton", torch.bfloat16)
    tokens, columns = 16 * 32 * 32, 80
    assert torch.cuda.max_memory_allocated() - before < tokens * (40 * 64 + 40 * columns)


def test_captures_in_a_cuda_graph() -> None:
    call = volume((4, 8, 16))
    expected = disentangled_attention(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = disentangled_attention(**call)
    graph.replay()
    assert torch.equal(out, expected)


def test_compiles_whole() -> None:
    call = volume((4, 8, 16))
    compiled = torch.compile(disentangled_attention, fullgraph=True)
    torch.testing.assert_close(compiled(**call), disentangled_attention(**call), rtol=2e-2, atol=2e-2)
