"""The sequences of a case by name: which file is which, and which folders are cases.

A channel is a name, or NAME=PATTERN: what a file in the folder of a case is called. One notation for every command
(`--channels`, `--data.channels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from medformer.data.geometry import ScanError
from medformer.data.tables import same_name

__all__ = ["MISSING_WAY", "CaseFiles", "Several", "cases_below", "files_of_case", "in_folders", "patterns_of"]

MISSING_WAY = "; --missing true takes cases without it"
CaseFiles = tuple[Path | None, ...]
"""Of each channel its file, or the folder of a DICOM series; None where the case lacks it."""


class Several(ScanError):
    """More than one file fits a channel."""


def patterns_of(channels: Sequence[str]) -> dict[str, str]:
    """Of each channel its pattern; empty text where it has none.

    Raises ScanError for names that are empty or given twice, and where some have patterns and others have none.
    """
    found: dict[str, str] = {}
    for text in channels:
        name, _, pattern = (part.strip() for part in text.partition("="))
        if not name or same_name(name) in map(same_name, found):
            what = f"{name} is given twice" if name else f"{text!r} has no name"
            raise ScanError(f"--channels {','.join(channels)}: {what}; write t1,t2 or t1=*T1*,t2=*T2*")
        found[name] = pattern
    if any(found.values()) and not all(found.values()):
        raise ScanError(f"--channels {','.join(found)}: name columns, or give every channel as NAME=PATTERN")
    return found


def in_folders(channels: Sequence[str]) -> dict[str, str]:
    """Of each channel the pattern of its file in a folder; one that has none is part of the file's name."""
    return {name: pattern or f"*{name}*" for name, pattern in patterns_of(channels).items()}


def files_of_case(folder: Path, patterns: Mapping[str, str], missing: bool) -> CaseFiles:
    """The one file in a case's folder (or below) that each channel's pattern fits, without regard to capitals.

    A folder that fits (of a DICOM series) stands for all that is in it. Raises ScanError where none fits (unless
    `missing` and another channel has one), and `Several` where more than one does.
    """
    if not folder.is_dir():
        raise ScanError(f"{folder.name}: no such folder; channels by pattern are files in the folder of a case")
    inside = sorted(p for p in folder.rglob("*") if not p.name.startswith("."))
    found: list[Path | None] = []
    for name, pattern in patterns.items():
        fits = _fitting(inside, folder, pattern)
        if len(fits) > 1:
            raise Several(
                f"{folder.name}: {len(fits)} files fit {name}={pattern} ({fits[0].name}, {fits[1].name}); give a "
                "narrower pattern"
            )
        if not fits and not missing:
            raise ScanError(f"{folder.name}: no file fits {name}={pattern}{MISSING_WAY}")
        found.append(fits[0] if fits else None)
    if not any(found):
        raise ScanError(f"{folder.name}: no file fits any of {', '.join(f'{n}={p}' for n, p in patterns.items())}")
    if len({*found} - {None}) < sum(path is not None for path in found):
        twice = next(path for path in found if path is not None and found.count(path) > 1)
        raise ScanError(f"{folder.name}: {twice.name} fits more than one channel; give narrower patterns")
    return tuple(found)


def _fitting(inside: Sequence[Path], folder: Path, pattern: str) -> list[Path]:
    fits = [p for p in inside if fnmatch(p.relative_to(folder).as_posix().casefold(), pattern.casefold())]
    return [p for p in fits if not {*fits} & {*p.parents}]


def cases_below(root: Path, patterns: Mapping[str, str], missing: bool) -> list[tuple[str, CaseFiles | ScanError]]:
    """Every case in a folder: its name below `root`, and its files or what is wrong with it.

    A folder is a case where each channel's pattern fits one file in it or below; where a pattern fits several, its
    folders are looked at one by one. Folders in which nothing fits are none.
    """
    try:
        return [(root.resolve().name, files_of_case(root, patterns, missing))]
    except ScanError as error:
        below = _below(root, patterns, missing, root) if isinstance(error, Several) else []
        return below or [(root.resolve().name, error)]


def _below(
    folder: Path, patterns: Mapping[str, str], missing: bool, root: Path
) -> list[tuple[str, CaseFiles | ScanError]]:  # fmt: skip
    found: list[tuple[str, CaseFiles | ScanError]] = []
    inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    for name, pattern in patterns.items():
        for path in _fitting(inside, folder, pattern):
            if path.is_file():
                said = ScanError(f"{path.name}: fits {name}={pattern}, beside folders of cases; give it one of its own")
                found.append((path.relative_to(root).as_posix(), said))
    for path in (p for p in inside if p.is_dir()):
        within = [p for p in path.rglob("*") if not p.name.startswith(".")]
        if not any(_fitting(within, path, pattern) for pattern in patterns.values()):
            continue
        try:
            found.append((path.relative_to(root).as_posix(), files_of_case(path, patterns, missing)))
        except ScanError as error:
            deeper = _below(path, patterns, missing, root) if isinstance(error, Several) else []
            folders = [each for each in deeper if not isinstance(each[1], ScanError)]
            found += deeper if folders else [(path.relative_to(root).as_posix(), error)]
    return found
