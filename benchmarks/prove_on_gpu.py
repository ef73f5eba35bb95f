"""Settle on one GPU, in one command of ten minutes, whether the kernels are right and how fast they are.

    python benchmarks/prove_on_gpu.py --out results.jsonl                # 9 minutes, everything that fits, by value
    python benchmarks/prove_on_gpu.py --out results.jsonl --minutes 4 --only performer
    python benchmarks/prove_on_gpu.py --out results.jsonl --dry          # on a CPU: all of this code, times of 1 ms

Needs torch, triton, numpy, einops and pytest; peers that are not installed are named and skipped. No installation:
the packages are found from this file. Every result is one JSON line, on disk as soon as it is known. All kernels of the
headline shapes are compiled first, on all cores; then steps run in the order of `prove_steps.STEPS` in a process of
their own, so that a kernel that faults or hangs ends its step and no other; then the tests marked `gpu`, until time is
up. A table at the end says what was measured, what failed and what was not reached. Exits with 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TooLate
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = [str(ROOT / name) for name in ("", "kernels", "benchmarks")]
sys.path[:0] = _FOLDERS

RESERVE = 8
"""Seconds kept for the table and for processes to end."""


class Report:
    """Lines on disk and on the screen, with the seconds since the start."""

    def __init__(self, path: Path, began: float) -> None:
        self.path, self.began = path, began
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, step: str, **result: Any) -> None:
        line = json.dumps({"step": step, "at_s": round(time.time() - self.began, 1), **result}, default=str)
        with self._lock, self.path.open("a") as file:
            file.write(line + "\n")
        print(line[:300], flush=True)


def serve(connection: Any, path: Path, began: float, dry: bool) -> None:
    """Run the steps whose names come through `connection`, one after the other; answer None or what went wrong."""
    from prove_machine import Dry, Gpu
    from prove_steps import STEPS

    steps = {step.name: step for step in STEPS}
    machine, report = Dry() if dry else Gpu(), Report(path, began)
    connection.send("ready")
    while (name := connection.recv()) is not None:
        try:
            for result in steps[name].run(machine):
                report.add(name, **result)
            machine.free()
            answer = None
        except Exception as error:  # reported by the other side, which starts a fresh process after a fault of the GPU
            answer = f"{type(error).__name__}: {str(error)[:500]}"
        connection.send(answer)


class Worker:
    """The process that runs steps by `serve`; replaced when one is lost."""

    def __init__(self, path: Path, began: float, dry: bool, serve: Callable[..., None] = serve) -> None:
        self._serve, self._arguments = serve, (path, began, dry)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=self._serve, args=(other, *self._arguments), daemon=True)
        self.process.start()
        other.close()
        self.ready = False

    def __call__(self, name: str, seconds: float) -> str | None:
        """What went wrong in a step, or None."""
        try:
            if not self.ready:  # starting takes as long as importing torch
                if not self.connection.poll(max(seconds, 150)):
                    return self._lost("the process did not start")
                self.connection.recv()
                self.ready = True
            self.connection.send(name)
            if not self.connection.poll(seconds):
                return self._lost(f"stopped after {seconds:.0f} s")
            answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return self._lost("the process died")
        if answer and "CUDA" in answer:  # after a fault of the GPU nothing more runs in its process
            self._lost(answer)
        return answer

    def _lost(self, why: str) -> str:
        self.process.kill()
        self.process.join()
        self._start()
        return why

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _compile(headline: str, kernel: str, other: dict[str, int], arch: str) -> list[dict[str, Any]]:
    """In a process of its own: kernels of one headline, into Triton's cache; what the model says of each.

    `kernel`: that one alone, with a tile that differs from the shipped one in `other`.
    """
    from compile_cases.headlines import HEADLINES
    from predict import predicted
    from prove_subjects import tile_entry

    family = headline.split()[0]
    entry = tile_entry(family, kernel, arch) if kernel else {}
    with patch.dict(entry, other):
        return predicted(HEADLINES[headline], arch, f"{family}_{kernel}_kernel" if kernel else None)


def _work(dry: bool) -> list[tuple[str, str, dict[str, int]]]:
    """(headline, kernel, tile): all headlines, what takes longest first, then other tiles; where dry, what is quick."""
    from compile_cases.headlines import HEADLINES
    from prove_subjects import SUBJECTS

    others = [
        (f"{family} forward", kernel, other)
        for family, subject in SUBJECTS.items()
        for kernel, tiles in subject.tiles.items()
        for other in tiles
    ]
    if dry:
        return [("patch_embed b forward", "", {}), next(item for item in others if item[0] == "tnt forward")]
    return [(name, "", {}) for name in HEADLINES] + others


def compile_all(report: Report, arch: str, *, dry: bool, until: float, ready: threading.Event) -> None:
    """Kernels of the headlines, then of other tiles, on all cores; `ready` once the former are there."""
    work = _work(dry)
    with ProcessPoolExecutor(min(len(work), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        waiting: dict[Future, Any] = {pool.submit(_compile, *item, arch): item for item in work}
        first = {future for future, (_, kernel, _) in waiting.items() if not kernel}
        try:
            for future in as_completed(waiting, timeout=max(1.0, until - time.time())):
                headline, kernel, other = waiting[future]
                what = {"tile": other} if kernel else {"headline": headline}
                error = future.exception()
                if error is not None:
                    said = f"{type(error).__name__}: {error}"[:500]
                    report.add("compile", **what, kernel=kernel, failed=said)
                else:
                    for line in future.result():
                        report.add("compile", **what, **line)
                first.discard(future)
                if not first:
                    ready.set()
        except TooLate:
            report.add("compile", failed="time was up", missing=[i[:2] for f, i in waiting.items() if not f.done()])
            for process in list((pool._processes or {}).values()):
                process.kill()
    ready.set()


def gpu_tests(report: Report, *, only: str, until: float, dry: bool) -> bool:
    """Tests marked `gpu`, then all others of the kernels, which a CPU interprets; True if one failed.

    Dry: the former alone, which are imported and then skipped.
    """
    every = [path.name for path in (ROOT / "kernels" / "medformer_kernels").iterdir() if (path / "ops.py").exists()]
    families = [name for name in every if name in only] or every
    files = sorted(path for name in families for path in (ROOT / "tests").glob(f"test_{name}*.py"))
    marked = [path for path in files if "pytest.mark.gpu" in path.read_text()]
    failed = False
    for chosen, mark in ((marked, "gpu"), ([] if dry else files, "not gpu")):
        if not chosen:
            continue
        if time.time() >= until:
            report.add("tests", mark=mark, skipped="time was up")
            continue
        names = [str(path.relative_to(ROOT)) for path in chosen]
        command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", "-m", mark, *names]
        command.append("--continue-on-collection-errors")  # of what is not installed there
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*_FOLDERS, os.environ.get("PYTHONPATH", "")])}
        environment.pop("PYTEST_ADDOPTS", None)  # which would change the lines that are read here
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        timer = threading.Timer(max(1.0, until - time.time()), process.kill)
        timer.start()
        counts: dict[str, int] = {}
        last = ""
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            found = re.match(r"(tests/\S+?::.*?) (PASSED|FAILED|SKIPPED|ERROR)", line)
            if found:
                counts[found[2]] = counts.get(found[2], 0) + 1
                if found[2] in ("FAILED", "ERROR"):
                    report.add("tests", test=found[1], ok=False)
            elif re.match(r"(/|E  |ERROR )", line):  # one line a failure, and what could not be imported
                report.add("tests", says=line.strip()[:300])
        code = process.wait()
        timer.cancel()
        report.add("tests", mark=mark, counts=counts, code=code, says=last, whole=code in (0, 1, 5))
        failed |= bool(counts.get("FAILED") or counts.get("ERROR") or code not in (0, 1, 5, -9))
    return failed


def table(path: Path, reached: dict[str, str | None], planned: list[str]) -> str:
    """What was measured, by family, beside the model; then what failed, then what was not reached."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    model: dict[str, list[float]] = {}
    for line in lines:
        if line["step"] == "compile" and "headline" in line and "low_ms" in line:
            low, high = model.setdefault(line["headline"], [0.0, 0.0])
            model[line["headline"]] = [low + line["low_ms"], high + line["high_ms"]]
    rows = ["| pass | ms | goal | floor | share | model, ms | best peer (ms) |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        family, _, kind = line["step"].partition(": ")
        if kind != "time" or "ms" not in line:
            continue
        parts = ["forward"] if line["what"] == "forward" else ["forward", "backward"]
        ranges = [model[f"{family} {part}"] for part in parts if f"{family} {part}" in model]
        guess = " to ".join(f"{sum(x):.2f}" for x in zip(*ranges, strict=True)) if len(ranges) == len(parts) else "-"
        rivals = [
            (peer["ms"], peer["peer"]) for peer in lines
            if peer["step"] == f"{family}: peers" and peer.get("what") == line["what"] and "ms" in peer
            and peer["large"] and "medformer" not in peer["peer"]
        ]  # fmt: skip
        best = f"{min(rivals)[1]} ({min(rivals)[0]:.2f})" if rivals else "-"
        goal, floor, share = (line.get(key) for key in ("goal_ms", "floor_ms", "share_of_floor"))
        cells = [f"{x:.2f}" if x is not None else "-" for x in (goal, floor, share)]
        rows.append(f"| {family} {line['what']} | {line['ms']:.3f} | {' | '.join(cells)} | {guess} | {best} |")
    rows += [f"wrong: {json.dumps(line)[:300]}" for line in lines if line.get("ok") is False]
    rows += [f"failed: {name}: {why}" for name, why in reached.items() if why]
    rows += [
        f"failed: compile {line.get('headline', line.get('tile', ''))}: {line['failed']}"
        for line in lines
        if "failed" in line and line["step"] == "compile"
    ]
    rows += [f"tests marked '{line['mark']}': {line['says']}" for line in lines if "mark" in line and "says" in line]
    missed = [name for name in planned if name not in reached]
    rows.append("not reached: " + ("; ".join(missed) if missed else "nothing"))
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of results, one JSON line each, appended to")
    parser.add_argument("--minutes", type=float, default=9.0, help="wall clock for everything")
    parser.add_argument("--only", default="", help="steps whose name contains this, and the tests of that family")
    parser.add_argument("--dry", action="store_true", help="on a CPU, over little, with times of 1 ms")
    arguments = parser.parse_args()
    began = time.time()
    until = began + 60 * arguments.minutes - RESERVE
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        print("prove_on_gpu: torch sees no GPU here; --dry runs its code on a CPU", file=sys.stderr)
        return 2
    from prove_steps import STEPS

    report = Report(arguments.out, began)
    planned = [step for step in STEPS if arguments.only in step.name]
    worker = Worker(arguments.out, began, arguments.dry)
    reached: dict[str, str | None] = {}
    arch = "sm_90" if arguments.dry else "sm_{}{}".format(*torch.cuda.get_device_capability())
    # The first step needs no kernel of ours: it runs while they compile. Other tiles compile beside the other steps.
    ready = threading.Event()
    options = {"dry": arguments.dry, "until": min(until, began + 240), "ready": ready}
    compiling = threading.Thread(target=compile_all, args=(report, arch), kwargs=options)
    compiling.start()
    for step in planned:
        if step.name != "machine":
            ready.wait()
        left = until - time.time()
        if left < 5:
            break
        reached[step.name] = worker(step.name, min(step.seconds, left))
        if reached[step.name]:
            report.add(step.name, failed=reached[step.name])
    compiling.join()
    worker.end()
    broken = gpu_tests(report, only=arguments.only, until=until, dry=arguments.dry)
    text = table(arguments.out, reached, [step.name for step in planned])
    print(text)
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    wrong = any(line.get("ok") is False for line in lines)
    return int(broken or wrong or any(reached.values()))


if __name__ == "__main__":
    sys.exit(main())
