"""A cache that runs share, kept below a size: what was used longest ago goes first, and nothing that a run uses.

Every run notes what it takes in a file of its own under `.uses/`, with a lock that dies with it. Who removes an entry
first takes it out of sight, then looks at the notes once more, and puts it back where somebody has noted it since.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medformer.data.store.pieces import pieces_size, trim
from medformer.errors import UserError
from medformer.files import naming
from medformer.locks import held, take

__all__ = ["Use", "entries_size", "shown"]

_FOLDERS = ("images-", "unpacked-")  # entries that are folders


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    used: int
    """When last, in nanoseconds."""
    marker: Path
    """Without it the entry is not there: a sidecar, or the folder."""
    files: tuple[Path, ...]


class Use:
    """What this process takes from a cache, until `close`.

    Args:
        limit: bytes of the whole cache; None: no limit.
    """

    def __init__(self, cache: Path, limit: int | None = None) -> None:
        self.cache, self.limit = cache, limit
        notes = cache / ".uses"
        with naming(notes):
            notes.mkdir(parents=True, exist_ok=True)
            self._path = notes / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._file = open(self._path, "w", buffering=1)  # noqa: SIM115
        self._lock = take(self._path.with_suffix(".lock"))
        self._total = 0 if limit is None else self.size()[0]

    def note(self, name: str) -> None:
        """Before the entry is looked for: nobody removes it from here on."""
        self._file.write(f"{name}\n")
        for marker in (self.cache / f"{name}.json", self.cache / name):
            if marker.exists():
                os.utime(marker)

    def added(self, name: str) -> None:
        """After an entry was written: make room for it.

        Raises:
            UserError: all that is left is in use.
        """
        if self.limit is None:
            return
        files = self.cache.glob(f"{name}.*") if not name.startswith(_FOLDERS) else (self.cache / name).rglob("*")
        self._total += sum(file.stat().st_size for file in files)
        if self._total > self.limit:
            self._shrink()

    def size(self) -> tuple[int, int]:
        """Bytes of the cache, and number of its entries."""
        sizes = [entry.size for entry in _entries(self.cache)]
        return sum(sizes) + pieces_size(self.cache), len(sizes)

    def close(self) -> None:
        """Let others remove what this process used."""
        self._file.close()
        self._path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()
        self._path.with_suffix(".lock").unlink(missing_ok=True)

    def _shrink(self) -> None:
        assert self.limit is not None
        with held(self.cache / ".locks" / "limit"):
            entries = sorted(_entries(self.cache), key=lambda entry: entry.used)
            self._total = sum(entry.size for entry in entries)
            self._total += trim(self.cache, max(0, self.limit - self._total))  # pieces of remote stores come again
            taken = self._taken()
            for entry in entries:
                if self._total <= self.limit:
                    return
                if entry.name not in taken and self._remove(entry):
                    self._total -= entry.size
        if self._total > self.limit:
            raise UserError(
                f"--data.cache_limit {shown(self.limit)}: what runs use of {self.cache} takes {shown(self._total)} so "
                "far, and this run is not read to its end; raise the limit, or train on fewer scans"
            )

    def _remove(self, entry: _Entry) -> bool:
        """False where a run has noted it meanwhile."""
        hidden = self.cache / f".gone-{uuid.uuid4().hex}"
        with held(self.cache / ".locks" / entry.name.removeprefix("images-")[:2]), naming(entry.marker):
            try:
                entry.marker.rename(hidden)
            except FileNotFoundError:
                return True
            if entry.name in self._taken():
                hidden.rename(entry.marker)
                return False
            for file in entry.files:
                file.unlink(missing_ok=True)
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
        return True

    def _taken(self) -> set[str]:
        """What living runs have noted; notes of dead ones are thrown away."""
        found: set[str] = set()
        for notes in self._path.parent.iterdir():
            if notes.suffix:
                continue
            if notes != self._path and (lock := take(notes.with_suffix(".lock"))) is not None:
                notes.unlink(missing_ok=True)
                lock.release()
                notes.with_suffix(".lock").unlink(missing_ok=True)
            else:
                found.update(notes.read_text().split("\n"))
        return found


def _entries(cache: Path) -> Iterator[_Entry]:
    parts: dict[str, list[os.DirEntry[str]]] = {}
    with os.scandir(cache) as there:
        for file in there:
            if file.is_file():
                parts.setdefault(file.name.split(".")[0], []).append(file)
            elif file.name.startswith(_FOLDERS):
                inside = sum(path.stat().st_size for path in Path(file.path).rglob("*"))
                yield _Entry(file.name, inside, file.stat().st_mtime_ns, Path(file.path), ())
    for name, files in parts.items():
        marker = next((file for file in files if file.name == f"{name}.json"), None)
        if marker is not None:
            size = sum(file.stat().st_size for file in files)
            arrays = tuple(Path(file.path) for file in files if file is not marker)
            yield _Entry(name, size, marker.stat().st_mtime_ns, Path(marker.path), arrays)


def entries_size(cache: Path) -> int:
    """Bytes of the entries of a cache, without the pieces of remote stores."""
    return sum(entry.size for entry in _entries(cache))


def shown(count: int) -> str:
    """1.2 GB."""
    power = next((p for p in range(3) if count < 1000 ** (p + 1)), 3)
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB')[power]}"
