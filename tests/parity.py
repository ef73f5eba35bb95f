"""Losses of 100 steps that no change of the code may move unseen: `tests/parity/<method>.json` holds them.

After a change that is meant to move them, write them anew and give the reason in the commit:

    python tests/parity.py --write
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

FILES = Path(__file__).with_name("parity")
STEPS = 100
COMMON = (
    "--model.width=24", "--model.depth=2", "--model.heads=2", "--model.patch_stride=8", "--model.patch_padding=0",
    "--views.global_size=16x16x16", "--device=cpu", f"--steps={STEPS}", "--save_every=100", "--data.held_out=0",
)  # fmt: skip
METHODS = {
    "dino": (
        "dino", "--views.local_size=8x8x8", "--views.local_views=1", "--dino.prototypes=32", "--dino.hidden=16",
        "--dino.bottleneck=8", "--dino.balance=centre", "--dino.norm=none", "--dino.koleo=0", "--dino.masked_patches=0",
    ),
    "byol": (
        "byol", "--views.local_views=0", "--byol.hidden=32", "--byol.projection=16", "--byol.norm=group",
        "--byol.groups=4", "--byol.koleo=0",
    ),
    "igpt": (
        "igpt", "--views.local_views=0", "--views.global_views=1", "--igpt.colours=16", "--igpt.patch=4x4x4",
        "--igpt.fit_steps=2",
    ),
}  # fmt: skip
# Flags and processes; all see four scans a step.
VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "one process": (("--batch_size=4",), 1),
    "accumulate 2": (("--batch_size=2", "--accumulate=2"), 1),
    "resumed at 50": (("--batch_size=4",), 1),
    "two processes": (("--batch_size=2",), 2),
    "fsdp2 with two": (("--batch_size=2", "--parallel=fsdp2"), 2),
}


def make_scans(folder: Path) -> None:
    """Four scans that every version of NumPy makes alike."""
    import nibabel as nib
    import numpy as np

    z, y, x = np.mgrid[:20, :18, :22]
    for i in range(4):
        voxels = 100 + 30 * np.sin(0.3 * (i + 1) * z) * np.cos(0.25 * y + i) + (37 * x + 11 * y + 5 * z + i) % 17
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([1.0, 1.5, 2.0, 1.0])), folder / f"scan{i}.nii")


def losses(live: Callable[..., dict[str, Any]], method: str, variant: str, scans: Path, out: Path) -> list[float]:
    """The loss of each step of one run."""
    flags, ranks = VARIANTS[variant]
    argv = [*METHODS[method], *COMMON, *flags, f"--data.root={scans}", f"--out={out}"]
    if variant == "resumed at 50":
        stopped = live(argv, signal=signal.SIGTERM, kill={"run": str(out), "steps": 50})
        assert stopped["codes"] == [128 + signal.SIGTERM], stopped
        argv = [f"--resume={out}"]
    found = live(argv, ranks=ranks)
    assert found["codes"] == [0] * ranks, found
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    return [line["loss"] for line in lines]


def machine() -> dict[str, str]:
    """What decides the last bits."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0] if names else platform.machine(),
    }  # fmt: skip


def _live(live: Callable[..., dict[str, Any]], scratch: Path, argv: list[str], **job: Any) -> dict[str, Any]:
    return live({"argv": argv, **job}, scratch)


def furthest(a: list[float], b: list[float]) -> float:
    """The largest difference, as a share."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write tests/parity/ anew; without it only compare")
    write = parser.parse_args().write
    from lives import live  # imports the trainer

    FILES.mkdir(exist_ok=True)
    for method in METHODS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "scans").mkdir()
            make_scans(folder / "scans")
            found: dict[str, list[float]] = {}
            for variant in VARIANTS:
                run = partial(_live, live, folder)
                found[variant] = losses(run, method, variant, folder / "scans", folder / variant.replace(" ", "-"))
                away = furthest(found[variant], found["one process"])
                first, last = found[variant][0], found[variant][-1]
                print(
                    f"{method}, {variant}: {first:.4f} to {last:.4f}, at most {away:.1e} from one process", flush=True
                )
            path = FILES / f"{method}.json"
            if path.exists():
                old = json.loads(path.read_text())["losses"]
                print(f"{method}: at most {max(furthest(found[v], old[v]) for v in found):.1e} from {path.name}")
            if write:
                path.write_text(json.dumps({"machine": machine(), "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
