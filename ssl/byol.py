"""BYOL: an online network predicts what a slowly moving target makes of the other view; no negatives.

Source: Grill et al. 2020, "Bootstrap Your Own Latent", section 3 and appendix; deepmind-research/byol for what the
paper leaves open. Differs: GroupNorm and weight standardisation by default (Richemond et al. 2020: 73.9 against 74.3
with BatchNorm on ImageNet), since batches of volumes are small; sizes default to small batches.
Axes: B scans, C backbone width, P width of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cutmix
from collapse import VectorWatch
from dino_loss import block_masks, check_share, koleo, per_view
from medformer import auxiliary_loss
from medformer.schedules import cosine
from optim import update_average
from peers import SyncBatchNorm

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["Byol", "ByolConfig", "Online", "Seen", "StandardisedLinear", "byol_loss", "head"]


@dataclass(frozen=True, kw_only=True)
class ByolConfig:
    """BYOL's heads and target. In brackets: the paper's value for batch 4096 on ImageNet."""

    hidden: int = 512
    """Width of the hidden layer of projector and predictor [4096]. A multiple of --byol.groups with norm group."""
    projection: int = 128
    """Width of the vectors that are compared [256]."""
    norm: Literal["group", "batch", "sync"] = "group"
    """Norm in the hidden layers: group (GroupNorm and standardised weights, any batch), batch (BatchNorm over the
    scans of one process), sync (BatchNorm over all processes) [sync]."""
    groups: int = 16
    """Groups of the GroupNorm."""
    momentum: float = 0.99
    """Share of itself that the target keeps at the first step; rises to 1 as a half cosine [0.97, 0.99, 0.996 for 40,
    300, 1000 epochs]."""
    koleo: float = 0.0
    """Weight of the KoLeo loss on the backbone's vectors, which spreads the scans of a batch out [0: not in the paper].
    0 turns it off."""
    masked_patches: float = 0.0
    """Weight of the masked term: the online network sees views with masked patches and predicts, by the same heads,
    what the target makes of those patches of the whole view [0: not in the paper; as iBOT does for DINO]. Needs
    --model.mask_token. 0 turns it off."""
    mask_share: tuple[float, float] = (0.1, 0.5)
    """Share of patches masked in a masked view, lowest and highest; half of the views are masked."""

    def __post_init__(self) -> None:
        for name in ("hidden", "projection", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"--byol.{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"--byol.momentum {self.momentum} must be between 0 and 1")
        for name in ("koleo", "masked_patches"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--byol.{name} {getattr(self, name)} must be 0 or more")
        check_share("byol", self.mask_share)
        if self.norm == "group" and self.hidden % self.groups:
            raise ValueError(f"--byol.groups {self.groups} must divide --byol.hidden {self.hidden}")


class StandardisedLinear(nn.Linear):
    """A linear layer whose rows of weights have mean 0 and variance 1 / inputs, times a learned gain a row.

    Source: Qiao et al. 2019 (weight standardisation); the gain as in Brock et al. 2021, section 3.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        variance, mean = torch.var_mean(self.weight, dim=1, keepdim=True, correction=0)
        scale = self.gain[:, None] * torch.rsqrt((variance * self.weight.shape[1]).clamp_min(1e-4))
        return F.linear(x, (self.weight - mean) * scale, self.bias)


def head(inputs: int, config: ByolConfig) -> nn.Sequential:
    """Projector or predictor: linear, norm, ReLU, linear."""
    if config.norm == "group":
        first: nn.Module = StandardisedLinear(inputs, config.hidden)
        norm: nn.Module = nn.GroupNorm(config.groups, config.hidden)
        last: nn.Module = StandardisedLinear(config.hidden, config.projection)
    else:
        first = nn.Linear(inputs, config.hidden)
        norm = nn.BatchNorm1d(config.hidden) if config.norm == "batch" else SyncBatchNorm(config.hidden)
        last = nn.Linear(config.hidden, config.projection)
    return nn.Sequential(first, norm, nn.ReLU(), last)


class Seen(NamedTuple):
    """What the online network makes of its views."""

    predictions: list[Float[Tensor, "B P"]]
    """Of each view."""
    vectors: list[Float[Tensor, "B C"]]
    """Of each view, before the projector."""
    experts: Tensor | float = 0.0
    """Mean of the experts' losses over the views; 0 without experts."""
    patches: Float[Tensor, "M P"] | None = None
    """Predictions of the masked patches of all views, where a mask was given."""


class Online(nn.Module):
    """Backbone, projector and predictor; each view passes alone, so that batch statistics are those of one view."""

    def __init__(self, backbone: nn.Module, width: int, config: ByolConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = head(width, config)
        self.predictor = head(config.projection, config)

    def forward(self, *views: Float[Tensor, "B channels *size"], mask: Bool[Tensor, "N tokens"] | None = None) -> Seen:
        """`mask`: patches of the views, one view after the other, that the network does not see."""
        vectors, hidden, experts = [], [], 0.0
        for number, view in enumerate(views):
            if mask is None:
                vectors.append(self.backbone(view))
            else:
                unseen = mask.chunk(len(views))[number]
                features = cast(Any, self.backbone).forward_features(view, mask=unseen)
                vectors.append(features.cls)
                hidden.append(features.patches[unseen])
            experts = experts + auxiliary_loss(self.backbone) / len(views)
        patches = None if mask is None else self.predictor(self.projector(torch.cat(hidden)))
        return Seen([self.predictor(self.projector(vector)) for vector in vectors], vectors, experts, patches)


class Target(nn.Module):
    """Backbone and projector."""

    def __init__(self, backbone: nn.Module, width: int, config: ByolConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = head(width, config)

    def forward(
        self, *views: Float[Tensor, "B channels *size"], mask: Bool[Tensor, "N tokens"] | None = None
    ) -> tuple[list[Float[Tensor, "B P"]], Float[Tensor, "M P"] | None]:
        """The vectors of whole views, and those of the patches in `mask`."""
        if mask is None:
            return [self.projector(self.backbone(view)) for view in views], None
        found = [cast(Any, self.backbone).forward_features(view) for view in views]
        hidden = torch.cat([f.patches[m] for f, m in zip(found, mask.chunk(len(views)), strict=True)])
        return [self.projector(f.cls) for f in found], self.projector(hidden)


def byol_loss(
    predictions: list[Float[Tensor, "B P"]],
    targets: list[Float[Tensor, "B P"]],
    mix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Both orders of the squared distance between unit vectors, 0 to 8.

    ::

        q1, q2 = predictor(online(v1)), predictor(online(v2))
        z1, z2 = target(v1), target(v2)               # no gradient
        loss = mean(2 - 2 cos(q1, z2)) + mean(2 - 2 cos(q2, z1))

    `mix`: for views that hold a part of another scan, which scan of the batch and how large a share: the distance is
    then the mean of those to both targets, weighted alike.
    Source: Grill et al. 2020, eq. (2). Everything is computed in float32, also under autocast.
    """
    first, second = predictions
    with torch.autocast(first.device.type, enabled=False):
        z1, z2 = (F.normalize(z.detach().float(), dim=-1) for z in targets)
        if mix is not None:
            partner, share = mix
            z1, z2 = (torch.lerp(z, z[partner], share[:, None].to(z.dtype)) for z in (z1, z2))
        q1, q2 = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
        return (4 - 2 * (q1 * z2).sum(-1) - 2 * (q2 * z1).sum(-1)).mean()


def masked_loss(
    predictions: Float[Tensor, "M P"], targets: Float[Tensor, "M P"], mask: Bool[Tensor, "N tokens"]
) -> Tensor:
    """2 - 2 cos at the masked patches, 0 to 4; each view counts alike, however many it has masked. float32."""
    with torch.autocast(predictions.device.type, enabled=False):
        return per_view(2 - 2 * F.cosine_similarity(predictions.float(), targets.detach().float(), dim=-1), mask)


class Byol(nn.Module):
    """Online network, target and schedule; a `methods.Method`."""

    headline = "spread"
    last_layers = ("predictor",)
    look_steps = 0

    def __init__(
        self, backbone: nn.Module, target: nn.Module, width: int, config: ByolConfig, steps: int, *, cutmix: float = 0.0
    ) -> None:
        """`backbone` and `target` map [B, 1, *size] to [B, width] and start at weights of their own."""
        super().__init__()
        self.config = config
        self.steps = steps
        self.cutmix = cutmix
        self.student = Online(backbone, width, config)
        self.target = Target(target, width, config).requires_grad_(False)
        self.collapse = VectorWatch()

    @property
    def encoder(self) -> nn.Module:
        """What is kept of training, looked at and evaluated: the online backbone."""
        return self.student.backbone

    @property
    def summary(self) -> str:
        return "the loss lies between 0 and 8, 4 is no better than chance"

    def momentum(self, step: int) -> float:
        return cosine(step, self.steps, self.config.momentum, 1.0)

    def schedules(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum(step)}

    def look(self, views: list[Tensor]) -> None:
        """BYOL needs no look ahead."""

    def start(self) -> None:
        """BYOL starts as it is."""

    def loss(
        self, student: nn.Module, views: list[Float[Tensor, "N channels *size"]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`views[0]`: the two views of each scan, [2 * B, ...], view by view."""
        near = views[0]
        mask = None
        if self.config.masked_patches:
            grid = cast(Any, self.student.backbone).grid_of(near.shape[2:])
            mask = block_masks(len(near), grid, self.config.mask_share, near.device)
        given = {} if mask is None else {"mask": mask}
        with torch.no_grad():
            targets, patch_targets = self.target(*near.chunk(2), **given)
        mix = None
        if self.cutmix:
            attention = cast(Any, self.target.backbone).attention_map(near).mean(1)
            near, partner, share = cutmix.attentive(near, attention, self.cutmix, views=2)
            mix = (partner[: len(near) // 2], share[: len(near) // 2])
        seen: Seen = student(*near.chunk(2), **given)
        loss, parts = byol_loss(seen.predictions, targets, mix) + seen.experts, _spread(targets[0])
        if self.config.koleo:
            spreading = torch.stack([koleo(vectors) for vectors in seen.vectors]).mean()
            loss = loss + self.config.koleo * spreading
            parts["koleo"] = spreading.detach()
        if mask is not None:
            assert seen.patches is not None
            assert patch_targets is not None
            patch_loss = masked_loss(seen.patches, patch_targets, mask)
            loss = loss + self.config.masked_patches * patch_loss
            parts["patch_loss"] = patch_loss.detach()
        return loss, parts

    def before_step(self, step: int) -> None:
        """Nothing stands still in BYOL."""

    def after_step(self, step: int) -> None:
        """After the optimiser: the target follows the new weights."""
        update_average(self.target.backbone, self.student.backbone, self.momentum(step))
        update_average(self.target.projector, self.student.projector, self.momentum(step))

    def skip_step(self) -> None:
        """Nothing was kept of the step."""

    def watch(self, loss: float, parts: dict[str, float]) -> str | None:
        """A warning where training has collapsed; a batch of one scan has no spread to watch."""
        return self.collapse(parts["spread"], parts["rank"]) if parts["rank"] >= 0 else None

    def save(self, path: Path) -> str:
        """Write the encoder into the run's folder; returns the file's name."""
        import medformer

        medformer.save(cast(medformer.Backbone, self.encoder), path / "backbone.safetensors")
        return "backbone.safetensors"


@torch.no_grad()
def _spread(z: Float[Tensor, "B P"]) -> dict[str, Tensor]:
    """Variance of the unit vectors of a batch (0: all the same, 1: no common part), and their effective dimensions."""
    z = F.normalize(z.float(), dim=-1)
    if len(z) < 2:
        return {"spread": z.new_zeros(()), "rank": z.new_full((), -1.0)}
    centred = z - z.mean(0)
    power = torch.linalg.svdvals(centred).square()
    return {
        "spread": power.sum() / len(z),
        "rank": power.sum().square() / power.square().sum().clamp_min(1e-30),
    }
