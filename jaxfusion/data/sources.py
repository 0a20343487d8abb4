"""Rows of a task, from its files or its hub dataset, each checked and with a place to point at."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxfusion.data.lexicon import check_version
from jaxfusion.data.tasks import Files, Task
from jaxfusion.errors import InputError, first_line

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
    rows = _hub_rows(name, task, split, language) if path is None else _file_rows(
        name, task, split, language, Path(path).expanduser()
    )
    examples = [_example(task, row, where) for row, where in rows]
    if not examples:
        raise InputError(f"split '{split}' of task '{name}' in '{language}' is empty")
    return examples


def _example(task: Task, row: dict[str, Any], where: str) -> Example:
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
    """The class from its label, in any case, or its number."""
    text = str(value).strip().casefold()
    for names in (task.labels, range(len(task.labels))):
        found = [str(name).casefold() for name in names]
        if text in found:
            return found.index(text)
    raise InputError(
        f"{where}: label {value!r} is none of {', '.join(task.labels)} "
        f"(or 0 … {len(task.labels) - 1})"
    )


def _file_rows(name, task, split, language, path) -> Iterator[tuple[dict[str, Any], str]]:
    check_version(path)
    generic = f"{split}-{language}.jsonl"
    if (path / generic).is_file():
        yield from _read(path / generic, Files(), slice(None))
        return
    pattern = task.files.splits.get(split)
    if pattern is None:
        raise InputError(f"{path / generic} is missing: task '{name}' reads its rows there")
    file, first, last = SLICE.fullmatch(pattern.format(language=language)).groups()
    if not (path / file).is_file():
        raise InputError(f"{path / file} is missing (nor is there {path / generic})")
    rows = slice(int(first) if first else None, int(last) if last else None)
    yield from _read(path / file, task.files, rows)


def read_rows(file: Path) -> list[tuple[dict[str, Any], str]]:
    """All rows of a `.tsv` (with a header) or `.jsonl` file, each with its place for messages.

    Raises:
      InputError: another kind of file, or a malformed row.
    """
    if file.suffix not in (".tsv", ".jsonl"):
        raise InputError(f"{file} is no .tsv or .jsonl file")
    return list(_read(file, Files(), slice(None)))


def _read(file: Path, layout: Files, rows: slice) -> Iterator[tuple[dict[str, Any], str]]:
    read = {".tsv": _read_tsv, ".jsonl": _read_jsonl}[file.suffix]
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from None
    if lines[-1] == "":
        lines.pop()
    for row, where in list(read(file, layout, [line.rstrip("\r") for line in lines]))[rows]:
        yield {layout.rename.get(column, column): value for column, value in row.items()}, where


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


def _hub_rows(name, task, split, language) -> Iterator[tuple[dict[str, Any], str]]:
    if task.hub is None:
        raise InputError(f"task '{name}' has no hub dataset; set config.data.path to its files")
    import datasets

    hub = task.hub
    config = hub.config and hub.config.format(language=language, split=_config_split(split))
    try:
        data = datasets.load_dataset(hub.name, config, split=hub.splits[split])
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"dataset {hub.name} ({config}, {hub.splits[split]}) cannot be read: {reason}. "
            f"Without the hub, put {split}-{language}.jsonl in a directory and set "
            "config.data.path to it"
        ) from None
    for number, row in enumerate(data):
        row = {hub.rename.get(column, column): value for column, value in row.items()}
        yield row, f"{hub.name} ({config}) {split} row {number}"


def _config_split(split: str) -> str:
    """Datasets with a configuration per split have none for development."""
    return "train" if split == "dev" else split
