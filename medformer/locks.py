"""Locks between processes: one writer for a run's folder, with a heartbeat, and one maker for a stored scan.

`filelock` takes them with flock(2): the kernel drops the lock of a process that dies, so none is ever stale. That holds
on local disks, and on NFS where the server runs a lock manager (NFSv4 always does). On a file system without flock a
marker file takes its place, which is taken over when the process it names is gone from this machine.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medformer.errors import UserError
from medformer.files import naming

__all__ = ["HEARTBEAT", "Claim", "heartbeat", "held", "take"]

HEARTBEAT = "heartbeat.json"
_LOCK = ".lock"
_ORPHANS = 60.0  # seconds that the children of a killed process may still hold its lock
_BEAT = 10.0  # seconds between two heartbeats
_NONE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def take(path: Path, patience: float = 0.0) -> FileLock | None:
    """The lock, to be released by the caller; None while another process holds it, after `patience` seconds.

    Raises:
        UserError: the folder cannot be written, or its file system knows no locks.
    """
    lock = FileLock(path, thread_local=False)
    with _knowing(path):
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return None
    return lock


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for the lock and hold it. Raises UserError as `take` does."""
    lock = FileLock(path, thread_local=False)
    with _knowing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _knowing(path: Path) -> Iterator[None]:
    try:
        with naming(path):
            yield
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NONE:
            raise UserError(
                f"{path.parent} lies on a file system without locks ({cause.strerror}); choose a folder on another one"
            ) from cause
        raise


class Claim:
    """A folder that this process alone writes until `close`.

    Args:
        flag: of the command line that names the folder, for the error.
        way_out: what to do where another process writes it.

    Raises:
        UserError: another process writes it, or it cannot be written.
    """

    def __init__(self, path: Path, flag: str, way_out: str) -> None:
        self.path = path
        # Workers of a loader hold the lock for some seconds more than the process that was killed.
        lock = take(path / _LOCK, patience=0 if _writer_lives(path) else _ORPHANS)
        if lock is None:
            raise UserError(f"{flag} {path}: {_writer(path)} is writing there; {way_out}", 2)
        self._lock = lock
        self._last, self._said = -math.inf, {"pid": os.getpid(), "host": socket.gethostname()}
        self.beat(state="reading scans")

    def beat(self, *, force: bool = False, **now: Any) -> None:
        """Say in heartbeat.json that this goes on and how far it is; every ten seconds at most, unless `force`."""
        clock = time.monotonic()
        if force or clock - self._last >= _BEAT:
            self._last = clock
            content = json.dumps({**self._said, **now, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
            draft = self.path / f".{HEARTBEAT}.partial"  # of no use after a crash: not worth an fsync
            with naming(self.path / HEARTBEAT):
                draft.write_text(content + "\n")
                os.replace(draft, self.path / HEARTBEAT)

    def close(self) -> None:
        """Let others write; a folder in which nothing was written is gone again."""
        if {path.name for path in self.path.iterdir()} <= {_LOCK, HEARTBEAT}:
            shutil.rmtree(self.path)
        self._lock.release()


def heartbeat(folder: Path) -> dict[str, Any]:
    """What the process that writes there said last; {} where it said nothing."""
    try:
        found = json.loads((folder / HEARTBEAT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _writer(folder: Path) -> str:
    """Who writes there, as the heartbeat says."""
    beat = heartbeat(folder)
    if not {"pid", "host", "time"} <= beat.keys():
        return "another process"
    step = f", step {beat['step']}" if "step" in beat else ""
    return f"process {beat['pid']} on {beat['host']} (at {beat['time']}{step})"


def _writer_lives(folder: Path) -> bool:
    """False where the process of the last heartbeat ran on this machine and is gone."""
    beat = heartbeat(folder)
    if beat.get("host") != socket.gethostname() or not isinstance(beat.get("pid"), int):
        return True
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
