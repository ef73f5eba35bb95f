"""Label tables: CSV, TSV, their .gz, the first sheet of an .xlsx, and lists written as Python literals."""

from __future__ import annotations

import ast
import csv
import gzip
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medformer.data.geometry import ScanError
from medformer.data.safe_xml import parse_xml

__all__ = ["ZIP_ERRORS", "parse_literal", "pick", "read_sheet", "read_table"]

_MAX_SHEET = 2**27
# What zipfile raises on damage (found by altering bytes).
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, NotImplementedError, LookupError,
    OverflowError, MemoryError,
)  # fmt: skip


def read_table(
    path: Path, columns: Sequence[str] = (), *, names: Sequence[str] | None = None, limit: int = 20_000_000
) -> Iterator[dict[str, str]]:
    """Rows of a .csv, .tsv (or .gz of it) as stripped text. `columns` must be there; `names` for a file without header.

    Raises ScanError for a missing column, a row with more cells than the header, a file that is no text.
    """
    opener = gzip.open if path.name.endswith(".gz") else open
    separator = "\t" if ".tsv" in path.name else ","
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(2**22)
            rows = csv.reader(file, delimiter=separator)
            header = list(names) if names is not None else [h.strip() for h in next(rows, [])]
            if lost := [c for c in columns if c not in header]:
                raise ScanError(f"{path.name}: no column {', '.join(lost)} among {', '.join(header)[:200]}")
            for number, row in enumerate(rows, 1):
                if number > limit:
                    raise ScanError(f"{path.name}: more than {limit:,} rows")
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) > len(header):
                    raise ScanError(f"{path.name}: row {number} has {len(row)} cells, the header {len(header)}")
                cells = [cell.strip() for cell in row] + [""] * (len(header) - len(row))
                yield dict(zip(header, cells, strict=True))
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError, OSError) as error:
        raise ScanError(f"{path.name}: table cannot be read ({error}); copy it again") from error


def read_sheet(path: Path, columns: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """Rows of the first sheet of an .xlsx as text; formulas give their stored value. A .csv of that name works too."""
    if path.suffix.lower() != ".xlsx":
        yield from read_table(path, columns)
        return
    try:
        with zipfile.ZipFile(path) as book:
            shared = _shared_strings(book, path.name)
            first = min((n for n in book.namelist() if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", n)), key=_number)
            root = parse_xml(_member(book, first, path.name), path.name, limit=_MAX_SHEET)
    except (*ZIP_ERRORS, ValueError) as error:
        if isinstance(error, ScanError):
            raise
        raise ScanError(f"{path.name}: workbook cannot be read ({error}); save it again or export it as CSV") from error
    rows = (_cells(row, shared, path.name) for row in root.iter("row"))
    header = {column: text.strip() for column, text in next(rows, {}).items() if text.strip()}
    if lost := [c for c in columns if c not in header.values()]:
        raise ScanError(f"{path.name}: no column {', '.join(lost)} among {', '.join(header.values())[:200]}")
    for row in rows:
        if any(text.strip() for text in row.values()):
            yield {name: row.get(column, "").strip() for column, name in header.items()}


def _member(book: zipfile.ZipFile, name: str, what: str) -> bytes:
    with book.open(name) as file:
        data = file.read(_MAX_SHEET + 1)
    if len(data) > _MAX_SHEET:
        raise ScanError(f"{what}: a sheet inflates to more than {_MAX_SHEET:,} bytes; export it as CSV")
    return data


def _shared_strings(book: zipfile.ZipFile, what: str) -> list[str]:
    if "xl/sharedStrings.xml" not in book.namelist():
        return []
    root = parse_xml(_member(book, "xl/sharedStrings.xml", what), what, limit=_MAX_SHEET)
    return ["".join(t.text or "" for t in item.iter("t")) for item in root.findall("si")]


def _cells(row: Any, shared: list[str], what: str) -> dict[str, str]:
    out = {}
    for cell in row.findall("c"):
        kind, value = cell.get("t", "n"), cell.findtext("v", "")
        if kind == "s":
            if not (value.isascii() and value.isdigit() and len(value) < 10) or int(value) >= len(shared):
                raise ScanError(f"{what}: cell {cell.get('r')} points at text {value!r}, the book has {len(shared)}")
            value = shared[int(value)]
        elif kind == "inlineStr":
            value = "".join(t.text or "" for t in cell.iter("t"))
        elif kind == "n" and value:  # 3.0 is how 3 may be stored
            value = _whole(value)
        out[re.sub(r"\d", "", cell.get("r", ""))] = value
    return out


def _whole(value: str) -> str:
    try:
        return str(int(float(value))) if float(value).is_integer() else value
    except ValueError:
        return value


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def pick(row: dict[str, str], *names: str) -> str:
    """The first of several column names that the row has; releases of one data set spell them differently."""
    return next((row[name] for name in names if name in row), "")


def parse_literal(text: str, what: str, *, limit: int = 2**16) -> Any:
    """A list or dictionary written as Python, with no call and no name in it. Raises ScanError."""
    if len(text) > limit or text.count("[") + text.count("{") + text.count("(") > 2000:
        raise ScanError(f"{what}: a value of {len(text):,} characters is not parsed, at most {limit:,}")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ScanError(f"{what}: {text[:40]!r} is no list or dictionary of plain values") from error
