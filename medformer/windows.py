"""A network slid over a scan of any size: voxel outputs blended, a plane at a time, in as much memory as is allowed.

Where windows lie, and how much each counts in a voxel, follow from the sizes of scan and window alone; how many are
computed together changes rounding at most. Windows count by a Gaussian around their middle, so that no seam shows where
one ends. Planes come from z = 0 on, as soon as no later window reaches them: a ring as deep as a window holds the rest.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["AIR", "OVERLAP", "blended", "blended_bytes", "live_bytes", "starts_of", "tile_weight"]

AIR = -2.0
"""What fills a scan that is smaller than a window: the normalised value of air."""
OVERLAP = 0.375
"""Of neighbouring windows, at least, as a share of their size."""
_TAIL = 0.125  # standard deviation of a window's weights as a share of its size


def tile_weight(size: Sequence[int]) -> Tensor:
    """A Gaussian around the middle of a window, 1 at its highest, nowhere below 0.001."""
    weight = torch.ones(())
    for n in size:
        away = (torch.arange(n) - (n - 1) / 2) / (_TAIL * n)
        weight = weight[..., None] * (-0.5 * away.square()).exp()
    return (weight / weight.max()).clamp(min=1e-3)


def starts_of(size: int, window: int, overlap: float = OVERLAP) -> list[int]:
    """First voxel of each window along an axis: evenly from end to end, as few as overlap by that share or more."""
    count = math.ceil((size - window) / max(1.0, (1 - overlap) * window)) + 1
    return [round(i * (size - window) / max(1, count - 1)) for i in range(count)]


@torch.no_grad()
def blended(
    network: Callable[[Tensor], Tensor],
    cut: Callable[[Sequence[int], Sequence[int]], Tensor],
    size: Sequence[int],
    window: Sequence[int],
    *,
    batch: int,
    overlap: float = OVERLAP,
    device: torch.device | str = "cpu",
    run: Callable[..., Any] = nullcontext,
) -> Iterator[Tensor]:
    """Outputs [K, Y, X] float32 of each plane, blended over windows; of an image [K, Y, X] at once.

    Args:
        network: [B, C, *window] to [B, K, *window].
        cut: of a start and a size the voxels [C, *size], `AIR` beyond the far ends of the scan.
        size: voxels of the scan, zyx or yx; window: likewise. A scan that is smaller is one window along that axis.
        batch: windows at a time.
        run: a context for the network alone, for example autocast.
    """
    flat = len(size) == 2
    tile = (1, *window) if flat else tuple(window)
    shape = [max(n, w) for n, w in zip((1, *size) if flat else size, tile, strict=True)]
    rows, columns = size[-2:]
    starts = [starts_of(n, w, overlap) for n, w in zip(shape, tile, strict=True)]
    places = list(product(starts[1], starts[2]))
    weight, depth, done = tile_weight(window).view(tile).to(device), tile[0], 0
    ring: Tensor | None = None  # [K + 1, depth, Y, X]: plane z lies at z % depth; the last channel sums the weights

    def finished(z: int) -> Tensor:
        assert ring is not None
        plane = ring[:, z % depth]
        out = (plane[:-1] / plane[-1])[:, :rows, :columns]
        plane.zero_()
        return out

    for layer in starts[0]:
        while done < layer:
            yield finished(done)
            done += 1
        for first in range(0, len(places), batch):
            some = [((layer, y, x)[3 - len(size) :], y, x) for y, x in places[first : first + batch]]
            crops = torch.stack([cut(at, window) for at, _, _ in some]).to(device).float()
            with run():
                found = network(crops)
            found = found.float().view(len(some), -1, *tile)
            if ring is None:
                ring = torch.zeros(found.shape[1] + 1, depth, *shape[1:], device=device)
            # The window covers the whole ring, from where its first plane lies to the end, and on from the start.
            turn = layer % depth
            for logits, (_, y, x) in zip(found, some, strict=True):
                part = ring[:, :, y : y + tile[1], x : x + tile[2]]
                for into, of in (
                    (slice(turn, None), slice(0, depth - turn)),
                    (slice(0, turn), slice(depth - turn, None)),
                ):
                    part[:-1, into].addcmul_(logits[:, of], weight[of])
                    part[-1, into] += weight[of]
    for z in range(done, 1 if flat else size[0]):
        yield finished(z)


def blended_bytes(size: Sequence[int], window: Sequence[int], outputs: int) -> int:
    """What `blended` holds besides its windows."""
    shape = [max(n, w) for n, w in zip(size, window, strict=True)]
    depth = window[0] if len(size) == 3 else 1
    return 4 * (outputs + 1) * (depth + 1) * shape[-2] * shape[-1]


class _Live(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that came up inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.users:
            self.users[key] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.users[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


@torch.no_grad()
def live_bytes(network: nn.Module, x: Tensor, run: Callable[..., Any] = nullcontext) -> int:
    """Memory that `network(x)` needs beyond its weights, by running it: the largest sum of live tensors, and as much
    again for what an operator allocates inside."""
    live = _Live()
    with live, run():
        network(x)
    return 2 * live.most + x.nbytes
