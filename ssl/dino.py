"""DINO: a student learns to match the sharpened, centred output of its own moving average.

Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", algorithm 1 and appendix;
facebookresearch/dino for what the paper leaves open; Oquab et al. 2023 (DINOv2) for Sinkhorn, KoLeo and masked patches.
Differs: sizes and momentum default to small batches, and the centre starts at the mean of the first step's logits, not
at 0, so that the loss starts near ln K and not below it. The loss itself: `dino_loss.py`.
Axes: V views, T teacher (global) views, B scans, K prototypes, C width, D bottleneck.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cutmix
from collapse import CollapseWatch
from dino_loss import Centre, DinoLoss, block_masks, check_share, koleo, masked_patch_loss
from medformer import auxiliary_loss
from medformer.schedules import cosine, linear
from optim import update_average
from peers import SyncBatchNorm

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["Dino", "DinoConfig", "DinoHead", "Seen", "Student", "agreement"]


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """DINO's head, temperatures and teacher. In brackets: the paper's value for batch 1024 on ImageNet."""

    prototypes: int = 1024
    """K, outputs of the head [65536]. 2 or more; the loss of the class token starts at ln K."""
    hidden: int = 256
    """Width of the head's two hidden layers [2048]."""
    bottleneck: int = 256
    """Width of the L2-normalised layer before the prototypes [256]."""
    norm: Literal["none", "batch"] = "none"
    """batch: after each of the head's three layers BatchNorm without gain and shift, over the views of one size of all
    processes; the bottleneck then spreads over its sphere however little the scans' features differ, and the teacher
    cannot become even. Wants batches of 16 scans and more [none]."""
    student_temp: float = 0.1
    """Temperature of the student's softmax [0.1]. Above 0."""
    teacher_temp: float = 0.04
    """Temperature of the teacher's softmax after the warm-up [0.07; unstable above]. Above 0."""
    teacher_temp_start: float = 0.04
    """Temperature of the teacher's softmax at the first step [0.04]. Above 0."""
    teacher_temp_warmup: float = 0.3
    """Share of --steps over which the teacher's temperature moves linearly to teacher_temp [0.3]. 0 to 1."""
    momentum: float = 0.99
    """Share of itself that the teacher keeps at the first step; rises to 1 as a half cosine [0.996]. A teacher
    remembers about 1 / (1 - momentum) steps: that must stay well below --steps. Short runs on small batches need
    about 0.99 (0.95 collapsed in tests), runs of 10,000 steps or more 0.996 to 0.9995 (the smaller the batch, the
    larger)."""
    balance: Literal["centre", "sinkhorn"] = "centre"
    """What keeps the teacher from one answer for all: centre (a moving mean is subtracted) or sinkhorn (each batch
    uses all prototypes alike; needs batches of 32 scans and more) [centre; DINOv2: sinkhorn]."""
    centre_momentum: float = 0.8
    """Share of itself that the centre keeps each step [0.9]. The faster the teacher, the faster its centre has to
    be. 0 to 1."""
    freeze_last: int = 10
    """Steps at the start during which the prototypes do not move [one epoch]. 0 or more."""
    koleo: float = 0.0
    """Weight of the KoLeo loss, which spreads the scans of a batch out [DINOv2: 0.1]. 0 turns it off."""
    masked_patches: float = 0.0
    """Weight of the iBOT loss: the student sees global views with masked patches and answers what the teacher says
    there [DINOv2: 1.0]. Needs --model.mask_token. 0 turns it off."""
    mask_share: tuple[float, float] = (0.1, 0.5)
    """Share of patches masked in a masked view, lowest and highest; half of the global views are masked."""

    def __post_init__(self) -> None:
        if self.prototypes < 2:
            raise ValueError(f"--dino.prototypes {self.prototypes} must be at least 2")
        for name in ("hidden", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"--dino.{name} {getattr(self, name)} must be at least 1")
        for name in ("student_temp", "teacher_temp", "teacher_temp_start"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--dino.{name} {getattr(self, name)} must be above 0")
        for name in ("momentum", "centre_momentum", "teacher_temp_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--dino.{name} {getattr(self, name)} must be between 0 and 1")
        for name in ("freeze_last", "koleo", "masked_patches"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--dino.{name} {getattr(self, name)} must be 0 or more")
        check_share("dino", self.mask_share)


class DinoHead(nn.Module):
    """width -> hidden -> hidden -> bottleneck -> L2 norm -> K prototypes; GELU between.

    The prototypes are weight-normed with the gain fixed at 1: each logit is a cosine in [-1, 1]. With norm batch every
    layer has a batch norm that has no parameters and knows no running mean: the teacher too sees its own batch.
    """

    def __init__(self, width: int, config: DinoConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        sizes = (width, config.hidden, config.hidden, config.bottleneck)
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            layer = nn.Linear(inputs, outputs)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            if number:
                self.mlp.append(nn.GELU())
            self.mlp.append(layer)
            if config.norm == "batch":
                self.mlp.append(SyncBatchNorm(outputs, affine=False, track_running_stats=False))
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N K"]:
        return F.linear(self.features(x), self.directions())

    def features(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N D"]:
        """Unit vectors, before the prototypes."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def directions(self) -> Float[Tensor, "K D"]:
        """The prototypes as unit vectors."""
        return F.normalize(self.prototypes, dim=-1)


class Seen(NamedTuple):
    """What the student makes of its views."""

    logits: Float[Tensor, "M K"]
    """Of each view."""
    cls: Float[Tensor, "N C"]
    """Class tokens of the global views, before the head."""
    patches: Float[Tensor, "P K"] | None
    """Logits of the masked patches, where a mask was given."""
    experts: Tensor | float
    """Mean of the experts' losses over the passes; 0 without experts."""


class Student(nn.Module):
    """Backbone and head over views of several sizes: one pass a size."""

    head: DinoHead

    def __init__(self, backbone: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, *views: Float[Tensor, "N channels *size"], mask: Bool[Tensor, "N tokens"] | None = None) -> Seen:
        """`mask`: patches of the first views that the student does not see."""
        cls, experts, patches = [], 0.0, None
        for number, view in enumerate(views):
            if number == 0 and mask is not None:
                features = cast(Any, self.backbone).forward_features(view, mask=mask)
                cls.append(features.cls)
                patches = self.head(features.patches[mask])
            else:
                cls.append(self.backbone(view))
            experts = experts + auxiliary_loss(self.backbone) / len(views)
        return Seen(torch.cat([self.head(c) for c in cls]), cls[0], patches, experts)


def agreement(first: Float[Tensor, "B K"], second: Float[Tensor, "B K"]) -> Tensor:
    """Share of the variance of answers that two views of a scan have in common, at most 1; 0 for unrelated views.

    Near even answers the student's best is agreement * student_temp / teacher_temp times what the teacher said: below
    1 that shrinks step by step, and training collapses to even answers unless the head has a batch norm.
    """
    middle = (first.mean(0) + second.mean(0)) / 2
    first, second = first - middle, second - middle
    return 2 * (first * second).sum() / (first.square().sum() + second.square().sum()).clamp_min(1e-12)


class Dino(nn.Module):
    """Student, teacher, loss and schedules; a `methods.Method`."""

    headline = "teacher_entropy"
    last_layers = ("head",)
    look_steps = 1

    def __init__(self, backbone: nn.Module, width: int, config: DinoConfig, steps: int, *, cutmix: float = 0.0) -> None:
        """`backbone` maps [B, 1, *size] to [B, width]; `steps` is the length of all schedules."""
        super().__init__()
        self.config = config
        self.cutmix = cutmix
        self.steps = steps
        self.student = Student(backbone, DinoHead(width, config))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.criterion = DinoLoss(config.student_temp, balanced=config.balance == "sinkhorn")
        self.centre = Centre(config.prototypes)
        self.patch_centre = Centre(config.prototypes) if config.masked_patches else None
        self.collapse = CollapseWatch(config.prototypes)

    def train(self, mode: bool = True) -> Dino:
        """The teacher stays in evaluation mode: its targets have no drop path. Its batch norms have statistics of
        their own, of what it sees."""
        super().train(mode)
        self.teacher.eval()
        for module in self.teacher.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    @property
    def encoder(self) -> nn.Module:
        """What is kept of training, looked at and evaluated: the teacher's backbone."""
        return self.teacher.backbone

    @property
    def summary(self) -> str:
        ln_k, patches = math.log(self.config.prototypes), self.config.masked_patches
        more = [f"{patches:g} times as much of masked patches"] if patches else []
        more += ["KoLeo"] if self.config.koleo else []
        return f"the loss starts at ln K = {ln_k:.3f}" + (f", plus {' and '.join(more)}" if more else "")

    def teacher_temp(self, step: int) -> float:
        c = self.config
        return linear(step, round(c.teacher_temp_warmup * self.steps), c.teacher_temp_start, c.teacher_temp)

    def momentum(self, step: int) -> float:
        return cosine(step, self.steps, self.config.momentum, 1.0)

    def schedules(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum(step), "teacher_temp": self.teacher_temp(step)}

    @torch.no_grad()
    def look(self, views: list[Float[Tensor, "N channels *size"]]) -> None:
        """Show the teacher a micro-batch of the first optimiser step, before that step; then call `start`."""
        self._teach(views[0], masked=None)

    def start(self) -> None:
        """Put the centre where the teacher is.

        From 0 the centre would need 1 / (1 - centre_momentum) steps to arrive, during which the loss measures
        nothing but that.
        """
        self.centre.update(self.teacher.head.directions(), momentum=0.0)

    @torch.no_grad()
    def _teach(self, views: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits of the views and, at `masked`, of their patches; the centres take note."""
        head = self.teacher.head
        if masked is None:
            patches = None
            cls = head.features(self.teacher.backbone(views))
        else:
            found = cast(Any, self.teacher.backbone).forward_features(views)
            cls, patches = head.features(found.cls), head.features(found.patches[masked])
        self.centre.observe(cls)
        if self.patch_centre is not None and patches is not None:
            self.patch_centre.observe(patches)
        with torch.autocast(views.device.type, enabled=False):
            directions = head.directions()
            return F.linear(cls, directions), None if patches is None else F.linear(patches, directions)

    def loss(
        self, student: nn.Module, views: list[Float[Tensor, "N channels *size"]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`views[0]`: the two global views of each scan, [2 * B, ...], view by view; `views[1:]`: local ones alike.

        `student` is `self.student`, or the same wrapped for several processes.
        """
        config, near = self.config, views[0]
        scans, temp = len(near) // 2, self.teacher_temp(step)
        mask = None
        if self.patch_centre is not None:
            grid = cast(Any, self.student.backbone).grid_of(near.shape[2:])
            mask = block_masks(len(near), grid, config.mask_share, near.device)
        targets, patch_targets = self._teach(near, mask)
        mix = None
        if self.cutmix:
            attention = cast(Any, self.teacher.backbone).attention_map(near).mean(1)
            near, partner, share = cutmix.attentive(near, attention, self.cutmix, views=2)
            mix = (partner[:scans], share[:scans])
        seen: Seen = student(near, *views[1:], **({} if mask is None else {"mask": mask}))
        loss, parts = self.criterion(
            seen.logits.unflatten(0, (-1, scans)), targets.unflatten(0, (2, scans)), self.centre.value, temp, mix
        )
        loss = loss + seen.experts
        parts["agreement"] = agreement(*targets.chunk(2))
        if config.koleo:
            parts["koleo"] = (koleo(seen.cls[:scans]) + koleo(seen.cls[scans:])) / 2
            loss = loss + config.koleo * parts["koleo"]
        if mask is not None and self.patch_centre is not None:
            assert patch_targets is not None
            assert seen.patches is not None
            p = self.criterion.targets(patch_targets, self.patch_centre.value, temp)
            parts["patch_loss"] = masked_patch_loss(seen.patches, p, mask, config.student_temp)
            loss = loss + config.masked_patches * parts["patch_loss"]
        return loss, {name: part.detach() for name, part in parts.items()}

    def before_step(self, step: int) -> None:
        """After backward, before clipping and the optimiser: hold the prototypes still at the start."""
        if step < self.config.freeze_last:
            # None, not zero: AdamW would still apply weight decay to a zero gradient.
            self.student.head.prototypes.grad = None

    def after_step(self, step: int) -> None:
        """After the optimiser: move the centres, by the prototypes that gave the logits, then the teacher."""
        directions = self.teacher.head.directions()
        for centre in (self.centre, self.patch_centre):
            if centre is not None:
                centre.update(directions, self.config.centre_momentum)
        update_average(self.teacher, self.student, self.momentum(step))

    def skip_step(self) -> None:
        for centre in (self.centre, self.patch_centre):
            if centre is not None:
                centre.discard()

    def watch(self, loss: float, parts: dict[str, float]) -> str | None:
        """A warning where training has collapsed."""
        entropy = parts["teacher_entropy"]
        return self.collapse(parts["kl"] + entropy, entropy, parts["marginal_entropy"])

    def save(self, path: Path) -> str:
        """Write the encoder into the run's folder; returns the file's name."""
        import medformer

        medformer.save(cast(medformer.Backbone, self.encoder), path / "backbone.safetensors")
        return "backbone.safetensors"
