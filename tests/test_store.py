"""The store: what comes out is what went in, a build survives a kill at any point, and bad scans are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medformer.data import ScanError, Volume, normalise
from medformer.data.datasets import adapter
from medformer.data.intensity import scaling_of
from medformer.data.store import Scaled, compresses, cut, open_array, random_crop, suffix, write_array
from medformer.data.store import build as building
from medformer.data.store.build import build, main
from medformer.data.store.entries import keep, load
from medformer.data.store.index import Row, rows
from medformer.errors import UserError
from roots import DataConfig, prepare
from views import ViewsConfig

needs_blosc2 = pytest.mark.skipif(not compresses(), reason="needs blosc2")
SUFFIXES = [".npy", pytest.param(".b2nd", marks=needs_blosc2)]
VIEWS = ViewsConfig(global_size=(8, 8, 8), local_size=(4, 4, 4), local_views=1)


def volume(dtype: type, units: str = "HU", shape: tuple[int, int, int] = (20, 18, 22), padded: bool = False) -> Volume:
    rng = np.random.default_rng(0)
    voxels = rng.normal(0, 400, shape)
    voxels = np.clip(voxels, np.iinfo(dtype).min, np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else voxels
    valid = rng.random(shape) > 0.2 if padded else None
    return Volume(
        voxels=voxels.astype(dtype), affine=np.diag([1.0, 1.5, 2.0, 1.0]), modality="CT", units=units,
        notes=("left out: Doe_John.dcm: localizer", "a note"), source="x", valid=valid,
        provenance={"tags": {"Manufacturer": "ACME"}},
    )  # fmt: skip


@pytest.mark.parametrize("end", SUFFIXES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 5, 130), (65, 64, 63)])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float16])
def test_arrays_come_back_bit_for_bit(tmp_path: Path, end: str, shape: tuple[int, int, int], dtype: type) -> None:
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    write_array(tmp_path / f"a{end}", array)
    stored = open_array(tmp_path / f"a{end}")
    assert (tuple(stored.shape), np.dtype(stored.dtype)) == (shape, np.dtype(dtype))
    np.testing.assert_array_equal(stored[...], array)
    np.testing.assert_array_equal(cut(stored, (0, 0, 0), shape), array)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{end}"]


@pytest.mark.parametrize("end", SUFFIXES)
def test_random_crops_lie_inside_and_follow_the_seed(tmp_path: Path, end: str) -> None:
    array = np.arange(40 * 41 * 42, dtype=np.int32).reshape(40, 41, 42)
    write_array(tmp_path / f"a{end}", array)
    crops = [random_crop(tmp_path / f"a{end}", (8, 9, 10), np.random.default_rng(i)) for i in (1, 1, 2)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any()
    z, y, x = np.unravel_index(int(crops[0][0, 0, 0]), array.shape)
    np.testing.assert_array_equal(crops[0], array[z : z + 8, y : y + 9, x : x + 10])
    with pytest.raises(ScanError, match="must fit into"):
        random_crop(tmp_path / f"a{end}", (41, 9, 10), np.random.default_rng(0))


@pytest.mark.parametrize("end", SUFFIXES)
def test_cut_off_and_lost_arrays_are_refused(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"a{end}"
    write_array(path, np.random.default_rng(0).integers(0, 9000, (64, 64, 64)).astype(np.int16))
    data = path.read_bytes()
    for part in (0.9, 0.5, 0.01, 0):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(ScanError):
            cut(open_array(path), (0, 0, 0), (64, 64, 64))
    with pytest.raises(ScanError, match="cannot be opened"):
        open_array(tmp_path / f"b{end}")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "units"),
    [(np.int16, "HU"), (np.uint8, "arbitrary"), (np.int32, "HU"), (np.uint16, "arbitrary"), (np.float32, "arbitrary")],
)
def test_a_stored_scan_looks_as_if_it_had_been_scaled_whole(
    tmp_path: Path, dtype: type, units: str, padded: bool
) -> None:
    made = volume(dtype, units, padded=padded)
    source = tmp_path / "source"
    source.write_bytes(b"x")
    stored = keep(made, tmp_path / "key", "name", [str(source)])
    seen = load(stored.path)
    assert seen.dtype == np.float16
    np.testing.assert_array_equal(np.asarray(seen), normalise(made).astype(np.float16))
    box = (slice(3, 9), slice(0, 18), slice(5, 6))
    np.testing.assert_array_equal(seen[box], normalise(made).astype(np.float16)[box])
    assert np.dtype(open_array(stored.path).dtype).itemsize <= 2
    assert Path(stored.path).suffix == suffix()


def test_hu_is_stored_exactly(tmp_path: Path) -> None:
    made = volume(np.int32)
    (tmp_path / "source").write_bytes(b"x")
    stored = keep(made, tmp_path / "key", "name", [str(tmp_path / "source")])
    array = open_array(stored.path)
    assert array.dtype == np.int16
    np.testing.assert_array_equal(array[...], made.voxels)


def test_the_sidecar_tells_all_but_names(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    keep(volume(np.int16), tmp_path / "key", "Doe_John/scan", [str(tmp_path / "source")])
    text = (tmp_path / "key.json").read_text()
    entry = json.loads(text)
    assert "Doe" not in text
    assert entry["notes"] == ["a note"]
    assert entry["tags"] == {"Manufacturer": "ACME"}
    assert len(entry["source_hash"]) == 32
    assert entry["units"] == "HU"
    np.testing.assert_array_equal(entry["affine"], np.diag([1.0, 1.5, 2.0, 1.0]))
    assert all(low <= high for low, high in entry["foreground_zyx"])


def test_tables_and_arithmetic_scale_alike() -> None:
    made = volume(np.int16)
    scaling = scaling_of(made)
    by_table = np.asarray(Scaled(made.voxels, scaling))
    np.testing.assert_array_equal(by_table, scaling.apply(made.voxels).astype(np.float16))


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    for i in range(6):
        (folder / f"Doe_{i}").mkdir(parents=True)
        voxels = np.random.default_rng(i).normal(100, 30, (12, 13, 14)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1.0])), folder / f"Doe_{i}" / "a.nii")
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), 5, np.int16), np.eye(4)), folder / "Doe_0" / "Doe_flat.nii")
    return folder


class TestBuild:
    def test_bad_scans_are_quarantined_with_their_reason_and_not_read_again(
        self, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        records = adapter("folder").scan(scans)
        first = build(records, tmp_path / "store")
        assert sorted(row.state for row in first) == ["kept"] * 6 + ["quarantined"]
        assert "constant" in next(row.reason for row in first if row.state == "quarantined")
        monkeypatch.setattr(building, "_one", lambda *a: pytest.fail("read again"))
        assert build(records, tmp_path / "store") == first
        monkeypatch.undo()
        asked: list[str] = []
        real = building._one
        monkeypatch.setattr(building, "_one", lambda key, *a: asked.append(key) or real(key, *a))
        build(records, tmp_path / "store", retry=True)
        assert len(asked) == 1

    def test_a_changed_or_new_scan_is_added(self, scans: Path, tmp_path: Path) -> None:
        before = build(adapter("folder").scan(scans), tmp_path / "store")
        nib.save(
            nib.Nifti1Image(np.random.default_rng(9).normal(0, 9, (9, 9, 9)).astype(np.int16), np.eye(4)),
            scans / "new.nii",
        )
        after = build(adapter("folder").scan(scans), tmp_path / "store")
        assert {row.key for row in before} < {row.key for row in after}
        assert len(after) == len(before) + 1

    def test_nothing_in_the_store_names_anybody(self, scans: Path, tmp_path: Path) -> None:
        build(adapter("folder").scan(scans), tmp_path / "store")
        for path in (tmp_path / "store").iterdir():
            assert b"Doe" not in path.read_bytes()
            assert "Doe" not in path.name
        assert (tmp_path / "store" / "salt").stat().st_mode & 0o077 == 0

    def test_workers_build_the_same_store(self, scans: Path, tmp_path: Path) -> None:
        records = adapter("folder").scan(scans)
        alone = build(records, tmp_path / "a")
        helped = build(records, tmp_path / "b", workers=2)
        keys = lambda found: [(row.key, row.state, row.shape, row.reason) for row in found]  # noqa: E731
        assert keys(alone) == keys(helped)
        for row in alone:
            if row.state == "kept":
                same = [(tmp_path / part / row.key).with_suffix(suffix()).read_bytes() for part in "ab"]
                assert same[0] == same[1]

    def test_a_killed_build_goes_on_and_ends_the_same(self, scans: Path, tmp_path: Path) -> None:
        script = Path(__file__).parents[1] / "ssl" / "prepare.py"
        command = [
            sys.executable,
            str(script),
            "--out",
            str(tmp_path / "store"),
            "--split",
            "all",
            "--workers",
            "0",
            str(scans),
        ]
        environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while (
            process.poll() is None and time.monotonic() < until and len(list((tmp_path / "store").glob("*.json"))) < 2
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert main([str(scans), "--out", str(tmp_path / "store"), "--split", "all", "--workers", "0"]) == 1
        whole = build(adapter("folder").scan(scans), tmp_path / "other")
        assert [(r.key, r.state) for r in rows(tmp_path / "store")] == [(r.key, r.state) for r in whole]
        assert all(
            load(str((tmp_path / "store" / r.key).with_suffix(suffix()))).shape for r in whole if r.state == "kept"
        )

    def test_a_lost_row_or_index_is_made_again_without_reading(self, scans: Path, tmp_path: Path) -> None:
        records = adapter("folder").scan(scans)
        first = build(records, tmp_path / "store")
        (tmp_path / "store" / "index.sqlite").unlink()
        assert build(records, tmp_path / "store") == first

    def test_machines_build_one_store_together(
        self, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every scan is read by one of them, and the last call reads none."""
        asked: list[str] = []
        real = building._one
        monkeypatch.setattr(building, "_one", lambda key, *a: asked.append(key) or real(key, *a))
        store = tmp_path / "store"
        parts = [build(adapter("folder").scan(scans), store, shard=(i, 3)) for i in (1, 2, 3)]
        assert sorted(asked) == sorted(row.key for part in parts for row in part)
        assert len(set(asked)) == 7
        with pytest.raises(UserError, match="3 parts of a store; run the same medformer prepare once without --shard"):
            prepare(DataConfig(root=str(store)), VIEWS, tmp_path / "cache", 0)
        monkeypatch.setattr(building.Record, "read", lambda self, **_: pytest.fail("read again"))
        whole = build(adapter("folder").scan(scans), store)
        assert whole == sorted((row for part in parts for row in part), key=lambda row: row.key)
        monkeypatch.undo()
        alone = build(adapter("folder").scan(scans), tmp_path / "alone")
        assert [(row.key, row.state, row.shape) for row in whole] == [(r.key, r.state, r.shape) for r in alone]
        for row in whole:
            if row.state == "kept":
                same = [(tmp_path / part / row.key).with_suffix(suffix()).read_bytes() for part in ("store", "alone")]
                assert same[0] == same[1]

    @pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2"])
    def test_a_part_is_one_of_all(
        self, scans: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main([str(scans), "--out", str(tmp_path / "store"), f"--shard={text}"])
        assert "must be I/N with I from 1 to N, like 3/16" in capsys.readouterr().err

    def test_the_command_names_what_comes_after_a_part(
        self, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main([str(scans), "--out", str(tmp_path / "store"), "--split", "all", "--workers", "0", "--shard", "1/2"])
        assert "part 1 of 2; when all are done: the same command once without --shard" in capsys.readouterr().out

    def test_the_trainer_takes_a_store_as_its_root(self, scans: Path, tmp_path: Path) -> None:
        build(adapter("folder").scan(scans), tmp_path / "store")
        ready = prepare(DataConfig(root=str(tmp_path / "store")), VIEWS, tmp_path / "unused", 0)
        assert len(ready.train) + len(ready.held_out) == 6
        assert len(ready.skipped) == 1
        assert not (tmp_path / "unused" / "samples").exists()

    def test_the_command_speaks_in_lines(self, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = str(tmp_path / "store")
        assert main(["nonsense=.", "--out", out]) == 2
        assert main([str(tmp_path / "nowhere"), "--out", out]) == 2
        assert main([f"mrnet={scans}", "--out", out]) == 1
        assert main([f"folder={scans}", "--out", out, "--workers", "0", "--split", "all"]) == 1
        text = capsys.readouterr()
        assert text.err.count("\n") >= 3
        assert "6 scans in" in text.out
        assert "quarantined  folder/" in text.out
        assert isinstance(rows(Path(out))[0], Row)
