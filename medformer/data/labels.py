"""A user's own labels: a table of scans, or arrays of labels, each target right or refused with its row and value.

A table has the column `path` and, of labels, either `label` (one class a scan), `mask` (a label map on the scan's
grid), `value` (a number to predict), or one column a label of 0, 1 and empty cells (unknown); `patient` and `split` are
taken as such. A column that is none of them and holds other values (an age, an id) is left aside, and what was taken
for what is in the notes. Where a case is several files (sequences of an MR), channels are named: columns that hold a
file each, or patterns within the folder that `path` names.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medformer.data.geometry import ScanError
from medformer.data.sequences import CaseFiles, files_of_case, patterns_of
from medformer.data.tables import ZIP_ERRORS, header_of, numbered_rows, same_name, sniff_table, whole
from medformer.data.volumes import MAX_VOLUME_BYTES

__all__ = ["Kind", "LabelTable", "check_arrays", "names_in", "read_arrays", "read_cases", "read_label_table"]

_MAX_CLASSES = 1000
_MAX_ROWS = 1_000_000
_CODE = ("path", "patient", "split", "label", "mask", "value")
_TARGETS = ("label", "mask", "value")
_ROLES = {"classes": "classes", "labels": "a label", "segmentation": "label maps", "regression": "numbers"}
Kind = Literal["classes", "labels", "segmentation", "regression"]
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "": ""}
# Never labels unless asked for, whatever they hold.
_ASIDE = re.compile(
    r"(.*[ _-])?(id|ids|uid|name|number|index)|.*(patient|study|series|subject|accession).*|unnamed.*|age|sex|gender|"
    r"date|time|site|source|scanner|view|notes?|comments?|", re.I,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Rows of a table of scans, checked."""

    kind: Kind
    names: tuple[str, ...]
    """Classes, labels or the column of numbers; empty for a segmentation."""
    lines: tuple[int, ...]
    """Of each row, for messages."""
    paths: tuple[str, ...]
    """As written."""
    files: tuple[CaseFiles, ...]
    """One for each channel, None for a sequence that is missing."""
    masks: tuple[Path, ...]
    """Of a segmentation, else empty."""
    targets: tuple[Any, ...]
    """Index of the class, or a tuple of 1.0, 0.0 and NaN (unknown), or of one number."""
    patients: tuple[str, ...] | None
    splits: tuple[str, ...]
    """train, val or test in every row, or empty in every row."""
    notes: tuple[str, ...]
    """What was taken for what."""


def read_label_table(
    path: Path, asked: Sequence[str] = (), *, outside: bool = False, value: str | None = None,
    channels: Sequence[str] = (), missing: bool = False,
) -> LabelTable:  # fmt: skip
    """Read a .csv or .tsv of scans. asked: the columns that are labels, whatever they are called.

    outside: absolute paths out of the table's folder may be named; relative ones never lead out of it.
    value: the column of numbers to predict, whatever it is called.
    channels: columns that hold one file each, in place of `path`; or NAME=PATTERN, a file in the folder `path`.
    missing: a case may lack some (never all) of its channels.

    Raises ScanError, in one line with row and value, for whatever is not right.
    """
    form = sniff_table(path, _CODE)
    rows = list(numbered_rows(path, form, optional=_CODE, limit=_MAX_ROWS))
    header = list(rows[0][1]) if rows else header_of(path)
    wanted = "path, and label, mask, value or one column a label"
    patterns = patterns_of(channels)
    places = _places(header, patterns)
    if not rows or not set(places) <= {*header}:
        lacking = next((name for name in places if name not in header), "path")
        raise ScanError(
            f"needs a header with the column {lacking} and at least one row; has {_shown(header)}, not {wanted}"
        )
    lines = tuple(line for line, _ in rows)
    kind, columns, aside = _kind(header, rows, asked, value, places)
    names, targets = _targets(kind, columns, rows)
    what = "a folder a case" if any(patterns.values()) else "a channel" if patterns else "scans"
    roles = [*((name, what) for name in places), *((name, _ROLES[kind]) for name in columns)]
    roles += [(name, role) for name, role in (("patient", "patients"), ("split", "as given")) if name in header]
    notes = [f"{path.name} ({form}): {len(rows)} rows; " + "; ".join(f"{name}: {role}" for name, role in roles)]
    patients = _patients(rows) if "patient" in header else None
    files = tuple(_files(path, row, line, places, patterns, outside, missing) for line, row in rows)
    if kind == "labels":
        unknown = sum(math.isnan(number) for row in targets for number in row)
        notes[0] += f"; {unknown} of {len(targets) * len(names)} labels are empty, unknown"
    if kind == "classes":
        notes[0] += f" ({', '.join(f'{n} {names[c]}' for c, n in sorted(Counter(targets).items())[:20])})"
    if kind == "regression":
        numbers = [number for row in targets for number in row]
        notes[0] += f" (from {min(numbers):g} to {max(numbers):g}, mean {sum(numbers) / len(numbers):.4g})"
    if (lacking := sum(None in case for case in files)) > 0:
        notes.append(f"{lacking} of {len(files)} cases lack a sequence (--missing): a channel of zeros and its flag")
    if aside:
        notes.append(f"columns left aside, no labels: {', '.join(aside)}")
    return LabelTable(
        kind=kind, names=names, lines=lines,
        paths=tuple(next(row[name] for name in places if row[name]) for _, row in rows), files=files,
        masks=tuple(_inside(path, row["mask"], line, "mask", outside) for line, row in rows)
        if kind == "segmentation" else (),
        targets=targets, patients=patients, splits=_splits(rows), notes=tuple(notes),
    )  # fmt: skip


def read_cases(path: Path, channels: Sequence[str], missing: bool) -> list[tuple[str, CaseFiles | ScanError]]:
    """Of a table without labels each row's case, and its files or what is wrong with the row; absolute paths may lead
    anywhere. Raises ScanError for a table without the columns."""
    rows = list(numbered_rows(path, sniff_table(path, _CODE), optional=_CODE, limit=_MAX_ROWS))
    patterns = patterns_of(channels)
    header = list(rows[0][1]) if rows else header_of(path)
    places = _places(header, patterns)
    if not rows or not set(places) <= {*header}:
        raise ScanError(
            f"{path.name}: needs the columns {', '.join(places)} and at least one row; has {_shown(header)}"
        )
    found: list[tuple[str, CaseFiles | ScanError]] = []
    for line, row in rows:
        name = next((row[place] for place in places if row[place]), f"row {line}")
        try:
            found.append((name, _files(path, row, line, places, patterns, True, missing)))
        except ScanError as error:
            found.append((name, error))
    return found


def names_in(path: Path) -> list[str]:
    """What may name a patient in a table: every cell but classes, numbers and splits. A table that cannot be read has
    none, for its errors quote headers, and so has an archive of arrays."""
    found: list[str] = []
    if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
        return found
    try:
        for _, row in numbered_rows(path, sniff_table(path, _CODE), optional=_CODE, limit=_MAX_ROWS):
            found += [value for name, value in row.items() if name not in ("label", "value", "split") and value]
    except ScanError:
        pass
    return found


def _places(header: Sequence[str], patterns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that hold files: path, or a column for each channel. Raises ScanError."""
    if not patterns or all(patterns.values()):
        return ("path",)
    known = {same_name(name): name for name in header}
    if lost := [name for name in patterns if same_name(name) not in known]:
        raise ScanError(f"--channels {lost[0]}: no such column among {_shown(header)}")
    return tuple(known[same_name(name)] for name in patterns)


def _files(
    table: Path, row: Mapping[str, str], line: int, places: Sequence[str], patterns: Mapping[str, str], outside: bool,
    missing: bool,
) -> CaseFiles:  # fmt: skip
    """A case's file of each channel; None where it lacks one and may."""
    if any(patterns.values()):
        folder = _inside(table, row["path"], line, "path", outside)
        try:
            return files_of_case(folder, patterns, missing)
        except ScanError as error:
            raise ScanError(f"row {line}: {error}") from error
    if not any(row[name] for name in places):
        raise ScanError(f"row {line} has no {places[0]}; fill it in or remove the row")
    return tuple(
        None if missing and not row[name] and len(places) > 1 else _inside(table, row[name], line, name, outside)
        for name in places
    )


def _kind(
    header: list[str], rows: list[tuple[int, dict[str, str]]], asked: Sequence[str], value: str | None,
    places: Sequence[str],
) -> tuple[Kind, tuple[str, ...], list[str]]:  # fmt: skip
    """What kind of labels, in which columns, and what is left aside, with a value of each."""
    others = [name for name in header if name not in _CODE and name not in places]
    candidates = [*others, *(name for name in _TARGETS if name in header)]
    if asked and value is not None:
        raise ScanError(f"--labels {asked[0]} and --value {value}: a task has labels or a number; give one of them")
    if asked or value is not None:
        flag, wanted = ("--labels", list(asked)) if asked else ("--value", [str(value)])
        known = {same_name(name): name for name in candidates}
        if lost := [name for name in wanted if same_name(name) not in known]:
            raise ScanError(f"{flag} {lost[0]}: no such column among {_shown(header)}")
        columns = tuple(known[same_name(name)] for name in wanted)
        return "labels" if asked else "regression", columns, [name for name in candidates if name not in columns]
    given = [name for name in _TARGETS if name in header]
    if len(given) > 1:
        raise ScanError(
            f"columns {_shown(header)}; give exactly one of label, mask, value, or one column for each label"
        )
    kinds: dict[str, Kind] = {"label": "classes", "mask": "segmentation", "value": "regression"}
    if given:
        return kinds[given[0]], (given[0],), [_example(other, rows) for other in others]
    columns, aside = [], []
    for name in others:
        values = [row[name] for _, row in rows if row[name]]
        right = sum(whole(value) in {"0", "1"} for value in values)
        # A label with a wrong value is refused below; what holds hardly any 0 or 1 is none.
        is_label = bool(values) and right * 2 >= len(values) and not _ASIDE.fullmatch(name)
        (columns if is_label else aside).append(name)
    if not columns:
        shown = ", ".join(_example(name, rows) for name in aside[:3])
        hint = ""
        if aside:
            hint = f" of 0, 1 and empty cells ({shown} are not; --labels NAME takes a column for one, --value NAME "
            hint += "for a number to predict)"
        raise ScanError(
            f"columns {_shown(header)}; give exactly one of label, mask, value, or one column for each label{hint}"
        )
    return "labels", tuple(columns), [_example(name, rows) for name in aside]


def _example(name: str, rows: list[tuple[int, dict[str, str]]]) -> str:
    value = next((row[name] for _, row in rows if row[name]), "")
    return f"{name or '(no name)'} ({value[:20]!r})"


def _targets(
    kind: str, columns: tuple[str, ...], rows: list[tuple[int, dict[str, str]]]
) -> tuple[tuple[str, ...], tuple]:
    if kind == "segmentation":
        return (), ()
    if kind == "labels":
        return columns, tuple(tuple(_binary(row[name], name, line) for name in columns) for line, row in rows)
    if kind == "regression":
        return columns, tuple((_number(row[columns[0]], columns[0], line),) for line, row in rows)
    labels = [_class(row["label"], line) for line, row in rows]
    names = sorted(set(labels), key=lambda name: (int(name), "") if _is_whole(name) else (math.inf, name))
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(same_name(name), name)
        if other != name:
            raise ScanError(
                f"labels {other!r} and {name!r} differ in capital letters or spaces alone; write one of them"
            )
    if len(names) > _MAX_CLASSES:
        raise ScanError(f"column label holds {len(names):,} different values, at most {_MAX_CLASSES} classes are taken")
    place = {name: i for i, name in enumerate(names)}
    return tuple(names), tuple(place[label] for label in labels)


def _binary(value: str, name: str, line: int) -> float:
    number = {"": math.nan, "0": 0.0, "1": 1.0}.get(whole(value))
    if number is None:
        raise ScanError(
            f"row {line}: {name} is {value[:40]!r}, must be 0, 1 or empty (unknown); if it is no label, name those "
            "that are with --labels"
        )
    return number


def _number(value: str, name: str, line: int) -> float:
    text = value.replace(",", ".") if value.count(",") == 1 and "." not in value else value
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in text:
        raise ScanError(f"row {line}: {name} is {value[:40]!r}, must be a number; fill it in or remove the row")
    return number


def _class(value: str, line: int) -> str:
    if not value:
        raise ScanError(f"row {line} has no label; fill it in or remove the row")
    if value.casefold() in {"nan", "na", "n/a", "none", "null", "unknown", "?"}:
        raise ScanError(f"row {line}: label is {value!r}, which is no class; remove the row")
    try:
        number = float(value.replace(",", "."))
    except ValueError:
        return value
    if not number.is_integer() or abs(number) >= 2**31:
        raise ScanError(
            f"row {line}: label is {value[:40]!r}; classes are names or whole numbers; for a "
            "number to predict give --value label"
        )
    if number < 0:
        raise ScanError(f"row {line}: label is {value[:40]!r}; a class is 0 or more, remove rows without one")
    return str(int(number))


def _is_whole(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _patients(rows: list[tuple[int, dict[str, str]]]) -> tuple[str, ...]:
    for line, row in rows:
        if not row["patient"]:
            raise ScanError(f"row {line} has no patient; fill it in for every row, or leave the column out")
    return tuple(row["patient"] for _, row in rows)


def _splits(rows: list[tuple[int, dict[str, str]]]) -> tuple[str, ...]:
    found = tuple(_SPLITS.get(row.get("split", "").casefold(), "?") for _, row in rows)
    given = any(found)
    for (line, row), split in zip(rows, found, strict=True):
        if split == "?" or (given and not split):
            raise ScanError(
                f"row {line}: split {row['split'][:20]!r} must be train, val or test in every row, or no row may have "
                "one"
            )
    return found


def _inside(table: Path, written: str, line: int, column: str, outside: bool) -> Path:
    """The file that a row names, in the table's folder. Links in it lead where they lead."""
    if not written or "\0" in written:
        raise ScanError(f"row {line} has no {column}; fill it in or remove the row")
    base = os.path.abspath(table.parent)
    place = os.path.normpath(os.path.join(base, written))
    if os.path.isabs(written) and outside:
        return Path(place)
    if place == base or os.path.commonpath([base, place]) != base:
        way = "--outside true allows absolute paths" if os.path.isabs(written) else "write an absolute path"
        raise ScanError(f"row {line}: {column} {written[:80]!r} leads out of the table's folder; {way}")
    if len(os.path.basename(place).encode()) > 255 or len(place.encode()) > 4095:
        raise ScanError(f"row {line}: {column} is {len(written):,} characters long; no file is called so")
    return table.parent / os.path.relpath(place, base)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an .npz. Raises ScanError for objects, damage, and what declares more than it can hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > MAX_VOLUME_BYTES or member.file_size > 1100 * member.compress_size + 2**20:
                    raise ScanError(f"{member.filename[:40]} declares {member.file_size:,} bytes; made up or too large")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (*ZIP_ERRORS, ValueError, SyntaxError, TypeError, AttributeError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(f"not an .npz of plain arrays ({' '.join(str(error).split())[:200]})") from error


def check_arrays(arrays: Mapping[str, np.ndarray], parts: Sequence[str]) -> tuple[list[np.ndarray], int]:
    """Labels of each part, [n] int64 classes or [n, L] float32 of 1, 0 and NaN, and how many classes or labels.

    Raises ScanError, with place and value, for what is no label: a class below 0, between two numbers or beyond the
    number of cases, a label besides 0, 1, -1 and NaN, a length that is not that of the images.
    """
    found = []
    for part in parts:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        name = f"{part}_labels"
        if labels.dtype.kind not in "iufb":
            raise ScanError(f"{name} is {labels.dtype}, must be numbers")
        if images.dtype.kind not in "iufb" or images.ndim < 3 or not len(images):
            raise ScanError(f"{part}_images is {images.dtype} of shape {images.shape}, must be one or more images")
        if labels.ndim not in (1, 2) or len(labels) != len(images) or 0 in labels.shape:
            raise ScanError(f"{name} has shape {labels.shape} for {len(images)} images, must be [n], [n, 1] or [n, L]")
        ids = arrays.get(f"{part}_patients")
        if ids is not None and (ids.ndim != 1 or len(ids) != len(images) or ids.dtype.kind not in "iuUS"):
            raise ScanError(f"{part}_patients is {ids.dtype} of shape {ids.shape} for {len(images)} images")
        found.append(labels.reshape(len(labels), -1))
    widths = {labels.shape[1] for labels in found}
    if len(widths) > 1:
        raise ScanError(f"labels of {' and '.join(map(str, sorted(widths)))} columns in one archive; give all the same")
    if (width := widths.pop()) > 1:
        if width > _MAX_CLASSES:
            raise ScanError(f"{parts[0]}_labels has {width:,} columns, at most {_MAX_CLASSES} labels are taken")
        return [_known(labels, part) for labels, part in zip(found, parts, strict=True)], width
    cases = sum(len(labels) for labels in found)
    classes = [_whole_classes(labels[:, 0], part, cases) for labels, part in zip(found, parts, strict=True)]
    return classes, 1 + max(int(labels.max()) for labels in classes)


def _known(labels: np.ndarray, part: str) -> np.ndarray:
    values = labels.astype(np.float64)
    wrong = ~(np.isin(values, (0.0, 1.0, -1.0)) | np.isnan(values))
    if wrong.any():
        i, j = (int(n[0]) for n in np.nonzero(wrong))
        raise ScanError(f"{part}_labels[{i}, {j}] is {values[i, j]:g}, must be 0, 1, or -1 or NaN (unknown)")
    return np.where(values < 0, np.nan, values).astype(np.float32)


def _whole_classes(labels: np.ndarray, part: str, cases: int) -> np.ndarray:
    values = labels.astype(np.float64)
    limit = min(cases, _MAX_CLASSES)
    wrong = ~((values >= 0) & (values < limit) & (values == np.floor(values)))
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ScanError(
            f"{part}_labels[{i}] is {values[i]:g}, must be a whole number of 0 to {limit - 1} (classes are counted "
            f"from 0; {cases} cases)"
        )
    return values.astype(np.int64)


def _shown(header: Sequence[str]) -> str:
    text = ", ".join(name or "(no name)" for name in header)
    return (text[:200] + "...") if len(text) > 200 else text or "nothing"
