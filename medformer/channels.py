"""More input channels for a model that was trained with fewer: four sequences for one that knew a single scan."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from medformer.errors import UserError
from medformer.models import Encoder, build

__all__ = ["with_channels"]

E = TypeVar("E", bound=Encoder)


def with_channels(model: E, channels: int, silent: int = 0) -> E:
    """A copy that takes `channels` input channels, and after them `silent` ones that count nothing at first.

    As `load_vit` does it: kernels are summed over the channels they had and shared equally by the new ones, so that
    the same scan in every channel gives what it gave. Not so for silent ones of a `ResNet` with group norm, whose
    kernels are standardised: a kernel of zeros is none there.
    """
    had = model.config.in_channels
    if had == channels + silent:
        return model
    if "in_channels" not in {field.name for field in fields(model.config)}:
        raise UserError(
            f"a {type(model).__name__} takes scans of {had} channel(s), the cases have {channels}; take its encoder or "
            "another checkpoint", 2,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        wide = build(replace(model.config, in_channels=channels + silent))
    state = model.state_dict()
    for name, wanted in wide.state_dict().items():
        if state[name].shape != wanted.shape:
            state[name] = _shared(state[name], wanted, channels)
    wide.load_state_dict(state)
    return wide.to(next(model.parameters()).device).train(model.training)


def _shared(kernel: Tensor, wanted: Tensor, channels: int) -> Tensor:
    fits = kernel.sum(1, keepdim=True).expand(-1, channels, *kernel.shape[2:]) / channels
    silent = fits.new_zeros(len(fits), wanted.shape[1] - channels, *fits.shape[2:])
    return torch.cat([fits, silent], 1)
