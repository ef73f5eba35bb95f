"""A training store from any mix of data sets: `medformer prepare --out STORE lidc_idri=DIR mrnet=DIR folder=DIR`.

Every volume is an entry of its own, complete once its sidecar is there, so a build may be killed at any point and
started again: what is complete stays, what failed stays in quarantine until its files change. The index (SQLite) is
written by this process alone, a row at a time. It names patients by a salted hash; neither it nor the sidecars hold
header values that are not on the allow-list of medformer.data.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import os
import sqlite3
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from tqdm import tqdm

from medformer.data import ScanError
from medformer.data.datasets import DATASETS, adapter
from medformer.data.datasets.joins import DataSetWarning
from medformer.data.modality import by_values, decide
from medformer.data.names import hide, salt_of
from medformer.data.records import Record, hash_patient, patient_split
from medformer.data.sequences import patterns_of
from medformer.data.store.case_records import (
    case_records,
    cases_decided,
    given_words,
    is_case,
    kept_case,
)
from medformer.data.store.catalogue import publish
from medformer.data.store.entries import Stored, keep, key_of, look_up, mended, serve, served, taken_as
from medformer.data.store.index import INDEX, SHARDS, Row, rows
from medformer.errors import UserError

__all__ = ["build", "main"]

_AHEAD = 4  # tasks a worker has waiting
_SHOWN = 5  # parts of a path that a message may show


def build(
    records: Iterable[Record],
    store: Path,
    *,
    workers: int = 0,
    retry: bool = False,
    progress: bool = False,
    modality: str | None = None,
    shard: tuple[int, int] | None = None,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Add records to a store; those in it are only looked up. Returns all rows of the index.

    shard: the number of this machine and of all, (3, 16) for the third of sixteen that write one store: it reads its
    share of the records into an index of its own. A last call without `shard` takes what they stored and makes the
    decisions that need all scans of a folder; without it the store is not complete.

    workers: processes that read and write; 0 does it here. retry: read again what is in quarantine. modality: what the
    scans are whose files do not say; None: one decision a folder, as training on it makes, said where it was not of one
    mind, and made anew when a folder has grown.

    Raises UserError where the store cannot be written or a worker dies.
    """
    store.mkdir(parents=True, exist_ok=True)
    old = (store / "salt").read_bytes() if (store / "salt").exists() else None
    salt = salt_of(store)
    if old is not None and old != salt:  # it was none, and hid nothing: nor do the names in the index
        (store / INDEX).unlink(missing_ok=True)
    tasks = {key: (record, name) for record in records for key, name in [_named(record, salt)]}
    refused = {row.key: row for part in sorted(store.glob(SHARDS)) for row in rows(store, part.name)}
    refused = {key: row for key, row in refused.items() if row.state == "quarantined" and key in tasks}
    name_of_index = INDEX
    if shard is not None:
        number, count = shard
        name_of_index = SHARDS.replace("*", f"{number}-of-{count}")
        tasks = {key: task for key, task in tasks.items() if int(key, 16) % count == number - 1}
    with closing(sqlite3.connect(store / name_of_index, timeout=60)) as index:
        columns = ", ".join(f"{f.name} {'integer' if f.name == 'bytes' else 'text'} not null" for f in fields(Row))
        index.execute(f"create table if not exists scans ({columns}, primary key (key))")
        done = dict(index.execute("select key, state from scans"))
        if shard is None and not retry:
            new = [row for key, row in refused.items() if key not in done]
            _write(index, new)
            done |= {row.key: row.state for row in new}
        todo: list[_Task] = []
        for key, (record, name) in tasks.items():
            if mended(store / key, name, lambda line: print(line, file=sys.stderr)) is None:
                if done.get(key) != "quarantined" or retry:
                    todo.append((key, record, name, _given(record, modality)))
            elif done.get(key) != "kept" or not served(store / key):  # killed before its row; of before 2026-12-02
                todo.append((key, record, name, None))
        _work(todo, store, salt, workers, index, "scans", progress)
        if shard is None:
            decided = _decided(tasks, store, modality, say) + cases_decided(tasks, store, modality, say)
            _work(decided, store, salt, workers, index, "scans of another mind", progress)
    if shard is None:
        publish(store)
    return rows(store, name_of_index)


# Key, record, name, and what the scan is taken as; None: as its file or its values say.
_Task = tuple[str, Record, str, str | None]


def _work(
    todo: list[_Task], store: Path, salt: bytes, workers: int, index: sqlite3.Connection, what: str, progress: bool
) -> None:
    bar = tqdm(total=len(todo), desc=what, unit="scan", disable=None if progress and todo else True)
    for row in _results(todo, store, salt, workers):
        _write(index, [row])
        bar.update()
    bar.close()


def _write(index: sqlite3.Connection, some: list[Row]) -> None:
    for row in some:
        values = asdict(row)
        marks = ", ".join("?" * len(values))
        index.execute(f"insert or replace into scans ({', '.join(values)}) values ({marks})", tuple(values.values()))
    index.commit()


def _given(record: Record, modality: str | None) -> str | None:
    """What the caller says of files that do not."""
    if is_case(record):
        return given_words(record, modality)
    return modality if _silent(record) else None


def _silent(record: Record) -> bool:
    """Whether it is a scan whose files do not say what it is."""
    return record.scan is not None and record.scan.kind not in {"image", "npy"} and record.scan.modality == "unknown"


def _decided(
    tasks: dict[str, tuple[Record, str]], store: Path, modality: str | None, say: Callable[[str], object]
) -> list[_Task]:
    """Entries that are not stored as their folder decides, or as `modality` says."""
    roots: dict[str, dict[str, tuple[str, Record, Stored]]] = defaultdict(dict)
    for key, (record, name) in tasks.items():
        if record.scan is not None and _silent(record) and (stored := look_up(store / key, name)) is not None:
            roots[record.info.get("root", "")][record.scan.name] = (key, record, stored)
    todo: list[_Task] = []
    for found in roots.values():
        taken = dict.fromkeys(found, modality)
        if modality is None:
            voters = {n: (s.by_values, s.could_be_hu) for n, (_, _, s) in found.items() if s.guessed and not s.labels}
            vote = decide(voters, flag="--modality", called=partial(_called, found))
            taken = {n: vote.modality.get(n, s.by_values) for n, (_, _, s) in found.items() if s.guessed}
            for line in vote.lines:
                say(f"vote: {line}")
        for name, (key, record, stored) in found.items():
            if (wanted := taken.get(name)) is not None and wanted != stored.modality:
                todo.append((key, record, stored.name, wanted))
    return todo


def _called(found: dict[str, tuple[str, Record, Stored]], name: str) -> str:
    """What the store calls a scan; folders have no name in it."""
    return found[name][2].name if name in found else "a folder"


def _results(todo: list[_Task], store: Path, salt: bytes, workers: int) -> Iterator[Row]:
    if workers <= 0 or len(todo) < 2:
        yield from (_one(*task, store, salt) for task in todo)
        return
    waiting: set[Future[Row]] = set()
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for task in todo:
                waiting.add(pool.submit(_one, *task, store, salt))
                if len(waiting) >= _AHEAD * workers:
                    ready, waiting = wait(waiting, return_when="FIRST_COMPLETED")
                    yield from (future.result() for future in ready)
            yield from (future.result() for future in wait(waiting).done)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads scans died, most likely out of memory; run again with fewer --workers: all that is "
            "complete stays"
        ) from error


def _one(key: str, record: Record, name: str, taken: str | None, store: Path, salt: bytes) -> Row:
    shape, size, state, reason = "", 0, "kept", ""
    try:
        stored = look_up(store / key, name)
        if is_case(record):
            stored = kept_case(record, store / key, name, stored, taken)
        elif taken is not None and (stored is None or stored.modality != taken):
            volume = taken_as(record.read(modality=taken), taken)
            own = by_values(volume.voxels) if stored is None else stored.by_values
            stored = keep(volume, store / key, name, record.paths, own, served=True)
        elif stored is None:
            stored = keep(record.read(), store / key, name, record.paths, served=True)
        elif not served(store / key):
            serve(store / key)
        shape, size = "x".join(map(str, stored.shape)), 2 * math.prod(stored.shape) * len(stored.there)
    except (ScanError, MemoryError) as error:
        state, reason = "quarantined", _unnamed(str(error) or "more memory than there is", record)
    return Row(
        key=key, name=name, dataset=record.dataset, patient=hash_patient(record.patient, salt),
        split=record.split or "", modality=record.modality, shape=shape, bytes=size, state=state, reason=reason,
    )  # fmt: skip


def _unnamed(reason: str, record: Record) -> str:
    """Without the names of files and folders, which may be those of patients."""
    return hide(reason, {part for path in record.paths for part in Path(path).parts[-_SHOWN:]})


def _named(record: Record, salt: bytes) -> tuple[str, str]:
    key = record.info["key"] if is_case(record) else key_of(record.paths)
    if "index" in record.info or (record.scan is not None and record.scan.repeat):
        part = str(record.info.get("index", "")) + str(record.info.get("array", ""))
        part += record.scan.repeat if record.scan is not None else ""
        key = hashlib.sha256(f"{key}|{part}".encode()).hexdigest()[:24]
    return key, f"{record.dataset}/{hash_patient(record.patient, salt)}/{key[:8]}"


def _records(sources: list[str], split: str, channels: Sequence[str] = (), missing: bool = False) -> list[Record]:
    out: list[Record] = []
    for source in sources:
        if channels:
            found, notes = case_records(source, channels, missing)
            if notes:
                print(f"left out: {len(notes)} of {len(notes) + len(found)} cases", file=sys.stderr)
            for note in notes:
                print(f"  {note}", file=sys.stderr)
            out += found
            continue
        name, equals, root = source.partition("=")
        name, root = (name, root) if equals else ("folder", source)
        if name not in DATASETS:
            raise UserError(f"{source}: data set {name!r} must be one of {', '.join(DATASETS)}", 2)
        if not Path(root).is_dir():
            file = "is a file, must be a folder; unpack it, or name the folder it lies in"
            raise UserError(f"{source}: {file if Path(root).exists() else 'no such folder'}", 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataSetWarning)  # printed as notes
            found = adapter(name).scan(root)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        out += found
    parts = patient_split(out)
    return out if split == "all" else parts[split]


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 1 to N, like 3/16")
    return int(number), int(count)


def main(arguments: list[str] | None = None) -> int:
    """0: everything is kept. 1: something is in quarantine, or nothing could be done. 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="medformer prepare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "sources", nargs="+", help=f"DATASET=DIR, or DIR for a plain folder; data sets: {', '.join(DATASETS)}"
    )
    parser.add_argument("--out", required=True, help="folder of the store; what is in it is kept and added to")
    parser.add_argument("--split", default="train", choices=["train", "valid", "test", "all"], help="patients to take")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 reads in this one")
    parser.add_argument(
        "--modality", help="what scans are whose files do not say, CT or MR for instance; default: as most of a folder"
    )
    parser.add_argument("--retry", action="store_true", help="read again what is in quarantine")
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="read the I-th of N parts, one on each machine; then once without"
    )
    parser.add_argument(
        "--channels", metavar="NAME=PATTERN,...", help="each folder is a case of several files, or each row of a .csv "
        "of NAME,...: t1=*T1*.nii.gz,flair=*FLAIR*.nii.gz",
    )  # fmt: skip
    parser.add_argument("--missing", action="store_true", help="take cases that lack some of the channels")
    args = parser.parse_args(arguments)
    try:
        channels = list(filter(None, (args.channels or "").split(",")))
        records = _records(args.sources, args.split, channels, args.missing)
        found = build(
            records, Path(args.out), workers=args.workers, retry=args.retry, progress=True, modality=args.modality,
            shard=args.shard,
        )  # fmt: skip
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
    arrays = (path for row in kept for end in ("b2nd", "npy") for path in Path(args.out).glob(f"{row.key}*.{end}"))
    size = sum(path.stat().st_size for path in arrays if not path.name.endswith((".points.npy", ".chunks.npy")))
    raw = sum(row.bytes for row in kept)
    print(
        f"{len(kept)} scans in {args.out} ({size / 2**20:.1f} MiB, {raw / 2**20:.1f} as int16), {len(bad)} quarantined"
    )
    if args.shard:
        print(f"part {args.shard[0]} of {args.shard[1]}; when all are done: the same command once without --shard")
    else:
        taken = f" --data.channels {','.join(patterns_of(channels))}" if channels else ""
        print(f"next: medformer pretrain --data.root {args.out}{taken}{' --data.missing true' * args.missing}")
    return 1 if bad or not kept else 0
