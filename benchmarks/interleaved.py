"""Time implementations against each other in rounds whose order is drawn.

    python benchmarks/interleaved.py nystrom --tokens 4096 --rounds 12
    python benchmarks/interleaved.py performer --tokens 16384 --rounds 5 --clock processor
    python benchmarks/interleaved.py disentangled --tokens 2048 --rounds 5 --clock processor
    python benchmarks/interleaved.py patch_embed --rounds 250
    python benchmarks/interleaved.py tnt --tokens 16 --rounds 20
    python benchmarks/interleaved.py tnt_s --rounds 8

In a fixed order whoever follows the heaviest neighbour finds cold caches: for ratios near 1 that decides. Milliseconds,
least and median, of the wall or (where others use the machine too) of the processor, summed over threads.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import bench_disentangled
import bench_nystrom
import bench_patch_embed
import bench_performer
import bench_tnt
from measuring import environment
from medformer_kernels import orthogonal_features

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = CLOCKS["wall"]


def rounds(calls: dict[str, Callable[[], Any]], number: int) -> dict[str, str]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(number):
        for name, call in random.sample(list(calls.items()), len(calls)):
            start = clock()
            call()
            times[name].append(1e3 * (clock() - start))
    return {name: f"{min(t):.2f} {statistics.median(t):.2f}" for name, t in times.items()}


def nystrom(tokens: int, number: int) -> None:
    weight = 0.1 * torch.randn(bench_nystrom.HEADS, bench_nystrom.TAPS)
    made = {}
    for implementation in bench_nystrom.IMPLEMENTATIONS:
        try:
            made[implementation.__name__] = implementation(weight, tokens)
        except pytest.skip.Exception as why:
            print(f"{implementation.__name__} skipped: {why}")
    steps(made, (1, bench_nystrom.HEADS, tokens, bench_nystrom.WIDTH), number)


def performer(tokens: int, number: int, causal: bool) -> None:
    omega = orthogonal_features(bench_performer.FEATURES, bench_performer.WIDTH)
    made = {f.__name__: f(omega) for f in (bench_performer.CAUSAL if causal else bench_performer.LINEAR[:2])}
    steps(made, (1, bench_performer.HEADS, tokens, bench_performer.WIDTH), number)


def disentangled(tokens: int, number: int) -> None:
    bench = bench_disentangled
    at = bench.Positions(tokens)
    compared = (bench.buckets_medformer, bench.buckets_transformers, bench.grid_medformer, bench.without_bias)
    made = {f.__name__: f(at) for f in compared}
    steps(made, (1, bench.HEADS, tokens, bench.WIDTH), number, at.leaves())


def steps(
    made: dict[str, Callable[..., torch.Tensor]],
    shape: tuple[int, ...],
    number: int,
    tables: Sequence[torch.Tensor] = (),
) -> None:
    q, k, v, dout = (torch.randn(shape) for _ in range(4))

    def step(attention: Callable[..., torch.Tensor]) -> None:
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(attention(*given), (*given, *tables), dout, allow_unused=len(tables) > 0)

    with torch.no_grad():
        print("forward", rounds({name: lambda f=f: f(q, k, v) for name, f in made.items()}, number))
    print("forward and backward", rounds({name: lambda f=f: step(f) for name, f in made.items()}, number))


@torch.no_grad()
def patch_embed(number: int) -> None:
    shape = bench_patch_embed.SHAPES[1]
    for dtype in bench_patch_embed.DTYPES:
        x, weights = bench_patch_embed.make(shape, dtype)
        last = x.contiguous(memory_format=torch.channels_last_3d)
        names = {"medformer": x, "conv_ln": x, "medformer_channels_last": last, "conv_ln_channels_last": last}
        calls = {name: (getattr(bench_patch_embed, name)(shape, weights), volume) for name, volume in names.items()}
        print(shape, dtype, rounds({name: lambda f=f, v=v: f(v) for name, (f, v) in calls.items()}, number))


def tnt(shape: bench_tnt.Shape, dtype: torch.dtype, number: int) -> None:
    """The inner block."""
    compared = (bench_tnt.medformer, bench_tnt.eager, bench_tnt.sdpa)
    x, w = bench_tnt.make(shape, dtype)
    dout, leaves = torch.randn_like(x), [x, *vars(w).values()]

    def step(block: bench_tnt.Inner) -> None:
        torch.autograd.grad(block(x, w, shape.heads), leaves, dout)

    with torch.no_grad():
        calls = {f.__name__: lambda f=f: f(x, w, shape.heads) for f in compared}
        print(shape, dtype, "forward", rounds(calls, number))
    for leaf in leaves:
        leaf.requires_grad_()
    calls = {f.__name__: lambda f=f: step(f) for f in compared}
    print(shape, dtype, "forward and backward", rounds(calls, number))


def tnt_s(number: int) -> None:
    """The whole of TNT-S against timm's."""
    models = {which: bench_tnt.tnt_s(which) for which in ("medformer", "timm")}
    x = bench_tnt.images()

    def step(model: torch.nn.Module) -> None:
        torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    with torch.no_grad():
        print("forward", rounds({which: lambda m=m: m(x) for which, m in models.items()}, number))
    print("forward and backward", rounds({which: lambda m=m: step(m) for which, m in models.items()}, number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["disentangled", "nystrom", "patch_embed", "performer", "tnt", "tnt_s"])
    parser.add_argument("--tokens", type=int, default=4096, help="of all but patch_embed and tnt_s; of tnt: inner ones")
    parser.add_argument("--causal", action="store_true", help="performer in causal order")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    global clock
    clock = CLOCKS[arguments.clock]
    print(environment())
    torch.manual_seed(0)
    if arguments.family == "nystrom":
        nystrom(arguments.tokens, arguments.rounds)
    elif arguments.family == "disentangled":
        disentangled(arguments.tokens, arguments.rounds)
    elif arguments.family == "tnt":
        for shape, dtype in itertools.product(bench_tnt.SHAPES, bench_tnt.DTYPES):
            if shape.tokens == arguments.tokens:
                tnt(shape, dtype, arguments.rounds)
    elif arguments.family == "tnt_s":
        tnt_s(arguments.rounds)
    elif arguments.family == "performer":
        performer(arguments.tokens, arguments.rounds, arguments.causal)
    else:
        patch_embed(arguments.rounds)


if __name__ == "__main__":
    main()
