"""Cases of several channels as records of a store: which they are, how each is kept, and what their channels are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medformer.data.cases import Looks, Vote, cases_of, read_case
from medformer.data.datasets.folder import SPLITS
from medformer.data.geometry import ScanError
from medformer.data.modality import by_values
from medformer.data.names import hide
from medformer.data.records import Record
from medformer.data.sequences import MISSING_WAY, patterns_of
from medformer.data.store.entries import Stored, keep_case, look_up
from medformer.data.store.reading import case_key, headers_of
from medformer.data.tables import read_table
from medformer.data.walking import Said

__all__ = ["case_records", "cases_decided", "given_words", "is_case", "kept_case"]

_SHOWN = 5  # parts of a path that a message may show


def is_case(record: Record) -> bool:
    return "sources" in record.info


def case_records(source: str, channels: Sequence[str], missing: bool) -> tuple[list[Record], list[str]]:
    """A record for each case of a folder or table, as `cases_of` finds them, and what is wrong with the others.

    Below a folder the first folder of a case's name is its patient, or the second one below train, valid and test. In a
    table the columns patient and split are; without them each row is a patient. Raises ScanError where there is none.
    """
    place = Path(source.removeprefix("folder="))
    base = place if place.is_dir() else place.parent
    said, names = Said(str(base)), tuple(patterns_of(channels))
    records: list[Record] = []
    wrong: list[str] = []
    cases = cases_of(place, channels, missing)
    rows = list(read_table(place, optional=["patient", "split"])) if place.is_file() else [{}] * len(cases)
    for (name, files), row in zip(cases, rows, strict=True):
        try:
            if isinstance(files, ScanError):
                raise files
            heads = [([], False) if file is None else headers_of(file) for file in files]
        except (ScanError, OSError) as error:
            text = str(error).removeprefix(f"{name}: ").replace(MISSING_WAY, MISSING_WAY.replace(" true", ""))
            wrong.append(f"{name}: {text}")
            continue
        sources = [each for each, _ in heads]
        first, *more = Path(name).parts
        patient, split = (more[0], first) if more and first in SPLITS else (first, "")
        if place.is_file():
            patient, split = row.get("patient") or name, row.get("split", "").casefold()
        if split not in ("", *SPLITS):
            wrong.append(f"{name}: split {split[:20]!r} must be one of {', '.join(SPLITS)}")
            continue
        info = {
            "root": str(place), "files": files, "sources": sources, "key": case_key(sources, names),
            "silent": [mute for _, mute in heads], "channels": names,
            "said": [None if file is None else said.of(str(file.parent)) for file in files],
        }  # fmt: skip
        records.append(
            Record(
                dataset="folder", patient=patient, study=name, paths=tuple(f for each in sources for f in each),
                modality="unknown", split=SPLITS.get(split), info=info,
            )
        )  # fmt: skip
    if not records:
        why = f"; for instance {wrong[0]}" if wrong else ""
        raise ScanError(f"{source}: no case of the channels {', '.join(names)}{why}")
    return records, wrong


def given_words(record: Record, modality: str | None) -> str | None:
    """What channels are taken as whose files do not say it: as modality.txt, else `modality`; None: nothing is said."""
    info = record.info
    words = [(said or modality or "") if mute else "" for said, mute in zip(info["said"], info["silent"], strict=True)]
    return ",".join(words) if any(words) else None


def kept_case(record: Record, base: Path, name: str, stored: Stored | None, taken: str | None) -> Stored:
    """The entry, made unless it is there as it should be. taken: of each channel a word, parted by commas."""
    info = record.info
    words = [word or None for word in taken.split(",")] if taken is not None else [None] * len(info["files"])
    if stored is not None and all(
        part is None or word in (None, part.modality) for part, word in zip(stored.parts, words, strict=True)
    ):
        return stored
    case = read_case(info["files"], 3, modalities=words)
    own = ["" if one is None or word is None else by_values(one.voxels) for one, word in zip(case, words, strict=True)]
    return keep_case(case, base, name, info["sources"], own, served=True, channels=info["channels"])


def cases_decided(
    tasks: Mapping[str, tuple[Record, str]], store: Path, modality: str | None, say: Callable[[str], object]
) -> list[tuple[str, Record, str, str | None]]:
    """Entries of cases that are not stored as the votes of their folders say, each channel for itself."""
    roots: dict[str, list[tuple[str, Record, Stored]]] = {}
    for key, (record, name) in tasks.items():
        if is_case(record) and (stored := look_up(store / key, name)) is not None:
            roots.setdefault(record.info["root"], []).append((key, record, stored))
    todo: list[tuple[str, Record, str, str | None]] = []
    for root, found in roots.items():
        place = Path(root)
        vote = Vote(place if place.is_dir() else place.parent, len(found[0][2].parts))
        for i, (_, record, stored) in enumerate(found):
            looks = [
                Looks(part.by_values, part.could_be_hu, part.labels)
                if part is not None and part.guessed and modality is None else None
                for part in stored.parts
            ]  # fmt: skip
            vote.hear(i, record.info["files"], looks)
            given = given_words(record, modality)
            own = ["" if part is None or not part.guessed else part.by_values for part in stored.parts]
            vote.words[i] = [g or o for g, o in zip(given.split(",") if given else own, own, strict=True)]
        changed = vote.count("--modality")
        for line in vote.lines if changed else ():
            names = {part for _, record, _ in found for path in record.paths for part in Path(path).parts[-_SHOWN:]}
            say(f"vote: {hide(line, names)}")
        for i, (key, record, stored) in enumerate(found):
            words = [word or "" for word in vote.words[i]]
            if any(part is not None and word not in ("", part.modality)
                   for part, word in zip(stored.parts, words, strict=True)):  # fmt: skip
                todo.append((key, record, stored.name, ",".join(words)))
    return todo
