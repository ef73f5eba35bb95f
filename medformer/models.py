"""Every model that is built from a configuration, saved and loaded: the type of the configuration says which."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TypeAlias

from medformer.backbone import Backbone, BackboneConfig
from medformer.image_gpt import ImageGPT, ImageGPTConfig
from medformer.resnet import ResNet, ResNetConfig
from medformer.slices import SliceEncoder, SliceEncoderConfig
from medformer.tnt import TNT, TNTConfig

__all__ = ["CONFIGS", "Encoder", "Model", "ModelConfig", "as_saved", "build"]

Encoder: TypeAlias = Backbone | ResNet | TNT | SliceEncoder
"""What turns scans into patch features."""
Model: TypeAlias = Encoder | ImageGPT
ModelConfig: TypeAlias = BackboneConfig | ResNetConfig | TNTConfig | ImageGPTConfig | SliceEncoderConfig

MODELS: dict[type, Any] = {
    BackboneConfig: Backbone, ResNetConfig: ResNet, TNTConfig: TNT, ImageGPTConfig: ImageGPT,
    SliceEncoderConfig: SliceEncoder,
}  # fmt: skip
CONFIGS: dict[str, type] = {model.__name__: config for config, model in MODELS.items()}
"""Configurations by the name of the model, as checkpoints hold it."""


def build(config: ModelConfig) -> Any:
    """The model that `config` describes, with fresh weights from torch's generator."""
    return MODELS[type(config)](config)


def as_saved(config: ModelConfig) -> dict[str, Any]:
    """Its fields as files hold them. One that came later is left out at its default: what was written before it, and
    what older versions read, stays as it is."""
    later = {"in_channels": 1} if isinstance(config, ImageGPTConfig) else {}
    return {name: value for name, value in asdict(config).items() if name not in later or value != later[name]}
