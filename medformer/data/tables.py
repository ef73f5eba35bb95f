"""Label tables: CSV, TSV, their .gz, the first sheet of an .xlsx, Parquet, and lists written as Python literals.

Text is read by Python's csv module. Encoding (UTF-8, UTF-16 or UTF-32 with their mark, else Windows-1252) and separator
(comma, semicolon, tab, bar) are found, never given: `sniff_table` says what was found. Headers are compared without
regard to capital letters and spaces; a table whose rows do not fit its header is refused with the line.
"""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import io
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medformer.data.geometry import ScanError
from medformer.data.safe_xml import parse_xml

__all__ = [
    "ZIP_ERRORS", "TextForm", "has_columns", "header_of", "numbered_rows", "parse_literal", "pick", "read_sheet",
    "read_table", "same_name", "sniff_table", "whole",
]  # fmt: skip

_MAX_SHEET = 2**27
_MAX_TEXT = 2**32
_MAX_FIELD = 2**22
_MAX_COLUMNS = 10_000
_SEPARATORS = ",;\t|"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# What zipfile raises on damage (found by altering bytes).
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, NotImplementedError, LookupError,
    OverflowError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class TextForm:
    """How a text table is written."""

    encoding: str
    separator: str

    def __str__(self) -> str:
        encoding = {"utf-8-sig": "UTF-8", "cp1252": "Windows-1252 (a guess: it is not UTF-8)"}.get(self.encoding)
        named = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}[self.separator]
        return f"{encoding or self.encoding.upper()}, {named}"


def read_table(
    path: Path,
    columns: Sequence[str] = (),
    *,
    optional: Sequence[str] = (),
    names: Sequence[str] | None = None,
    limit: int = 20_000_000,
) -> Iterator[dict[str, str]]:
    """Rows of a .csv, .tsv (or .gz of it) or .parquet as stripped text.

    columns: must be there; they and those of `optional` are keys as spelled here, whatever the header's capitals.
    names: for a file without header.

    Raises ScanError, in one line, for a missing or doubled column, a row that does not fit the header, a file that is
    no text. Warns where the encoding had to be guessed.
    """
    if path.name.lower().endswith(".parquet"):
        yield from _parquet_rows(path, columns, optional)
        return
    form = sniff_table(path, [*columns, *optional, *(names or ())])
    if form.encoding == "cp1252":
        warnings.warn(f"{path.name}: not UTF-8, read as Windows-1252; save it as UTF-8 to be sure", stacklevel=2)
    for _, row in numbered_rows(path, form, columns, optional=optional, names=names, limit=limit):
        yield row


def numbered_rows(
    path: Path,
    form: TextForm,
    columns: Sequence[str] = (),
    *,
    optional: Sequence[str] = (),
    names: Sequence[str] | None = None,
    limit: int = 20_000_000,
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a text table as `read_table` gives them, each with the line it ends on."""
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, form.encoding, newline="") as file:
            rows = _rows(file, form.separator, path.name)
            header = list(names) if names is not None else next(rows, (1, []))[1]
            header = _header(header, columns, optional, path.name)
            for count, (line, row) in enumerate(rows, 1):
                if count > limit:
                    raise ScanError(f"{path.name}: more than {limit:,} rows")
                if len(row) != len(header):
                    raise ScanError(
                        f"{path.name}: line {line} has {len(row)} cells, the header {len(header)} "
                        f"({_shown(header)}); cut off or badly quoted, download or save it again"
                    )
                yield line, dict(zip(header, row, strict=True))
    except (UnicodeError, csv.Error, EOFError, OSError, zlib.error) as error:
        raise ScanError(f"{path.name}: table cannot be read ({error}); copy it again") from error


def sniff_table(path: Path, wanted: Sequence[str] = ()) -> TextForm:
    """Encoding and separator of a text table; of several separators the one that shows most of the columns `wanted`.

    Raises ScanError for a file that is no text or larger than 4 GiB.
    """
    encoding = _encoding(path)
    first = _first_line(path, encoding)
    keys = {same_name(name) for name in wanted}
    outside = re.sub(r'"[^"]*"', "", first)
    preferred = "\t" if ".tsv" in path.name.lower() else ","

    def fits(separator: str) -> tuple[int, int, bool]:
        cells = next(csv.reader([first.strip()], delimiter=separator), []) if first.strip() else []
        return len(keys & {same_name(cell) for cell in cells}), outside.count(separator), separator == preferred

    csv.field_size_limit(_MAX_FIELD)
    try:
        return TextForm(encoding, max(_SEPARATORS, key=fits))
    except csv.Error as error:
        raise ScanError(f"{path.name}: first line is no header of a table ({error})") from error


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether a text table's header has all of them; False too for what is no table."""
    try:
        header = header_of(path)
    except ScanError:
        return False
    return {same_name(name) for name in columns} <= {same_name(cell) for cell in header}


def header_of(path: Path) -> list[str]:
    """The first line of a text table, as cells. Raises ScanError for what is no table."""
    form = sniff_table(path)
    try:
        return [
            cell.strip() for cell in next(csv.reader([_first_line(path, form.encoding)], delimiter=form.separator), [])
        ]
    except csv.Error as error:
        raise ScanError(f"{path.name}: first line is no header of a table ({error})") from error


def _first_line(path: Path, encoding: str) -> str:
    """The first line that is not empty; a table's header."""
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding, newline="") as file:
            return next((line for line in iter(lambda: file.readline(_MAX_FIELD), "") if line.strip()), "")
    except (UnicodeError, OSError, EOFError, zlib.error) as error:
        raise ScanError(f"{path.name}: table cannot be read ({error}); copy it again") from error


def same_name(name: str) -> str:
    """A column's name without capitals and doubled spaces, by which headers are compared."""
    return " ".join(name.split()).casefold()


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _encoding(path: Path) -> str:
    """By its mark; else UTF-8 where all of it is, else Windows-1252 where all of it can be."""
    try:
        with _open(path) as file:
            start = file.read(4)
            marked = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
            decoder, narrow, size, block = codecs.getincrementaldecoder(marked or "utf-8")(), False, 0, start
            bad_cp1252 = False
            while block:
                size += len(block)
                if size > _MAX_TEXT:
                    raise ScanError(f"{path.name}: more than {_MAX_TEXT:,} bytes of text; too large for a table")
                if marked is None and b"\0" in block:
                    raise ScanError(
                        f"{path.name}: holds zero bytes: no text, or UTF-16 without its mark; save it as UTF-8"
                    )
                if not narrow:
                    try:
                        decoder.decode(block)
                    except UnicodeError as error:
                        if marked is not None:
                            raise ScanError(f"{path.name}: begins as {marked} and is not ({error})") from error
                        narrow = True
                bad_cp1252 = bad_cp1252 or any(byte in block for byte in (b"\x81", b"\x8d", b"\x8f", b"\x90", b"\x9d"))
                block = file.read(2**20)
            if not narrow:
                try:
                    decoder.decode(b"", final=True)
                except UnicodeError:
                    narrow = marked is None
    except (OSError, EOFError, zlib.error) as error:
        raise ScanError(f"{path.name}: table cannot be read ({error}); copy it again") from error
    if narrow and bad_cp1252:
        raise ScanError(f"{path.name}: neither UTF-8 nor Windows-1252 text; save it as UTF-8")
    return "cp1252" if narrow else marked or "utf-8"


def _rows(file: IO[str], separator: str, what: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every row that is not empty."""
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.reader(file, delimiter=separator, strict=True)
    for row in reader:
        if any(cell.strip() for cell in row):
            if len(row) > _MAX_COLUMNS:
                raise ScanError(f"{what}: line {reader.line_num} has {len(row):,} cells; no table of labels")
            yield reader.line_num, [cell.strip() for cell in row]


def _header(found: Sequence[str], columns: Sequence[str], optional: Sequence[str], what: str) -> list[str]:
    """The header with known columns as the caller spells them. Raises ScanError for doubled and missing ones."""
    known = {same_name(name): name for name in (*optional, *columns)}
    twice = [name for name, count in Counter(same_name(cell) for cell in found if cell).items() if count > 1]
    if twice:
        raise ScanError(f"{what}: column {twice[0]!r} occurs twice in {_shown(found)}; keep one")
    header = [known.get(same_name(cell), cell) for cell in found]
    if lost := [name for name in columns if name not in header]:
        raise ScanError(f"{what}: no column {', '.join(lost)} among {_shown(found)}")
    return header


def _shown(header: Iterable[str]) -> str:
    text = ", ".join(cell or "(no name)" for cell in header)
    return (text[:200] + "...") if len(text) > 200 else text or "(nothing)"


def _parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[dict[str, str]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ScanError(
            f"{path.name}: Parquet needs pyarrow; pip install 'medformer[parquet]', or save it as CSV"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            header = _header(file.schema_arrow.names, columns, optional, path.name)
            for batch in file.iter_batches():
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield {name: "" if v is None else str(v).strip() for name, v in zip(header, row, strict=True)}
    except (pyarrow.ArrowException, OSError) as error:
        raise ScanError(f"{path.name}: Parquet cannot be read ({' '.join(str(error).split())[:100]})") from error


def read_sheet(path: Path, columns: Sequence[str] = (), *, optional: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """Rows of the first sheet of an .xlsx as text; formulas give their stored value. Other tables as `read_table`."""
    if path.suffix.lower() != ".xlsx":
        yield from read_table(path, columns, optional=optional)
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
    found = {column: text.strip() for column, text in next(rows, {}).items() if text.strip()}
    header = dict(zip(found, _header(list(found.values()), columns, optional, path.name), strict=True))
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
            value = whole(value)
        out[re.sub(r"\d", "", cell.get("r", ""))] = value
    return out


def whole(value: str) -> str:
    """ "3.0" as "3": how spreadsheets and data frames write whole numbers of a column with blanks."""
    try:
        return str(int(float(value))) if float(value).is_integer() else value
    except (ValueError, OverflowError):
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
