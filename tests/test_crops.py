"""Which scan a sample shows and how it is cut: by the run's seed and the sample's number, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crops import Crops, sample_scan
from medformer.data import Volume
from medformer.data.store import random_crop, write_array
from medformer.data.store.entries import Stored, keep
from views import Plan, ViewsConfig

VIEWS = ViewsConfig(global_size=(8, 8, 8), local_size=(4, 4, 4), local_views=1)
DECIDED = ("region", "boxes", "flips", "intensity", "seed")  # of a `Plan`: all that is drawn here


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    root = tmp_path_factory.mktemp("store")
    (root / "source").write_bytes(b"x")
    voxels = np.random.default_rng(0).normal(0, 400, (20, 22, 24)).astype(np.int16)
    volume = Volume(voxels=voxels, affine=np.eye(4), modality="CT", units="HU", notes=(), source="x")
    return keep(volume, root / "key", "scan", [str(root / "source")])


def same(a: Plan, b: Plan) -> list[bool]:
    return [np.array_equal(getattr(a, name), getattr(b, name)) for name in DECIDED]


def test_a_sample_is_cut_alike_by_equal_seeds_and_otherwise_by_others(scan: Stored) -> None:
    first, again, other = (Crops([scan], VIEWS, seed) for seed in (0, 0, 1))
    for sample in range(3):
        assert all(same(first[sample], again[sample]))
        assert same(first[sample], other[sample]) == [False] * len(DECIDED)
    assert same(first[0], first[1]) == [False] * len(DECIDED)


def test_the_order_of_scans_follows_the_seed_and_the_epoch() -> None:
    epochs = {
        (seed, epoch): tuple(sample_scan(seed, 12 * epoch + i, 12) for i in range(12))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(12)) for order in epochs.values())
    assert len(set(epochs.values())) == 4
    assert epochs[0, 0] == tuple(sample_scan(0, i, 12) for i in range(12))


def test_a_given_order_names_the_scan_and_leaves_the_cut(scan: Stored) -> None:
    by_order = Crops([scan, scan], VIEWS, 0, order=lambda sample: 1)
    assert [int(by_order[sample].scan) for sample in range(4)] == [1, 1, 1, 1]
    assert all(same(by_order[2], Crops([scan], VIEWS, 0)[2]))


def test_random_crops_begin_at_every_place_and_at_no_other(tmp_path: Path) -> None:
    write_array(tmp_path / "a.npy", np.arange(4 * 2 * 3).reshape(4, 2, 3))
    rng = np.random.default_rng(0)
    firsts = {int(random_crop(tmp_path / "a.npy", (2, 2, 2), rng)[0, 0, 0]) for _ in range(100)}
    assert firsts == {6 * z + x for z in range(3) for x in range(2)}
