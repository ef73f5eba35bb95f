"""Overlapping patch embedding: what is compiled and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ahead_of_time import TARGETS
from compile_cases.shapes import WIDTHS, Case, Cost, Family, Floor
from medformer_kernels._dispatch import Chip
from medformer_kernels.patch_embed import fused
from medformer_kernels.patch_embed.geometry import Geometry, resolve

__all__ = ["FAMILY"]


def cases(*, widths: tuple[int, ...] = WIDTHS, size: int = 128) -> Iterator[Case]:
    """One raw channel of two windows, one and 64 channels in both layouts, with all of the epilogue; `width` is E."""

    def case(width: int, dtype: torch.dtype, kind: str, channels: int, kernel: int, stride: int) -> Case:
        raw, last = kind == "raw", kind == "channels last"
        weight = torch.empty(width, channels * (2 if raw else 1), *(kernel,) * 3, dtype=dtype, device="meta")
        geometry = resolve((size,) * 3, kernel, stride=stride, padding=kernel // 2)
        x = torch.empty(2, channels, *(size,) * 3, dtype=torch.int16 if raw else dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
        row = torch.empty(width, dtype=dtype, device="meta")
        tables = [torch.empty(g, width, dtype=dtype, device="meta") for g in geometry.grid]
        tokens = torch.empty(2, geometry.tokens, width, dtype=dtype, device="meta")
        windows = [0.0, 1.0, 0.0, 1.0] * 2 if raw else []

        def backward(*needs: bool) -> None:
            fused.backward(tokens, x, weight, tokens, row, windows, geometry, "zeros", "layer", 1e-6, needs, "fused")

        launches: dict[str, Callable[[], Any]] = {
            "fwd": lambda: fused.forward(
                x, weight, row, row, row, tables, None, windows, geometry, "zeros", "layer", 1e-6, True, "fused"
            ),
            "dw": lambda: backward(False, True, True, True, True),
        }
        if not raw:
            launches["dx"] = lambda: fused.unembed(tokens, weight, None, geometry, "fused")
        name = f"E={width} C={channels} k{kernel} s{stride} {str(dtype)[6:]} {kind}"
        return Case(name=name, width=width, dtype=dtype, launches=launches)

    for width in widths:
        for dtype in (torch.bfloat16, torch.float32):
            yield case(width, dtype, "raw", 1, 7, 4)
            yield case(width, dtype, "channels first", 1, 7, 4)
            yield case(width, dtype, "channels first", 64, 3, 2)
            yield case(width, dtype, "channels last", 64, 3, 2)
            if width == max(WIDTHS):
                yield case(1024, dtype, "channels first", 1, 16, 8)
                yield case(1536, dtype, "channels last", 128, 3, 2)


def costs(
    *, chip: Chip, geometry: Geometry, batch: int, channels: int, width: int, itemsize: int, voxel_bytes: int
) -> dict[str, Cost]:
    """Cost by kernel of a forward and a backward pass with a norm, from the launch plans themselves."""
    taps, tokens = math.prod(geometry.kernel), geometry.tokens
    rows, patch = batch * tokens, channels * taps
    volume = batch * channels * math.prod(geometry.size) * voxel_bytes
    row_bytes = rows * width * itemsize
    flop = 2 * rows * patch * width
    plan = fused.launch_plan(
        "dw", chip=chip, channels=channels, taps=taps, width=width, itemsize=itemsize, tokens=tokens, batch=batch
    )
    partial = 4 * patch * width * plan.slices * batch
    passes = -(-width // plan.block_e)
    return {
        "fwd": Cost(flop=flop, bytes=volume + row_bytes),
        "norm_bwd": Cost(flop=0, bytes=3 * row_bytes),
        "dw": Cost(flop=flop, bytes=passes * volume + row_bytes + 2 * partial),
        "dx": Cost(flop=flop, bytes=volume + row_bytes),
    }


def floors() -> Iterator[Floor]:
    """The two shapes of the targets, bf16 on an H200."""
    for channels, width, kernel, stride, size in ((1, 64, 7, 4, 256), (64, 128, 3, 2, 64)):
        geometry: Geometry = resolve((size,) * 3, kernel, stride=stride, padding=kernel // 2)
        by_kernel = costs(
            chip=TARGETS["sm_90"].chip, geometry=geometry, batch=1, channels=channels, width=width, itemsize=2,
            voxel_bytes=2,
        )  # fmt: skip
        volume, tokens = channels * size**3 * 2, geometry.tokens * width * 2
        passes = {"forward": (("fwd",), volume + tokens), "backward": (("norm_bwd", "dw"), volume + 2 * tokens)}
        for direction, (kernels, least) in passes.items():
            yield Floor.of(
                f"patch_embed {channels}x{size}^3 k{kernel} s{stride} E={width} bf16",
                direction,
                (by_kernel[kernel] for kernel in kernels),
                least,
            )


FAMILY = Family(cases=cases, floors=floors)
