"""Names of files and folders, which may be those of patients, and the short ids that stand for them.

An id is a salted hash: the same for the same name and salt, and no way back without the salt. The salt lies in a file
of its own, readable by its owner; who has it can try names.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medformer.data.records import hash_patient, new_salt
from medformer.locks import held

__all__ = ["Ids", "hide", "ids_of_run", "known_modality", "salt_of"]

_MODALITIES = {"CT", "MR", "PT", "NM", "US", "MG", "DX", "CR", "XA", "RF", "OT", "unknown"}
_SALT_BYTES = 16  # fewer are no salt
_PIECE = re.compile(r"[^\s/\\'\"`,:;()\[\]{}<>=|]+")
_SHORT = re.compile(r".{1,2}|\d{1,4}", re.S)  # names nobody, and stands in many messages


def salt_of(folder: Path) -> bytes:
    """The salt in `folder`, made there where there is none.

    A file that holds none (empty, or below 16 bytes) hides nothing: it is made anew, with a warning, and names that
    were hashed with it have other ids from then on.
    """
    path = folder / "salt"
    if path.exists() and len(salt := path.read_bytes()) >= _SALT_BYTES:
        return salt
    if path.exists():
        path.unlink()
        warnings.warn(f"{path}: no salt in it ({len(salt)} bytes); made anew, ids change", stacklevel=2)
    with held(folder / ".salt.lock"):  # several machines may begin a store together
        if not path.exists():
            draft = path.with_name(".salt.partial")
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(new_salt())
            draft.rename(path)
    return path.read_bytes()


class Ids:
    """Ids for names, and texts without the names."""

    def __init__(self, salt: bytes, names: Iterable[str] = ()) -> None:
        """names: files and folders that texts may mention."""
        self._salt = salt
        self._pieces = _pieces(names)

    def of(self, name: str) -> str:
        """scan-1f2e3d4c5b."""
        return f"scan-{hash_patient(name, self._salt)[:10]}"

    def hide(self, text: str, name: str = "") -> str:
        """A message without `name` and the names known, or any part of them."""
        return _without(text, self._pieces | _pieces([name]))


def ids_of_run(run: Mapping[str, Any], asked: str | None, names: Iterable[str] = ()) -> Ids | None:
    """Ids where they are asked for, or where the run's own settings (config.yaml as a dictionary) say so.

    asked: "files", "ids", or None to do as the run. The salt is that of the run's cache, so ids are the run's own.
    """
    data = run.get("data") or {}
    if (asked or data.get("names")) != "ids":
        return None
    cache = Path(data.get("cache") or Path("runs") / "cache")
    cache.mkdir(parents=True, exist_ok=True)
    return Ids(salt_of(cache), names)


def known_modality(modality: str) -> str:
    """The modality, or "other": a header can call it anything."""
    return modality if modality in _MODALITIES else "other"


def hide(text: str, names: Iterable[str]) -> str:
    """A message in which `...` stands for every part of `names`, paths or files."""
    return _without(text, _pieces(names))


def _without(text: str, pieces: frozenset[str]) -> str:
    hidden = _PIECE.sub(lambda found: "..." if found[0].strip(".") in pieces else found[0], text)
    return re.sub(r"^(\.\.\.[/\\ ]*)+: ", "", hidden)


def _pieces(names: Iterable[str]) -> frozenset[str]:
    """What a message may show of names: parts of paths, and words in them."""
    found = {piece.strip(".") for name in names for piece in _PIECE.findall(name)}
    found |= {piece.partition(".")[0] for piece in found}  # without its ending
    return frozenset(piece for piece in found if piece and not _SHORT.fullmatch(piece))
