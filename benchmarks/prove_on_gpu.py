"""Run everything that needs a GPU, in one go, and write dated results.

    python benchmarks/prove_on_gpu.py                 # tests of the kernels, then all benchmarks
    python benchmarks/prove_on_gpu.py -k performer    # one family

Writes benchmarks/results/<date>-<gpu>.json and .md. Needs only torch, triton, numpy, einops and pytest; peers that are
not installed are skipped by name. No installation: the packages are found through PYTHONPATH.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def pytest(*arguments: str) -> tuple[int, str]:
    """Exit code and last line of a pytest run, whose output is shown as it comes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "kernels"))}
    command = [sys.executable, "-m", "pytest", *arguments]
    print("$", " ".join(command[1:]), flush=True)
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    return process.returncode, next((line for line in reversed(lines) if line), "")


def markdown(date: str, tests: str, benchmarks: list[dict], command: str) -> str:
    """The results as a page: where, with what, then a row a benchmark."""
    first = benchmarks[0]["extra_info"] if benchmarks else {}
    where = ", ".join(f"{key} {first[key]}" for key in ("hardware", "python", "torch", "triton") if key in first)
    lines = [f"# {date}: {where}", "", f"`{command}`. Tests of the kernels: {tests}", ""]
    lines += ["| benchmark | shape | median ms | min ms | peak MiB | share of floor |", "|---|---|---|---|---|---|"]
    for item in sorted(benchmarks, key=lambda item: item["name"]):
        info, stats = item["extra_info"], item["stats"]
        lines.append(
            f"| {item['name']} | {info.get('shape', '')} | {stats['median'] * 1e3:.3f} | {stats['min'] * 1e3:.3f} "
            f"| {info.get('peak_mib', '')} | {info.get('share_of_floor', '')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only tests and benchmarks whose name matches, as pytest's -k")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("prove_on_gpu: torch sees no GPU here; on a CPU run pytest benchmarks --benchmark-only", file=sys.stderr)
        return 2
    select = ["-k", arguments.k] if arguments.k else []
    families = [path.name for path in (ROOT / "kernels" / "medformer_kernels").iterdir() if (path / "ops.py").exists()]
    tests = [str(path.relative_to(ROOT)) for name in families for path in (ROOT / "tests").glob(f"test_{name}*.py")]
    # All tests of the kernels: what the interpreter runs without a GPU is compiled on one.
    tests_code, summary = pytest("-q", "-p", "no:cacheprovider", *sorted(tests), "tests/test_attention.py", *select)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmarks.json"
        benchmarks_code, _ = pytest("benchmarks", "--benchmark-only", f"--benchmark-json={report}", "-q", *select)
        measured = json.loads(report.read_text())["benchmarks"] if report.exists() else []
    date = datetime.date.today().isoformat()
    name = f"{date}-{re.sub('[^a-z0-9]+', '-', torch.cuda.get_device_name().lower())}"
    kept = [{key: item[key] for key in ("name", "extra_info", "stats")} for item in measured]
    for item in kept:
        item["stats"] = {key: item["stats"][key] for key in ("min", "median", "rounds")}
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python benchmarks/prove_on_gpu.py", *select])
    (RESULTS / f"{name}.json").write_text(json.dumps({"tests": summary, "benchmarks": kept}, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(date, summary, kept, command))
    print(f"written: benchmarks/results/{name}.md and .json")
    return tests_code or benchmarks_code


if __name__ == "__main__":
    sys.exit(main())
