"""Residual networks of torchvision, timm, Lightly and MedicalNet, whose names are ours."""

from __future__ import annotations

import re
from typing import Any

from medformer.resnet import BLOCKS, ResNet, ResNetConfig
from medformer.weights.fitting import built, filled, fit_kernel
from medformer.weights.origin import Origin
from medformer.weights.reading import Weights

__all__ = ["LAYOUTS", "load"]

LAYOUTS = {
    "resnet": "torchvision 0.29.1 and timm 1.0.31, ResNet",
    "medicalnet": "Tencent/MedicalNet 20f76aa, ResNet",
    "lightly-resnet": "nn.Sequential of torchvision's children, as lightly 1.5 makes it",
}
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_DROPPED = re.compile(r"^(conv_seg|projection_head|prediction_head|head|fc\.\d+)\.|^fc\.(mlp|last_layer)")


def load(
    caller: str, weights: Weights, layout: str, *, dims: int | None, in_channels: int | None, strict: bool,
    given: dict[str, Any], drop_heads: bool,
) -> ResNet:  # fmt: skip
    """The network. `given` holds fields of `ResNetConfig`."""
    state = dict(weights.state)
    architecture = str(weights.config.get("architecture", ""))
    if re.search(r"blur|aa\b|aa\d|_aa|anti", architecture):
        raise ValueError(
            f"{caller}: {architecture} blurs where it steps (anti-aliasing), with the tensors of a plain ResNet; no "
            "network of medformer does so"
        )
    if layout == "lightly-resnet":
        state = {re.sub(r"^(\d)\.", lambda m: f"{_NUMBERED.get(m[1], m[1])}.", name): t for name, t in state.items()}
    _require(caller, state)
    left_out = [name for name in state if drop_heads and _DROPPED.search(name)]
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    stem, bottleneck = state["conv1.weight"], "layer1.0.conv3.weight" in state
    counts = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    depths = [depth for depth, blocks in BLOCKS.items() if blocks == counts and (depth >= 50) == bottleneck]
    if not depths:
        raise ValueError(f"{caller}: stages of {counts} blocks are none of ResNet {', '.join(map(str, BLOCKS))}")
    options: dict[str, Any] = {
        "dims": dims or stem.ndim - 2, "in_channels": in_channels or stem.shape[1], "depth": depths[0],
        "base_width": stem.shape[0], "norm": "batch",
        "shortcut": "conv" if "layer2.0.downsample.0.weight" in state else "pad",
        "classes": state["fc.weight"].shape[0] if "fc.weight" in state else 0,
    }  # fmt: skip
    settings = {}
    if layout == "medicalnet":
        options["output_stride"] = 8
        settings["output_stride"] = "8 (layout medicalnet: its last stages dilate)"
    elif stem.ndim == 4:
        settings["steps"] = "3x3 convolutions of stride 2, nothing blurred (layout resnet; the tensors do not say)"
    model = built(ResNet, ResNetConfig(**{**options, **given}))
    for name, tensor in model.state_dict().items():
        if tensor.ndim >= 4 and name in state:
            state[name] = fit_kernel(state[name], tensor)
        elif name.endswith("num_batches_tracked"):  # files of old versions of torch have none
            state.setdefault(name, tensor)
    filled(caller, model, state, strict)
    model.origin = Origin(
        layout=layout, compared_with=LAYOUTS[layout], prefix=weights.prefix,
        left_out=tuple(sorted(left_out + weights.left_out)), settings=settings,
        input="RGB from 0 to 1, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)" if stem.ndim == 4 else
        "scaled as its authors do; the weights do not say",
    )  # fmt: skip
    return model


def _require(caller: str, state: Any) -> None:
    missing = [n for n in ("conv1.weight", "bn1.running_mean", "layer4.0.conv1.weight") if n not in state]
    if missing:
        reason = ""
        if "conv1.0.weight" in state:
            reason = "; a stem of three convolutions (ResNet-C, -D, -T) is no network of medformer"
        elif "bn1.weight" in state:
            reason = "; a ResNet of other norms than BatchNorm is read by medformer.load only"
        held = ", ".join(sorted(state)[:4])
        raise ValueError(f"{caller}: the weights have no {', '.join(missing)}{reason}; they hold {held}, ...")
