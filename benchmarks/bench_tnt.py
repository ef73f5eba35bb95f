"""The inner block of a TNT against the same block written out, with matrix products or with SDPA; the step behind it to
the outer token; TNT-S against timm; a three-level model over a volume of 128^3 with its memory.

Every implementation gets the same tokens and weights, and its output is checked before it is timed. What cannot run
here is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from measuring import DEVICE, cpu_peak_memory_mib, floor_ms, peak_memory_mib
from medformer.tnt import TNT, TNTConfig, TNTLevel, blocks, tnt_from_timm
from medformer_kernels import TNTInnerWeights, tnt_inner_block, tnt_inner_to_outer

ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)


class Shape(NamedTuple):
    sequences: int
    tokens: int
    width: int
    heads: int = 4

    def __str__(self) -> str:
        return f"{self.sequences}x{self.tokens}x{self.width}"


SHAPES = (
    [Shape(32_768, 64, 48), Shape(262_144, 16, 24), Shape(50_176, 16, 24), Shape(4096, 64, 64)]
    if ON_GPU
    else [Shape(4096, 16, 24), Shape(4096, 64, 64)]
)
Inner = Callable[[Tensor, TNTInnerWeights, int], Tensor]


def make(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, TNTInnerWeights]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * scale).to(DEVICE, dtype)

    c, f = shape.width, 4 * shape.width
    weights = TNTInnerWeights(
        norm1_weight=draw(c), norm1_bias=draw(c), qkv_weight=draw(3 * c, c, scale=c**-0.5), qkv_bias=draw(3 * c),
        proj_weight=draw(c, c, scale=c**-0.5), proj_bias=draw(c), norm2_weight=draw(c), norm2_bias=draw(c),
        fc1_weight=draw(f, c, scale=c**-0.5), fc1_bias=draw(f), fc2_weight=draw(c, f, scale=f**-0.5), fc2_bias=draw(c),
    )  # fmt: skip
    return draw(shape.sequences, shape.tokens, c), weights


def _written_out(
    x: Tensor, w: TNTInnerWeights, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    sequences, tokens, width = x.shape
    normed = F.layer_norm(x, (width,), w.norm1_weight, w.norm1_bias, 1e-6)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).view(sequences, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = attend(*qkv.unbind(0)).transpose(1, 2).reshape(x.shape)
    x = x + F.linear(mixed, w.proj_weight, w.proj_bias)
    normed = F.layer_norm(x, (width,), w.norm2_weight, w.norm2_bias, 1e-6)
    return x + F.linear(F.gelu(F.linear(normed, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias)


def medformer(x: Tensor, w: TNTInnerWeights, heads: int) -> Tensor:
    return tnt_inner_block(x, w, num_heads=heads)


def eager(x: Tensor, w: TNTInnerWeights, heads: int) -> Tensor:
    """As timm writes it."""
    return _written_out(x, w, heads, lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)


def sdpa(x: Tensor, w: TNTInnerWeights, heads: int) -> Tensor:
    return _written_out(x, w, heads, F.scaled_dot_product_attention)


def sdpa_compiled(x: Tensor, w: TNTInnerWeights, heads: int) -> Tensor:
    if not ON_GPU:
        pytest.skip("torch.compile of the peer is compared on a GPU")
    return _COMPILED(x, w, heads)


_COMPILED = torch.compile(sdpa)
implementations = pytest.mark.parametrize(
    "implementation", [medformer, eager, sdpa, sdpa_compiled], ids=lambda f: f.__name__
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def checked(implementation: Inner, x: Tensor, w: TNTInnerWeights, heads: int) -> None:
    """Raises unless the first sequences come out right; skips what a library cannot run (SDPA above 65,535)."""
    some = slice(0, 64)
    with torch.no_grad():
        try:
            out = implementation(x, w, heads)
        except RuntimeError as error:
            pytest.skip(f"cannot run: {str(error).splitlines()[0]}")
        tolerance = 0.1 if x.dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(out[some], eager(x[some], w, heads), rtol=tolerance, atol=tolerance)


def floor(shape: Shape, dtype: torch.dtype, *, step: bool) -> float:
    """ms of this machine; a step is three forward passes."""
    rows = shape.sequences * shape.tokens
    flop = 2 * rows * 12 * shape.width**2 + 4 * rows * shape.tokens * shape.width
    return (3 if step else 1) * floor_ms(dtype, flop=flop, moved=2 * rows * shape.width * dtype.itemsize)


@shapes
@dtypes
@implementations
def bench_tnt_inner_forward(timed, implementation, shape, dtype):
    x, w = make(shape, dtype)
    checked(implementation, x, w, shape.heads)

    timed(
        torch.no_grad()(lambda: implementation(x, w, shape.heads)),
        floor_ms=floor(shape, dtype, step=False),
        shape=f"{shape} {str(dtype)[6:]}",
    )


@shapes
@dtypes
@implementations
def bench_tnt_inner_step(timed, implementation, shape, dtype):
    """Forward and backward, every gradient."""
    x, w = make(shape, dtype)
    checked(implementation, x, w, shape.heads)
    leaves = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in vars(w).values())]
    dout = torch.randn_like(x)
    timed(
        lambda: torch.autograd.grad(implementation(x, w, shape.heads), leaves, dout),
        floor_ms=floor(shape, dtype, step=True),
        shape=f"{shape} {str(dtype)[6:]}",
    )


class Step(NamedTuple):
    """Inner tokens x (S, n, c) and what takes them to outer tokens (S, E)."""

    x: Tensor
    outer: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor


def make_step(shape: Shape, channels: int, dtype: torch.dtype) -> Step:
    generator = torch.Generator().manual_seed(0)
    s, n, c = shape[:3]
    shapes = [(s, n, c), (s, channels), (c,), (c,), (channels, n * c), (channels,)]
    drawn = (torch.randn(*sizes, generator=generator) for sizes in shapes)
    return Step(*((tensor * tensor.shape[-1] ** -0.5).to(DEVICE, dtype) for tensor in drawn))


def to_outer_medformer(step: Step) -> Tensor:
    return tnt_inner_to_outer(
        step.x, step.outer, **{k: v for k, v in step._asdict().items() if k not in ("x", "outer")}
    )


def to_outer_eager(step: Step) -> Tensor:
    normed = F.layer_norm(step.x, step.x.shape[-1:], step.norm_weight, step.norm_bias, 1e-6)
    return step.outer + F.linear(normed.flatten(1), step.weight, step.bias)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("shape", [Shape(50_176 if ON_GPU else 784, 16, 24)], ids=str)
@dtypes
@pytest.mark.parametrize("implementation", [to_outer_medformer, to_outer_eager], ids=["medformer", "eager"])
def bench_tnt_inner_to_outer(timed, implementation, shape, dtype, backward):
    """As in TNT-S: to 384 channels."""
    tensors = make_step(shape, 384, dtype)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(implementation(tensors), to_outer_eager(tensors), rtol=tolerance, atol=tolerance)
    if backward:
        dout = torch.randn_like(tensors.outer)
        for tensor in tensors:
            tensor.requires_grad_()

    def run() -> None:
        if backward:
            torch.autograd.grad(implementation(tensors), tensors, dout)
        else:
            with torch.no_grad():
                implementation(tensors)

    timed(run, shape=f"{shape} to 384 {str(dtype)[6:]}")


def tnt_s(which: str) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("tnt_s_legacy_patch16_224")
    model = theirs if which == "timm" else tnt_from_timm(theirs.state_dict())
    return model.to(DEVICE)


models = pytest.mark.parametrize("which", ["medformer", "timm"])
IMAGES = 64 if ON_GPU else 4


def images() -> Tensor:
    return torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@models
def bench_tnt_s_forward(timed, which):
    """The whole of TNT-S, float32, from the same weights."""
    model, x = tnt_s(which).eval(), images()
    with torch.no_grad():
        torch.testing.assert_close(model(x), tnt_s("timm").eval()(x), rtol=1e-3, atol=1e-3)

    timed(torch.no_grad()(lambda: model(x)), shape=f"TNT-S {IMAGES}x3x224x224 float32")


@models
def bench_tnt_s_step(timed, which):
    model, x = tnt_s(which).train(), images()
    parameters = list(model.parameters())
    timed(lambda: torch.autograd.grad(model(x).square().sum(), parameters), shape=f"TNT-S {IMAGES}x3x224x224 float32")


def three_levels() -> tuple[TNT, Tensor]:
    """262,144 tokens of 12 channels in 32,768 of 48 in 512 of 192, overlapping first windows; 128^3 voxels."""
    torch.manual_seed(0)
    levels = (
        TNTLevel(width=12, depth=2, heads=2, kernel=3, stride=2, padding=1),
        TNTLevel(width=48, depth=2, heads=4, kernel=2, stride=2),
        TNTLevel(width=192, depth=2, heads=3, kernel=4, stride=4),
    )
    x = torch.randn(1, 1, 128, 128, 128, generator=torch.Generator().manual_seed(1))
    return TNT(TNTConfig(levels=levels)).to(DEVICE), x.to(DEVICE)


def _eager_block(x: Tensor, weights: TNTInnerWeights, *, num_heads: int, **_: object) -> Tensor:
    return eager(x, weights, num_heads)


inner_blocks = pytest.mark.parametrize("inner", ["medformer", "eager"])


def run_three_levels(inner: str, model: TNT, x: Tensor, *, step: bool) -> None:
    """One pass with this inner block; `eager` written out as timm does."""
    with patch.object(blocks, "tnt_inner_block", tnt_inner_block if inner == "medformer" else _eager_block):
        if step:
            torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        else:
            with torch.no_grad():
                model(x)


@inner_blocks
@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def bench_tnt_three_levels(timed, inner, step):
    model, x = three_levels()
    timed(lambda: run_three_levels(inner, model, x, step=step), shape="3 levels 128^3 float32")


_MEMORY_SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
import bench_tnt as b
model, x = b.three_levels()
b.run_three_levels({inner!r}, model, x[..., :16, :16, :16], step={step})
# measure
b.run_three_levels({inner!r}, model, x, step={step})
"""


@inner_blocks
@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def bench_tnt_three_levels_memory(timed, inner, step):
    """Peak memory beyond model and volume, MiB."""
    if ON_GPU:
        model, x = three_levels()
        peak = peak_memory_mib(lambda: run_three_levels(inner, model, x, step=step))
    else:
        folder = str(Path(__file__).parent)
        peak = cpu_peak_memory_mib(_MEMORY_SCRIPT.format(benchmarks=folder, inner=inner, step=step))
    timed(lambda: None, shape="3 levels 128^3 float32", peak_mib=round(peak, 1))
