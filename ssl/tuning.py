"""Networks trained on labels: frozen transformer (FPT), full fine-tuning, from scratch, attentive and dense heads.

All share one loop, one budget and one augmentation, so that what differs between two methods is what they start from
and what may move. FPT: what `medformer.freeze_for_transfer` leaves free (Lu et al. 2021, "Pretrained Transformers as
Universal Computation Engines"), and the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer import footprint, freeze_for_transfer
from medformer.models import Encoder, ImageGPT, Model
from medformer_kernels import patch_unembed
from probes import AttentiveHead, balance_of, loss_of, probabilities
from schedules import cosine
from scores import dice

__all__ = ["Budget", "Network", "predict", "predict_dense", "train_classifier", "train_dense"]

FROZEN = ("attentive", "linear", "decoder")  # methods whose backbone does not move


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every trained method may spend."""

    steps: int
    batch: int
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0


class Network(nn.Module):
    """Backbone and head. The head of a classifier reads the summary and the mean patch token."""

    def __init__(self, backbone: Model, method: str, classes: int, dense: bool) -> None:
        super().__init__()
        self.backbone, self.method, self.dense = backbone, method, dense
        width = backbone.config.width
        if dense:
            assert not isinstance(backbone, ImageGPT)
            self.head: nn.Module = DenseHead(backbone, classes + 1, light=method != "linear")
        elif method == "attentive":
            self.head = AttentiveHead(width, classes, getattr(backbone.config, "heads", _heads(width)))
        else:
            self.head = nn.Linear(2 * width, classes)
            nn.init.trunc_normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)
        backbone.requires_grad_(method not in FROZEN)
        if method == "fpt":
            freeze_for_transfer(backbone, new_input=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if self.method in FROZEN:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method not in FROZEN):
            features = self.backbone.forward_features(x)
        if self.dense:
            return self.head(features.patches, features.grid, tuple(x.shape[2:]))
        if self.method == "attentive":
            return self.head(features.patches)
        return self.head(torch.cat([features.cls, features.patches.mean(1)], dim=1))


class DenseHead(nn.Module):
    """Tokens to voxels [B, K, *size]: `patch_unembed` with a learned kernel, after two convolutions when light."""

    def __init__(self, backbone: Encoder, channels: int, light: bool) -> None:
        super().__init__()
        config, seen = backbone.config, footprint(backbone)
        self.geometry: dict[str, Any] = {"stride": seen.stride, "padding": seen.padding}
        width, hidden = config.width, min(config.width, 64)
        conv: Any = nn.Conv3d if config.dims == 3 else nn.Conv2d
        self.mix = None
        if light:
            self.mix = nn.Sequential(
                conv(width, hidden, 3, padding=1), nn.GELU(), conv(hidden, hidden, 3, padding=1), nn.GELU()
            )
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.empty(hidden if light else width, channels, *seen.reach))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, patches: Tensor, grid: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        tokens = self.norm(patches.float())
        if self.mix is not None:
            tokens = self.mix(tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        with torch.autocast(tokens.device.type, enabled=False):
            return patch_unembed(
                tokens.float().contiguous(), self.weight, self.bias, grid=grid, size=size, **self.geometry
            )


def _heads(width: int) -> int:
    """Heads of about 64 channels, of which `width` is a multiple."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


def _optimiser(network: Network, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Matrices and kernels decay; biases, norms and other vectors do not."""
    moving = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in moving if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in moving if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def _fit(
    network: Network,
    budget: Budget,
    lr: float,
    seed: int,
    batch_at: Callable[[np.random.Generator], tuple[Tensor, Tensor]],
    loss_at: Callable[[Tensor, Tensor], Tensor],
    run: Callable[..., Any],
    progress: Callable[[Any], Any],
) -> None:
    """The loop: AdamW, linear warm-up, half cosine to 0, gradient norm clipped; `run` is entered for the loss alone."""
    optimiser = _optimiser(network, lr, budget.weight_decay)
    rng = np.random.default_rng((seed, 31))
    torch.manual_seed(seed)
    network.train()
    for step in progress(range(budget.steps)):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, budget.steps, lr, 0.0, warmup=round(budget.warmup * budget.steps))
        x, y = batch_at(rng)
        with run():
            loss = loss_at(network(x), y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), budget.clip)
        if math.isfinite(norm.item()):
            optimiser.step()
    network.eval()


def train_classifier(
    network: Network,
    images: Sequence[Tensor],
    target: Tensor,
    classes: int,
    budget: Budget,
    lr: float,
    seed: int,
    run: Callable[..., Any],
    progress: Callable[[Any], Any],
) -> None:
    """Fit `network` to `images` ([1, *size] each) in place; each class counts alike."""
    device = network.device
    balance = balance_of(target, classes)
    balance = None if balance is None else balance.to(device)

    def batch_at(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pick = rng.integers(len(images), size=budget.batch)
        x = torch.stack([images[i] for i in pick]).to(device, non_blocking=True).float()
        return _augment(x, rng), target[torch.from_numpy(pick)].to(device)

    _fit(network, budget, lr, seed, batch_at, partial(loss_of, balance=balance), run, progress)


def _augment(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift by up to a tenth, zoom by up to 15%, contrast and brightness by up to 20%; no flips, sides have meaning."""
    b, dims = len(x), x.ndim - 2
    theta = np.zeros((b, dims, dims + 1), np.float32)
    theta[:, range(dims), range(dims)] = rng.uniform(0.85, 1.15, (b, 1))
    theta[:, :, dims] = rng.uniform(-0.2, 0.2, (b, dims))  # the grid runs from -1 to 1
    grid = F.affine_grid(torch.from_numpy(theta).to(x.device), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    change = torch.from_numpy(rng.uniform(-0.2, 0.2, (2, b)).astype(np.float32)).to(x.device)
    gain, shift = change.view(2, b, *[1] * (dims + 1))
    return x * (1 + gain) + shift


@torch.no_grad()
def predict(network: Network, images: Sequence[Tensor], kind: str, batch: int, run: Callable[..., Any]) -> np.ndarray:
    """[n, C] probabilities."""
    device = network.device
    rows = []
    for start in range(0, len(images), batch):
        x = torch.stack(list(images[start : start + batch])).to(device).float()
        with run():
            rows.append(network(x).float().cpu())
    return probabilities(torch.cat(rows), kind)


def train_dense(
    network: Network,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    size: tuple[int, ...],
    budget: Budget,
    lr: float,
    seed: int,
    run: Callable[..., Any],
    progress: Callable[[Any], Any],
) -> None:
    """Fit to random crops of `size`, half of them around a labelled voxel; cross entropy plus soft Dice."""
    device = network.device
    places = [torch.nonzero(mask).numpy() for mask in masks]

    def batch_at(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        crops = [_crop(images, masks, places, size, rng) for _ in range(budget.batch)]
        x = torch.stack([c[0] for c in crops]).to(device).float()
        y = torch.stack([c[1] for c in crops]).to(device).long()
        change = torch.from_numpy(rng.uniform(-0.1, 0.1, (2, len(x))).astype(np.float32)).to(device)
        gain, shift = change.view(2, len(x), *[1] * (x.ndim - 1))
        return x * (1 + gain) + shift, y

    _fit(network, budget, lr, seed, batch_at, _dense_loss, run, progress)


def _crop(
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    places: Sequence[np.ndarray],
    size: tuple[int, ...],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    i = int(rng.integers(len(images)))
    image, mask = _padded(images[i], size, -2.0), _padded(masks[i][None], size, 0)[0]
    room = np.array(mask.shape) - size
    if len(places[i]) and rng.random() < 0.5:
        start = np.clip(places[i][rng.integers(len(places[i]))] - rng.integers(np.array(size)), 0, room)
    else:
        start = rng.integers((room + 1).tolist())
    at = tuple(slice(int(a), int(a) + n) for a, n in zip(start, size, strict=True))
    return image[(slice(None), *at)], mask[at]


def _padded(x: Tensor, size: tuple[int, ...], value: float) -> Tensor:
    """At least `size`, filled at the far ends."""
    short = [max(0, s - n) for n, s in zip(x.shape[1:], size, strict=True)]
    return F.pad(x, [p for s in reversed(short) for p in (0, s)], value=value) if any(short) else x


def _dense_loss(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.float()
    entropy = F.cross_entropy(logits, target)
    p = logits.softmax(1).flatten(2)
    y = F.one_hot(target.flatten(1), logits.shape[1]).transpose(1, 2).float()
    # Over the batch: a class that a crop lacks must not punish that crop for its last voxel.
    overlap, total = (p * y).sum((0, 2))[1:], (p + y).sum((0, 2))[1:]
    present = y.sum((0, 2))[1:] > 0
    score = (2 * overlap + 1) / (total + 1)
    return entropy + (1 - score[present].mean() if present.any() else 0.0)


@torch.no_grad()
def predict_dense(
    network: Network, image: Tensor, size: tuple[int, ...], classes: int, batch: int, run: Callable[..., Any]
) -> np.ndarray:
    """Label map of one image [1, *any]: tiles of `size` with half overlap, `batch` at a time, logits averaged."""
    device = network.device
    whole = tuple(image.shape[1:])
    x = _padded(image, size, -2.0)
    shape = tuple(x.shape[1:])
    total = torch.zeros(classes + 1, *shape)
    count = torch.zeros(shape)
    starts = [sorted({*range(0, n - s + 1, max(1, s // 2)), n - s}) for n, s in zip(shape, size, strict=True)]
    tiles = [
        (slice(None), *(slice(a, a + n) for a, n in zip(corner, size, strict=True))) for corner in product(*starts)
    ]
    for first in range(0, len(tiles), batch):
        some = tiles[first : first + batch]
        crops = torch.stack([x[at] for at in some]).to(device).float()
        with run():
            logits = network(crops)
        for at, found in zip(some, logits.float().cpu(), strict=True):
            total[at] += found
            count[at[1:]] += 1
    label = (total / count).argmax(0)
    return label[tuple(slice(0, n) for n in whole)].numpy().astype(np.uint8)


def dense_scores(guesses: Sequence[np.ndarray], masks: Sequence[Tensor], classes: int) -> np.ndarray:
    """[n, C] Dice; NaN where neither has the class."""
    return np.stack([dice(g, cast(Tensor, m).numpy(), classes) for g, m in zip(guesses, masks, strict=True)])
