"""The steps of `prove_on_gpu`, in the order of their value: each yields results as dictionaries, one at a time.

A step may end at any time, by a fault of a kernel or by the clock: what it has yielded is on disk by then.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import bench_tnt
from compile_cases import FAMILIES, Floor
from measuring import environment
from prove_machine import Dry, Gpu
from prove_subjects import SUBJECTS, Problem, Subject, inner_problem, tile_entry

__all__ = ["STEPS", "Step"]

Machine = Gpu | Dry
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    name: str
    seconds: int
    """It is stopped after that long, so that a kernel that hangs costs no more."""
    run: Callable[[Machine], Iterator[Result]]


def about(machine: Machine) -> Iterator[Result]:
    yield environment() | {"device": machine.name, "cores": os.cpu_count(), "system": platform.platform()}
    # Two ceilings of this machine: what floors are taken from.
    count = 1 << (16 if machine.dry else 29)
    source, target = torch.ones(2, count, dtype=machine.dtype, device=machine.device).unbind(0)
    ms = machine.ms(lambda: target.copy_(source))
    yield {"what": "copy", "ms": ms, "tb_s": 2 * source.nbytes / ms / 1e9}
    del source, target
    size = 64 if machine.dry else 8192
    a, b = torch.randn(2, size, size, dtype=machine.dtype, device=machine.device).unbind(0)
    ms = machine.ms(lambda: a @ b)
    yield {"what": "matrix product", "ms": ms, "tflop_s": 2 * size**3 / ms / 1e9}


def _results(run: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and the gradient of every leaf, for the same gradient of the output."""
    out = run(leaves)
    dout = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1))
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def right_small(subject: Subject, machine: Machine) -> Iterator[Result]:
    """At most twice as far from float64 as plain PyTorch in the same dtype: the output and each gradient."""
    problem = subject.small(machine.device, machine.dry)
    exact = _results(problem.reference, problem.cast(torch.float64))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        plain = _results(problem.reference, problem.cast(dtype))
        made = _results(lambda x: problem.ours(x, _backend(machine)), problem.cast(dtype))
        errors = {name: (_distance(made[name], exact[name]), _distance(plain[name], exact[name])) for name in exact}
        eps = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        wrong = {name: pair for name, pair in errors.items() if not pair[0] <= 2 * pair[1] + eps}
        worst = max(errors, key=lambda name: errors[name][0])
        yield {
            "what": "float64", "dtype": str(dtype)[6:], "ok": not wrong, "wrong": wrong, "worst": worst,
            "error": errors[worst][0], "plain_error": errors[worst][1], "results": len(errors),
        }  # fmt: skip


def _backend(machine: Machine) -> str:
    return "torch" if machine.dry else "triton"


def right_large(subject: Subject, machine: Machine) -> Iterator[Result]:
    """In bf16 by the kernels against float32 by PyTorch, at the size of the target: within 3%, finite."""
    problem = subject.large(machine.device, machine.dry)
    rounded = {name: x.to(machine.dtype).float().requires_grad_() for name, x in problem.leaves.items()}
    expected = _results(lambda x: problem.ours(x, "torch"), rounded)
    made = _results(lambda x: problem.ours(x, _backend(machine)), problem.cast(machine.dtype))
    errors = {name: _distance(made[name], expected[name]) for name in made}
    wrong = {name: error for name, error in errors.items() if not error <= 0.03}
    worst = max(errors, key=lambda name: errors[name])
    yield {
        "what": "large", "dtype": str(machine.dtype)[6:], "ok": not wrong, "wrong": wrong, "worst": worst,
        "error": errors[worst], "results": len(errors),
    }  # fmt: skip


def _calls(
    machine: Machine, problem: Problem, backend: str
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """Forward alone, and forward and backward to every leaf."""
    leaves = problem.cast(machine.dtype)
    forward = torch.no_grad()(lambda: problem.ours(leaves, backend))
    dout = torch.randn_like(forward())

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(problem.ours(leaves, backend), list(leaves.values()), dout)

    return forward, step


def _floors(subject: Subject) -> list[Floor]:
    return [floor for family in FAMILIES.values() for floor in family.floors() if floor.shape in subject.floors]


def times(subject: Subject, machine: Machine) -> Iterator[Result]:
    """Median ms and memory beyond the inputs, beside the goal and the floor (of one H200)."""
    problem = subject.large(machine.device, machine.dry)
    forward, step = _calls(machine, problem, _backend(machine))
    floors = {floor.direction: floor.ms for floor in _floors(subject)}
    both = sum(floors.get(direction, 0.0) for direction in ("forward", "backward"))
    for what, call, floor, goal in (
        ("forward", forward, floors.get("forward"), subject.goal_ms),
        ("step", step, both or None, subject.step_goal_ms),
    ):
        ms = machine.ms(call)
        yield {
            "what": what, "ms": ms, "goal_ms": goal, "floor_ms": floor,
            "share_of_floor": floor / ms if floor else None, "peak_mib": machine.peak_mib(call),
        }  # fmt: skip


def peers(subject: Subject, machine: Machine) -> Iterator[Result]:
    """Same process, same shapes; what is not installed or cannot run says so."""
    for name, make in subject.peers(machine.dry):
        try:
            peer = make()
            for what, call in (("forward", peer.forward), ("step", peer.step)):
                yield {
                    "what": what, "peer": name, "shape": peer.shape, "large": peer.large, "ms": machine.ms(call),
                    "peak_mib": machine.peak_mib(call),
                }  # fmt: skip
            del peer
        except pytest.skip.Exception as reason:
            yield {"peer": name, "skipped": str(reason)}
        except Exception as error:  # theirs: out of memory, out of reach
            if "CUDA error" in str(error):
                raise
            yield {"peer": name, "failed": _one_line(error)}
        machine.free()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def whole(subject: Subject, machine: Machine) -> Iterator[Result]:
    """A CUDA graph gives the same bits and the time without Python; torch.compile takes the call whole."""
    problem = subject.large(machine.device, machine.dry)
    forward, _ = _calls(machine, problem, _backend(machine))
    expected = forward()
    out, replay = machine.graph(forward)
    replay()
    machine.synchronise()
    yield {"what": "graph", "ok": torch.equal(out, expected), "ms": machine.ms(replay)}
    leaves = {name: x.detach() for name, x in problem.cast(machine.dtype).items()}
    compiled = machine.compiled(partial(problem.ours, backend="auto"))
    error = _distance(compiled(leaves), expected)
    yield {"what": "torch.compile", "ok": error <= 0.02, "error": error, "ms": machine.ms(lambda: compiled(leaves))}


def tiles(subject: Subject, machine: Machine) -> Iterator[Result]:
    """Forward with other tiles than the shipped ones, in their place."""
    family = subject.family.split()[0]
    problem = subject.large(machine.device, machine.dry)
    for kernel, others in subject.tiles.items():
        entry = tile_entry(family, kernel, machine.arch)
        for other in ({}, *others):
            result: Result = {"kernel": kernel, "tile": entry | other, "shipped": not other}
            with patch.dict(entry, other):
                try:
                    forward, _ = _calls(machine, problem, _backend(machine))
                    yield result | {"ms": machine.ms(forward)}
                except Exception as error:  # a tile that does not compile, or wants too much shared memory
                    if "CUDA error" in str(error):
                        raise
                    yield result | {"failed": _one_line(error)}


def many_sequences(machine: Machine) -> Iterator[Result]:
    """More sequences than a grid axis or SDPA holds."""
    shape = bench_tnt.Shape(40 if machine.dry else 262_144, 16, 24)
    problem = inner_problem(machine.device, shape)
    forward, step = _calls(machine, problem, _backend(machine))
    last = {"x": problem.leaves["x"][-8:], **{k: x for k, x in problem.leaves.items() if k != "x"}}
    few = problem.ours({name: x.to(machine.dtype) for name, x in last.items()}, _backend(machine))
    error = _distance(forward()[-8:], few)
    for what, call in (("forward", forward), ("step", step)):
        yield {
            "what": what, "shape": str(shape), "ok": error <= 1e-2, "error": error, "ms": machine.ms(call),
            "peak_mib": machine.peak_mib(call),
        }  # fmt: skip


def devices(machine: Machine) -> Iterator[Result]:
    """Kernels run on the device of their tensors, whichever is current."""
    every = machine.devices()
    if len(every) < 2:
        yield {"skipped": f"{len(every)} device"}
        return
    for name in ("performer", "nystrom", "disentangled", "tnt", "patch_embed a"):
        problems = [SUBJECTS[name].small(device, machine.dry) for device in every[:2]]
        # Numbers drawn on one device are not those drawn on the other.
        for leaf, x in problems[1].leaves.items():
            x.copy_(problems[0].leaves[leaf])
        results = [_results(lambda x, p=p: p.ours(x, _backend(machine)), p.cast(machine.dtype)) for p in problems]
        far = max(_distance(b.to(every[0]), results[0][name]) for name, b in results[1].items())
        yield {"what": name, "ok": far <= 0.02, "error": far}


def training(machine: Machine) -> Iterator[Result]:
    """`small_3d`: forward, backward and AdamW on one crop, bf16 autocast, no checkpointing."""
    from medformer import small_3d

    for size in (8, 16) if machine.dry else (128, 256):
        torch.manual_seed(0)
        model = small_3d().to(machine.device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        crop = torch.randn(1, 1, size, size, size, device=machine.device)

        def step(model=model, optimiser=optimiser, crop=crop) -> Tensor:
            with torch.autocast(machine.device.type, torch.bfloat16):
                loss = model(crop).float().square().mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            return loss.detach()

        first, last = step().item(), step().item()
        yield {
            "what": f"small_3d {size}^3", "ok": 0 <= last < first, "first_loss": first, "ms": machine.ms(step),
            "peak_mib": machine.peak_mib(step),
        }  # fmt: skip
        del model, optimiser, crop, step
        machine.free()


def _each(kind: str, run: Any, seconds: int, families: tuple[str, ...] = tuple(SUBJECTS)) -> list[Step]:
    return [Step(name=f"{name}: {kind}", seconds=seconds, run=partial(run, SUBJECTS[name])) for name in families]


_HEADLINE = ("performer", "nystrom", "disentangled", "tnt", "patch_embed a", "patch_embed b")
_VARIANTS = ("nystrom volume", "patch_embed raw", "performer causal")
STEPS = [
    Step(name="machine", seconds=60, run=about),
    *(step for name in _HEADLINE for step in (
        *_each("right, small", right_small, 60, (name,)),
        *_each("time", times, 60, (name,)),
    )),
    *_each("right, large", right_large, 60, _HEADLINE),
    *_each("peers", peers, 90, _HEADLINE),
    Step(name="training step", seconds=60, run=training),
    *_each("graph and compile", whole, 60, _HEADLINE),
    *(step for name in _VARIANTS for step in (
        *_each("right, small", right_small, 60, (name,)),
        *_each("time", times, 60, (name,)),
    )),
    Step(name="262,144 sequences", seconds=60, run=many_sequences),
    *_each("tiles", tiles, 60, tuple(name for name in _HEADLINE if SUBJECTS[name].tiles)),
    Step(name="two devices", seconds=60, run=devices),
]  # fmt: skip
"""Tests marked `gpu` follow until time is up."""
