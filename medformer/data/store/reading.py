"""All that lies under a root, stored once: single scans, or cases of several channels."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medformer.data.archives import sniff_zip
from medformer.data.cases import Looks, Vote, cases_of, read_case
from medformer.data.geometry import ScanError
from medformer.data.modality import decide
from medformer.data.names import Ids, salt_of
from medformer.data.samples import sample_scans
from medformer.data.scans import Scan, find_scans
from medformer.data.sequences import MISSING_WAY, CaseFiles, patterns_of
from medformer.data.store.entries import Stored, keep_case, key_of, store_scan, stored_once
from medformer.data.store.limit import Use
from medformer.data.store.unpacked import unpacked
from medformer.data.tables import same_name

__all__ = ["Taken", "case_key", "headers_of", "misfit", "store_case", "stored_cases", "stored_scans"]

_JUNK = "not a scan"  # what find_scans says of a file that is none


@dataclass(kw_only=True)
class Taken:
    """What was found, grows while it is read."""

    scans: dict[str, Stored] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason."""
    ignored: int = 0
    """Files that are no scans at all."""
    notices: list[str] = field(default_factory=list)
    """Decisions about scans that do not say what they are, and damaged entries of the cache."""
    known: list[str] = field(default_factory=list)
    """Names that messages may mention."""

    def hidden(self, cache: Path) -> Ids:
        """Ids for those names."""
        return Ids(salt_of(cache), self.known)


def stored_scans(
    root: str | None, cache: Path, modality: str | None, taken: Taken, progress: Callable[[list[Any]], Any] = iter,
    use: Use | None = None,
) -> None:  # fmt: skip
    """Find, check and store all scans below `root` (None: those that come with the dependencies) into `taken`.

    modality: what they are whose files do not say. Raises ScanError where nothing is found.
    """
    index = sample_scans(cache / "samples") if root is None else find_scans(unpacked(root, cache, use))
    taken.skipped += [(s.path, s.reason) for s in index.skipped if s.reason != _JUNK]
    taken.ignored = len(index.skipped) - len(taken.skipped)
    known = [s.path for s in index.skipped] + [f for scan in index.scans for f in (scan.name, *scan.files)]
    taken.known = [os.path.relpath(k, root or ".") for k in known]

    def store(scan: Scan, modality: str | None) -> None:
        try:
            taken.scans[scan.name] = store_scan(scan, cache, modality, taken.notices.append, use)
        except ScanError as error:
            taken.scans.pop(scan.name, None)
            taken.skipped.append((scan.name, str(error)))

    for scan in progress(index.scans):
        store(scan, modality=modality if scan.modality == "unknown" else None)
    vote = decide({s.name: (s.modality, s.could_be_hu) for s in taken.scans.values() if s.guessed and not s.labels})
    for scan in index.scans:
        if scan.name in vote.modality:
            store(scan, modality=vote.modality[scan.name])
    taken.notices += vote.lines


def stored_cases(
    root: str, channels: Sequence[str], missing: bool, cache: Path, modality: str | None, taken: Taken,
    progress: Callable[[list[Any]], Any] = iter, use: Use | None = None,
) -> None:  # fmt: skip
    """As `stored_scans`, of cases: a folder of them, or a table with a column for each channel (`cases_of`).

    Each channel has its own scaling and, where files do not say what they are, its own vote.
    """
    place = Path(root)
    found = cases_of(place, channels, missing)
    names = _different([name for name, _ in found])
    cases = {name: files for name, (_, files) in zip(names, found, strict=True) if not isinstance(files, ScanError)}
    taken.skipped += [
        (name, str(files).replace(MISSING_WAY, MISSING_WAY.replace("--", "--data.")))
        for name, (_, files) in zip(names, found, strict=True) if isinstance(files, ScanError)
    ]  # fmt: skip
    inside = [str(file) for files in cases.values() for file in files if file is not None]
    taken.known = [*names, *(os.path.relpath(file, root) for file in inside)]
    base = place if place.is_dir() else place.parent
    vote, order = Vote(base, len(channels)), list(cases)

    def store(name: str, words: Sequence[str | None]) -> Stored | None:
        try:
            taken.scans[name] = store_case(cases[name], cache, words, name, taken.notices.append, use)
        except (ScanError, OSError) as error:
            taken.scans.pop(name, None)
            taken.skipped.append((name, str(error)))
        return taken.scans.get(name)

    for i, name in enumerate(progress(order)):
        try:
            silent = [file is not None and headers_of(file)[1] for file in cases[name]]
        except (ScanError, OSError) as error:
            taken.skipped.append((name, str(error)))
            continue
        given = [vote.said.of(str(file.parent)) or modality if file is not None and mute else None
                 for file, mute in zip(cases[name], silent, strict=True)]  # fmt: skip
        if (stored := store(name, given)) is not None:
            looks = [Looks(part.modality, part.could_be_hu, part.labels) if part is not None and part.guessed else None
                     for part in stored.parts]  # fmt: skip
            vote.hear(i, cases[name], looks)
            vote.words[i] = given
    for i in vote.count("--data.modality"):
        store(order[i], vote.words[i])
    taken.notices += vote.lines
    if lacking := [name for name, stored in taken.scans.items() if None in stored.parts]:
        counts = {c: sum(stored.parts[c] is None for stored in taken.scans.values()) for c in range(len(channels))}
        each = ", ".join(f"{channels[c].partition('=')[0]} {n}" for c, n in counts.items() if n)
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        taken.notices.append(
            f"{len(lacking)} of {len(taken.scans)} cases lack a sequence ({each}; {shown}): a channel of zeros and its "
            "flag"
        )


def store_case(
    files: CaseFiles, cache: Path, words: Sequence[str | None], name: str,
    say: Callable[[str], object] = warnings.warn, use: Use | None = None,
) -> Stored:  # fmt: skip
    """Read, check and write one case, on the grid of the first channel it has, unless the cache holds it.

    words: what each channel is taken as, as for `store_scan`. Raises ScanError, UserError.
    """
    sources = [[] if file is None else headers_of(file)[0] for file in files]

    def make() -> Stored:
        return keep_case(read_case(files, 3, modalities=words), base, name, sources)

    base = cache / case_key(sources, words)
    return stored_once(base, name, make, say, use)


def case_key(sources: Sequence[Sequence[str]], words: Sequence[str | None]) -> str:
    """Of an entry: changes with the files of each channel and what they are taken as."""
    layout = ",".join(str(len(each)) for each in sources)
    return key_of([file for each in sources for file in each], "case", layout, ",".join(word or "" for word in words))


def misfit(scan: Stored, channels: Sequence[str], missing: bool) -> str | None:
    """Why a scan of a store is none for a run of these channels; None where it is one."""
    names = list(patterns_of(channels))
    if not scan.parts:
        return "a single scan, not a case of several channels; leave --data.channels out" if names else None
    if list(map(same_name, names)) != list(map(same_name, scan.channels)):
        return f"a case of the channels {','.join(scan.channels)}; --data.channels {','.join(scan.channels)} takes it"
    lacking = [name for name, part in zip(names, scan.parts, strict=True) if part is None]
    return f"lacks {', '.join(lacking)}; --data.missing true takes it" if lacking and not missing else None


def headers_of(file: Path) -> tuple[list[str], bool]:
    """The files that are read of a scan, and whether they do not say what it is. Raises ScanError."""
    if not file.exists():
        raise ScanError(f"{file.name}: no such file or folder")
    if file.is_file():
        with open(file, "rb") as opened:
            if sniff_zip(opened.read(4)):
                return [str(file)], False
    scan = find_scans(file, workers=0).scans[0]
    return list(scan.files), scan.modality == "unknown"


def _different(names: Sequence[str]) -> list[str]:
    """The same, each once: rows of a table may begin with one file."""
    count: Counter[str] = Counter()
    found: dict[str, None] = {}
    for name in names:
        count[name] += 1
        while (tried := f"{name}#{count[name]}" if count[name] > 1 else name) in found:
            count[name] += 1
        found[tried] = None
    return list(found)
