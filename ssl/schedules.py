"""Schedules as pure functions of the step, and the optimiser they drive.

Nothing here has state: a resumed run asks for the same step and gets the same value.
Source: Caron et al. 2021 (DINO) for the shapes: linear warm-up, then a half cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["OptimConfig", "clip_per_tensor", "cosine", "linear", "parameter_groups"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules."""

    lr: float = 5e-4
    """Peak learning rate of AdamW, reached after the warm-up; not rescaled by the batch size. Above 0."""
    final_lr: float = 1e-6
    """Learning rate at the last step (half cosine from lr). 0 or more."""
    warmup: float = 0.1
    """Share of --steps over which the learning rate rises linearly from 0. 0 to 1."""
    weight_decay: float = 0.04
    """Weight decay at the first step. Biases, norms and all other 1-D tensors are never decayed."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step (half cosine)."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient. 0 to 1."""
    beta2: float = 0.999
    """AdamW's decay of the mean squared gradient. 0 to 1."""
    clip: float = 3.0
    """Largest gradient norm of one tensor, each tensor for itself as in DINO; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"--optim.lr {self.lr} must be above 0")
        for name in ("final_lr", "weight_decay", "final_weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--optim.{name} {getattr(self, name)} must be 0 or more")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--optim.{name} {getattr(self, name)} must lie between 0 and 1")


def linear(step: int, over: int, start: float, end: float) -> float:
    """`start` at step 0, `end` from step `over` on."""
    return end if step >= over else start + (end - start) * step / over


def cosine(step: int, steps: int, start: float, end: float, *, warmup: int = 0) -> float:
    """Half cosine from `start` to `end` at step `steps`, after a linear rise from 0 over `warmup` steps.

    The first of W warm-up steps gets start / W, not 0, so that no step is wasted; steps past the end stay at `end`.
    """
    if step < warmup:
        return start * (step + 1) / warmup
    along = min(1.0, (step - warmup) / max(1, steps - warmup))
    return end + (start - end) * (1 + math.cos(math.pi * along)) / 2


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two AdamW groups: decayed, and not decayed (every bias and every tensor of one dimension: norms, layer scales).

    The rule is DINO v1's (facebookresearch/dino `get_params_groups`; DINOv3 excludes by name). With this backbone it
    decays the register tokens and the table of positions, and leaves the class token alone, which is a vector here.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    return [{"params": decayed, "decay": True}, {"params": plain, "decay": False}]


@torch.no_grad()
def clip_per_tensor(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale each gradient whose norm is over `limit` down to it; return the norm over all, before clipping.

    A gradient with NaN or Inf makes the returned norm NaN or Inf: check it before stepping.
    Source: facebookresearch/dino `clip_gradients` (per tensor; DINOv2 and v3 clip per sub-module).
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(grads))  # pyright: ignore[reportPrivateImportUsage]
    if limit > 0:
        scales = (limit / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(scales.unbind()))  # pyright: ignore[reportPrivateImportUsage]
    return norms.norm()
