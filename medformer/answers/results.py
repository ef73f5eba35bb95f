"""What a fine-tuning leaves: answers of every held-out case, their scores, curves, a model card, the next step."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medformer.answers.config import FinetuneConfig
from medformer.answers.maps import write_labels
from medformer.answers.model import About, Finetuned
from medformer.answers.predict import predict
from medformer.data.cases import first, read_case
from medformer.evaluation import findings, scores, tasks, tuning
from medformer.evaluation.scores import dice
from medformer.files import write_whole

__all__ = ["Found", "answers", "case_names", "closing", "shown_scores", "table_of", "write"]

SPLITS = {"val": "validation", "test": "test"}
_ENDING = re.compile(r"\.(nii|nii\.gz|nrrd|nhdr|mha|mhd|dcm|png|jpe?g|tiff?|bmp|npy|zip|h5)$", re.I)
_UNSAFE = re.compile(r"[^\w.#+-]+")


@dataclass(frozen=True, kw_only=True)
class Found:
    """Answers and scores of the cases that the network did not learn from."""

    rows: list[dict[str, Any]]
    """One a case: name, split, what is true and what was said."""
    scores: dict[str, dict[str, Any]]
    by_class: dict[str, list[float | None]]


def case_names(sources: Sequence[str]) -> list[str]:
    """A short name for each, different for each, that a file can have."""
    short = [_ENDING.sub("", source.rstrip("/\\")) for source in sources]
    last = [re.split(r"[/\\]", name)[-1] for name in short]
    names = last if len({*last}) == len(last) else short
    found, taken = [], set()
    for name in (_UNSAFE.sub("_", name).strip("._") or "case" for name in names):
        tried, number = name, 1
        while tried in taken:
            number += 1
            tried = f"{name}#{number}"
        taken.add(tried)
        found.append(tried)
    return found


def answers(
    model: Finetuned, task: tasks.Task, out: Path, config: FinetuneConfig, progress: Callable[[Any], Any]
) -> Found:
    """Ask the network about every validation and test case, and score it; label maps go to `out`/maps."""
    about, names = model.about, case_names(task.sources)
    metrics = scores.metrics_of(about.kind)
    rows: list[dict[str, Any]] = []
    found, by_class = {}, {}
    run = partial(torch.autocast, model.network.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    for split in SPLITS:
        index = task.where(split)
        if about.dense:
            predictions = []
            for i in progress(index):
                one, row = _segmented(model, task, int(i), names[i], out if config.maps else None, config)
                predictions.append(one)
                rows.append({"name": names[i], "split": split, **row})
            stack, truth = np.stack(predictions), np.zeros(len(index))
        else:
            images = [task.images[i] for i in index]
            stack, truth = tuning.predict(model.network, images, about.kind, 16, run), task.labels(index)
            rows += [
                {"name": names[i], "split": split, **_row(about, t, p)}
                for i, t, p in zip(index, truth, stack, strict=True)
            ]
        groups = task.groups(index)
        found[split] = {
            m: scores.estimate(m, stack[None], truth, groups, config.resamples).as_dict() for m in metrics
        }  # fmt: skip
        by_class[split] = [] if about.kind == "regression" else findings.by_class(metrics[0], stack[None], truth)
    return Found(rows=rows, scores=found, by_class=by_class)


def _segmented(
    model: Finetuned, task: tasks.Task, i: int, name: str, out: Path | None, config: FinetuneConfig
) -> tuple[np.ndarray, dict[str, Any]]:
    """Dice of each structure of one case, and its row; the label map is written where `out` is given."""
    about, dims = model.about, task.dims
    case = read_case(task.files[i], dims, canonical=False, modalities=task.modalities[i])
    grid = first(case)
    said = predict(model, case, max_memory=config.max_memory, precision=config.precision or "fp32")
    assert said.labels is not None
    labels = replace(grid, voxels=said.labels, valid=None).canonical().voxels
    value = dice(labels[0] if dims == 2 else labels, task.targets[i].numpy(), len(about.names))
    row: dict[str, Any] = {f"dice_{n}": _number(v) for n, v in zip(about.names, value.tolist(), strict=True)}
    row |= {f"ml_{n}": _number(v) for n, v in (said.volumes_ml or {}).items()}
    if out is not None:
        (out / "maps").mkdir(exist_ok=True)
        row["map"] = f"maps/{write_labels(said.labels, grid, out / 'maps' / name).name}"
    return value, row


def _row(about: About, truth: np.ndarray, said: np.ndarray) -> dict[str, Any]:
    if about.kind == "regression":
        return {"true": _number(float(truth[0])), "predicted": _number(float(said[0]))}
    shares = {f"p_{name}": round(float(p), 5) for name, p in zip(about.names, said, strict=True)}
    if about.kind == "classes":
        return {"true": about.names[int(truth)], "predicted": about.names[int(said.argmax())], **shares}
    known = {f"true_{name}": "" if math.isnan(t) else int(t) for name, t in zip(about.names, truth, strict=True)}
    return {**known, **shares}


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else float(f"{value:.6g}")


def table_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """CSV of rows whose columns differ."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


_SHORT = {"auroc": "AUROC", "mae": "MAE", "rmse": "RMSE", "r2": "R2"}


def shown_scores(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """dice 0.81 [0.78, 0.84], ...: means with their intervals."""
    parts = []
    for metric, value in scores.items():
        interval = "" if value.get("low") is None else f" [{value['low']:.3g}, {value['high']:.3g}]"
        parts.append(f"{_SHORT.get(metric, metric.replace('_', ' '))} {value['mean']:.3g}{interval}")
    return ", ".join(parts)


def write(
    model: Finetuned, task: tasks.Task, out: Path, found: Found, *, curves: Sequence[Mapping[str, float]],
    chosen: Mapping[str, Any], overlap: Sequence[str], config: Mapping[str, Any], source: str, minutes: float,
) -> None:  # fmt: skip
    """predictions.csv, scores.json, metrics.jsonl, curves.png, config.yaml and model.md."""
    import yaml

    about = model.about
    write_whole(out / "predictions.csv", lambda file: file.write(table_of(found.rows)))
    summary = {
        "task": about.task, "kind": about.kind, "names": list(about.names), "cases": dict(about.cases),
        "scores": found.scores, "by_class": found.by_class, "unit": "patients" if task.patients else "cases",
        "chosen": {k: chosen[k] for k in ("lr", "step", "score")}, "started_from": source, "notes": list(overlap),
        "minutes": round(minutes, 2),
    }  # fmt: skip
    write_whole(out / "scores.json", lambda file: file.write(json.dumps(summary, indent=1).encode()))
    lines = "".join(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n" for row in curves)
    write_whole(out / "metrics.jsonl", lambda file: file.write(lines.encode()))
    write_whole(out / "config.yaml", lambda file: file.write(yaml.safe_dump(dict(config), sort_keys=False).encode()))
    if about.count == 1 and config.get("names") != "ids":
        trained = [_trained_on(task, int(i), str(config["task"])) for i in task.where("train")]
        write_whole(out / "training.csv", lambda file: file.write(table_of(trained)))
    _plot(about, curves, out / "curves.png")
    write_whole(out / "model.md", lambda file: file.write(_card(model, task, summary).encode()))


def _trained_on(task: tasks.Task, i: int, archive: str) -> dict[str, Any]:
    """Where a case lies, and what it was taught as."""
    file = task.files[i][0] if task.files else None
    place = str(Path(archive if file is None else str(file)).resolve())
    if file is None:  # "name.npz train[3]", of the source
        split, _, number = task.sources[i].rpartition(" ")[2].partition("[")
        place += f"#{split}_images[{number}"
    target = task.targets[i]
    if task.kind == "classes":
        return {"path": place, "label": task.names[int(target)]}
    if task.kind == "labels":
        return {"path": place, "label": " ".join(n for n, t in zip(task.names, target.tolist(), strict=True) if t == 1)}
    return {"path": place, **({"label": _number(float(target[0]))} if task.kind == "regression" else {})}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plot(about: About, curves: Sequence[Mapping[str, float]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    metric = scores.metrics_of(about.kind)[0]
    for place, (key, label) in enumerate((("loss", "loss"), ("validation", f"validation {metric}")), 1):
        axes = figure.add_subplot(1, 2, place)
        for lr in dict.fromkeys(row["lr"] for row in curves):
            rows = [row for row in curves if row["lr"] == lr and key in row and math.isfinite(row[key])]
            x, y = [row["step"] for row in rows], np.array([row[key] for row in rows])
            if key == "loss" and len(y) > 20:  # one batch says little: means of a twentieth of the training
                width = len(y) // 20
                y = np.convolve(
                    np.pad(y, (width // 2, width - 1 - width // 2), mode="edge"), np.ones(width) / width, "valid"
                )
            axes.plot(x, y, marker="o" if key == "validation" else "", markersize=3, linewidth=1.4, label=f"lr {lr:g}")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


_LEARNED = {
    "finetune": "all weights and a new head", "fpt": "norms, positions, the input layer and a new head (FPT)",
    "attentive": "a new head over frozen features", "linear": "a new head over frozen features",
    "decoder": "a new head over frozen features",
}  # fmt: skip


def _card(model: Finetuned, task: tasks.Task, summary: Mapping[str, Any]) -> str:
    about, config = model.about, model.config
    what = {
        "classes": f"says which of {len(about.names)} classes a case is of: {', '.join(about.names)}",
        "labels": f"says for each of {len(about.names)} labels how probable it is: {', '.join(about.names)}",
        "regression": f"gives a number, {about.names[0]}",
        "segmentation": f"marks {len(about.names)} structure(s) voxel by voxel: {', '.join(about.names)}",
    }[about.kind]
    takes = f"{config.dims}D {'scans' if config.dims == 3 else 'images'}"
    rows = [("task", about.task), ("takes", takes)]
    if about.channels:
        missing = "; some may be missing" if about.missing else ""
        rows.append(("channels, in this order", f"{', '.join(about.patterns)}{missing}"))
    size = "x".join(map(str, about.size))
    windows = f", overlap {about.overlap:g}" if about.dense else ""
    rows.append(
        (
            "windows" if about.dense else "resized to",
            f"{size} voxels (zyx){windows}",
        )
    )
    if about.spacing_mm:
        low, middle, high = ("x".join(f"{mm:.3g}" for mm in s) for s in about.spacing_mm)
        rows.append(("spacing in training, mm (zyx)", f"median {middle}, {low} to {high}"))
    rows += [
        ("modality in training", ", ".join(about.modalities) or "unknown"),
        ("grey values", "CT in HU clipped to [-1000, 1000] and divided by 500; all others by a robust z-score"),
        ("cases", ", ".join(f"{n} {s}" for s, n in about.cases.items())),
        ("patients", str(len({*task.patients})) if task.patients else "not given: cases count as patients"),
        ("started from", "new weights" if about.scratch else summary["started_from"]),
        ("learned", _LEARNED[about.method]),
        ("chosen on validation", f"learning rate {summary['chosen']['lr']:g}, step {summary['chosen']['step']}"),
    ]  # fmt: skip
    metrics = list(about.scores["test"])
    table = ["| | " + " | ".join(m.replace("_", " ") for m in metrics) + " |", "|" + "---|" * (1 + len(metrics))]
    for split, called in SPLITS.items():
        cells = [_cell(about.scores[split][m]) for m in metrics]
        table.append(f"| {called}, {about.cases[split]} cases | " + " | ".join(cells) + " |")
    each = ""
    if len(about.names) > 1 and about.by_class.get("test"):
        values = (
            f"{n} {'' if v is None else f'{v:.3f}'}" for n, v in zip(about.names, about.by_class["test"], strict=True)
        )
        each = f"\n{metrics[0].replace('_', ' ')} of each on the test cases: {', '.join(values)}.\n"
    seen = "".join(f"- {line}\n" for line in summary["notes"])
    counted = sum(p.numel() for p in model.parameters())
    body = "\n".join(f"| {a} | {b} |" for a, b in rows)
    return f"""---
library_name: medformer
tags: [medical-imaging, {"image-segmentation" if about.dense else "image-classification"}]
---

# {about.task}

A medformer {type(model.backbone).__name__} with its head, {counted:,} parameters, that {what}.

| | |
|---|---|
{body}

## Scores

{chr(10).join(table)}
{each}
Mean [95% interval by bootstrap over {summary["unit"]}]. The validation cases chose the learning rate and the step, so
their scores are a little too good; the test cases chose nothing. Below 5 patients there is no interval.

## Use

```
medformer predict model.safetensors SCAN --out answers
```

```python
import medformer
from medformer.data import read_volume

answer = medformer.predict(medformer.load("model.safetensors"), read_volume("scan.nii.gz"))
```

Meant for research on scans like those of training. Not a medical device: no answer may decide about a patient.

## Limits

- Measured on {about.cases["test"]} cases of the same source as the training cases; another hospital, scanner, protocol
  or group of patients may differ by more than the intervals say.
- Probabilities are not calibrated. A scan that shows none of the classes gets an answer too.
- `medformer predict` warns of spacings and modalities far from training; it cannot see other differences.
{seen}
To be filled in before it is shared: licence and consent of the data; scanners, ages, sexes; licence of the weights.
"""


def _cell(value: Mapping[str, Any]) -> str:
    interval = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{interval}"


def closing(model: Finetuned, task: tasks.Task, out: Path, config: FinetuneConfig) -> None:
    """What came out, and the commands that come next."""
    about = model.about
    for split, called in SPLITS.items():
        found = about.scores.get(split, {})
        few = ", too few patients for intervals" if all(value.get("low") is None for value in found.values()) else ""
        print(f"{called}: {shown_scores(found)} ({about.cases[split]} cases{few})")
    maps = "  maps/" if about.dense and (out / "maps").is_dir() else ""
    print(f"{out}/  model.safetensors  model.md  scores.json  predictions.csv  curves.png{maps}")
    scan = "SCAN"
    if task.files and config.names != "ids":
        place = next((p for p in task.files[task.where("test")[0]] if p is not None), None)
        scan = str(place.parent if about.count > 1 and place is not None and any(about.patterns.values()) else place)
        scan = config.task if about.count > 1 and not any(about.patterns.values()) else scan
    shown = about.count == 1 or any(about.patterns.values())  # a scan, or the folder of a case
    steps = [("predict", "answers")] + [("report", "page.html")] * shown
    for number, (word, result) in enumerate(steps):
        words = ["medformer", word, f"{out}/model.safetensors", scan, "--out", f"{out}/{result}"]
        print(f"{' ' * 6 if number else 'next: '}{shlex.join(words)}")


def as_json(about: About) -> dict[str, Any]:
    """What a reader of answers must know about the model."""
    return {f.name: getattr(about, f.name) for f in fields(about)}
