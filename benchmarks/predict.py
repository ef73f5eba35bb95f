"""Milliseconds of a headline's kernels by the model of `machine_code`: a prediction, no GPU has run it."""

from __future__ import annotations

from typing import Any

from ahead_of_time import TARGETS, Compiled, record
from compile_cases.headlines import Headline, Passes
from compile_cases.shapes import Cost
from machine_code import CLOCK

__all__ = ["predicted", "prediction"]

BANDWIDTH = 4.3e12
"""Bytes a second of one H200, measured by its lender."""


def _passes(compiled: Compiled, cost: Cost | None, given: Passes | None) -> tuple[float, ...] | None:
    """How often a program runs each loop: as given, or as the counted FLOP demand; None: not known."""
    code, programs = compiled.code, compiled.programs
    if given is not None and len(given(compiled)) == len(code.loops):
        return given(compiled)
    work = sum(loop.flop for loop in code.loops)
    if work and cost is not None and all(loop.depth == 1 for loop in code.loops):
        return tuple(max(0.0, (cost.flop / programs - code.straight.flop) / work) for _ in code.loops)
    return () if not code.loops else None


def prediction(compiled: Compiled, cost: Cost | None, given: Passes | None = None) -> dict[str, Any]:
    """low_ms and high_ms of one launch, the pipe that limits it, waves; without a model of its loops, of its bytes.

    Low: all pipes and the memory overlap. High: the tensor pipe and the busiest other do not, as always where products
    wait for each other.
    """
    target, code = TARGETS[compiled.arch], compiled.code
    moved = 1e3 * cost.bytes / BANDWIDTH if cost is not None else 0.0
    held = max(1, compiled.occupancy) * target.chip.units
    waves = compiled.programs / held
    passes = _passes(compiled, cost, given)
    if passes is None:
        moved = round(moved, 4)
        return {"low_ms": moved, "high_ms": moved, "limit": "bytes only", "waves": round(waves, 2)}
    cycles = dict(code.straight.cycles)
    for loop, times in zip(code.loops, passes, strict=True):
        for pipe, count in loop.cycles.items():
            cycles[pipe] += times * count
    # Programs of the last wave leave multiprocessors idle.
    share = (
        compiled.programs / target.chip.units * max(1.0, -(-compiled.programs // held) / waves if waves < 8 else 1.0)
    )
    ms = {pipe: 1e3 * count * share / CLOCK for pipe, count in cycles.items()}
    others = {pipe: value for pipe, value in ms.items() if pipe != "tensor"} | {"memory": moved}
    busiest = max(others, key=lambda pipe: others[pipe])
    high = ms["tensor"] + others[busiest]
    low = high if code.serialised else max(ms["tensor"], others[busiest])
    return {
        "low_ms": round(low, 4), "high_ms": round(high, 4),
        "limit": busiest if others[busiest] > ms["tensor"] else "tensor",
        "tensor_share": round(ms["tensor"] / low, 2) if low else 0.0, "waves": round(waves, 2),
    }  # fmt: skip


def predicted(headline: Headline, arch: str, only: str | None = None) -> list[dict[str, Any]]:
    """Each kernel (or `only` that one) that the headline launches on `arch`, as compiled, and the model's times."""
    lines = []
    for compiled in record(arch, headline.launch, only):
        name = compiled.kernel.removeprefix(f"{headline.family}_").removesuffix("_kernel")
        lines.append({
            "kernel": compiled.kernel, "registers": compiled.registers, "spills": compiled.spills,
            "shared": compiled.shared, "warps": compiled.num_warps, "occupancy": compiled.occupancy,
            "matrix": compiled.matrix, "serialised": compiled.code.serialised,
            "loop_cycles": round(max(compiled.code.hot.cycles.values())), "programs": compiled.programs,
            **(prediction(compiled, headline.costs.get(name), headline.passes.get(name)) if arch == "sm_90" else {}),
        })  # fmt: skip
    return lines
