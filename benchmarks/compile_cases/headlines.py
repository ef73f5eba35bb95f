"""The passes that have a target: what `compile_report` predicts, and `prove_on_gpu` compiles first and measures.

bf16, shapes of the targets, on sm_90. Costs are those of the launch plans on an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ahead_of_time import TARGETS, Compiled
from compile_cases import disentangled, nystrom, patch_embed, performer, tnt
from compile_cases.shapes import Cost, Floor
from medformer_kernels.disentangled import fused as disentangled_fused
from medformer_kernels.disentangled.tables import Inputs
from medformer_kernels.disentangled.tiles import ROUND
from medformer_kernels.nystrom import Cells
from medformer_kernels.nystrom import fused as nystrom_fused
from medformer_kernels.patch_embed import fused as patch_fused
from medformer_kernels.patch_embed.geometry import resolve
from medformer_kernels.performer import fused as performer_fused

__all__ = ["HEADLINES", "Headline", "Passes"]

CHIP = TARGETS["sm_90"].chip
TOKENS, HEADS, WIDTH = 262_144, 8, 64


Passes = Callable[[Compiled], tuple[float, ...]]
"""How often a program of a compiled kernel runs each of its loops, inner loops first."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One pass at the shape of its target."""

    name: str
    """Family, variant and direction, as in `prove_subjects`."""
    family: str
    launch: Callable[[], Any]
    costs: dict[str, Cost]
    """By kernel, without family and '_kernel'."""
    floor: Floor | None
    goal_ms: float | None = None
    passes: dict[str, Passes] = field(default_factory=dict)
    """Of kernels with nested loops, or loops without products."""


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _performer() -> Iterator[Headline]:
    x, row = _empty(1, HEADS, TOKENS, WIDTH), _empty(1, HEADS, TOKENS, dtype=torch.float32)
    omega = _empty(256, WIDTH, dtype=torch.float32)
    values, lse = (_empty(1, HEADS, 256, *rest, dtype=torch.float32) for rest in ((WIDTH,), ()))
    costs = performer.costs(
        chip=CHIP, batch_heads=HEADS, tokens=TOKENS, num_features=256, width=WIDTH, width_v=WIDTH, itemsize=2
    )

    def forward() -> None:
        performer_fused.state(x, x, omega, None, False)
        performer_fused.read(x, omega, values, lse, None, None)

    def backward() -> None:
        performer_fused.read_backward(x, omega, values, lse, None, None, x, row, x, False)
        performer_fused.state_backward(x, x, omega, None, values, lse, values, lse, False)

    floors = {floor.direction: floor for floor in performer.FAMILY.floors()}
    for direction, launch, goal in (("forward", forward, 0.69), ("backward", backward, 1.71)):
        yield Headline(
            name=f"performer {direction}", family="performer", launch=launch, costs=costs, floor=floors[direction],
            goal_ms=goal,
        )  # fmt: skip


def _nystrom() -> Iterator[Headline]:
    x = _empty(1, HEADS, TOKENS, WIDTH)
    by_kernel = nystrom.costs(chip=CHIP, batch_heads=HEADS, tokens=TOKENS, landmarks=256, width=WIDTH, itemsize=2)
    costs = by_kernel | {"pool_values_fwd": by_kernel["values_fwd"]}
    floor = next(floor for floor in nystrom.FAMILY.floors() if floor.direction == "forward")
    cell = TOKENS // 256  # tokens of a landmark's cell
    for name, cells, taps, goal in (
        ("nystrom", Cells(grid=(1, 1, TOKENS), landmark_grid=(1, 1, 256)), None, 0.9),
        ("nystrom volume", Cells(grid=(64, 64, 64), landmark_grid=(4, 8, 8)), (3, 3, 3), None),
    ):
        weight = _empty(HEADS, *taps, dtype=torch.float32) if taps else None

        def walk(compiled: Compiled) -> tuple[float, ...]:
            cells = 256 * HEADS / compiled.programs  # of a program
            return cells * cell / compiled.tiles["BLOCK_N"], cells, cells

        def read(compiled: Compiled) -> tuple[float, ...]:
            # Landmarks by tile; nine rows of taps, each over blocks of tokens and the 2 that reach beyond.
            taps_blocks = 9 * -(-(compiled.tiles["BLOCK_N"] + 2) // compiled.tiles["BLOCK_J"])
            return 256 / compiled.tiles["BLOCK_M"], taps_blocks, 9

        yield Headline(
            name=f"{name} forward", family="nystrom",
            launch=lambda cells=cells, weight=weight: nystrom_fused.forward(
                x, x, x, cells, None, None, weight, None, 6, None
            ),
            costs=costs, floor=floor, goal_ms=goal,
            passes={
                "pool": lambda compiled: (cell / compiled.tiles["BLOCK_N"],), "pool_values_fwd": walk,
                **({"read_fwd": read} if taps else {}),
            },
        )  # fmt: skip


def _disentangled() -> Iterator[Headline]:
    grid, tokens = (32, 32, 32), 32**3
    x, table = _empty(1, HEADS, tokens, WIDTH), _empty(1, HEADS, tokens, sum(grid))
    lse = _empty(1, HEADS, tokens, dtype=torch.float32)
    inputs = Inputs(x, x, x, table, table, None, None, None, [0, *grid], 0.07, False, 0.0, 0)
    costs = disentangled.costs(chip=CHIP, batch_heads=HEADS, grid=grid, width=WIDTH, itemsize=2)
    floors = {floor.direction: floor for floor in disentangled.FAMILY.floors()}
    lines = grid[0] * grid[1]
    walk = {"fwd": lambda _: (lines, 1), **dict.fromkeys(("dq", "dkv"), lambda _: (lines, grid[1] / ROUND, 1))}
    for direction, goal, launch in (
        ("forward", 8.0, lambda: disentangled_fused.forward(inputs)),
        ("backward", 24.0, lambda: disentangled_fused.backward(inputs, x, lse, x, None)),
    ):
        yield Headline(
            name=f"disentangled {direction}", family="disentangled", launch=launch, costs=costs,
            floor=floors[direction], goal_ms=goal, passes=walk,
        )  # fmt: skip


def _tnt() -> Iterator[Headline]:
    by_kernel = tnt.launches(64, 48, 4, torch.bfloat16, False)
    costs = tnt.costs(chip=CHIP, sequences=tnt.SEQUENCES, tokens=64, width=48, hidden=192, num_heads=4, itemsize=2)
    floors = {floor.direction: floor for floor in tnt.FAMILY.floors()}

    def tiles(compiled: Compiled) -> float:
        return tnt.SEQUENCES * 64 / compiled.tiles["BLOCK_R"] / compiled.programs

    def fwd(compiled: Compiled) -> tuple[float, ...]:
        return 4 * tiles(compiled), 192 / compiled.tiles["BLOCK_F"] * tiles(compiled), tiles(compiled)

    def mlp_dx(compiled: Compiled) -> tuple[float, ...]:
        return fwd(compiled)[1:]

    def attn_dx(compiled: Compiled) -> tuple[float, ...]:
        return 4 * tiles(compiled), tiles(compiled)

    for direction, goal, launch in (("forward", 0.5, by_kernel["fwd"]), ("backward", 1.3, by_kernel["attn_dx"])):
        yield Headline(
            name=f"tnt {direction}", family="tnt", launch=launch, costs=costs, floor=floors[direction], goal_ms=goal,
            passes={"fwd": fwd, "mlp_dx": mlp_dx, "attn_dx": attn_dx},
        )  # fmt: skip


def _patch_embed() -> Iterator[Headline]:
    floors = list(patch_embed.FAMILY.floors())
    for name, channels, width, kernel, stride, size, goal in (
        ("a", 1, 64, 7, 4, 256, 0.06),
        ("b", 64, 128, 3, 2, 64, 0.04),
        ("raw", 1, 64, 7, 4, 256, None),
        ("b channels last", 64, 128, 3, 2, 64, 0.04),
    ):
        raw = name == "raw"
        geometry = resolve((size,) * 3, kernel, stride=stride, padding=kernel // 2)
        x = _empty(1, channels, *(size,) * 3, dtype=torch.int16 if raw else torch.bfloat16)
        if name.endswith("last"):
            x = x.contiguous(memory_format=torch.channels_last_3d)
        weight, row = _empty(width, channels * (2 if raw else 1), *(kernel,) * 3), _empty(width)
        windows = [0.0, 1.0, 0.0, 1.0] * 2 if raw else []
        tokens = _empty(1, geometry.tokens, width)
        costs = patch_embed.costs(
            chip=CHIP, geometry=geometry, batch=1, channels=weight.shape[1], width=width, itemsize=2, voxel_bytes=2
        )

        def forward(x=x, weight=weight, row=row, windows=windows, geometry=geometry) -> None:
            patch_fused.forward(
                x, weight, row, row, row, (None,) * 3, None, windows, geometry, "zeros", "layer", 1e-6, False, "fused"
            )

        def backward(x=x, weight=weight, row=row, windows=windows, geometry=geometry, tokens=tokens) -> None:
            patch_fused.backward(
                tokens, x, weight, tokens, row, windows, geometry, "zeros", "layer", 1e-6,
                (False, True, True, True, True), "fused",
            )  # fmt: skip

        for direction, launch in (("forward", forward), ("backward", backward)):
            floor = next(
                f for f in floors if f.direction == direction and f.shape.startswith(f"patch_embed {channels}x")
            )
            yield Headline(
                name=f"patch_embed {name} {direction}", family="patch_embed", launch=launch, costs=costs, floor=floor,
                goal_ms=goal if direction == "forward" else None,
            )  # fmt: skip


HEADLINES = {
    headline.name: headline
    for family in (_disentangled, _tnt, _nystrom, _performer, _patch_embed)  # what takes longest to compile first
    for headline in family()
}
