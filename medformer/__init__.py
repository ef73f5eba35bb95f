"""Backbones for 3D and 2D medical images. See README.md."""

from medformer.attention import PerformerAttention, SoftmaxAttention
from medformer.backbone import Backbone, BackboneConfig, Features
from medformer.checkpoint import load, save
from medformer.describe import Description, describe
from medformer.disentangled_attention import DisentangledAttention
from medformer.embed import embed
from medformer.expire_span import ExpireSpanAttention
from medformer.footprint import Footprint, footprint
from medformer.foreign import load_resnet, load_vit
from medformer.hopfield import HopfieldAttention, HopfieldLayer, HopfieldLookup, HopfieldPooling
from medformer.image_gpt import ImageGPT, ImageGPTConfig
from medformer.models import build
from medformer.moe import SwitchMLP, auxiliary_loss
from medformer.nystrom_attention import NystromAttention
from medformer.presets import base_2d, base_3d, large_2d, large_3d, small_2d, small_3d, tiny_2d, tiny_3d
from medformer.resnet import ResNet, ResNetConfig
from medformer.swap import swap_attention
from medformer.tnt import TNT, TNTConfig, TNTLevel
from medformer.transfer import freeze_for_transfer

__all__ = [
    "TNT",
    "Backbone",
    "BackboneConfig",
    "Description",
    "DisentangledAttention",
    "ExpireSpanAttention",
    "Features",
    "Footprint",
    "HopfieldAttention",
    "HopfieldLayer",
    "HopfieldLookup",
    "HopfieldPooling",
    "ImageGPT",
    "ImageGPTConfig",
    "NystromAttention",
    "PerformerAttention",
    "ResNet",
    "ResNetConfig",
    "SoftmaxAttention",
    "SwitchMLP",
    "TNTConfig",
    "TNTLevel",
    "auxiliary_loss",
    "base_2d",
    "base_3d",
    "build",
    "describe",
    "embed",
    "footprint",
    "freeze_for_transfer",
    "large_2d",
    "large_3d",
    "load",
    "load_resnet",
    "load_vit",
    "save",
    "small_2d",
    "small_3d",
    "swap_attention",
    "tiny_2d",
    "tiny_3d",
]
