"""Weights that others trained: ViTs of timm, DINO and DINOv2, residual networks of torchvision, timm and MedicalNet.

2D weights become 3D ones by inflation: a kernel is repeated along z and divided by its depth, so that a volume that
does not change along z gives what the image gives; positions are repeated along z. Where a model has other input
channels, kernels are summed over theirs and shared equally by the new ones: a grey scan gives what the grey picture
gave.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from medformer.backbone import Backbone, BackboneConfig
from medformer.resnet import BLOCKS, ResNet, ResNetConfig

__all__ = ["load_resnet", "load_vit"]

Source = str | os.PathLike[str] | Mapping[str, Tensor]

_VIT_NAMES = [
    (r"^(cls_token)$", "class_token"),
    (r"^(reg_token|register_tokens)$", "register_tokens"),
    (r"^patch_embed\.proj\.", "patch_embed.conv."),
    (r"\.attn\.", ".attention."),
    (r"\.ls([12])\.gamma$", r".scale\1"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
]


def load_vit(
    source: Source, *, dims: int = 2, in_channels: int | None = None, heads: int | None = None, strict: bool = True,
    **overrides: Any,
) -> Backbone:  # fmt: skip
    """A `Backbone` with the weights of a 2D ViT: timm's, DINO's or DINOv2's, whose names and layout are known.

    Width, depth, patches, registers, layer scale, gated MLPs and the head follow from the weights. In 2D the features
    are those of the original. Positions for other sizes are stretched linearly, where the originals take bicubic.

    Args:
        source: a file (.safetensors, or .pth read without running its code), or a state dict.
        dims: 2, or 3 to inflate.
        in_channels: of the new model; None: those of the weights in 2D, and 1 in 3D.
        heads: None: one for every 64 channels, as in the published models.
        strict: refuse weights of which a tensor has no place. False warns with their list.
        overrides: other fields of `BackboneConfig`, for example `attention="performer"`, `patch_stride=8` or
            `drop_path=0.1`.

    Raises:
        ValueError: not a ViT, or (strict) tensors that do not fit, all listed.
    """
    state = _read(source)
    _require("load_vit", state, ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"))
    places, kernel = state.pop("pos_embed")[0], state["patch_embed.proj.weight"]
    named = {}
    for name, tensor in state.items():
        for pattern, ours in _VIT_NAMES:
            name = re.sub(pattern, ours, name)
        named[name] = tensor
    named["class_token"] = named["class_token"].reshape(-1)
    for name in ("register_tokens", "mask_token"):
        if name in named:
            named[name] = named[name].reshape(-1, kernel.shape[0])
    if "mask_token" in named:
        named["mask_token"] = named["mask_token"][0]
    width, hidden = kernel.shape[0], named["blocks.0.mlp.fc2.weight"].shape[1]
    gated = named["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden
    side = math.isqrt(places.shape[0])
    classes = named["head.weight"].shape[0] if "head.weight" in named else 0
    options = {
        "dims": dims, "in_channels": in_channels or (kernel.shape[1] if dims == 2 else 1), "width": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in named if name.startswith("blocks.")),
        "heads": heads or max(width // 64, 1), "patch_size": kernel.shape[-1], "patch_stride": kernel.shape[-1],
        "patch_padding": 0, "mlp": "gated" if gated else "dense", "mlp_ratio": hidden * (1.5 if gated else 1) / width,
        "attention": "softmax", "registers": len(named.get("register_tokens", ())), "position_grid": side,
        "mask_token": "mask_token" in named, "qk_norm": "blocks.0.attention.q_norm.weight" in named,
        "layer_scale": 1e-5 if "blocks.0.scale1" in named else None, "classes": classes,
    }  # fmt: skip
    options |= overrides
    if options.get("position", "learned") != "learned":
        options["position_grid"] = None
    model = _build(Backbone, BackboneConfig(**options))
    config = model.config
    # Without a place for the class token (timm's no_embed_class) its sum with nothing is the token itself.
    of_class, of_patches = places[: places.shape[0] - side**2], places[places.shape[0] - side**2 :]
    if len(of_class) > 1:
        raise ValueError(f"load_vit: pos_embed of {places.shape[0]} rows must be a square of patches and a class token")
    if config.position == "learned":
        of_patches = of_patches.reshape(side, side, width)
        named["position.patches"] = of_patches.expand(*config.base_grid, width) if dims == 3 else of_patches
        named["position.cls"] = of_class[0] if len(of_class) else torch.zeros(width)
    named["patch_embed.conv.weight"] = _fit_kernel(kernel, model.patch_embed.conv.weight)
    return _load("load_vit", model, named, strict)


def load_resnet(
    source: Source, *, dims: int | None = None, in_channels: int | None = None, strict: bool = True, **overrides: Any
) -> ResNet:
    """A `ResNet` with the weights of torchvision or timm (2D), or of MedicalNet (3D), whose names are the same.

    Depth, channels, shortcuts and the head follow from the weights. MedicalNet's last stages dilate instead of
    stepping: give `output_stride=8` for its features.

    Args:
        source: as for `load_vit`.
        dims: of the new model, 3 inflating 2D weights; None: those of the weights.
        in_channels: of the new model; None: those of the weights.
        strict: as for `load_vit`. MedicalNet's segmentation head has no place here: its files need `strict=False`.
        overrides: other fields of `ResNetConfig`.

    Raises:
        ValueError: not such a network, or (strict) tensors that do not fit, all listed.
    """
    state = _read(source)
    _require("load_resnet", state, ("conv1.weight", "bn1.running_mean", "layer4.0.conv1.weight"))
    stem, bottleneck = state["conv1.weight"], "layer1.0.conv3.weight" in state
    counts = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    depths = [depth for depth, blocks in BLOCKS.items() if blocks == counts and (depth >= 50) == bottleneck]
    if not depths:
        raise ValueError(f"load_resnet: stages of {counts} blocks are none of ResNet {', '.join(map(str, BLOCKS))}")
    options = {
        "dims": dims or stem.ndim - 2, "in_channels": in_channels or stem.shape[1], "depth": depths[0],
        "base_width": stem.shape[0], "norm": "batch",
        "shortcut": "conv" if "layer2.0.downsample.0.weight" in state else "pad",
        "classes": state["fc.weight"].shape[0] if "fc.weight" in state else 0,
    }  # fmt: skip
    model = _build(ResNet, ResNetConfig(**{**options, **overrides}))
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if tensor.ndim >= 4 and name in state:
            state[name] = _fit_kernel(state[name], tensor)
        elif name.endswith("num_batches_tracked"):  # files of old versions of torch have none
            state.setdefault(name, tensor)
    return _load("load_resnet", model, state, strict)


def _read(source: Source) -> dict[str, Tensor]:
    """The tensors of a file or state dict, without the wrappings of trainers."""
    found: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"medformer: weights {path} are not a file")
        try:
            if path.suffix == ".safetensors":
                found = safetensors.torch.load_file(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
        except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"medformer: weights {path} are damaged or of another format ({error})") from error
    for wrapping in ("state_dict", "teacher", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapping), Mapping):
            found = found[wrapping]
    if not isinstance(found, Mapping):
        raise ValueError("medformer: weights must be a state dict, a mapping of names to tensors")
    state = {re.sub(r"^((module|backbone)\.)+", "", name): value for name, value in found.items()}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _require(function: str, state: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        held = ", ".join(sorted(state)[:4])
        raise ValueError(f"{function}: the weights have no {', '.join(missing)}; they hold {held}, ...")


def _build(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        return kind(config)


def _fit_kernel(weight: Tensor, wanted: Tensor) -> Tensor:
    """A 2D kernel for 3D, and for as many input channels as wanted."""
    if wanted.ndim == weight.ndim + 1:
        weight = weight.unsqueeze(2).expand(-1, -1, wanted.shape[2], -1, -1) / wanted.shape[2]
    if weight.ndim == wanted.ndim and weight.shape[1] != wanted.shape[1]:
        weight = weight.sum(1, keepdim=True).expand(-1, wanted.shape[1], *weight.shape[2:]) / wanted.shape[1]
    return weight


def _load(function: str, model: Any, state: dict[str, Tensor], strict: bool) -> Any:
    expected = model.state_dict()
    # The features of FAVOR+ are drawn, not learned, and none of these weights has them.
    drawn = {name for name in expected if name.endswith((".omega", ".draws"))}
    problems = [f"{name} is missing" for name in expected.keys() - state.keys() - drawn]
    problems += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        found, wanted = tuple(state[name].shape), tuple(expected[name].shape)
        if found != wanted:
            problems.append(f"{name} has shape {found} instead of {wanted}")
    if problems:
        message = f"{function}: {len(problems)} tensors do not fit {model.config}: {'; '.join(sorted(problems))}"
        if strict:
            raise ValueError(f"{message}. strict=False loads the rest")
        warnings.warn(f"{message}. These were left at their start values or ignored", stacklevel=3)
    dtype = next(model.parameters()).dtype
    fits = {
        name: tensor.contiguous().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name in expected and tensor.shape == expected[name].shape
    }
    nn.Module.load_state_dict(model, fits, strict=False)
    return model
