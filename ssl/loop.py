"""The training loop: `Loop.run` is its order, `Loop._step` one step. `train.py` begins it and closes the run."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cost
import methods
import online
import peers
import pictures
import replay
import runs
import screen
import settings
import sharding
from collapse import JumpWatch
from crops import Batches, Crops, loader
from medformer.data.store.ahead import Ahead
from medformer.errors import UserError
from medformer.files import write_whole
from medformer.locks import Claim
from medformer.run_checkpoint import FORMAT
from medformer.schedules import cosine
from optim import adaptive_clip, clip_per_tensor, make_optimiser
from roots import Order, Prepared, voxel_scale
from settings import TrainConfig
from views import Plan, fitting, render

__all__ = ["Loop", "Place", "Stop", "silent"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    """Steps done."""
    sample: int = 0
    """Scans drawn by all processes."""
    bad: int = 0
    """Steps skipped, their loss or gradient was not finite."""
    bad_in_a_row: int = 0
    best: float = -1.0
    """Highest kNN accuracy."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one step, over all processes."""

    loss: float
    figures: dict[str, float]
    """Parts of the loss, and what else the method reports."""
    norm: float
    """Of the gradient, before clipping."""
    usable: bool
    """Whether the weights moved."""
    asked: bool
    """Whether a signal asked a process to end."""
    batch: list[Plan]
    """This process's, of each micro-batch."""


class Loop:
    """Training from fresh weights or from a checkpoint to `--steps`.

    Args:
        run: None in all but the first process, which alone writes.
        state: a checkpoint to go on from.
        at_end: closes what is open however this ends.

    Attributes:
        method: what is trained; whole and loaded after `run`.
        loss: smoothed, for the last line; nan where there was none.
    """

    def __init__(
        self, config: TrainConfig, prepared: Prepared, order: Order, run: Claim | None, state: dict[str, Any] | None,
        place: Place, stop: Stop, at_end: ExitStack,
    ) -> None:  # fmt: skip
        self.config, self.prepared, self.order = config, prepared, order
        self.claim, self.place, self.stop = run, place, stop
        self.folder = None if run is None else run.path
        device, rank, ranks = place
        self.say: Callable[[str], None] = silent if run is None else print
        self.scans_per_step = config.accumulate * config.batch_size * ranks
        self.split = config.parallel == "fsdp2"
        self.progress = Progress()
        self._build(state)
        self._announce()
        self.metrics: runs.Metrics | None = None
        self.meter: screen.Meter | None = None
        self.labelled: Any = None
        self._open(at_end)
        self._feed = partial(
            loader, Crops(prepared.train, config.views, config.seed, order), accumulate=config.accumulate,
            batch=config.batch_size, rank=rank, ranks=ranks, pin=device.type == "cuda", timeout=config.loader_timeout,
        )  # fmt: skip
        self._autocast = partial(
            torch.autocast, device.type, _DTYPES[config.precision], enabled=config.precision != "fp32"
        )
        if state is None:
            self._look()
        workers = config.workers if config.workers is not None else 4 if device.type == "cuda" else 0
        left = config.steps - self.progress.step
        source = iter(self._feed(steps=left, origin=self.progress.sample, workers=workers))
        self._batches = Ahead(source, device=device, timeout=config.loader_timeout)
        at_end.callback(self._batches.close)
        self._saved = self.progress.step
        self._jumps, self._seen = JumpWatch(), range(0)
        self._pieces = 1  # parts of a micro-batch that go through the network one after the other
        self._ends = math.inf if config.max_hours is None else time.monotonic() + 3600 * config.max_hours
        self._waited = {"data_wait_s": 0.0, "save_wait_s": 0.0}  # since the last step: for crops, for checkpoints

    @property
    def loss(self) -> float:
        return math.nan if self.meter is None else self.meter.loss

    def _build(self, state: dict[str, Any] | None) -> None:
        """Method, optimiser and scaler, as new or as they were."""
        config, (device, _, ranks) = self.config, self.place
        torch.manual_seed(config.seed)
        self.scale = voxel_scale(self.prepared)
        self.method = methods.make(config, self.scale).to(device)
        if state is not None:
            self.method.load_state_dict(state["method"])
        if self.split:
            sharding.shard(cast(nn.Module, self.method))
        self.optimiser = make_optimiser(self.method.student, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        if state is not None:
            self.optimiser.load_state_dict(state["optimiser"])
            sharding.place_moments(self.optimiser)
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**{n: state[n] for n in asdict(self.progress) if n in state})
            _compare_scans(state["scans"], self.prepared.fingerprint(), self.say)
            before = state.get("scans_per_step", self.scans_per_step)
            if before != self.scans_per_step:
                self.say(f"WARNING: {self.scans_per_step} scans a step (accumulate x batch_size x processes) from here "
                         f"on, {before} before; the order of samples goes on, the schedules count steps")  # fmt: skip
        self.student: nn.Module = self.method.student
        if ranks > 1 and not self.split:
            self.student = DistributedDataParallel(
                self.student, broadcast_buffers=False, find_unused_parameters=getattr(config.model, "mask_token", False)
            )

    def _announce(self) -> None:
        config, (device, _, ranks) = self.config, self.place
        self.say(
            f"{config.method}, {methods.parameters_of(self.method) / 1e6:.2f} M parameters, {config.precision} on "
            f"{device}{f' x {ranks} processes' if ranks > 1 else ''}, {self.scans_per_step} scans a step, "
            f"{config.views.global_views + config.views.local_views} views a scan; {self.method.summary}"
        )
        if self.progress.step:
            self.say(f"going on at step {self.progress.step} of {config.steps}")

    def _open(self, at_end: ExitStack) -> None:
        """What is written to and watched."""
        config, first = self.config, self.progress.step
        if self.folder is not None:
            if config.online.task is not None:
                self.labelled = online.read_labelled(config.online, config.views, config.model.dims, config.data)
            write_whole(self.folder / "config.yaml", lambda file: file.write(settings.to_yaml(config).encode()))
            self.metrics = runs.Metrics(self.folder, first)
            figure = self.method.headline.replace("_", " ")
            self.meter = screen.Meter(config.steps, first, self.scans_per_step, figure=figure)
            at_end.callback(self.metrics.close)
            at_end.callback(self.meter.close)
            self.say = self.meter.say
        self.writer = runs.Writer()
        at_end.callback(self.writer.close)  # before the metrics, which a write relies on

    def _look(self) -> None:
        """Show the method what it needs to see before it begins."""
        if self.method.look_steps:
            feed, batch = self._feed(steps=self.method.look_steps), self.config.batch_size
            batches = iter(feed)
            for at in cast(Batches, feed.batch_sampler).starts:
                plans = peers.due(batches, partial(self._names, range(at, at + batch)))
                views = self._views(plans)
                with self._autocast():
                    self.method.look(views)
            self.method.start()

    def run(self) -> bool:
        """All steps that are left; False where a signal ended them before, after a checkpoint."""
        config, first = self.config, self.progress.step
        untrained = {f"untrained_{name}": value for name, value in self._measure().items()} if first == 0 else {}
        if untrained.get("untrained_knn_accuracy", -1.0) > self.progress.best:  # training may lose what luck gave
            self.progress.best, self._saved = untrained["untrained_knn_accuracy"], -1
            self._save(True)
        self.method.train()
        ended, began = False, time.monotonic()
        for step in range(first, config.steps):
            self.writer.check()
            rates = self._set_rates(step)
            outcome = self._step(step)
            self._count(step, outcome)
            done = step + 1
            measured = untrained if step == first else {}
            if (config.online.every and done % config.online.every == 0) or done == config.steps:
                measured = {**measured, **self._measure()}
            began = self._tell(step, outcome, rates, measured, began)
            self._picture(done)
            accuracy = measured.get("knn_accuracy", -1.0)
            better = accuracy > self.progress.best
            self.progress.best = max(self.progress.best, accuracy)
            if done % config.save_every == 0 or done == config.steps or outcome.asked or better:
                with self._waiting("save_wait_s"):
                    self._save(better)
            if outcome.asked and done < config.steps:
                ended = True
                break
        self.writer.finish()
        if self.split and not ended:
            whole = sharding.whole(self.method.state_dict())
            self.method = methods.make(config, self.scale).to(self.place.device)
            self.method.load_state_dict(whole)
        return not ended

    def _set_rates(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay of this step."""
        config, steps = self.config.optim, self.config.steps
        lr = cosine(step, steps, config.lr, config.final_lr, warmup=round(config.warmup * steps))
        decay = cosine(step, steps, config.weight_decay, config.final_weight_decay)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = decay if group["decay"] else 0.0
        return {"lr": lr, "weight_decay": decay}

    def _step(self, step: int) -> Outcome:
        """Forward, backward and the optimiser, unless the loss or the gradient is not finite."""
        config, method, ranks = self.config, self.method, self.place.ranks
        batch: list[Plan] = []
        while True:
            try:
                totals, names = self._passes(step, batch)
                break
            except RuntimeError as error:
                if not cost.is_short(error):
                    raise
            # Outside of `except`: the error's traceback holds what did not fit.
            self.optimiser.zero_grad(set_to_none=True)
            method.skip_step()
            self._pieces = cost.smaller(config, self._pieces, self.place.ranks, method, self._views(batch[-1]))
            few, several = config.batch_size // self._pieces, config.accumulate * self._pieces
            self.say(
                f"WARNING: out of memory; {few} of {config.batch_size} scans in one pass from here on, which is the "
                f"same training (--batch_size {few} --accumulate {several})"
            )
        self.scaler.unscale_(self.optimiser)
        if self.split:
            sharding.average_gradients(method.student.parameters())
        method.before_step(step)
        norm = clip_per_tensor(method.student.parameters(), config.optim.clip)
        if config.optim.agc:
            adaptive_clip(method.student, config.optim.agc, skip=method.last_layers)
        late = time.monotonic() >= self._ends
        totals = torch.cat([totals, totals.new_tensor([float(self.stop.signal > 0 or late)])])
        if ranks > 1:
            dist.all_reduce(totals)
            totals /= ranks
        mean_loss, *means, asked = totals.tolist()

        # fp16 overflows of the gradient alone are the scaler's business: it skips and lowers its scale.
        usable = math.isfinite(mean_loss) and (self.scaler.is_enabled() or math.isfinite(norm.item()))
        if usable:
            self.scaler.step(self.optimiser)
            method.after_step(step)
        else:
            method.skip_step()
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return Outcome(
            loss=mean_loss, figures=dict(zip(names, means, strict=True)), norm=norm.item(), usable=usable,
            asked=asked > 0, batch=batch,
        )  # fmt: skip

    def _passes(self, step: int, batch: list[Plan]) -> tuple[Tensor, list[str]]:
        """Forward and backward of all micro-batches; means of the loss and its parts, and what the parts are called.

        batch: those that were fetched already; the others are added.
        """
        config, (_, rank, ranks) = self.config, self.place
        totals, names = None, []
        for micro in range(config.accumulate):
            if micro == len(batch):
                at = self.progress.sample + (micro * ranks + rank) * config.batch_size
                with self._waiting("data_wait_s"):
                    batch.append(peers.due(self._batches, partial(self._names, range(at, at + config.batch_size))))
            # Drop path and masks draw from torch's generator: seeded per step, it needs no place in the checkpoint.
            torch.manual_seed(_seed(config.seed, step, micro, rank))
            alone = ranks == 1 or self.split or micro == config.accumulate - 1
            parts_in_all = config.accumulate * self._pieces
            for views in cost.pieces(self._views(batch[micro]), config.batch_size, self._pieces):
                with nullcontext() if alone else cast(DistributedDataParallel, self.student).no_sync():
                    with self._autocast():
                        loss, parts = self.method.loss(self.student, views, step)
                    self.scaler.scale(loss / parts_in_all).backward()
                names = list(parts)
                values = torch.stack([loss.detach(), *parts.values()]) / parts_in_all
                totals = values if totals is None else totals + values
        assert totals is not None
        return totals, names

    def _count(self, step: int, outcome: Outcome) -> None:
        """Progress; a skipped step is reported, its batch kept, and too many in a row are the end."""
        config, progress = self.config, self.progress
        self._seen = seen = range(progress.sample, progress.sample + self.scans_per_step)
        progress.step, progress.sample = step + 1, seen.stop
        progress.bad_in_a_row = 0 if outcome.usable else progress.bad_in_a_row + 1
        if outcome.usable:
            return
        progress.bad += 1
        scans = self._names(seen)
        self.say(f"WARNING: step {step} skipped, loss {outcome.loss}, gradient norm {outcome.norm}; scans: {scans}")
        if self.folder is not None and not self.split and progress.bad <= config.max_bad_steps:
            file = replay.save(self.folder, config, self.scale, self.method, outcome.batch, step, scans)
            self.say(f"its batch is kept: medformer pretrain --replay {file}")
        if progress.bad_in_a_row >= config.max_bad_steps:
            raise UserError(
                f"{progress.bad_in_a_row} steps in a row had a loss or gradient that is not finite, the last on "
                f"{scans}; lower --optim.lr, use --precision fp32 or look at these scans"
            )

    def _tell(
        self, step: int, outcome: Outcome, rates: dict[str, float], measured: dict[str, float], began: float
    ) -> float:
        """Metrics, progress line and warnings; returns when the next step began."""
        config, now = self.config, time.monotonic()
        if self.metrics is not None and self.meter is not None:
            if step % config.log_every == 0 or step + 1 == config.steps or measured:
                self.metrics.write(step, {
                    "loss": outcome.loss, **outcome.figures, "gradient_norm": outcome.norm, **rates,
                    **self.method.schedules(step), "skipped_steps": self.progress.bad, **measured,
                    "scans_per_s": self.scans_per_step / max(now - began, 1e-9), **self._waited,
                })  # fmt: skip
            self._waited = dict.fromkeys(self._waited, 0.0)
            self.meter(outcome.loss, outcome.figures[self.method.headline])
        if self.claim is not None:
            self.claim.beat(step=self.progress.step, steps=config.steps, state="training")
        if collapse := self.method.watch(outcome.loss, outcome.figures):
            self.say(f"WARNING: step {step}: {collapse}")
        if outcome.usable and (jump := self._jumps(outcome.loss)):
            self.say(f"WARNING: step {step}: {jump}; scans: {self._names(self._seen)}")
        return now

    def _picture(self, done: int) -> None:
        """One into the folder and TensorBoard, where it is time; the last one is drawn when all is done."""
        every, steps = self.config.picture_every, self.config.steps
        if self.folder is None or self.metrics is None or not every or done % every or done == steps:
            return
        path = self.folder / "pictures" / f"step-{done:08d}.png"
        if pictures.draw(self.config, self.prepared, self.method, path, f"after {done} steps"):
            pictures.to_board(self.metrics, path, done)

    def _measure(self) -> dict[str, float]:
        """kNN and linear probe on the labelled cases, where there are any."""
        if self.labelled is None:
            return {}
        figures = online.measure(self.method.encoder, self.labelled, self.config.online.neighbours)
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())
        self.say(f"after {self.progress.step} steps: {told}")
        return figures

    def _save(self, better: bool) -> None:
        """A checkpoint, written by another thread; `better` than all before."""
        if self.progress.step == self._saved:
            return
        weights, moments = self.method.state_dict(), self.optimiser.state_dict()
        if self.split:
            weights, moments = sharding.whole(weights), sharding.whole(moments)
        self._saved = self.progress.step
        if self.folder is None or self.metrics is None:
            return
        self.writer.finish()  # never two copies in memory
        content = {
            "format": FORMAT, "config": settings.as_dict(self.config), "method": runs.snapshot(weights),
            "optimiser": runs.snapshot(moments), "scaler": self.scaler.state_dict(),
            "scans": self.prepared.fingerprint(), "scans_per_step": self.scans_per_step, **asdict(self.progress),
        }  # fmt: skip
        self.writer.start(partial(_write, self.metrics, self.folder, content, keep=self.config.keep, best=better))

    def _views(self, plans: Plan) -> list[Tensor]:
        return [fitting(v, self.config.model) for v in render(plans, self.config.views, self.place.device)]

    def _names(self, samples: range) -> str:
        """The scans of some samples."""
        names = sorted({self.prepared.train[self.order(s)].name for s in samples})
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    @contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited[name] += time.monotonic() - began


def _write(metrics: runs.Metrics, run: Path, content: dict[str, Any], *, keep: int, best: bool) -> None:
    metrics.sync()  # the lines that a resumed run keeps
    runs.save_checkpoint(run, content["step"], content, keep=keep, best=best)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence((*numbers, 4)).generate_state(1, np.uint32)[0])


def _compare_scans(then: list[str], now: list[str], say: Any) -> None:
    """Say where the scans are not those the run began with; what they are called does not matter."""
    before, here = ([tuple(scan.rsplit(" ", 1)) for scan in scans] for scans in (then, now))
    if not all("-" in content for _, content in before):
        say("note: this checkpoint is from before 2026-12-01: its scans are compared by name, not by content")
        before, here = ([(name, name) for name, _ in scans] for scans in (before, here))
    a, b = ([content for _, content in scans] for scans in (before, here))
    if a == b:
        return
    gone, new = ([n for n, c in s if c not in other] for s, other in ((before, {*b}), (here, {*a})))
    parts = [f"{len(g)} {what} (for instance {g[0]})" for g, what in ((gone, "gone"), (new, "new or changed")) if g]
    say(f"WARNING: the scans differ from those this run began with: {', '.join(parts) or 'another order'}; "
        "the order of samples is a new one from here")  # fmt: skip


def silent(*_: object) -> None:
    """`print` of the processes that say nothing."""
