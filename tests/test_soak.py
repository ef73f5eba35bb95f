"""A long run neither grows nor leaks: memory and open files at its end are those of its beginning.

By hand, 2,000 steps: `SOAK_STEPS=2000 pytest -n 0 tests/test_soak.py -s`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

_PROBE = """
import ctypes, json, os, sys
sys.path.insert(0, sys.argv[1])
import pictures, runs, train

pictures.draw = lambda *_args, **_options: False
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
seen, real = [], runs.Metrics.write

def files():
    for number in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            pass  # closed meanwhile, as that of this listing is

def write(self, step, values):
    real(self, step, values)
    if step % max(1, int(sys.argv[2]) // 20) == 0:
        trim(0)  # what the allocator keeps in reserve is no leak
        with open("/proc/self/status") as file:
            rss = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        seen.append((step, rss, sorted(files())))

runs.Metrics.write = write
code = train.main(sys.argv[3:])
print(json.dumps(seen))
sys.exit(code)
"""


def test_memory_and_open_files_stay_where_they_were(trainer: Any, tmp_path: Path) -> None:
    steps = int(os.environ.get("SOAK_STEPS", "100"))
    command = [sys.executable, "-c", _PROBE, str(trainer.script.parent), str(steps)]
    flags = trainer.arguments(tmp_path / "run", f"--steps={steps}", f"--save_every={steps // 10}", "--workers=0")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=590, env=env)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print("step, anonymous KiB, open files:", [(step, rss, len(files)) for step, rss, files in seen])
    settled = [sample for sample in seen if sample[0] >= steps // 5]  # the first steps load code
    first, last = settled[0], settled[-1]
    assert last[1] < 1.01 * first[1]
    # The threads that fetch scans and write checkpoints hold a file now and then; one that is never closed stays.
    files = [Counter(files) for _, _, files in settled]
    assert reduce(and_, files[-4:]) <= reduce(and_, files[:4])
