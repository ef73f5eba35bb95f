"""Patch embedding + LayerNorm against the library's convolution in both layouts, and unfold + matrix product.

Every implementation gets the same voxels and weights, and its output is checked before it is timed. What cannot run
here is skipped.

    python benchmarks/bench_patch_embed.py --write     # measure the paths on this device: configs/patch_embed.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import medformer_kernels
from config_files import dump
from measuring import DEVICE, cpu_peak_memory_mib, environment, floor_ms, peak_memory_mib
from medformer_kernels import hu_window, patch_embed, patch_embed_choice
from medformer_kernels.patch_embed import ops

ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)


class Shape(NamedTuple):
    channels: int
    width: int
    kernel: int
    stride: int
    size: tuple[int, ...]
    batch: int = 1

    @property
    def padding(self) -> int:
        return 0 if self.kernel == self.stride else self.kernel // 2

    @property
    def grid(self) -> list[int]:
        return [(n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.size]

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        return f"{self.channels}to{self.width}-k{self.kernel}s{self.stride}-{size}"


SHAPES = (
    [
        Shape(1, 64, 7, 4, (256,) * 3),
        Shape(64, 128, 3, 2, (64,) * 3),
        Shape(1, 96, 3, 2, (192,) * 3),
        Shape(1, 768, 16, 16, (256,) * 3),
        Shape(1, 768, 16, 8, (256,) * 3),
        Shape(4, 96, 7, 4, (160,) * 3),
        Shape(2, 32, 3, 1, (128,) * 3),
        Shape(96, 192, 3, 2, (48,) * 3),
        Shape(1, 384, 8, 4, (192,) * 3),
        Shape(3, 96, 7, 4, (1024, 1024)),
        Shape(3, 768, 16, 16, (1024, 1024)),
        Shape(128, 256, 3, 2, (256, 256)),
    ]
    if ON_GPU
    else [
        Shape(1, 96, 3, 2, (96,) * 3),
        Shape(64, 128, 3, 2, (24,) * 3),
        Shape(1, 64, 7, 4, (96,) * 3),
        Shape(4, 96, 7, 4, (64,) * 3),
        Shape(2, 32, 3, 1, (48,) * 3),
        Shape(1, 384, 8, 4, (64,) * 3),
        Shape(1, 384, 16, 8, (64,) * 3),
        Shape(1, 384, 16, 16, (128,) * 3),
        Shape(16, 64, 3, 2, (40,) * 3),
        Shape(3, 96, 7, 4, (256, 256)),
        Shape(3, 384, 16, 16, (384, 384)),
        Shape(64, 128, 3, 2, (96, 96)),
    ]
)
Embed = Callable[[Tensor], Tensor]


class Weights(NamedTuple):
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def make(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Weights]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, dtype)

    dims = len(shape.size)
    weight = draw(shape.width, shape.channels, *(shape.kernel,) * dims) * (shape.channels * shape.kernel**dims) ** -0.5
    rows = Weights(weight, draw(shape.width), draw(shape.width), draw(shape.width))
    return draw(shape.batch, shape.channels, *shape.size), rows


def medformer(shape: Shape, w: Weights) -> Embed:
    return lambda x: patch_embed(
        x, w.weight, w.bias, stride=shape.stride, padding=shape.padding, norm="layer", norm_weight=w.norm_weight,
        norm_bias=w.norm_bias,
    )  # fmt: skip


def conv_ln(shape: Shape, w: Weights) -> Embed:
    conv = F.conv3d if len(shape.size) == 3 else F.conv2d
    torch.backends.cudnn.benchmark = True

    def embed(x: Tensor) -> Tensor:
        y = conv(x, w.weight, w.bias, shape.stride, shape.padding).flatten(2).transpose(1, 2)
        return F.layer_norm(y, (shape.width,), w.norm_weight, w.norm_bias, 1e-6)

    return embed


def conv_ln_channels_last(shape: Shape, w: Weights) -> Embed:
    """Both weight and volume are in the layout before the clock starts."""
    return conv_ln(shape, channels_last(shape, w))


def conv_ln_compiled(shape: Shape, w: Weights) -> Embed:
    if not ON_GPU:
        pytest.skip("torch.compile of the peer is compared on a GPU")
    return torch.compile(conv_ln(shape, w))


def unfold_matmul(shape: Shape, w: Weights) -> Embed:
    columns, reach, step = w.weight.flatten(1).t(), shape.kernel, shape.stride

    def embed(x: Tensor) -> Tensor:
        x = F.pad(x, [shape.padding] * (2 * len(shape.size)))
        for axis in range(len(shape.size)):
            x = x.unfold(2 + axis, reach, step)
        dims = len(shape.size)
        order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        patches = x.permute(order).reshape(x.shape[0], math.prod(shape.grid), -1)
        y = torch.matmul(patches, columns) + w.bias
        return F.layer_norm(y, (shape.width,), w.norm_weight, w.norm_bias, 1e-6)

    return embed


def channels_last(shape: Shape, w: Weights) -> Weights:
    layout = torch.channels_last_3d if len(shape.size) == 3 else torch.channels_last
    return w._replace(weight=w.weight.contiguous(memory_format=layout))


def medformer_channels_last(shape: Shape, w: Weights) -> Embed:
    """Both weight and volume are in the layout before the clock starts."""
    return medformer(shape, channels_last(shape, w))


IMPLEMENTATIONS = (medformer, medformer_channels_last, conv_ln, conv_ln_channels_last, conv_ln_compiled, unfold_matmul)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def prepare(implementation: Callable[[Shape, Weights], Embed], shape: Shape, dtype: torch.dtype):
    """The implementation, checked, and its input."""
    x, weights = make(shape, dtype)
    embed = implementation(shape, weights)
    if implementation in (medformer_channels_last, conv_ln_channels_last):
        x = x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)
    tolerance = 0.08 if dtype == torch.bfloat16 else 1e-3
    with torch.no_grad():
        torch.testing.assert_close(embed(x), conv_ln(shape, weights)(x), rtol=tolerance, atol=tolerance)
    return embed, x, weights


def floor(shape: Shape, dtype: torch.dtype) -> float:
    """ms of this machine for the products, voxels once and tokens once."""
    tokens, patch = shape.batch * math.prod(shape.grid), shape.channels * shape.kernel ** len(shape.size)
    moved = (shape.batch * shape.channels * math.prod(shape.size) + tokens * shape.width) * dtype.itemsize
    return floor_ms(dtype, flop=2 * tokens * patch * shape.width, moved=moved)


@shapes
@dtypes
@implementations
def bench_patch_embed_forward(timed, implementation, shape, dtype):
    embed, x, weights = prepare(implementation, shape, dtype)
    chosen = {}
    if implementation in (medformer, medformer_channels_last):
        chosen = {"path": patch_embed_choice(x, weights.weight, stride=shape.stride, padding=shape.padding).path}

    timed(torch.no_grad()(lambda: embed(x)), floor_ms=floor(shape, dtype), shape=f"{shape} {str(dtype)[6:]}", **chosen)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@dtypes
@implementations
def bench_patch_embed_step(timed, implementation, shape, dtype):
    """Forward and backward, without a gradient of the volume."""
    x, weights = make(shape, dtype)
    weights = Weights(*(w.requires_grad_() for w in weights))
    if implementation in (medformer_channels_last, conv_ln_channels_last):
        x = x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)
    embed = implementation(shape, weights)
    with torch.no_grad():
        expected = conv_ln(shape, weights)(x)
        torch.testing.assert_close(embed(x), expected, rtol=0.08, atol=0.08)
    dtokens = torch.randn_like(expected)
    timed(
        lambda: torch.autograd.grad(embed(x), list(weights), dtokens),
        shape=f"{shape} {str(dtype)[6:]}",
    )


RAW = Shape(1, 96, 3, 2, (256,) * 3 if ON_GPU else (128,) * 3)
LOW, HIGH, INTERCEPT = -160.0, 240.0, -1024.0


def raw_medformer(scan: Tensor, w: Weights) -> Tensor:
    return patch_embed(
        scan, w.weight, w.bias, stride=RAW.stride, padding=RAW.padding, norm="layer", norm_weight=w.norm_weight,
        norm_bias=w.norm_bias, windows=[hu_window(LOW, HIGH)], intercept=INTERCEPT,
    )  # fmt: skip


def raw_cast_window_conv(scan: Tensor, w: Weights) -> Tensor:
    """What everyone writes: cast, rescale, clamp, convolve, normalise."""
    x = ((scan.float() + INTERCEPT - LOW) / (HIGH - LOW)).clamp(0, 1).to(w.weight.dtype)
    return conv_ln(RAW, w)(x)


def raw_inputs(dtype: torch.dtype) -> tuple[Tensor, Weights]:
    scan = torch.randint(0, 2500, (1, 1, *RAW.size), dtype=torch.int16, generator=torch.Generator().manual_seed(1))
    return scan.to(DEVICE), make(RAW._replace(size=(8,) * 3), dtype)[1]


raw_implementations = pytest.mark.parametrize(
    "implementation", [raw_medformer, raw_cast_window_conv], ids=lambda f: f.__name__
)


@dtypes
@raw_implementations
def bench_patch_embed_raw(timed, implementation, dtype):
    """An int16 scan through one HU window."""
    scan, weights = raw_inputs(dtype)
    tolerance = 0.08 if dtype == torch.bfloat16 else 1e-3
    with torch.no_grad():
        expected = raw_cast_window_conv(scan, weights)
        torch.testing.assert_close(implementation(scan, weights), expected, rtol=tolerance, atol=tolerance)

    timed(torch.no_grad()(lambda: implementation(scan, weights)), shape=f"int16 {RAW} {str(dtype)[6:]}")


_MEMORY_SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
import bench_patch_embed as b, torch
torch.set_grad_enabled(False)
scan, weights = b.raw_inputs(torch.{dtype})
b.{name}(scan[:, :, :8, :8, :8], weights)
# measure
tokens = b.{name}(scan, weights)
"""


@dtypes
@raw_implementations
def bench_patch_embed_raw_memory(timed, implementation, dtype):
    """Peak memory of the raw path beyond the scan, and beyond the tokens too."""
    scan, weights = raw_inputs(dtype)
    if ON_GPU:
        with torch.no_grad():
            peak = peak_memory_mib(lambda: implementation(scan, weights))
    else:
        name = str(dtype)[6:]
        script = _MEMORY_SCRIPT.format(benchmarks=str(Path(__file__).parent), name=implementation.__name__, dtype=name)
        peak = cpu_peak_memory_mib(script)
    tokens = math.prod(RAW.grid) * RAW.width * dtype.itemsize / 2**20
    timed(lambda: None, shape=f"int16 {RAW}", peak_mib=round(peak, 1), beyond_tokens_mib=round(peak - tokens, 1))


# What the paths are measured on for `choice`: channels and taps decide, width and tokens follow.
LATTICE = [
    Shape(channels, width, kernel, stride, (size,) * dims)
    for dims, channels, kernel, stride, width, size in [
        (3, 1, 3, 2, 32, 64), (3, 1, 3, 2, 96, 96), (3, 1, 3, 2, 384, 48), (3, 1, 3, 1, 32, 40), (3, 1, 5, 2, 96, 48),
        (3, 1, 7, 4, 64, 96), (3, 1, 8, 4, 192, 64), (3, 1, 16, 8, 384, 64), (3, 2, 3, 2, 96, 64), (3, 2, 7, 4, 96, 64),
        (3, 4, 3, 2, 96, 48), (3, 4, 7, 4, 96, 64), (3, 8, 3, 2, 96, 40), (3, 16, 3, 2, 64, 40), (3, 32, 3, 2, 64, 32),
        (3, 64, 3, 2, 128, 24), (3, 128, 3, 2, 256, 16), (2, 1, 3, 2, 64, 256), (2, 3, 7, 4, 96, 256),
        (2, 3, 16, 8, 384, 224), (2, 16, 3, 2, 64, 128), (2, 64, 3, 2, 128, 64), (3, 1, 8, 4, 384, 64),
        (3, 1, 16, 16, 384, 128), (3, 1, 8, 8, 384, 64), (3, 1, 4, 4, 96, 64), (3, 4, 4, 4, 96, 48),
        (3, 64, 2, 2, 128, 24), (2, 1, 16, 16, 384, 384), (2, 3, 16, 16, 384, 384), (2, 3, 4, 4, 96, 224),
        (2, 64, 2, 2, 128, 64),
    ]
]  # fmt: skip


def measure_paths(seconds: float = 0.7) -> dict[str, list[dict]]:
    """Milliseconds of each path, forward and forward with backward, norm included: the least of interleaved rounds."""
    table: dict[str, list[dict]] = {}
    place = ops.device_name(torch.empty(0, device=DEVICE))
    for shape, dtype in itertools.product(LATTICE, (torch.float32, torch.bfloat16)):
        tiles = shape.kernel == shape.stride
        entry = {
            "channels": shape.channels, "taps": shape.kernel ** len(shape.size), "width": shape.width,
            "tokens": math.prod(shape.grid), "tiles": tiles,
        }  # fmt: skip
        x, w = make(shape, dtype)
        dtokens = torch.randn(shape.batch, math.prod(shape.grid), shape.width).to(DEVICE, dtype)
        for name in ("ms", "step_ms"):
            weights = Weights(*(row.requires_grad_(name == "step_ms") for row in w))
            paths = ("conv", "conv_channels_last", "matmul" if tiles else "im2col", *(("fused",) if ON_GPU else ()))
            best = dict.fromkeys(paths, math.inf)
            began = time.perf_counter()
            for rounds in itertools.count():
                for path in best:
                    chosen: dict[str, Any] = {"backend": "triton"} if path == "fused" else {"path": path}
                    start = time.perf_counter()
                    tokens = patch_embed(
                        x, weights.weight, weights.bias, stride=shape.stride, padding=shape.padding, norm="layer",
                        norm_weight=weights.norm_weight, norm_bias=weights.norm_bias, **chosen,
                    )  # fmt: skip
                    if name == "step_ms":
                        torch.autograd.grad(tokens, list(weights), dtokens)
                    if ON_GPU:
                        torch.cuda.synchronize()
                    best[path] = min(best[path], time.perf_counter() - start)
                if rounds >= 3 and time.perf_counter() - began > seconds:
                    break
            entry[name] = {path: round(s * 1e3, 2) for path, s in best.items()}
        table.setdefault(f"{place} {str(dtype)[6:]}", []).append(entry)
        print(shape, dtype, entry["ms"], entry["step_ms"], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into configs/patch_embed.json")
    arguments = parser.parse_args()
    print(environment())
    measured = measure_paths()
    path = Path(medformer_kernels.__file__).parent / "configs" / "patch_embed.json"
    if arguments.write:
        tables = json.loads(path.read_text())
        tables["paths"] |= measured
        path.write_text(dump(tables))


if __name__ == "__main__":
    main()
