"""A 12-layer, 384-wide Performer over whole volumes: time and memory by tokens.

    pytest benchmarks/bench_backbones.py --benchmark-only

On a CPU forward passes in float32 up to 128^3 (32,768 tokens; 20 s and 0.7 GiB); on a GPU under bfloat16 autocast,
forward and backward up to 256^3 (262,144 tokens), without checkpointing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from measuring import DEVICE, cpu_peak_memory_mib, environment, peak_memory_mib

medformer = pytest.importorskip("medformer", reason="medformer's own dependencies", exc_type=ImportError)

ON_GPU = DEVICE.type == "cuda"
SIZES = (128, 192, 256) if ON_GPU else (64, 96, 128)
sizes = pytest.mark.parametrize("size", SIZES)


def prepare(size: int, attention: str = "performer") -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    model = medformer.small_3d(attention=attention).to(DEVICE)
    return model, torch.randn(1, 1, size, size, size, device=DEVICE)


def forward(model: torch.nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
        return model(x)


def step(model: torch.nn.Module, x: Tensor) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(x).square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


@sizes
def bench_backbones_forward(benchmark, size):
    """One pass; the memory is what it takes beyond weights and input."""
    model, x = prepare(size)
    if ON_GPU:
        peak = peak_memory_mib(lambda: forward(model, x))
    else:
        peak = cpu_peak_memory_mib(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import bench_backbones as b\nmodel, x = b.prepare({size})\n# measure\nb.forward(model, x)\n"
        )
    tokens = torch.Size(model.grid_of(x.shape[2:])).numel()
    benchmark.extra_info.update(environment() | {"shape": f"{size}^3, {tokens} tokens", "peak_mib": round(peak, 1)})
    if ON_GPU:
        benchmark(lambda: (forward(model, x), torch.cuda.synchronize()))
    else:  # seconds a pass: few rounds
        benchmark.pedantic(forward, args=(model, x), rounds=3 if size < 128 else 1)


@pytest.mark.skipif(not ON_GPU, reason="a training step of this model over 32,768 tokens and more belongs on a GPU")
@sizes
def bench_backbones_step(timed, size):
    """Forward and backward at batch 1, no checkpointing."""
    model, x = prepare(size)
    tokens = torch.Size(model.grid_of(x.shape[2:])).numel()
    timed(lambda: step(model.train(), x), shape=f"{size}^3, {tokens} tokens")
