"""A folder of results: whether it can be written, before an hour is spent on what goes into it."""

from __future__ import annotations

import os
from pathlib import Path

from medformer.errors import UserError

__all__ = ["tried"]


def tried(out: Path) -> None:
    """Make the folder and a file in it, which goes again. UserError where that cannot be."""
    probe = out / f".try-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; give a folder that can be written") from error
