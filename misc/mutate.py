"""Do the tests see it when a line is wrong? One fault of the table in `faults.py` at a time, in a copy of the tree.

    python misc/mutate.py --list                             the faults, numbered
    python misc/mutate.py --package data --out data.json     those of one package
    python misc/mutate.py --only optim.py --only '#17'       those whose file or text holds this, or of this number
    nice python misc/mutate.py --jobs 2                      all of them, two at a time: an hour or more

The checkout is copied to a temporary folder and never changed. Each file of tests first runs without a fault, once: it
has to pass. Then each fault is put in, and its tests run until the first that fails. A fault is caught where a test
fails or does not end in time, and has survived where all pass: then a test is missing, or nothing can tell it from the
right line. Not part of CI: it is slow, and the table names the lines of today.

A fault whose text is not in its file exactly once, that is no Python, or whose tests are not there is an error that
names it: correct the table (paths have short names at its top). Exit codes: 0 all caught, 1 some survived, 2 the table
or the unchanged tests are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Queue
from types import ModuleType

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(tempfile.gettempdir()) / "mutation.json"
# A mutated run may take this many times as long as the unchanged one, and so much more: a machine may be busy.
SLOWER, SPARE_S = 4.0, 60.0


class BaselineError(Exception):
    """The tests fail, or there are none, without any fault."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    number: int
    package: str
    kind: str
    file: str
    fault: str
    verdict: str
    """'caught', 'timeout' (caught too) or 'survived'."""
    seconds: float
    by: str
    """The test that failed first."""


@dataclass(kw_only=True)
class Run:
    """Faults on their way; `copies` are the trees that no fault is in at the moment."""

    copies: Queue[Path]
    out: Path
    until: float
    slow: bool
    usual: dict[str, float] = field(default_factory=dict)
    """Seconds of each file of tests, or test of it, without a fault."""
    outcomes: list[Outcome] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def one(self, number: int, fault: Fault) -> None:
        """Put a fault in, run its tests, take it out."""
        if time.monotonic() > self.until:
            return
        copy = self.copies.get()
        path, kept = copy / fault.file, copy / f"{fault.file}.kept"
        try:
            limit = SPARE_S + SLOWER * self._unchanged(copy, fault.tests)
            shutil.copy2(path, kept)
            path.write_text(path.read_text().replace(fault.old, fault.new))
            code, seconds, output = _pytest(copy, fault.tests, limit, changed=True, slow=self.slow)
        except BaselineError as error:
            self.errors.append(f"#{number} {fault.file}: {error}")
            print(self.errors[-1], file=sys.stderr, flush=True)
            return
        finally:
            if kept.exists():
                os.replace(kept, path)
            self.copies.put(copy)
        # 1: a test failed, 2: a file does not import, below 0: it crashed; pytest's others cannot be: they ran before.
        verdict = "timeout" if code is None else "survived" if code == 0 else "caught"
        failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        by = failed[0].split(" - ")[0].split(" ", 1)[1].strip() if failed else ""
        outcome = Outcome(
            number=number, package=fault.package, kind=fault.kind, file=fault.file, fault=_shown(fault),
            verdict=verdict, seconds=round(seconds, 1), by=by,
        )  # fmt: skip
        self.outcomes = sorted([*self.outcomes, outcome], key=lambda each: each.number)
        self.out.write_text(json.dumps([asdict(each) for each in self.outcomes], indent=1) + "\n")
        print(f"#{number:<4}{verdict:9} {seconds:6.1f} s  {fault.file}: {outcome.fault}  {by}", flush=True)

    def _unchanged(self, copy: Path, tests: tuple[str, ...]) -> float:
        """Seconds without a fault; files that were in another set are not run again."""
        new = tuple(test for test in tests if test not in self.usual)
        if new:
            code, seconds, output = _pytest(copy, new, None, changed=False, slow=self.slow)
            if code != 0:
                raise BaselineError(f"{' '.join(new)} ended with {code} without a fault:\n{output[-3000:]}")
            self.usual |= dict.fromkeys(new, seconds / len(new))
        return sum(self.usual[test] for test in tests)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python misc/mutate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", action="append", choices=sorted({f.package for f in FAULTS}), help="repeatable")
    parser.add_argument("--only", action="append", metavar="TEXT", help="part of file or text, or #NUMBER; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of its own [1]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fault after so many")
    parser.add_argument("--slow", action="store_true", help="also tests that take long (compilers, several processes)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"figures as JSON [{OUT}]")
    parser.add_argument("--list", action="store_true", help="check the table, print it and run nothing")
    args = parser.parse_args(argv)
    chosen = [
        (number, fault)
        for number, fault in enumerate(FAULTS, 1)
        if (not args.package or fault.package in args.package)
        and (not args.only or any(_meant(text, number, fault) for text in args.only))
    ]
    wrong = [problem for number, fault in chosen if (problem := _problem(number, fault))]
    if wrong or not chosen:
        print("\n".join(wrong) or "no fault is meant by these flags; --list prints all", file=sys.stderr)
        return 2
    if args.list:
        for number, fault in chosen:
            print(f"#{number:<4}{fault.package:11} {fault.kind:9} {fault.file}: {_shown(fault)}")
        return 0
    run = Run(copies=Queue(), out=args.out.resolve(), until=time.monotonic() + 60 * args.minutes, slow=args.slow)
    with tempfile.TemporaryDirectory(prefix="medformer-mutate-") as scratch:
        for job in range(args.jobs):
            run.copies.put(_copied(Path(scratch) / str(job)))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda pair: run.one(*pair), chosen))
    print(_table(run.outcomes))
    if late := len(chosen) - len(run.outcomes) - len(run.errors):
        print(f"{late} of {len(chosen)} were not begun within --minutes {args.minutes:g}")
    if run.errors:
        print(f"{len(run.errors)} not tried: their tests fail without a fault (above)", file=sys.stderr)
        return 2
    return int(any(each.verdict == "survived" for each in run.outcomes))


def _meant(text: str, number: int, fault: Fault) -> bool:
    return text == f"#{number}" if text.startswith("#") else text in fault.file or text in fault.old


def _problem(number: int, fault: Fault) -> str | None:
    """What is wrong with a row of the table."""
    name, path = f"#{number} {fault.file}: {_shown(fault)}", ROOT / fault.file
    if not path.is_file():
        return f"{name}: no such file"
    text = path.read_text()
    if (count := text.count(fault.old)) != 1:
        return f"{name}: its text is there {count} times, it must be once"
    try:
        compile(text.replace(fault.old, fault.new), fault.file, "exec")
    except SyntaxError as error:
        return f"{name}: no Python ({error.msg})"
    lost = [test for test in fault.tests if not (ROOT / test.partition("::")[0]).is_file()]
    return f"{name}: no {', '.join(lost)}" if lost or not fault.tests else None


def _shown(fault: Fault) -> str:
    old, new = (" ".join(text.split()) for text in (fault.old, fault.new))
    return f"{old}  ->  {new or '(nothing)'}"


def _copied(target: Path) -> Path:
    """What git knows of, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # what was deleted is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def _pytest(
    copy: Path, tests: tuple[str, ...], limit: float | None, *, changed: bool, slow: bool
) -> tuple[int | None, float, str]:
    """Exit code (None: stopped after `limit` seconds), seconds and output."""
    began, log = time.monotonic(), copy.with_suffix(".log")
    process = _PROCESSES.Process(target=_child, args=(copy, tests, log, changed, slow))
    log.write_text("")
    process.start()
    assert process.pid is not None
    process.join(limit)
    code = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with all that the tests have started
    process.join()
    return code, time.monotonic() - began, log.read_text(errors="replace")


# Each run is forked from a process that has the large packages, which nothing here changes: to import them takes longer
# than most tests. Not Triton: tests/conftest.py says before its import whether it interprets. It has this module too,
# as it is when the run begins.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["__main__", "pytest", "hypothesis", "torch", "torch.distributed", "torch.utils.tensorboard", "safetensors.torch",
     "nibabel", "pydicom", "PIL.Image", "jsonargparse", "sklearn.metrics", "transformers", "einops"]
)  # fmt: skip


# Words in the names of tests that take long and compare nothing that others do not: run with --slow alone.
LONG = (
    "opcheck", "compile", "one_graph", "over_processes", "two_processes_train", "200_steps", "a_killed_run", "signal",
    "peak_memory", "2_31", "2_to_the_31", "variants_train", "dry_run", "knows_no_checkpoint", "image_gpt_is_probed",
    "other_networks_are_compared",
)  # fmt: skip


def _child(copy: Path, tests: tuple[str, ...], log: Path, changed: bool, slow: bool = False) -> None:
    """pytest in the copy, as a process group of its own."""
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    ours = [str(copy), str(copy / "kernels")]
    sys.path[:] = [*ours, *(path for path in sys.path if not Path(path).resolve().is_relative_to(ROOT))]
    os.environ["PYTHONPATH"] = os.pathsep.join(ours)
    # Bytecode is kept of the right lines only: that of a fault could be taken for theirs, if size and time agree.
    sys.dont_write_bytecode = changed
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1" if changed else ""
    # The processes that a test spawns begin with the main module of the one they come from: they get none.
    sys.modules["__main__"] = ModuleType("__main__")
    import pytest
    from hypothesis import Phase, settings

    # The same examples each time; and of those that fail the smallest is not looked for, which can take minutes.
    settings.register_profile("mutate", derandomize=True, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutate")
    some = [] if slow else ["-k", f"not ({' or '.join(LONG)})"]
    code = int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *some, *tests]))
    sys.stdout.flush()
    os._exit(code)  # not through what Python does at its end, which waits for threads of the tests


def _table(outcomes: list[Outcome]) -> str:
    """Figures by package, and the survivors."""
    lines = ["", f"{'package':12} faults caught timeout survived  minutes"]
    for package in [*dict.fromkeys(each.package for each in outcomes), "all"]:
        those = [each for each in outcomes if package in (each.package, "all")]
        count = Counter(each.verdict for each in those)
        minutes = sum(each.seconds for each in those) / 60
        lines.append(
            f"{package:12} {len(those):6} {count['caught']:6} {count['timeout']:7} {count['survived']:8} {minutes:8.1f}"
        )
    lines += [f"survived: #{e.number} {e.file}: {e.fault}" for e in outcomes if e.verdict == "survived"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
