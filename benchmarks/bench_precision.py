"""What `--precision bf16` changes on this device: a training pass over 64 small images, and a ResNet's forward.

pytest benchmarks/bench_precision.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch

from measuring import DEVICE
from medformer import Backbone, BackboneConfig
from medformer.resnet import ResNet, ResNetConfig

# Both as `ssl/train.py byol --model.dims 2` trains them at size mini, the transformer without its stem.
MODELS = {
    "transformer": (48, lambda: Backbone(BackboneConfig(
        dims=2, width=96, heads=3, depth=4, attention="softmax", patch_size=8, patch_stride=4, patch_padding=2,
    ))),
    "resnet": (64, lambda: ResNet(ResNetConfig(dims=2, depth=10, base_width=32, output_stride=8))),
}  # fmt: skip
precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def prepared(name: str, precision: str):
    torch.manual_seed(0)
    side, make = MODELS[name]
    model, images = make().to(DEVICE), torch.randn(64, 1, side, side, device=DEVICE)

    def forward():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            return model.forward_features(images).cls.float()

    return model, forward


@pytest.mark.parametrize("name", list(MODELS))
@precisions
def bench_training_pass(timed, name, precision):
    model, forward = prepared(name, precision)

    def step():
        model.zero_grad()
        forward().square().sum().backward()

    timed(step, images=64)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@precisions
@torch.no_grad()
def bench_resnet_forward(timed, precision):
    _, forward = prepared("resnet", precision)
    timed(forward, images=64)
    exact = prepared("resnet", "fp32")[1]()
    assert (forward() - exact).abs().max() < 0.05 * exact.abs().max()
