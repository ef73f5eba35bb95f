"""A store on a server: what training sees is what it sees of the same store here, whatever the network does."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crops import Crops, loader
from medformer.data.datasets import adapter
from medformer.data.store import compresses, open_array, write_array
from medformer.data.store import remote as remote_module
from medformer.data.store.ahead import ReadAhead
from medformer.data.store.build import build
from medformer.data.store.catalogue import CATALOGUE, scans_of
from medformer.data.store.chunks import Chunked, table_of
from medformer.data.store.entries import open_scan, sidecar
from medformer.data.store.pieces import Pieces, digest, pieces_size
from medformer.data.store.remote import RemoteError, is_url, place_of, split_roots
from medformer.errors import UserError
from range_server import Faults, serving
from roots import DataConfig, Prepared, prepare
from views import Plan, ViewsConfig

pytest.importorskip("aiohttp", reason="pip install -e '.[remote]'")
pytestmark = pytest.mark.skipif(not compresses(), reason="needs blosc2")

VIEWS = ViewsConfig(global_size=(24, 40, 40), local_size=(8, 8, 8), local_views=1)
COUNT = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of scans larger than a chunk, in a folder with an odd name."""
    root = tmp_path_factory.mktemp("remote")
    (root / "scans").mkdir()
    for i in range(COUNT):
        voxels = np.random.default_rng(i).normal(100, 30, (60 + 9 * i, 70, 131)).astype(np.float32)
        voxels[:, :, :64] = -1000 if i == 0 else voxels[:, :, :64]
        nib.save(nib.Nifti1Image(voxels.T, np.diag([1.0, 1.5, 2.0, 1.0])), root / "scans" / f"s{i}.nii")
    store = root / "served" / "my store: 100%25 #1"
    build(adapter("folder").scan(root / "scans"), store)
    return store


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def url(made: Path, faults: Faults) -> Iterator[str]:
    with serving(made, faults) as address:
        yield address


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote_module, "_PAUSES", (0.01, 0.05))
    monkeypatch.setattr(remote_module, "_PATIENCE", 1.0)
    remote_module._opened.cache_clear()
    remote_module._pieces.cache_clear()
    yield
    remote_module._opened.cache_clear()
    remote_module._pieces.cache_clear()


def ready(root: Path | str, cache: Path) -> Prepared:
    return prepare(DataConfig(root=str(root), held_out=0), VIEWS, cache, 0)


def batches(found: Prepared, steps: int = 6, workers: int = 0) -> list[bytes]:
    feed = loader(Crops(found.train, VIEWS, 0), steps=steps, accumulate=1, batch=2, workers=workers)
    return [b"".join(np.ascontiguousarray(part).tobytes() for part in Plan(*batch)) for batch in feed]


def test_batches_are_those_of_the_store_here(made: Path, url: str, tmp_path: Path, faults: Faults) -> None:
    here, there = ready(made, tmp_path / "a"), ready(url, tmp_path / "b")
    assert len(here.train) == COUNT
    assert [s.name for s in there.train] == [s.name for s in here.train]
    assert there.fingerprint() == here.fingerprint()
    assert [replace(s, far=None, path="") for s in there.train] == [replace(s, path="") for s in here.train]
    wanted = batches(here, 12)
    assert batches(there, 12) == wanted
    assert not any(path.endswith((".json", ".sqlite", "salt")) for path in faults.paths)
    before = faults.requests
    remote_module._opened.cache_clear()
    assert batches(there, 12) == wanted
    assert faults.requests == before  # all pieces are here
    assert batches(there, 12, workers=2) == wanted


def test_a_network_that_fails_now_and_then_changes_nothing(
    made: Path, url: str, tmp_path: Path, faults: Faults, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted = batches(ready(made, tmp_path / "a"))
    kinds: list[Any] = [500, "cut", None, 503, "wrong", 429, None]
    faults.delay = 0.005
    tries: dict[str, int] = {}

    def fault(what: str, number: int) -> Any:  # the first two tries of most ranges
        tries[what] = tries.get(what, 0) + 1
        return kinds[number % len(kinds)] if tries[what] < 3 else None

    monkeypatch.setattr(remote_module, "_PATIENCE", 20.0)
    found = ready(url, tmp_path / "b")
    faults.fault = fault
    assert batches(found) == wanted
    assert "Traceback" not in capsys.readouterr().err
    for piece in (tmp_path / "b" / "pieces").glob("*/*"):
        if not piece.name.startswith("."):
            assert digest(piece.read_bytes(), len(piece.name) // 2) == piece.name


LASTING = {
    "HTTP 500": (500, "HTTP 500 Internal Server Error; [0-9]+ tries in [01] s"),
    "cut": ("cut", "; [0-9]+ tries in [01] s"),
    "wrong": ("wrong", r"\(checksum\): changed since the run began, or damaged; prepare the store again"),
    "gone": (404, "not there"),
    "forbidden": (403, "HTTP 403 Forbidden"),
    "whole": ("whole", r"\(checksum\)"),
}


@pytest.mark.parametrize("kind", LASTING)
def test_a_scan_that_cannot_be_had_is_named_in_one_line(url: str, tmp_path: Path, faults: Faults, kind: str) -> None:
    found = ready(url, tmp_path)
    bad = found.train[2]
    faults.fault = lambda path, number: LASTING[kind][0] if bad.path[-20:] in path else None
    with pytest.raises(RemoteError, match=LASTING[kind][1]) as raised:
        batches(found)
    assert str(raised.value).startswith(f"{bad.name}: {bad.path}: ")
    assert "\n" not in str(raised.value)
    assert str(raised.value).count(bad.name) == 1


def test_a_server_that_hangs_is_given_up(
    url: str, tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_SILENCE", 0.3)
    found = ready(url, tmp_path)
    faults.fault = lambda path, number: "hang"
    with pytest.raises(RemoteError, match=r"Timeout.*; [0-9]+ tries"):
        batches(found)


def test_a_change_on_the_server_is_found_and_a_new_run_takes_it(made: Path, tmp_path: Path, faults: Faults) -> None:
    store = tmp_path / "store"
    shutil.copytree(made, store)
    with serving(store, faults) as url:
        found = ready(url, tmp_path / "cache")
        some = batches(found, 2)
        key = found.train[1].far.key  # type: ignore[union-attr]
        voxels = np.array(open_array(store / f"{key}.b2nd")[...])
        write_array(store / f"{key}.b2nd", voxels[::-1])
        shutil.rmtree(tmp_path / "cache" / "pieces")
        remote_module._opened.cache_clear()
        with pytest.raises(RemoteError, match=rf"^{found.train[1].name}: .*\(changed|checksum|416|came of"):
            batches(found, 12)
        # Prepared again: the tables and the catalogue are those of the new arrays, and nothing old is taken for them.
        values = sidecar(store / key)
        from medformer.data.store.entries import _chunks, _seal, sealed

        values["files"][".b2nd"] = _seal(store / f"{key}.b2nd")
        (store / f"{key}.json").write_bytes(sealed(values | _chunks(store / key, values)))
        from medformer.data.store.catalogue import publish

        publish(store)
        new = ready(url, tmp_path / "cache")
        assert batches(new) == batches(ready(store, tmp_path / "here"))
        assert batches(new, 2) != some


def test_chunks_are_unpacked_as_blosc2_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 1), (65, 64, 63), (70, 5, 130), (17, 16, 129)):
        for dtype in (np.int16, np.uint8, np.float16):
            array = rng.integers(0, 200, shape).astype(dtype)
            array[: shape[0] // 2] = 0
            write_array(tmp_path / "a.b2nd", array)
            whole = (tmp_path / "a.b2nd").read_bytes()
            grid, table = table_of(tmp_path / "a.b2nd")
            chunked = Chunked(grid, table, lambda wanted, whole=whole: [whole[a : a + n] for a, n, _ in wanted])
            np.testing.assert_array_equal(chunked[...], array)
            for _ in range(20):
                box = tuple(slice(*sorted(rng.integers(0, n + 1, 2).tolist())) for n in shape)
                np.testing.assert_array_equal(chunked[box], array[box])


def test_only_what_a_crop_needs_is_fetched(url: str, made: Path, tmp_path: Path, faults: Faults) -> None:
    found = ready(url, tmp_path)
    before = faults.sent
    voxels, points = open_scan(found.train[4])
    small = faults.sent - before
    assert small < 60_000  # places in the tissue and the table
    _ = voxels[:8, :8, :8]
    assert faults.sent - before - small < (made / f"{found.train[4].far.key}.b2nd").stat().st_size / 2  # type: ignore[union-attr]
    assert len(points)


def test_pieces_stay_below_the_limit_and_those_used_last_stay(tmp_path: Path) -> None:
    kept = Pieces(tmp_path, lambda: 16 * 10_000)
    rng = np.random.default_rng(0)
    made = [rng.bytes(900) for _ in range(400)]
    first = digest(made[0])
    for data in made:
        kept.put(digest(data), data)
        assert kept.get(first) == made[0]  # used all the time
        time.sleep(0.0005)
    sizes = [sum(f.stat().st_size for f in shard.glob("[!.]*")) for shard in (tmp_path / "pieces").iterdir()]
    assert len(sizes) == 16
    assert max(sizes) <= 10_000
    assert sum(sizes) > 16 * 5000
    assert pieces_size(tmp_path) == sum(sizes)
    assert kept.get(digest(made[-1])) == made[-1]


def test_a_damaged_piece_is_said_and_fetched_again(
    url: str, tmp_path: Path, faults: Faults, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ready(url, tmp_path)
    wanted = batches(found)
    pieces = sorted(p for p in (tmp_path / "pieces").glob("*/*") if not p.name.startswith("."))
    pieces[0].write_bytes(pieces[0].read_bytes()[:-1])
    pieces[1].write_bytes(b"")
    data = bytearray(pieces[2].read_bytes())
    data[-1] ^= 1
    pieces[2].write_bytes(data)
    remote_module._opened.cache_clear()
    before = faults.requests
    assert batches(found) == wanted
    assert faults.requests == before + 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all("was cut short or changed; it is fetched again" in line for line in said)


def test_a_full_disk_is_said_once_and_training_goes_on(
    url: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, wanted = ready(url, tmp_path / "b"), batches(ready(made, tmp_path / "a"))

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert batches(found) == wanted
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "cannot be written (No space left on device)" in said[0]


def reader(url: str, cache: Path) -> tuple[Any, Any]:
    """A process that reads 12 batches, and the end of a pipe that gives their hash."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)

    def read() -> None:
        found = ready(url, cache)
        its.send("ready")
        its.send(hashlib.sha256(b"".join(batches(found, 12))).hexdigest())

    process = context.Process(target=read)
    process.start()
    return process, mine


def test_the_cache_survives_kills_and_is_shared(url: str, made: Path, tmp_path: Path, faults: Faults) -> None:
    """Some processes are killed at several points, two read at once, and one more finds only whole pieces."""
    wanted = hashlib.sha256(b"".join(batches(ready(made, tmp_path / "a"), 12))).hexdigest()
    faults.delay = 0.03
    cache = tmp_path / "b"
    for lives in range(4):
        victim, pipe = reader(url, cache)
        assert pipe.recv() == "ready"
        time.sleep(0.05 * (lives + 1))
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    pair = [reader(url, cache) for _ in range(2)]
    for process, pipe in pair:
        assert [pipe.recv(), pipe.recv()] == ["ready", wanted]
        process.join()
    for piece in (cache / "pieces").glob("*/*"):
        if not piece.name.startswith("."):
            assert digest(piece.read_bytes(), len(piece.name) // 2) == piece.name
    before = faults.requests
    assert hashlib.sha256(b"".join(batches(ready(url, cache), 12))).hexdigest() == wanted
    assert faults.requests == before + 2  # the catalogue, and whether there are ranges


def test_requests_run_at_the_same_time(url: str, tmp_path: Path, faults: Faults) -> None:
    found = ready(url, tmp_path)
    faults.delay = 0.02
    batches(found)
    assert 4 < faults.most <= 32


# ---- what is not a store --------------------------------------------------------------------------------------------


def test_a_server_without_ranges_is_refused(url: str, tmp_path: Path, faults: Faults) -> None:
    faults.fault = lambda path, number: "whole"
    with pytest.raises(UserError, match="does not answer requests of ranges"):
        ready(url, tmp_path)


def test_no_store_no_server_and_a_cut_catalogue_are_said(made: Path, tmp_path: Path, faults: Faults) -> None:
    missing = r"cannot be read .*not there.*; it must be the folder of a store"
    with serving(made.parent, faults) as url, pytest.raises(UserError, match=missing):
        ready(url, tmp_path)
    with pytest.raises(UserError, match=r"cannot be read .*Cannot connect to host 127.0.0.1.* tries in"):
        ready(url, tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    text = gzip.decompress((made / CATALOGUE).read_bytes())
    cut, short = (made / CATALOGUE).read_bytes()[:-20], gzip.compress(text[: text.rindex(b"\n", 0, -1)])
    for packed in (cut, short, gzip.compress(text.replace(b"60", b"61", 1)), b"PK" * 99):
        (store / CATALOGUE).write_bytes(packed)
        with serving(store, Faults()) as url, pytest.raises(UserError, match=r"cannot be read .*\(checksum\)"):
            ready(url, tmp_path)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("http://me:secret@127.0.0.1:1/store", "a password does not belong into a flag"),
        ("http://127.0.0.1:1/store?signature=x", r"'\?' must be written %3F"),
        ("http://127.0.0.1:1/a#b", "'#' must be written %23"),
        ("gopherish://x/store", "Protocol not known: gopherish"),
    ],
)
def test_addresses_that_cannot_be_are_said(root: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        ready(root, tmp_path)
    assert "secret" not in str(raised.value)


def test_a_missing_package_is_said(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = remote_module.importlib.util.find_spec
    monkeypatch.setattr(
        remote_module.importlib.util, "find_spec", lambda name: None if name == "aiohttp" else real(name)
    )
    monkeypatch.setattr(remote_module, "_links", {})
    with pytest.raises(UserError, match=r"needs aiohttp, which is not installed; pip install -e '.\[remote\]'"):
        ready(url, tmp_path)


def test_roots_are_parted_around_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    (tmp_path / "a:b").mkdir()
    for text, wanted in {
        "http://host/store": ["http://host/store"],
        "http://host:8000/store": ["http://host:8000/store"],
        "http://[::1]:8000/my store:2:/data/x": ["http://[::1]:8000/my store:2", "/data/x"],
        "scans:http://host:1/a:s3://bucket/b:c:scans": ["scans", "http://host:1/a", "s3://bucket/b:c", "scans"],
        "a:b:https://h/x:./y": ["a:b", "https://h/x", "./y"],
        "/a:/b": ["/a", "/b"],
        "http:/a": ["http", "/a"],
    }.items():
        assert split_roots(text) == wanted
    assert not is_url("C:/x")
    assert not is_url("/a//b")


@pytest.mark.parametrize("name", ["my store: 100%25 #1", "Zürich", "a+b&c=d"])
def test_names_are_as_a_browser_writes_them(made: Path, tmp_path: Path, faults: Faults, name: str) -> None:
    from urllib.parse import quote

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / name).symlink_to(made)
    with serving(tmp_path / "served", faults) as url:
        assert len(ready(f"{url}/{quote(name)}", tmp_path / "cache").train) == COUNT
        assert len(ready(f"{url}/{quote(name)}/", tmp_path / "cache").train) == COUNT


def test_a_store_of_before_gets_its_tables_without_its_scans(made: Path, tmp_path: Path) -> None:
    from medformer.data.store.entries import sealed

    store = tmp_path / "store"
    shutil.copytree(made, store)
    for path in store.glob("*.json"):
        values = json.loads(path.read_bytes())
        del values["seal"], values["chunks"]
        del values["files"][".chunks.npy"]
        path.write_bytes(sealed(values))
        path.with_suffix(".chunks.npy").unlink()
    (store / CATALOGUE).unlink()
    arrays = {path: path.stat().st_mtime_ns for path in store.glob("*.b2nd")}
    build(adapter("folder").scan(made.parents[1] / "scans"), store)
    assert {path: path.stat().st_mtime_ns for path in store.glob("*.b2nd")} == arrays
    assert (store / CATALOGUE).read_bytes() == (made / CATALOGUE).read_bytes()


def test_the_catalogue_names_no_files_and_no_tags(made: Path) -> None:
    text = gzip.decompress((made / CATALOGUE).read_bytes()).decode()
    assert text.count('"key"') == COUNT
    for word in ("s0.nii", "scans/", "tags", str(made)):
        assert word not in text


def test_password_and_limit(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_bytes(b"x" * 100)
    place = place_of("http://h/s/", tmp_path, None)
    assert place.url == "http://h/s"
    assert place.limit is not None
    assert place.limit <= 100 * 10**9 + 100
    assert place_of("http://h/s", tmp_path, 5).limit == 5


# ---- reading ahead --------------------------------------------------------------------------------------------------


def test_what_is_read_ahead_comes_in_order_with_its_errors() -> None:
    began, lock = [], threading.Lock()

    def item(sample: int) -> int:
        with lock:
            began.append(sample)
        time.sleep(0.01 * (sample % 3))
        if sample == 7:
            raise ValueError("seven")
        return 10 * sample

    ahead = ReadAhead(item, range(2, 12, 4), 2, held=4)
    assert ahead.__getitems__([2, 3]) == [20, 30]
    with pytest.raises(ValueError, match="seven"):
        ahead.__getitems__([6, 7])
    assert ahead.__getitems__([10, 11]) == [100, 110]
    assert sorted(began) == [2, 3, 6, 7, 10, 11]  # each once


def test_training_on_a_server_gives_the_losses_of_training_here(
    trainer: Any, made: Path, url: str, tmp_path: Path, faults: Faults
) -> None:
    faults.delay = 0.002
    here, there = tmp_path / "here", tmp_path / "there"
    assert trainer(here, "--steps=4", f"--data.root={made}") == 0
    assert trainer(there, "--steps=4", f"--data.root={url}") == 0
    assert trainer.losses(there) == trainer.losses(here)
    a, b = (load_file(run / "backbone.safetensors") for run in (here, there))
    assert all(torch.equal(a[name], value) for name, value in b.items())


def test_a_run_whose_server_is_gone_says_so_and_goes_on_when_it_is_back(
    trainer: Any, made: Path, tmp_path: Path, faults: Faults, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import train

    run, whole = tmp_path / "run", tmp_path / "whole"
    with serving(made, faults) as url:
        assert trainer(whole, "--steps=6", "--save_every=1", f"--data.root={url}") == 0
        before = faults.requests
        faults.fault = lambda path, number: 500 if number > before + 14 else None
        flags = ("--steps=6", "--save_every=1", f"--data.root={url}", f"--data.cache={tmp_path / 'other'}")
        assert trainer(run, *flags) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "HTTP 500" in said[0]
    assert "--resume" in said[0]
    assert train.main([f"--resume={run}"]) == 1  # gone
    assert "Cannot connect" in capsys.readouterr().err
    port = int(url.rsplit(":", 1)[1])
    with serving(made, Faults(), port):
        assert train.main([f"--resume={run}"]) == 0
    assert trainer.losses(run) == trainer.losses(whole)


def test_a_bucket_is_read_as_a_folder(
    made: Path, tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An S3 endpoint on loopback: GET of objects with ranges is all that is asked of it."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    from fsspec.config import conf

    wanted = batches(ready(made, tmp_path / "a"))
    faults.hidden = "bucket"
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "my store: 100% +").symlink_to(made)
    with serving(tmp_path / "objects", faults) as url:
        endpoint = url.removesuffix("/bucket")
        monkeypatch.setitem(conf, "s3", {"anon": True, "endpoint_url": endpoint})
        found = ready("s3://bucket/my store: 100% +", tmp_path / "b")
        assert batches(found) == wanted
        assert all(path.startswith("/bucket/my") for path in faults.paths)
        remote_module._opened.cache_clear()
        shutil.rmtree(tmp_path / "b" / "pieces")
        faults.fault = lambda what, number: 403
        with pytest.raises(RemoteError, match=r"^folder/.*Forbidden"):
            batches(found)


def test_a_catalogue_that_names_other_files_touches_none(made: Path, tmp_path: Path, faults: Faults) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    head, *lines, _ = (json.loads(line) for line in gzip.decompress((made / CATALOGUE).read_bytes()).splitlines())
    lines[0]["entry"]["files"][".points.npy"]["hash"] = f"../../../{victim.relative_to(tmp_path)}"
    lines[1]["key"] = "../../x"
    del lines[2]["entry"]["scaling"]
    lines[3]["entry"]["chunks"]["chunks"] = [0, 1, 1]
    text = "".join(json.dumps(line) + "\n" for line in (head, *lines)).encode()
    (tmp_path / "store").mkdir()
    packed = gzip.compress(text + json.dumps({"seal": digest(text)}).encode() + b"\n")
    (tmp_path / "store" / CATALOGUE).write_bytes(packed)
    with serving(tmp_path / "store", faults) as url:
        good, bad, _ = scans_of(url, tmp_path / "cache", None)
    assert len(good) == COUNT - 4
    assert [name for name, _ in bad] == [line["name"] for line in lines[:4]]
    assert all("is not as prepare writes it" in reason for _, reason in bad)
    assert victim.read_text() == "mine"
    (tmp_path / "store" / CATALOGUE).write_bytes(gzip.compress(b"\n" * 10**7))
    with serving(tmp_path / "store", Faults()) as url, pytest.raises(UserError, match="checksum"):
        ready(url, tmp_path)


def test_the_benchmark_runs_on_a_small_store(tmp_path: Path) -> None:
    import remote_store

    store = remote_store.a_store(tmp_path / "a", 2, (32, 48, 48))
    with remote_store.served(store, 0.001, 1e8) as (url, sent):
        row = remote_store.measure(url, tmp_path / "cache", ViewsConfig(), steps=3, batch=2, step=0.01, workers=0)
        assert sent() > 0
    assert row["steps_per_s"] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainer_names_what_it_cannot_have(
    trainer: Any, url: str, tmp_path: Path, faults: Faults, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    faults.fault = lambda what, number: 503 if "b2nd" in what else None
    assert trainer(tmp_path / "run", "--steps=3", f"--data.root={url}", f"--workers={workers}") == 1
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1
    assert "HTTP 503 Service Unavailable" in lines[0]
    assert "scans due: folder/" in lines[0]
    assert f"{url} is read from afar; pieces of it are kept in" in said.out
