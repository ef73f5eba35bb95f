"""Crops of 96^3 voxels, sizes, writes and reads: the store against nibabel, .npy, zarr, TorchIO and MONAI.

Every way of storing returns the same voxels before it is timed; what is not installed here is skipped. Scans: a small
phantom (smoke), and from ../shared/data a 7 T MR of 384 x 384 x 274 and a chest CT of 20 slices, repeated to 120 where
crops need the depth; its size is taken from the 20. Run: pytest benchmarks/bench_data.py --benchmark-only
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medformer.data import find_scans, make_phantom, native, native_child, read_volume, write_dicom_series
from medformer.data.dicom import pixels
from medformer.data.store import compresses, cut, open_array, random_crop, write_array

SHARED = Path(__file__).parents[2] / "shared" / "data"
SIZE = (96, 96, 96)
CUTS = 200
SMOKE = (100, 128, 128)


def phantom(shape: tuple[int, int, int]) -> np.ndarray:
    return make_phantom(0, shape=shape, spacing_mm=(1.2, 0.75, 0.75)).voxels


def real(*parts: str) -> np.ndarray:
    if not SHARED.is_dir():
        pytest.skip(f"real scans are not at {SHARED}")
    return read_volume(SHARED.joinpath(*parts)).voxels


def chest() -> np.ndarray:
    one = real("dicom", "ct_chest_j2k")
    return np.concatenate([one[:: 1 if i % 2 else -1] for i in range(6)])


SCANS: dict[str, Callable[[], np.ndarray]] = {
    "smoke": lambda: phantom(SMOKE),
    "chest-120x512x512": chest,
    "mr7t-384x384x274": lambda: real("dicom", "mr_t1_7t"),
}


@pytest.fixture(scope="module", params=SCANS)
def scan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Voxels and a folder for their copies."""
    folder = tmp_path_factory.mktemp("bench_data")
    yield request.param, SCANS[request.param](), folder
    shutil.rmtree(folder)


def _store(suffix: str) -> Callable[[np.ndarray, Path], Any]:
    def make(voxels: np.ndarray, folder: Path) -> Any:
        if suffix == ".b2nd" and not compresses():
            pytest.skip("blosc2 is not installed")
        path = folder / f"a{suffix}"
        if not path.exists():
            write_array(path, voxels)
        array = open_array(path)
        return path, lambda start: cut(array, start, SIZE)

    return make


def _nifti(zipped: bool) -> Callable[[np.ndarray, Path], Any]:
    def make(voxels: np.ndarray, folder: Path) -> Any:
        path = folder / f"a.nii{'.gz' if zipped else ''}"
        if not path.exists():
            nib.save(nib.Nifti1Image(voxels.T, np.eye(4)), path)

        def crop(start: tuple[int, int, int]) -> np.ndarray:
            z, y, x = start
            image: Any = nib.load(path)
            return np.asarray(image.dataobj[x : x + 96, y : y + 96, z : z + 96]).T

        return path, crop

    return make


def _zarr(voxels: np.ndarray, folder: Path) -> Any:
    zarr = pytest.importorskip("zarr")
    path = folder / "a.zarr"
    if not path.exists():
        made = zarr.create_array(str(path), shape=voxels.shape, chunks=(64, 64, 64), dtype=voxels.dtype)
        made[:] = voxels
    array = zarr.open_array(str(path), mode="r")
    return path, lambda start: np.asarray(array[tuple(slice(a, a + 96) for a in start)])


def _torchio(voxels: np.ndarray, folder: Path) -> Any:
    tio = pytest.importorskip("torchio")
    path, _ = _nifti(True)(voxels, folder)

    def crop(start: tuple[int, int, int]) -> np.ndarray:
        whole = tio.ScalarImage(path).numpy()[0]  # as its SubjectsDataset does for each subject
        x, y, z = start[::-1]
        return whole[x : x + 96, y : y + 96, z : z + 96].T

    return path, crop


def _monai(voxels: np.ndarray, folder: Path) -> Any:
    data = pytest.importorskip("monai.data")
    path, _ = _nifti(True)(voxels, folder)
    reader = data.NibabelReader()

    def crop(start: tuple[int, int, int]) -> np.ndarray:
        whole, _ = reader.get_data(reader.read(str(path)))
        x, y, z = start[::-1]
        return np.asarray(whole[x : x + 96, y : y + 96, z : z + 96]).T

    return path, crop


WAYS: dict[str, tuple[Callable[[np.ndarray, Path], Any], int]] = {
    "medformer-b2nd": (_store(".b2nd"), CUTS),
    "npy": (_store(".npy"), CUTS),
    "nibabel-nii": (_nifti(False), 30),
    "nibabel-nii.gz": (_nifti(True), 2),
    "zarr": (_zarr, 50),
    "torchio-nii.gz": (_torchio, 1),
    "monai-nii.gz": (_monai, 1),
}


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size


@pytest.mark.parametrize("way", WAYS)
def bench_crop(benchmark: Any, scan: Any, way: str) -> None:
    """One random crop, warm: the time of a round is that of `cuts` crops."""
    name, voxels, folder = scan
    make, cuts = WAYS[way]
    path, crop = make(voxels, folder)
    rng = np.random.default_rng(0)
    starts = [tuple(int(rng.integers(n - 95)) for n in voxels.shape) for _ in range(cuts)]
    for start in starts[:2]:
        np.testing.assert_array_equal(crop(start), voxels[tuple(slice(a, a + 96) for a in start)])

    def go() -> None:
        for start in starts:
            crop(start)  # and let go of it, as a loader does: keeping all would time the page faults

    benchmark.pedantic(go, rounds=3, warmup_rounds=1 if cuts > 2 else 0)
    benchmark.extra_info.update(
        scan=name, crops=cuts, share_of_int16=_size(path) / voxels.nbytes, cores=os.cpu_count(),
        crops_per_s=cuts / benchmark.stats.stats.min if benchmark.stats else None,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".b2nd", ".npy"])
@pytest.mark.parametrize("name", ["smoke", "chest-20x512x512", "mr7t-384x384x274"])
def bench_write(benchmark: Any, tmp_path: Path, name: str, suffix: str) -> None:
    """One array to the disk, with fsync; and its size."""
    if suffix == ".b2nd" and not compresses():
        pytest.skip("blosc2 is not installed")
    voxels = real("dicom", "ct_chest_j2k") if name.startswith("chest") else SCANS[name]()
    benchmark.pedantic(lambda: write_array(tmp_path / f"w{suffix}", voxels), rounds=3)
    info = {"mb_per_s": voxels.nbytes / 1e6 / benchmark.stats.stats.min} if benchmark.stats else {}
    benchmark.extra_info.update(scan=name, share_of_int16=_size(tmp_path / f"w{suffix}") / voxels.nbytes, **info)


def bench_random_crop_of_many(benchmark: Any, tmp_path: Path) -> None:
    """Crops of 40 scans in turn through the cache of open handles."""
    if not compresses():
        pytest.skip("blosc2 is not installed")
    voxels = phantom(SMOKE)
    paths = [tmp_path / f"{i}.b2nd" for i in range(40)]
    for path in paths:
        write_array(path, voxels)
    rng = np.random.default_rng(0)

    def go() -> None:
        for path in paths:
            random_crop(path, SIZE, rng)

    benchmark.pedantic(go, rounds=3, warmup_rounds=1)


def _decode_here(
    name: str, job: str, arguments: dict[str, Any], data: bytes = b"", *, most: int, memory: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """What native.call does, without the child process."""
    facts, array = native_child.JOBS[job](data, **arguments)
    return facts, np.ascontiguousarray(array)


@pytest.mark.parametrize("where", ["child", "here"])
def bench_read_dicom(benchmark: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A real series of 20 JPEG 2000 slices, folder to volume; processor time of both processes is in extra_info."""
    if not SHARED.is_dir():
        pytest.skip(f"real scans are not at {SHARED}")
    folder = SHARED / "dicom" / "ct_chest_j2k"
    if where == "here":
        monkeypatch.setattr(pixels, "call", _decode_here)
    spent: list[float] = []

    def go() -> None:
        before = time.process_time() + _child_s()
        read_volume(folder)
        spent.append(time.process_time() + _child_s() - before)

    read_volume(folder)  # the child starts
    benchmark.pedantic(go, rounds=5)
    benchmark.extra_info.update(processor_s=min(spent))


def _child_s() -> float:
    """Processor time of the child that decodes, in s."""
    schedule = Path(f"/proc/{native._child.process.pid}/schedstat") if native._child is not None else None
    return int(schedule.read_text().split()[0]) / 1e9 if schedule is not None and schedule.exists() else 0.0


@pytest.mark.parametrize("workers", [0, 2])
def bench_headers(benchmark: Any, tmp_path: Path, workers: int) -> None:
    """An index of 3000 slices of 64 x 64, in this process and by a pool of two, its start included."""
    for i in range(30):
        write_dicom_series(make_phantom(i, shape=(100, 64, 64), spacing_mm=(1.2, 3.0, 3.0)), tmp_path / str(i))
    benchmark.pedantic(lambda: find_scans(tmp_path, workers=workers), rounds=2)
    info = {"headers_per_s": 3000 / benchmark.stats.stats.min} if benchmark.stats else {}
    benchmark.extra_info.update(cores=os.cpu_count(), **info)
