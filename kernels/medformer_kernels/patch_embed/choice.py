"""Which path computes a patch embedding, and why: by measurements shipped in configs/patch_embed.json.

Nothing is the fastest everywhere, not even on one device: convolution in either layout, gathering + matrix product,
the Triton kernel on a GPU. For each device and dtype that was measured (`python benchmarks/bench_patch_embed.py
--write`) the table holds the times of each over a lattice of shapes, forward alone and forward with backward; a new
shape takes the winner of the nearest one, near in the logarithms of channels, taps, width and tokens. Patches that
tile the volume have entries of their own, where gathering is a reshape. A channels-last volume stays so.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from medformer_kernels._dispatch import load_configs
from medformer_kernels.patch_embed.geometry import Geometry

__all__ = ["Choice", "choose"]


class Choice(NamedTuple):
    """A path of `patch_embed` ('fused', 'matmul', 'im2col', 'conv', 'conv_channels_last') and the reason for it."""

    path: str
    reason: str


@functools.lru_cache(maxsize=4096)
def choose(
    geometry: Geometry,
    *,
    channels: int,
    width: int,
    dtype: torch.dtype,
    raw: bool,
    device: str,
    backend: str,
    training: bool = False,
    channels_last: bool = False,
) -> Choice:
    """`device` is 'cpu' or the name of a GPU's architecture; `backend` 'triton', 'torch' or 'auto': either of them.

    `raw`: voxels are windowed on load; `training`: a backward pass follows.
    """
    if backend == "triton":
        return Choice("fused", "backend='triton' was asked for")
    if backend == "auto" and raw:
        return Choice("fused", "the Triton kernel alone windows voxels on load")
    table = load_configs("patch_embed")["paths"].get(f"{device} {'bfloat16' if dtype.itemsize == 2 else 'float32'}")
    if table is None:
        path = "matmul" if geometry.tiles else "fused" if backend == "auto" else "conv"
        return Choice(path, f"nothing was measured on {device}")
    entry = _nearest(table, geometry.tiles, channels, math.prod(geometry.kernel), width, geometry.tokens)
    times = {
        path: ms for path, ms in entry["step_ms" if training else "ms"].items() if path != "fused" or backend == "auto"
    }
    path = min(times, key=lambda name: times[name])
    if channels_last and path == "conv":
        path = "conv_channels_last"
    at = tuple(entry[name] for name in _SHAPE)
    shown = ", ".join(f"{name} {ms:g} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    return Choice(path, f"nearest measured shape (channels, taps, width, tokens) = {at}: {shown}")


_SHAPE = ("channels", "taps", "width", "tokens")


def _nearest(table: list[dict], tiles: bool, *wanted: int) -> dict:
    def distance(entry: dict) -> float:
        # width and tokens scale all paths nearly alike; channels and taps decide
        weights = (1.0, 1.0, 0.5, 0.25)
        return sum(w * abs(math.log2(a / entry[b])) for w, a, b in zip(weights, wanted, _SHAPE, strict=True))

    return min((entry for entry in table if entry["tiles"] == tiles), key=distance)
