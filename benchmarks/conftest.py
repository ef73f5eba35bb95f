"""How every benchmark is timed.

    pytest benchmarks --benchmark-only                      # on a GPU where there is one, else 15 minutes of the CPU
    pytest benchmarks --benchmark-only --story benchmarks/results     # its ending table as story.md, .json and .svg
    python benchmarks/prove_on_gpu.py --out gpu.jsonl       # a GPU for ten minutes: what matters most first

Measure on an idle machine: OpenMP threads spin while they wait, and on a busy CPU every figure is then worthless
(OMP_WAIT_POLICY=PASSIVE helps there, and costs a third on an idle one).

pytest-benchmark does the work. Where it is not installed (a borrowed GPU machine), the few lines at the end of this
file stand in for the part used here.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import story
from measuring import DEVICE, ceilings, environment, peak_memory_mib

HAS_PLUGIN = importlib.util.find_spec("pytest_benchmark") is not None
_measured: list[story.Measured] = []
_began = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=15.0, help="on a CPU: what has not begun by then is skipped")
    parser.addoption("--story", type=Path, default=None, help="folder for the ending table: story.json, .md and .svg")
    if not HAS_PLUGIN:
        parser.addoption("--benchmark-only", action="store_true", help="accepted; benchmarks are all there is here")
        parser.addoption("--benchmark-json", default=None, help="write the results to this file")


def pytest_configure(config: pytest.Config) -> None:
    """On a CPU half a second and three rounds a benchmark, unless the command says otherwise."""
    if HAS_PLUGIN and DEVICE.type == "cpu":
        said = " ".join(config.invocation_params.args)
        if "--benchmark-max-time" not in said:
            config.option.benchmark_max_time = 0.5
        if "--benchmark-min-rounds" not in said:
            config.option.benchmark_min_rounds = 3


# The families first: in 15 minutes each of them is in the table.
_ORDER = ("forward", "step", "raw", "causal", "memory", "")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What says most first: of all families forward, then steps, few tokens before many, memory last."""

    def place(item: pytest.Item) -> tuple[bool, int, int]:
        name = item.name.partition("[")[0]
        family = item.path.stem in {f"bench_{family}" for family in FAMILIES}
        tokens = re.search(r"-N(\d+)", item.name)
        order = next(i for i, word in enumerate(_ORDER) if word in name)
        return not family, order, int(tokens[1]) if tokens else 0

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes: Any = item.config.getoption("--minutes")
    if DEVICE.type == "cpu" and time.monotonic() - _began > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes were up; --minutes gives more")


FAMILIES = ("performer", "nystrom", "patch_embed", "disentangled", "tnt")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table by family, after pytest-benchmark's own."""
    if not HAS_PLUGIN:
        for result in _results:
            terminalreporter.write_line(f"{result['stats']['median'] * 1e3:10.3f} ms  {result['name']}")
    found = story.rows(_measured)
    if not found:
        return
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    flop, moved = ceilings(dtype)
    where = ", ".join(f"{key} {value}" for key, value in environment().items())
    machine = f"{where}; {flop / 1e9:.0f} GFLOP/s {str(dtype)[6:]}, {moved / 1e9:.1f} GB/s"
    terminalreporter.write_sep("=", "the benchmarks by family")
    terminalreporter.write_line(f"{machine}\n\n{story.table(found)}")
    folder = terminalreporter.config.getoption("--story")
    if folder is not None:
        story.write(folder, found, machine)
        terminalreporter.write_line(f"written: {folder}/story.json, story.md, story.svg")


def _note(request: pytest.FixtureRequest, ms: float, info: dict[str, Any], share: float | None) -> None:
    """Into the ending table, where an implementation of a family was timed."""
    family = request.path.stem.removeprefix("bench_")
    parameters = dict(request.node.callspec.params) if hasattr(request.node, "callspec") else {}
    named = parameters.get("implementation")
    if family not in FAMILIES or named is None:
        return
    direction = request.node.originalname.removeprefix(f"bench_{family}_").removeprefix("causal_")
    if "backward" in parameters:  # one function for both
        direction = "step" if parameters["backward"] else "forward"
    if direction == "memory":
        direction += f" {parameters.get('direction', 'step')}"
    _measured.append(
        story.Measured(
            family=family, direction=direction, implementation=named.__name__, shape=str(info.get("shape", "")), ms=ms,
            share_of_floor=share, peak_mib=info.get("peak_mib"),
        )
    )  # fmt: skip


@pytest.fixture
def timed(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`timed(function, floor_ms=..., **info)`: time it warm and write hardware, versions and `info` next to it."""

    def run(function: Callable[[], Any], *, floor_ms: float | None = None, **info: Any) -> None:
        def synchronised() -> None:
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        if DEVICE.type == "cuda":
            info["peak_mib"] = round(peak_memory_mib(function), 1)
        for _ in range(3 if DEVICE.type == "cuda" else 1):
            began = time.perf_counter()
            synchronised()
        seconds = time.perf_counter() - began
        benchmark.extra_info.update(environment() | info)
        if HAS_PLUGIN and seconds > 1:  # calibration and rounds of what takes seconds would take minutes
            benchmark.pedantic(synchronised, rounds=2 if seconds < 5 else 1)
        else:
            benchmark(synchronised)
        # pytest-benchmark under --benchmark-disable leaves no statistics behind
        if benchmark.stats is not None:
            stats = benchmark.stats.stats if hasattr(benchmark.stats, "stats") else benchmark.stats
            median = stats.median if hasattr(stats, "median") else stats["median"]
            share = None if floor_ms is None else round(floor_ms / (median * 1e3), 3)
            if share is not None:
                benchmark.extra_info["share_of_floor"] = share
            _note(request, median * 1e3, info, share)

    return run


if not HAS_PLUGIN:
    import json
    import statistics
    import time

    _results: list[dict[str, Any]] = []

    class _Benchmark:
        def __init__(self, name: str) -> None:
            self.name = name
            self.extra_info: dict[str, Any] = {}
            self.stats: dict[str, Any] | None = None

        def __call__(self, function: Callable[[], Any]) -> None:
            times: list[float] = []
            began = time.perf_counter()
            while len(times) < 5 or (time.perf_counter() - began < 1 and len(times) < 200):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            self.stats = {"min": min(times), "median": statistics.median(times), "rounds": len(times)}
            _results.append({"name": self.name, "extra_info": self.extra_info, "stats": self.stats})

    @pytest.fixture
    def benchmark(request: pytest.FixtureRequest) -> _Benchmark:
        return _Benchmark(request.node.name)

    def pytest_sessionfinish(session: pytest.Session) -> None:
        path = session.config.getoption("--benchmark-json")
        if path:
            Path(path).write_text(json.dumps({"benchmarks": _results}, indent=1))
