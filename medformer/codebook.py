"""Scans as sequences of whole numbers: patches of voxels, k-means, and the order in which they are read.

With patches of one voxel the codebook holds grey values (Image-GPT's colours); larger ones allow high resolution.
Shape legend: B batch, Ch channels, K entries, P values of a patch (its voxels in every channel), N patches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Codebook", "kmeans", "morton_order"]

_CHUNK = 1 << 20  # distances held at once: they stay in the cache


class Codebook(nn.Module):
    """K patches of normalised voxels; each patch of a scan is represented by the index of the nearest.

    Args:
        entries: K.
        patch: voxels of a patch along each axis (zyx or yx).
        scale: what the voxels are, for instance "HU / 500" or "z-score": part of what has to fit.
        channels: Ch; a patch holds the voxels of all of them, channel by channel.
    """

    centres: Tensor

    def __init__(self, entries: int, patch: tuple[int, ...], *, scale: str = "", channels: int = 1) -> None:
        super().__init__()
        if entries < 2 or min(patch) < 1 or len(patch) not in (2, 3):
            raise ValueError(f"Codebook: entries={entries} and patch={patch} must be at least 2 and 1, on 2 or 3 axes")
        self.patch = tuple(patch)
        self.scale = scale
        self.channels = channels
        self.register_buffer("centres", torch.zeros(entries, channels * math.prod(patch)))

    def patches(self, x: Float[Tensor, "B Ch *size"]) -> Float[Tensor, "B N P"]:
        """The patches of scans in raster order; ValueError where they do not tile the scan."""
        size = x.shape[2:]
        if (
            x.ndim != len(self.patch) + 2
            or x.shape[1] != self.channels
            or any(n % p for n, p in zip(size, self.patch, strict=True))
        ):
            raise ValueError(
                f"Codebook: input of shape {tuple(x.shape)} must be (batch, {self.channels}, size) with a size "
                f"that patches of {'x'.join(map(str, self.patch))} tile; crop or pad it"
            )
        split = [part for n, p in zip(size, self.patch, strict=True) for part in (n // p, p)]
        axes = range(2, 2 * len(self.patch) + 1, 2)
        x = x.reshape(*x.shape[:2], *split).permute(0, *axes, 1, *(a + 1 for a in axes))
        return x.flatten(len(self.patch) + 1).flatten(1, len(self.patch))

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "B Ch *size"]) -> Int[Tensor, "B N"]:
        """Numbers of the patches, in raster order."""
        patches = self.patches(x)
        return _nearest(patches.flatten(0, 1).float(), self.centres).view(patches.shape[:2])

    @torch.no_grad()
    def decode(self, tokens: Int[Tensor, "B N"], grid: tuple[int, ...]) -> Float[Tensor, "B Ch *size"]:
        """The scans that `encode` would turn into these numbers, to the nearest entry."""
        dims = len(self.patch)
        x = self.centres[tokens].unflatten(1, grid).unflatten(-1, (self.channels, *self.patch))
        order = [0, 1 + dims, *(axis for a in range(dims) for axis in (1 + a, 2 + dims + a))]
        return x.permute(order).reshape(
            tokens.shape[0], self.channels, *(g * p for g, p in zip(grid, self.patch, strict=True))
        )

    def fit(self, patches: Float[Tensor, "n P"], *, seed: int = 0) -> float:
        """Set the entries by k-means; returns the mean squared error a voxel.

        Raises:
            ValueError: fewer different patches than entries.
        """
        self.centres.copy_(kmeans(patches.float(), len(self.centres), seed=seed))
        found = self.centres[_nearest(patches.float(), self.centres)]
        return float((found - patches).square().mean())


def _nearest(x: Float[Tensor, "n P"], centres: Float[Tensor, "K P"]) -> Int[Tensor, " n"]:
    # Autocast would round the distances; |x|^2 is the same for all entries.
    with torch.autocast(x.device.type, enabled=False):
        half = centres.square().sum(1) / 2
        # A graph that leaves the batch open has no number of parts.
        parts = (x,) if torch.compiler.is_compiling() else x.split(max(1, _CHUNK // len(centres)))
        return torch.cat([(half - part @ centres.T).argmin(1) for part in parts])


@torch.no_grad()
def kmeans(x: Float[Tensor, "n P"], k: int, *, seed: int = 0, iterations: int = 30) -> Float[Tensor, "k P"]:
    """Lloyd's algorithm from k different points of the data, drawn by seed; entries in the order of their mean.

    An entry that loses all its points goes on at the point worst served. The same data and seed give the same entries
    on the same machine. Source: Lloyd 1982.

    Raises:
        ValueError: fewer than k different points.
    """
    distinct = torch.unique(x, dim=0)
    if len(distinct) < k:
        raise ValueError(f"kmeans: {len(distinct)} different points are too few for k={k}; use more data or a lower k")
    generator = torch.Generator().manual_seed(seed)
    if x.shape[1] == 1:  # evenly spread quantiles: nearly there already
        centres = distinct[torch.linspace(0, len(distinct) - 1, k).round().long()].clone()
    else:
        centres = distinct[torch.randperm(len(distinct), generator=generator)[:k].to(x.device)].clone()
    before = None
    for _ in range(iterations):
        nearest = _nearest(x, centres)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        lost = counts == 0
        if bool(lost.any()):
            worst = (x - centres[nearest]).square().sum(1).argsort(descending=True, stable=True)[: int(lost.sum())]
            sums[lost], counts[lost] = x[worst], 1
        centres = sums / counts[:, None]
    return centres[centres.mean(1).argsort(stable=True)]


def morton_order(grid: tuple[int, ...]) -> Int[Tensor, " N"]:
    """Raster indices of a grid's cells along the Z-order curve: neighbours in space stay close in the sequence.

    The bits of the coordinates are interleaved, last axis lowest. Any grid; it need not be a power of two.
    Source: Morton 1966.
    """
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    code = torch.zeros(grid, dtype=torch.int64)
    for bit in range(max(n - 1 for n in grid).bit_length()):
        for place, axis in enumerate(reversed(axes)):
            code |= ((axis >> bit) & 1) << (bit * len(grid) + place)
    return code.flatten().argsort(stable=True)
