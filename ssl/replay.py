"""Runs outside the loop: a step that went wrong, again and step by step; and a dry run that only measures."""

from __future__ import annotations

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cost
import methods
import settings
from medformer.errors import UserError
from medformer.files import write_whole
from optim import make_optimiser
from settings import TrainConfig
from views import Plan, fitting, render

__all__ = ["dry_run", "run", "save"]

_FORMAT = "medformer-replay-1"
_TIMED = 3  # steps of a dry run, after one that is not counted
_LONG_S = 60.0  # a first step that takes longer is the only one


def save(
    run: Path, config: TrainConfig, scale: str, method: methods.Method, plans: list[Plan], step: int, scans: str
) -> Path:
    """Keep a step's batch, with the weights it met, in the run's bad/ folder."""
    path = run / "bad" / f"step-{step:08d}.pt"
    state = {
        "format": _FORMAT, "config": settings.as_dict(config), "scale": scale, "step": step, "scans": scans,
        "method": method.state_dict(), "plans": [[torch.as_tensor(part) for part in plan] for plan in plans],
    }  # fmt: skip
    write_whole(path, lambda file: torch.save(state, file))
    return path


def run(path: Path, device: str) -> int:
    """Repeat the step kept in `path`; say what of it is not finite, and where that begins."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = isinstance(state, dict) and state.get("format") == _FORMAT
    except Exception as error:  # whatever the unpickler makes of another kind of file
        raise UserError(f"--replay {path}: cannot be read ({str(error).splitlines()[0][:120]})") from error
    if not found:
        raise UserError(f"--replay {path}: is not a file of a run's bad/ folder")
    config = settings.from_dict(state["config"])
    place = torch.device("cpu" if device == "auto" else device)
    method = methods.make(config, state["scale"]).to(place)
    method.load_state_dict(state["method"])
    method.train()
    print(f"step {state['step']}, scans: {state['scans']}")
    weights = [name for name, value in method.state_dict().items() if not value.isfinite().all()]
    print(f"weights that are not finite: {', '.join(weights) or 'none'}")
    for number, parts in enumerate(state["plans"]):
        plans = Plan(*parts)
        views = [fitting(v, config.model) for v in render(plans, config.views, place)]
        whole = torch.as_tensor(plans.region)
        if whole.ndim == 5:  # of a case: a channel that begins with NaN is missing
            whole = torch.where(whole[..., :1, :1, :1].isnan(), 0.0, whole)
        regions = [i for i, region in enumerate(whole) if not region.isfinite().all()]
        print(f"micro-batch {number}: scans that are not finite: {regions or 'none'}")
        bad = [i for i, v in enumerate(views) if not v.isfinite().all()]
        print(f"micro-batch {number}: groups of views that are not finite: {bad or 'none'}")
        first = _watch(method)
        loss, values = method.loss(method.student, views, state["step"])
        print(f"loss {loss.item()}, " + ", ".join(f"{name} {value.item():.4g}" for name, value in values.items()))
        print(f"first module whose output is not finite: {first[0] if first else 'none'}")
        loss.backward()
    broken = [n for n, p in method.student.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    print(f"gradients that are not finite: {len(broken)}" + (f", for instance {broken[-1]}" if broken else ""))
    return 0


def _watch(method: Any) -> list[str]:
    """A list that gets the name of the first module to put out NaN or Inf."""
    found: list[str] = []

    def hook(name: str):
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, list | tuple) else [output]
            if not found and any(isinstance(t, Tensor) and not t.isfinite().all() for t in parts):
                found.append(name)

        return look

    for name, module in method.named_modules():
        module.register_forward_hook(hook(name))
    return found


def dry_run(config: TrainConfig, device: torch.device) -> int:
    """Parameters, memory and time a step of the network on this machine, on random voxels; reads no data."""
    methods.check(config, 1)
    torch.manual_seed(config.seed)
    occupied = _most_memory(device)
    method = methods.make(config, "").to(device)
    optimiser = make_optimiser(method.student, config.optim)
    autocast = torch.autocast(
        device.type,
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision),
        enabled=config.precision != "fp32",
    )
    cuts = config.views
    groups = [(cuts.global_views, cuts.global_size), (cuts.local_views, cuts.local_size)]
    channels = config.model.in_channels
    shapes = [(count * config.batch_size, channels, *size) for count, size in groups if count]
    views = [fitting(torch.randn(shape, device=device), config.model) for shape in shapes]
    for _ in range(method.look_steps):
        with autocast:
            method.look([torch.randn_like(v) for v in views])
    method.start()
    trained = sum(p.numel() for p in method.student.parameters())
    print(f"{config.method}, --size {config.size}, {config.precision} on {device}")
    print(f"parameters: {methods.parameters_of(method) / 1e6:.2f} M, {trained / 1e6:.2f} M with its head")
    print("views a step: " + ", ".join("x".join(map(str, shape)) for shape in shapes), flush=True)
    method.train()
    work = None
    if config.gpus:
        with cost.counting(method) as work:
            with autocast:
                loss, _ = method.loss(method.student, views, 0)
            loss.backward()
        method.skip_step()
        optimiser.zero_grad(set_to_none=True)
    times: list[float] = []
    for step in range(1 + _TIMED):
        began = time.monotonic()
        for _ in range(config.accumulate):
            with autocast:
                loss, _ = method.loss(method.student, views, step)
            (loss / config.accumulate).backward()
        method.before_step(step)
        optimiser.step()
        method.after_step(step)
        optimiser.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
        if times[0] > _LONG_S:
            break
    if not math.isfinite(loss.item()):
        raise UserError(f"--dry_run: the loss on random voxels is {loss.item()}; lower --optim.lr or use fp32")
    seconds = sorted(times[1:] or times)[len(times[1:]) // 2]
    kind = "of the GPU" if device.type == "cuda" else f"of this process, {occupied / 2**30:.2f} of it before the model"
    print(f"memory: {_most_memory(device) / 2**30:.2f} GiB {kind}, at most")
    print(
        f"time: {seconds:.2f} s a step{'' if times[1:] else ' (the first, alone)'}, "
        f"{seconds * config.steps / 3600:.1f} h for {config.steps} steps, without data"
    )
    if work is not None:
        scans, local = config.accumulate * config.batch_size, cost.here(work, seconds / config.accumulate, occupied)
        accumulate, parallel = config.accumulate, config.parallel
        print(cost.table(work, config.gpus, accumulate=accumulate, scans=scans, parallel=parallel, local=local))
    return 0


def _most_memory(device: torch.device) -> int:
    """Bytes at the worst moment so far: of a GPU's tensors, or of this process with all its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
