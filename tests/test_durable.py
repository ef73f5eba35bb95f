"""Files that appear whole: their content is on the disk before they have their name, and the name before all goes on.

What the system is asked is recorded, with the number (inode) of the file that is meant and its size at that moment: a
crash after a rename that came first would leave a name with nothing, or half, behind it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import loop
import medformer
import runs
from medformer.data import Volume
from medformer.data.store import compresses, write_array
from medformer.data.store.entries import keep


class Call(NamedTuple):
    what: str
    inode: int
    size: int
    name: str = ""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """fsync of files and of folders (size 0), and renames with the new name, in their order."""
    made: list[Call] = []
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def fsync(file: int) -> None:
        real["fsync"](file)
        stat = os.fstat(file)
        made.append(Call("fsync", stat.st_ino, 0 if os.path.isdir(f"/dev/fd/{file}") else stat.st_size))

    def renaming(name: str) -> Callable[[Any, Any], None]:
        def call(source: Any, target: Any) -> None:
            stat = os.stat(source)
            real[name](source, target)
            made.append(Call("rename", stat.st_ino, stat.st_size, os.path.basename(target)))

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renaming("replace"))
    monkeypatch.setattr(os, "rename", renaming("rename"))
    return made


def durable(path: Path, *, folder: bool) -> list[Call]:
    """The calls that leave `path` on the disk: all of its bytes, then its name, then (`folder`) the folder's list."""
    stat = path.stat()
    written = [Call("fsync", stat.st_ino, stat.st_size), Call("rename", stat.st_ino, stat.st_size, path.name)]
    return [*written, Call("fsync", path.parent.stat().st_ino, 0)] if folder else written


@pytest.mark.parametrize(
    "end", [".npy", pytest.param(".b2nd", marks=pytest.mark.skipif(not compresses(), reason="needs blosc2"))]
)
def test_an_array_of_the_store_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, calls: list[Call], end: str
) -> None:
    path = tmp_path / f"a{end}"
    write_array(path, np.arange(5000, dtype=np.int16).reshape(50, 10, 10))
    assert calls == durable(path, folder=True)


def test_the_sidecar_of_a_stored_scan_follows_its_arrays(tmp_path: Path, calls: list[Call]) -> None:
    """An entry without its sidecar is none: what the sidecar promises is on the disk before it is."""
    source = tmp_path / "source"
    source.write_bytes(b"x")
    voxels = np.random.default_rng(0).normal(0, 400, (12, 10, 11)).astype(np.int16)
    scan = Volume(voxels=voxels, affine=np.eye(4), modality="CT", units="HU", notes=(), source="x")
    stored = Path(keep(scan, tmp_path / "store" / "key", "name", [str(source)]).path)
    points, sidecar = tmp_path / "store" / "key.points.npy", tmp_path / "store" / "key.json"
    assert calls == [
        *durable(stored, folder=True), *durable(points, folder=True), *durable(sidecar, folder=True),
    ]  # fmt: skip


def test_a_model_is_on_the_disk_before_it_has_its_name(tmp_path: Path, calls: list[Call]) -> None:
    model = medformer.tiny_2d(width=24, depth=1, heads=2, patch_size=4, patch_stride=4, patch_padding=0)
    medformer.save(model, tmp_path / "model.safetensors", card=False)
    assert calls == durable(tmp_path / "model.safetensors", folder=True)


def test_a_file_of_a_run_is_on_the_disk_before_it_has_its_name(tmp_path: Path, calls: list[Call]) -> None:
    runs.write_whole(tmp_path / "a.txt", lambda file: [file.write(b"half"), file.write(b" and the rest")])
    assert (tmp_path / "a.txt").read_bytes() == b"half and the rest"
    assert calls == durable(tmp_path / "a.txt", folder=True)


def test_the_metrics_of_a_checkpoint_are_on_the_disk_before_it(tmp_path: Path, calls: list[Call]) -> None:
    """A resumed run keeps the lines of the steps that its checkpoint has."""
    metrics = runs.Metrics(tmp_path, 0)
    metrics.write(0, {"loss": 1.0})
    loop._write(metrics, tmp_path, {"step": 1, "weights": torch.ones(9)}, keep=2, best=False)
    lines = (tmp_path / "metrics.jsonl").stat()
    assert lines.st_size > 0
    assert calls == [
        Call("fsync", lines.st_ino, lines.st_size), *durable(tmp_path / "checkpoints" / "step-00000001.pt", folder=True)
    ]  # fmt: skip
    metrics.close()


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Where the file system has no hard links it is a copy, with content of its own to write."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    runs.save_checkpoint(tmp_path, 1, {"step": 1, "weights": torch.ones(9)}, best=True)
    step, best = (tmp_path / "checkpoints" / name for name in ("step-00000001.pt", "best.pt"))
    assert (step.stat().st_ino == best.stat().st_ino) is links
    written, named = durable(best, folder=False)
    assert calls == [*durable(step, folder=True), *([] if links else [written]), named]
