"""Backbones for 3D and 2D medical images. See README.md."""

from medformer.attention import PerformerAttention, SoftmaxAttention
from medformer.backbone import Backbone, BackboneConfig, Features
from medformer.checkpoint import load, save
from medformer.nystrom_attention import NystromAttention
from medformer.presets import base_2d, base_3d, small_2d, small_3d, tiny_2d, tiny_3d
from medformer.swap import swap_attention

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Features",
    "NystromAttention",
    "PerformerAttention",
    "SoftmaxAttention",
    "base_2d",
    "base_3d",
    "load",
    "save",
    "small_2d",
    "small_3d",
    "swap_attention",
    "tiny_2d",
    "tiny_3d",
]
