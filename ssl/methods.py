"""What the loop in `loop.py` asks of a method, and how each is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

import medformer
from byol import Byol
from dino import Dino
from igpt import Igpt, model_config
from medformer.channels import name_channels
from medformer.data.sequences import patterns_of
from medformer.errors import UserError
from settings import TrainConfig

__all__ = ["Method", "check", "make", "parameters_of"]


class Method(Protocol):
    """An `nn.Module` whose state is all that a checkpoint keeps of it.

    The loop calls `look` on the first `look_steps` steps' batches and `start` once; then, each step, `loss` for each
    micro-batch, `before_step` after backward, and `after_step` after the optimiser, or `skip_step` in place of both
    optimiser and `after_step` where the loss was not finite.
    """

    look_steps: int

    @property
    def student(self) -> nn.Module:
        """What the optimiser trains; in several processes `loss` gets it wrapped."""
        ...

    @property
    def headline(self) -> str:
        """The part of the loss that the progress line shows."""
        ...

    @property
    def last_layers(self) -> tuple[str, ...]:
        """Children of `student` that adaptive gradient clipping leaves alone."""
        ...

    @property
    def encoder(self) -> nn.Module: ...
    @property
    def summary(self) -> str: ...
    def look(self, views: list[Tensor]) -> None: ...
    def start(self) -> None: ...
    def loss(self, student: nn.Module, views: list[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]: ...
    def before_step(self, step: int) -> None: ...
    def after_step(self, step: int) -> None: ...
    def skip_step(self) -> None: ...
    def schedules(self, step: int) -> dict[str, float]: ...
    def watch(self, loss: float, parts: dict[str, float]) -> str | None: ...
    def save(self, path: Path) -> str: ...

    # Of nn.Module:
    def train(self, mode: bool = True) -> Any: ...
    def to(self, *args: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


def check(config: TrainConfig, ranks: int) -> None:
    """UserError where what looks across the scans of all processes would see one scan alone."""
    own = {"dino": config.dino, "byol": config.byol}.get(config.method)
    if own is not None and own.koleo and config.batch_size * ranks < 2:
        raise UserError(
            f"--{config.method}.koleo {own.koleo} needs --batch_size 2 or more; use 0 for one scan a step", 2
        )
    for method, norm, wanted in (("dino", config.dino.norm, "batch"), ("byol", config.byol.norm, "sync")):
        if config.method == method and norm == wanted and config.batch_size * ranks < 2:
            raise UserError(
                f"--{method}.norm {norm} with 1 scan a step: BatchNorm needs 2 or more; raise --batch_size or use "
                "another norm",
                2,
            )


def make(config: TrainConfig, scale: str) -> Method:
    """The method that `config` names, with fresh weights from torch's generator.

    `scale` says what the voxels are ("HU / 500", "z-score"): part of what an Image-GPT's codebook has to fit.
    """
    if config.method == "igpt":
        shape = model_config(config.model, config.igpt, config.views.global_size, scale)
        method = Igpt(shape, config.igpt, config.seed)
        method.student.checkpoint_activations = config.checkpoint_activations
        name_channels(method.student, tuple(patterns_of(config.data.channels)))
        return cast(Method, method)
    backbone = medformer.build(config.model)
    backbone.checkpoint_activations = config.checkpoint_activations
    name_channels(backbone, tuple(patterns_of(config.data.channels)))
    cutmix, width = config.views.cutmix, config.model.width
    if config.method == "dino":
        return cast(Method, Dino(backbone, width, config.dino, config.steps, cutmix=cutmix))
    # The target draws weights of its own; the random features follow the config's seed and are the same.
    target = medformer.build(config.model)
    return cast(Method, Byol(backbone, target, width, config.byol, config.steps, cutmix=cutmix))


def parameters_of(method: Method) -> int:
    """Trained parameters of what is kept: the backbone, or Image-GPT."""
    kept = method.student.backbone if hasattr(method.student, "backbone") else method.student
    assert isinstance(kept, nn.Module)
    return sum(p.numel() for p in kept.parameters())
