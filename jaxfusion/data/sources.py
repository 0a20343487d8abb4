"""Rows of a task, from its files or its hub dataset, each checked and with a place to point at."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxfusion.data.lexicon import check_version
from jaxfusion.data.task import Files, Hub, Row, Task
from jaxfusion.errors import InputError, first_line

Placed = tuple[Row, str]  # a row, and where it stands for messages
SLICE = re.compile(r"(.*?)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Example:
    """One row: the encoder's text, the answer, and its class (-1 for free text)."""

    query: str
    target: str
    label: int


def read_examples(
    name: str, task: Task, split: str, language: str, path: str | None
) -> list[Example]:
    """All rows of a split, in the source's order.

    Args:
      name: the task's name, for messages.
      path: the directory of the task's files; None reads the hub.

    Raises:
      InputError: no such file or dataset, or a malformed row (named with its line).
    """
    rows, own = _rows(name, task, split, language, path)
    for column, other in task.borrowed.items() if not own and language not in task.hubs else ():
        rows = _borrow(rows, column, _rows(name, task, split, other, path)[0], other)
    examples = [_example(task, row, where) for row, where in rows]
    if not examples:
        raise InputError(f"split '{split}' of task '{name}' in '{language}' is empty")
    return examples


def _rows(name, task, split, language, path) -> tuple[list[Placed], bool]:
    """All rows, and whether they are of the user's own making."""
    if path is None:
        return list(_hub_rows(name, task, split, language)), False
    folder = Path(path.format(task=name)).expanduser()
    own = folder / f"{split}-{language}.jsonl"
    return list(_file_rows(name, task, split, language, folder)), own.is_file()


def _borrow(rows: list[Placed], column: str, others: list[Placed], language: str) -> list[Placed]:
    """Rows with a column of another language's, row by row."""
    if len(rows) != len(others) or not all(column in row for row, _ in others):
        where = [*rows, *others][0][1]
        raise InputError(f"{where}: {len(rows)} rows, but {len(others)} in '{language}', from "
                         f"where column '{column}' is taken")
    return [({**row, column: other[column]}, where)
            for (row, where), (other, _) in zip(rows, others, strict=True)]


def _example(task: Task, row: Row, where: str) -> Example:
    try:
        query = task.prompt.format(**row)
        answer = row[task.target_column]
    except KeyError as error:
        raise InputError(
            f"{where}: column {error} is missing; found: {', '.join(row)}"
        ) from None
    for column in re.findall(r"{(\w+)}", task.prompt):
        if not str(row[column] or "").strip():
            raise InputError(f"{where}: column '{column}' is empty")
    if not task.labels:
        if not str(answer or "").strip():
            raise InputError(f"{where}: column 'target' is empty")
        return Example(query, str(answer), -1)
    label = _label(task, answer, where)
    return Example(query, task.labels[label], label)


def _label(task: Task, value: Any, where: str) -> int:
    """The class from its label, in any case, or from how the data writes it."""
    text = str(value).strip().casefold()
    for names in (task.labels, task.spellings or range(len(task.labels))):
        found = [str(name).casefold() for name in names]
        if text in found:
            return found.index(text)
    raise InputError(
        f"{where}: label {value!r} is none of {', '.join(task.labels)} "
        f"(or {', '.join(task.spellings) or f'0 … {len(task.labels) - 1}'})"
    )


def _file_rows(name, task, split, language, path) -> Iterator[Placed]:
    check_version(path)
    generic = f"{split}-{language}.jsonl"
    if (path / generic).is_file():
        yield from _read(path / generic, Files(), slice(None))
        return
    theirs = task.files.names.get(language, language)
    pattern = task.files.splits.get(split)
    if pattern is None:
        raise InputError(f"{path / generic} is missing: task '{name}' reads its rows there")
    file, first, last = SLICE.fullmatch(pattern.format(language=theirs)).groups()
    if not (path / file).is_file():
        raise InputError(f"{path / file} is missing (nor is there {path / generic})")
    rows = slice(int(first) if first else None, int(last) if last else None)
    yield from _made(_read(path / file, task.files, rows), task.files, theirs)


def _made(rows: Iterator[Placed], source: Files | Hub, language: str) -> Iterator[Placed]:
    """Rows in our columns. `language`: as the source calls it."""
    for row, where in rows:
        row = {source.rename.get(column, column): value for column, value in row.items()}
        try:
            row = row if source.make is None else source.make(row, language)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{where}: cannot be read ({error!r}); found: {', '.join(row)}"
                             ) from None
        if row is not None:
            yield row, where


def read_rows(file: Path) -> list[Placed]:
    """All rows of a `.tsv` (with a header), `.jsonl` or `.json` file.

    Raises:
      InputError: another kind of file, or a malformed row.
    """
    if file.suffix not in READERS:
        raise InputError(f"{file} is no .tsv, .jsonl or .json file")
    return list(_read(file, Files(), slice(None)))


def _read(file: Path, layout: Files, rows: slice) -> Iterator[Placed]:
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from None
    if lines[-1] == "":
        lines.pop()
    lines = [line.rstrip("\r") for line in lines]
    yield from list(READERS[file.suffix](file, layout, lines))[rows]


def _read_tsv(file, layout, lines):
    """Plain tab-separated fields: a quote is a character like any other."""
    columns, first = layout.columns, 1
    if columns is None:
        columns, first = tuple(lines[0].split("\t")) if lines else (), 2
    for number, line in enumerate(lines[first - 1 :], start=first):
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise InputError(
                f"{file}:{number}: {len(fields)} tab-separated fields, wanted {len(columns)} "
                f"({', '.join(columns)})"
            )
        yield dict(zip(columns, fields, strict=True)), f"{file}:{number}"


def _read_jsonl(file, layout, lines):
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}:{number}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: wanted a JSON object with the row's columns")
        yield row, f"{file}:{number}"


def _read_json(file, layout, lines):
    try:
        rows = json.loads("\n".join(lines))
    except ValueError as error:
        raise InputError(f"{file}: no JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: wanted a JSON list of objects with the rows' columns")
    return ((row, f"{file} row {number}") for number, row in enumerate(rows, start=1))


READERS = {".tsv": _read_tsv, ".jsonl": _read_jsonl, ".json": _read_json}


def _hub_rows(name, task, split, language) -> Iterator[Placed]:
    hub = task.hubs.get(language, task.hub)
    if hub is None:
        raise InputError(f"task '{name}' has no hub dataset; set config.data.path to its files")
    if split not in hub.splits:
        raise InputError(f"{hub.name} has no split for '{split}'; it has {', '.join(hub.splits)}")
    import datasets

    theirs = hub.names.get(language, language)
    config = hub.config and hub.config.format(language=theirs, split=_config_split(split))
    try:
        data = datasets.load_dataset(hub.name, config, split=hub.splits[split])
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"dataset {hub.name} ({config}, {hub.splits[split]}) cannot be read: {reason}. "
            f"Without the hub, put {split}-{language}.jsonl in a directory and set "
            "config.data.path to it"
        ) from None
    rows = ((row, f"{hub.name} ({config}) {split} row {number}") for number, row in enumerate(data))
    yield from _made(rows, hub, theirs)


def _config_split(split: str) -> str:
    """Datasets with a configuration per split have none for development."""
    return "train" if split == "dev" else split
