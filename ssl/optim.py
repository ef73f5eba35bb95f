"""What moves weights: AdamW or LARS, what is decayed and at which rate it learns, two ways to clip, moving averages.

Sources: You et al. 2017 (LARS), google-deepmind/deepmind-research `byol` for its exclusions; Brock et al. 2021
(adaptive gradient clipping); facebookresearch/dino and dinov2 for the groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import sharding

__all__ = [
    "Lars",
    "OptimConfig",
    "adaptive_clip",
    "clip_per_tensor",
    "make_optimiser",
    "parameter_groups",
    "update_average",
]

# Parameters of the input: the first layer of layer decay.
_INPUT = (
    "patch_embed", "class_token", "register_tokens", "mask_token", "position", "token_embed", "start",
    "conv", "positions", "stems",  # of a TNT
    "conv1", "bn1",  # of a ResNet
)  # fmt: skip
_BLOCK = re.compile(r"(?:^|\.)((?:blocks|stages|layer\d)\.\d+)\.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedules."""

    name: Literal["adamw", "lars"] = "adamw"
    """adamw, or lars (layer-wise rates, BYOL's for residual networks at large batches)."""
    lr: float = 5e-4
    """Peak learning rate, reached after the warm-up; not rescaled by the batch size. Above 0. [LARS with BYOL: 0.2
    to 0.45 times batch / 256]"""
    final_lr: float = 1e-6
    """Learning rate at the last step (half cosine from lr). 0 or more."""
    warmup: float = 0.1
    """Share of --steps over which the learning rate rises linearly from 0. 0 to 1."""
    weight_decay: float = 0.04
    """Weight decay at the first step. Biases, norms and all other 1-D tensors are never decayed."""
    final_weight_decay: float = 0.4
    """Weight decay at the last step (half cosine)."""
    layer_decay: float = 1.0
    """Each block learns at this multiple of the rate of the block above it [0.9 in DINOv2]. Above 0, at most 1."""
    patch_lr: float = 1.0
    """Multiple of the learning rate for the patch embedding [0.2 in DINOv2]. 0 or more."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient, LARS's momentum. 0 to 1."""
    beta2: float = 0.999
    """AdamW's decay of the mean squared gradient. 0 to 1."""
    clip: float = 3.0
    """Largest gradient norm of one tensor, each tensor for itself as in DINO; 0 turns clipping off."""
    agc: float = 0.0
    """Adaptive gradient clipping: the largest norm of a unit's gradient, as a share of the norm of its weights; the
    head is left alone [0.01]. 0 turns it off."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"--optim.lr {self.lr} must be above 0")
        for name in ("final_lr", "weight_decay", "final_weight_decay", "clip", "agc", "patch_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--optim.{name} {getattr(self, name)} must be 0 or more")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--optim.{name} {getattr(self, name)} must be between 0 and 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--optim.layer_decay {self.layer_decay} must be above 0 and at most 1")


def parameter_groups(module: nn.Module, *, layer_decay: float = 1.0, patch_lr: float = 1.0) -> list[dict[str, Any]]:
    """Groups by weight decay (`decay`) and by multiple of the learning rate (`lr_scale`), decayed ones first.

    Not decayed: every bias and every tensor of one dimension (norms, layer scales). The rule is DINO v1's
    (facebookresearch/dino `get_params_groups`; DINOv3 excludes by name). With these backbones it decays the register
    tokens and the table of positions, and leaves the class token alone, which is a vector here.
    Layer decay: of L blocks (stages of a TNT, blocks of a ResNet), block i (from 0) learns at layer_decay^(L - i) of
    the rate, the input, a stem with it, at layer_decay^(L + 1), all else at the full rate. Source: Bao et al. 2021
    (BEiT).
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    inside = [None if "stem" in name.split(".") else _BLOCK.search(name) for name, _ in named]
    order = {block: i for i, block in enumerate(dict.fromkeys(m[1] for m in inside if m))}
    top = len(order) + 1
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for (name, p), block in zip(named, inside, strict=True):
        first = any(part in ("stem", *_INPUT) for part in name.split("."))
        layer = order[block[1]] + 1 if block else 0 if first else top
        scale = layer_decay ** (top - layer) * (patch_lr if "patch_embed" in name.split(".") else 1.0)
        decay = not (p.ndim <= 1 or name.endswith(".bias"))
        group = groups.setdefault((not decay, scale), {"params": [], "decay": decay, "lr_scale": scale})
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def make_optimiser(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names over all trained parameters of `module`."""
    groups = parameter_groups(module, layer_decay=config.layer_decay, patch_lr=config.patch_lr)
    if config.name == "lars":
        return Lars(groups, lr=config.lr, momentum=config.beta1)
    return torch.optim.AdamW(
        sharding.split_groups(groups), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates: each tensor's step is as long as a share `eta` of the tensor itself.

    ::

        g = grad + weight_decay * w                  # both lines: only where the group's `decay` is set
        g = g * eta * |w| / |g|                      # 1 in place of the ratio where either norm is 0
        m = momentum * m + g
        w = w - lr * m

    Groups whose `decay` is False (biases, norms) are excluded from the decay and from the adaptation.
    Source: You et al. 2017; exclusions of deepmind-research `byol/utils/optimizers.py`.
    """

    def __init__(
        self, groups: Iterable[Any], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, eta: float = 1e-3
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "decay": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Lars takes no closure"
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            weights, grads = ([sharding.own(t) for t in some] for some in (found, [p.grad for p in found]))
            if group["decay"] and found:
                grads = [g + group["weight_decay"] * w for g, w in zip(grads, weights, strict=True)]
                w_norms, g_norms = (sharding.norms(some, of=found) for some in (weights, grads))
                usable = (w_norms > 0) & (g_norms > 0)
                ratios = torch.where(usable, group["eta"] * w_norms / g_norms, torch.ones_like(w_norms))
                grads = [g * ratio for g, ratio in zip(grads, ratios, strict=True)]
            for p, w, g in zip(found, weights, grads, strict=True):
                if "m" not in self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
                m = sharding.own(self.state[p]["m"])
                m.mul_(group["momentum"]).add_(g)
                w.sub_(group["lr"] * m)


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
        if not isinstance(kept, nn.modules.batchnorm._BatchNorm):
            for a, b in zip(kept.buffers(recurse=False), fresh.buffers(recurse=False), strict=True):
                a.copy_(b)


@torch.no_grad()
def clip_per_tensor(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale each gradient whose norm is over `limit` down to it; return the norm over all, before clipping.

    A gradient with NaN or Inf makes the returned norm NaN or Inf: check it before stepping.
    Source: facebookresearch/dino `clip_gradients` (per tensor; DINOv2 and v3 clip per sub-module).
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = sharding.norms(grads)
    if limit > 0:
        scales = (limit / (norms + 1e-6)).clamp(max=1.0)
        here = [sharding.own(g) for g in grads]
        torch._foreach_mul_(here, list(scales.unbind()))  # pyright: ignore[reportPrivateImportUsage]
    return norms.norm()


@torch.no_grad()
def adaptive_clip(module: nn.Module, share: float, *, floor: float = 1e-3, skip: Collection[str] = ()) -> None:
    """Scale each unit's gradient g down to `share * max(|w|, floor)` where it is longer; w are the unit's weights.

    A unit is what feeds one output: a row of Linear and Embedding, one filter of a convolution in any number of
    dimensions, and for transposed convolutions, whose weights are (in, out / groups, ...), one output channel of one
    group. Vectors are one unit; any other tensor has one unit for each place on all axes but the last.

    Args:
        share: lambda of the paper [0.01].
        floor: norm that weights count for at least, so that those starting at 0 can move.
        skip: names of children (with everything below them) left alone: the paper's final layer.

    Source: Brock et al. 2021, eq. (3).
    """
    for prefix, layer in module.named_modules():
        if any(prefix == name or prefix.startswith(f"{name}.") for name in skip):
            continue
        for name, p in layer.named_parameters(recurse=False):
            if p.grad is None or f"{prefix}.{name}".lstrip(".") in skip:
                continue
            w, g = _units(layer, p), _units(layer, p.grad)
            w_norm = w.norm(dim=1, keepdim=True).clamp_min(floor)
            g_norm = g.norm(dim=1, keepdim=True)
            scale = torch.where(g_norm > share * w_norm, share * w_norm / g_norm, torch.ones_like(g_norm))
            p.grad.copy_(_whole(layer, g * scale, p.grad))


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ROWS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _units(layer: nn.Module, x: Tensor) -> Tensor:
    """One row a unit."""
    if x.ndim <= 1:
        return x.reshape(1, -1)
    if isinstance(layer, _TRANSPOSED):  # (groups * in, out, ...) -> (groups * out, in * ...)
        return x.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return x.flatten(1) if isinstance(layer, _ROWS) else x.flatten(0, -2)


def _whole(layer: nn.Module, units: Tensor, like: Tensor) -> Tensor:
    if like.ndim > 1 and isinstance(layer, _TRANSPOSED):
        inner = like.shape[0] // layer.groups
        parts = units.unflatten(1, (inner, *like.shape[2:])).unflatten(0, (layer.groups, -1))
        return parts.transpose(1, 2).reshape(like.shape)
    return units.reshape(like.shape)
