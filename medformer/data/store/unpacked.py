"""Zip files of scans, unpacked once into a cache."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import nullcontext
from pathlib import Path

from medformer.data.archives import sniff_zip, unpack
from medformer.data.store.entries import key_of
from medformer.data.store.limit import Use
from medformer.locks import held

__all__ = ["unpacked"]


def unpacked(root: str, cache: Path, use: Use | None) -> str:
    """A zip file's content, unpacked once into the cache so that a later run finds what it stored; else the root."""
    with open(root, "rb") if os.path.isfile(root) else nullcontext() as file:
        if file is None or not sniff_zip(file.read(4)):
            return root
    target = cache / f"unpacked-{key_of([root])}"
    if use is not None:
        use.note(target.name)
    if not target.is_dir():
        draft = cache / f".draft-{uuid.uuid4().hex}"
        with held(cache / ".locks" / "unpacking"):
            try:
                draft.mkdir()
                if not target.is_dir():  # another run may have unpacked it since
                    unpack(root, str(draft))
                    draft.rename(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        if use is not None:
            use.added(target.name)
    return str(target)
