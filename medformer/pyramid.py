"""Feature maps at several depths, for the decoders of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from medformer.footprint import footprint
from medformer.models import Encoder
from medformer.resnet import ResNet
from medformer.slices import SliceEncoder
from medformer.tnt import TNT

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Pyramid", "features_only"]


class Pyramid(nn.Module):
    """A backbone whose call gives a list of maps (B, C, *grid), first block first, as timm's `features_only`.

    Attributes:
        model: the backbone.
        layers: blocks or stages whose maps are given.
        channels: of each map.
        strides: voxels from one place of each map to the next, by axis.
    """

    def __init__(self, model: Encoder, layers: Sequence[int]) -> None:
        super().__init__()
        self.model, self.layers = model, tuple(layers)
        if isinstance(model, ResNet):
            steps = [4]
            for stride in model.config.strides[1:]:
                steps.append(steps[-1] * stride)
            config, dims = model.config, model.config.dims
            self.channels = tuple(config.base_width * config.expansion * 2**i for i in self.layers)
            self.strides = tuple((steps[i],) * dims for i in self.layers)
        else:
            encoder = model.encoder if isinstance(model, SliceEncoder) else model
            if isinstance(encoder, ResNet):
                inner = Pyramid(encoder, layers)
                self.channels = inner.channels
                self.strides = tuple((model.config.slice_step, *stride) for stride in inner.strides)  # type: ignore[union-attr]
            else:
                self.channels = (model.config.width,) * len(self.layers)
                self.strides = (tuple(footprint(model).stride),) * len(self.layers)

    def forward(self, x: Float[Tensor, "B Cin *size"]) -> list[Float[Tensor, "B C *grid"]]:
        found = self.model.get_intermediate_layers(x, self.layers)
        return [features.patches.mT.unflatten(2, features.grid) for features in found]


def features_only(model: Encoder, layers: int | Sequence[int] | None = None) -> Pyramid:
    """Maps of several blocks (or stages) of a backbone, with their channels and strides.

    All maps of a transformer have the grid of its patches; those of a `ResNet` halve from stage to stage.

    Args:
        model: a `Backbone`, `ResNet`, `TNT` or `SliceEncoder`.
        layers: which, in growing order, or how many, evenly spread with the last among them; None: all stages of a
            `ResNet`, four blocks of a transformer.

    Raises:
        ValueError: no such layers.
    """
    blocks = model.stages if isinstance(model, ResNet | TNT) else model.blocks
    depth = len(blocks)
    if layers is None:
        layers = depth if isinstance(model, ResNet) else min(4, depth)
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ValueError(f"features_only: layers={layers} must be from 1 to {depth}")
        layers = [round((i + 1) * depth / layers) - 1 for i in range(layers)]
    chosen = [layer + depth if layer < 0 else layer for layer in layers]
    if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise ValueError(f"features_only: layers={list(layers)} must grow and lie among {depth}")
    return Pyramid(model, chosen)
