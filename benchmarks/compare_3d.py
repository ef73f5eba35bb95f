"""Does pretraining help in 3D? Every set of a folder, each method on each set and on all sets together, one table.

    python benchmarks/compare_3d.py ../shared/data/labelled3d --out runs/compare-3d --quick
    python benchmarks/compare_3d.py ../shared/data/labelled3d --out runs/compare-3d --sets hippocampus_mr,nodule_ct
    python benchmarks/compare_3d.py ../shared/data/labelled3d --on all --labelled 10 --tasks texture

A set is a folder with `images/fit` (what is pretrained on) and tables for `medformer evaluate --task` (.csv with path
and mask, or path and label; patient, split); other tables are left alone. Networks and recipe are the defaults of
`medformer pretrain METHOD`, but for the size of a crop, which follows a set's scans (SIDE^3 voxels, flatter where the
scans are; of all sets together the median), and the number of steps.
Each evaluation takes what knows nothing of its checkpoint (scratch, untrained, the U-Net or ResNet) from the first one
of its task, crop and network. Stop it at will: the same command goes on; finished parts are not made again.

Writes OUT/table.md, OUT/results.json and OUT/plot.png; OUT/runs and OUT/evaluations hold the parts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medformer.data import read_volume
from medformer.evaluation.tuning import PEERS
from medformer.files import write_whole

SIDE = 32  # of a crop, where the scans allow it
STEP = 4  # crops are multiples of the tokens' step
PART = 0.8  # of a scan's side that the closest view still holds, with --whole
ALL = "all"  # name of the collection of every set
MAY = {"segmentation": ("finetune", "decoder", "linear", "untrained", "scratch", "unet"),
       "classes": ("knn", "linear", "finetune", "untrained", "scratch", "resnet")}  # fmt: skip
COLOURS = {"scratch": "#444444", "unet": "#8c5a2b", "resnet": "#8c5a2b", "dino": "#d1495b", "byol": "#2e86ab",
           "igpt": "#66a182"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is spent."""

    pretrain_steps: int
    pretrain_seeds: int
    steps: int
    batch: int
    lrs: str
    seeds: int
    fractions: str


PLANS = {
    "full": Plan(pretrain_steps=1500, pretrain_seeds=2, steps=300, batch=8, lrs="4e-4,1.6e-3,6.4e-3", seeds=5,
                 fractions="0.05,0.1,0.25,1.0"),
    "quick": Plan(pretrain_steps=300, pretrain_seeds=1, steps=100, batch=8, lrs="1.6e-3", seeds=1, fractions="0.1"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Set:
    """One folder of scans with its tasks."""

    name: str
    root: Path
    shape: tuple[float, ...]
    """Voxels (zyx) of its median scan."""
    crop: tuple[int, int, int]
    tasks: dict[str, str]
    """Kind of each table by its stem."""
    training: dict[str, int]
    """Training cases of each."""


def read_set(folder: Path, side: int = SIDE) -> Set:
    tasks, training = {}, {}
    for table in sorted(folder.glob("*.csv")):
        with open(table, newline="") as file:
            columns, *rows = csv.reader(file)
        if {"path", "mask"} <= {*columns}:
            tasks[table.stem] = "segmentation"
        elif {"path", "label"} <= {*columns}:
            tasks[table.stem] = "classes"
        if "split" in columns:
            training[table.stem] = sum(row[columns.index("split")] == "train" for row in rows)
    scans = sorted((folder / "images" / "fit").iterdir())
    shapes = np.array([read_volume(scan).voxels.shape for scan in scans[:: max(1, len(scans) // 12)]])
    shape = tuple(np.median(shapes, axis=0).tolist())
    return Set(name=folder.name, root=folder, shape=shape, crop=crop_of(shape, side), tasks=tasks, training=training)


def crop_of(shape: tuple[float, ...], side: int = SIDE) -> tuple[int, int, int]:
    """About side^3 voxels, equal sides where the scans allow it, multiples of STEP; the shortest axis is cut first."""
    left, crop = float(side**3), [0, 0, 0]
    for number, axis in enumerate(sorted(range(3), key=lambda a: shape[a])):
        length = min(round(left ** (1 / (3 - number))), int(shape[axis]))
        crop[axis] = max(STEP, length // STEP * STEP)
        left = max(1.0, left / crop[axis])
    return crop[0], crop[1], crop[2]


def whole_views(shape: tuple[float, ...], crop: tuple[int, ...]) -> list[str]:
    """Flags of views that hold PART to all of such a scan on every axis, for tasks of whole scans: these are resized to
    the crop, and a view at the scan's own resolution would be of a part that no task shows."""
    ratios = [n / side for n, side in zip(shape, crop, strict=True)]
    through, plane = ratios[0], min(ratios[1:])
    spans = {"global_scale": plane, "through_plane_scale": through}
    return [word for name, top in spans.items() for word in (f"--views.{name}", f"{PART * top:.3g},{top:.3g}")]


def shares_of(one: Set, task: str, args: Any) -> str:
    """--fractions of `medformer evaluate`: the plan's, or those of --labelled cases."""
    if not args.labelled:
        return args.plan.fractions
    if task not in one.training:
        raise SystemExit(f"--labelled {args.labelled}: {one.root / task}.csv has no column split; use --fractions")
    shares = [min(1.0, int(count) / one.training[task]) for count in args.labelled.split(",")]
    return ",".join(f"{share:.3g}" for share in dict.fromkeys(shares))


def called(*words: object) -> None:
    """A command of medformer; its errors, which it has said in one line, end this."""
    line = [str(word) for word in words]
    print("$ medformer", *line, flush=True)
    if code := subprocess.run([sys.executable, "-m", "medformer", *line], check=False).returncode:
        raise SystemExit(code)


def pretrained(
    out: Path, roots: str, crop: tuple[int, ...], name: str, method: str, seed: int, args: Any,
    views: Sequence[str] = (),
) -> Path:  # fmt: skip
    """A finished run, made or taken up."""
    run = out / "runs" / f"{name}-{method}-{seed}"
    if (run / "config.yaml").exists():
        steps = yaml.safe_load((run / "config.yaml").read_text())["steps"]
        if steps != args.plan.pretrain_steps:
            raise SystemExit(f"--pretrain_steps {args.plan.pretrain_steps}: {run} is of {steps}; give another --out")
    if any((run / file).exists() for file in ("backbone.safetensors", "image_gpt.safetensors")):
        return run
    if any((run / "checkpoints").glob("*.pt")):
        called("pretrain", "--resume", run)
        return run
    if run.exists():
        shutil.rmtree(run)  # stopped before its first checkpoint
    called("pretrain", method, "--data.root", roots, "--data.cache", out / "cache", "--views.global_size",
           "x".join(map(str, crop)), "--steps", args.plan.pretrain_steps, "--seed", seed, "--precision",
           args.precision, "--workers", 0, "--log_every", 10, "--save_every", max(1, args.plan.pretrain_steps // 10),
           "--out", run, "--data.small", "pad",
           *views,
           *(("--igpt.patch", "x".join([str(STEP)] * 3)) if method == "igpt" else ()),
           *(args.pretrain or "").split())  # fmt: skip
    return run


def made(folder: Path, shares: str, plan: Plan, methods: Sequence[str] = ()) -> bool:
    """Whether the results of just this budget lie there, of these methods at least; else `medformer evaluate` goes on,
    or says why not."""
    if not (folder / "results.json").exists():
        return False
    found = json.loads((folder / "results.json").read_text())
    used = found["config"]
    asked = {"steps": plan.steps, "batch_size": plan.batch, "seeds": plan.seeds,
             "lrs": numbers(plan.lrs), "fractions": numbers(shares)}  # fmt: skip
    there = {row["method"] for row in found.get("rows", ())}
    return all(used[name] == value for name, value in asked.items()) and there.issuperset(methods)


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def evaluated(out: Path, one: Set, task: str, run: Path, args: Any) -> dict[str, Any]:
    """results.json of one checkpoint on one task."""
    kind, sequence = one.tasks[task], (run / "image_gpt.safetensors").exists()
    folder = out / "evaluations" / f"{one.name}-{task}-{run.name}"
    shares = shares_of(one, task, args)
    methods = [m for m in MAY[kind] if m in (args.downstream or ",".join(MAY[kind])).split(",")]
    if not made(folder, shares, args.plan, methods):
        crop = [] if sequence else ["--size", "x".join(map(str, one.crop))]
        twin = out / "evaluations" / f"{one.name}-{task}-scratch{'-igpt' if sequence else ''}.txt"
        # Image-GPTs have codebooks of their own, and so a scratch of their own.
        shared = ["--scratch_of", twin.read_text()] if twin.exists() and not sequence else []
        called("evaluate", run, "--task", one.root / f"{task}.csv", "--methods", ",".join(methods), "--steps",
               args.plan.steps, "--batch_size", args.plan.batch, "--lrs", args.plan.lrs, "--seeds", args.plan.seeds,
               "--fractions", shares, "--precision", args.precision, "--device", args.device,
               "--out", folder, *crop, *shared)  # fmt: skip
        if not twin.exists():
            write_whole(twin, lambda file: file.write(str(folder).encode()))
    return json.loads((folder / "results.json").read_text())


def jobs(sets: list[Set], args: Any) -> Iterator[tuple[str, str, int]]:
    """Collection, method and seed of every run, a seed of everything before the next."""
    names = args.on.split(",") if args.on else [one.name for one in sets] + [ALL] * (len(sets) > 1)
    for seed in range(args.plan.pretrain_seeds):
        for name in names:
            for method in args.methods.split(","):
                yield name, method, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the sets")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-3d"))
    parser.add_argument("--quick", action="store_true", help="one rate, seed and share of labels, few steps")
    parser.add_argument("--sets", help="names of sets, parted by commas; default: all")
    parser.add_argument("--methods", default="dino,byol,igpt")
    parser.add_argument("--tasks", help="stems of tables, parted by commas; default: all")
    parser.add_argument("--downstream", help="methods of medformer evaluate, parted by commas; default: all but a few")
    parser.add_argument("--on", help=f"what to pretrain on: names of sets and {ALL}; default: every set and {ALL}")
    parser.add_argument(
        "--side", type=int, default=SIDE, help="voxels of a crop's side; its volume where scans are flat"
    )
    parser.add_argument("--whole", action="store_true", help="pretrain on views of most of a scan, as classes are of")
    parser.add_argument("--labelled", help="numbers of labelled training cases, instead of --fractions")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pretrain", help="further flags for medformer pretrain, in one word")
    for name, kind in (("pretrain_steps", int), ("pretrain_seeds", int), ("steps", int), ("batch", int), ("lrs", str),
                       ("seeds", int), ("fractions", str)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help="instead of the plan's")
    args = parser.parse_args()
    plan = PLANS["quick" if args.quick else "full"]
    given = {name: value for name, value in vars(args).items() if name in vars(plan) and value is not None}
    args.plan = Plan(**(vars(plan) | given))
    folders = [folder for folder in sorted(args.folder.iterdir()) if (folder / "images" / "fit").is_dir()]
    if args.sets:
        wanted = args.sets.split(",")
        if unknown := set(wanted) - {folder.name for folder in folders}:
            parser.error(f"--sets {sorted(unknown)[0]}: no such set in {args.folder}")
        folders = [folder for folder in folders if folder.name in wanted]
    if not folders:
        parser.error(f"{args.folder}: no folder with images/fit in it")
    sets = [read_set(folder, args.side) for folder in folders]
    for name, wanted, known in (("tasks", args.tasks, {task for one in sets for task in one.tasks}),
                                ("downstream", args.downstream, {m for may in MAY.values() for m in may}),
                                ("on", args.on, {one.name for one in sets} | {ALL})):  # fmt: skip
        if unknown := {*(wanted or "").split(",")} - known - {""}:
            parser.error(f"--{name} {sorted(unknown)[0]}: must be of {', '.join(sorted(known))}")
    (args.out / "evaluations").mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for name, method, seed in jobs(sets, args):
        members = [one for one in sets if name in (one.name, ALL)]
        roots = ":".join(str(one.root / "images" / "fit") for one in members)
        crop = tuple(int(np.median([one.crop[axis] for one in members])) // STEP * STEP for axis in range(3))
        shape = tuple(np.median([one.shape for one in members], axis=0).tolist())
        views = whole_views(shape, crop) if args.whole else []
        run = pretrained(args.out, roots, crop, name, method, seed, args, views)
        for one in members:
            for task, kind in one.tasks.items():
                if (method == "igpt" and kind == "segmentation") or task not in (args.tasks or task).split(","):
                    continue
                results = evaluated(args.out, one, task, run, args)
                found.append({"set": one.name, "task": task, "on": name, "method": method, "seed": seed, **results})
                report(found, args.out)
    print(f"{args.out}/  table.md  results.json  plot.png")


def report(found: list[dict[str, Any]], out: Path) -> None:
    """Table, plot and all numbers of what there is so far."""
    lines = ["| set, task | pretrained on | by | seed | labels | method | score | over scratch | over the peer |",
             "|" + "---|" * 9]  # fmt: skip
    for one in found:
        metric, seen = one["metrics"][0], set()
        for row in one["rows"]:
            alone = row["method"] in ("scratch", "untrained", *PEERS)
            if (row["setting"], row["method"]) in seen:
                continue
            seen.add((row["setting"], row["method"]))
            count = round(float(np.mean(one["labelled"][row["setting"]])))
            lines.append("| " + " | ".join([
                f"{one['set']}, {one['task']}", "" if alone else one["on"], "" if alone else one["method"],
                "" if alone else str(one["seed"]), f"{row['setting']} ({count})", row["method"],
                shown(row[metric]), shown(row.get(f"{metric}_over_scratch"), signed=True),
                shown(row.get(f"{metric}_over_peer"), signed=True),
            ]) + " |")  # fmt: skip
    write_whole(out / "table.md", lambda file: file.write(("\n".join(dict.fromkeys(lines)) + "\n").encode()))
    write_whole(out / "results.json", lambda file: file.write(json.dumps(found, indent=1).encode()))
    plot(found, out / "plot.png")


def shown(value: dict[str, Any] | None, signed: bool = False) -> str:
    if value is None:
        return ""
    sign = "+" if signed else ""
    text = f"{value['mean']:{sign}.3f}"
    return text if value["low"] is None else f"{text} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Score against labelled cases, a panel a task: fine-tuned by each method, scratch and the peer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    panels = sorted({(one["set"], one["task"]) for one in found})
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.6 * columns, 3.6 * math.ceil(len(panels) / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, number + 1)
        drawn = set()
        for one in (o for o in found if (o["set"], o["task"]) == panel):
            metric = one["metrics"][0]
            axes.set_ylabel({"auroc": "macro AUROC", "dice": "Dice"}.get(metric, str(metric)))
            for method in ("scratch", *PEERS, "finetune"):
                rows = [row for row in one["rows"] if row["method"] == method]
                label = f"{one['method']} on {one['on']}" if method == "finetune" else method
                if not rows or (label in drawn and method != "finetune"):
                    continue
                x = [float(np.mean(one["labelled"][row["setting"]])) for row in rows]
                y = [row[metric]["mean"] for row in rows]
                ends = [
                    (v, v) if row[metric]["low"] is None else (row[metric]["low"], row[metric]["high"])
                    for row, v in zip(rows, y, strict=True)
                ]
                axes.errorbar(x, y, np.abs(np.array(ends).T - y), capsize=2.5, marker="o", markersize=4, linewidth=1.3,
                              label=None if label in drawn else label,
                              color=COLOURS[one["method"] if method == "finetune" else method],
                              linestyle="-" if method == "finetune" and one["on"] != ALL else "--")  # fmt: skip
                drawn.add(label)
        axes.set_xscale("log")
        axes.set_title(", ".join(panel), fontsize=10)
        axes.set_xlabel("labelled training cases")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))


if __name__ == "__main__":
    main()
