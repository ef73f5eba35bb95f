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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import torch

import findings
import probes
import runs
import scores
import tasks
from medformer.models import ImageGPT, Model
from runs import UserError
from trials import CLASSIFY, SEGMENT, Bench, Setting, bar

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

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
    task = tasks.read_task(Path(config.task), dims, size or None, config.split_seed, partial(bar, what="reading"))
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
            found |= tasks.hashes_of(root, partial(bar, what="leak check"))
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


if __name__ == "__main__":
    sys.exit(main())
