"""Pretrain a 3D backbone on unlabelled scans. `python ssl/train.py --help` explains every flag.

One process, or several: `torchrun --nproc-per-node 2 ssl/train.py ...`. The loop is `train`, below, in one piece.
"""

from __future__ import annotations

import math
import os

# Before torch loads OpenMP: threads that wait must sleep, not spin. On a shared CPU spinning made a step ten times
# slower (2 threads on 2 busy cores: 5 s against 0.5 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import medformer
import report
import runs
import settings
from dino import CollapseWatch, Dino
from prepare import Crops, Prepared, loader, prepare, sample_scan
from runs import UserError
from schedules import clip_per_tensor, cosine, parameter_groups
from settings import TrainConfig
from views import render

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Scans may take hours to read the first time; the other processes wait for the first one that long.
_PATIENCE = timedelta(days=2)


class Place(NamedTuple):
    """Where this process runs, and among how many."""

    device: torch.device
    rank: int
    ranks: int


class Stop:
    """Ctrl-C and SIGTERM ask for a checkpoint and an end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before = {n: signal.signal(n, self._asked) for n in (signal.SIGINT, signal.SIGTERM)}

    def _asked(self, number: int, _frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 data or disk, 2 usage, 128 + n stopped by signal n."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        return _run(sys.argv[1:] if argv is None else argv, rank, ranks)
    except UserError as error:
        if rank == 0:
            runs.complain(str(error))
        return error.code
    except KeyboardInterrupt:  # before training began, or twice
        if rank == 0:
            runs.complain("stopped by Ctrl-C")
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(argv: list[str], rank: int, ranks: int) -> int:
    began = time.monotonic()
    say = print if rank == 0 else _silent
    config = settings.parse(argv)
    state: dict[str, Any] | None = None
    run: Path | None = None
    if config.resume is not None:
        where = runs.latest_run() if config.resume == "auto" else Path(config.resume)
        run, state = runs.load_checkpoint(where, say)
        config = _merge(argv, state, say)
        if config.out is not None and Path(config.out).resolve() != run.resolve():
            raise UserError(f"--out {config.out} with --resume {run}: a run goes on in its own folder; drop --out", 2)
    else:
        runs.check_free(config.out)
    device = _device(config)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    home = run.parent if run else Path(config.out).parent if config.out else Path("runs")
    cache = Path(config.data.cache) if config.data.cache else home / "cache"
    prepared = _prepare(config, cache, rank, ranks)
    report.describe(prepared, config.data.root is None, say)
    if rank == 0 and run is None:
        run = runs.new_run(config.out)
    stop = Stop()
    with ExitStack() as at_end:
        at_end.callback(stop.restore)
        code = train(config, prepared, run, state, Place(device, rank, ranks), stop, at_end)
    say(f"{report.duration(time.monotonic() - began)} in all")
    return code


def _merge(argv: list[str], state: dict[str, Any], say: Any) -> TrainConfig:
    """The checkpoint's settings with the given flags on top; UserError where that is another model."""
    config = settings.parse(argv, saved=state["config"])
    changed = settings.changes(state["config"], settings.as_dict(config))
    shape = ("dino.prototypes", "dino.hidden", "dino.bottleneck")
    other = [f"{n} is {a} there, {b} here" for n, (a, b) in changed.items() if n.startswith("model.") or n in shape]
    if other:
        raise UserError(f"--resume {config.resume} is of another model: {'; '.join(other)}; drop these or start anew")
    for name, (old, new) in changed.items():
        say(f"note: --{name} was {old} in this run and is {new} from here on")
    if config.steps < state["step"]:
        raise UserError(f"--steps {config.steps} is below the {state['step']} steps this run already has", 2)
    return config


def _device(config: TrainConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N", 2) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu", 2)
    if config.precision == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a GPU, not {device.type}; use bf16 or fp32", 2)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def _prepare(config: TrainConfig, cache: Path, rank: int, ranks: int) -> Prepared:
    """The first process reads the scans, the others wait and get its list."""
    result: list[Any] = [None]
    if rank == 0:
        try:
            result = [prepare(config.data, config.views, cache, config.seed, report.reading)]
        except UserError as error:
            result = [error]
    if ranks > 1:
        patient = dist.new_group(timeout=_PATIENCE, backend="gloo")
        dist.broadcast_object_list(result, src=0, group=cast(dist.ProcessGroup, patient))
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def train(
    config: TrainConfig,
    prepared: Prepared,
    run: Path | None,
    state: dict[str, Any] | None,
    place: Place,
    stop: Stop,
    at_end: ExitStack,
) -> int:
    """All of training; returns the exit code.

    `run` is None in all but the first process; `state` is a checkpoint to go on from; `at_end` closes what is open
    however this ends.
    """
    device, rank, ranks = place
    say: Callable[[str], None] = _silent if run is None else print
    torch.manual_seed(config.seed)
    backbone = medformer.Backbone(config.model)
    method = Dino(backbone, config.model.width, config.dino, config.steps).to(device)
    backbone.checkpoint_activations = config.checkpoint_activations
    optimiser = torch.optim.AdamW(
        parameter_groups(method.student), lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2), fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    crops = Crops(prepared.train, config.views, config.seed)
    first, sample, bad, bad_in_a_row = 0, 0, 0, 0
    if state is not None:
        method.load_state_dict(state["method"])
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        first, sample, bad, bad_in_a_row = (state[n] for n in ("step", "sample", "bad", "bad_in_a_row"))
        _compare_scans(state["scans"], prepared.fingerprint(), say)
    student: nn.Module = method.student
    if ranks > 1:
        student = DistributedDataParallel(
            student, broadcast_buffers=False, find_unused_parameters=config.model.mask_token
        )
    warmup = round(config.optim.warmup * config.steps)
    scans_per_step = config.accumulate * config.batch_size * ranks
    ceiling = math.log(config.dino.prototypes)
    say(
        f"DINO, {sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M parameters, {config.precision} on {device}"
        f"{f' x {ranks} processes' if ranks > 1 else ''}, {scans_per_step} scans a step, "
        f"{2 + config.views.local_views} views a scan; the loss starts at ln K = {ceiling:.3f}"
    )
    if first:
        say(f"going on at step {first} of {config.steps}")
    metrics = meter = None
    if run is not None:
        runs.write_whole(run / "config.yaml", lambda file: file.write(settings.to_yaml(config).encode()))
        metrics = runs.Metrics(run, first)
        meter = report.Meter(config.steps, first, scans_per_step)
        at_end.callback(metrics.close)
        at_end.callback(meter.close)
        say = meter.say
    watch = CollapseWatch(config.dino.prototypes)
    workers = config.workers if config.workers is not None else 4 if device.type == "cuda" else 0
    feed = partial(
        loader, crops, accumulate=config.accumulate, batch=config.batch_size, rank=rank, ranks=ranks,
        pin=device.type == "cuda",
    )  # fmt: skip
    autocast = partial(torch.autocast, device.type, _DTYPES[config.precision], enabled=config.precision != "fp32")
    if state is None:
        for plans in feed(steps=1):
            views = render(plans, config.views, device)
            with autocast():
                method.look(views)
        method.start()
    batches = iter(feed(steps=config.steps - first, origin=sample, workers=workers))
    saved = first
    clock = time.monotonic()

    def save(step: int) -> None:
        nonlocal saved
        if run is None or metrics is None or step == saved:
            return
        metrics.sync()
        runs.save_checkpoint(run, step, {
            "format": "medformer-run-1", "step": step, "config": settings.as_dict(config),
            "method": method.state_dict(), "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(),
            "scans": prepared.fingerprint(), "sample": sample, "bad": bad, "bad_in_a_row": bad_in_a_row,
        })  # fmt: skip
        saved = step

    method.train()
    for step in range(first, config.steps):
        lr = cosine(step, config.steps, config.optim.lr, config.optim.final_lr, warmup=warmup)
        decay = cosine(step, config.steps, config.optim.weight_decay, config.optim.final_weight_decay)
        for group in optimiser.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decay"] else 0.0

        totals = torch.zeros(5, device=device)  # loss, entropy, kl, marginal, asked to stop
        for micro in range(config.accumulate):
            # Drop path draws from torch's generator: seeded per step, it needs no place in the checkpoint.
            torch.manual_seed(_seed(config.seed, step, micro, rank))
            views = render(next(batches), config.views, device)
            last = micro == config.accumulate - 1
            with student.no_sync() if ranks > 1 and not last else nullcontext():  # type: ignore[operator]
                with autocast():
                    loss, parts = method.loss(student, views, step)
                scaler.scale(loss / config.accumulate).backward()
            values = [loss.detach(), parts["entropy"], parts["kl"], parts["marginal"]]
            totals[:4] += torch.stack(values) / config.accumulate
        scaler.unscale_(optimiser)
        method.before_step(step)
        norm = clip_per_tensor(method.student.parameters(), config.optim.clip)
        totals[4] = float(stop.signal > 0)
        if ranks > 1:
            dist.all_reduce(totals)
            totals /= ranks
        mean_loss, entropy, kl, marginal, asked = totals.tolist()

        # fp16 overflows of the gradient alone are the scaler's business: it skips and lowers its scale.
        usable = math.isfinite(mean_loss) and (scaler.is_enabled() or math.isfinite(norm.item()))
        if usable:
            scaler.step(optimiser)
            method.after_step(step)
        else:
            method.skip_step()
        scaler.update()
        optimiser.zero_grad(set_to_none=True)

        bad_in_a_row = 0 if usable else bad_in_a_row + 1
        sample += scans_per_step
        if not usable:
            bad += 1
            names = _names(prepared, config.seed, range(sample - scans_per_step, sample))
            say(f"WARNING: step {step} skipped, loss {mean_loss}, gradient norm {norm.item()}; scans: {names}")
            if bad_in_a_row >= config.max_bad_steps:
                raise UserError(
                    f"{bad_in_a_row} steps in a row had a loss or gradient that is not finite, the last on {names}; "
                    "lower --optim.lr, use --precision fp32 or look at these scans"
                )
        if metrics is not None and meter is not None:
            now = time.monotonic()
            if step % config.log_every == 0 or step == config.steps - 1:
                metrics.write(step, {
                    "loss": mean_loss, "teacher_entropy": entropy, "kl": kl, "marginal_entropy": marginal,
                    "gradient_norm": norm.item(), "lr": lr, "weight_decay": decay, "momentum": method.momentum(step),
                    "teacher_temp": method.teacher_temp(step), "skipped_steps": bad,
                    "scans_per_s": scans_per_step / max(now - clock, 1e-9),
                })  # fmt: skip
            clock = now
            meter(mean_loss, entropy)
        collapse = watch(mean_loss, entropy, marginal)
        if collapse:
            say(f"WARNING: step {step}: {collapse}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps or asked:
            save(step + 1)
        if asked and step + 1 < config.steps:
            break
    else:
        step = config.steps - 1

    if meter is None or metrics is None or run is None:
        return 0 if step + 1 == config.steps else 128 + (stop.signal or signal.SIGTERM)
    at_end.pop_all().close()  # the bar, before anything is printed below it
    if step + 1 < config.steps:
        print(f"stopped after step {step + 1} of {config.steps}, saved; go on with: python ssl/train.py --resume {run}")
        return 128 + (stop.signal or signal.SIGTERM)
    if bad:
        print(f"{bad} steps were skipped because their loss or gradient was not finite (WARNING lines above)")
    _finish(config, prepared, run, method, None if math.isnan(meter.loss) else meter.loss)
    return 0


def _finish(config: TrainConfig, prepared: Prepared, run: Path, method: Dino, loss: float | None) -> None:
    teacher = method.teacher.backbone
    assert isinstance(teacher, medformer.Backbone)
    try:
        medformer.save(teacher, run / "backbone.safetensors")
    except OSError as error:
        raise UserError(
            f"cannot write {run / 'backbone.safetensors'}: {error.strerror}; make room and --resume {run}"
        ) from error
    if config.model.class_token:
        held = bool(prepared.held_out)
        scan = (prepared.held_out or prepared.train)[0]
        caption = f"{'Held-out' if held else 'Training'} scan after {config.steps} steps"
        z, y, x = (4 * n for n in config.views.global_size)
        report.attention_picture(teacher, scan, run / "attention.png", caption=caption, limit=(z, y, x))
    report.list_skipped(prepared.skipped, run, print)
    if loss is not None:
        print(f"loss {math.log(config.dino.prototypes):.3f} (ln K) -> {loss:.3f}")
    report.closing(run, config.steps, config.model.class_token, print)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence((*numbers, 4)).generate_state(1, np.uint32)[0])


def _names(prepared: Prepared, seed: int, samples: range) -> str:
    """The scans of some samples."""
    names = sorted({prepared.train[sample_scan(seed, s, len(prepared.train))].name for s in samples})
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _compare_scans(then: list[str], now: list[str], say: Any) -> None:
    if then == now:
        return
    gone, new = ([s.rsplit(" ", 1)[0] for s in a if s not in b] for a, b in ((then, now), (now, then)))
    parts = [f"{len(g)} {what} (for instance {g[0]})" for g, what in ((gone, "gone"), (new, "new or changed")) if g]
    say(f"WARNING: the scans differ from those this run began with: {', '.join(parts) or 'another order'}; "
        "the order of samples is a new one from here")  # fmt: skip


def _silent(*_: object) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
