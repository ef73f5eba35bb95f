"""Files that are complete or not there."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medformer.errors import UserError

__all__ = ["byte_count", "naming", "write_whole"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def byte_count(text: int | str) -> int:
    """Bytes, from a number or text such as '800 MB' and '2 GiB'. Raises ValueError."""
    units = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    units |= {f"{unit}i": 2**power for unit, power in zip("kmgt", (10, 20, 30, 40), strict=True)}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(text).lower())
    if not found or isinstance(text, bool):
        raise ValueError(f"{text!r} must be bytes, or text such as '800 MB' and '2 GiB'")
    return int(float(found[1]) * units[found[2] or ""])


def write_whole(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Write a file so that its name only ever shows a complete one: temporary name, fsync, rename.

    Raises:
        UserError: the disk is full or refuses; what was under the name before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    failure: OSError | None = None

    class Watched(io.BufferedWriter):
        # torch's zip writer turns an OSError from here into a RuntimeError about its own position: keep the cause.
        def write(self, data: Any, /) -> int:
            nonlocal failure
            try:
                return super().write(data)
            except OSError as error:
                failure = error
                raise

    try:
        with naming(path):
            try:
                with Watched(io.FileIO(draft, "w")) as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            except RuntimeError as error:
                if failure is not None:
                    raise failure from error
                raise
            os.replace(draft, path)
            folder = os.open(path.parent, os.O_RDONLY)  # the rename reaches the disk with its folder
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of what is written under `path` as a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{_cannot_write(path, error)}") from error


def _cannot_write(path: Path, error: OSError) -> str:
    full = error.errno in _FULL
    way_out = (
        "make room there, or choose another --out or --data.cache" if full else "check the path and its permissions"
    )
    return f"cannot write {path}: {error.strerror or error}; {way_out}"
