"""Where a data set lies: its folder at, below or above the root that was given, and the tables in and around it.

Downloads never lie as a loader expects. NBIA puts `manifest-*/<collection>/` around the images and `metadata.csv`
next to them, PhysioNet by wget `physionet.org/files/<name>/<version>/`, Kaggle one folder more, and tables come as a
download of their own that people put next to the images. So a folder is recognised by what is in it, a few levels down,
and tables are looked for by name, in any capitals, below the folder and around it.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from medformer.data.dicom.headers import sniff_dicom
from medformer.data.dicom.identity import identity_of
from medformer.data.geometry import ScanError
from medformer.data.tables import has_columns

__all__ = ["About", "Near", "first_dicom", "folders_in"]

_DEEP = 4  # levels a data set is looked for below the root
_AROUND = 2  # levels tables are looked for below a folder around the data set
_ALIKE = 100  # so many folders named alike are patients, and hold no tables
_LISTED = 4000  # folders listed for one question
# What downloads put between a data set and the tables next to it.
_WRAPPER = re.compile(r"v?\d+(\.\d+)*|manifest-.*|files|input|archive|extracted|images?|pngs?|jpe?gs?|dicoms?", re.I)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a data set is called, where it comes from and how it lies on disk."""

    name: str
    folders: tuple[str, ...]
    """Names its folder has; compared without capitals and punctuation, whatever follows (a version, "-small")."""
    source: str
    """What to get, and where."""
    layout: str
    also: tuple[str, ...] = ()
    """More names of its folders and of parts of it, by which the way up to its tables is known."""
    patients: str = ""
    """A pattern of its PatientIDs, of a DICOM collection that has one."""
    loose: bool = False
    """Recognised by its name, its tables or headers some levels down, and not by the folders right in it."""

    def present(self, root: str | os.PathLike[str], recognise: Callable[[Path], bool]) -> Path | None:
        """The data set's folder: below `root` by name, `root` itself, or the nearest a few levels down; or None.

        Of several at one level the first, with a warning; of parts of one download (several manifests) what holds them.
        """
        for level in self._candidates(Path(root)):
            found = [folder for folder in level if _holds(recognise, folder)]
            around = {folder.parent for folder in found}
            if len(found) > 1 and self.loose and len(around) == 1 and not any(map(self.named, found)):
                return found[0].parent
            if found:
                if len(found) > 1:
                    rest = ", ".join(folder.name for folder in found[1:4])
                    warnings.warn(f"{self.name}: {found[0].name} is read, not {rest}; give the folder", stacklevel=3)
                return found[0]
        return Path(root) if self.patients and self._is_of_ours(Path(root)) else None

    def _is_of_ours(self, root: Path) -> bool:
        """Whether the first DICOM file below has a PatientID of this collection: a tree that nothing else names."""
        first = first_dicom(root)
        try:
            return first is not None and self.is_patient(identity_of(str(first)).patient)
        except ScanError:
            return False

    def folder(self, root: str | os.PathLike[str], recognise: Callable[[Path], bool]) -> Path:
        """The same. Raises ScanError that says what was looked for, or which folder above `root` to give."""
        found = self.present(root, recognise)
        if found is not None:
            return found
        place = Path(os.path.abspath(root))
        for above in place.parents[:3]:
            if (self.named(above) or not (self.loose or above in _stops())) and _holds(recognise, above):
                raise ScanError(f"{self.name}: {place.name!r} is a part of it; give the whole, {str(above)!r}")
        raise ScanError(
            f"{self.name}: not under {place.name!r} or {_DEEP} levels down (looked for {self.layout}); get it from "
            f"{self.source}"
        )

    def named(self, folder: Path) -> bool:
        """Whether a folder is called as the data set is, and not as one of its patients."""
        plain = _plain(folder.name)
        return not self.is_patient(folder.name) and any(
            plain.startswith(_plain(name)) for name in (*self.folders, *self.also)
        )

    def is_patient(self, name: str) -> bool:
        """Whether a PatientID, or a folder named by one, is of this collection; False where nothing tells."""
        return bool(self.patients) and re.fullmatch(self.patients, name, re.I) is not None

    def _candidates(self, root: Path) -> Iterator[list[Path]]:
        """Folders to look at, those of one list at one level."""
        if not root.is_dir():
            return
        children, seen = folders_in(root), 0
        for name in self.folders:
            yield [child for child in children if child.name.casefold() == name.casefold()]
        yield [root]
        level = children
        for _ in range(_DEEP):
            level = level[: _LISTED // 10 - seen]
            yield level
            seen += len(level)
            level = [child for folder in level for child in folders_in(folder)]


class Near:
    """Folders in and around a data set, each listed once, and the tables in them."""

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = folder
        self.around = _around(Path(os.path.abspath(folder)), about)
        self._listed: dict[Path, list[str]] = {}

    def all(self, *patterns: str, depth: int = _DEEP, columns: Sequence[str] = ()) -> list[Path]:
        """Every file of these names (`*` stands for anything, capitals do not count), nearest first.

        columns: of a name that other data sets use too; around the data set only a table that has them counts.
        """
        return list(dict.fromkeys(path for found in self._levels(depth, patterns, columns) for path in found))

    def first(self, *patterns: str, depth: int = _DEEP, columns: Sequence[str] = ()) -> Path | None:
        """The nearest of them; at one level the earlier pattern wins, then the later name (a newer date)."""
        return next((found[0] for found in self._levels(depth, patterns, columns) if found), None)

    def where(self) -> str:
        """The folders that were searched, in words."""
        return f"in {self.folder.name!r}" + (f" and up to {self.around[-1].name!r} around it" if self.around else "")

    def folders(self, pattern: str) -> list[Path]:
        """Folders of this name (as `all`), below the data set's folder and around it."""
        seen = [
            f for start in (Path(os.path.abspath(self.folder)), *self.around) for level in self._walk(start, _AROUND)
            for f in level
        ]  # fmt: skip
        return [f for f in dict.fromkeys(seen) if fnmatchcase(f.name.casefold(), pattern.casefold())]

    def _levels(self, depth: int, patterns: Sequence[str], columns: Sequence[str]) -> Iterator[list[Path]]:
        for level in self._walk(self.folder, depth):
            yield self._matches(level, patterns)
        for place in self.around:
            for level in self._walk(place, _AROUND):
                yield [p for p in self._matches(level, patterns) if not columns or has_columns(p, columns)]

    def _walk(self, start: Path, depth: int) -> Iterator[list[Path]]:
        level = [start]
        for _ in range(depth + 1):
            yield level
            if len(self._listed) > _LISTED:
                return
            level = [child for folder in level for child in folders_in(folder)]

    def _matches(self, level: list[Path], patterns: Sequence[str]) -> list[Path]:
        out = []
        for pattern in patterns:
            found = [
                folder / name for folder in level for name in self._files(folder)
                if fnmatchcase(name.casefold(), pattern.casefold())
            ]  # fmt: skip
            out += sorted(found, key=lambda path: path.name, reverse=True)
        return out

    def _files(self, folder: Path) -> list[str]:
        if folder not in self._listed:
            with os.scandir(folder) as entries:  # "._x": what macOS adds to archives; "~$x": an open workbook
                self._listed[folder] = [e.name for e in entries if not e.name.startswith(("._", "~$")) and e.is_file()]
        return self._listed[folder]


def _holds(recognise: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return recognise(folder)
    except OSError:
        return False  # gone meanwhile, or not ours to read


def _stops() -> set[Path]:
    """Folders that hold everything there is."""
    return {Path(Path.cwd().anchor), Path.home(), Path(tempfile.gettempdir())}


def first_dicom(folder: Path, *, files: int = 2000) -> Path | None:
    """The first file that is DICOM, of the first few."""
    for number, path in enumerate(folder.rglob("*")):
        if number > files:
            return None
        if path.is_file():
            with path.open("rb") as file:
                if sniff_dicom(file.read(352)):
                    return path
    return None


def folders_in(folder: Path) -> list[Path]:
    """Folders in one, by name, without hidden ones and without the many alike that hold images."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))
    except OSError:
        return []  # not ours to read
    counts = Counter(map(_shape, names))
    return [folder / name for name in names if counts[_shape(name)] <= _ALIKE]


def _shape(name: str) -> str:
    """patient00001, 1.3.6.1, 0a1b2c3d: names of one kind become one."""
    return re.sub(r"[0-9a-f]{6,}|\d+", "0", name.casefold())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.casefold())


def _around(folder: Path, about: About) -> list[Path]:
    """The folders above, as long as the way up leads through names of the data set or of what downloads put there."""
    stop = _stops()
    out: list[Path] = []
    while (about.named(folder) or _WRAPPER.fullmatch(folder.name)) and folder.parent not in stop and len(out) < _DEEP:
        folder = folder.parent
        out.append(folder)
    return out
