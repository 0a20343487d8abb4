"""Reads parallel prompts: the same content in several languages, row by row."""

from pathlib import Path

from jaxfusion.data.rows.examples import check_aligned
from jaxfusion.data.rows.files import read_file, read_lines
from jaxfusion.data.tasks.spec import Placed
from jaxfusion.errors import InputError, first_line
from jaxfusion.fields import ParallelConfig
from jaxfusion.hf.hub import hub_in_reach


def read_parallel(config: ParallelConfig) -> tuple[dict[str, list[str]], list[str] | None]:
    """The prompts of the central language and of the targets, and the answers if configured.

    Raises:
      InputError: a file, dataset or column is missing, a prompt is empty, or lengths differ.
    """
    languages = (config.central, *config.targets)
    if not config.targets or len(set(languages)) < len(languages):
        raise InputError(f"data.central is '{config.central}' and data.targets {config.targets}: "
                         "expected at least one target, without duplicates or the central language")
    if not config.path:
        raise InputError("data.path is empty: expected a .jsonl, .csv, .tsv or .parquet file with "
                         "a column for each language, a pattern of text files with {language}, or "
                         "a hub dataset")
    columns = {name: config.columns.get(name, name) for name in languages}
    if "{language}" in config.path:
        prompts = {name: read_lines(Path(config.path.replace("{language}", column)).expanduser())
                   for name, column in columns.items()}
        check_aligned(prompts)
        answers = None
    else:
        path = Path(config.path).expanduser()
        rows = list(read_file(path)) if path.is_file() else _hub(config.path)
        prompts = {name: _column(rows, column, config.path) for name, column in columns.items()}
        answers = _column(rows, config.answer, config.path) if config.answer else None
    for name, texts in prompts.items():
        if empty := [i + 1 for i, text in enumerate(texts) if not text.strip()]:
            raise InputError(f"{config.path}: row {empty[0]} is empty in '{name}'")
    return prompts, answers


def _column(rows: list[Placed], column: str, path: str) -> list[str]:
    """A column of all rows; null becomes an empty text."""
    if not rows or not any(column in row for row, _ in rows):
        raise InputError(f"{path} has no column '{column}'; it has "
                         f"{', '.join(rows[0][0]) if rows else 'no rows'}; set data.columns")
    for row, where in rows:
        if column not in row:
            raise InputError(f"{where}: column '{column}' is missing, which other rows have")
    return ["" if row[column] is None else str(row[column]) for row, _ in rows]


def _hub(name: str) -> list[Placed]:
    import datasets

    hub_in_reach()  # if not, this sets the library offline, so that it fails at once
    try:
        rows = datasets.load_dataset(name, split="train")
        return [(row, f"{name} row {number}") for number, row in enumerate(rows)]
    except Exception as error:
        raise InputError(f"'{name}' is neither a file nor a readable hub dataset "
                         f"({first_line(error)}); data.path may also be a pattern with "
                         "{language}") from None
