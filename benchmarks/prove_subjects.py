"""What `prove_on_gpu` proves: each family at a small shape, where float64 fits, and at the shape of its target.

A `Problem` is a call with its tensors; `SUBJECTS` come in the order of what a user would miss most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import bench_disentangled
import bench_nystrom
import bench_patch_embed
import bench_performer
import bench_tnt
from measuring import training_step
from medformer_kernels import (
    TNTInnerWeights,
    disentangled_attention,
    disentangled_attention_reference,
    hu_window,
    nystrom_attention,
    nystrom_attention_reference,
    orthogonal_features,
    patch_embed,
    patch_embed_reference,
    performer_attention,
    performer_attention_reference,
    tnt_inner_block,
    tnt_inner_block_reference,
)
from medformer_kernels._dispatch import load_configs, nearest_arch

__all__ = ["SUBJECTS", "Peer", "Problem", "Subject", "inner_problem", "tile_entry"]

Leaves = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A call and its tensors in float32; the public functions take them in any dtype."""

    leaves: Leaves
    """Those that take a gradient."""
    ours: Callable[..., Tensor]
    """(leaves, backend)."""
    reference: Callable[[Leaves], Tensor]

    def cast(self, dtype: torch.dtype) -> Leaves:
        return {name: x.detach().to(dtype).requires_grad_() for name, x in self.leaves.items()}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One implementation at one shape, checked before it is timed."""

    name: str
    shape: str
    forward: Callable[[], Any]
    step: Callable[[], Any]
    large: bool = True
    """At the subject's shape, and so to be compared with it."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    family: str
    shape: str
    """Of `large`."""
    small: Callable[[torch.device, bool], Problem]
    large: Callable[[torch.device, bool], Problem]
    """(device, dry), as of `small`: where dry, the same call over less."""
    peers: Callable[[bool], Iterator[tuple[str, Callable[[], Peer]]]]
    """(dry) -> names, and what makes them; it raises pytest's Skipped for what cannot run."""
    floors: tuple[str, ...] = ()
    """Shapes of compile_cases' floors, for the counted work."""
    goal_ms: float | None = None
    step_goal_ms: float | None = None
    tiles: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    """By kernel: other tiles than the shipped one, as differences from it."""


def _draw(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, device=device, generator=generator) * scale


def _qkv(device: torch.device, heads: int, tokens: int, width: int = 64) -> Leaves:
    torch.manual_seed(0)
    return {name: torch.randn(1, heads, tokens, width, device=device) for name in "qkv"}


def performer_problem(device: torch.device, tokens: int, *, causal: bool = False) -> Problem:
    omega = orthogonal_features(256, 64, device=device)
    return Problem(
        leaves=_qkv(device, 8 if tokens > 4096 else 2, tokens),
        ours=lambda x, backend: performer_attention(x["q"], x["k"], x["v"], omega, causal=causal, backend=backend),
        reference=lambda x: performer_attention_reference(
            x["q"], x["k"], x["v"], omega.to(x["q"].dtype), causal=causal
        ),
    )


def nystrom_problem(device: torch.device, grid: tuple[int, int, int], *, volume: bool) -> Problem:
    tokens = grid[0] * grid[1] * grid[2]
    landmarks: dict[str, Any] = {"grid": grid, "landmark_grid": (4, 8, 8)} if volume else {"num_landmarks": 256}
    leaves = _qkv(device, 8 if tokens > 4096 else 2, tokens)
    if volume:
        leaves["conv_weight"] = _draw(device, leaves["q"].shape[1], 3, 3, 3, scale=1 / 27)

    def arguments(x: Leaves) -> tuple[list[Tensor], dict[str, Any]]:
        return [x[name] for name in "qkv"], landmarks | ({"conv_weight": x["conv_weight"]} if volume else {})

    def ours(x: Leaves, backend: str) -> Tensor:
        tensors, options = arguments(x)
        return nystrom_attention(*tensors, **options, backend=backend)

    def reference(x: Leaves) -> Tensor:
        tensors, options = arguments(x)
        return nystrom_attention_reference(*tensors, **options)

    return Problem(leaves=leaves, ours=ours, reference=reference)


def disentangled_problem(device: torch.device, grid: tuple[int, int, int], heads: int) -> Problem:
    leaves = _qkv(device, heads, grid[0] * grid[1] * grid[2])
    for name in ("rel_k", "rel_q"):
        leaves |= {f"{name}{axis}": _draw(device, heads, 2 * g - 1, 64) for axis, g in enumerate(grid)}

    def arguments(x: Leaves) -> tuple[list[Tensor], dict[str, Any]]:
        tables = {name: [x[f"{name}{axis}"] for axis in range(3)] for name in ("rel_k", "rel_q")}
        return [x[name] for name in "qkv"], {"grid": grid, **tables}

    def ours(x: Leaves, backend: str) -> Tensor:
        tensors, options = arguments(x)
        return disentangled_attention(*tensors, **options, backend=backend)

    def reference(x: Leaves) -> Tensor:
        tensors, options = arguments(x)
        return disentangled_attention_reference(*tensors, **options)

    return Problem(leaves=leaves, ours=ours, reference=reference)


def inner_problem(device: torch.device, shape: bench_tnt.Shape) -> Problem:
    x, weights = bench_tnt.make(shape, torch.float32)

    def block(function: Callable[..., Tensor], leaves: Leaves, **options: str) -> Tensor:
        rest = {name: tensor for name, tensor in leaves.items() if name != "x"}
        return function(leaves["x"], TNTInnerWeights(**rest), num_heads=shape.heads, **options)

    return Problem(
        leaves={"x": x.to(device), **{name: tensor.to(device) for name, tensor in vars(weights).items()}},
        ours=lambda leaves, backend: block(tnt_inner_block, leaves, backend=backend),
        reference=lambda leaves: block(tnt_inner_block_reference, leaves),
    )


def embed_problem(device: torch.device, shape: bench_patch_embed.Shape, *, raw: bool = False) -> Problem:
    """Convolution, bias and LayerNorm; `raw`: int16 voxels through two windows. No gradient of the voxels."""
    windows = [hu_window(-160, 240), hu_window(-1000, 400)] if raw else None
    channels = 2 if raw else shape.channels
    voxels, rows = bench_patch_embed.make(shape._replace(channels=channels), torch.float32)
    voxels = voxels.to(device)
    if raw:
        voxels = (voxels[:, :1] * 600 + 900).to(torch.int16)
    leaves = {
        name: getattr(rows, name).to(device) for name in ("weight", "bias", "norm_weight", "norm_bias")
    }  # fmt: skip
    options: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding, "norm": "layer"}
    if raw:
        options |= {"windows": windows, "intercept": -1024.0}

    def embed(function: Callable[..., Tensor], x: Leaves, **more: str) -> Tensor:
        volume = voxels if raw else voxels.to(x["weight"].dtype)
        return function(
            volume, x["weight"], x["bias"], norm_weight=x["norm_weight"], norm_bias=x["norm_bias"], **options, **more
        )

    return Problem(
        leaves=leaves,
        ours=lambda x, backend: embed(patch_embed, x, backend=backend),
        reference=lambda x: embed(patch_embed_reference, x),
    )


def _attention_peers(bench: Any, implementations: tuple[Any, ...], tokens: int) -> Iterator[tuple[str, Any]]:
    """Of a module with `prepare` (implementation, tokens) and `shape`."""

    def make(implementation: Any) -> Peer:
        attention, inputs = bench.prepare(implementation, tokens)
        for x in inputs:
            x.requires_grad_()
        return Peer(
            name=implementation.__name__,
            shape=bench.shape(tokens),
            forward=torch.no_grad()(lambda: attention(*inputs)),
            step=training_step(attention, inputs, torch.randn_like(inputs[2])),
        )

    for implementation in implementations:
        yield implementation.__name__, lambda implementation=implementation: make(implementation)


def performer_peers(dry: bool) -> Iterator[tuple[str, Any]]:
    every = bench_performer.LINEAR + bench_performer.EXACT
    return _attention_peers(bench_performer, every[:3] if dry else every, 1024 if dry else 262_144)


def nystrom_peers(dry: bool) -> Iterator[tuple[str, Any]]:
    every = bench_nystrom.IMPLEMENTATIONS
    return _attention_peers(bench_nystrom, every[-1:] if dry else every, 1024 if dry else 262_144)


def disentangled_peers(dry: bool) -> Iterator[tuple[str, Any]]:
    bench = bench_disentangled

    def make(implementation: Any, tokens: int) -> Peer:
        attention, inputs, at = bench.prepared(implementation, tokens)
        for x in inputs:
            x.requires_grad_()
        return Peer(
            name=implementation.__name__,
            shape=bench.shape(tokens),
            forward=torch.no_grad()(lambda: attention(*inputs)),
            step=training_step(attention, inputs, torch.randn_like(inputs[2]), *at.leaves()),
            large=tokens != 4096,
        )

    linear = (bench.grid_medformer, bench.without_bias)
    quadratic = (
        bench.buckets_medformer, bench.buckets_transformers, bench.buckets_flashdeberta, bench.buckets_flex_attention,
        bench.grid_medformer, bench.grid_medformer_wide, bench.grid_sdpa_dense_bias,
    )  # fmt: skip
    for tokens, implementations in ((1024, linear[1:]),) if dry else ((32_768, linear), (4096, quadratic)):
        for implementation in implementations:
            yield (
                f"{implementation.__name__} N{tokens}",
                lambda implementation=implementation, tokens=tokens: make(implementation, tokens),
            )


def inner_peers(dry: bool) -> Iterator[tuple[str, Any]]:
    bench = bench_tnt
    shape = bench.Shape(64, 16, 24) if dry else bench.SHAPES[0]

    def make(implementation: Any) -> Peer:
        x, weights = bench.make(shape, torch.bfloat16)
        bench.checked(implementation, x, weights, shape.heads)
        leaves = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in vars(weights).values())]
        dout = torch.randn_like(x)
        return Peer(
            name=implementation.__name__,
            shape=str(shape),
            forward=torch.no_grad()(lambda: implementation(x, weights, shape.heads)),
            step=lambda: torch.autograd.grad(implementation(x, weights, shape.heads), leaves, dout),
        )

    for implementation in (bench.medformer, bench.eager, bench.sdpa, bench.sdpa_compiled):
        yield implementation.__name__, lambda implementation=implementation: make(implementation)


def _embed_peers(shape: bench_patch_embed.Shape, little: bench_patch_embed.Shape) -> Callable[[bool], Iterator[Any]]:
    bench = bench_patch_embed

    def make(implementation: Any, dry: bool) -> Peer:
        taken = little if dry else shape
        _, x, _ = bench.prepare(implementation, taken, torch.bfloat16)
        weights = bench.Weights(*(row.requires_grad_() for row in bench.make(taken, torch.bfloat16)[1]))
        embed = implementation(taken, weights)
        dtokens = torch.randn_like(embed(x))
        return Peer(
            name=implementation.__name__,
            shape=str(shape),
            forward=torch.no_grad()(lambda: embed(x)),
            step=lambda: torch.autograd.grad(embed(x), list(weights), dtokens),
        )

    def peers(dry: bool) -> Iterator[tuple[str, Any]]:
        for implementation in bench.IMPLEMENTATIONS:
            yield implementation.__name__, lambda implementation=implementation: make(implementation, dry)

    return peers


_A, _B = bench_patch_embed.Shape(1, 64, 7, 4, (256,) * 3), bench_patch_embed.Shape(64, 128, 3, 2, (64,) * 3)
_SMALL_A, _SMALL_B = _A._replace(size=(24,) * 3), _B._replace(size=(8,) * 3)
_INNER, _SMALL_INNER = bench_tnt.Shape(32_768, 64, 48), bench_tnt.Shape(40, 64, 48)

SUBJECTS = {
    subject.family: subject
    for subject in (
        Subject(
            family="performer", shape="B1 H8 N262,144 D64 M256", goal_ms=0.69, step_goal_ms=2.4,
            small=lambda device, dry: performer_problem(device, 200 if dry else 1000),
            large=lambda device, dry: performer_problem(device, 500 if dry else 262_144),
            peers=performer_peers, floors=("performer B1 H8 N=262,144 D64 M256 bf16",),
            tiles={
                "state_fwd": [
                    {"block_m": 256, "block_n": 32, "num_warps": 8}, {"block_m": 128, "block_n": 64, "num_warps": 4},
                    {"block_m": 128, "block_n": 128, "num_warps": 8},
                ],
                "read_fwd": [
                    {"block_m": 64, "block_n": 128, "num_warps": 4}, {"block_m": 128, "block_n": 64, "num_warps": 4},
                ],
            },
        ),
        Subject(
            family="nystrom", shape="B1 H8 N262,144 D64 L256", goal_ms=0.9,
            small=lambda device, dry: nystrom_problem(device, (4, 8, 8) if dry else (8, 16, 16), volume=False),
            large=lambda device, dry: nystrom_problem(device, (4, 8, 8) if dry else (64, 64, 64), volume=False),
            peers=nystrom_peers, floors=("nystrom B1 H8 N=262,144 D64 L256 bf16",),
            tiles={
                "read_fwd": [{"block_m": 128, "block_n": 64, "num_warps": 4}],
                "pool_values_fwd": [{"block_m": 128, "block_n": 32, "num_warps": 4}],
            },
        ),
        Subject(
            family="disentangled", shape="B1 H8 32^3 D64 c2c c2p p2c", goal_ms=8.0, step_goal_ms=32.0,
            small=lambda device, dry: disentangled_problem(device, (2, 3, 8) if dry else (8, 8, 16), 2),
            large=lambda device, dry: disentangled_problem(device, (2, 4, 8) if dry else (32, 32, 32), 1 if dry else 8),
            peers=disentangled_peers, floors=("disentangled B1 H8 32^3 D64 c2c c2p p2c bf16",),
            tiles={"fwd": [{"block_m": 64, "num_warps": 4}, {"block_m": 128, "num_warps": 8, "num_stages": 1}]},
        ),
        Subject(
            family="tnt", shape="32,768 x 64 x 48", goal_ms=0.5, step_goal_ms=1.8,
            small=lambda device, dry: inner_problem(device, _SMALL_INNER),
            large=lambda device, dry: inner_problem(device, _SMALL_INNER if dry else _INNER),
            peers=inner_peers, floors=("tnt_inner_block 32,768 x 64 x 48 bf16",),
            tiles={"fwd": [{"num_warps": 8}, {"block_f": 16}]},
        ),
        Subject(
            family="patch_embed a", shape="1x256^3 k7 s4 E64", goal_ms=0.06,
            small=lambda device, dry: embed_problem(device, _SMALL_A),
            large=lambda device, dry: embed_problem(device, _SMALL_A if dry else _A),
            peers=_embed_peers(_A, _SMALL_A), floors=("patch_embed 1x256^3 k7 s4 E=64 bf16",),
        ),
        Subject(
            family="patch_embed b", shape="64x64^3 k3 s2 E128", goal_ms=0.04,
            small=lambda device, dry: embed_problem(device, _SMALL_B),
            large=lambda device, dry: embed_problem(device, _SMALL_B if dry else _B),
            peers=_embed_peers(_B, _SMALL_B), floors=("patch_embed 64x64^3 k3 s2 E=128 bf16",),
        ),
        Subject(
            family="nystrom volume", shape="B1 H8 64^3 D64 L256, 3x3x3 convolution", goal_ms=None,
            small=lambda device, dry: nystrom_problem(device, (4, 8, 8) if dry else (8, 16, 16), volume=True),
            large=lambda device, dry: nystrom_problem(device, (4, 8, 8) if dry else (64, 64, 64), volume=True),
            peers=lambda dry: iter(()), floors=("nystrom B1 H8 N=262,144 D64 L256 bf16",),
        ),
        Subject(
            family="patch_embed raw", shape="int16 1x256^3, two windows, k7 s4 E64", goal_ms=None,
            small=lambda device, dry: embed_problem(device, _SMALL_A, raw=True),
            large=lambda device, dry: embed_problem(device, _SMALL_A if dry else _A, raw=True),
            peers=lambda dry: iter(()), floors=("patch_embed 1x256^3 k7 s4 E=64 bf16",),
        ),
        Subject(
            family="performer causal", shape="B1 H8 N262,144 D64 M256, causal", goal_ms=None,
            small=lambda device, dry: performer_problem(device, 200 if dry else 1000, causal=True),
            large=lambda device, dry: performer_problem(device, 500 if dry else 262_144, causal=True),
            peers=lambda dry: iter(()),
        ),
    )
}  # fmt: skip


def tile_entry(family: str, kernel: str, arch: str) -> dict[str, int]:
    """The shipped tile of a family's headline, 16 bit, as it lies in the table: patched, it is what launches take."""
    table = load_configs(family)[kernel]
    entries = table[nearest_arch(arch, tuple(table))]
    return next(entry for entry in entries if (entry["itemsize"], entry["width"]) == (2, 64))
