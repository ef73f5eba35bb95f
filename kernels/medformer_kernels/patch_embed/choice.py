"""Which path computes a patch embedding, and why: by measurements shipped in configs/patch_embed.json.

On a CPU none of convolution, channels-last convolution and gathering + matrix product is the fastest everywhere. The
table holds the times of each over a lattice of shapes, forward alone and forward with backward; a new shape takes the
winner of the nearest one, near in the logarithms of channels, taps, width and tokens. Patches that tile the volume
have entries of their own, where gathering is a reshape. A volume that lies channels last stays so.
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
    """`backend` as resolved; `raw`: voxels are windowed on load; `training`: a backward pass follows."""
    if backend == "triton":
        if geometry.tiles and not raw and device != "cpu":
            return Choice("matmul", "kernel equals stride: one matrix product")
        return Choice("fused", "the Triton kernel; no GPU measurement against the library is shipped yet")
    if device != "cpu":
        path = "matmul" if geometry.tiles else "conv"
        return Choice(path, f"no measurement is shipped for torch on {device}")
    taps = math.prod(geometry.kernel)
    times, at = _nearest(dtype, geometry.tiles, training, channels, taps, width, geometry.tokens)
    path = min(times, key=lambda name: times[name])
    if channels_last and path == "conv":
        path = "conv_channels_last"
    shown = ", ".join(f"{name} {ms:g} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    return Choice(path, f"nearest measured shape (channels, taps, width, tokens) = {at}: {shown}")


def _nearest(
    dtype: torch.dtype, tiles: bool, training: bool, channels: int, taps: int, width: int, tokens: int
) -> tuple[dict[str, float], tuple[int, int, int, int]]:
    table = load_configs("patch_embed")["cpu_paths"]["bfloat16" if dtype.itemsize == 2 else "float32"]

    def distance(entry: dict) -> float:
        shape = (entry["channels"], entry["taps"], entry["width"], entry["tokens"])
        # width and tokens scale all paths nearly alike; channels and taps decide
        weights = (1.0, 1.0, 0.5, 0.25)
        wanted = (channels, taps, width, tokens)
        return sum(w * abs(math.log2(a / b)) for w, a, b in zip(weights, shape, wanted, strict=True))

    entry = min((entry for entry in table if entry["tiles"] == tiles), key=distance)
    at = (entry["channels"], entry["taps"], entry["width"], entry["tokens"])
    return entry["step_ms" if training else "ms"], at
