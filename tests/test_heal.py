"""The cache of stored scans: damaged entries are named and made anew; a full disk leaves what is complete."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medformer.data import Scan
from medformer.data.store import compresses
from medformer.data.store.build import build
from medformer.data.store.entries import Damaged, look_up
from medformer.errors import UserError
from roots import DataConfig, Prepared, prepare, prepare_images
from views import ViewsConfig

VIEWS = ViewsConfig(global_size=(8, 8, 8), local_size=(4, 4, 4), local_views=1)
FLAT = ViewsConfig(global_size=(1, 8, 8), local_size=(1, 4, 4), local_views=1)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    root.mkdir()
    for i in range(3):
        voxels = np.random.default_rng(i).normal(100, 30, (16, 14, 12)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / f"scan{i}.nii")
    return root


def ready(scans: Path) -> Prepared:
    return prepare(DataConfig(root=str(scans), held_out=0), VIEWS, scans.parent / "cache", 0)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def grown(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def gone(file: Path) -> None:
    file.unlink()


def foreign(file: Path) -> None:
    file.write_bytes(b'["of another program"]')


@pytest.mark.parametrize("damage", [cut_short, emptied, grown, flipped, gone, foreign])
@pytest.mark.parametrize("end", [".json", ".points.npy", ".b2nd" if compresses() else ".npy"])
def test_a_damaged_entry_is_named_and_made_anew(scans: Path, damage: Any, end: str) -> None:
    first = ready(scans)
    entry = Path(first.train[1].path)
    file = entry.with_suffix("").with_suffix(end) if end != ".points.npy" else Path(first.train[1].points_path)
    before = {path.name: path.read_bytes() for path in entry.parent.glob("*.*") if path.is_file()}
    damage(file)
    again = ready(scans)
    assert again.train == first.train
    after = {path.name: path.read_bytes() for path in entry.parent.glob("*.*") if path.is_file()}
    assert after == before
    if (damage, end) == (gone, ".json"):  # an entry that was never finished
        assert again.notices == []
        return
    (line,) = again.notices
    assert line.startswith(f"WARNING: scan1: {file.name} ")
    assert "damaged now and is made anew" in line
    assert ready(scans).notices == []


def test_a_sidecar_cut_anywhere_is_noticed(scans: Path) -> None:
    base = Path(ready(scans).train[0].path).with_suffix("")
    sidecar = base.with_suffix(".json")
    whole = sidecar.read_bytes()
    for length in range(len(whole)):
        sidecar.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            look_up(base, "name")
    for at in range(0, len(whole), 7):
        sidecar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(Damaged):
            look_up(base, "name")


def test_a_prepared_store_refuses_a_damaged_entry(scans: Path, tmp_path: Path) -> None:
    from medformer.data.datasets import adapter

    store = tmp_path / "store"
    (bad, *_) = build(adapter("folder").scan(scans), store)
    cut_short(store / f"{bad.key}.points.npy")
    found = prepare(DataConfig(root=str(store), held_out=0), VIEWS, tmp_path / "cache", 0)
    assert len(found.train) == 2
    ((name, reason),) = found.skipped
    assert name == bad.name
    assert "points.npy has" in reason
    assert reason.endswith("prepare the store again")
    build(adapter("folder").scan(scans), store)
    assert len(prepare(DataConfig(root=str(store), held_out=0), VIEWS, tmp_path / "cache", 0).train) == 3


@pytest.mark.parametrize("damage", [cut_short, flipped, gone, foreign])
@pytest.mark.parametrize("end", ["index.json", "0000001.npy", "0000001.points.npy"])
def test_damaged_images_are_made_anew(tmp_path: Path, damage: Any, end: str) -> None:
    root, cache = tmp_path / "images", tmp_path / "cache"
    root.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 14), np.uint8)).save(root / f"{i}.png")
    config = DataConfig(root=str(root), held_out=0)
    first = prepare_images(config, FLAT, cache, 0)
    (folder,) = cache.glob("images-*")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / end)
    again = prepare_images(config, FLAT, cache, 0)
    assert again.train == first.train
    unseen = (damage, end) == (gone, "index.json") or (damage is flipped and end != "index.json")  # by its length
    assert len(again.notices) == (0 if unseen else 1)
    assert damage is flipped or {path.name: path.read_bytes() for path in folder.iterdir()} == before


FULL = """
import resource, signal, sys
from pathlib import Path
from roots import DataConfig, prepare
from views import ViewsConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
views = ViewsConfig(global_size=(8, 8, 8), local_size=(4, 4, 4), local_views=1)
prepare(DataConfig(root=sys.argv[1], held_out=0), views, Path(sys.argv[2]), 0)
"""


def test_a_full_disk_while_caching_is_one_line(scans: Path, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk: the write fails in the same place."""
    path = [str(Path(__file__).parents[1] / "ssl"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(scans), str(tmp_path / "cache")], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"medformer.errors.UserError: cannot write {tmp_path / 'cache'}/")
    assert last.endswith("File too large; make room there, or choose another --out or --data.cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name.endswith(".partial")]
    assert len(ready(scans).train) == 3


def test_what_was_complete_before_the_disk_was_full_stays(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from medformer.data.store import arrays

    real, written = arrays.write_whole, []

    def full(path: Path, write: Any) -> None:
        written.append(path)
        if len(written) > 3:
            raise UserError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}; make room there")
        real(path, write)

    with monkeypatch.context() as patched:
        patched.setattr(arrays, "write_whole", full)
        with pytest.raises(UserError, match="No space left on device"):
            ready(scans)
    reads: list[str] = []
    read = Scan.read
    monkeypatch.setattr(Scan, "read", lambda self, **options: (reads.append(self.name), read(self, **options))[1])
    assert len(ready(scans).train) == 3
    assert reads == ["scan1", "scan2"]


def test_two_runs_that_share_a_cache_read_each_scan_once(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = Scan.read
    monkeypatch.setattr(Scan, "read", lambda self, **options: (reads.append(self.name), read(self, **options))[1])
    results: list[Prepared] = []
    threads = [threading.Thread(target=lambda: results.append(ready(scans))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert sorted(reads) == ["scan0", "scan1", "scan2"]
