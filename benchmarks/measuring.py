"""Where a benchmark runs and what memory it takes."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["DEVICE", "cpu_peak_memory_mib", "environment", "peak_memory_mib"]

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
