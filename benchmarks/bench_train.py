"""One DINO step of the trainer on any backbone: FAVOR+ over overlapping patches against plain attention.

All implementations take the same two global views of one scan, the same head, loss, teacher, clipping and AdamW, and
have 16^3 = 4096 tokens at 64^3 voxels (patches every 4 voxels; those of MONAI do not overlap). Before a step is timed
its loss is checked to start at ln K. Memory is the growth of a fresh process over three steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import medformer
import methods
import settings
from dino import Dino, DinoConfig
from measuring import DEVICE, cpu_peak_memory_mib
from optim import OptimConfig, clip_per_tensor, make_optimiser
from views import Plan, ViewsConfig, draw, render

ON_GPU = DEVICE.type == "cuda"
SIDE = 128 if ON_GPU else 64
WIDTH, DEPTH, HEADS, SCANS = (384, 12, 6, 4) if ON_GPU else (192, 4, 3, 1)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PROTOTYPES = 1024
_SETUP = "import sys; sys.path[:0] = ['ssl', 'kernels', 'benchmarks', '.']; import torch; import bench_train as b\n"


class MonaiBackbone(nn.Module):
    """MONAI's ViT with a class token, which it attends to with plain softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        from monai.networks.nets.vit import ViT  # pyright: ignore[reportMissingImports]

        vit: Any = ViT(
            1, (SIDE,) * 3, (4,) * 3, hidden_size=WIDTH, mlp_dim=4 * WIDTH, num_layers=DEPTH, num_heads=HEADS,
            classification=True, num_classes=2, qkv_bias=True,
        )  # fmt: skip
        vit.classification_head = nn.Identity()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)[0]


def medformer_performer() -> nn.Module:
    return medformer.tiny_3d(width=WIDTH, depth=DEPTH, heads=HEADS)


def medformer_softmax() -> nn.Module:
    """The same backbone with `torch.nn.functional.scaled_dot_product_attention`."""
    return medformer.tiny_3d(width=WIDTH, depth=DEPTH, heads=HEADS, attention="softmax")


def monai_vit() -> nn.Module:
    pytest.importorskip("monai", reason="pip install --no-deps monai")
    return MonaiBackbone()


IMPLEMENTATIONS = (medformer_performer, medformer_softmax, monai_vit)


def stepping(implementation: Callable[[], nn.Module]) -> Callable[[], float]:
    """A function that takes one whole step and returns its loss."""
    torch.manual_seed(0)
    config = DinoConfig(prototypes=PROTOTYPES, freeze_last=0)
    method: Any = Dino(implementation(), WIDTH, config, 1000).to(DEVICE).train()
    optimiser = make_optimiser(method.student, OptimConfig())
    views = [torch.randn(2 * SCANS, 1, SIDE, SIDE, SIDE, device=DEVICE)]
    method.look(views)
    method.start()

    def step() -> float:
        with torch.autocast(DEVICE.type, DTYPE, enabled=ON_GPU):
            loss, _ = method.loss(method.student, views, 1)
        loss.backward()
        method.before_step(1)
        clip_per_tensor(method.student.parameters(), 3.0)
        optimiser.step()
        method.after_step(1)
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
def bench_dino_step(timed, implementation: Callable[[], nn.Module]) -> None:
    step = stepping(implementation)
    first = step()
    # ln 1024 = 6.93; the student's fresh answers differ a little from the teacher's.
    assert abs(first - 6.93) < 0.3, f"{implementation.__name__}: the loss starts at {first}"
    timed(
        step, side=SIDE, tokens=(SIDE // 4) ** 3, scans=SCANS, width=WIDTH, depth=DEPTH, heads=HEADS, dtype=str(DTYPE),
        parameters=sum(p.numel() for p in implementation().parameters()),
    )  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="on a GPU bench_dino_step measures its memory")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
def bench_dino_memory(benchmark, implementation: Callable[[], nn.Module]) -> None:
    if implementation is monai_vit:
        pytest.importorskip("monai", reason="pip install --no-deps monai")
    script = f"{_SETUP}step = b.stepping(b.{implementation.__name__})\n# measure\nfor _ in range(3):\n    step()\n"
    peaks = []
    benchmark.pedantic(lambda: peaks.append(cpu_peak_memory_mib(script)), rounds=1)
    benchmark.extra_info["peak_mib"] = round(peaks[-1], 1)


EVERYTHING: dict[str, Any] = {
    "rotate": (15.0, 5.0, 5.0), "shear": 0.1, "elastic": 1.0, "rician": True, "bias": 0.3, "window": 0.2, "coarse": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def bench_views(timed, settings: dict[str, Any]) -> None:
    """The views of the same step, two of 64^3 (128^3 on a GPU) a scan: at most 5% of a step on a GPU is the aim."""
    config = ViewsConfig(global_size=(SIDE, SIDE, SIDE), local_views=0, **settings)
    rng = np.random.default_rng(0)
    scan = rng.normal(size=(2 * SIDE,) * 3).astype(np.float16)
    points = np.full((1, 3), SIDE)
    plans = default_collate([draw(scan, (3.0, 1.0, 1.0), points, 0.0, config, (s,), s, "MR") for s in range(SCANS)])
    views = render(plans, config, DEVICE)[0]
    assert views.shape == (2 * SCANS, 1, SIDE, SIDE, SIDE)
    assert views.isfinite().all()
    timed(lambda: render(plans, config, DEVICE), side=SIDE, scans=SCANS, dtype="float32")


@pytest.mark.parametrize("size", ["mini", "tiny"])
def bench_share_of_views(benchmark, size: str) -> None:
    """Views and step of `ssl/train.py dino --size SIZE` in turn (tiny on a CPU: 2 scans a step): what views take of it.

    In a run the plans are drawn by another thread during the step; here all three take turns.
    """
    few = size != "mini" and not ON_GPU
    config = settings.parse(["dino", f"--size={size}", *(["--batch_size=2"] if few else [])])
    torch.manual_seed(0)
    method: Any = methods.make(config, "").to(DEVICE).train()
    optimiser = make_optimiser(method.student, config.optim)
    rng = np.random.default_rng(0)
    scan = rng.normal(size=[3 * n for n in config.views.global_size]).astype(np.float16)
    points = np.array([scan.shape]) // 2

    def plans() -> Plan:
        return default_collate(
            [draw(scan, (3.0, 1.0, 1.0), points, 0.0, config.views, (s,), s, "MR") for s in range(config.batch_size)]
        )

    def step(views: list[Tensor]) -> None:
        with torch.autocast(DEVICE.type, DTYPE, enabled=ON_GPU):
            loss, _ = method.loss(method.student, views, 1)
        loss.backward()
        clip_per_tensor(method.student.parameters(), config.optim.clip)
        optimiser.step()
        method.after_step(1)
        optimiser.zero_grad(set_to_none=True)

    method.look(render(plans(), config.views, DEVICE))
    method.start()
    seconds: list[list[float]] = []

    def clock() -> float:
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter()

    def all_of_it() -> None:
        times = [clock()]
        drawn = plans()
        times.append(clock())
        views = render(drawn, config.views, DEVICE)
        times.append(clock())
        step(views)
        times.append(clock())
        seconds.append([b - a for a, b in pairwise(times)])

    benchmark.pedantic(all_of_it, rounds=2 if few else 9, warmup_rounds=1)
    drawing, rendering, rest = (min(part) for part in zip(*seconds[1:], strict=True))
    whole = drawing + rendering + rest
    benchmark.extra_info |= {
        "scans": config.batch_size,
        "draw_ms": round(1000 * drawing, 2),
        "render_ms": round(1000 * rendering, 2),
        "step_ms": round(1000 * rest, 1),
        "share_of_rendering": round(rendering / whole, 4),
        "share_of_views": round((drawing + rendering) / whole, 4),
    }
