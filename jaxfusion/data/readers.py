"""Rows of one file, whatever its kind, each with the place that messages point at.

All but JSON are read as they are asked for: who takes the first rows of a large file reads no more.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxfusion.data.task import Placed, Row
from jaxfusion.errors import InputError, first_line

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escapes of half a character
PARQUET_ROWS = 4096  # that are turned into Python's objects at a time


def read_file(file: Path, columns: tuple[str, ...] | None = None) -> Iterator[Placed]:
    """Rows of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, in its order.

    Args:
      columns: names of a CSV's or TSV's columns; None takes them from its first line.

    Raises:
      InputError: another kind of file, one that is cut short or not UTF-8, or a malformed row.
    """
    if file.suffix not in READERS:
        raise InputError(f"{file} is none of {', '.join(READERS)}")
    return READERS[file.suffix](file, columns)


def is_blank(value: Any) -> bool:
    """Whether a cell holds nothing: no value, no number (as Parquet has it), or spaces alone."""
    return value is None or value != value or not str(value).strip()


def _lines(file: Path) -> Iterator[str]:
    """The lines with their ends; a byte-order mark is no part of the first."""
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                wide = ", as UTF-16 begins" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise InputError(
                    f"{file}:{number}: is not UTF-8: byte 0x{line[error.start]:02x} at offset "
                    f"{offset + error.start} of the file{wide}; save the file as UTF-8") from None
            offset += len(line)
            yield text.removeprefix("\ufeff") if number == 1 else text


def _table(file: Path, columns, lines: Iterator[tuple[int, list[str]]], what: str):
    """Rows of numbered lines of fields, the first of which names the columns unless given."""
    for number, fields in lines:
        if columns is None:
            columns = tuple(fields)
            if len(set(columns)) < len(columns):
                raise InputError(f"{file}:{number}: a column's name stands there twice: "
                                 f"{', '.join(columns)}")
            continue
        if len(fields) != len(columns):
            raise InputError(f"{file}:{number}: {len(fields)} {what}-separated fields, wanted "
                             f"{len(columns)} ({', '.join(columns)})")
        yield dict(zip(columns, fields, strict=True)), f"{file}:{number}"


def _read_tsv(file: Path, columns) -> Iterator[Placed]:
    """Plain tab-separated fields: a quote is a character like any other."""
    lines = enumerate((line.rstrip("\r\n").split("\t") for line in _lines(file)), start=1)
    return _table(file, columns, lines, "tab")


def _read_csv(file: Path, columns) -> Iterator[Placed]:
    """Comma-separated fields as RFC 4180 has them: quoted ones may hold commas and line ends."""
    return _table(file, columns, _csv_records(file), "comma")


def _csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # long texts are cut later, and counted
    reader = csv.reader(_lines(file), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{file}:{_opened(file, first, reader.line_num)}: a quote is opened here and not "
                f"closed as CSV wants it (line {reader.line_num}: {error}); double the quotes "
                "inside of a text") from None
        if fields is None:
            return
        yield first, fields


def _opened(file: Path, first: int, last: int) -> int:
    """The line between these two from which on a quote is open."""
    opened = None
    for number, line in enumerate(_lines(file), start=1):
        if first <= number <= last:
            inside = (opened is not None) ^ (line.count('"') % 2 == 1)
            opened = (opened or number) if inside else None
    return opened or first


def _read_jsonl(file: Path, columns) -> Iterator[Placed]:
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}:{number}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: wanted a JSON object with the row's columns")
        if SURROGATE.search(line) and not _is_text(row):
            raise InputError(f"{file}:{number}: half of a character (a lone \\ud800 … \\udfff); "
                             "write the file anew from its texts")
        yield row, f"{file}:{number}"


def _is_text(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_json(file: Path, columns) -> Iterator[Placed]:
    try:
        rows: list[Row] = json.loads("".join(_lines(file)))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: no JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: wanted a JSON list of objects with the rows' columns")
    yield from ((row, f"{file} row {number}") for number, row in enumerate(rows, start=1))


def _read_parquet(file: Path, columns) -> Iterator[Placed]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file} row {number}"
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as Parquet behind row {number}: "
                         f"{first_line(error)}; is the file whole?") from None


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
           ".parquet": _read_parquet}
