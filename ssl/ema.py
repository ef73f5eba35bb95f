"""The moving average that a teacher (DINO) or target (BYOL) is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sharding

__all__ = ["update_average"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * model, parameters only; call after the optimiser step.

    Buffers (Performer's random features) are copied: the mean of two random bases is no basis. Those of batch norms
    are left alone: the average has statistics of its own.
    """
    old: list[Tensor] = [sharding.own(p) for p in average.parameters()]
    new: list[Tensor] = [sharding.own(p) for p in model.parameters()]
    torch._foreach_lerp_(old, new, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
    for kept, fresh in zip(average.modules(), model.modules(), strict=True):
        if not isinstance(kept, _BatchNorm):
            for a, b in zip(kept.buffers(recurse=False), fresh.buffers(recurse=False), strict=True):
                a.copy_(b)
