"""What an evaluation found: gathered, as a table, as JSON, and as a plot of score against labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from medformer.evaluation.scores import difference, estimate, point
from medformer.evaluation.tuning import PEERS
from medformer.files import write_whole

__all__ = ["by_class", "gather", "plot", "table", "write"]

BASELINE = "scratch"
_COLUMNS = 12  # more classes than these are in results.json only
_COLOURS = {
    "scratch": "#444444", "finetune": "#d1495b", "fpt": "#edae49", "attentive": "#66a182", "linear": "#2e86ab",
    "decoder": "#66a182", "knn": "#8d6a9f", "untrained": "#aaaaaa", "unet": "#8c5a2b", "resnet": "#8c5a2b",
}  # fmt: skip


def gather(
    stacks: dict[tuple[str, str], np.ndarray],
    chosen: dict[tuple[str, str], list[str]],
    truth: np.ndarray,
    groups: np.ndarray,
    metrics: tuple[str, ...],
    resamples: int,
) -> dict[str, Any]:
    """Scores of every (setting, method), [S, n, C] predictions each, and differences to scratch and peer where they
    ran."""
    rows = []
    for (setting, method), stack in stacks.items():
        row: dict[str, Any] = {"setting": setting, "method": method, "chosen": chosen[setting, method]}
        bases = {"scratch": stacks.get((setting, BASELINE))}
        bases["peer"] = next((stacks[setting, name] for name in PEERS if (setting, name) in stacks), None)
        for metric in metrics:
            row[metric] = estimate(metric, stack, truth, groups, resamples).as_dict()
            for name, base in bases.items():
                if base is not None and base is not stack:
                    found = difference(metric, stack, base, truth, groups, resamples)
                    row[f"{metric}_over_{name}"] = found.as_dict()
        row["by_class"] = by_class(metrics[0], stack, truth)
        rows.append(row)
    return {"metrics": list(metrics), "rows": rows}


def by_class(metric: str, stack: np.ndarray, truth: np.ndarray) -> list[float | None]:
    """Mean over seeds of each class's own score; None where the held-out cases cannot tell."""
    if metric == "dice":
        known = ~np.isnan(stack)
        sums, counts = np.where(known, stack, 0).sum((0, 1)), known.sum((0, 1))
        return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
    found: list[float | None] = []
    for c in range(stack.shape[2]):
        own = (truth == c).astype(float) if truth.ndim == 1 else truth[:, c]
        both = {0.0, 1.0} <= set(own[~np.isnan(own)].tolist())
        values = [point(metric, guess[:, c : c + 1], own[:, None]) for guess in stack] if both else []
        found.append(float(np.mean(values)) if values else None)
    return found


def _range(value: dict[str, Any], signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{value['mean']:{sign}.3f}"
    return text if value["low"] is None else f"{text} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def _gain(value: dict[str, Any] | None) -> list[str]:
    """A difference and its p."""
    return ["", ""] if value is None else [_range(value, True), "" if value["p"] is None else f"{value['p']:.3f}"]


def table(results: dict[str, Any]) -> str:
    """Markdown: mean [95% interval] and its difference to scratch and to the peer with the paired test's p."""
    metrics = results["metrics"]
    peer = any(row["method"] in PEERS for row in results["rows"])
    head = ["labels", "cases", "method"]
    for metric in metrics:
        head += [metric.replace("_", " "), "over scratch", "p", *(["over peer", "p"] if peer else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        counts = results["labelled"][row["setting"]]
        cells = [row["setting"], str(round(sum(counts) / len(counts))), row["method"]]
        for metric in metrics:
            cells += [_range(row[metric])]
            for name in ("scratch", "peer") if peer else ("scratch",):
                cells += _gain(row.get(f"{metric}_over_{name}"))
        lines.append("| " + " | ".join(cells) + " |")
    if 1 < len(results["classes"]) <= _COLUMNS:
        lines += ["", *_classes(results)]
    unit = "patients" if results["patients"] else "cases"
    lines.append(
        f"\nMean over {len(results['rows'][0]['chosen'])} seeds on {results['cases']['test']} held-out cases; 95% "
        f"intervals by bootstrap over {unit} and seeds, paired; p: predictions of {unit} swapped at random, two-sided."
    )
    return "\n".join(lines)


def _classes(results: dict[str, Any]) -> list[str]:
    """A table of each class by itself."""
    names = [str(name) for name in results["classes"]]
    lines = ["| " + " | ".join([f"{results['metrics'][0]} of", "", *names]) + " |", "|" + "---|" * (2 + len(names))]
    for row in results["rows"]:
        cells = ["" if value is None else f"{value:.3f}" for value in row["by_class"]]
        lines.append("| " + " | ".join([row["setting"], row["method"], *cells]) + " |")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Score against labelled cases, one line a method, bars for the intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    metrics = results["metrics"]
    figure = Figure(figsize=(5.6 * len(metrics), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    settings = list(dict.fromkeys(row["setting"] for row in results["rows"]))
    cases = {s: float(np.mean(results["labelled"][s])) for s in settings}
    methods = list(dict.fromkeys(row["method"] for row in results["rows"]))
    for number, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), number + 1)
        for shift, method in enumerate(methods):
            found = [(row["setting"], row[metric]) for row in results["rows"] if row["method"] == method]
            x = [cases[s] * 1.04 ** (shift - (len(methods) - 1) / 2) for s, _ in found]
            y = [v["mean"] for _, v in found]
            ends = [(v["mean"], v["mean"]) if v["low"] is None else (v["low"], v["high"]) for _, v in found]
            bars = np.abs(np.array(ends).T - y)
            line = "--" if method == BASELINE else "-"
            axes.errorbar(x, y, bars, label=method, color=_COLOURS.get(method), marker="o", markersize=4, capsize=2.5,
                          linewidth=1.4, elinewidth=0.9, linestyle=line)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(list(cases.values()), [f"{s}\n{n:.0f}" for s, n in cases.items()])
        axes.minorticks_off()
        axes.set_xlabel("labels, and training cases that have them")
        axes.set_ylabel({"auroc": "macro AUROC", "dice": "Dice"}.get(metric) or metric.replace("_", " "))
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 0:
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{results['task']}: {results['cases']['test']} held-out cases, 95% intervals", fontsize=11)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


def write(results: dict[str, Any], out: Path) -> None:
    """results.json, table.md and plot.png."""
    clean = json.dumps(results, indent=1, default=lambda v: None if isinstance(v, float) and math.isnan(v) else str(v))
    write_whole(out / "results.json", lambda file: file.write(clean.encode()))
    write_whole(out / "table.md", lambda file: file.write(f"{table(results)}\n".encode()))
    plot(results, out / "plot.png")
