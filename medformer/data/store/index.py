"""The index of a store (SQLite): a row a scan, kept or quarantined."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

from medformer.errors import UserError

__all__ = ["INDEX", "SHARDS", "Row", "is_store", "rows"]

INDEX = "index.sqlite"  # of a store that build.py made
SHARDS = "shard-*.sqlite"  # of machines that make one together


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


def is_store(folder: Path) -> bool:
    """Whether `medformer prepare` made it. Raises UserError where it is not complete."""
    if (folder / INDEX).is_file():
        return True
    if parts := len(list(folder.glob(SHARDS))):
        raise UserError(f"{folder} holds {parts} parts of a store; run the same medformer prepare once without --shard")
    return False


def rows(store: Path, name: str = INDEX) -> list[Row]:
    """The index, by key. Raises UserError for a damaged one."""
    try:
        with closing(sqlite3.connect(f"{(store / name).absolute().as_uri()}?mode=ro", uri=True)) as index:
            names = ", ".join(f.name for f in fields(Row))
            return [
                Row(**dict(zip([f.name for f in fields(Row)], row, strict=True)))
                for row in index.execute(f"select {names} from scans order by key")
            ]
    except sqlite3.Error as error:
        raise UserError(f"index of {store} cannot be read ({error}); delete {name} and build again") from error
