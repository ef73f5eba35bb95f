"""Fine-tune a model on labelled cases and keep what comes out.

    medformer finetune CHECKPOINT --task FILE [--out DIR]
    torchrun --nproc_per_node 8 -m medformer finetune CHECKPOINT --task FILE --out DIR

One network is trained for each learning rate, scored on the validation cases on the way, and the best weights of all
are kept with their head. The same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
import torch.distributed as dist
import yaml

import medformer
from medformer.answers import results
from medformer.answers.config import SCALES, FinetuneConfig
from medformer.answers.model import About, Finetuned, network_of, save_finetuned
from medformer.answers.predict import least_memory
from medformer.channels import with_channels
from medformer.errors import UserError, exit_code
from medformer.evaluation import dense, probes, scores, tasks, tuning
from medformer.evaluation.fitting import Budget
from medformer.evaluation.setup import (
    device_of,
    difference,
    labelled_cases,
    parse_command,
    sha256_of,
    sources_of_pretraining,
)  # fmt: skip
from medformer.evaluation.trials import bar
from medformer.files import byte_count, write_whole
from medformer.folders import hub_name, tried
from medformer.models import ImageGPT, Model, as_saved

__all__ = ["finetune", "main"]

PRESETS = tuple(f"{size}_{dims}d" for size in ("tiny", "small", "base", "large") for dims in (2, 3))
_CLAIM, _STATE = "finetune.json", "state.pt"
_FREE = ("device", "out", "maps", "max_memory", "resamples", "names", "scale")  # may change when a stopped one goes on
_LISTS = ("labels", "channels", "class_names", "lrs", "size")
_FRESH = 7_000_003  # far from the seeds of pretraining, as in evaluation
_TOPICS = {
    "What is learned": {
        "model": "MODEL", "task": "FILE", "value": "COLUMN", "channels": "NAME,NAME", "class_names": "NAME,NAME",
        "train": "whole|fpt|frozen", "from_scratch": "true",
    },
    "How long": {
        "scale": "auto|quick|full", "steps": "N", "batch_size": "N", "lrs": "RATE,RATE", "patience": "N",
    },
    "Where": {"size": "ZxYxX", "device": "auto|cpu|cuda:N", "precision": "fp32|bf16", "pretraining": "DIR",
              "out": "DIR"},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run; 0 done, 1 data or disk, 2 usage, 130 stopped by Ctrl-C."""

    def command() -> int:
        _run(*parse(sys.argv[1:] if argv is None else argv))
        return 0

    try:
        return exit_code(command, "stopped by Ctrl-C; the same command goes on from the last check")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(argv: list[str]) -> tuple[Path, FinetuneConfig]:
    """Flags to a model and settings. UserError with exit code 2."""
    parser = jsonargparse.ArgumentParser(
        prog="medformer finetune", exit_on_error=False,
        usage="medformer finetune MODEL --task FILE [--out DIR] ...",
        description="Fine-tune a model on labelled cases: classes, labels, numbers or masks. One folder comes out: the "
        "network with its head, its scores on held-out cases with intervals, its answers, curves, a model card.",
        epilog="Lists are written 0.1,1.0 or [0.1, 1.0].",
    )  # fmt: skip
    parser.add_argument(
        "model", help="The folder of a run, a file of weights (also public ones), or with --from_scratch tiny_3d."
    )
    return parse_command(parser, FinetuneConfig, "model", _TOPICS, _LISTS, argv)


def finetune(
    model: str | os.PathLike[str] | Model, task: str | os.PathLike[str], *, out: str | os.PathLike[str], **settings: Any
) -> Finetuned:
    """A model fine-tuned on labelled cases, as `medformer finetune` does it; `.about.scores` says how well.

    >>> model = medformer.finetune("runs/NAME", "cases.csv", out="runs/answers")  # doctest: +SKIP

    Args:
        model: a file, the folder of a run, or a `Backbone`, `ResNet`, `TNT` or `ImageGPT`, which is left as it is.
        task: a table of scans or an archive of arrays.
        out: folder of the results; one that was stopped goes on.
        settings: those of `medformer finetune --help-all`, for example `steps=500` and `lrs=[1e-3]`.

    Raises:
        UserError: in one line, for whatever is wrong with the model, the task or the disk.
    """
    given = model if isinstance(model, Model) else Path(os.fspath(model))
    return _run(given, FinetuneConfig(task=os.fspath(task), out=os.fspath(out), **settings))


def _run(given: Path | Model, config: FinetuneConfig) -> Finetuned:
    config, device, lead = _set_up(config)
    with contextlib.nullcontext() if lead else contextlib.redirect_stdout(io.StringIO()):  # one process speaks
        return _tuned(given, config, device, lead)


def _tuned(given: Path | Model, config: FinetuneConfig, device: torch.device, lead: bool) -> Finetuned:
    began = time.monotonic()
    name = given.stem if isinstance(given, Path) else type(given).__name__
    if isinstance(given, Path) and given.stem in ("backbone", "model", "image_gpt"):
        name = given.parent.name
    out = Path(config.out or Path("runs") / f"finetune-{name}-{Path(config.task).stem}")
    tried(out)
    model, file, run = _load(given, config)
    config = replace(config, names=config.names or (run.get("data") or {}).get("names"))
    task, size = labelled_cases(config, model, file, run)
    task, overlap = _overlap(task, config, run)
    task = _named(task, config)
    model = _fits(model, file, task)
    about = _about(task, size, config, model)
    mine = _claim(out, config, model, file if isinstance(given, Path) else None, task)
    if lead:
        for line in (*task.notes, *overlap):
            print(line)
        counts = ", ".join(f"{n} {s}" for s, n in about.cases.items())
        print(
            f"{task.name}: {task.kind}, {', '.join(task.names[:8])}; {counts}"
            f" cases; {about.method}{' from scratch' if about.scratch else ''}, {_counted(config.steps, 'step')} of "
            f"{config.batch_size} at most, {_counted(len(config.lrs or []), 'learning rate')}, {config.precision} on "
            f"{device}"
        )
    trainer = _Trainer(model.to(device), task, size, config, about, out, lead, mine)
    try:
        _room(trainer, task, config)  # before hours of training
        best = trainer.all_rates()
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise UserError(
            f"--size {'x'.join(map(str, size))}, --batch_size {config.batch_size}: memory ran out on {device}; take a "
            "smaller size, batch or model"
        ) from error
    network = trainer.network()
    network.load_state_dict(best["network"])
    answer = Finetuned(network.eval(), about)
    if not lead:
        return answer
    found = results.answers(answer, task, out, config, partial(bar, what="held-out cases"))
    about = replace(about, scores=found.scores, by_class=found.by_class)
    answer = Finetuned(network, about)
    save_finetuned(answer, out / "model.safetensors")
    results.write(
        answer, task, out, found, curves=trainer.curves, chosen=best, overlap=overlap,
        config={k: v for k, v in asdict(config).items() if k not in ("device", "out")}, source=_called(file),
        minutes=(time.monotonic() - began) / 60,
    )  # fmt: skip
    (out / _STATE).unlink(missing_ok=True)
    results.closing(answer, task, out, config)
    return answer


def _set_up(config: FinetuneConfig) -> tuple[FinetuneConfig, torch.device, bool]:
    """Settings without gaps, the device of this process, and whether it is the one that writes."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    name = config.device
    if world > 1:
        gpu = torch.cuda.is_available() and name in ("auto", "cuda")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else name
        if not dist.is_initialized():
            dist.init_process_group("nccl" if gpu else "gloo")
    device = device_of(name)
    scale = config.scale if config.scale != "auto" else "full" if device.type == "cuda" else "quick"
    defaults = {**SCALES[scale], "precision": "bf16" if device.type == "cuda" else "fp32"}
    filled = {n: v for n, v in defaults.items() if getattr(config, n) is None}
    return replace(config, scale=scale, **filled), device, rank == 0  # type: ignore[arg-type]


def _load(given: Path | Model, config: FinetuneConfig) -> tuple[Model, Path, dict[str, Any]]:
    """The model, its file, and the settings of its run."""
    if not isinstance(given, Path):
        return given, Path(type(given).__name__), {}
    if str(given) in PRESETS and not given.exists():
        if not config.from_scratch:
            raise UserError(f"{given} is an architecture without weights; give --from_scratch true, or a checkpoint", 2)
        torch.manual_seed(_FRESH + config.seed)
        return getattr(medformer, str(given))(), given, {}
    if given.is_dir():
        return probes.load_model(given)
    try:
        model = medformer.load_pretrained(hub_name(given) or given, config.layout, dims=config.dims)
    except (FileNotFoundError, ValueError) as error:
        said = str(error).removeprefix("medformer.load_pretrained: ").removeprefix("medformer.load: ")
        raise UserError(f"{said}; give the folder of a run, its backbone.safetensors, or public weights", 2) from error
    model = getattr(model, "backbone", model)  # of one that was fine-tuned
    beside = given.parent / "config.yaml"
    return model, given, (yaml.safe_load(beside.read_text()) or {}) if beside.is_file() else {}


def _room(trainer: _Trainer, task: tasks.Task, config: FinetuneConfig) -> None:
    """UserError where the held-out scan with the most voxels cannot be segmented in --max_memory."""
    held_out = [task.seen[i].shape for split in results.SPLITS for i in task.where(split)] if task.seen else []
    if not trainer.about.dense or not held_out:
        return
    shape = max(held_out, key=math.prod)
    least = least_memory(Finetuned(trainer.network().eval(), trainer.about), shape, run=trainer.run)
    if byte_count(config.max_memory) < least:
        raise UserError(
            f"--max_memory {config.max_memory} must be at least {-(-least // 2**20)} MiB for the held-out scan of "
            f"{'x'.join(map(str, shape))} voxels (zyx); give more, or a smaller --size", 2,
        )  # fmt: skip


def _counted(number: int | None, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _called(file: Path) -> str:
    return f"{file.parent.name}/{file.name}" if file.parent.name else file.name


def _overlap(task: tasks.Task, config: FinetuneConfig, run: dict[str, Any]) -> tuple[tasks.Task, list[str]]:
    """The task without held-out cases that its own training cases repeat, and what pretraining has seen of the others.

    Pretraining on the unlabelled images of one's own cases is normal, and said; labels seen twice are not.
    """
    task, lines = tasks.drop_leaks(task, set(), keep=False, flag="")
    if config.from_scratch:
        return task, lines
    known = sources_of_pretraining(config, run)
    for split, called in (("test", "held-out"), ("val", "validation")):
        index = task.where(split)
        seen = sum(task.known_to(known, int(i)) for i in index)
        if seen:
            lines.append(f"{seen} of {len(index)} {called} cases were seen without labels in pretraining")
    return task, lines


def _named(task: tasks.Task, config: FinetuneConfig) -> tasks.Task:
    """The structures of label maps by their names."""
    if not config.class_names:
        return task
    if task.kind != "segmentation":
        raise UserError(
            f"--class_names {','.join(config.class_names)}: names structures of label maps, and the task is "
            f"{task.kind}, which the table names; leave it out", 2,
        )  # fmt: skip
    if len(config.class_names) != len(task.names):
        raise UserError(
            f"--class_names {','.join(config.class_names)}: {len(config.class_names)} names for {len(task.names)} "
            "structures in the masks (1 to their highest label)", 2,
        )  # fmt: skip
    return replace(task, names=tuple(config.class_names))


def _fits(model: Model, file: Path, task: tasks.Task) -> Model:
    """The model with as many channels as the cases have; UserError where it cannot take the task."""
    if isinstance(model, ImageGPT):
        if task.kind == "segmentation":
            raise UserError(f"{file} is an Image-GPT, whose features are of whole images; take another checkpoint", 2)
        return model
    if task.kind == "segmentation" and getattr(model.config, "patch_transposed", False):
        raise UserError(f"{file} has several tokens a voxel (patch_transposed); give a task of classes", 2)
    return with_channels(model, task.channels, task.flags)


def _about(task: tasks.Task, size: tuple[int, ...], config: FinetuneConfig, model: Model) -> About:
    train = [task.seen[i] for i in task.where("train")] if task.seen else []
    spacings = np.array([s.spacing_mm for s in train if s.spacing_mm is not None])
    spread = [np.min(spacings, 0), np.median(spacings, 0), np.max(spacings, 0)] if len(spacings) else []
    dense_task = task.kind == "segmentation"
    frozen = "decoder" if dense_task else "attentive"
    if isinstance(model, ImageGPT) and config.train == "frozen":
        frozen = "linear"
    return About(
        task=task.name, kind=task.kind, names=task.names, size=size, overlap=config.overlap,
        method={"whole": "finetune", "fpt": "fpt", "frozen": frozen}[config.train], scratch=config.from_scratch,
        channels=tuple(config.channels), missing=config.missing,
        number=task.range if task.kind == "regression" else None,
        spacing_mm=tuple((float(a), float(b), float(c)) for a, b, c in spread),
        modalities=tuple(sorted({s.modality for s in train})), units=tuple(sorted({s.units for s in train})),
        cases={split: len(task.where(split)) for split in ("train", "val", "test")}, version=version("medformer"),
    )  # fmt: skip


def _claim(out: Path, config: FinetuneConfig, model: Model, file: Path | None, task: tasks.Task) -> dict[str, Any]:
    """What the folder holds from now on; UserError where that is something else, or done."""
    if file is None or not file.is_file():
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        weights = "" if config.from_scratch else digest.hexdigest()
    else:
        weights = sha256_of(file)
    mine = {k: v for k, v in asdict(config).items() if k not in _FREE} | {
        "architecture": as_saved(model.config), "task_sha256": sha256_of(config.task),
        "weights_sha256": weights, "cases": "".join(h[:8] for h in task.hashes),
    }  # fmt: skip
    mine = json.loads(json.dumps(mine))  # as it is read again, tuples as lists
    claim = out / _CLAIM
    if claim.exists():
        begun = any((out / name).exists() for name in (_STATE, "model.safetensors"))
        if begun and (other := difference(mine, json.loads(claim.read_text()))):  # one that learned nothing yet goes
            raise UserError(f"--out {out} holds another fine-tuning ({other}); give another --out", 2)
        if (out / "model.safetensors").exists():
            raise UserError(
                f"--out {out} holds this fine-tuning, finished; medformer predict {out}/model.safetensors SCAN --out "
                "DIR asks it, another --out starts anew", 2,
            )  # fmt: skip
    elif any((out / name).exists() for name in ("model.safetensors", "metrics.jsonl", "config.yaml")):
        raise UserError(f"--out {out} holds something else; give another --out", 2)
    return mine


class _Trainer:
    """A network for each learning rate, the best weights of all, and the way back into a training that stopped."""

    def __init__(
        self, model: Model, task: tasks.Task, size: tuple[int, ...], config: FinetuneConfig, about: About, out: Path,
        lead: bool, claim: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.task, self.size, self.config, self.about = model, task, size, config, about
        self.out, self.lead = out, lead
        self.device = next(model.parameters()).device
        self.metric = scores.metrics_of(task.kind)[0]
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.steps, self.rates = config.steps or 1, list(config.lrs or [])
        self.budget = Budget(steps=self.steps, batch=math.ceil((config.batch_size or 1) / world))
        self.every = max(1, self.steps // config.checks)
        self.run: Callable[..., Any] = partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        self.curves: list[dict[str, float]] = []
        self.done: dict[str, float] = {}
        """Of each finished rate its best score."""
        self.best: dict[str, Any] = {}
        """score, lr, step and network of the best check of all."""
        self.state: dict[str, Any] | None = None
        if (out / _STATE).exists():
            kept = torch.load(out / _STATE, map_location="cpu", weights_only=True)
            self.curves, self.done, self.best, self.state = (kept[n] for n in ("curves", "done", "best", "state"))
            if lead:
                at = f", lr {kept['lr']:g} at step {self.state['step']}" if self.state else ""
                print(f"going on in {out}: {len(self.done)} of {len(self.rates)} learning rates done{at}")
        if lead:
            write_whole(out / _CLAIM, lambda file: file.write(json.dumps(claim, indent=1).encode()))

    def network(self) -> tuning.Network:
        """What every rate starts from."""
        torch.manual_seed(_FRESH + self.config.seed)
        fresh: Any = medformer.build(self.model.config)
        if not self.config.from_scratch:
            fresh.load_state_dict(self.model.state_dict())
        elif isinstance(self.model, ImageGPT):
            fresh.codebook.load_state_dict(self.model.codebook.state_dict())
        return network_of(fresh, self.about).to(self.device)

    def all_rates(self) -> dict[str, Any]:
        """Train every rate that is not done; what `best` holds."""
        index = self.task.where("train")
        images = [self.task.images[i] for i in index]
        targets = [self.task.targets[i] for i in index]
        for lr in self.rates:
            key = f"{lr:g}"
            if key in self.done:
                continue
            network, state = self.network(), self.state
            self.state, self.score, self.stale = None, -math.inf, 0
            if state is not None:
                mine = [row for row in self.curves if row["lr"] == lr and "validation" in row]
                for row in mine:
                    self._count(row["validation"])
            more = {"watch": partial(self._watch, network, lr), "state": state}
            progress = partial(bar, what=f"lr {lr:g}")
            if self.about.dense:
                dense.train_dense(
                    network, images, targets, self.size, self.budget, lr, self.config.seed, self.run, progress, **more
                )
            else:
                tuning.train_classifier(
                    network, images, torch.stack(targets), len(self.task.names), self.budget, lr, self.config.seed,
                    self.run, progress, **more,
                )  # fmt: skip
            self.done[key] = self.score
            self._keep(lr, None)
            if self.lead:
                last = max(row["step"] for row in self.curves if row["lr"] == lr)
                early = f", stopped after step {last:g} of {self.steps}" if last < self.steps else ""
                print(f"lr {lr:g}: validation {self.metric} {self.score:.3f}{early}", flush=True)
        if dist.is_initialized():  # only the first process has scored
            best = [self.best]
            dist.broadcast_object_list(best, src=0)
            self.best = best[0]
        return self.best

    def _count(self, score: float) -> bool:
        """Whether it is the best of this rate; keeps count of those that are not."""
        better = score > self.score
        self.score, self.stale = (score, 0) if better else (self.score, self.stale + 1)
        return better

    def _watch(self, network: tuning.Network, lr: float, step: int, loss: float, state: Callable[[], Any]) -> bool:
        row = {"lr": lr, "step": step, "loss": loss}
        check = step % self.every == 0 or step == self.steps
        over = False
        if check:
            if self.lead:
                row["validation"] = self.validation(network)
                self._count(row["validation"])
                if not self.best or row["validation"] > self.best["score"]:
                    weights = {n: t.detach().cpu().clone() for n, t in network.state_dict().items()}
                    self.best = {"score": row["validation"], "lr": lr, "step": step, "network": weights}
                over = self.stale >= self.config.patience
            over = self._agreed(over)
        self.curves.append(row)
        if check and self.lead and step < self.steps and not over:
            self._keep(lr, state())
        return over

    def _agreed(self, over: bool) -> bool:
        """What the first process says."""
        if not dist.is_initialized():
            return over
        said = torch.tensor([float(over)], device=self.device)
        dist.broadcast(said, 0)
        return bool(said.item())

    def validation(self, network: tuning.Network) -> float:
        network.eval()
        index = self.task.where("val")
        images, several = [self.task.images[i] for i in index], 2 * self.budget.batch
        if not self.about.dense:
            found = tuning.predict(network, images, self.task.kind, several, self.run)
            value = scores.point(self.metric, found, self.task.labels(index))
        else:
            count = len(self.task.names)
            guesses = [dense.predict_dense(network, x, self.size, count, several, self.run) for x in images]
            dice = dense.dense_scores(guesses, [self.task.targets[i] for i in index], count)
            value = scores.point(self.metric, dice, np.zeros(len(index)))
        return value if math.isfinite(value) else -math.inf

    def _keep(self, lr: float, state: dict[str, Any] | None) -> None:
        if not self.lead:
            return
        kept = {"lr": lr, "curves": self.curves, "done": self.done, "best": self.best, "state": state}
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        write_whole(self.out / _STATE, lambda file: file.write(buffer.getbuffer()))
