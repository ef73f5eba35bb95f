"""Where a benchmark runs and what memory it takes."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["DEVICE", "ceilings", "cpu_peak_memory_mib", "environment", "floor_ms", "peak_memory_mib", "training_step"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> dict[str, str]:
    """Hardware and versions, as every figure must name them."""
    if DEVICE.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
        hardware = f"{model.partition(':')[2].strip() or platform.processor()}, {torch.get_num_threads()} threads"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "numpy")}
    return {"hardware": hardware, "python": platform.python_version(), **versions}


@functools.cache
def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP, bytes) a second of this machine, by one matrix product in `dtype` and one copy: the best of five."""
    size, count = (8192, 1 << 29) if DEVICE.type == "cuda" else (1024, 1 << 25)
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype).unbind(0)
    source, target = torch.ones(2, count, device=DEVICE, dtype=dtype).unbind(0)

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            began = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    return 2 * size**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source))


def floor_ms(dtype: torch.dtype, *, flop: float, moved: float, exponentials: float = 0.0) -> float:
    """What this machine needs at least, ms: by its own ceilings, or one H200's of 790 TFLOP/s, 4.3 TB/s, 3.9 T exp/s.

    A CPU's exponentials are not in it.
    """
    on_gpu = DEVICE.type == "cuda"
    known = on_gpu and "H200" in torch.cuda.get_device_name() and dtype.itemsize == 2
    rate, bandwidth = (790e12, 4.3e12) if known else ceilings(dtype)
    return 1e3 * max(flop / rate, moved / bandwidth, exponentials / 3.9e12 if on_gpu else 0.0)


def training_step(function: Callable[..., Any], inputs: list[Any], dout: Any, *others: Any) -> Callable[[], None]:
    """Forward and backward with fresh gradients of `inputs` and `others`."""

    def step() -> None:
        for x in (*inputs, *others):
            x.grad = None
        function(*inputs).backward(dout)

    return step


def peak_memory_mib(function: Callable[[], Any]) -> float:
    """Memory that `function` takes on the GPU beyond what is allocated before it, MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_peak_memory_mib(script: str) -> float:
    """Growth of the resident set of a fresh process while it runs the lines of `script` after '# measure', MiB."""
    setup, _, measured = script.partition("# measure\n")
    program = (
        f"import resource, threading, time\n{setup}\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "before, peak, stop = resident(), [0], threading.Event()\n"
        "def watch():\n"
        "    while not stop.is_set():\n"
        "        peak[0] = max(peak[0], resident())\n"
        "        time.sleep(0.001)\n"
        "watcher = threading.Thread(target=watch)\n"
        f"watcher.start()\n{measured}\n"
        "peak[0] = max(peak[0], resident())\nstop.set()\nwatcher.join()\n"
        "print('MEASURED', peak[0] - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split("MEASURED")[1]) / 2**20
