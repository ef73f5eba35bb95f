"""Scans of a store on a server (HTTP, S3, whatever fsspec opens), read by ranges, in pieces that are kept on this disk.

Nothing that comes is trusted: every piece has a hash in the store's catalogue. What fails is tried again with growing
pauses; what fails for `patience` seconds, is not there or is not what was prepared is an error that names the scan.
"""

from __future__ import annotations

import importlib.util
import io
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.intensity import Scaling
from medformer.data.store.ahead import Threads
from medformer.data.store.arrays import MAX_OPEN, Scaled
from medformer.data.store.chunks import Chunked, Grid
from medformer.data.store.limit import entries_size
from medformer.data.store.pieces import Pieces, digest, pieces_size
from medformer.errors import UserError

__all__ = ["Far", "Place", "RemoteError", "is_url", "open_far", "place_of", "read_whole", "split_roots"]

_STREAMS = 32  # requests of a process at a time
_PATIENCE = 120.0  # seconds that a server may fail
_PAUSES = (0.1, 10.0)  # seconds before the second try, and at most
_SILENCE = 30.0  # without a byte of an answer
_QUIET = 5.0  # seconds of failing that are not said
_WRONG = 3  # tries of what comes whole, but is not what it should be
_NO_LIMIT = 100 * 10**9  # bytes kept where no limit is given,
_SHARE = 0.8  # and no more of what is free
_FINAL = (400, 401, 403, 404, 405, 410, 416, 501)  # of HTTP: another try would not help
_jitter = random.Random()  # its own: `random`'s state belongs to the caller


class RemoteError(ScanError):
    """What a server does not give, or gives wrongly."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A store on a server, and how what comes from it is kept."""

    url: str
    """Of its folder."""
    cache: str
    limit: int | None
    """Bytes of the whole cache."""
    patience: float
    """Seconds that the server may fail."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Far:
    """Where a scan of such a store lies."""

    place: Place
    key: str
    scaling: Scaling
    grid: Grid
    points: tuple[int, str]
    """Length and hash of its .points.npy."""
    table: tuple[int, str]
    """And of its .chunks.npy."""


def is_url(root: str) -> bool:
    """Whether it has a scheme, as http://host/store."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", root) is not None


def split_roots(text: str) -> list[str]:
    """The roots in a list parted by colons.

    Pieces that joined by a colon name something that exists are one. A URL goes on up to a piece that exists, or begins
    as a path (/ or . or ~) or a URL does; a colon and slash in it is written %3A/.
    """
    pieces, out = text.split(os.pathsep), []
    while pieces:
        if _begins_url(pieces):
            ends = (n for n in range(2, len(pieces)) if _begins_root(pieces[n:]))
            count = next(ends, len(pieces))
        else:
            joined = (n for n in range(len(pieces), 1, -1) if os.path.exists(os.pathsep.join(pieces[:n])))
            count = next(joined, 1)
        out.append(os.pathsep.join(pieces[:count]))
        pieces = pieces[count:]
    return [root for root in out if root]


def _begins_url(pieces: list[str]) -> bool:
    return len(pieces) > 1 and pieces[1].startswith("//") and is_url(f"{pieces[0]}://")


def _begins_root(pieces: list[str]) -> bool:
    return pieces[0].startswith(("/", ".", "~")) or os.path.exists(pieces[0]) or _begins_url(pieces)


def place_of(url: str, cache: Path, limit: int | None) -> Place:
    """`url` as it is used. Raises UserError where it holds what does not belong there."""
    scheme, _, rest = url.partition("://")
    if "@" in rest.split("/")[0]:
        raise UserError(
            f"--data.root {scheme}://...@...: a password does not belong into a flag, which the run's config keeps; "
            "put it into ~/.netrc, or fsspec's own configuration", 2
        )  # fmt: skip
    if found := re.search(r"[?#]", rest):
        raise UserError(f"--data.root {url}: {found[0]!r} must be written %{ord(found[0]):X}; queries are not taken", 2)
    if limit is None:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free + pieces_size(cache)
        limit = entries_size(cache) + min(_NO_LIMIT, int(_SHARE * free))
    return Place(url=url.rstrip("/"), cache=str(cache), limit=limit, patience=_PATIENCE)


def read_whole(place: Place, name: str, right: Callable[[bytes], bool]) -> bytes:
    """A file of the store.

    Raises:
        RemoteError: it is not there, or the server fails.
        UserError: the server has no ranges, or fsspec lacks what the address needs.
    """
    link, path = _link(place.url), f"{place.url}/{name}"
    some = _persistent(partial(link.get, path, 0, 16), path, place.patience, lambda data: len(data) >= 16)
    if len(some) != 16:
        raise UserError(
            f"--data.root {place.url}: the server does not answer requests of ranges (python -m http.server does not; "
            "nginx, Apache, S3 and MinIO do)"
        )
    return _persistent(partial(link.get, path), path, place.patience, right)


def open_far(far: Far, name: str) -> tuple[Scaled, np.ndarray]:
    """Voxels as the network sees them, fetched by the crop, and the places in its tissue; `name`: for errors."""
    return _opened(far, name)


@lru_cache(maxsize=MAX_OPEN)
def _opened(far: Far, name: str) -> tuple[Scaled, np.ndarray]:
    ends = {".points.npy": far.points, ".chunks.npy": far.table}
    points, table = (
        np.load(io.BytesIO(data), allow_pickle=False)
        for data in _fetch(far.place, name, [(f"{far.key}{end}", 0, *seal) for end, seal in ends.items()])
    )

    def fetch(wanted: list[tuple[int, int, str]]) -> list[bytes]:
        return _fetch(far.place, name, [(f"{far.key}.b2nd", *each) for each in wanted])

    return Scaled(Chunked(far.grid, table, fetch), far.scaling), points


def _fetch(place: Place, scan: str, wanted: Sequence[tuple[str, int, int, str]]) -> list[bytes]:
    """File, offset, length and hash to bytes: those that are not kept here are asked for at once."""
    kept = _pieces(place.cache, place.limit)
    found: list[bytes | Future[bytes] | None] = [kept.get(name) for *_, name in wanted]
    missing = [i for i, data in enumerate(found) if data is None]
    if missing:
        link = _link(place.url)
        for i in missing:
            found[i] = link.once(wanted[i], _piece, place, kept, scan, *wanted[i])
    return [data.result() if isinstance(data, Future) else data for data in found if data is not None]


def _piece(place: Place, kept: Pieces, scan: str, file: str, start: int, length: int, name: str) -> bytes:
    path = f"{place.url}/{file}"
    read = partial(_link(place.url).get, path, start, start + length)
    try:
        data = _persistent(
            read, path, place.patience,
            lambda data: len(data) == length and digest(data, len(name) // 2) == name, length,
        )  # fmt: skip
    except RemoteError as error:
        raise RemoteError(f"{scan}: {error}") from error
    kept.put(name, data)
    return data


def _persistent(
    read: Callable[[], bytes], path: str, patience: float, right: Callable[[bytes], bool], length: int = 0
) -> bytes:
    """What `read` gives, once it is `right`; `length`: below it, it was cut off. Raises RemoteError."""
    began, pause, tries, wrong, cause = time.monotonic(), _PAUSES[0], 0, 0, None
    while True:
        tries += 1
        try:
            data = read()
            if right(data):
                return data
            reason = f"{len(data)} bytes came of {length}"
            if len(data) >= length:
                wrong += 1
                reason = "what comes is not what was prepared (checksum): changed since the run began, or damaged"
        except Exception as error:
            reason, cause = _reason(error), error
            if _final(error):
                raise RemoteError(f"{path}: {reason}") from error
        if wrong == _WRONG:
            raise RemoteError(f"{path}: {reason}; prepare the store again, then go on with --resume") from cause
        failing = time.monotonic() - began
        if failing + pause > patience:
            raise RemoteError(f"{path}: {reason}; {tries} tries in {failing:.0f} s") from cause
        if failing > _QUIET:
            _say_once_a_minute(f"WARNING: {path}: {reason}; trying again for {patience - failing:.0f} s")
        time.sleep(pause * _jitter.uniform(0.5, 1))
        pause = min(2 * pause, _PAUSES[1])


def _reason(error: Exception) -> str:
    status, words = getattr(error, "status", None), getattr(error, "message", "")
    if isinstance(status, int):
        return f"HTTP {status} {words}".strip()
    if isinstance(error, FileNotFoundError):
        return "not there"
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


def _final(error: Exception) -> bool:
    """Whether another try would not help."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in _FINAL
    kinds = FileNotFoundError | PermissionError | NotImplementedError | TypeError | ValueError
    return isinstance(error, kinds) or type(error).__name__ == "NoCredentialsError"  # of S3


_said_at = -60.0


def _say_once_a_minute(line: str) -> None:
    global _said_at
    if time.monotonic() - _said_at >= 60:
        _said_at = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class _Link:
    """fsspec's way to a store, of one process."""

    def __init__(self, url: str) -> None:
        self._threads = Threads(_STREAMS, "streams")
        self._lock = threading.Lock()
        self._asked: dict[Any, Future[bytes]] = {}
        scheme = url.partition("://")[0].lower()
        needed = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}.get(scheme)
        if importlib.util.find_spec("fsspec") is None or (needed and importlib.util.find_spec(needed) is None):
            extra = "pip install s3fs" if needed == "s3fs" else "pip install -e '.[remote]'"
            raise UserError(f"--data.root {url}: needs {needed or 'fsspec'}, which is not installed; {extra}", 2)
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True}
        if needed == "aiohttp":
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE),
                "trust_env": True,  # proxies, and names and passwords in ~/.netrc
                "headers": {"Accept-Encoding": "identity"},  # ranges are of the file as it is
            }
        try:
            self.files = fsspec.filesystem(scheme, **options)
        except (ValueError, ImportError) as error:
            raise UserError(f"--data.root {url}: {' '.join(str(error).split())}", 2) from error

    def once(self, what: Any, call: Callable[..., bytes], *args: Any) -> Future[bytes]:
        """A call by one of the threads, the same one for all who ask for `what` meanwhile."""
        with self._lock:
            if (asked := self._asked.get(what)) is not None:
                return asked
            future = self._asked[what] = self._threads.submit(call, *args)
        future.add_done_callback(lambda _: self._asked.pop(what, None))
        return future

    def get(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        return self.files.cat_file(path, start=start, end=end)


_links: dict[tuple[int, str], _Link] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    _pieces.cache_clear()


def _link(url: str) -> _Link:
    """A connection does not follow into a fork: each process has its own."""
    with _lock:
        if (os.getpid(), url) not in _links:
            _links[os.getpid(), url] = _Link(url)
        return _links[os.getpid(), url]


@lru_cache(maxsize=8)
def _pieces(cache: str, limit: int | None) -> Pieces:
    return Pieces(Path(cache), lambda: None if limit is None else max(0, limit - entries_size(Path(cache))))


os.register_at_fork(after_in_child=_after_fork)
