"""Lives of the trainer, each a forked child of one process that has imported it: a second each, not five.

Reads one JSON job from each line of stdin and answers each with one line of JSON:
    {"argv": [...], "ranks": 1, "kill": {"run": RUN, "steps": 7, "rank": 0}, "signal": 9, "timeout": 120, "argvs": null}
`kill` sends `signal` to one process once the run's metrics.jsonl has that many lines; `argvs` gives each rank its own;
`before` is run in each first; `"strike": {"step": 7, "after": 0.01}` has it die by SIGKILL so long after its 7th step.

By hand, a run killed 100 times against one that was not; and one killed together with a store being prepared, while
scans have to be stored anew in every life:
    python tests/lives.py --kills 100 SCANS FOLDER --model.width=24 ...
    python tests/lives.py --kills-everywhere 50 SCANS FOLDER --model.width=24 ...
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "ssl"))

import pictures
import train

pictures.draw = lambda *_args, **_options: False  # half a second a run

# The process dies whatever it is at then, and does not end before.
STRIKE = """
import os, signal, threading, time, runs
write, main = runs.Metrics.write, train.main
def struck(self, step, values):
    write(self, step, values)
    if step + 1 == {step}:
        threading.Timer({after}, os.kill, (os.getpid(), signal.SIGKILL)).start()
runs.Metrics.write = struck
train.main = lambda argv: (main(argv), time.sleep(60))[0]
"""


def lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def live(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run one job to its end; exit codes (negative: a signal) and output of each rank, and the seconds it took."""
    ranks, began = job.get("ranks", 1), time.monotonic()
    argvs = job.get("argvs") or [job["argv"]] * ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank, argv in enumerate(argvs):
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(scratch / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            if ranks > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                )
            code = 70
            try:
                strike = STRIKE.format(**job["strike"]) if "strike" in job else ""
                exec(job.get("before", strike), {"train": train})  # faults that are put in
                code = train.main(argv)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    kill, limit = job.get("kill"), began + job.get("timeout", 120)
    codes: list[int | None] = [None] * ranks
    killed_at = None
    while None in codes and time.monotonic() < limit:
        if kill and lines(Path(kill["run"])) >= kill["steps"]:
            os.kill(pids[kill.get("rank", 0)], job.get("signal", signal.SIGKILL))
            kill, killed_at = None, time.monotonic()
        for i, pid in enumerate(pids):
            if codes[i] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                codes[i] = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.002)
    for i, pid in enumerate(pids):
        if codes[i] is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    texts = {name: [(scratch / f"{name}{r}").read_text() for r in range(ranks)] for name in ("out", "err")}
    ended = time.monotonic()
    return {"codes": codes, **texts, "seconds": ended - began, "after_kill": killed_at and ended - killed_at}


def kill_many(scans: Path, folder: Path, flags: list[str], kills: int, seed: int = 0) -> dict[str, Any]:
    """One run to its end, another killed with SIGKILL at random steps and moments; what they left is compared."""
    import torch

    rng = random.Random(seed)
    steps = 4 * kills + 30
    whole, often = folder / "whole", folder / "often"
    common = [*flags, f"--data.root={scans}", f"--steps={steps}", "--save_every=2"]
    first = live({"argv": [*common, f"--out={whole}"], "timeout": 600}, folder)
    assert first["codes"] == [0], first
    for _ in range(kills):
        argv = [*common, f"--out={often}"] if not (often / "checkpoints").exists() else [f"--resume={often}"]
        if argv[0].startswith("--resume"):
            argv.append(f"--workers={rng.choice([0, 0, 0, 1])}")
        elif often.exists():  # killed before its first checkpoint: it starts anew
            for path in sorted(often.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            often.rmdir()
        target = min(lines(often) // 2 * 2 + rng.randint(1, 7), steps - 1)
        found = live({"argv": argv, "strike": {"step": target, "after": rng.random() * 0.03}}, folder)
        assert found["codes"] == [-signal.SIGKILL], found
    last = live({"argv": [f"--resume={often}"], "timeout": 600}, folder)
    assert last["codes"] == [0], last
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (whole, often)]
    states = [torch.load(run / "checkpoints" / f"step-{steps:08d}.pt", weights_only=True) for run in (whole, often)]
    flat = [dict(_flat({n: s[n] for n in ("method", "optimiser", "sample", "step")})) for s in states]
    differ = [n for n in flat[0] if not torch.equal(torch.as_tensor(flat[0][n]), torch.as_tensor(flat[1][n]))]
    return {
        "kills": kills, "steps": steps, "losses_same": losses[0] == losses[1], "losses": len(losses[1]),
        "tensors": len(flat[0]), "differ": differ + sorted(flat[0].keys() ^ flat[1].keys()),
    }  # fmt: skip


def kill_everywhere(scans: Path, folder: Path, flags: list[str], kills: int, seed: int = 0) -> dict[str, Any]:
    """A run and the making of a store, killed at one random moment, again and again, until both are done.

    Before each life some entries of the cache and the store are gone, so that scans are read and stored again. At the
    end the run is compared with one that was never killed, and the store with what one call makes.
    """
    from medformer.data.store import build
    from medformer.data.store.entries import look_up
    from medformer.data.store.index import rows

    rng = random.Random(seed)
    steps, run, store, cache = 6 * kills, folder / "run", folder / "store", folder / "cache"
    common = [*flags, f"--data.root={scans}", f"--steps={steps}", "--save_every=2", f"--data.cache={cache}"]
    making = [str(scans), "--out", str(store), "--split", "all", "--workers", "0"]
    where = {"reading": 0, "training": 0}

    def on() -> list[str]:
        if list(run.glob("checkpoints/*.pt")):
            return [f"--resume={run}"]
        shutil.rmtree(run, ignore_errors=True)  # killed before its first checkpoint: it starts anew
        return [*common, f"--out={run}"]

    for _ in range(kills):
        argv = on()
        for sidecar in (*cache.glob("*.json"), *store.glob("*.json")):
            if rng.random() < 0.5:
                sidecar.unlink()
        before = lines(run)
        pids = []
        for main, words in ((train.main, argv), (build.main, making)):
            pid = os.fork()
            if pid == 0:
                for number in (1, 2):
                    os.dup2(os.open(folder / f"said-{main.__module__}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
                os._exit(main(words))
            pids.append(pid)
        # Half of them by the clock, which strikes while scans are read and stored; half some steps later.
        until = time.monotonic() + (rng.random() * 1.5 if rng.random() < 0.5 else 60.0)
        target = min(before + rng.randint(1, 6), steps - 2)
        while time.monotonic() < until and lines(run) < target:
            time.sleep(0.002)
        time.sleep(0.03 * rng.random())
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        where["training" if lines(run) > before else "reading"] += 1
        for file in store.glob("*.json"):
            assert look_up(file.with_suffix(""), "whole") is not None, file
    whole = folder / "whole"
    ends = [live({"argv": argv, "timeout": 600}, folder) for argv in (on(), [*common, f"--out={whole}"])]
    assert [end["codes"] for end in ends] == [[0], [0]], ends
    assert build.main(making) in (0, 1)
    assert build.main([*making[:2], str(folder / "store-at-once"), *making[3:]]) in (0, 1)
    kept = [[(row.key, row.state, row.shape) for row in rows(folder / name)] for name in ("store", "store-at-once")]
    losses = [[json.loads(line)["loss"] for line in (r / "metrics.jsonl").open()] for r in (whole, run)]
    return {
        "kills": kills, "while": where, "steps": steps, "losses": len(losses[1]), "losses_same": losses[0] == losses[1],
        "store_same": kept[0] == kept[1], "scans": len(kept[0]),
        "damaged": len(list(folder.rglob("damaged/*"))),
    }  # fmt: skip


def _flat(values: Any, name: str = ""):
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}")
    elif isinstance(values, list):
        for key, value in enumerate(values):
            yield from _flat(value, f"{name}.{key}")
    elif not isinstance(values, str) and values is not None:
        yield name, values


if __name__ == "__main__":
    if sys.argv[1:2] in (["--kills"], ["--kills-everywhere"]):
        kill = kill_many if sys.argv[1] == "--kills" else kill_everywhere
        print(json.dumps(kill(Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:], int(sys.argv[2]))))
    else:
        for line in sys.stdin:
            given = json.loads(line)
            print(json.dumps(live(given, Path(given["scratch"]))), flush=True)
