"""Any public encoder by one call: read, peel, recognise, rename, fill."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors

from medformer.backbone import Backbone
from medformer.checkpoint import CONFIG_KEY
from medformer.checkpoint import load as load_own
from medformer.models import Model
from medformer.resnet import ResNet
from medformer.weights import resnet, vit
from medformer.weights.layouts import LAYOUTS, Layout
from medformer.weights.reading import Source, Weights, open_weights

__all__ = ["layouts", "load_pretrained", "load_resnet", "load_vit"]


def load_pretrained(
    source: Source,
    layout: str | None = None,
    *,
    dims: int | None = None,
    in_channels: int | None = None,
    axes: Literal["zyx", "as_saved"] = "zyx",
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    prefix: str | None = None,
    strict: bool = True,
    **overrides: Any,
) -> Model:
    """A model with the weights of a public encoder, whose outputs are those of its own code.

    The layout follows from names and shapes, and `print(model.origin)` says which it is, what was left out (projection
    heads, students, decoders) and where the heads, the norm's epsilon and the rotary periods come from. What decides
    numbers and is in no tensor comes from a config next to the file, from the layout where all its published files
    share it, or from an argument; else the error asks for it. Positions of other sizes are stretched linearly.

    Args:
        source: a file (.safetensors, or .pth, .pt, .bin, .ckpt read without running its code), a folder of transformers
            or timm, `hf:owner/name`, a state dict or a module. What `medformer.save` wrote loads too.
        layout: one of `medformer.weights.layouts()`; None recognises it.
        dims: 3 inflates weights of images; None: as they are.
        in_channels: of the model; None: those of the weights, and 1 where images are inflated.
        axes: zyx takes volumes as medformer reads them, and turns weights that were trained on (x, y, z); as_saved
            leaves the order of their own code.
        config: the model's config.json, as a path or a dictionary; None: the one next to the file.
        prefix: of the encoder's names where a file holds several, for example 'teacher.backbone.'.
        strict: refuse weights of which a tensor has no place. False warns with their list.
        overrides: fields of `BackboneConfig` or `ResNetConfig`: `heads=16`, `norm_eps=1e-6`, `activation="gelu_tanh"`,
            `position_grid=(14, 28)`, `attention="performer"`, `output_stride=8`, ...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, code instead of data, of no known layout, not of the layout named, something that decides
            numbers is said by nothing, or (strict) tensors that do not fit, all listed.
    """
    caller = "medformer.load_pretrained"
    if isinstance(source, str | os.PathLike) and _is_own(source):
        return load_own(source, strict=strict)
    weights = open_weights(caller, source, config=config, prefix=prefix)
    return _load(caller, weights, layout, dims, in_channels, axes, strict, overrides)


def layouts() -> tuple[str, ...]:
    """Names that `load_pretrained(..., layout=)` takes."""
    return (*(layout.name for layout in LAYOUTS), *resnet.LAYOUTS)


def load_vit(
    source: Source, *, dims: int = 2, in_channels: int | None = None, heads: int | None = None, strict: bool = True,
    **overrides: Any,
) -> Backbone:  # fmt: skip
    """`load_pretrained` for vision transformers of images, inflated where dims is 3.

    Raises:
        ValueError: as `load_pretrained`, or no vision transformer.
    """
    weights = open_weights("load_vit", source, config=None, prefix=None)
    given = overrides if heads is None else {**overrides, "heads": heads}
    model = _load("load_vit", weights, None, dims, in_channels, "zyx", strict, given)
    if not isinstance(model, Backbone):
        raise ValueError(f"load_vit: the weights are a {type(model).__name__}; use load_resnet or load_pretrained")
    return model


def load_resnet(
    source: Source, *, dims: int | None = None, in_channels: int | None = None, strict: bool = True, **overrides: Any
) -> ResNet:
    """`load_pretrained` for residual networks. `output_stride=8` is MedicalNet's, whose head needs `strict=False`.

    Raises:
        ValueError: as `load_pretrained`, or no residual network.
    """
    weights = open_weights("load_resnet", source, config=None, prefix=None)
    name = _resnet_layout(weights)
    if name is None:
        held = ", ".join(sorted(weights.state)[:4])
        raise ValueError(f"load_resnet: the weights have no conv1.weight; they hold {held}, ...")
    name = "resnet" if name == "medicalnet" else name
    return resnet.load(
        "load_resnet", weights, name, dims=dims, in_channels=in_channels, strict=strict, given=overrides,
        drop_heads=False,
    )  # fmt: skip


def _load(
    caller: str, weights: Weights, layout: str | None, dims: int | None, in_channels: int | None, axes: str,
    strict: bool, given: dict[str, Any],
) -> Backbone | ResNet:  # fmt: skip
    if layout is not None and layout not in layouts():
        raise ValueError(f"{caller}: layout={layout!r} must be one of {', '.join(layouts())}")
    if axes not in ("zyx", "as_saved"):
        raise ValueError(f"{caller}: axes={axes!r} must be 'zyx' or 'as_saved'")
    if dims not in (None, 2, 3):
        raise ValueError(f"{caller}: dims={dims!r} must be 2, 3 or None")
    network = _resnet_layout(weights)
    found = next((one for one in LAYOUTS if one.fits(weights.state, weights.prefix)), None)
    seen = network or (found.name if found else None)
    if layout in resnet.LAYOUTS or (layout is None and network is not None):
        name = layout or network
        if network is None:
            what = f"layout={layout!r} has layer4.0.conv1.weight and the weights do not"
            raise ValueError(f"{caller}: {what}{_like(seen)}")
        assert name is not None
        volume = weights.state["conv1.weight"].ndim == 5 if "conv1.weight" in weights.state else False
        if layout is None and volume and "output_stride" not in given:
            raise ValueError(
                f"{caller}: no tensor of a 3D ResNet says whether its last stages step or dilate; give "
                "layout='medicalnet' (they dilate) or output_stride=32"
            )
        if layout == "medicalnet" and not volume:
            raise ValueError(f"{caller}: layout='medicalnet' has 3D convolutions and the weights do not{_like(seen)}")
        if layout is None and not volume and not weights.config:
            warnings.warn(
                f"{caller}: taken for a plain ResNet; timm's resnetaa and resnetblur, which blur where they step, have "
                "the same tensors and would be wrong. layout='resnet' says that it is a plain one",
                stacklevel=3,
            )
        name = "resnet" if layout is None and name == "medicalnet" else name
        return resnet.load(
            caller, weights, name, dims=dims, in_channels=in_channels, strict=strict, given=given, drop_heads=True
        )
    chosen = found if layout is None else next(one for one in LAYOUTS if one.name == layout)
    if chosen is None:
        held = ", ".join(sorted(weights.state)[:6])
        known = ", ".join(layouts())
        raise ValueError(f"{caller}: the weights are of no known layout ({held}, ...); {known} are known")
    if layout is not None and chosen is not found and not _may_be(chosen, found):
        raise ValueError(f"{caller}: layout={layout!r} does not fit the tensors{_like(seen)}")
    return vit.load(caller, weights, chosen, dims=dims, in_channels=in_channels, axes=axes, strict=strict, given=given)


def _may_be(chosen: Layout, found: Layout | None) -> bool:
    """Whether the tensors of one are those of the other too: plain ViTs, which only their training tells apart."""
    plain = ("vit", "dinov2", "mae", "mocov3")
    return found is not None and {chosen.name, found.name} <= set(plain)


def _like(seen: str | None) -> str:
    return f"; they look like {seen!r}" if seen else "; they are of no known layout"


def _resnet_layout(weights: Weights) -> str | None:
    if "layer4.0.conv1.weight" in weights.state:
        return "medicalnet" if any(name.startswith("conv_seg.") for name in weights.state) else "resnet"
    return "lightly-resnet" if "7.0.conv1.weight" in weights.state else None


def _is_own(source: str | os.PathLike[str]) -> bool:
    path = Path(source)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return CONFIG_KEY in (file.metadata() or {})
    except safetensors.SafetensorError:
        return False
