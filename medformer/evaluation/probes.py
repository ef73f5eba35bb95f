"""Frozen backbones: features once, then weighted kNN, a sweep of linear probes, and an attentive probe.

Sources: kNN as in DINO (Caron et al. 2021, appendix F.1: k of 10 to 200, T = 0.07); the linear sweep as in DINOv2
(Oquab et al. 2024: 13 learning rates x last n layers x pooled or not, all trained at once, chosen on validation);
differs: each feature is standardised by the training cases, so that the same rates fit every checkpoint; the attentive
probe as in V-JEPA (one learned query over the patch tokens).
Axes: n cases, D features, C classes, K rates, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import medformer
from medformer.errors import UserError
from medformer.models import TNT, ImageGPT, Model, ResNet
from medformer.run_checkpoint import encoder_of
from medformer.schedules import cosine

__all__ = ["AttentiveHead", "Frozen", "LinearProbe", "knn", "linear_sweep", "load_model", "loss_of", "probabilities"]

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
LAST_LAYERS = (1, 4)
LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What a frozen backbone says about every case."""

    layers: list[Tensor]
    """[n, C] summary of each of the last layers, final norm applied, the last layer last; of a residual network each of
    the stages, whose widths differ."""
    pooled: Tensor
    """[n, C] mean patch token of the last layer."""

    def features(self, last: int, pool: bool) -> Tensor:
        """[n, D] of the last `last` layers, with the mean patch token or not."""
        return torch.cat(self.layers[-last:] + ([self.pooled] if pool else []), dim=1)

    def of(self, cases: Tensor) -> Frozen:
        """Those of some cases only."""
        return Frozen(layers=[layer[cases] for layer in self.layers], pooled=self.pooled[cases])


def load_model(path: Path) -> tuple[Model, Path, dict[str, Any]]:
    """A model from its file or the folder of its run, that file, and the settings of the run ({} where it lies alone).

    A `.pt` file is one of the checkpoints of a run, stopped or not: what its method would have saved at that step.

    Raises:
        UserError: it is no model of ours.
    """
    if path.suffix == ".pt" and path.is_file():
        model, run = encoder_of(path)
        return model, path, run
    sequence = path / "image_gpt.safetensors"
    file = sequence if sequence.is_file() else path / "backbone.safetensors" if path.is_dir() else path
    try:
        model = medformer.load(file)
        model = getattr(model, "backbone", model)  # of one that was fine-tuned
    except FileNotFoundError as error:
        raise UserError(
            f"{error}; give the folder of a finished run, its backbone.safetensors, or a file of its checkpoints/",
            2,
        ) from error
    except ValueError as error:
        raise UserError(str(error), 2) from error
    beside = file.parent / "config.yaml"
    return model, file, (yaml.safe_load(beside.read_text()) or {}) if beside.is_file() else {}


@torch.no_grad()
def extract(
    model: Model, images: Sequence[Tensor], batch: int, run: Callable[..., Any],
    progress: Callable[[Any], Any],
) -> Frozen:  # fmt: skip
    """Summaries of all images, [1, *size] each; `run` is the precision's context, entered for every batch.

    The last layer of an Image-GPT is its middle one, where probes read it (Chen et al. 2020, section 3.3).
    """
    device = next(model.parameters()).device
    model.eval()
    depth = len(model.stages if isinstance(model, ResNet | TNT) else model.blocks)
    last = min(max(LAST_LAYERS), depth)
    layers: list[list[Tensor]] = []
    pooled: list[Tensor] = []
    for start in progress(range(0, len(images), batch)):
        x = torch.stack(list(images[start : start + batch])).to(device).float()
        if isinstance(model, ImageGPT):
            with run():
                tokens, middle = model.codebook.encode(x), depth // 2
                read = range(max(0, middle + 1 - last), middle + 1)
                layers.append([model.features(tokens, i).float().cpu() for i in read])
            pooled.append(layers[-1][-1])
            continue
        with run():
            found = model.get_intermediate_layers(x, last)
        layers.append([features.cls.float().cpu() for features in found])
        pooled.append(found[-1].patches.float().mean(1).cpu())
    return Frozen(layers=[torch.cat(batches) for batches in zip(*layers, strict=True)], pooled=torch.cat(pooled))


def loss_of(logits: Tensor, target: Tensor, balance: Tensor | None = None) -> Tensor:
    """Cross entropy with class weights [C], or (float targets) binary cross entropy over the labels that are known."""
    if target.dtype == torch.long:
        return F.cross_entropy(logits.float(), target, weight=balance)
    known = ~target.isnan()
    return F.binary_cross_entropy_with_logits(logits.float()[known], target[known])


def balance_of(target: Tensor, classes: int) -> Tensor | None:
    """Weights that make every class count alike; None for several labels."""
    if target.dtype != torch.long:
        return None
    counts = torch.bincount(target, minlength=classes).clamp_min(1).float()
    return counts.sum() / (classes * counts)


def probabilities(logits: Tensor, kind: str) -> np.ndarray:
    """[..., C] float64; of a regression its numbers as they are."""
    logits = logits.double()
    if kind == "regression":
        return logits.detach().cpu().numpy()
    return (logits.softmax(-1) if kind == "classes" else logits.sigmoid()).detach().cpu().numpy()


def knn(train: Tensor, target: Tensor, queries: Tensor, classes: int, k: int) -> np.ndarray:
    """[m, C] shares of the k nearest training cases by cosine, weighted exp(similarity / T); unknown labels abstain."""
    train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    near, index = (queries @ train.T).topk(min(k, len(train)), dim=1)
    weight = ((near - near[:, :1]) / TEMPERATURE).exp()  # [m, k], the largest is 1
    if target.dtype == torch.long:
        votes = F.one_hot(target, classes).float()[index]  # [m, k, C]
        return ((weight[..., None] * votes).sum(1) / weight.sum(1, keepdim=True)).double().numpy()
    known = ~target.isnan()
    votes, w = target.nan_to_num()[index], weight[..., None] * known[index]
    return ((w * votes).sum(1) / w.sum(1).clamp_min(1e-12)).double().numpy()


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Logits = ((features - mean) / spread) @ weight.T + bias, of the last `last` layers."""

    last: int
    pool: bool
    lr: float
    mean: Tensor
    spread: Tensor
    weight: Tensor
    """[C, D]"""
    bias: Tensor

    def __call__(self, frozen: Frozen) -> Tensor:
        return (self._in(frozen) @ self.weight.T) + self.bias

    def _in(self, frozen: Frozen) -> Tensor:
        return (frozen.features(self.last, self.pool) - self.mean) / self.spread


def linear_sweep(
    train: Frozen,
    target: Tensor,
    classes: int,
    steps: int,
    seed: int,
    better: Callable[[LinearProbe], float],
    batch: int = 128,
) -> LinearProbe:
    """Train every rate x layers x pooling, return the one whose `better` (a validation score) is highest.

    SGD with momentum 0.9 and a cosine to 0, from zero weights; the rates of one feature train side by side.
    """
    options = [(last, pool) for last in LAST_LAYERS if last <= len(train.layers) for pool in (False, True)]
    if not options:
        options = [(len(train.layers), False)]
    rates = torch.tensor(LEARNING_RATES)
    balance = balance_of(target, classes)
    best, best_score = None, -np.inf
    for last, pool in options:
        x = train.features(last, pool)
        mean = x.mean(0)
        spread = x.std(0, correction=0).clamp_min(1e-3 * float(x.std(0, correction=0).mean()) + 1e-12)
        x = (x - mean) / spread
        generator = torch.Generator().manual_seed(seed)
        weight = torch.zeros(len(rates), classes, x.shape[1], requires_grad=True)
        bias = torch.zeros(len(rates), classes, requires_grad=True)
        speed: list[Tensor] = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for step in range(steps):
            pick = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
            logits = torch.einsum("bd,kcd->kbc", x[pick], weight) + bias[:, None]
            loss = torch.stack([loss_of(row, target[pick], balance) for row in logits]).sum()
            gradients = torch.autograd.grad(loss, [weight, bias])
            scale = cosine(step, steps, 1.0, 0.0) * rates
            with torch.no_grad():
                for value, moving, gradient in zip((weight, bias), speed, gradients, strict=True):
                    moving.mul_(0.9).add_(gradient)
                    value.sub_(moving * scale.view(-1, *[1] * (value.ndim - 1)))
        for k, rate in enumerate(LEARNING_RATES):
            probe = LinearProbe(
                last=last, pool=pool, lr=rate, mean=mean, spread=spread, weight=weight[k].detach().clone(),
                bias=bias[k].detach().clone(),
            )  # fmt: skip
            score = better(probe)
            if score > best_score:
                best, best_score = probe, score
    assert best is not None
    return best


class AttentiveHead(nn.Module):
    """One learned query reads the patch tokens: [B, N, D] to [B, C] logits."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.zeros(width))
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.key_value.weight, std=0.02)
        nn.init.zeros_(self.key_value.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, width = tokens.shape
        k, v = self.key_value(self.norm(tokens)).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = self.query.view(1, self.heads, 1, -1).expand(b, -1, -1, -1).to(k.dtype)
        return self.out(F.scaled_dot_product_attention(q, k, v).reshape(b, width))
