"""The scans of a store that `medformer prepare` made: here, or on a server by the catalogue it publishes.

The catalogue is one file that says of each scan what its sidecar does, with the hashes of its files: all that a run on
another machine needs before its first crop. It is written last and whole, and holds no tags of the scans' headers.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from medformer.data.geometry import ScanError
from medformer.data.intensity import Scaling
from medformer.data.store.chunks import Grid
from medformer.data.store.entries import Damaged, Stored, described, look_up, sidecar
from medformer.data.store.index import is_store, rows
from medformer.data.store.limit import shown
from medformer.data.store.pieces import digest
from medformer.data.store.remote import Far, Place, RemoteError, is_url, place_of, read_whole
from medformer.errors import UserError
from medformer.files import write_whole

__all__ = ["CATALOGUE", "has_scans", "publish", "scans_of"]

CATALOGUE = "catalogue.jsonl.gz"
_FORMAT = "medformer catalogue 1"
_SAID = (
    "suffix",
    "shape",
    "spacing_mm",
    "modality",
    "threshold",
    "notes",
    "labels",
    "guessed",
    "by_values",
    "could_be_hu",
    "source_hash",
    "scaling",
    "files",
    "chunks",
    "channels",
)  # fmt: skip - of a sidecar
_RATIO = 100  # of a catalogue's text to its packed bytes, at most
_SPLITS = {"train", ""}


def has_scans(root: str) -> bool:
    """Whether `scans_of` takes it: a URL, or a store. Raises UserError where the store is not complete."""
    return is_url(root) or is_store(Path(root))


def scans_of(root: str, cache: Path, limit: int | None) -> tuple[list[Stored], list[tuple[str, str]], list[str]]:
    """The training scans of a store, by key; name and reason of those that cannot be used; and what is to be said.

    cache, limit: where pieces of a store on a server are kept, and the bytes of that cache.

    Raises:
        UserError: it cannot be read.
    """
    good: list[Stored] = []
    bad: list[tuple[str, str]] = []
    if not is_url(root):
        for row in rows(Path(root)):
            if row.state == "quarantined":
                bad.append((row.name, row.reason))
            elif row.split in _SPLITS:
                stored, reason = None, "its stored array is gone; prepare the store again"
                try:
                    stored = look_up(Path(root) / row.key, row.name)
                except Damaged as error:
                    reason = f"{error}; prepare the store again"
                good += [stored] if stored is not None else []
                bad += [(row.name, reason)] if stored is None else []
        return good, bad, []
    place = place_of(root, cache, limit)
    same: dict[Any, Any] = {}  # grids and scalings that many scans share are held once
    for line in _read(place):
        if "reason" in line:
            bad.append((line["name"], line["reason"]))
        elif line.get("split") in _SPLITS:
            try:
                good.append(_stored(place, line, same))
            except ScanError as error:
                bad.append((line["name"], str(error)))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                bad.append((line["name"], f"its line of the catalogue is not as prepare writes it ({error!r})"))
    return good, bad, [_kept(place)]


def publish(store: Path) -> None:
    """Write the catalogue of a store. Raises UserError where it cannot be written."""
    lines: list[dict[str, Any]] = [{"format": _FORMAT}]
    for row in rows(store):
        line: dict[str, Any] = {"key": row.key, "name": row.name, "split": row.split}
        if row.state == "quarantined":
            line["reason"] = row.reason
        else:
            try:
                values = sidecar(store / row.key)
            except (Damaged, FileNotFoundError) as error:
                line["reason"] = f"{error}; prepare the store again"
            else:
                line["entry"] = _said(values)
        lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    text += json.dumps({"scans": len(lines) - 1, "seal": digest(text)}).encode() + b"\n"
    packed = gzip.compress(text, 6, mtime=0)
    path = store / CATALOGUE
    if not path.exists() or path.read_bytes() != packed:
        write_whole(path, lambda file: file.write(packed))


def _said(values: dict[str, Any]) -> dict[str, Any]:
    """What the catalogue holds of a sidecar, of a case with each channel's."""
    said = {name: values[name] for name in _SAID if name in values}
    if "parts" in values:
        said["parts"] = [None if part is None else _said(part) for part in values["parts"]]
    return said


def _read(place: Place) -> Iterator[dict[str, Any]]:
    found: list[list[dict[str, Any]] | None] = []

    def right(data: bytes) -> bool:
        found.append(_unpacked(data))
        return found[-1] is not None

    try:
        read_whole(place, CATALOGUE, right)
    except RemoteError as error:
        raise UserError(
            f"--data.root {place.url} cannot be read ({error}); it must be the folder of a store of medformer prepare "
            f"with its {CATALOGUE}: stores of before 2026-12-02 get one when the same medformer prepare runs once more"
        ) from error
    yield from found[-1] or ()


def _unpacked(data: bytes) -> list[dict[str, Any]] | None:
    """The lines of a catalogue; None where it is cut short, changed or none."""
    try:
        text = zlib.decompressobj(wbits=31).decompress(data, _RATIO * len(data))
        head, *lines, end = (json.loads(line) for line in text.splitlines())
        body = text[: text.rindex(b"\n", 0, -1) + 1]
    except (ValueError, zlib.error):
        return None
    right = isinstance(end, dict) and end.get("seal") == digest(body) and head == {"format": _FORMAT}
    named = all(isinstance(line, dict) and isinstance(line.get("name"), str) for line in lines)
    return lines if right and named else None


def _stored(place: Place, line: dict[str, Any], same: dict[Any, Any]) -> Stored:
    entry, key = line["entry"], line["key"]
    if not re.fullmatch("[0-9a-f]{16,64}", key) or not line["name"].isprintable():
        raise ValueError(f"{key} must be a hash")  # they are names of files here
    found = described(entry, line["name"], f"{place.url}/{key}{entry['suffix']}")
    if not found.parts:
        return replace(found, far=_far(place, key, entry, same))
    parts = tuple(
        None if part is None else replace(part, far=_far(place, f"{key}.{c}", values, same))
        for c, (part, values) in enumerate(zip(found.parts, entry["parts"], strict=True))
    )
    return replace(found, parts=parts, far=next(part.far for part in parts if part is not None))


def _far(place: Place, key: str, entry: dict[str, Any], same: dict[Any, Any]) -> Far:
    if "chunks" not in entry:
        raise ScanError("stored without blosc2; a server's scans must be compressed: prepare them again with blosc2")
    points, table = ((entry["files"][end]["bytes"], entry["files"][end]["hash"])
                     for end in (".points.npy", ".chunks.npy"))  # fmt: skip
    if not all(re.fullmatch("[0-9a-f]{16,64}", name) for name in (points[1], table[1])):
        raise ValueError(f"{points[1]} and {table[1]} must be hashes")  # they are names of files here
    said = entry["chunks"]
    grid = Grid(dtype=said["dtype"], **{name: tuple(said[name]) for name in ("shape", "chunks", "blocks")})
    grid, scaling = (same.setdefault(each, each) for each in (grid, Scaling(**entry["scaling"])))
    return Far(place=place, key=key, scaling=scaling, grid=grid, points=points, table=table)


def _kept(place: Place) -> str:
    limit = f", at most {shown(place.limit)} (--data.cache_limit)" if place.limit is not None else ""
    return f"{place.url} is read from afar; pieces of it are kept in {place.cache}{limit}"
