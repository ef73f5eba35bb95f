"""How every benchmark is timed.

    pytest benchmarks --benchmark-only                      # on a GPU where there is one, else on the CPU
    python benchmarks/prove_on_gpu.py                       # the gpu tests and the benchmarks, dated results

Measure on an idle machine: OpenMP threads spin while they wait, and on a busy CPU every figure is then worthless
(OMP_WAIT_POLICY=PASSIVE helps there, and costs a third on an idle one).

pytest-benchmark does the work. Where it is not installed (a borrowed GPU machine), the few lines at the end of this
file stand in for the part used here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from measuring import DEVICE, environment, peak_memory_mib

HAS_PLUGIN = importlib.util.find_spec("pytest_benchmark") is not None


@pytest.fixture
def timed(benchmark) -> Callable[..., None]:
    """`timed(function, floor_ms=..., **info)`: time it warm and write hardware, versions and `info` beside it."""

    def run(function: Callable[[], Any], *, floor_ms: float | None = None, **info: Any) -> None:
        def synchronised() -> None:
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        if DEVICE.type == "cuda":
            info["peak_mib"] = round(peak_memory_mib(function), 1)
        for _ in range(3 if DEVICE.type == "cuda" else 1):
            synchronised()
        benchmark.extra_info.update(environment() | info)
        benchmark(synchronised)
        # pytest-benchmark under --benchmark-disable leaves no statistics behind
        if floor_ms is not None and benchmark.stats is not None:
            stats = benchmark.stats.stats if hasattr(benchmark.stats, "stats") else benchmark.stats
            median = stats.median if hasattr(stats, "median") else stats["median"]
            benchmark.extra_info["share_of_floor"] = round(floor_ms / (median * 1e3), 3)

    return run


if not HAS_PLUGIN:
    import json
    import statistics
    import time

    def pytest_addoption(parser: pytest.Parser) -> None:
        parser.addoption("--benchmark-only", action="store_true", help="accepted; benchmarks are all there is here")
        parser.addoption("--benchmark-json", default=None, help="write the results to this file")

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

    def pytest_terminal_summary(terminalreporter: Any) -> None:
        for result in _results:
            terminalreporter.write_line(f"{result['stats']['median'] * 1e3:10.3f} ms  {result['name']}")
