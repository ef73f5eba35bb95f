"""All that `import medformer` offers; `medformer/__init__.py` loads it when the first of these names is used."""

from medformer.attention import PerformerAttention, SoftmaxAttention
from medformer.backbone import Backbone, BackboneConfig, Features
from medformer.checkpoint import load, save
from medformer.describe import Description, describe
from medformer.disentangled_attention import DisentangledAttention
from medformer.embed import embed
from medformer.expire_span import ExpireSpanAttention
from medformer.export import export
from medformer.footprint import Footprint, footprint
from medformer.hopfield import HopfieldAttention, HopfieldLayer, HopfieldLookup, HopfieldPooling
from medformer.hub import from_pretrained, push_to_hub, save_pretrained
from medformer.image_gpt import ImageGPT, ImageGPTConfig
from medformer.models import build
from medformer.moe import SwitchMLP, auxiliary_loss
from medformer.nystrom_attention import NystromAttention
from medformer.presets import base_2d, base_3d, large_2d, large_3d, small_2d, small_3d, tiny_2d, tiny_3d
from medformer.pyramid import Pyramid, features_only
from medformer.resnet import ResNet, ResNetConfig
from medformer.slices import SliceEncoder, SliceEncoderConfig
from medformer.swap import swap_attention
from medformer.tnt import TNT, TNTConfig, TNTLevel
from medformer.transfer import freeze_for_transfer
from medformer.weights import load_pretrained, load_resnet, load_vit

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
    "Pyramid",
    "ResNet",
    "ResNetConfig",
    "SliceEncoder",
    "SliceEncoderConfig",
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
    "export",
    "features_only",
    "footprint",
    "freeze_for_transfer",
    "from_pretrained",
    "large_2d",
    "large_3d",
    "load",
    "load_pretrained",
    "load_resnet",
    "load_vit",
    "push_to_hub",
    "save",
    "save_pretrained",
    "small_2d",
    "small_3d",
    "swap_attention",
    "tiny_2d",
    "tiny_3d",
]
