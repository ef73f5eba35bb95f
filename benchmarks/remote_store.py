"""Training throughput from a store on a slow server, as a share of the same store's on this disk.

    python benchmarks/remote_store.py [--delay 0.02] [--mbit 100] [--step 0.2] [--steps 50] ...

The server is a process of its own on loopback: it waits `--delay` before each answer and sends at most `--mbit` on each
connection. The step is a wait of `--step` seconds, as for a processor that waits for a GPU. Both run on the same cores,
so what is measured is a lower bound where they are busy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from crops import Crops, loader
from medformer.data import make_phantom
from medformer.data.datasets import adapter
from medformer.data.store import remote
from medformer.data.store.ahead import Ahead
from medformer.data.store.build import build
from medformer.data.store.limit import Use
from range_server import Faults, serving
from roots import DataConfig, prepare
from views import ViewsConfig

__all__ = ["a_store", "measure", "served"]


def a_store(folder: Path, scans: int, shape: tuple[int, int, int]) -> Path:
    """A store of synthetic CTs with noise, below `folder`."""
    (folder / "scans").mkdir(parents=True)
    for seed in range(scans):
        volume = make_phantom(seed, shape=shape)
        noise = np.random.default_rng(seed).normal(0, 12, shape)
        voxels = (volume.voxels + noise).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels.T, volume.affine), folder / "scans" / f"{seed}.nii")
    build(adapter("folder").scan(folder / "scans"), folder / "store", modality="CT", say=lambda line: None)
    shutil.rmtree(folder / "scans")
    return folder / "store"


@contextmanager
def served(store: Path, delay: float, rate: float) -> Iterator[tuple[str, Callable[[], int]]]:
    """The address of a store served by another process, and what says how many bytes it has sent."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()

    def serve() -> None:
        faults = Faults(delay=delay, rate=rate)
        with serving(store, faults) as url:
            its.send(url)
            while its.recv() == "sent":  # EOFError where the process that began it is gone
                its.send(faults.sent)

    process = context.Process(target=serve, daemon=True)
    process.start()

    def sent() -> int:
        mine.send("sent")
        return mine.recv()

    try:
        yield mine.recv(), sent
    finally:
        mine.send("end")
        process.join(10)
        process.kill()


def measure(
    root: str, cache: Path, views: ViewsConfig, *, steps: int, batch: int, step: float, workers: int,
    limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds to the first batch, steps a second, and the share of time that steps waited for crops."""
    remote._opened.cache_clear()
    began, use = time.monotonic(), Use(cache, limit)
    found = prepare(DataConfig(root=root, held_out=0), views, cache, 0, use=use)
    feed = loader(Crops(found.train, views, 0), steps=steps, accumulate=1, batch=batch, workers=workers)
    batches = Ahead(iter(feed), device=torch.device("cpu"))
    next(batches)
    started, waited = time.monotonic(), 0.0
    for _ in range(steps - 1):
        time.sleep(step)
        asked = time.monotonic()
        next(batches)
        waited += time.monotonic() - asked
    seconds = time.monotonic() - started
    batches.close()
    use.close()
    return {"first_batch_s": started - began, "steps_per_s": (steps - 1) / seconds, "waited": waited / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--delay", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--mbit", type=float, default=100, help="of each connection; 0 for no limit")
    parser.add_argument("--step", type=float, default=0.2, help="seconds of a step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--crop", default="24x32x32", help="voxels of a global view")
    parser.add_argument("--scans", type=int, default=16)
    parser.add_argument("--shape", default="128x256x256", help="voxels of a scan")
    args = parser.parse_args()
    size, shape = (tuple(map(int, text.split("x"))) for text in (args.crop, args.shape))
    views = ViewsConfig(global_size=size, local_size=(16, 16, 16))  # type: ignore[arg-type]
    run = {"steps": args.steps, "batch": args.batch, "step": args.step, "workers": args.workers}
    with tempfile.TemporaryDirectory(prefix="medformer-") as scratch:
        store, cache = a_store(Path(scratch), args.scans, shape), Path(scratch) / "cache"  # type: ignore[arg-type]
        arrays = sum(path.stat().st_size for path in store.glob("*.b2nd"))
        print(
            f"{args.scans} scans of {args.shape}, {arrays / 2**20:.0f} MiB stored; {args.steps} steps of {args.step} s,"
            f" {args.batch} crops of {args.crop}, {args.workers} workers; {args.delay} s, {args.mbit} Mbit/s"
        )
        measure(str(store), cache, views, **(run | {"steps": 5}))
        here = measure(str(store), cache, views, **run)
        with served(store, args.delay, args.mbit * 1e6 / 8) as (url, sent):
            rows = {"this disk": here}
            for name, limit in {"nothing is kept": 1, "first time": None, "all is kept": None}.items():
                name, before = f"server, {name}", sent()
                rows[name] = measure(url, cache, views, **run, limit=limit)
                rows[name]["mib_a_step"] = (sent() - before) / 2**20 / args.steps
    for name, row in rows.items():
        row["share"] = row["steps_per_s"] / here["steps_per_s"]
        came = f", {row['mib_a_step']:.2f} MiB a step" if "mib_a_step" in row else ""
        print(
            f"{name:24} {row['share']:6.1%} of local, waits {row['waited']:.1%} of the time, first batch after "
            f"{row['first_batch_s']:.2f} s{came}"
        )
    print(json.dumps({name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}))


if __name__ == "__main__":
    main()
