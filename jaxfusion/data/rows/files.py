"""Rows of one file, whatever its kind, each with the place that messages point at.

All but JSON are read as they are asked for: who takes the first rows of a large file reads no more.
"""

import csv
import gzip
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from jaxfusion.data.tasks.spec import Placed, Row
from jaxfusion.errors import InputError, first_line, listed

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escapes of half a character
PARQUET_ROWS, OBJECTS = 4096, 64  # rows that are read, and made Python's objects, at a time
UNPACKED_BYTES, UNPACKED_TIMES = 1 << 30, 1000  # a Parquet file of more is damage, or an attack
T = TypeVar("T")
logger = logging.getLogger(__name__)


def kind_of(file: Path) -> str | None:
    """The suffix in `READERS` that a file has, in any case, compressed by gzip or not."""
    name = file.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS and not name.endswith(".parquet.gz") else None


def read_file(
    file: Path, columns: tuple[str, ...] | None = None, quoted: bool = False
) -> Iterator[Placed]:
    """Rows of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, in its order.

    All but Parquet may be compressed by gzip (`.jsonl.gz`). Of a Parquet file that `datasets` wrote
    classes have their names.

    Args:
      columns: names of a CSV's or TSV's columns; None takes them from its first line.
      quoted: whether a TSV's fields may be in quotes, as pandas writes and reads them. Otherwise a
        quote is a character like any other. A CSV's always may.

    Raises:
      InputError: another kind of file, one that is cut short or not UTF-8, or a malformed row.
    """
    kind = kind_of(file)
    if kind is None:
        raise InputError(f"{file} is none of {', '.join(READERS)}")
    return READERS[kind](file, columns, quoted)


def is_blank(value: Any) -> bool:
    """Whether a cell holds nothing: no value, no number (as Parquet has it), or spaces alone."""
    return value is None or value != value or not str(value).strip()


def _lines(file: Path) -> Iterator[str]:
    """The lines with their ends; a byte-order mark is left out.

    A file without a line feed has lines that end in carriage returns.
    """
    offset = 0
    for number, line in enumerate(_raw_lines(file), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            wide = ", as UTF-16 begins" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise InputError(
                f"{file}:{number}: is not UTF-8: byte 0x{line[error.start]:02x} at offset "
                f"{offset + error.start} of the file{wide}; save the file as UTF-8") from None
        offset += len(line)
        yield text.removeprefix("\ufeff") if number == 1 else text


def _raw_lines(file: Path) -> Iterator[bytes]:
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            first = stream.readline()
            if b"\r" in first and not first.endswith(b"\n"):
                yield from first.splitlines(keepends=True)
            elif first:
                yield first
                yield from stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file} cannot be unpacked ({first_line(error)}); is the file whole?"
                         ) from None


def _without_blank_end(
    lines: Iterator[tuple[int, T]], is_blank_line: Callable[[T], bool]
) -> Iterator[tuple[int, T]]:
    """Numbered lines without the blank ones after the last that is not."""
    held = []
    for line in lines:
        held.append(line)
        if not is_blank_line(line[1]):
            yield from held
            held.clear()


def _table(file: Path, columns, lines: Iterator[tuple[int, list[str]]], what: str):
    """Rows of numbered lines of fields, the first of which names the columns unless given."""
    for number, fields in lines:
        if columns is None:
            columns = tuple(fields)
            if len(set(columns)) < len(columns):
                raise InputError(f"{file}:{number}: a column's name stands there twice: "
                                 f"{listed(columns)}")
            continue
        if len(fields) != len(columns):
            raise InputError(f"{file}:{number}: {len(fields)} {what}-separated fields, wanted "
                             f"{len(columns)} ({listed(columns)})")
        yield dict(zip(columns, fields, strict=True)), f"{file}:{number}"


def _plain(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Numbered lines of tab-separated fields; a quote is a character like any other."""
    lines = enumerate((line.rstrip("\r\n") for line in _lines(file)), start=1)
    quotes = 0
    for number, line in _without_blank_end(lines, lambda line: not line.strip()):
        fields = line.split("\t")
        quotes += any(len(x) > 1 and x[0] == x[-1] == '"' and '""' in x[1:-1] for x in fields)
        yield number, fields
    if quotes:
        logger.warning("%s: %d lines have fields in quotes with quotes doubled inside, as pandas "
                       "writes them; a .tsv is read as it is: save the file as .csv instead",
                       file, quotes)


def _read_tsv(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    return _table(file, columns, _quoted(file, "\t") if quoted else _plain(file), "tab")


def _read_csv(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    """Comma-separated fields as RFC 4180 has them: quoted ones may hold commas and line ends."""
    return _table(file, columns, _quoted(file, ","), "comma")


def _quoted(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Numbered records whose fields may be in quotes."""
    return _without_blank_end(_records(file, delimiter), lambda fields: not "".join(fields).strip())


def _records(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # long texts are cut later, and counted
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
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


def _read_jsonl(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    lines = enumerate(_lines(file), start=1)
    for number, line in _without_blank_end(lines, lambda line: not line.strip()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}:{number}: not JSON ({first_line(error)})") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: wanted a JSON object with the row's columns")
        if SURROGATE.search(line):
            _check_text(row, f"{file}:{number}")
        yield row, f"{file}:{number}"


def _check_text(row: Row, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half of a character (a lone \\ud800 … \\udfff); write the file "
                         "anew from its texts") from None


def _read_json(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    try:
        text = "".join(_lines(file))
        rows: list[Row] = json.loads(text)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({first_line(error)})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: wanted a JSON list of objects with the rows' columns")
    halves = SURROGATE.search(text)
    for number, row in enumerate(rows, start=1):
        if halves:
            _check_text(row, f"{file} row {number}")
        yield row, f"{file} row {number}"


def _read_parquet(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    import pyarrow
    from pyarrow import parquet

    number, size = 0, file.stat().st_size
    limit = max(UNPACKED_BYTES, UNPACKED_TIMES * size)
    try:
        schema = parquet.read_schema(file)
        if len(set(schema.names)) < len(schema.names):  # of whose values Python keeps the last
            raise InputError(f"{file}: a column's name stands there twice: {listed(schema.names)}")
        # Texts that come again are held once until they are rows.
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        classes = _class_names(schema)
        with parquet.ParquetFile(file, read_dictionary=texts) as table:
            for batch in table.iter_batches(PARQUET_ROWS):
                for row in _as_objects(batch):
                    number += 1
                    limit -= sum(len(x) for x in row.values() if isinstance(x, str))
                    if limit < 0:
                        raise InputError(f"{file} unpacks to more than {UNPACKED_TIMES:,} times "
                                         f"its {size:,} bytes; it is not read past row {number}")
                    yield named(row, classes), f"{file} row {number}"
    except InputError:
        raise
    # Days, times and zones that Python does not have are an OverflowError or a KeyError.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise InputError(f"{file} cannot be read as Parquet behind row {number}: "
                         f"{first_line(error)}; is the file whole?") from None


def _class_names(schema) -> dict[str, list[str]]:
    """Names of the classes by column, from what `datasets` writes into a schema's metadata."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
        return {column: list(map(str, feature["names"])) for column, feature in features.items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}


def _as_objects(batch) -> Iterator[Row]:
    """Rows of a batch; of texts that it holds once, few are made at a time."""
    for start in range(0, batch.num_rows, OBJECTS):
        yield from batch.slice(start, OBJECTS).to_pylist()


def named(row: Row, names: dict[str, list[str]]) -> Row:
    """The row with the names of its classes by column; an unknown class (-1) stays what it is."""
    return row | {column: known[row[column]] for column, known in names.items()
                  if isinstance(row.get(column), int) and 0 <= row[column] < len(known)}


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
           ".parquet": _read_parquet}
