"""Pretrain a backbone on unlabelled scans or images. `python ssl/train.py [dino|byol|igpt] --help` explains every flag.

One process, or several: `torchrun --nproc-per-node 2 ssl/train.py ...`. The loop is `train`, below, in one piece.
"""

from __future__ import annotations

import math
import os
import shutil

# Before torch loads OpenMP: threads that wait must sleep, not spin. On a shared CPU spinning made a step ten times
# slower (2 threads on 2 busy cores: 5 s against 0.5 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import methods
import online
import peers
import pictures
import replay
import report
import runs
import settings
import sharding
from crops import Ahead, Crops, loader
from optim import adaptive_clip, clip_per_tensor, make_optimiser
from prepare import Prepared
from roots import Order, gather, voxel_scale
from runs import UserError
from schedules import cosine
from settings import TrainConfig
from views import Plan, render

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Scans may take hours to read the first time; the other processes wait for the first one that long.
_PATIENCE = timedelta(days=2)
# Settings that decide the shape of the weights, besides --model's.
_SHAPE = (
    "method", "network", "size", "dino.prototypes", "dino.hidden", "dino.bottleneck", "byol.hidden", "byol.projection",
    "byol.norm", "igpt.colours", "igpt.patch", "igpt.order", "igpt.objective", "igpt.expire_span",
)  # fmt: skip


class Place(NamedTuple):
    """Where this process runs, and among how many."""

    device: torch.device
    rank: int
    ranks: int


class Stop:
    """Ctrl-C, SIGTERM and SIGUSR1 ask for a checkpoint and an end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before = {n: signal.signal(n, self._asked) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def _asked(self, number: int, _frame: object) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 data or disk, 2 usage, 75 another process was lost, 128 + n stopped by
    signal n after a checkpoint. 75 and 128 + n: start again with --resume."""
    rank, ranks = 0, 1
    try:
        rank, ranks = peers.from_environment()
        return _run(sys.argv[1:] if argv is None else argv, rank, ranks)
    except UserError as error:
        if rank == 0 or isinstance(error, peers.LocalError):
            runs.complain(f"process {rank}: {error}" if rank else str(error))
        return error.code
    except RuntimeError as error:
        if peers.is_worker(error):
            runs.complain(
                f"process {rank}: a worker of the loader died ({error}); is memory short? go on with --resume"
            )
            return 1
        if not peers.is_loss(error):
            raise
        runs.complain(f"process {rank}: another process of this run was lost; start all of them again with --resume")
        return peers.LOST
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
    if config.replay is not None:
        return replay.run(Path(config.replay), config.device)
    if config.dry_run:
        return replay.dry_run(config, _device(config))
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
    methods.check(config, ranks)
    device = _device(config)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        told = {n: v for n, v in settings.flat(settings.as_dict(config)).items() if n not in settings.MAY_CHANGE}
        peers.agree(told | {"torch": torch.__version__, "checkpoint": state and state["step"]})
    if config.parallel == "fsdp2":
        sharding.check(config, ranks)

    home = run.parent if run else Path(config.out).parent if config.out else Path("runs")
    cache = Path(config.data.cache) if config.data.cache else home / "cache"
    prepared, order = _prepare(config, cache, rank, ranks)
    report.describe(prepared, config.data.root is None, say)
    if rank > 0:
        run = None  # the first process alone writes
    elif run is None:
        run = runs.new_run(config.out)
    stop = Stop()
    with ExitStack() as at_end:
        at_end.callback(stop.restore)
        code = train(config, prepared, order, run, state, Place(device, rank, ranks), stop, at_end)
    say(f"{report.duration(time.monotonic() - began)} in all")
    return code


def _merge(argv: list[str], state: dict[str, Any], say: Any) -> TrainConfig:
    """The checkpoint's settings with the given flags on top; UserError where that is another model."""
    config = settings.parse(argv, saved=state["config"])
    changed = settings.changes(state["config"], settings.as_dict(config))
    other = [f"{n} is {a} there, {b} here" for n, (a, b) in changed.items() if n.startswith("model.") or n in _SHAPE]
    if config.method == "igpt" and "views.global_size" in changed:
        other.append("views.global_size is {} there, {} here".format(*changed["views.global_size"]))
    if changed.get("parallel", (None,))[0] is not None:
        raise UserError(f"--resume {config.resume} was run with --parallel {changed['parallel'][0]}: keep it", 2)
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


def _prepare(config: TrainConfig, cache: Path, rank: int, ranks: int) -> tuple[Prepared, Order]:
    """The first process reads the scans, the others wait and get its list."""
    result: list[Any] = [None]
    if rank == 0:
        try:
            result = [gather(config.data, config.views, config.model.dims, cache, config.seed, report.reading)]
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
    order: Order,
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
    scale = voxel_scale(prepared)
    method = methods.make(config, scale).to(device)
    split = config.parallel == "fsdp2"
    if state is not None:
        method.load_state_dict(state["method"])
    if split:
        sharding.shard(cast(nn.Module, method))
    optimiser = make_optimiser(method.student, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    crops = Crops(prepared.train, config.views, config.seed, order)
    first, sample, bad, bad_in_a_row, best = 0, 0, 0, 0, -1.0
    scans_per_step = config.accumulate * config.batch_size * ranks
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        sharding.place_moments(optimiser)
        scaler.load_state_dict(state["scaler"])
        first, sample, bad, bad_in_a_row = (state[n] for n in ("step", "sample", "bad", "bad_in_a_row"))
        best = state.get("best", best)
        _compare_scans(state["scans"], prepared.fingerprint(), say)
        before = state.get("scans_per_step", scans_per_step)
        if before != scans_per_step:
            say(f"WARNING: {scans_per_step} scans a step (accumulate x batch_size x processes) from here on, {before} "
                "before; the order of samples goes on, the schedules count steps")  # fmt: skip
    student: nn.Module = method.student
    if ranks > 1 and not split:
        student = DistributedDataParallel(
            student, broadcast_buffers=False, find_unused_parameters=getattr(config.model, "mask_token", False)
        )
    warmup = round(config.optim.warmup * config.steps)
    say(
        f"{config.method}, {methods.parameters_of(method) / 1e6:.2f} M parameters, {config.precision} on {device}"
        f"{f' x {ranks} processes' if ranks > 1 else ''}, {scans_per_step} scans a step, "
        f"{config.views.global_views + config.views.local_views} views a scan; {method.summary}"
    )
    if first:
        say(f"going on at step {first} of {config.steps}")
    metrics = meter = labelled = None
    if run is not None:
        if config.online.task is not None:
            labelled = online.read_labelled(config.online, config.views, config.model.dims)
        runs.write_whole(run / "config.yaml", lambda file: file.write(settings.to_yaml(config).encode()))
        metrics = runs.Metrics(run, first)
        meter = report.Meter(config.steps, first, scans_per_step, figure=method.headline.replace("_", " "))
        at_end.callback(metrics.close)
        at_end.callback(meter.close)
        say = meter.say
    writer = runs.Writer()
    at_end.callback(writer.close)  # before the metrics, which a write relies on
    workers = config.workers if config.workers is not None else 4 if device.type == "cuda" else 0
    feed = partial(
        loader, crops, accumulate=config.accumulate, batch=config.batch_size, rank=rank, ranks=ranks,
        pin=device.type == "cuda", timeout=config.loader_timeout,
    )  # fmt: skip
    autocast = partial(torch.autocast, device.type, _DTYPES[config.precision], enabled=config.precision != "fp32")

    def cut(plans: Plan) -> list[torch.Tensor]:
        views = render(plans, config.views, device)
        return [v.squeeze(2) for v in views] if config.model.dims == 2 else views

    if state is None and method.look_steps:
        for plans in feed(steps=method.look_steps):
            views = cut(plans)
            with autocast():
                method.look(views)
        method.start()
    source = iter(feed(steps=config.steps - first, origin=sample, workers=workers))
    batches = Ahead(source, device=device, timeout=config.loader_timeout)
    at_end.callback(batches.close)
    saved = first
    waited = {"data_wait_s": 0.0, "save_wait_s": 0.0}  # since the last step: for crops, for checkpoints
    clock = time.monotonic()

    @contextmanager
    def waiting(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        waited[name] += time.monotonic() - began

    def save(step: int, better: bool) -> None:
        nonlocal saved
        if step == saved:
            return
        weights, moments = method.state_dict(), optimiser.state_dict()
        if split:
            weights, moments = sharding.whole(weights), sharding.whole(moments)
        saved = step
        if run is None or metrics is None:
            return
        writer.finish()  # never two copies in memory
        content = {
            "format": "medformer-run-1", "step": step, "config": settings.as_dict(config),
            "method": runs.snapshot(weights), "optimiser": runs.snapshot(moments), "scaler": scaler.state_dict(),
            "scans": prepared.fingerprint(), "sample": sample, "bad": bad, "bad_in_a_row": bad_in_a_row, "best": best,
            "scans_per_step": scans_per_step,
        }  # fmt: skip
        writer.start(partial(_write, metrics, run, step, content, keep=config.keep, best=better))

    def evaluate(step: int) -> dict[str, float]:
        if labelled is None:
            return {}
        figures = online.measure(method.encoder, labelled, config.online.neighbours)
        say(f"after {step} steps: " + ", ".join(f"{n.replace('_', ' ')} {v:.3f}" for n, v in figures.items()))
        return figures

    untrained = {f"untrained_{name}": value for name, value in evaluate(0).items()} if first == 0 else {}
    method.train()
    for step in range(first, config.steps):
        writer.check()
        lr = cosine(step, config.steps, config.optim.lr, config.optim.final_lr, warmup=warmup)
        decay = cosine(step, config.steps, config.optim.weight_decay, config.optim.final_weight_decay)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = decay if group["decay"] else 0.0

        totals, names, seen = None, [], []
        for micro in range(config.accumulate):
            # Drop path and masks draw from torch's generator: seeded per step, it needs no place in the checkpoint.
            torch.manual_seed(_seed(config.seed, step, micro, rank))
            at = sample + (micro * ranks + rank) * config.batch_size
            with waiting("data_wait_s"):
                seen.append(peers.due(batches, partial(_names, prepared, order, range(at, at + config.batch_size))))
            views = cut(seen[-1])
            last = micro == config.accumulate - 1
            with student.no_sync() if ranks > 1 and not split and not last else nullcontext():  # type: ignore[operator]
                with autocast():
                    loss, parts = method.loss(student, views, step)
                scaler.scale(loss / config.accumulate).backward()
            names = list(parts)
            values = torch.stack([loss.detach(), *parts.values()]) / config.accumulate
            totals = values if totals is None else totals + values
        scaler.unscale_(optimiser)
        if split:
            sharding.average_gradients(method.student.parameters())
        method.before_step(step)
        norm = clip_per_tensor(method.student.parameters(), config.optim.clip)
        if config.optim.agc:
            adaptive_clip(method.student, config.optim.agc, skip=method.last_layers)
        assert totals is not None
        totals = torch.cat([totals, totals.new_tensor([float(stop.signal > 0)])])
        if ranks > 1:
            dist.all_reduce(totals)
            totals /= ranks
        mean_loss, *means, asked = totals.tolist()
        figures = dict(zip(names, means, strict=True))

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
            scans = _names(prepared, order, range(sample - scans_per_step, sample))
            say(f"WARNING: step {step} skipped, loss {mean_loss}, gradient norm {norm.item()}; scans: {scans}")
            if run is not None and not split and bad <= config.max_bad_steps:
                file = replay.save(run, config, scale, method, seen, step, scans)
                say(f"its batch is kept: python ssl/train.py --replay {file}")
            if bad_in_a_row >= config.max_bad_steps:
                raise UserError(
                    f"{bad_in_a_row} steps in a row had a loss or gradient that is not finite, the last on {scans}; "
                    "lower --optim.lr, use --precision fp32 or look at these scans"
                )
        done = step + 1
        measured = untrained if step == first else {}
        if (config.online.every and done % config.online.every == 0) or done == config.steps:
            measured = {**measured, **evaluate(done)}
        if metrics is not None and meter is not None:
            now = time.monotonic()
            if step % config.log_every == 0 or done == config.steps or measured:
                metrics.write(step, {
                    "loss": mean_loss, **figures, "gradient_norm": norm.item(), "lr": lr, "weight_decay": decay,
                    **method.schedules(step), "skipped_steps": bad, **measured,
                    "scans_per_s": scans_per_step / max(now - clock, 1e-9), **waited,
                })  # fmt: skip
            clock, waited = now, dict.fromkeys(waited, 0.0)
            meter(mean_loss, figures[method.headline])
        collapse = method.watch(mean_loss, figures)
        if collapse:
            say(f"WARNING: step {step}: {collapse}")
        if run is not None and config.picture_every and done % config.picture_every == 0 and done < config.steps:
            path = run / "pictures" / f"step-{done:08d}.png"
            if pictures.draw(config, prepared, method, path, f"after {done} steps") and metrics is not None:
                pictures.to_board(metrics, path, done)
        better = measured.get("knn_accuracy", -1.0) > best
        best = max(best, measured.get("knn_accuracy", -1.0))
        if done % config.save_every == 0 or done == config.steps or asked or better:
            with waiting("save_wait_s"):
                save(done, better)
        if asked and done < config.steps:
            break
    else:
        step = config.steps - 1
    writer.finish()

    if split and step + 1 == config.steps:
        finished = sharding.whole(method.state_dict())
        method = methods.make(config, scale).to(device)
        method.load_state_dict(finished)
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


def _write(metrics: runs.Metrics, run: Path, step: int, content: dict[str, Any], *, keep: int, best: bool) -> None:
    metrics.sync()  # the lines that a resumed run keeps
    runs.save_checkpoint(run, step, content, keep=keep, best=best)


def _finish(config: TrainConfig, prepared: Prepared, run: Path, method: methods.Method, loss: float | None) -> None:
    try:
        weights = method.save(run)
    except OSError as error:
        where = error.filename or run
        raise UserError(f"cannot write {where}: {error.strerror}; make room and --resume {run}") from error
    picture = run / ("completions.png" if config.method == "igpt" else "attention.png")
    drawn = pictures.draw(config, prepared, method, picture, f"after {config.steps} steps")
    report.list_skipped(prepared.skipped, run, print)
    if loss is not None:
        print(f"loss {loss:.3f} at the end; {method.summary}")
    best = _save_best(config, run, method)
    report.closing(run, config.steps, weights, picture.name if drawn else None, best, print)


def _save_best(config: TrainConfig, run: Path, method: methods.Method) -> str | None:
    """The weights with the highest kNN accuracy as a folder like the run's, unless they are the last; what they are."""
    if not (kept := run / "checkpoints" / "best.pt").is_file():
        return None
    try:
        state, folder = runs.load_checkpoint(kept, print)[1], run / "best"
        if state["step"] == config.steps:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was shorter and has gone on
            return None
        method.load_state_dict(state["method"])
        folder.mkdir(exist_ok=True)
        method.save(folder)
        runs.write_whole(folder / "config.yaml", lambda file: file.write((run / "config.yaml").read_bytes()))
    except (UserError, OSError) as error:
        print(f"WARNING: the best weights were not written: {error}")
        return None
    return f"the weights after step {state['step']}, whose kNN accuracy was highest ({state['best']:.3f})"


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence((*numbers, 4)).generate_state(1, np.uint32)[0])


def _names(prepared: Prepared, order: Order, samples: range) -> str:
    """The scans of some samples."""
    names = sorted({prepared.train[order(s)].name for s in samples})
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
