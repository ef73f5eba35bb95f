"""The trainer's data: what is refused and why, what is kept, and an order that nothing disturbs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from crops import Crops, loader, sample_scan
from medformer.data import find_scans
from medformer.data.store import entries, reading
from medformer.data.store.ahead import Ahead
from medformer.errors import UserError
from roots import DataConfig, Prepared, prepare
from views import ViewsConfig

VIEWS = ViewsConfig(global_size=(8, 8, 8), local_size=(4, 4, 4), local_views=1)


def write(path: Path, shape: tuple[int, int, int] = (12, 14, 16), seed: int = 0, spacing: float = 2.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).normal(100, 30, shape[::-1]).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([spacing, spacing, spacing, 1.0])), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        write(tmp_path / "scans" / f"deep/{i % 2}" / f"scan{i}.nii", seed=i)
    (tmp_path / "scans" / "notes.txt").write_text("no scan")
    return tmp_path / "scans"


def ready(folder: Path, **settings: Any) -> Prepared:
    return prepare(DataConfig(root=str(folder), **settings), VIEWS, folder.parent / "cache", 0)


def test_every_good_scan_is_used_and_one_is_held_out(folder: Path) -> None:
    result = ready(folder)
    assert len(result.train) == 4
    assert len(result.held_out) == 1
    assert result.skipped == []
    assert result.ignored == 1
    assert result.held_out[0].name not in {scan.name for scan in result.train}
    assert result == ready(folder)


def test_a_lone_scan_is_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "scans" / "only.nii.gz")
    result = ready(tmp_path / "scans")
    assert [scan.name for scan in result.train] == ["only"]
    assert result.held_out == []


def test_stored_voxels_are_normalised_and_keep_spacing(folder: Path) -> None:
    scan = ready(folder).train[0]
    voxels = np.asarray(entries.load(scan.path))
    assert voxels.dtype == np.float16
    assert voxels.shape == scan.shape == (12, 14, 16)
    assert scan.spacing_mm == pytest.approx((2.0, 2.0, 2.0))
    points = np.load(scan.points_path)
    assert len(points) > 100
    assert (voxels[tuple(points.T)] > scan.threshold - 0.01).all()


def test_a_second_run_reads_no_scan_again_unless_it_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(folder)
    read: list[str] = []
    real = entries.scaling_of
    monkeypatch.setattr(entries, "scaling_of", lambda volume: read.append(volume.source) or real(volume))
    ready(folder)
    assert read == []
    changed = write(folder / "deep/0/scan0.nii", seed=99)
    os.utime(changed, ns=(1, 1))
    ready(folder)
    assert len(read) == 1


def test_bad_scans_among_good_ones_are_skipped_with_their_reasons(folder: Path) -> None:
    whole = write(folder / "cut.nii").read_bytes()
    (folder / "cut.nii").write_bytes(whole[: len(whole) // 2])
    holes = np.ones((12, 12, 12), np.float32)
    holes[0, 0, :2] = np.nan
    nib.save(nib.Nifti1Image(holes, np.eye(4)), folder / "holes.nii")
    write(folder / "small.nii", shape=(12, 7, 12))
    (folder / "junk.dcm").write_bytes(b"not a dicom file at all")
    nib.save(nib.Nifti1Image(np.full((12, 12, 12), 3.0, np.float32), np.eye(4)), folder / "flat.nii")
    result = ready(folder)
    assert len(result.train) + len(result.held_out) == 5
    reasons = {name.rsplit("/", 1)[-1].removesuffix(".nii"): reason for name, reason in result.skipped}
    assert set(reasons) == {"cut", "holes", "small", "junk.dcm", "flat"}
    assert all("\n" not in reason for reason in reasons.values())
    assert "12x7x12" in reasons["small"]
    assert "--views.global_size 8x8x8" in reasons["small"]
    assert "--data.small pad" in reasons["small"]


def test_label_maps_among_scans_are_skipped_unless_kept(folder: Path) -> None:
    z, y, x = np.ogrid[:16, :16, :16]
    balls = ((z - 8) ** 2 + (y - 8) ** 2 + (x - 8) ** 2 < 30) * 1 + (x < 3) * 2
    nib.save(nib.Nifti1Image(balls.astype(np.uint8), np.eye(4)), folder / "organs.nii")
    grey = np.random.default_rng(0).integers(0, 40, (16, 16, 16))  # as few values, but a scan
    nib.save(nib.Nifti1Image(grey.astype(np.uint8), np.eye(4)), folder / "grey.nii")
    result = ready(folder)
    assert result.skipped == [
        ("organs", "looks like a label map (2 labels), not a scan; --data.labels keep trains on it too")
    ]
    assert len(result.train) + len(result.held_out) == 6
    kept = ready(folder, labels="keep")
    assert kept.skipped == []
    assert len(kept.train) + len(kept.held_out) == 7


def test_padding_admits_small_scans(folder: Path) -> None:
    write(folder / "slice.nii", shape=(1, 12, 12))
    result = ready(folder, small="pad", held_out=3)
    assert "slice" in {scan.name for scan in result.train}  # never held out while larger ones are there
    assert result.skipped == []


@pytest.mark.parametrize("content", [{}, {"readme.txt": b"hello"}, {"a.nii": b"x" * 400, "b.dcm": b"y" * 400}])
def test_a_folder_without_scans_is_a_one_line_error(tmp_path: Path, content: dict[str, bytes]) -> None:
    root = tmp_path / "scans"
    root.mkdir()
    for name, data in content.items():
        (root / name).write_bytes(data)
    with pytest.raises(UserError, match=r"--data\.root") as caught:
        ready(root)
    assert caught.value.code == 1
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data.root .*nowhere: no such folder"):
        ready(tmp_path / "nowhere")


def test_crops_above_every_built_in_scan_are_refused_unless_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "sample_scans", lambda _: find_scans(folder))
    views = ViewsConfig(global_size=(512, 512, 512), local_views=0)
    with pytest.raises(UserError, match=r"built-in scans: none of .* is below --views.global_size 512x512x512"):
        prepare(DataConfig(), views, tmp_path, 0)
    assert prepare(DataConfig(small="pad"), views, tmp_path, 0).train


def test_only_small_scans_is_an_error_with_the_sizes(tmp_path: Path) -> None:
    write(tmp_path / "scans" / "a.nii", shape=(4, 5, 6))
    with pytest.raises(UserError, match=r"a: 4x5x6 voxels .* 8x8x8"):
        ready(tmp_path / "scans")


def test_each_epoch_is_a_new_order_of_all_scans() -> None:
    epochs = [[sample_scan(3, sample, 10) for sample in range(10 * e, 10 * e + 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert sample_scan(3, 25, 10) == epochs[2][5]


def batches(folder: Path, **settings: Any) -> list:
    crops = Crops(ready(folder).train, VIEWS, seed=5)
    return list(loader(crops, **{"steps": 3, "accumulate": 2, "batch": 2, **settings}))


def same(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[call-overload]


def test_workers_do_not_change_the_batches(folder: Path) -> None:
    alone, helped = batches(folder), batches(folder, workers=2)
    assert len(alone) == len(helped) == 6
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_starting_late_gives_the_rest_of_the_same_batches(folder: Path) -> None:
    assert all(same(a, b) for a, b in zip(batches(folder)[4:], batches(folder, steps=1, origin=8), strict=True))


def test_processes_and_micro_batches_share_the_same_samples(folder: Path) -> None:
    crops = Crops(ready(folder).train, VIEWS, seed=5)
    settings: dict[str, Any] = {"steps": 2}
    whole = [plans.seed for plans in loader(crops, accumulate=1, batch=8, **settings)]
    halves = [plans.seed for plans in loader(crops, accumulate=2, batch=4, **settings)]
    ranks = [[p.seed for p in loader(crops, accumulate=1, batch=4, rank=r, ranks=2, **settings)] for r in range(2)]
    for step in range(2):
        assert torch.equal(whole[step], torch.cat(halves[2 * step : 2 * step + 2]))
        assert torch.equal(whole[step], torch.cat([ranks[0][step], ranks[1][step]]))


def ahead(source: Iterator[Any], **options: Any) -> Ahead[Any]:
    return Ahead(source, device=torch.device("cpu"), **options)


def test_batches_are_fetched_ahead_in_order_and_not_too_many() -> None:
    fetched: list[int] = []
    batches = ahead(n for n in range(9) if not fetched.append(n))
    until = time.monotonic() + 10
    while len(fetched) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    assert fetched == [0, 1, 2]  # two held, one in hand, none asked for
    assert list(batches) == list(range(9))
    assert next(batches, None) is None
    batches.close()


def test_an_error_comes_at_its_turn_and_a_silence_has_its_limit() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("torn")

    batches, go = ahead(failing()), threading.Event()
    assert next(batches) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="torn"):
            next(batches)
    silent = ahead(iter(lambda: go.wait(10), None), timeout=0.05)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.05 seconds"):
        next(silent)
    go.set()
    for each in (batches, silent):
        each.close()
        assert not each._thread.is_alive()


def test_making_a_loader_leaves_torch_random_state_alone(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_which_scan_is_held_out_follows_the_seed(folder: Path) -> None:
    def held_out(seed: int) -> str:
        return prepare(DataConfig(root=str(folder)), VIEWS, folder.parent / "cache", seed).held_out[0].name

    assert held_out(0) == held_out(0)
    assert len({held_out(seed) for seed in range(6)}) > 1
