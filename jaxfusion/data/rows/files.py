"""Rows of one JSONL, JSON, CSV, TSV or Parquet file, each with its place for messages.

Rows stream (except JSON), so taking the first N reads no further.
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

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escapes of a surrogate
PARQUET_ROWS, OBJECTS = 4096, 64  # rows read, and converted to Python objects, at a time
UNPACKED_BYTES, UNPACKED_TIMES = 1 << 30, 1000  # a Parquet file beyond is damaged, or an attack
T = TypeVar("T")
logger = logging.getLogger(__name__)


def kind_of(file: Path) -> str | None:
    """The file's suffix in `READERS`, in any case, with or without `.gz`; None if it has none."""
    name = file.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS and not name.endswith(".parquet.gz") else None


def read_file(
    file: Path, columns: tuple[str, ...] | None = None, quoted: bool = False
) -> Iterator[Placed]:
    """Rows of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, in order.

    All but Parquet may be compressed with gzip (`.jsonl.gz`). Class numbers in a Parquet file that
    `datasets` wrote become class names.

    Args:
      columns: names of a CSV's or TSV's columns; None reads them from the first line.
      quoted: whether a TSV's fields may be quoted, as pandas writes and reads them; otherwise a
        quote is an ordinary character. A CSV's fields always may.

    Raises:
      InputError: an unknown suffix, a truncated file, text that is not UTF-8, or a malformed row.
    """
    kind = kind_of(file)
    if kind is None:
        raise InputError(f"{file} is not one of {', '.join(READERS)}")
    return READERS[kind](file, columns, quoted)


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, as parallel text has them; blank ones at the end are left out.

    Raises:
      InputError: it is missing, not UTF-8, or damaged.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing: parallel text has a file for every language")
    lines = [line.rstrip("\r\n") for line in _lines(file)]
    while lines and is_blank(lines[-1]):
        lines.pop()
    return lines


def is_blank(value: Any) -> bool:
    """Whether a cell is empty: None, NaN (from Parquet), or white space."""
    return value is None or value != value or not str(value).strip()


def _lines(file: Path) -> Iterator[str]:
    """The lines with their line ends, without a byte-order mark.

    In a file without a line feed, carriage returns end the lines.
    """
    offset = 0
    for number, line in enumerate(_raw_lines(file), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            wide = ", the start of UTF-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
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
        raise InputError(f"{file} cannot be unpacked ({first_line(error)}); is the file complete?"
                         ) from None


def _without_blank_end(
    lines: Iterator[tuple[int, T]], is_blank_line: Callable[[T], bool]
) -> Iterator[tuple[int, T]]:
    """Numbered lines without trailing blank ones."""
    pending = []
    for line in lines:
        pending.append(line)
        if not is_blank_line(line[1]):
            yield from pending
            pending.clear()


def _table(file: Path, columns, lines: Iterator[tuple[int, list[str]]], what: str):
    """Rows from numbered lines of fields; the first line names the columns unless given."""
    for number, fields in lines:
        if columns is None:
            columns = tuple(fields)
            if len(set(columns)) < len(columns):
                raise InputError(f"{file}:{number}: duplicate column name: {listed(columns)}")
            continue
        if len(fields) != len(columns):
            raise InputError(f"{file}:{number}: {len(fields)} {what}-separated fields, expected "
                             f"{len(columns)} ({listed(columns)})")
        yield dict(zip(columns, fields, strict=True)), f"{file}:{number}"


def _plain(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Numbered lines of tab-separated fields; a quote is an ordinary character."""
    lines = enumerate((line.rstrip("\r\n") for line in _lines(file)), start=1)
    quotes = 0
    for number, line in _without_blank_end(lines, lambda line: not line.strip()):
        fields = line.split("\t")
        quotes += any(len(x) > 1 and x[0] == x[-1] == '"' and '""' in x[1:-1] for x in fields)
        yield number, fields
    if quotes:
        logger.warning("%s: %d lines have quoted fields with doubled quotes inside, as pandas "
                       "writes them; a .tsv is read without unquoting: save the file as .csv "
                       "instead", file, quotes)


def _read_tsv(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    return _table(file, columns, _quoted(file, "\t") if quoted else _plain(file), "tab")


def _read_csv(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    """Comma-separated fields as in RFC 4180: quoted ones may contain commas and line ends."""
    return _table(file, columns, _quoted(file, ","), "comma")


def _quoted(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Numbered records whose fields may be quoted."""
    return _without_blank_end(_records(file, delimiter), lambda fields: not "".join(fields).strip())


def _records(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # long texts are truncated later, and counted
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{file}:{_opened(file, first, reader.line_num)}: unterminated quoted field starts "
                f"here (line {reader.line_num}: {error}); double the quotes inside a field"
            ) from None
        if fields is None:
            return
        yield first, fields


def _opened(file: Path, first: int, last: int) -> int:
    """The line between these two where an unterminated quote starts."""
    start = None
    for number, line in enumerate(_lines(file), start=1):
        if first <= number <= last:
            inside = (start is not None) ^ (line.count('"') % 2 == 1)
            start = (start or number) if inside else None
    return start or first


def _read_jsonl(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    lines = enumerate(_lines(file), start=1)
    for number, line in _without_blank_end(lines, lambda line: not line.strip()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}:{number}: not JSON ({first_line(error)})") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: expected a JSON object with the row's columns")
        if SURROGATE.search(line):
            _check_text(row, f"{file}:{number}")
        yield row, f"{file}:{number}"


def _check_text(row: Row, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: unpaired surrogate (\\ud800 … \\udfff); write the file again "
                         "from its texts") from None


def _read_json(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    try:
        text = "".join(_lines(file))
        rows: list[Row] = json.loads(text)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({first_line(error)})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: expected a JSON list of objects with the rows' columns")
    has_surrogates = SURROGATE.search(text)
    for number, row in enumerate(rows, start=1):
        if has_surrogates:
            _check_text(row, f"{file} row {number}")
        yield row, f"{file} row {number}"


def _read_parquet(file: Path, columns, quoted: bool) -> Iterator[Placed]:
    import pyarrow
    from pyarrow import parquet

    number, size = 0, file.stat().st_size
    limit = max(UNPACKED_BYTES, UNPACKED_TIMES * size)
    try:
        schema = parquet.read_schema(file)
        if len(set(schema.names)) < len(schema.names):  # Python would keep the last one's values
            raise InputError(f"{file}: duplicate column name: {listed(schema.names)}")
        # Dictionaries store repeated texts once until they become rows.
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        classes = _class_names(schema)
        with parquet.ParquetFile(file, read_dictionary=texts) as table:
            for batch in table.iter_batches(PARQUET_ROWS):
                for row in _as_objects(batch):
                    number += 1
                    limit -= sum(len(x) for x in row.values() if isinstance(x, str))
                    if limit < 0:
                        raise InputError(f"{file} unpacks to more than {UNPACKED_TIMES:,} times "
                                         f"its {size:,} bytes; reading stopped at row {number}")
                    yield with_class_names(row, classes), f"{file} row {number}"
    except InputError:
        raise
    # Dates, times and zones that Python cannot represent raise OverflowError or KeyError.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        raise InputError(f"{file} cannot be read as Parquet after row {number}: "
                         f"{first_line(error)}; is the file complete?") from None


def _class_names(schema) -> dict[str, list[str]]:
    """Class names by column, from the schema metadata that `datasets` writes."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
        return {column: list(map(str, feature["names"])) for column, feature in features.items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}


def _as_objects(batch) -> Iterator[Row]:
    """Rows of a batch, a few at a time: each repeats texts that the batch stores once."""
    for start in range(0, batch.num_rows, OBJECTS):
        yield from batch.slice(start, OBJECTS).to_pylist()


def with_class_names(row: Row, names: dict[str, list[str]]) -> Row:
    """The row with class numbers replaced by names; an unknown class (-1) stays a number."""
    return row | {column: known[row[column]] for column, known in names.items()
                  if isinstance(row.get(column), int) and 0 <= row[column] < len(known)}


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
           ".parquet": _read_parquet}
