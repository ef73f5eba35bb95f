"""Pretrain a backbone on unlabelled scans or images. `medformer pretrain [dino|byol|igpt] --help` explains every flag.

One process, or several: `torchrun --nproc-per-node 2 ssl/train.py ...`. The loop itself is `loop.py`.
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
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

import methods
import peers
import pictures
import replay
import runs
import screen
import settings
import sharding
from loop import Loop, Place, Stop, silent
from medformer.channels import flags_of
from medformer.data.sequences import patterns_of
from medformer.data.store.limit import Use
from medformer.errors import UserError, complain
from medformer.evaluation.setup import device_of
from medformer.files import byte_count, write_whole
from medformer.locks import Claim
from roots import Order, Prepared, gather
from settings import TrainConfig

# Scans may take hours to read the first time; the other processes wait for the first one that long.
_PATIENCE = timedelta(days=2)
# Settings that decide the shape of the weights, besides --model's.
_SHAPE = (
    "method", "network", "size", "dino.prototypes", "dino.hidden", "dino.bottleneck", "byol.hidden", "byol.projection",
    "byol.norm", "igpt.colours", "igpt.patch", "igpt.order", "igpt.objective", "igpt.expire_span", "data.missing",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 data or disk, 2 usage, 75 another process was lost, 128 + n stopped by
    signal n after a checkpoint. 75 and 128 + n: start again with --resume."""
    rank, ranks = 0, 1
    try:
        rank, ranks = peers.from_environment()
        return _run(sys.argv[1:] if argv is None else argv, rank, ranks)
    except UserError as error:
        if rank == 0 or isinstance(error, peers.LocalError):
            complain(f"process {rank}: {error}" if rank else str(error))
        return error.code
    except RuntimeError as error:
        if peers.is_worker(error):
            complain(f"process {rank}: a worker of the loader died ({error}); is memory short? go on with --resume")
            return 1
        if not peers.is_loss(error):
            raise
        complain(f"process {rank}: another process of this run was lost; start all of them again with --resume")
        return peers.LOST
    except KeyboardInterrupt:  # before training began, or twice
        if rank == 0:
            complain("stopped by Ctrl-C")
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(argv: list[str], rank: int, ranks: int) -> int:
    began = time.monotonic()
    say = print if rank == 0 else silent
    config = settings.parse(argv)
    if config.replay is not None:
        return replay.run(Path(config.replay), config.device)
    if config.dry_run:
        return replay.dry_run(config, _device(config))
    state: dict[str, Any] | None = None
    run: Path | None = None
    restart = peers.restarts()
    if restart is not None:
        if config.out is None and config.resume is None:
            raise UserError("torchrun --max-restarts needs --out: the folder that a restart goes on with", 2)
        if restart > 0 and config.out and config.resume is None and runs.checkpoints(Path(config.out)):
            argv = [*argv, f"--resume={config.out}"]
            config = settings.parse(argv)
    if config.resume is not None:
        where = runs.latest_run() if config.resume == "auto" else Path(config.resume)
        run, state = runs.load_checkpoint(where, say)
        config = _merge(argv, state, say)
        if config.out is not None and Path(config.out).resolve() != run.resolve():
            raise UserError(f"--out {config.out} with --resume {run}: a run goes on in its own folder; drop --out", 2)
    methods.check(config, ranks)
    device = _device(config)
    if ranks > 1:
        peers.join("nccl" if device.type == "cuda" else "gloo")
        told = {n: v for n, v in settings.flat(settings.as_dict(config)).items() if n not in settings.MAY_CHANGE}
        peers.agree(told | {"torch": torch.__version__, "checkpoint": state and state["step"]})
    if config.parallel == "fsdp2":
        sharding.check(config, ranks)

    with ExitStack() as at_end:
        folder, prepared, order = _begin(config, run, bool(restart), rank, ranks, at_end)
        screen.describe(prepared, config.data.root is None, say)
        if folder is not None:
            screen.list_skipped(prepared.skipped, folder.path, say)
        stop = Stop()
        at_end.callback(stop.restore)
        loop = Loop(config, prepared, order, folder, state, Place(device, rank, ranks), stop, at_end)
        whole = loop.run()
        if folder is not None:
            _finish(loop, folder.path, whole)
            folder.beat(force=True, step=loop.progress.step, steps=config.steps, state="done" if whole else "stopped")
    say(f"{screen.duration(time.monotonic() - began)} in all")
    return 0 if whole else 128 + (stop.signal or signal.SIGTERM)


def _merge(argv: list[str], state: dict[str, Any], say: Any) -> TrainConfig:
    """The checkpoint's settings with the given flags on top; UserError where that is another model."""
    # A run's folder is where it lies now.
    model = {n: v for n, v in state["config"]["model"].items() if n != "in_channels"}  # which follows --data.channels
    config = settings.parse(argv, saved={**state["config"], "model": model, "out": None, "resume": None})
    changed = settings.changes(state["config"], settings.as_dict(config))
    other = [f"{n} is {a} there, {b} here" for n, (a, b) in changed.items() if n.startswith("model.") or n in _SHAPE]
    before, here = (list(patterns_of(c or ())) for c in changed.get("data.channels", ((), ())))
    if before != here:
        other.insert(0, f"data.channels are {','.join(before) or 'one'} there, {','.join(here) or 'one'} here")
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
    device = device_of(config.device)
    if config.precision == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a GPU, not {device.type}; use bf16 or fp32", 2)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def _begin(
    config: TrainConfig, run: Path | None, again: bool, rank: int, ranks: int, at_end: ExitStack
) -> tuple[Claim | None, Prepared, Order]:
    """The first process, which alone writes, takes the run's folder and reads the scans; the others wait for its list.

    Args:
        run: the folder of a run to go on with.
        again: torchrun starts the processes again, so that --out may hold what they wrote before.
    """
    folder: Claim | None = None
    result: list[Any] = [None]
    if rank == 0:
        try:
            folder = runs.claim(config.out, run, again=again)
            at_end.callback(folder.close)
            cache = Path(config.data.cache) if config.data.cache else folder.path.parent / "cache"
            use = Use(cache, byte_count(config.data.cache_limit) if config.data.cache_limit else None)
            at_end.callback(use.close)
            result = [gather(config.data, config.views, config.model.dims, cache, config.seed, screen.reading, use)]
            screen.cache(use, result[0][0], print)
        except UserError as error:
            result = [error]
        except KeyboardInterrupt as stop:
            screen.list_skipped(stop.args[0] if stop.args and folder else [], cast(Claim, folder).path, print)
            raise
    if ranks > 1:
        patient = dist.new_group(timeout=_PATIENCE, backend="gloo")
        dist.broadcast_object_list(result, src=0, group=cast(dist.ProcessGroup, patient))
    if isinstance(result[0], UserError):
        raise result[0]
    return folder, *result[0]


def _finish(loop: Loop, run: Path, whole: bool) -> None:
    """Weights, a picture and what to do next; or how to go on."""
    config, method, bad = loop.config, loop.method, loop.progress.bad
    if not whole:
        done = f"{loop.progress.step} of {config.steps}"
        print(f"stopped after step {done}, saved; go on with: medformer pretrain --resume {run}")
        return
    if bad:
        print(f"{bad} steps were skipped because their loss or gradient was not finite (WARNING lines above)")
    try:
        weights = method.save(run)
    except OSError as error:
        where = error.filename or run
        raise UserError(f"cannot write {where}: {error.strerror}; make room and --resume {run}") from error
    picture = run / ("completions.png" if config.method == "igpt" else "attention.png")
    drawn = pictures.draw(config, loop.prepared, method, picture, f"after {config.steps} steps")
    if not math.isnan(loop.loss):
        print(f"loss {loop.loss:.3f} at the end; {method.summary}")
    best = _save_best(config, run, method)
    channels = flags_of(config.data.channels, config.data.missing)
    builtin = config.data.root is None
    screen.closing(run, config.steps, weights, picture.name if drawn else None, best, print, channels, builtin)


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
        write_whole(folder / "config.yaml", lambda file: file.write((run / "config.yaml").read_bytes()))
    except (UserError, OSError) as error:
        print(f"WARNING: the best weights were not written: {error}")
        return None
    when = f"after step {state['step']}" if state["step"] else "before training, which no step has bettered"
    return f"the weights {when}: highest kNN accuracy ({state['best']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
