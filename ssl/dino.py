"""DINO: a student learns to match the sharpened, centred output of its own moving average.

Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", algorithm 1 and appendix;
facebookresearch/dino for what the paper leaves open. Differs: sizes and momentum default to small batches, and the
centre starts at the mean of the first step's logits, not at 0, so that the loss starts near ln K and not below it.
Axes: V views, T teacher (global) views, B scans, K prototypes.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from schedules import cosine, linear

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["CollapseWatch", "Dino", "DinoConfig", "DinoHead", "DinoLoss", "Student", "update_teacher"]


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """DINO's head, temperatures and teacher. In brackets: the paper's value for batch 1024 on ImageNet."""

    prototypes: int = 1024
    """K, outputs of the head [65536]. 2 or more; the loss starts at ln K."""
    hidden: int = 256
    """Width of the head's two hidden layers [2048]."""
    bottleneck: int = 256
    """Width of the L2-normalised layer before the prototypes [256]."""
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
    centre_momentum: float = 0.8
    """Share of itself that the centre keeps each step [0.9]. The faster the teacher, the faster its centre has to
    be. 0 to 1."""
    freeze_last: int = 10
    """Steps at the start during which the prototypes do not move [one epoch]. 0 or more."""

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
                raise ValueError(f"--dino.{name} {getattr(self, name)} must lie between 0 and 1")
        if self.freeze_last < 0:
            raise ValueError(f"--dino.freeze_last {self.freeze_last} must be 0 or more")


class DinoHead(nn.Module):
    """width -> hidden -> hidden -> bottleneck -> L2 norm -> K prototypes; GELU between, no batch norm.

    The prototypes are weight-normed with the gain fixed at 1: each logit is a cosine in [-1, 1].
    """

    def __init__(self, width: int, config: DinoConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))

    def forward(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B K"]:
        x = F.normalize(self.mlp(x).float(), dim=-1)
        return F.linear(x, F.normalize(self.prototypes, dim=-1))


class Student(nn.Module):
    """Backbone and head over views of several sizes: one backbone pass a size, one head pass for all."""

    head: DinoHead

    def __init__(self, backbone: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, *views: Float[Tensor, "N 1 Z Y X"]) -> Float[Tensor, "M K"]:
        return self.head(torch.cat([self.backbone(v) for v in views]))


class DinoLoss(nn.Module):
    """Cross entropy from each teacher view to every other student view, and the centre that prevents collapse.

    ::

        p = softmax((t - c) / tau_t)                  # t, p: [T, B, K]; no gradient
        q = log_softmax(s / tau_s)                    # s, q: [V, B, K]; the first T views are the teacher's
        loss = -mean(p[i] . q[j] for i in range(T) for j in range(V) if i != j)
        # once per optimiser step, after the loss:
        c = m * c + (1 - m) * mean(t over views, scans, micro-batches and ranks)

    Source: Caron et al. 2021, algorithm 1. Everything is computed in float32, also under autocast.
    """

    centre: Tensor

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.student_temp = config.student_temp
        self.centre_momentum = config.centre_momentum
        self.register_buffer("centre", torch.zeros(config.prototypes))
        # The sum of this step's teacher logits, with their count as the last entry: one all-reduce for both.
        self._pending: Tensor | None = None

    def forward(
        self, student: Float[Tensor, "V B K"], teacher: Float[Tensor, "T B K"], teacher_temp: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts: `entropy` H(p), `kl` (loss = entropy + kl), `marginal` H(mean of p)."""
        with torch.autocast(student.device.type, enabled=False):
            teacher = teacher.detach().float()
            p_log = F.log_softmax((teacher - self.centre) / teacher_temp, dim=-1)
            p = p_log.exp()
            q_log = F.log_softmax(student.float() / self.student_temp, dim=-1)
            terms = -torch.einsum("tbk,vbk->tvb", p, q_log)
            views, targets = student.shape[0], teacher.shape[0]
            if views < 2:
                raise ValueError(f"DinoLoss: {views} view(s) of a scan leave nothing to compare; give at least 2")
            same = torch.eye(targets, views, dtype=torch.bool, device=terms.device)
            loss = terms.masked_fill(same[..., None], 0.0).sum() / ((targets * views - targets) * student.shape[1])
            entropy = -(p * p_log).sum(-1).mean()
            marginal = p.mean((0, 1))
            stats = {
                "entropy": entropy,
                "kl": loss.detach() - entropy,
                "marginal": -(marginal * marginal.clamp_min(1e-30).log()).sum(),
            }
            self.observe(teacher)
        return loss, stats

    @torch.no_grad()
    def observe(self, teacher: Float[Tensor, "T B K"]) -> None:
        """Count these logits in the next move of the centre."""
        logits = teacher.detach().float().flatten(0, 1)
        pending = torch.cat([logits.sum(0), logits.new_tensor([float(len(logits))])])
        self._pending = pending if self._pending is None else self._pending + pending

    @torch.no_grad()
    def update_centre(self, momentum: float | None = None) -> None:
        """Move the centre by everything seen since the last call, on all ranks."""
        if self._pending is None:
            raise RuntimeError("DinoLoss.update_centre: no logits were seen since the last update")
        pending, self._pending = self._pending, None
        if dist.is_initialized():
            dist.all_reduce(pending)
        self.centre.lerp_(pending[:-1] / pending[-1], 1 - (self.centre_momentum if momentum is None else momentum))

    def discard(self) -> None:
        """Forget the logits of a step that was skipped."""
        self._pending = None


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameters only; call after the optimiser step.

    Buffers (Performer's random features) are copied, not averaged: the mean of two random bases is no basis.
    """
    old: list[Tensor] = list(teacher.parameters())
    new: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(old, new, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
    for kept, fresh in zip(teacher.buffers(), student.buffers(), strict=True):
        kept.copy_(fresh)


class Dino(nn.Module):
    """Student, teacher, loss and schedules. The trainer calls `loss`, `before_step`, then `after_step`."""

    def __init__(self, backbone: nn.Module, width: int, config: DinoConfig, steps: int) -> None:
        """`backbone` maps [B, 1, Z, Y, X] to [B, width]; `steps` is the length of all schedules."""
        super().__init__()
        self.config = config
        self.steps = steps
        self.student = Student(backbone, DinoHead(width, config))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.criterion = DinoLoss(config)

    def train(self, mode: bool = True) -> Dino:
        """The teacher stays in evaluation mode: its targets have no drop path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def teacher_temp(self, step: int) -> float:
        c = self.config
        return linear(step, round(c.teacher_temp_warmup * self.steps), c.teacher_temp_start, c.teacher_temp)

    def momentum(self, step: int) -> float:
        return cosine(step, self.steps, self.config.momentum, 1.0)

    @torch.no_grad()
    def look(self, views: list[Float[Tensor, "N 1 Z Y X"]]) -> None:
        """Show the teacher a micro-batch of the first optimiser step, before that step; then call `start`."""
        self.criterion.observe(self.teacher(views[0]).unflatten(0, (2, -1)))

    def start(self) -> None:
        """Put the centre where the teacher is.

        From 0 the centre would need 1 / (1 - centre_momentum) steps to arrive, during which the loss measures
        nothing but that.
        """
        self.criterion.update_centre(momentum=0.0)

    def loss(
        self, student: nn.Module, views: list[Float[Tensor, "N 1 Z Y X"]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`views[0]`: the two global views of each scan, [2 * B, ...], view by view; `views[1:]`: local ones alike.

        `student` is `self.student`, or the same wrapped for several processes.
        """
        scans = len(views[0]) // 2
        with torch.no_grad():
            targets = self.teacher(views[0])
        logits = student(*views)
        return self.criterion(
            logits.unflatten(0, (-1, scans)), targets.unflatten(0, (2, scans)), self.teacher_temp(step)
        )

    def before_step(self, step: int) -> None:
        """After backward, before clipping and the optimiser: hold the prototypes still at the start."""
        if step < self.config.freeze_last:
            # None, not zero: AdamW would still apply weight decay to a zero gradient.
            self.student.head.prototypes.grad = None

    def after_step(self, step: int) -> None:
        """After the optimiser: move the centre and the teacher."""
        self.criterion.update_centre()
        update_teacher(self.teacher, self.student, self.momentum(step))

    def skip_step(self) -> None:
        self.criterion.discard()


class CollapseWatch:
    """Says, once, that training has collapsed and which way. Looks at the mean of the last `window` steps.

    Uniform: every scan gets the same even answer; the loss sticks at ln K (8.3178 for K = 4096).
    Single: every scan gets the same prototype; the teacher's mean answer has no entropy left.
    """

    def __init__(self, prototypes: int, window: int = 100) -> None:
        self.ceiling = math.log(prototypes)
        self.recent: deque[tuple[float, float, float]] = deque(maxlen=window)
        self.warned = False

    def __call__(self, loss: float, entropy: float, marginal: float) -> str | None:
        self.recent.append((loss, entropy, marginal))
        if self.warned or len(self.recent) < (self.recent.maxlen or 0):
            return None
        loss, entropy, marginal = (sum(column) / len(self.recent) for column in zip(*self.recent, strict=True))
        message = None
        if abs(loss - self.ceiling) < 0.002 * self.ceiling and entropy > 0.99 * self.ceiling:
            message = (
                f"collapse: the loss has stuck at ln K = {self.ceiling:.4f}, the teacher answers evenly for every "
                "scan; lower --dino.teacher_temp or raise --optim.lr"
            )
        elif marginal < 0.02 * self.ceiling:
            message = (
                f"collapse: the teacher gives every scan the same prototype (entropy {marginal:.3f} of "
                f"{self.ceiling:.3f}); raise --dino.teacher_temp, or lower --dino.centre_momentum or --optim.lr"
            )
        self.warned = message is not None
        return message
