"""Rows of local files: JSONL, JSON, CSV, TSV, Parquet and plain text; all but Parquet also compressed."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from uuid import UUID

from trimllm.errors import InputError, first_line

COMPRESSED = (".xz", ".gz", ".bz2", ".zst")
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_DELIMITERS = (",", ";", "\t", "|")
_HEAD = 40
"""Lines after the header by which a delimiter is told."""
_LONGEST_CELL = 2**31 - 1
"""Characters: the most that Python's csv can be told to take on every platform (by default 131,072)."""


class Row(NamedTuple):
    """One record and where it stands (`file.jsonl:17`; rows and lines are counted from 1)."""

    place: str
    values: dict[str, Any]


def blank(value: Any) -> bool:
    """Whether a cell is empty: null, white space, or not a number."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def format_of(path: Path) -> str | None:
    """The format by the file's name, compression aside (`.jsonl` for `a.jsonl.xz`); `None` if it is not known."""
    name = path.name.lower()
    for ending in COMPRESSED:
        if name.endswith(ending):
            inner = Path(name.removesuffix(ending)).suffix
            return inner if inner in FORMATS and inner != ".parquet" else None
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS else None


def stem_of(path: Path) -> str:
    """The file's name without its format and compression (`a` for `a.jsonl.xz`)."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.stem


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Plain text is one row with the column `text`.

    Raises:
        InputError: if the file is missing, empty, of an unknown format, or holds a malformed row.
    """
    kind = format_of(path)
    if kind is None:
        known = ", ".join(FORMATS)
        raise InputError(
            f"{path}: cannot tell the format from the name; use one of {known} (text also .xz .gz .bz2 .zst)"
        )
    try:
        rows = list(_parquet(path) if kind == ".parquet" else _text_rows(path, kind))
    except RecursionError:
        raise InputError(f"{path}: lists or objects are nested too deep; flatten them") from None
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except _damages() as error:
        raise InputError(
            f"cannot read {path}: {first_line(error)}; check that it is a whole {path.suffix} file"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    if not rows:
        raise InputError(f"{path} has no rows; give a file with at least one")
    return rows


def _text_rows(path: Path, kind: str) -> Iterator[Row]:
    with _open(path) as file:
        if kind in (".jsonl", ".ndjson"):
            yield from _json_lines(path, file)
        elif kind == ".json":
            yield from _json_list(path, file)
        elif kind == ".txt":
            text = file.read()
            if text.strip():
                yield Row(f"{path}:1", {"text": text})
        else:
            yield from _csv(path, file, "\t" if kind == ".tsv" else "")


def _open(path: Path) -> IO[str]:
    """Text of a file, decompressed by its ending; a leading byte-order mark is dropped."""
    ending = path.suffix.lower()
    if ending == ".xz":
        import lzma

        return lzma.open(path, "rt", encoding="utf-8-sig")
    if ending == ".gz":
        import gzip

        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8-sig"))
    if ending == ".bz2":
        import bz2

        return cast("IO[str]", bz2.open(path, "rt", encoding="utf-8-sig"))
    if ending == ".zst":
        return io.TextIOWrapper(io.BytesIO(_zstd(path)), encoding="utf-8-sig")
    with open(path, "rb") as file:
        start = file.read(4096)
    wide = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # "Unicode text" of Excel
    if b"\0" in start and (not wide or start.startswith(codecs.BOM_UTF32_LE)):
        raise InputError(f"{path} is not UTF-8 text (it holds NUL bytes); convert it to UTF-8")
    encoding = "utf-16" if wide else "utf-8-sig"
    return open(path, encoding=encoding, newline="" if ending in (".csv", ".tsv") else None)


def _zstd(path: Path) -> bytes:
    """What all frames of the file hold. (The library's own reader takes a cut file for a whole one.)

    Raises:
        InputError: if the library is missing.
        EOFError: if the last frame is cut.
    """
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{path}: reading .zst needs `pip install zstandard`; or decompress the file") from error
    parts, frame, left = list[bytes](), None, b""
    with path.open("rb") as file:
        while left := left or file.read(2**16):  # what follows a frame is copied: little at a time
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(left))
            left = frame.unused_data
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")
    return b"".join(parts)


def _damages() -> tuple[type[Exception], ...]:
    """What reading raises where the disk fails, or bytes are damaged or of another format."""
    import lzma
    import zlib

    errors = (OSError, EOFError, zlib.error, lzma.LZMAError)
    try:
        import zstandard
    except ImportError:
        return errors
    return *errors, zstandard.ZstdError


def _json_lines(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line, parse_constant=_constant)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: not valid JSON ({error.msg} at column {error.colno}); fix the line") from error
        yield Row(place, _object(place, value))


def _json_list(path: Path, file: IO[str]) -> Iterator[Row]:
    try:
        value = json.load(file, parse_constant=_constant)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        hint = "; one object per line is JSONL: name the file .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{place}: not valid JSON ({error.msg} at column {error.colno}){hint}") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise InputError(f"{path} must hold a list of objects (or one object with such a list as 'data')")
    for number, each in enumerate(value, 1):
        place = f"{path}:row {number}"
        yield Row(place, _object(place, each))


def _constant(name: str) -> float | None:
    """What is no number, which pandas writes for an empty cell, is null."""
    return None if name == "NaN" else float(name)


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f'{place}: a row must be a JSON object such as {{"text": ...}}, not {type(value).__name__}')
    return value


def _csv(path: Path, file: IO[str], delimiter: str) -> Iterator[Row]:
    """By default the delimiter is the first that parts the header, and the rows after it alike. A first line `sep=;`
    says it, as Excel writes and reads it."""
    csv.field_size_limit(_LONGEST_CELL)
    first, before = file.readline(), 0
    if said := re.fullmatch(r"sep=(.)\r?\n?", first):
        delimiter, first, before = said[1], file.readline(), 1
    head = [first, *islice(file, _HEAD)] if first else []
    delimiter = delimiter or _delimiter(head)
    lines = chain(head, file)
    reader: Any = csv.DictReader(lines, delimiter=delimiter, restkey=None, restval=None, strict=True)
    try:
        header = [name for name in reader.fieldnames or () if name]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise InputError(f"{path}:1: column {twice[0]!r} stands in the header more than once; rename one of them")
        for values in reader:
            cells = [value for each in values.values() for value in (each if isinstance(each, list) else [each])]
            if all(map(blank, cells)):
                continue
            within = sum(cell.count("\n") for cell in cells if cell)
            place = f"{path}:{before + reader.line_num - within}"
            if None in values or None in values.values():
                found = "more" if None in values else "fewer"
                raise InputError(
                    f"{place}: {found} fields than the header's {len(reader.fieldnames or ())}, parted by "
                    f"{delimiter!r}; fix the line"
                )
            yield Row(place, {name: value for name, value in values.items() if name})  # pandas' index has no name
    except csv.Error as error:
        line = before + reader.reader.line_num  # its own is that of the last whole row
        raise InputError(f"{path}:{line}: malformed CSV ({error}); fix the quoting") from error


def _delimiter(head: list[str]) -> str:
    """What parts the first lines of a file into as many columns each; else what parts the header."""

    def columns(delimiter: str) -> list[int]:
        found = list[int]()
        with suppress(csv.Error):  # of the delimiter that is taken it is raised where the row is read
            found.extend(len(record) for record in csv.reader(head, delimiter=delimiter) if record)
        return found[:-1] if len(head) > _HEAD else found  # the last record may go on after them

    parting = [each for each in _DELIMITERS if columns(each)[:1] > [1]] or [","]
    return next((each for each in parting if len(set(columns(each))) == 1), parting[0])


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; check that it is a whole Parquet file") from error
    for number, row in enumerate(values, 1):
        yield Row(f"{path}:row {number}", decoded(row))


def decoded(value: Any) -> Any:
    """A typed value as JSON has it: text that was written as bytes, dates and decimals as text, what is no number as
    null. Other bytes, such as a picture's, stay."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list):
        return [decoded(each) for each in value]
    if isinstance(value, dict):
        return {name: decoded(each) for name, each in value.items()}
    if isinstance(value, Decimal | date | time | timedelta | UUID):
        return str(value)
    with suppress(UnicodeDecodeError):
        return value.decode() if isinstance(value, bytes) else value
    return value
