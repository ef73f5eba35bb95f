"""Pieces of remote stores on this disk: each a file that is named by the hash of what it holds.

So a piece is right or it is none: what a kill, a full disk or a flipped bit left is not what its name says, and is
fetched again; what changed on the server has another name; and processes share pieces without knowing of each other.
There is a limit, kept for each of 16 folders: the pieces used longest ago go first. One that is being read may go,
since it is read as a whole.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from medformer.errors import UserError
from medformer.locks import held

__all__ = ["FOLDER", "Pieces", "digest", "pieces_size", "trim"]

FOLDER = "pieces"  # in a cache
_SHARDS = "0123456789abcdef"
_ROOM = 0.9  # of the limit that is left in use where room is made
_DAY = 86400.0


def digest(data: bytes, width: int = 16) -> str:
    """Hexadecimal BLAKE2b of `width` bytes."""
    return hashlib.blake2b(data, digest_size=width).hexdigest()


class Pieces:
    """The pieces in a cache.

    Args:
        limit: their bytes at most, asked for once; None: no limit.
    """

    def __init__(self, cache: Path, limit: Callable[[], int | None]) -> None:
        self.folder = cache / FOLDER
        self._limit = limit
        self._budget: int | None = None
        self._asked = False
        self._full = False  # the disk, which was said
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """A piece, None where it is not here as its name says; a damaged one is removed and said."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        if digest(data, len(name) // 2) == name:
            return data
        try:
            path.unlink()
        except FileNotFoundError:  # by another thread, which says so
            return None
        print(f"WARNING: {path} was cut short or changed; it is fetched again", file=sys.stderr, flush=True)
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keep a piece; where the disk refuses, that is said once, and nothing is kept from here on."""
        if self._full:
            return
        path = self._path(name)
        draft = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(data)  # no fsync: what a crash leaves of it is found by its hash
            os.replace(draft, path)
            self._count(path.parent, len(data))
        except (OSError, UserError) as error:
            draft.unlink(missing_ok=True)
            with self._lock:
                said, self._full = self._full, True
            if said:
                return
            reason = error.strerror if isinstance(error, OSError) else str(error)
            print(
                f"WARNING: {self.folder} cannot be written ({reason}): what is read of the remote store is not kept "
                "from here on, and is fetched each time; make room, or choose another --data.cache",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _path(self, name: str) -> Path:
        return self.folder / name[0] / name

    def _count(self, shard: Path, size: int) -> None:
        with self._lock:
            if not self._asked:
                self._budget, self._asked = self._limit(), True
        if self._budget is None:
            return
        budget = self._budget // len(_SHARDS)
        with held(shard / ".lock"):
            known = _said(shard)
            total = _trim(shard, None) if known is None else known + size
            if total > budget:
                total = _trim(shard, int(_ROOM * budget))
            (shard / ".size").write_text(str(total))


def pieces_size(cache: Path) -> int:
    """Bytes of all pieces there, as their folders have counted them."""
    return sum(_counted(cache / FOLDER / name) for name in _SHARDS)


def trim(cache: Path, limit: int) -> int:
    """Remove the pieces used longest ago until `limit` bytes are left; returns what is left."""
    left = 0
    for name in _SHARDS:
        shard = cache / FOLDER / name
        if shard.is_dir():
            with held(shard / ".lock"):
                total = _trim(shard, limit // len(_SHARDS))
                (shard / ".size").write_text(str(total))
            left += total
    return left


def _counted(shard: Path) -> int:
    known = _said(shard)
    return _trim(shard, None) if known is None else known


def _said(shard: Path) -> int | None:
    """The bytes of a folder as they were counted; None for a new one, and after a kill in between."""
    try:
        return int((shard / ".size").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _trim(shard: Path, limit: int | None) -> int:
    """Bytes that are left of a folder in which the oldest pieces were removed down to `limit`."""
    found: list[tuple[float, int, str]] = []
    try:
        with os.scandir(shard) as there:
            for file in there:
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue  # removed by another process
                if not file.name.startswith("."):
                    found.append((stat.st_mtime, stat.st_size, file.path))
                elif file.name.endswith(".partial") and stat.st_mtime < time.time() - _DAY:
                    Path(file.path).unlink(missing_ok=True)  # of a process that was killed
    except FileNotFoundError:
        return 0
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if limit is None or total <= limit:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
    return total
