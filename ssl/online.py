"""How good the features are while they are trained: weighted nearest neighbours and a linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer.channels import flagged
from medformer.errors import UserError
from medformer.evaluation.probes import knn
from medformer.evaluation.tasks import read_task
from roots import DataConfig
from views import ViewsConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Labelled", "OnlineConfig", "features", "linear_accuracy", "measure", "read_labelled"]


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Evaluation during training on labelled cases; nothing of it reaches the weights."""

    task: str | None = None
    """Labelled cases, one class each: an .npz file in MedMNIST's layout, or a .csv with the columns path and label. Its
    validation cases are scored, or a fifth of the training cases; never the test split."""
    every: int = 0
    """Optimiser steps between evaluations; 0: before the first step and after the last only."""
    neighbours: int = 20
    """k of the weighted nearest neighbours [10, 20, 100 or 200]. 1 or more."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("neighbours", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--online.{name} {getattr(self, name)} must be {least} or more")


class Labelled(NamedTuple):
    """Whole scans at the size of a global view, with their classes."""

    train: Float[Tensor, "n channels *size"]
    train_labels: Int[Tensor, " n"]
    held: Float[Tensor, "m channels *size"]
    held_labels: Int[Tensor, " m"]


def read_labelled(config: OnlineConfig, views: ViewsConfig, dims: int, data: DataConfig | None = None) -> Labelled:
    """The task's training and validation cases, of the channels in `data`; never the test split, which what is chosen
    here may be tested on.

    Raises:
        UserError: the task cannot be read, or does not hold one class a case.
    """
    size, data = views.global_size[3 - dims :], data or DataConfig()
    task = read_task(Path(config.task or ""), dims, size, 0, iter, channels=data.channels, missing=data.missing)
    if task.kind != "classes":
        raise UserError(f"--online.task {config.task}: holds {task.kind}, one class a case is needed")

    def part(index: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.stack([task.images[i].float() for i in index])
        images = flagged(images) if task.missing else images
        return images, torch.stack([task.targets[i] for i in index])

    return Labelled(*part(task.where("train")), *part(task.where("val")))


@torch.no_grad()
def features(encoder: nn.Module, x: Float[Tensor, "n channels *size"], batch: int = 64) -> Float[Tensor, "n C"]:
    """One vector a scan, float32, on the CPU; the encoder is in evaluation mode meanwhile."""
    was = encoder.training
    encoder.eval()
    device = next(encoder.parameters()).device
    found = [encoder(part.to(device)).float().cpu() for part in x.split(batch)]
    encoder.train(was)
    return torch.cat(found)


def linear_accuracy(
    train: Float[Tensor, "n C"], train_labels: Int[Tensor, " n"], held: Float[Tensor, "m C"],
    held_labels: Int[Tensor, " m"], *, decay: float = 1e-3,
) -> float:  # fmt: skip
    """Accuracy on `held` of multinomial logistic regression on standardised features (L-BFGS)."""
    spread, mean = torch.std_mean(train, dim=0, correction=0)
    train, held = ((x - mean) / spread.clamp_min(1e-6) for x in (train, held))
    weight = torch.zeros(int(train_labels.max()) + 1, train.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = train @ weight[:, :-1].T + weight[:, -1]
        loss = F.cross_entropy(logits, train_labels) + decay * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return float(((held @ weight[:, :-1].T + weight[:, -1]).argmax(1) == held_labels).float().mean())


def measure(encoder: nn.Module, data: Labelled, neighbours: int) -> dict[str, float]:
    """Accuracy of both on the held-out cases."""
    train, held = features(encoder, data.train), features(encoder, data.held)
    shares = knn(train, data.train_labels, held, int(data.train_labels.max()) + 1, neighbours)
    return {
        "knn_accuracy": float((shares.argmax(1) == data.held_labels.numpy()).mean()),
        "linear_accuracy": linear_accuracy(train, data.train_labels, held, data.held_labels),
    }
