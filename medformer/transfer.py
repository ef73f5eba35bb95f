"""Frozen pretrained transformers: only norms, positions, input and output learn."""

from __future__ import annotations

from torch import nn

from medformer.image_gpt import ImageGPT
from medformer.models import Model
from medformer.resnet import ResNet
from medformer.slices import SliceEncoder
from medformer.tnt import TNT

__all__ = ["freeze_for_transfer"]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.BatchNorm3d)
# First parts of the names of parameters: of a `Backbone`, a `TNT`, a `ResNet` and an `ImageGPT`.
_INPUTS = ("stem", "patch_embed", "conv", "conv1", "token_embed")
_POSITIONS = ("position", "positions")
_OUTPUTS = ("head", "fc", "output", "pool")


def freeze_for_transfer(model: Model, *, new_input: bool = True) -> list[str]:
    """Freeze, in place, all but norms, positions, input and output; the names of what still learns.

    What was learned elsewhere stays in attentions, MLPs and convolutions, class and register tokens and layer scales
    among them, and serves another modality. The input is the patch embedding, with the stem where there is one; a TNT's
    first convolution, whose positions are those within windows too; a ResNet's first convolution, which has no
    positions (and whose BatchNorms still count in training mode); an `ImageGPT`'s token embedding. Source: Lu et al.
    2021, section 3.1, whose input layer starts orthogonal with gain 1.41; for norms of residual networks Frankle et al.
    2021.

    Args:
        model: whose weights are pretrained; give it `classes` for an output that learns.
        new_input: start the input layer anew (not a stem, whose last map it reads); False keeps the pretrained one,
            where the modality is alike.
    """
    learns: list[str] = []
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        part = name.removeprefix("encoder.").partition(".")[0]  # of a `SliceEncoder`
        parameter.requires_grad_(
            isinstance(owner, _NORMS)
            or name.endswith(".gain")  # of Image-GPT's norms
            or part in (*_INPUTS, *_POSITIONS, *_OUTPUTS)
            or ".attention.tables." in name  # relative positions
            or name.endswith(".attention.prefix")
        )
        if parameter.requires_grad:
            learns.append(name)
    if new_input:
        weight, bias = _input_of(model)
        nn.init.orthogonal_(weight, gain=1.41)
        if bias is not None:
            nn.init.zeros_(bias)
    return learns


def _input_of(model: Model) -> tuple[nn.Parameter, nn.Parameter | None]:
    if isinstance(model, ImageGPT):
        return model.token_embed, None
    if isinstance(model, SliceEncoder):
        return _input_of(model.encoder)
    if isinstance(model, ResNet):
        conv = model.conv1
    else:
        conv = model.conv if isinstance(model, TNT) else model.patch_embed.conv
    return conv.weight, conv.bias  # type: ignore[return-value]
