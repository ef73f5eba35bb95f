"""Does pretraining help? A checkpoint against the same model from scratch, on labelled cases, with intervals.

    medformer evaluate CHECKPOINT --task FILE          # .npz in MedMNIST's layout, or a .csv of scans
    medformer evaluate --help

Every method sees the same labelled cases, seeds and held-out cases; every trained one has the same steps, batches,
augmentation and number of learning rates, chosen on validation cases. Run the same command again to go on after a stop.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch

from medformer.channels import flags_of, with_channels
from medformer.errors import UserError, exit_code
from medformer.evaluation import findings, probes, scores, tasks
from medformer.evaluation.config import DownstreamConfig
from medformer.evaluation.setup import (
    device_of,
    difference,
    labelled_cases,
    parse_command,
    sha256_of,
    sources_of_pretraining,
)
from medformer.evaluation.trials import CLASSIFY, PROBES, REGRESS, SEGMENT, Bench, Setting
from medformer.evaluation.tuning import PEERS
from medformer.files import write_whole
from medformer.folders import tried
from medformer.models import ImageGPT, Model, as_saved

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

_SINCE = ("labels", "outside", "value", "channels", "missing")  # settings that older evaluations do not name
DENSE_HEAD = 3  # results of segmentation with another head, loss or tiling are another evaluation's
_CLAIM = "evaluation.json"  # in the folder of the results: what they are of


_LISTS = ("methods", "labels", "channels", "fractions", "shots", "lrs", "size")
_SCALES: dict[str, dict[str, Any]] = {
    "quick": {"steps": 150, "batch_size": 32, "lrs": [1e-4, 4e-4, 1.6e-3], "seeds": 3, "probe_steps": 300},
    "full": {"steps": 2000, "batch_size": 64, "lrs": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], "seeds": 5, "probe_steps": 3000},
}


# What --help shows, by topic; --help-all shows every flag.
_TOPICS = {
    "What is compared": {
        "checkpoint": "CHECKPOINT",
        "task": "FILE",
        "methods": "M,M",
        "fractions": "F,F",
        "shots": "N,N",
    },
    "How long": {"scale": "auto|quick|full", "steps": "N", "batch_size": "N", "lrs": "RATE,RATE", "seeds": "N"},
    "Where": {
        "device": "auto|cpu|cuda:N",
        "precision": "fp32|bf16",
        "pretraining": "DIR",
        "scratch_of": "DIR",
        "out": "DIR",
    },
}


def main(argv: list[str] | None = None) -> int:
    """Run; 0 done, 1 data or disk, 2 usage, 130 stopped by Ctrl-C."""

    def command() -> int:
        evaluate(*parse(sys.argv[1:] if argv is None else argv))
        return 0

    return exit_code(command, "stopped by Ctrl-C; the same command goes on where this stopped")


def parse(argv: list[str]) -> tuple[Path, DownstreamConfig]:
    """Flags to a checkpoint and settings.

    Raises:
        UserError: with exit code 2.
    """
    parser = jsonargparse.ArgumentParser(
        prog="medformer evaluate", exit_on_error=False,
        usage="medformer evaluate CHECKPOINT --task FILE [--methods M,M] [--fractions F,F] ...",
        description="Compare a pretrained model with the same model from scratch on labelled cases: frozen features, "
        "fine-tuning and scratch, with intervals over patients.",
        epilog="Lists are written 0.1,1.0 or [0.1, 1.0].",
    )  # fmt: skip
    parser.add_argument("checkpoint", help="backbone.safetensors, or the folder of its run.")
    return parse_command(parser, DownstreamConfig, "checkpoint", _TOPICS, _LISTS, argv)


def evaluate(checkpoint: Path, config: DownstreamConfig) -> dict[str, Any]:
    """All of it; returns what results.json holds."""
    began = time.monotonic()
    device = device_of(config.device)
    tried(Path(config.out or "runs"))
    scale = config.scale if config.scale != "auto" else "full" if device.type == "cuda" else "quick"
    defaults = {**_SCALES[scale], "precision": "bf16" if device.type == "cuda" else "fp32"}
    config = replace(config, scale=scale, **{n: v for n, v in defaults.items() if getattr(config, n) is None})
    model, file, run = probes.load_model(checkpoint)
    task, size, leaks = _task(config, model, file, run)
    choices = {"segmentation": SEGMENT, "regression": REGRESS}.get(task.kind, CLASSIFY)
    if task.flags:  # networks that know which sequence is missing
        choices = tuple(m for m in choices if m not in (*PROBES, "untrained", *PEERS))
    if not isinstance(model, ImageGPT):
        model = with_channels(model, task.channels, task.flags)
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
    print(f"next: medformer finetune {checkpoint} --task {config.task}{flags_of(config.channels, config.missing)}")
    return results


def _task(
    config: DownstreamConfig, model: Model, file: Path, run: dict[str, Any]
) -> tuple[tasks.Task, tuple[int, ...], list[str]]:
    """The task without its leaks, the size of its images or crops, and what was said about leaks."""
    task, size = labelled_cases(config, model, file, run)
    seen = sources_of_pretraining(config, run)
    task, leaks = tasks.drop_leaks(task, seen, config.leaks == "keep")
    for line in (*leaks, *task.notes):
        print(line)
    return task, size, leaks


def _plain(config: DownstreamConfig) -> dict[str, Any]:
    return {k: v for k, v in vars(config).items() if k not in ("device", "out")}


def _claim(out: Path, config: DownstreamConfig, file: Path, model: Model, task: tasks.Task) -> dict[str, Any]:
    """Make or take up the folder and say what it holds; UserError where it holds another evaluation."""
    # These may change: finished cells stay true.
    free = ("resamples", "methods", "fractions", "shots", "seeds", "scale", "scratch_of", "names")
    mine = {k: v for k, v in _plain(config).items() if k not in free and not (k in _SINCE and not v)}
    held_out = "".join(task.hashes[i] for i in task.where("test")).encode()
    mine |= {
        "architecture": json.loads(json.dumps(as_saved(model.config))),  # as it is read again, tuples as lists
        "checkpoint_sha256": sha256_of(file), "task_sha256": sha256_of(config.task),
        "held_out_sha256": hashlib.sha256(held_out).hexdigest(),
    }  # fmt: skip
    if task.kind == "segmentation":
        mine["dense_head"] = DENSE_HEAD
    if isinstance(model, ImageGPT):  # scratch reads the same tokens
        mine["codebook_sha256"] = hashlib.sha256(model.codebook.centres.cpu().numpy().tobytes()).hexdigest()
    try:
        (out / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder that can be written") from error
    claim = out / _CLAIM
    if claim.exists():
        if other := difference(mine, json.loads(claim.read_text())):
            raise UserError(f"--out {out} holds another evaluation ({other}); give another --out", 2)
        print(f"going on in {out}: {len(list((out / 'cells').glob('*.npz')))} results are there")
    write_whole(claim, lambda opened: opened.write(json.dumps(mine, indent=1).encode()))
    return mine


def _take_scratch(other: Path, out: Path, mine: dict[str, Any]) -> None:
    """Copy another evaluation's cells that know nothing of its checkpoint; UserError where those made here would
    differ."""
    if not (other / _CLAIM).is_file():
        raise UserError(f"--scratch_of {other}: no evaluation there; give the --out of one", 2)
    shared = {k: v for k, v in mine.items() if k not in ("checkpoint_sha256", "pretraining")}
    if differs := difference(shared, json.loads((other / _CLAIM).read_text())):
        raise UserError(f"--scratch_of {other}: {differs}; leave it out to train from scratch again", 2)
    alone = f"-({'|'.join(('scratch', 'untrained', *PEERS))})-"
    there = [c for c in sorted((other / "cells").glob("*.npz")) if re.search(alone, c.name)]
    for cell in there:
        data, place = cell.read_bytes(), out / "cells" / cell.name
        write_whole(place, lambda file, data=data: file.write(data))
    print(f"{len(there)} results without the checkpoint taken from {other}")
