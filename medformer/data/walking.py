"""The files below a folder, linked folders once each, and what a modality.txt among them says."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from medformer.data.modality import MODALITY_FILE

__all__ = ["NOWHERE", "Said", "Skipped", "walk"]

NOWHERE = "link to nothing"
"""Why a link is left out whose target is gone."""


@dataclass(frozen=True)
class Skipped:
    """A file or series left out, and why."""

    path: str
    reason: str
    refused: bool = False
    """True for a scan that cannot be read right, False for what is no scan at all."""


def walk(root: str) -> tuple[list[str], list[Skipped]]:
    """All files, and what could not be searched. Real folders come before linked ones: a folder has its own name."""
    paths: list[str] = []
    skipped: list[Skipped] = []
    links: list[str] = []
    file_links: list[str] = []
    seen: dict[tuple[int, int], str] = {}

    def search(top: str) -> None:
        stack = [top]
        while stack:
            folder = stack.pop()
            try:
                state = os.stat(folder)
                if (known := seen.setdefault((state.st_dev, state.st_ino), folder)) != folder:
                    reason = f"{os.path.basename(folder)}: links to {os.path.relpath(known, root)}, already searched"
                    skipped.append(Skipped(folder, reason))
                    continue
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda e: e.name)
            except OSError as error:
                reason = f"{os.path.basename(folder)}: folder cannot be searched ({error.strerror or error})"
                skipped.append(Skipped(folder, reason, refused=True))
                continue
            below = []
            for entry in found:
                if entry.is_symlink():
                    (links if os.path.isdir(entry.path) and not entry.name.startswith(".") else file_links).append(
                        entry.path
                    )
                elif entry.is_dir(follow_symlinks=False):
                    if entry.name.startswith("."):
                        skipped.append(Skipped(entry.path, f"{entry.name}: hidden folder, not searched"))
                    else:
                        below.append(entry.path)
                else:
                    paths.append(entry.path)
            stack += reversed(below)

    search(root)
    while links:
        search(links.pop(0))
    if file_links:
        # A link shows a file twice where the file itself is here too.
        here = {(s.st_dev, s.st_ino) for s in map(os.stat, paths)}
        for path in sorted(file_links):
            try:
                state = os.stat(path)
            except OSError as error:
                skipped.append(Skipped(path, f"{os.path.basename(path)}: {NOWHERE} ({error.strerror or error})"))
                continue
            if stat.S_ISDIR(state.st_mode):
                skipped.append(Skipped(path, f"{os.path.basename(path)}: hidden folder, not searched"))
                continue
            if (state.st_dev, state.st_ino) in here:
                skipped.append(Skipped(path, f"{os.path.basename(path)}: links to a file that is here already"))
            else:
                here.add((state.st_dev, state.st_ino))
                paths.append(path)
    return sorted(paths), skipped


class Said:
    """What modality.txt says, in a folder or the nearest one above it up to the root."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.known: dict[str, str | None] = {}

    def of(self, folder: str) -> str | None:
        if folder not in self.known:
            own = os.path.join(folder, MODALITY_FILE)
            try:
                with open(own, encoding="utf-8", errors="replace") as file:
                    word = (file.read(64).split() or [""])[0].upper()
            except OSError:
                word = ""
            above = os.path.dirname(folder)
            if word.isalnum() and len(word) <= 16:
                self.known[folder] = word
            elif folder == self.base or above == folder or not folder.startswith(self.base):
                self.known[folder] = None
            else:
                self.known[folder] = self.of(above)
        return self.known[folder]
