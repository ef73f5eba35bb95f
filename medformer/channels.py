"""Several input channels: what they are called, sequences that are missing, and models that were trained with fewer."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from medformer.errors import UserError
from medformer.models import Encoder, ImageGPT, build

__all__ = ["channel_names", "flagged", "flags_of", "name_channels", "with_channels"]

E = TypeVar("E", bound=Encoder)


def name_channels(model: Any, names: Sequence[str]) -> None:
    """Say what a model's input channels are called; `medformer.save` keeps it in the file."""
    model.__dict__["channel_names"] = tuple(names)


def channel_names(model: Any) -> tuple[str, ...]:
    """What its input channels are called, in their order; empty where nobody said. A model of twice as many channels
    has a flag after them for each, which says that it is missing."""
    return model.__dict__.get("channel_names", ())


def flags_of(channels: Sequence[str], missing: bool) -> str:
    """--channels and --missing as a command takes them; empty for one scan a case."""
    said = f" --channels {shlex.quote(','.join(channels))}" if channels else ""
    return f"{said} --missing true" if missing else said


def flagged(x: Tensor, missing: Tensor | None = None) -> Tensor:
    """[B, C, *size] to [B, 2 C, *size]: a channel that is missing (NaN in every voxel) becomes zeros, and of its flag,
    a channel of 0 for all others, ones. missing: [B, C] of those that count as it; None: all that are NaN."""
    if missing is None:
        missing = x.flatten(2)[:, :, 0].isnan()
    flag = missing.view(*missing.shape, *[1] * (x.ndim - 2)).expand_as(x)
    return torch.cat([torch.where(flag, torch.zeros_like(x), x), flag.to(x.dtype)], 1)


def with_channels(model: E, channels: int, silent: int = 0) -> E:
    """A copy that takes `channels` input channels, and after them `silent` ones that count nothing at first.

    Kernels of a model of as many channels are kept, its flags cut off where none are wanted. Else as `load_vit` does
    it: kernels are summed over the channels they had and shared equally by the new ones, so that the same scan in every
    channel gives what it gave. Not so for silent ones of a `ResNet` with group norm, whose kernels are standardised: a
    kernel of zeros is none there.
    """
    had = model.config.in_channels
    if had == channels + silent:
        return model
    if isinstance(model, ImageGPT) or "in_channels" not in {field.name for field in fields(model.config)}:
        raise UserError(
            f"a {type(model).__name__} takes scans of {had} channel(s), the cases have {channels}; take its encoder or "
            "another checkpoint", 2,
        )  # fmt: skip
    names = channel_names(model)
    keep = had == channels or (len(names) == channels and had == 2 * channels)
    with torch.random.fork_rng(devices=[]):
        wide = build(replace(model.config, in_channels=channels + silent))
    state = model.state_dict()
    for name, wanted in wide.state_dict().items():
        if state[name].shape != wanted.shape:
            state[name] = _fitted(state[name], wanted, channels, keep)
    wide.load_state_dict(state)
    name_channels(wide, names if len(names) == channels else ())
    return wide.to(next(model.parameters()).device).train(model.training)


def _fitted(kernel: Tensor, wanted: Tensor, channels: int, keep: bool) -> Tensor:
    if keep:
        fits = kernel[:, :channels]
    else:
        fits = kernel.sum(1, keepdim=True).expand(-1, channels, *kernel.shape[2:]) / channels
    silent = fits.new_zeros(len(fits), wanted.shape[1] - channels, *fits.shape[2:])
    return torch.cat([fits, silent], 1)
