"""Does pretraining help? A checkpoint against the same model from scratch, on labelled cases, with intervals.

    python ssl/evaluate.py CHECKPOINT --task FILE          # .npz in MedMNIST's layout, or a .csv of scans
    python ssl/evaluate.py --help

Every method sees the same labelled cases, seeds and held-out cases; every trained one has the same steps, batches,
augmentation and number of learning rates, chosen on validation cases. Run the same command again to go on after a stop.
"""

from __future__ import annotations

import hashlib
import json
import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonargparse
import numpy as np
import torch
from safetensors.torch import save as pack
from tqdm import tqdm

import findings
import medformer
import probes
import runs
import scores
import tasks
import tuning
from medformer.models import ImageGPT, Model
from runs import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

PROBES = ("knn", "linear")  # of frozen features
# untrained: the linear probe of fresh weights, which is what the architecture brings by itself.
CLASSIFY = (*PROBES, "attentive", "fpt", "finetune", "untrained", "scratch")
SEGMENT = ("linear", "decoder", "finetune", "untrained", "scratch")
# Far from the seeds of pretraining: scratch must not begin where the checkpoint began.
_FRESH = 7_000_003
# A learning rate is the one with the best mean score on validation over so many seeds: by one seed alone a rate that
# suits one draw of labels was taken for all (misc/LOG.md).
_RATE_SEEDS = 3
_CLAIM = "evaluation.json"  # in the folder of the results: what they are of


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig:
    """Downstream evaluation of a checkpoint."""

    task: str
    """.npz in MedMNIST's layout, or a .csv with the column path and label, mask or one column a label."""
    methods: list[str] = field(default_factory=list)
    """Any of knn, linear, attentive, fpt, finetune, untrained, scratch; for masks linear, decoder, finetune, untrained,
    scratch; default: all."""
    fractions: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    """Shares of the training labels, each above 0 and at most 1."""
    shots: list[int] = field(default_factory=list)
    """Labelled cases a class, instead of --fractions."""
    scale: Literal["auto", "quick", "full"] = "auto"
    """quick: minutes on a CPU. full: for a GPU. auto: by the device. Sets what is not given of the next five."""
    steps: int | None = None
    """Optimiser steps of each trained method [quick 150, full 2000]."""
    batch_size: int | None = None
    """Cases a step [quick 32, full 64]."""
    lrs: list[float] | None = None
    """Learning rates tried for each trained method [quick 1e-4 4e-4 1.6e-3, full 3e-5 1e-4 3e-4 1e-3 3e-3]."""
    seeds: int | None = None
    """Repeats: other labelled cases, other weights of heads and of scratch [quick 3, full 5]."""
    probe_steps: int | None = None
    """Optimiser steps of the linear sweep [quick 300, full 3000]."""
    size: list[int] = field(default_factory=list)
    """Voxels (zyx) to which every image is resized, or of a crop for masks; default: as the checkpoint was trained."""
    split_seed: int = 0
    """Of the splits that the task does not name."""
    pretraining: str | None = None
    """Folder or .npz that the checkpoint was trained on, for the leak check; default: as its config.yaml says."""
    leaks: Literal["drop", "keep"] = "drop"
    """What becomes of held-out cases that training has seen: out of the test, or only reported."""
    scratch_of: str | None = None
    """Folder of another checkpoint's evaluation, of the same architecture, task and settings, whose results of scratch
    and untrained are taken, not computed again."""
    resamples: int = 2000
    """Bootstrap resamples of an interval."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] | None = None
    """What networks compute in; heads of frozen features always in fp32 [a CPU fp32, a GPU bf16]."""
    out: str | None = None
    """Folder of the results; a stopped evaluation goes on in its own. Default: runs/eval-<checkpoint>-<task>."""

    def __post_init__(self) -> None:
        for value in self.fractions:
            if not 0 < value <= 1:
                raise ValueError(f"--fractions {value:g} must be above 0 and at most 1")
        for name in ("steps", "batch_size", "seeds", "probe_steps", "resamples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        for name in ("shots", "size"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)} must be whole numbers of at least 1")
        if self.lrs is not None and (not self.lrs or min(self.lrs) <= 0):
            raise ValueError(f"--lrs {self.lrs} must be one or more rates above 0")
        if not self.fractions and not self.shots:
            raise ValueError("--fractions is empty; give at least one, or --shots")


_SCALES: dict[str, dict[str, Any]] = {
    "quick": {"steps": 150, "batch_size": 32, "lrs": [1e-4, 4e-4, 1.6e-3], "seeds": 3, "probe_steps": 300},
    "full": {"steps": 2000, "batch_size": 64, "lrs": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], "seeds": 5, "probe_steps": 3000},
}


class Setting(NamedTuple):
    """How many labels a method gets."""

    key: str
    share: float
    shots: int

    def cases(self, task: tasks.Task, seed: int) -> np.ndarray:
        return tasks.few_shots(task, self.shots, seed) if self.shots else tasks.fraction(task, self.share, seed)


def main(argv: list[str] | None = None) -> int:
    """Run; 0 done, 1 data or disk, 2 usage, 130 stopped by Ctrl-C."""
    try:
        checkpoint, config = parse(sys.argv[1:] if argv is None else argv)
        evaluate(checkpoint, config)
        return 0
    except UserError as error:
        runs.complain(str(error))
        return error.code
    except KeyboardInterrupt:
        runs.complain("stopped by Ctrl-C; the same command goes on where this stopped")
        return 130


def parse(argv: list[str]) -> tuple[Path, DownstreamConfig]:
    """Flags to a checkpoint and settings.

    Raises:
        UserError: with exit code 2.
    """
    parser = jsonargparse.ArgumentParser(
        prog="python ssl/evaluate.py", exit_on_error=False,
        description="A checkpoint against the same model from scratch, on labelled cases.",
        epilog="Lists are written 0.1,1.0 or [0.1, 1.0].",
    )  # fmt: skip
    parser.add_argument("checkpoint", help="backbone.safetensors, or the folder of its run.")
    parser.add_class_arguments(DownstreamConfig, as_group=False)
    lists = {"--methods", "--fractions", "--shots", "--lrs", "--size"}
    words, after = [], ""
    for word in argv:
        name, equals, value = word.partition("=")
        if after in lists and not equals:
            words.append(_list(word))
        else:
            words.append(f"{name}={_list(value)}" if name in lists and equals else word)
        after = word
    try:
        values = parser.parse_args(words).as_dict()
        checkpoint = Path(values.pop("checkpoint"))
        return checkpoint, DownstreamConfig(**values)
    except Exception as error:
        # jsonargparse raises many types for wrong flags.
        message = re.sub(r'Parser key "([^"]+)":\s*', r"--\1: ", str(error))
        raise UserError(f"{message}; python ssl/evaluate.py --help lists all flags", 2) from error


def _list(word: str) -> str:
    """24x32x32 and 24,32,32 to [24,32,32]; names keep their x."""
    return f"[{re.sub(r'(?<=[0-9])x(?=[0-9])', ',', word.strip('[]'))}]"


def _bar(things: Any, what: str) -> Any:
    items = things if hasattr(things, "__len__") else list(things)
    return tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N", 2) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no GPU; use --device cpu", 2)
    return device


def evaluate(checkpoint: Path, config: DownstreamConfig) -> dict[str, Any]:
    """All of it; returns what results.json holds."""
    began = time.monotonic()
    device = _device(config.device)
    scale = config.scale if config.scale != "auto" else "full" if device.type == "cuda" else "quick"
    defaults = {**_SCALES[scale], "precision": "bf16" if device.type == "cuda" else "fp32"}
    config = replace(config, scale=scale, **{n: v for n, v in defaults.items() if getattr(config, n) is None})
    model, file, run = probes.load_model(checkpoint)
    task, size, leaks = _task(config, model, file, run)
    choices = SEGMENT if task.kind == "segmentation" else CLASSIFY
    if isinstance(model, ImageGPT) and task.kind == "segmentation":
        raise UserError(f"{file} is an Image-GPT, whose features are of whole images; give a task of classes", 2)
    if task.kind == "segmentation" and getattr(model.config, "patch_transposed", False):
        raise UserError(f"{file} has several tokens a voxel (patch_transposed); give a task of classes", 2)
    wrong = sorted(set(config.methods) - set(choices))
    if wrong:
        raise UserError(f"--methods {wrong[0]}: a {task.kind} task takes {', '.join(choices)}", 2)
    methods = [m for m in choices if not config.methods or m in config.methods]
    settings = [Setting(f"{s}-shot", 0, s) for s in sorted(config.shots)] or [
        Setting(f"{100 * f:g}%", f, 0) for f in sorted(config.fractions)
    ]
    seeds = range(config.seeds or 1)
    labelled = {s.key: [len(s.cases(task, seed)) for seed in seeds] for s in settings}  # errors come now
    name = file.parent.name if file.stem in ("backbone", "image_gpt") else file.stem
    out = Path(config.out or Path("runs") / f"eval-{name}-{task.name}")
    mine = _claim(out, config, file, model, task)
    if config.scratch_of:
        _take_scratch(Path(config.scratch_of), out, mine)
    bench = Bench(task, model, config, size, device, out)
    print(
        f"{task.name}: {task.kind}, {', '.join(task.names[:8])}; {len(task.where('train'))} training, "
        f"{len(task.where('val'))} validation, {len(task.where('test'))} held-out cases; {scale}: {config.steps} steps "
        f"of {config.batch_size}, {len(config.lrs or [])} learning rates, {len(seeds)} seeds, "
        f"{config.precision} on {device}"
    )
    stacks: dict[tuple[str, str], np.ndarray] = {}
    chosen: dict[tuple[str, str], list[str]] = {}
    for setting in settings:
        for method in methods:
            cells = [bench.cell(setting, method, seed) for seed in seeds]
            stacks[setting.key, method] = np.stack([c["predictions"] for c in cells])
            chosen[setting.key, method] = [str(c["chosen"]) for c in cells]
            value = scores.point(bench.metric, stacks[setting.key, method][0], bench.truth)
            print(
                f"{setting.key:>8} {method:9} {bench.metric} {value:.3f} (seed 0), {cells[0]['chosen']}, "
                f"{(time.monotonic() - began) / 60:.1f} min so far", flush=True,
            )  # fmt: skip
    groups = task.groups(task.where("test"))
    results = findings.gather(stacks, chosen, bench.truth, groups, scores.metrics_of(task.kind), config.resamples)
    results |= {
        "checkpoint": str(file), "task": task.name, "kind": task.kind, "classes": list(task.names), "size": list(size),
        "cases": {s: len(task.where(s)) for s in ("train", "val", "test")},
        "labelled": labelled, "patients": task.patients is not None, "leaks": leaks, "notes": list(task.notes),
        "config": _plain(config), "torch": torch.__version__, "device": str(device),
        "minutes": round((time.monotonic() - began) / 60, 2),
    }  # fmt: skip
    findings.write(results, out)
    print(f"\n{findings.table(results)}\n{out}/  results.json  table.md  plot.png")
    return results


def _task(
    config: DownstreamConfig, model: Model, file: Path, run: dict[str, Any]
) -> tuple[tasks.Task, tuple[int, ...], list[str]]:
    """The task without its leaks, the size of its images or crops, and what was said about leaks."""
    if isinstance(model, ImageGPT):
        grid, patch = model.config.grid, model.config.patch
        dims, trained = len(grid), tuple(n * p for n, p in zip(grid, patch, strict=True))
    else:
        dims = model.config.dims
        # An image was a scan of one slice there: 1 x Y x X.
        trained = tuple((run.get("views") or {}).get("global_size") or ())[-dims:]
        if model.config.in_channels != 1:
            raise UserError(f"{file} takes {model.config.in_channels} channels; this evaluation gives images of one", 2)
    size = tuple(config.size) or trained
    task = tasks.read_task(Path(config.task), dims, size or None, config.split_seed, partial(_bar, what="reading"))
    if task.kind != "segmentation":
        size = tuple(task.images[0].shape[1:])
    elif len(size) != dims:
        raise UserError(f"--size must give the {dims} voxels (zyx) of a crop: {file} has no config.yaml beside it", 2)
    shown = "x".join(map(str, size))
    try:
        model.grid_of(size)
    except ValueError as error:
        raise UserError(f"--size {shown}: {error}", 2) from error
    task, leaks = tasks.drop_leaks(task, _pretraining(config, run), config.leaks == "keep")
    for line in (*leaks, *task.notes):
        print(line)
    return task, size, leaks


def _plain(config: DownstreamConfig) -> dict[str, Any]:
    return {k: v for k, v in vars(config).items() if k not in ("device", "out")}


def _pretraining(config: DownstreamConfig, run: dict[str, Any]) -> set[str]:
    """Source hashes of what the checkpoint was trained on; says so where they cannot be had."""
    where = config.pretraining or (run.get("data") or {}).get("root")
    roots = [Path(part) for part in (where or "").split(os.pathsep) if part]  # a run may have several
    found: set[str] = set()
    for root in roots:
        if (root / "index.sqlite").is_file():
            print(f"note: {root} is a prepared store, which keeps no source files; --pretraining DIR checks for leaks")
        elif config.pretraining is None and not root.exists():
            print(f"note: the checkpoint was trained on {root}, which is not here; --pretraining DIR checks for leaks")
        else:
            found |= tasks.hashes_of(root, partial(_bar, what="leak check"))
    if not roots:
        print("note: what the checkpoint was trained on is not known here; --pretraining DIR checks for leaks")
    return found


def _claim(out: Path, config: DownstreamConfig, file: Path, model: Model, task: tasks.Task) -> dict[str, Any]:
    """Make or take up the folder and say what it holds; UserError where it holds another evaluation."""
    # These may change: finished cells stay true.
    free = ("resamples", "methods", "fractions", "shots", "seeds", "scale", "scratch_of")
    mine = {k: v for k, v in _plain(config).items() if k not in free}
    held_out = "".join(task.hashes[i] for i in task.where("test")).encode()
    mine |= {
        "architecture": json.loads(json.dumps(asdict(model.config))),  # as it is read again, tuples as lists
        "checkpoint_sha256": _sha256(file), "task_sha256": _sha256(config.task),
        "held_out_sha256": hashlib.sha256(held_out).hexdigest(),
    }  # fmt: skip
    if isinstance(model, ImageGPT):  # scratch reads the same tokens
        mine["codebook_sha256"] = hashlib.sha256(model.codebook.centres.cpu().numpy().tobytes()).hexdigest()
    try:
        (out / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder that can be written") from error
    claim = out / _CLAIM
    if claim.exists():
        if other := _difference(mine, json.loads(claim.read_text())):
            raise UserError(f"--out {out} holds another evaluation ({other}); give another --out", 2)
        print(f"going on in {out}: {len(list((out / 'cells').glob('*.npz')))} results are there")
    runs.write_whole(claim, lambda opened: opened.write(json.dumps(mine, indent=1).encode()))
    return mine


def _sha256(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _take_scratch(other: Path, out: Path, mine: dict[str, Any]) -> None:
    """Copy another evaluation's cells that know nothing of its checkpoint; UserError where those made here would
    differ."""
    if not (other / _CLAIM).is_file():
        raise UserError(f"--scratch_of {other}: no evaluation there; give the --out of one", 2)
    shared = {k: v for k, v in mine.items() if k not in ("checkpoint_sha256", "pretraining")}
    if differs := _difference(shared, json.loads((other / _CLAIM).read_text())):
        raise UserError(f"--scratch_of {other}: {differs}; leave it out to train from scratch again", 2)
    there = [c for c in sorted((other / "cells").glob("*.npz")) if re.search("-(scratch|untrained)-", c.name)]
    for cell in there:
        data, place = cell.read_bytes(), out / "cells" / cell.name
        runs.write_whole(place, lambda file, data=data: file.write(data))
    print(f"{len(there)} results without the checkpoint taken from {other}")


def _difference(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> str | None:
    """The first thing that differs, in words."""
    for name, value in mine.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _difference(value, other, f"{name}."):
                return inner
        elif value != other:
            return f"{prefix}{name} is {other} there, {value} here"
    return None


class Bench:
    """Runs one method on one setting and seed at a time; what is done lies in `cells/` and is not done again."""

    def __init__(
        self,
        task: tasks.Task,
        model: Model,
        config: DownstreamConfig,
        size: tuple[int, ...],
        device: torch.device,
        out: Path,
    ) -> None:
        self.task, self.config, self.size, self.device, self.out = task, config, size, device, out
        self.model = model.to(device).eval()
        self.metric = scores.metrics_of(task.kind)[0]
        self.dense = task.kind == "segmentation"
        self.truth = self._truth(task.where("test"))
        self.classes = len(task.names)
        self.budget = tuning.Budget(steps=config.steps or 1, batch=config.batch_size or 1)
        self.run: Callable[..., Any] = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        self._features: dict[int | None, probes.Frozen] = {}

    def _truth(self, index: np.ndarray) -> np.ndarray:
        # Of a segmentation the predictions already are each case's Dice.
        return np.zeros(len(index)) if self.dense else self.task.labels(index)

    def cell(self, setting: Setting, method: str, seed: int) -> dict[str, Any]:
        """Held-out predictions of one run, and what was chosen for it."""
        if method in (*PROBES, "untrained") and not self.dense:
            return self._once(f"{setting.key}-{method}-{seed}", lambda: self._probe(method, setting, seed))
        rates, seeds = self.config.lrs or [], range(min(_RATE_SEEDS, self.config.seeds or 1))

        def found(lr: float) -> float:
            return float(np.mean([self._trial(setting, method, lr, s)["validation"] for s in seeds]))

        lr = max(rates, key=found)
        edge = " (edge of those tried)" if len(rates) > 2 and lr in (min(rates), max(rates)) else ""
        return {**self._trial(setting, method, lr, seed), "chosen": f"lr {lr:g}{edge}"}

    def _once(self, name: str, result: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`result()`, or what it was when it was asked for before."""
        path = self.out / "cells" / f"{name}.npz"
        if not path.exists():
            values = result()
            runs.write_whole(path, lambda file: np.savez_compressed(file, **values))
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def _trial(self, setting: Setting, method: str, lr: float, seed: int) -> dict[str, Any]:
        """A network trained at one rate: held-out predictions, and its score on the validation cases."""

        def result() -> dict[str, Any]:
            val, what = self.task.where("val"), f"{setting.key} {method} lr {lr:g} seed {seed}"
            network = self._trained(method, setting.cases(self.task, seed), lr, seed, what)
            score = scores.point(self.metric, self._predict(network, val), self._truth(val))
            return {"predictions": self._predict(network, self.task.where("test")), "validation": score}

        return self._once(f"{setting.key}-{method}-{lr:g}-{seed}", result)

    def _fresh(self, seed: int) -> Any:
        """The architecture with weights that know nothing; of an Image-GPT the codebook stays, for the same tokens."""
        torch.manual_seed(_FRESH + seed)
        fresh = medformer.build(self.model.config)
        if isinstance(self.model, ImageGPT):
            fresh.codebook.load_state_dict(self.model.codebook.state_dict())
        return fresh

    def _trained(self, method: str, index: np.ndarray, lr: float, seed: int, what: str) -> tuning.Network:
        backbone = self._fresh(seed)
        if method not in ("scratch", "untrained"):
            backbone.load_state_dict(self.model.state_dict())
        head = "linear" if method == "untrained" else method
        network = tuning.Network(backbone, head, self.classes, self.dense).to(self.device)
        images = [self.task.images[i] for i in index]
        targets = [self.task.targets[i] for i in index]
        bar = partial(_bar, what=what)
        if self.dense:
            tuning.train_dense(network, images, targets, self.size, self.budget, lr, seed, self.run, bar)
        else:
            target = torch.stack(targets)
            tuning.train_classifier(network, images, target, self.classes, self.budget, lr, seed, self.run, bar)
        return network

    def _predict(self, network: tuning.Network, index: np.ndarray) -> np.ndarray:
        images = [self.task.images[i] for i in index]
        if not self.dense:
            return tuning.predict(network, images, self.task.kind, 2 * self.budget.batch, self.run)
        several = 2 * self.budget.batch
        guesses = [tuning.predict_dense(network, x, self.size, self.classes, several, self.run) for x in images]
        return tuning.dense_scores(guesses, [self.task.targets[i] for i in index], self.classes)

    def _probe(self, method: str, setting: Setting, seed: int) -> dict[str, Any]:
        index, val, test = setting.cases(self.task, seed), self.task.where("val"), self.task.where("test")
        whose = seed if method == "untrained" else None
        if whose not in self._features:
            model = self.model if whose is None else self._fresh(whose).to(self.device)
            bar = partial(_bar, what="features")
            self._features[whose] = probes.extract(model, self.task.images, 2 * self.budget.batch, self.run, bar)
        frozen = self._features[whose]
        target = torch.stack([self.task.targets[i] for i in index])
        truth = self.task.labels(val)

        def part(where: Iterable[int]) -> probes.Frozen:
            return frozen.of(torch.as_tensor(np.asarray(where)))

        if method == "knn":
            ask = partial(probes.knn, part(index).layers[-1], target, classes=self.classes)
            asked = part(val).layers[-1]
            ks = sorted({min(k, len(index)) for k in probes.NEIGHBOURS})
            best = max(ks, key=lambda k: scores.point(self.metric, ask(asked, k=k), truth))
            return {"predictions": ask(part(test).layers[-1], k=best), "chosen": f"k {best}"}

        def better(probe: probes.LinearProbe) -> float:
            return scores.point(self.metric, probes.probabilities(probe(part(val)), self.task.kind), truth)

        probe = probes.linear_sweep(part(index), target, self.classes, self.config.probe_steps or 1, seed, better)
        if method == "linear" and seed == 0:
            self._keep(probe)
        chosen = f"last {probe.last}{' + mean' if probe.pool else ''}, lr {probe.lr:g}"
        return {"predictions": probes.probabilities(probe(part(test)), self.task.kind), "chosen": chosen}

    def _keep(self, probe: probes.LinearProbe) -> None:
        """probe.safetensors, for the page; settings run from few labels to many, so the last one stays."""
        about = {
            "task": self.task.name, "kind": self.task.kind, "names": list(self.task.names), "last": probe.last,
            "pool": probe.pool, "size": list(self.size), "width": self.model.config.width,
        }  # fmt: skip
        tensors = {"mean": probe.mean, "spread": probe.spread, "weight": probe.weight, "bias": probe.bias}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        data = pack(tensors, metadata={"medformer_probe": json.dumps(about)})
        runs.write_whole(self.out / "probe.safetensors", lambda file: file.write(data))


if __name__ == "__main__":
    sys.exit(main())
