"""What a step costs on N GPUs that are not here: time, memory and bytes sent, from one step that is.

`Counted` watches one real step: floating-point operations, and what forward keeps for backward. `estimate` puts that on
a machine. Assumptions, all of them:

- Compute: operations / (peak * `reached`); nothing else takes time: data are ready, the optimiser is free.
- Each GPU has the same batch, so compute does not depend on N; a straggler is not modelled.
- DDP reduces float32 gradients in a ring, 2 (N - 1) / N of their bytes each way, at the slowest link on the ring, while
  backward runs (two thirds of a step's compute); the last bucket (25 MiB) is never hidden.
- FSDP2 shards all that is trained, its optimiser and the teacher over all N: weights are gathered for forward and again
  for backward, the teacher's once, gradients are scattered: (N - 1) / N of 4 times the bytes, hidden behind all compute
  but for the largest block.
- Small exchanges (centre, figures, gradient norm, batch statistics): `exchanges` of one latency * log2(N) each; of a
  batch norm over all processes two forward and two backward.
- Memory: weights, gradients and AdamW's two moments in float32, the teacher, DDP's buckets (a second copy of the
  gradients), what forward keeps, and 10% for what the allocator does not hand out.

Checked against one and two processes on a CPU: misc/docs/scale.md. No GPU has confirmed these figures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import medformer_kernels.performer.ops  # noqa: F401 - so that its operators exist below
from medformer.errors import UserError
from peers import SyncBatchNorm
from settings import TrainConfig
from sharding import blocks

__all__ = [
    "MACHINES", "Counted", "Estimate", "Machine", "counting", "estimate", "here", "is_short", "pieces", "smaller",
    "table",
]  # fmt: skip

_BUCKET = 25 * 2**20  # DDP's default
_BACKWARD = 2 / 3
_MAIN_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_LOOPBACK = 1e9  # bytes a second, gloo between two processes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A cluster of equal GPUs."""

    name: str
    peak: float
    """Operations a second of one GPU, dense bfloat16 (vendor's figure)."""
    memory: float
    """Bytes of one GPU."""
    inside: float
    """Bytes a second from one GPU to the next in a node, one way, as collectives reach it."""
    between: float
    """The same between nodes, for each GPU."""
    gpus: int = 8
    """GPUs of a node."""
    reached: float = 0.3
    """Share of the peak that a step reaches; small models reach less."""
    latency: float = 20e-6
    """Seconds of a small exchange between two neighbours."""
    occupied: float = 0.0
    """Bytes that a process takes before there is a model."""


MACHINES = (
    Machine(name="A100-80G", peak=312e12, memory=80e9, inside=230e9, between=20e9),
    Machine(name="H100-80G", peak=989e12, memory=80e9, inside=360e9, between=40e9),
)


@dataclass(kw_only=True)
class Counted:
    """One micro-batch of one process, counted."""

    operations: float = 0.0
    """Multiplications and additions, forward and backward."""
    kept: int = 0
    """Bytes that forward keeps for backward, without weights."""
    trained: int = 0
    """Bytes of trained weights in float32."""
    average: int = 0
    """Bytes of the teacher or target."""
    largest: int = 0
    """Bytes of the largest block."""
    exchanges: int = 3
    """Small exchanges: three a step, and those of batch norms."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step on N GPUs; seconds, and bytes of one GPU."""

    compute: float
    exposed: float
    """Communication that compute does not hide."""
    sent: float
    memory: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


@contextmanager
def counting(method: Any) -> Iterator[Counted]:
    """Count what happens inside: one forward and backward pass of `method`."""
    student: nn.Module = method.student
    weights = {p.data_ptr() for p in method.parameters()} | {b.data_ptr() for b in method.buffers()}
    found = Counted(
        trained=4 * sum(p.numel() for p in student.parameters() if p.requires_grad),
        average=4 * sum(p.numel() for p in method.parameters() if not p.requires_grad),
        largest=4 * max((_size(m) for m in blocks(student)), default=0),
    )
    seen: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    def exchange(*_: Any) -> None:
        found.exchanges += 4 if torch.is_grad_enabled() else 2

    hooks = [m.register_forward_hook(exchange) for m in method.modules() if isinstance(m, SyncBatchNorm)]
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
    found.operations, found.kept = float(counter.get_total_flops()), sum(seen.values())


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def estimate(
    work: Counted, machine: Machine, gpus: int, *, accumulate: int = 1, parallel: Literal["ddp", "fsdp2"] = "ddp"
) -> Estimate:
    """A step of `accumulate` micro-batches on each of `gpus` GPUs."""
    compute = accumulate * work.operations / (machine.peak * machine.reached)
    link = machine.inside if gpus <= machine.gpus else machine.between
    share = (gpus - 1) / gpus
    states = 4 * work.trained + work.average  # weights, gradients, two moments
    if parallel == "ddp":
        buckets = work.trained if gpus > 1 else 0
        held: dict[str, float] = {"states": states, "buckets": buckets}
        sent = 2 * share * work.trained
        # Gradients are only sent in the last micro-batch.
        hidden = _BACKWARD * compute / accumulate
        exposed = max(sent / link - hidden, 2 * share * min(_BUCKET, work.trained) / link)
    else:
        held = {"states": states / gpus, "unsharded": 2 * work.largest}
        sent = share * accumulate * (3 * work.trained + work.average)
        exposed = max(sent / link - compute, share * work.largest / link)
    exposed = exposed + work.exchanges * machine.latency * math.log2(gpus) if gpus > 1 else 0.0
    parts = held | {"kept for backward": work.kept}
    memory = machine.occupied + 1.1 * sum(parts.values())
    return Estimate(compute=compute, exposed=exposed, sent=sent, memory=memory, parts=parts)


def here(work: Counted, seconds: float, occupied: float) -> Machine:
    """This machine, by a micro-batch that took `seconds`: two processes, each as fast as the one, over loopback."""
    return Machine(
        name="this machine", peak=work.operations / seconds, memory=math.inf, inside=_LOOPBACK, between=_LOOPBACK,
        gpus=2, reached=1.0, latency=1.7e-3, occupied=occupied,
    )  # fmt: skip


def table(
    work: Counted, gpus: int, *, accumulate: int, scans: int, parallel: Literal["ddp", "fsdp2"] = "ddp",
    local: Machine | None = None,
) -> str:  # fmt: skip
    """What `--dry_run --gpus N` prints: machines with 1, one node of and N GPUs; `scans`: of one GPU's step.

    `local`: also two processes of this machine, which can be checked against a run.
    """
    lines = [
        f"on GPUs that are not here ({parallel}; assumptions: ssl/cost.py; {work.operations / 1e12:.3g} TFLOP a "
        f"micro-batch, {work.trained / 2**20:.0f} MiB of trained weights):",
        f"{'':>12} {'GPUs':>5} {'s/step':>9} {'scans/s':>9} {'busy':>6} {'GiB/GPU':>8} {'MiB sent':>9}",
    ]
    rows = [(m, count) for m in MACHINES for count in sorted({1, min(m.gpus, gpus), gpus})]
    rows += [(local, count) for count in (1, 2) if local is not None]
    for machine, count in rows:
        found = estimate(work, machine, count, accumulate=accumulate, parallel=parallel)
        full = " does not fit" if found.memory > machine.memory else ""
        lines.append(
            f"{machine.name:>12} {count:>5} {found.seconds:>9.4f} {scans * count / found.seconds:>9.1f} "
            f"{found.efficiency:>6.0%} {found.memory / 2**30:>8.2f} {found.sent / 2**20:>9.1f}{full}"
        )
    return "\n".join(lines)


def is_short(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of this machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def pieces(views: list[Tensor], scans: int, count: int) -> list[list[Tensor]]:
    """The views of a batch ([V * scans, ...] each, view by view) in `count` parts of as many scans each."""
    if count == 1:
        return [views]
    split = [x.unflatten(0, (-1, scans)).chunk(count, dim=1) for x in views]
    return [[x.flatten(0, 1) for x in part] for part in zip(*split, strict=True)]


def smaller(config: TrainConfig, count: int, ranks: int, method: Any, views: list[Tensor]) -> int:
    """The next larger number of parts of a micro-batch that trains as the whole would, where `count` parts did not fit.

    Raises:
        UserError: there is none. It names what looks at whole batches, and how many scans fit.
    """
    scans, whole = config.batch_size, _whole_batches(config)
    finer = [n for n in range(count + 1, scans + 1) if scans % n == 0]
    if finer and not whole and ranks == 1:
        return finer[0]
    why = (
        f"{whole} looks at whole batches, so that smaller ones are another training" if whole
        else "one scan alone does not fit" if not finer else "the processes of a run cannot change alone"
    )  # fmt: skip
    fit = _fitting(method, views, scans)
    way_out = f"about {fit} fit: --batch_size {fit}, " if 0 < fit < scans else ""
    raise UserError(
        f"out of memory with {scans // count} scans in one pass, and {why}; {way_out}--checkpoint_activations or a "
        "smaller --views.global_size, then --resume"
    )


def _whole_batches(config: TrainConfig) -> str:
    """The first setting under which the scans of a micro-batch see each other; "" where there is none."""
    dino, byol = config.dino, config.byol
    found = {
        "dino": {
            "--dino.norm batch": dino.norm == "batch", "--dino.balance sinkhorn": dino.balance == "sinkhorn",
            "--dino.koleo": dino.koleo > 0, "--dino.masked_patches": dino.masked_patches > 0,
        },
        "byol": {"--byol.norm": byol.norm != "group", "--byol.koleo": byol.koleo > 0},
        "igpt": {},
    }[config.method] | {
        "--views.cutmix": config.views.cutmix > 0, "--model.norm batch": getattr(config.model, "norm", "") == "batch",
        "--model.mlp moe": getattr(config.model, "mlp", "") == "moe",
    }  # fmt: skip
    return next((name for name, there in found.items() if there), "")


def _fitting(method: Any, views: list[Tensor], scans: int) -> int:
    """Scans in one pass that this machine has memory for, by two that are counted; 0 where not even those fit."""
    few = min(2, scans)
    device = views[0].device
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _MAIN_MEMORY
    try:
        with counting(method) as work:
            loss, _ = method.loss(method.student, pieces(views, scans, scans // few)[0], 0)
            loss.backward()
    except RuntimeError as error:
        if not is_short(error):
            raise
        return 0
    finally:
        method.skip_step()
        method.zero_grad(set_to_none=True)
    return max(0, math.floor((total / 1.1 - 4 * work.trained - work.average) / max(1, work.kept / few)))


def _state(k: Any, v: Any, omega: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Features of the keys, and their sums with the values."""
    tokens, features = math.prod(k[:3]), omega[-2]
    return 2 * tokens * features * (k[-1] + v[-1])


def _read(q: Any, omega: Any, values: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(q[:3]) * omega[-2] * (q[-1] + values[-1])


def _state_backward(k: Any, v: Any, omega: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Features again; dv; the weights' gradient; dk.
    return 2 * math.prod(k[:3]) * omega[-2] * 2 * (k[-1] + v[-1])


def _read_backward(q: Any, omega: Any, values: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(q[:3]) * omega[-2] * 2 * (q[-1] + values[-1])


_FORMULAS = {
    torch.ops.medformer.performer_state: _state,
    torch.ops.medformer.performer_read: _read,
    torch.ops.medformer.performer_state_backward: _state_backward,
    torch.ops.medformer.performer_read_backward: _read_backward,
}
