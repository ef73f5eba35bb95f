"""Voxels from tokens: heads of segmentation, the crops they learn from, their loss, and prediction by tiles.

`DenseHead` reaches full resolution: a short path of convolutions from the voxels, joined at its coarsest level by the
tokens of several depths, as in UNETR (Hatamizadeh et al. 2022) and ViT-Adapter (Chen et al. 2023). Differs: the tokens
are interpolated to where they stand, so that any stride, overlap and grid fits; two levels of the path and no third, so
that context comes from the backbone. `LinearHead` is the probe: `patch_unembed` with a learned kernel, nothing else.
`UNet` is the peer, the plainest network of the field, and the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medformer import footprint
from medformer.evaluation.fitting import Budget, fit_together
from medformer.evaluation.scores import dice
from medformer.features import Features
from medformer.footprint import Footprint
from medformer.models import TNT, Backbone, Encoder, ResNet, SliceEncoder
from medformer.windows import AIR, blended
from medformer_kernels import patch_unembed
from medformer_kernels._tracing import certain

__all__ = [
    "CHANNELS", "DenseHead", "LinearHead", "UNet", "blended_logits", "dense_loss", "dense_scores", "label_map",
    "padded", "predict_dense", "train_dense", "train_dense_together",
]  # fmt: skip

CHANNELS = (16, 32, 64)
"""Of the levels at full, half and quarter resolution, of `UNet` and of `DenseHead` (whose last holds tokens too)."""
_GROUPS = 8
_DEPTHS = 2  # of a transformer: so many blocks, evenly spaced, the last among them


class LinearHead(nn.Module):
    """Tokens of the last layer to voxels [B, K, *size]: `patch_unembed` with a learned kernel."""

    def __init__(self, backbone: Encoder, channels: int) -> None:
        super().__init__()
        seen = footprint(backbone)
        self.layers = [_layers(backbone)[-1]]
        self.geometry: dict[str, Any] = {"stride": seen.stride, "padding": seen.padding}
        width = backbone.config.width
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.empty(width, channels, *seen.reach))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, features: Sequence[Features]) -> Tensor:
        """x: the voxels, of which only the size counts. features: of `layers`."""
        tokens, grid = self.norm(features[-1].patches.float()), features[-1].grid
        with torch.autocast(tokens.device.type, enabled=False):
            return patch_unembed(
                tokens.float().contiguous(), self.weight, self.bias, grid=grid, size=tuple(x.shape[2:]), **self.geometry
            )


class DenseHead(nn.Module):
    """Voxels and tokens of several depths to voxels [B, K, *size].

    Attributes:
        layers: blocks (of a residual network stages) whose features `forward` takes.
    """

    def __init__(self, backbone: Encoder, channels: int, widths: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        config, dims = backbone.config, backbone.config.dims
        self.layers = _layers(backbone)
        self.seen = [_footprint_at(backbone, layer) for layer in self.layers]
        self.steps = _steps(self.seen[-1].stride, len(widths))
        fine, coarse = list(widths[:-1]), widths[-1]
        self.down = _Down(dims, config.in_channels, fine, self.steps)
        self.ratio = _ratio(*self.steps[-2:])
        into = [_width_at(backbone, layer) for layer in self.layers]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in into)
        self.tokens = nn.ModuleList(nn.Linear(width, coarse, bias=False) for width in into)
        self.mix = _block(dims, fine[-1] + coarse, coarse, coarse)
        self.up = _Up(dims, [*fine, coarse], self.steps)
        self.out = _conv(dims, fine[0], channels, (1,) * dims, bias=True)

    def forward(self, x: Tensor, features: Sequence[Features]) -> Tensor:
        """x: the voxels. features: of `layers`."""
        maps = self.down(x)
        low = _pooled(maps[-1], self.ratio)
        places, read = tuple(low.shape[2:]), []
        for norm, linear, seen, found in zip(self.norms, self.tokens, self.seen, features, strict=True):
            tokens = linear(norm(found.patches)).transpose(1, 2).unflatten(2, found.grid)
            read.append(_at_places(tokens, seen, self.steps[-1], places))
        low = self.mix(torch.cat([low, torch.stack(read).sum(0).to(low.dtype)], 1))
        return self.out(self.up(low, maps)).float()


class UNet(nn.Module):
    """A plain U-Net: two convolutions a level, pooling between, group norm; knows nothing of any backbone."""

    def __init__(self, dims: int, in_channels: int, channels: int, widths: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.steps = [(2**level,) * dims for level in range(len(widths))]
        self.down = _Down(dims, in_channels, list(widths), self.steps)
        self.up = _Up(dims, list(widths), self.steps)
        self.out = _conv(dims, widths[0], channels, (1,) * dims, bias=True)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> Tensor:
        *maps, low = self.down(x)
        return self.out(self.up(low, maps)).float()


class _Down(nn.Module):
    """Maps of every level, finest first; place j of an axis of a level stands for `step` voxels from j * step on."""

    def __init__(self, dims: int, in_channels: int, widths: list[int], steps: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.ratios = [_ratio(*pair) for pair in pairwise(steps[: len(widths)])]
        into = [in_channels, *widths]
        self.blocks = nn.ModuleList(_block(dims, a, b, b) for a, b in pairwise(into))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.blocks[0](x)]
        for ratio, block in zip(self.ratios, self.blocks[1:], strict=True):
            maps.append(block(_pooled(maps[-1], ratio)))
        return maps


class _Up(nn.Module):
    """From the coarsest map to the finest, each joined with what came down."""

    def __init__(self, dims: int, widths: list[int], steps: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        conv: Any = nn.ConvTranspose3d if dims == 3 else nn.ConvTranspose2d
        ratios = [_ratio(*pair) for pair in pairwise(steps)]
        self.grows = nn.ModuleList(
            conv(b, a, ratio, stride=ratio) for (a, b), ratio in zip(pairwise(widths), ratios, strict=True)
        )
        self.blocks = nn.ModuleList(_block(dims, 2 * width, width, width) for width in widths[:-1])

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        for grow, block, finer in zip(reversed(self.grows), reversed(self.blocks), reversed(maps), strict=True):  # type: ignore[call-overload]
            x = grow(x)[(..., *(slice(0, n) for n in finer.shape[2:]))]
            x = block(torch.cat([x, finer], 1))
        return x


def _block(dims: int, *widths: int) -> nn.Sequential:
    """3x3 convolutions from width to width, each with group norm and a leaky ReLU."""
    parts: list[nn.Module] = []
    for a, b in pairwise(widths):
        parts += [
            _conv(dims, a, b, (3,) * dims, padding=1),
            nn.GroupNorm(math.gcd(_GROUPS, b), b),
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return nn.Sequential(*parts)


def _conv(
    dims: int, a: int, b: int, kernel: tuple[int, ...], *, padding: int | None = None, bias: bool = False
) -> nn.Module:
    """Steps by its kernel where no padding is given."""
    kind: Any = nn.Conv3d if dims == 3 else nn.Conv2d
    more = {"stride": kernel} if padding is None else {"padding": padding}
    made = kind(a, b, kernel, bias=bias, **more)
    nn.init.kaiming_normal_(made.weight, a=0.01)
    return made


def _steps(stride: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    """Voxels between places of every level: doubling, on each axis up to the largest power of 2 within the tokens'."""
    most = [2 ** (s.bit_length() - 1) for s in stride]
    return [tuple(min(2**level, m) for m in most) for level in range(levels)]


def _ratio(fine: tuple[int, ...], coarse: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(c // f for f, c in zip(fine, coarse, strict=True))


def _pooled(x: Tensor, ratio: tuple[int, ...]) -> Tensor:
    """The largest of `ratio` places; the last ones of an axis may be of fewer."""
    pool: Any = F.max_pool3d if x.ndim == 5 else F.max_pool2d
    return pool(x, ratio, ceil_mode=True) if max(ratio) > 1 else x


def _at_places(tokens: Tensor, seen: Footprint, step: tuple[int, ...], places: tuple[int, ...]) -> Tensor:
    """Tokens [B, C, *grid] interpolated linearly, axis by axis, from their middles to those of places `step` apart."""
    for axis, count in enumerate(places):
        number = tokens.shape[2 + axis]
        first = (seen.reach[axis] - 1) / 2 - seen.padding[axis]
        middles = torch.arange(count, dtype=torch.float64) * step[axis] + (step[axis] - 1) / 2
        at = ((middles - first) / seen.stride[axis]).clamp(0, number - 1)
        aligned = step[axis] == seen.stride[axis] and first == (step[axis] - 1) / 2
        if aligned and certain(number == count):  # each token stands at its place
            continue
        gain = (1 - (at[:, None] - torch.arange(number)).abs()).clamp(min=0).to(tokens)  # [count, number]
        tokens = (tokens.movedim(2 + axis, -1) @ gain.T).movedim(-1, 2 + axis)
    return tokens


def _inside(backbone: Encoder) -> Backbone | ResNet | TNT:
    """The encoder of slices, where there is one."""
    return backbone.encoder if isinstance(backbone, SliceEncoder) else backbone


def _layers(backbone: Encoder) -> list[int]:
    """Every stage of a residual network; of the others blocks evenly spaced."""
    inside = _inside(backbone)
    if isinstance(inside, ResNet):
        return list(range(inside.config.stages))
    depth = len(inside.stages if isinstance(inside, TNT) else inside.blocks)
    count = min(_DEPTHS, depth)
    return [depth * (i + 1) // count - 1 for i in range(count)]


def _footprint_at(backbone: Encoder, layer: int) -> Footprint:
    """Of a residual network's stages each has its own."""
    last, inside = footprint(backbone), _inside(backbone)
    if not isinstance(inside, ResNet):
        return last
    step, dims = 4 * math.prod(inside.config.strides[: layer + 1]), inside.config.dims
    return Footprint(
        reach=(*last.reach[:-dims], *(2 * step + 1,) * dims),
        stride=(*last.stride[:-dims], *(step,) * dims),
        padding=(*last.padding[:-dims], *(step,) * dims),
    )


def _width_at(backbone: Encoder, layer: int) -> int:
    inside = _inside(backbone)
    if not isinstance(inside, ResNet):
        return inside.config.width
    return inside.config.base_width * 2**layer * inside.config.expansion


def train_dense(
    network: nn.Module,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    size: tuple[int, ...],
    budget: Budget,
    lr: float,
    seed: int,
    run: Callable[..., Any],
    progress: Callable[[Any], Any],
    **more: Any,
) -> None:
    """Fit to random crops of `size`, half of them around a labelled voxel; cross entropy plus soft Dice.

    more: for `fit`.
    """
    train_dense_together([network], images, masks, size, budget, [lr], seed, run, progress, None, **more)


def train_dense_together(
    networks: Sequence[nn.Module],
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    size: tuple[int, ...],
    budget: Budget,
    lrs: Sequence[float],
    seed: int,
    run: Callable[..., Any],
    progress: Callable[[Any], Any],
    shared: Callable[[Tensor], Any] | None,
    **more: Any,
) -> None:
    """`train_dense` of several networks on the same crops, as `fitting.fit_together` does it."""
    device = next(networks[0].parameters()).device
    places = [torch.nonzero(mask).numpy() for mask in masks]

    def batch_at(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        crops = [_crop(images, masks, places, size, rng) for _ in range(budget.batch)]
        x = torch.stack([c[0] for c in crops]).to(device).float()
        y = torch.stack([c[1] for c in crops]).to(device).long()
        change = torch.from_numpy(rng.uniform(-0.1, 0.1, (2, len(x))).astype(np.float32)).to(device)
        gain, shift = change.view(2, len(x), *[1] * (x.ndim - 1))
        return x * (1 + gain) + shift, y

    fit_together(networks, budget, lrs, seed, batch_at, dense_loss, run, progress, shared, **more)


def _crop(
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    places: Sequence[np.ndarray],
    size: tuple[int, ...],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    i = int(rng.integers(len(images)))
    image, mask = padded(images[i], size, AIR), padded(masks[i][None], size, 0)[0]
    room = np.array(mask.shape) - size
    if len(places[i]) and rng.random() < 0.5:
        start = np.clip(places[i][rng.integers(len(places[i]))] - rng.integers(np.array(size)), 0, room)
    else:
        start = rng.integers((room + 1).tolist())
    at = tuple(slice(int(a), int(a) + n) for a, n in zip(start, size, strict=True))
    return image[(slice(None), *at)], mask[at]


def padded(x: Tensor, size: tuple[int, ...], value: float) -> Tensor:
    """At least `size`, filled at the far ends."""
    short = [max(0, s - n) for n, s in zip(x.shape[1:], size, strict=True)]
    return F.pad(x, [p for s in reversed(short) for p in (0, s)], value=value) if any(short) else x


def dense_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy plus 1 - soft Dice of the classes that the batch holds."""
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
    network: nn.Module, image: Tensor, size: tuple[int, ...], classes: int, batch: int, run: Callable[..., Any]
) -> np.ndarray:
    """Label map of one image [C, *any]: overlapping tiles of `size`, `batch` at a time, logits blended."""
    return label_map(blended_logits(network, image, size, batch, run), image)


def label_map(logits: Tensor, image: Tensor) -> np.ndarray:
    """The likeliest class of every voxel of `image` [C, *any], without what it was filled up with."""
    return logits.argmax(0)[tuple(slice(0, n) for n in image.shape[1:])].numpy().astype(np.uint8)


def blended_logits(
    network: nn.Module, image: Tensor, size: tuple[int, ...], batch: int, run: Callable[..., Any]
) -> Tensor:
    """[K, *any] float32 outputs for an image [C, *any], of the network slid over it."""
    x, device = padded(image, size, AIR), next(network.parameters()).device

    def cut(start: Sequence[int], window: Sequence[int]) -> Tensor:
        return x[(slice(None), *(slice(a, a + n) for a, n in zip(start, window, strict=True)))]

    planes = list(blended(network, cut, image.shape[1:], size, batch=batch, device=device, run=run))
    return (torch.stack(planes, 1) if image.ndim == 4 else planes[0]).cpu()


def dense_scores(guesses: Sequence[np.ndarray], masks: Sequence[Tensor], classes: int) -> np.ndarray:
    """[n, C] Dice; NaN where neither has the class."""
    return np.stack([dice(g, cast(Tensor, m).numpy(), classes) for g, m in zip(guesses, masks, strict=True)])
