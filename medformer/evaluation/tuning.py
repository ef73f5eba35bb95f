"""Networks trained on labels: frozen transformer (FPT), full fine-tuning, from scratch, attentive heads, peers.

All share one loop, one budget and one augmentation, so that what differs between two methods is what they start from
and what may move. FPT: what `medformer.freeze_for_transfer` leaves free (Lu et al. 2021, "Pretrained Transformers as
Universal Computation Engines"), and the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer import freeze_for_transfer
from medformer.channels import flagged
from medformer.evaluation.dense import DenseHead, LinearHead, UNet
from medformer.evaluation.fitting import Budget, fit
from medformer.evaluation.probes import AttentiveHead, balance_of, loss_of, probabilities
from medformer.features import Features
from medformer.models import Encoder, ImageGPT, Model, ResNet
from medformer.resnet import ResNetConfig

__all__ = ["PEERS", "Network", "Together", "peer", "predict", "train_classifier"]

PEERS = ("unet", "resnet")  # networks of their own, from scratch, that know nothing of the checkpoint
_DROPPED = 0.1  # share of the sequences that training leaves out, where some may be missing
FROZEN = ("attentive", "linear", "decoder")  # methods whose backbone does not move


class Network(nn.Module):
    """Backbone and head. The head of a classifier reads the summary and the mean patch token.

    Attributes:
        number: mean and deviation of the numbers that a regression was trained on; its output is such a number.
        flags: sequences that may be missing, or 0. One that is (NaN in every voxel) becomes zeros, and of its further
            channel, which is 0 for all others, ones; in training some are left out at random.
    """

    number: Tensor | None

    def __init__(
        self, backbone: Model, method: str, classes: int, dense: bool, *, number: tuple[float, float] | None = None,
        flags: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.method, self.dense, self.flags = backbone, method, dense, flags
        self.register_buffer("number", None if number is None else torch.tensor(number, dtype=torch.float64))
        width = backbone.config.width
        if dense:
            assert not isinstance(backbone, ImageGPT)
            self.head: Any = (LinearHead if method == "linear" else DenseHead)(backbone, classes + 1)
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

    def layers(self, x: Tensor) -> list[Features]:
        """What the dense head reads of the backbone."""
        return self._layers(self._flagged(x, False) if self.flags else x)

    def _layers(self, x: Tensor) -> list[Features]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method not in FROZEN):
            return cast(Encoder, self.backbone).get_intermediate_layers(x, self.head.layers)

    def forward(self, x: Tensor, layers: list[Features] | None = None) -> Tensor:
        """`layers`: of `x`, where they are known already."""
        out = self._answer(self._flagged(x, self.training and layers is None) if self.flags else x, layers)
        if self.number is None:
            return out
        centre, spread = self.number.unbind()
        return out.double() * spread + centre

    def _flagged(self, x: Tensor, drop: bool) -> Tensor:
        """[B, flags, *size] to [B, 2 * flags, *size]."""
        missing = x.flatten(2)[:, :, 0].isnan()  # [B, flags]
        if drop:
            dropped = missing | (torch.rand(missing.shape, device=x.device) < _DROPPED)
            missing = torch.where(dropped.all(1, keepdim=True), missing, dropped)
        return flagged(x, missing)

    def _answer(self, x: Tensor, layers: list[Features] | None) -> Tensor:
        if self.dense:
            return self.head(x, self._layers(x) if layers is None else layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method not in FROZEN):
            features = self.backbone.forward_features(x)
        if self.method == "attentive":
            return self.head(features.patches)
        return self.head(torch.cat([features.cls, features.patches.mean(1)], dim=1))


class Together(nn.Module):
    """Dense networks over one frozen backbone, whose features are computed once: outputs [B, R * K, *size]."""

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        layers = cast(Network, self.networks[0]).layers(x)
        return torch.cat([network(x, layers) for network in self.networks], 1)


def peer(
    name: str, dims: int, classes: int, channels: int = 1, number: tuple[float, float] | None = None
) -> UNet | Network:
    """A network to measure against besides one's own scratch: a plain U-Net for masks, a small ResNet for classes."""
    if name == "unet":
        return UNet(dims, channels, classes + 1)
    backbone = ResNet(ResNetConfig(dims=dims, in_channels=channels, depth=10, base_width=32, output_stride=8))
    return Network(backbone, name, classes, dense=False, number=number)


def _heads(width: int) -> int:
    """Heads of about 64 channels, of which `width` is a multiple."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


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
    **more: Any,
) -> None:
    """Fit `network` to `images` ([C, *size] each) in place; each class counts alike. more: for `fit`."""
    device = network.device
    if network.number is None:
        balance = balance_of(target, classes)
        loss = partial(loss_of, balance=None if balance is None else balance.to(device))
    else:
        # Huber: a few cases far off must not rule all others.
        loss = partial(_number_loss, spread=float(network.number[1]))

    def batch_at(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        pick = rng.integers(len(images), size=budget.batch)
        x = torch.stack([images[i] for i in pick]).to(device, non_blocking=True).float()
        return _augment(x, rng), target[torch.from_numpy(pick)].to(device)

    fit(network, budget, lr, seed, batch_at, loss, run, progress, **more)


def _number_loss(guess: Tensor, target: Tensor, spread: float) -> Tensor:
    return F.smooth_l1_loss(guess.double() / spread, target.double() / spread)


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
    """[n, C] probabilities, or numbers [n, 1]."""
    device = network.device
    rows = []
    for start in range(0, len(images), batch):
        x = torch.stack(list(images[start : start + batch])).to(device).float()
        with run():
            rows.append(network(x).double().cpu())
    return probabilities(torch.cat(rows), kind)
