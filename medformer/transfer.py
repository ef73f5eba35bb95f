"""Frozen pretrained transformers: only norms, positions, input and output learn."""

from __future__ import annotations

from torch import nn

from medformer.backbone import Backbone

__all__ = ["freeze_for_transfer"]


def freeze_for_transfer(model: Backbone, *, new_input: bool = True) -> list[str]:
    """Freeze, in place, all but layer norms, positions, patch embedding and head; the names of what still learns.

    What was learned elsewhere stays in the attentions and MLPs, class and register tokens and layer scales among them,
    and serves another modality. The stem, where there is one, is part of the input. Source: Lu et al. 2021, section
    3.1, whose input layer starts orthogonal with gain 1.41.

    Args:
        model: whose weights are pretrained; give it `classes` for an output that learns.
        new_input: start the patch embedding anew; False keeps the pretrained one, where the modality is alike.
    """
    learns: list[str] = []
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        part = name.partition(".")[0]
        parameter.requires_grad_(
            isinstance(owner, nn.LayerNorm)
            or part in ("stem", "patch_embed", "position", "head")
            or ".attention.tables." in name  # relative positions
            or name.endswith(".attention.prefix")
        )
        if parameter.requires_grad:
            learns.append(name)
    if new_input:
        nn.init.orthogonal_(model.patch_embed.conv.weight, gain=1.41)
        if model.patch_embed.conv.bias is not None:
            nn.init.zeros_(model.patch_embed.conv.bias)
    return learns
