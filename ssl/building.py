"""A training store from any mix of data sets: `python ssl/prepare.py --out STORE lidc_idri=DIR mrnet=DIR folder=DIR`.

Every volume is an entry of its own, complete once its sidecar is there, so a build may be killed at any point and
started again: what is complete stays, what failed stays in quarantine until its files change. The index (SQLite) is
written by this process alone, a row at a time. It names patients by a salted hash; neither it nor the sidecars hold
header values that are not on the allow-list of medformer.data.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from medformer.data import ScanError
from medformer.data.datasets import DATASETS, adapter
from medformer.data.records import Record, hash_patient, new_salt, patient_split
from prepare import INDEX, keep, key_of, look_up
from runs import UserError

__all__ = ["Row", "build", "main", "rows"]

_AHEAD = 4  # tasks a worker has waiting


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the index."""

    key: str
    """Name of the entry's files."""
    name: str
    """Data set, hashed patient and key: what logs show."""
    dataset: str
    patient: str
    """Salted hash."""
    split: str
    modality: str
    shape: str
    bytes: int
    """Of the voxels, before compression."""
    state: str
    """kept, or quarantined."""
    reason: str
    """Why quarantined."""


def rows(store: Path) -> list[Row]:
    """The index, by key. Raises UserError for a damaged one."""
    try:
        with closing(sqlite3.connect(f"file:{store / INDEX}?mode=ro", uri=True)) as index:
            names = ", ".join(f.name for f in fields(Row))
            return [
                Row(**dict(zip([f.name for f in fields(Row)], row, strict=True)))
                for row in index.execute(f"select {names} from scans order by key")
            ]
    except sqlite3.Error as error:
        raise UserError(f"index of {store} cannot be read ({error}); delete {INDEX} and build again") from error


def build(
    records: Iterable[Record], store: Path, *, workers: int = 0, retry: bool = False, progress: bool = False
) -> list[Row]:
    """Add records to a store; those in it are only looked up. Returns all rows of the index.

    workers: processes that read and write; 0 does it here. retry: read again what is in quarantine.

    Raises UserError where the store cannot be written or a worker dies.
    """
    store.mkdir(parents=True, exist_ok=True)
    salt = _salt(store)
    tasks = {key: (record, name) for record in records for key, name in [_named(record, salt)]}
    with closing(sqlite3.connect(store / INDEX, timeout=60)) as index:
        columns = ", ".join(f"{f.name} {'integer' if f.name == 'bytes' else 'text'} not null" for f in fields(Row))
        index.execute(f"create table if not exists scans ({columns}, primary key (key))")
        done = dict(index.execute("select key, state from scans"))
        todo = []
        for key, (record, name) in tasks.items():
            if look_up(store / key, name) is None:
                if done.get(key) != "quarantined" or retry:
                    todo.append((key, record, name))
            elif done.get(key) != "kept":  # killed between the entry and its row
                todo.append((key, record, name))
        bar = tqdm(total=len(todo), desc="scans", unit="scan", disable=None if progress else True)
        for row in _results(todo, store, salt, workers):
            values = asdict(row)
            marks = ", ".join("?" * len(values))
            index.execute(
                f"insert or replace into scans ({', '.join(values)}) values ({marks})", tuple(values.values())
            )
            index.commit()
            bar.update()
        bar.close()
    return rows(store)


def _results(todo: list[tuple[str, Record, str]], store: Path, salt: bytes, workers: int) -> Iterator[Row]:
    if workers <= 0 or len(todo) < 2:
        yield from (_one(key, record, name, store, salt) for key, record, name in todo)
        return
    waiting: set[Future[Row]] = set()
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for key, record, name in todo:
                waiting.add(pool.submit(_one, key, record, name, store, salt))
                if len(waiting) >= _AHEAD * workers:
                    ready, waiting = wait(waiting, return_when="FIRST_COMPLETED")
                    yield from (future.result() for future in ready)
            yield from (future.result() for future in wait(waiting).done)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads scans died, most likely out of memory; run again with fewer --workers: all that is "
            "complete stays"
        ) from error


def _one(key: str, record: Record, name: str, store: Path, salt: bytes) -> Row:
    shape, size, state, reason = "", 0, "kept", ""
    try:
        stored = look_up(store / key, name)
        if stored is None:
            stored = keep(record.read(), store / key, name, record.paths)
        shape, size = "x".join(map(str, stored.shape)), 2 * stored.shape[0] * stored.shape[1] * stored.shape[2]
    except (ScanError, MemoryError) as error:
        state, reason = "quarantined", _unnamed(str(error) or "more memory than there is", record)
    return Row(
        key=key, name=name, dataset=record.dataset, patient=hash_patient(record.patient, salt),
        split=record.split or "", modality=record.modality, shape=shape, bytes=size, state=state, reason=reason,
    )  # fmt: skip


def _unnamed(reason: str, record: Record) -> str:
    """Without the names of files and folders, which may be those of patients."""
    own = {part for path in record.paths for part in (os.path.basename(path), os.path.basename(os.path.dirname(path)))}
    for part in sorted(own, key=len, reverse=True):
        reason = reason.replace(f"{part}: ", "").replace(part, "...") if len(part) > 2 else reason
    return reason


def _named(record: Record, salt: bytes) -> tuple[str, str]:
    key = key_of(record.paths)
    if "index" in record.info or (record.scan is not None and record.scan.repeat):
        part = str(record.info.get("index", "")) + str(record.info.get("array", ""))
        part += record.scan.repeat if record.scan is not None else ""
        key = hashlib.sha256(f"{key}|{part}".encode()).hexdigest()[:24]
    return key, f"{record.dataset}/{hash_patient(record.patient, salt)}/{key[:8]}"


def _salt(store: Path) -> bytes:
    """The store's own, made once, readable by its owner."""
    path = store / "salt"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as file:
        file.write(new_salt())
    return path.read_bytes()


def _records(sources: list[str], split: str) -> list[Record]:
    out: list[Record] = []
    for source in sources:
        name, equals, root = source.partition("=")
        name, root = (name, root) if equals else ("folder", source)
        if name not in DATASETS:
            raise UserError(f"{source}: data set {name!r} must be one of {', '.join(DATASETS)}", 2)
        if not Path(root).is_dir():
            raise UserError(f"{source}: no such folder", 2)
        out += adapter(name).scan(root)
    parts = patient_split(out)
    return out if split == "all" else parts[split]


def main(arguments: list[str] | None = None) -> int:
    """0: everything is kept. 1: something is in quarantine, or nothing could be done. 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python ssl/prepare.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "sources", nargs="+", help=f"DATASET=DIR, or DIR for a plain folder; data sets: {', '.join(DATASETS)}"
    )
    parser.add_argument("--out", required=True, help="folder of the store; what is in it is kept and added to")
    parser.add_argument("--split", default="train", choices=["train", "valid", "test", "all"], help="patients to take")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 reads in this one")
    parser.add_argument("--retry", action="store_true", help="read again what is in quarantine")
    args = parser.parse_args(arguments)
    try:
        records = _records(args.sources, args.split)
        found = build(records, Path(args.out), workers=args.workers, retry=args.retry, progress=True)
    except (UserError, ScanError) as error:
        print(error, file=sys.stderr)
        return error.code if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    bad = [row for row in found if row.state == "quarantined"]
    for row in bad:
        print(f"quarantined  {row.name}: {row.reason}")
    kept = [row for row in found if row.state == "kept"]
    size = sum((Path(args.out) / row.key).with_suffix(s).stat().st_size for row in kept for s in (".b2nd", ".npy")
               if (Path(args.out) / row.key).with_suffix(s).exists())  # fmt: skip
    raw = sum(row.bytes for row in kept)
    print(
        f"{len(kept)} scans in {args.out} ({size / 2**20:.1f} MiB, {raw / 2**20:.1f} as int16), {len(bad)} quarantined"
    )
    print(f"next: python ssl/train.py --data.root {args.out}")
    return 1 if bad or not kept else 0
