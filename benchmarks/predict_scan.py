"""`medformer predict` on one large CT: memory beyond model and scan, and time against the bare network.

    OMP_NUM_THREADS=1 python benchmarks/predict_scan.py --scan CT.nii.gz --shape 300x512x512 --max-memory "1 GiB"

The scan is a CT stretched onto the grid (without --scan a phantom), the segmenter a transformer with the dense head and
fresh weights: neither time nor memory depends on what it learned. Processes of their own, one after the other: what
holds model and scan and nothing else; the command, watched with all its children; with --bare the network alone, over
as many windows in the same batches. Times are processor time of all threads, since the machine may be shared;
`network_s` is that of the network inside the command: the same windows in the same minutes.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

import medformer
from measuring import environment
from medformer.answers.model import About, Finetuned, network_of, save_finetuned
from medformer.data import make_phantom, read_volume
from medformer.windows import starts_of

__all__ = ["a_scan", "a_segmenter", "measure"]

_MIB = 2**20


def a_scan(path: Path, shape: tuple[int, int, int], source: Path | None) -> None:
    """A CT of `shape` (Z, Y, X) in int16: `source` stretched, trilinear, or a phantom."""
    volume = make_phantom(0, shape=shape) if source is None else read_volume(source)
    voxels = torch.from_numpy(volume.voxels.astype(np.float32))[None, None]
    stretched = F.interpolate(voxels, size=shape, mode="trilinear", align_corners=False)[0, 0]
    steps = [n / m for n, m in zip(volume.shape[::-1], shape[::-1], strict=True)]
    nib.save(nib.Nifti1Image(stretched.round().short().numpy().T, volume.affine @ np.diag([*steps, 1])), path)


def a_segmenter(path: Path, window: tuple[int, ...], overlap: float, width: int, patch: int) -> None:
    """Two structures, fresh weights."""
    torch.manual_seed(0)
    model = medformer.tiny_3d(
        width=width, depth=2, heads=2, patch_size=patch, patch_stride=patch, patch_padding=0
    )  # fmt: skip
    about = About(
        task="benchmark", kind="segmentation", names=("one", "two"), size=window, overlap=overlap, cases={"test": 0}
    )  # fmt: skip
    save_finetuned(Finetuned(network_of(model, about), about), path)


def _predict(model: Path, scans: list[Path], out: Path, limit: str) -> dict[str, Any]:
    """In a process of its own: the command, with the network's time and batches noted."""
    spent, batches = [0.0], []
    forward = Finetuned.forward

    def timed(self: Finetuned, x: torch.Tensor) -> torch.Tensor:
        began = time.thread_time()
        found = forward(self, x)
        if batches:  # the first call measures the memory of a window
            spent[0] += time.thread_time() - began
        batches.append(len(x))
        return found

    Finetuned.forward = timed  # type: ignore[method-assign]
    from medformer.answers import command

    began = time.process_time()
    code = command.main([str(model), *map(str, scans), "--out", str(out), "--max-memory", limit, "--device", "cpu"])
    spent_all = time.process_time() - began
    assert code == 0, code
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["status"] == "ok" for row in rows), rows
    return {"command_s": spent_all, "network_s": spent[0], "batches": batches[1:]}


def _hold(model: Path, scan: Path) -> dict[str, Any]:
    """In a process of its own: what is resident once the command is loaded, with model and scan."""
    from medformer.answers import command

    kept = command.load_answers(model), read_volume(scan, canonical=False)
    gc.collect()
    return {"held": _resident(os.getpid()), "kept": len(kept)}


def _bare(model: Path, batches: list[int]) -> dict[str, Any]:
    """In a process of its own: the network over as many windows, in the same batches, and nothing else."""
    network: Any = medformer.load(model)
    windows = torch.randn(max(batches), 1, *network.about.size)
    with torch.no_grad():
        network(windows)
        began = time.process_time()
        for count in batches:
            network(windows[:count])
    return {"bare_s": time.process_time() - began}


def _resident(pid: int) -> int:
    """Bytes of a process and all below it; 0 once it is gone."""
    total, below = 0, [pid]
    while below:
        one = below.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * resource.getpagesize()
            for task in Path(f"/proc/{one}/task").iterdir():
                below += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return total


def _child(what: str, words: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What a process of its own found, and the most that it and its children held at once, in bytes."""
    asked = json.dumps(json.dumps(words))
    program = f"import json, predict_scan as p; print('FOUND', json.dumps(p.{what}(**p.taken({asked}))))"
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen([sys.executable, "-c", program], stdout=said, cwd=Path(__file__).parent)
        most = 0
        while child.poll() is None:
            most = max(most, _resident(child.pid))
            time.sleep(0.02)
        said.seek(0)
        text = said.read()
    if child.returncode:
        raise SystemExit(f"{what} ended with {child.returncode}")
    return json.loads(text.rpartition("FOUND ")[2]), most


def taken(text: str) -> dict[str, Any]:
    """Arguments of a child: paths come as text."""
    words = json.loads(text)
    paths = {name: Path(value) for name, value in words.items() if name in ("model", "scan", "out")}
    return words | paths | ({"scans": [Path(s) for s in words["scans"]]} if "scans" in words else {})


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table in the tutorial."""
    model, scans = work / "model.safetensors", [work / f"scan{i}.nii.gz" for i in range(options.scans)]
    a_segmenter(model, options.window, options.overlap, options.width, options.patch)
    for scan in scans:
        if not scan.exists():
            a_scan(scan, options.shape, options.scan)
    held, _ = _child("_hold", {"model": str(model), "scan": str(scans[0])})
    words = {"model": str(model), "scans": [*map(str, scans)], "out": str(work / "out"), "limit": options.max_memory}
    said, peak = _child("_predict", words)
    found = {
        "shape": list(options.shape), "scans": len(scans), "window": list(options.window), "overlap": options.overlap,
        "windows": sum(said["batches"]), "batch": max(said["batches"]), "max_memory": options.max_memory,
        "peak_mib": round(peak / _MIB), "model_and_scan_mib": round(held["held"] / _MIB),
        "beyond_mib": round((peak - held["held"]) / _MIB), "command_s": round(said["command_s"], 3),
        "network_s": round(said["network_s"], 3), "over_network": round(said["command_s"] / said["network_s"], 3),
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    if options.bare:
        bare, _ = _child("_bare", {"model": str(model), "batches": said["batches"]})
        found |= {"bare_s": round(bare["bare_s"], 1), "over_bare": round(said["command_s"] / bare["bare_s"], 3)}
    assert windows_of(options.shape, options.window, options.overlap) * len(scans) == found["windows"]
    return found | environment()


def windows_of(shape: tuple[int, ...], window: tuple[int, ...], overlap: float) -> int:
    """Windows of a scan."""
    return int(np.prod([len(starts_of(max(n, w), w, overlap)) for n, w in zip(shape, window, strict=True)]))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="CT to stretch; default: a phantom")
    parser.add_argument("--shape", type=_sizes, default=(300, 512, 512), help="ZxYxX [300x512x512]")
    parser.add_argument("--scans", type=int, default=1, help="so many of them in one command [1]")
    parser.add_argument("--window", type=_sizes, default=(64, 64, 64))
    parser.add_argument("--overlap", type=float, default=0.375)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--max-memory", default="1 GiB")
    parser.add_argument("--bare", action="store_true", help="also the network alone, in a process of its own")
    parser.add_argument("--work", type=Path, help="folder for scan, model and answers, which stay there")
    options = parser.parse_args()
    if options.work is None:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), options)
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        found = measure(options.work, options)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
