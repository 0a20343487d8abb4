"""Prompts that mean the same in several languages, row by row."""

from pathlib import Path
from typing import Any

from jaxfusion.data.sources import read_rows
from jaxfusion.errors import InputError, first_line
from jaxfusion.fields import ParallelConfig


def read_parallel(config: ParallelConfig) -> tuple[dict[str, list[str]], list[str] | None]:
    """The prompts of the central language and of the targets, and the answers if there are any.

    Raises:
      InputError: a file, dataset or column is missing, a prompt is empty, or lengths differ.
    """
    languages = (config.central, *config.targets)
    if not config.targets or len(set(languages)) < len(languages):
        raise InputError(f"data.central is '{config.central}' and data.targets {config.targets}: "
                         "wanted one target or more, each once and none of them central")
    columns = {name: config.columns.get(name, name) for name in languages}
    path = Path(config.path).expanduser()
    if "{language}" in config.path:
        found = {name: _lines(Path(config.path.format(language=column)).expanduser())
                 for name, column in columns.items()}
        answers = None
    else:
        rows = [row for row, _ in read_rows(path)] if path.is_file() else _hub(config.path)
        wanted = [*columns.values(), *([config.answer] if config.answer else [])]
        absent = [column for column in wanted if rows and column not in rows[0]]
        if absent or not rows:
            raise InputError(f"{config.path} has no column '{(absent or wanted)[0]}'; it has "
                             f"{', '.join(rows[0]) if rows else 'no rows'}; set data.columns")
        found = {name: [str(row[column]) for row in rows] for name, column in columns.items()}
        answers = [str(row[config.answer]) for row in rows] if config.answer else None
    lengths = {name: len(texts) for name, texts in found.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{config.path}: languages differ in their number of rows: {lengths}")
    for name, texts in found.items():
        if empty := [i + 1 for i, text in enumerate(texts) if not text.strip()]:
            raise InputError(f"{config.path}: row {empty[0]} is empty in '{name}'")
    return found, answers


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(f"{file} is missing: data.path names a text file for every language")
    try:
        return file.read_text("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from None


def _hub(name: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return list(datasets.load_dataset(name, split="train"))
    except Exception as error:
        raise InputError(f"'{name}' is neither a file here nor a hub dataset that can be read "
                         f"({first_line(error)}); data.path may also be a pattern with "
                         "{language}") from None
