"""Reads and checks the rows of a task, from any kind of source."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape
from itertools import chain, islice, pairwise
from math import inf
from pathlib import Path
from typing import Any

from jaxfusion.data.pocket.lexicon import check_version
from jaxfusion.data.rows.files import READERS, is_blank, kind_of, read_file, read_lines
from jaxfusion.data.rows.hub import read_hub
from jaxfusion.data.rows.tfds import read_tfds
from jaxfusion.data.tasks.spec import SAME, Placed, Row, Source, Task
from jaxfusion.errors import InputError, listed

MAGIC = re.compile(r"[*?{]|\[.*\]")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)  # a run may hold millions
class Example:
    """One row: the encoder's text, the answer, its class (-1 for free text), and its language."""

    query: str
    target: str
    label: int
    language: str = ""


def read_examples(
    name: str, task: Task, split: str, language: str, path: str | None
) -> list[Example]:
    """All rows of a split in the source's order; arguments and errors as in `examples`."""
    return list(read_stream(name, task, split, language, path))


def read_stream(
    name: str, task: Task, split: str, language: str, path: str | None
) -> Iterator[Example]:
    """Iterates over a split in the source's order, reading lazily.

    Args:
      name: the task's name, for messages.
      language: or `all`: one language of the task after the other.
      path: `data.path`: where the rows are; None: the task's own source.

    Raises:
      InputError: no such file or dataset, no rows, or a malformed row (reported with its line).
    """
    return chain.from_iterable(_stream(name, task, split, one, path)
                               for one in task.training_languages(language))


def in_turn(parts: Iterable[Iterable[Example]]) -> Iterator[Example]:
    """One row of each part after the other, until all have ended."""
    left = [iter(part) for part in parts]
    while left:
        for part in list(left):
            try:
                yield next(part)
            except StopIteration:
                left.remove(part)


def _stream(
    name: str, task: Task, split: str, language: str, path: str | None
) -> Iterator[Example]:
    if task.unlabelled and split == "test":
        raise InputError(f"task '{name}' is unlabelled text and cannot be scored; name other tasks "
                         "in config.eval.tasks or --tasks")
    source = find_source(name, task, split, language, path)
    rows = _rows(name, source, split, language, task.labels)
    for column, other in source.borrowed.items():
        rows = _borrow(list(rows), column, list(_rows(name, source, split, other, ())), other)
    theirs = {ours: name for name, ours in source.rename.items()}
    empty = True
    # Duplicate ids are checked in files alone: a user cannot fix a published dataset.
    for row, where in _once(rows) if source.kind == "files" else rows:
        empty = False
        yield _example(task, row, where, language, theirs)
    if empty:
        raise InputError(f"split '{split}' of task '{name}' in '{language}' is empty: "
                         f"{source.place} has no rows for it")


def find_source(name: str, task: Task, split: str, language: str, path: str | None) -> Source:
    """The source of a task's rows.

    Raises:
      InputError: the task has no source, or a file is missing.
    """
    if path is None:
        source = task.sources.get(language, task.source)
        if source is None:
            raise InputError(f"task '{name}' has no source of its own; set config.data.path, "
                             "or --data_path of eval.py, to where its rows are")
        return source
    place = path.replace("{task}", name)
    folder = Path(place).expanduser()
    if folder.is_dir():
        return _in_folder(name, task, split, language, folder)
    source = task.at(place)
    # Rows have their own answers; lines of text have those of the task.
    return replace(source, answers=None) if kind_of(folder) else source


def _in_folder(name: str, task: Task, split: str, language: str, folder: Path) -> Source:
    check_version(folder)
    own = _own_files(task, folder, split, language)
    if len(own) > 1:
        raise InputError(f"both {own[0]} and {own[1].name} exist for this split; keep one")
    if own:
        ending = own[0].name.removeprefix(f"{split}-{language}")
        return Source(str(folder / f"{{split}}-{{language}}{ending}"), splits=SAME)
    generic = f"{split}-{language}.jsonl"
    if task.files is None or split not in task.files.splits:
        raise InputError(f"{folder / generic} is missing: task '{name}' reads its rows from it, or "
                         f"from a file of that name with suffix {', '.join([*READERS][1:])}")
    source = replace(task.files, place=str(folder / task.files.place))
    if not (file := _filled(source, split, language)).is_file():
        raise InputError(f"{file} is missing (and so is {generic})")
    return source


def _own_files(task: Task, folder: Path, split: str, language: str) -> list[Path]:
    """The user's own files with these rows in a directory."""
    stem = f"{split}-{language}"
    endings = {stem + ending for suffix in READERS for ending in (suffix, f"{suffix}.gz")}
    named = sorted(file for file in folder.glob(f"{escape(stem)}.*")
                   if kind_of(file) and stem + file.name[len(stem):].lower() in endings)
    # XNLI's own dev-en.tsv is divided into all three splits.
    theirs = [folder / _filled(task.files, x, language) for x in task.files.splits
              ] if task.files else []
    return [file for file in named if file.is_file() and file not in theirs]


def _filled(source: Source, split: str, language: str) -> Path:
    """The path or pattern with split and language substituted."""
    place = source.place.replace("{language}", source.names.get(language, language))
    return Path(place.replace("{split}", source.rows(split)[0])).expanduser()


def at_hand(name: str, task: Task, split: str, path: str | None) -> tuple[str, ...]:
    """The languages of a task whose files exist; all languages if they share one source."""
    source = task.source if path is None else task.at(path.replace("{task}", name))
    languages = []
    if path is not None and (folder := Path(source.place).expanduser()).is_dir():
        theirs = task.files and split in task.files.splits and task.files.by_language and (
            replace(task.files, place=str(folder / task.files.place)))
        languages = [x for x in task.languages if _own_files(task, folder, split, x)
                     or (theirs and _filled(theirs, split, x).is_file())]
    elif source and source.kind == "files" and source.by_language and split in source.splits:
        languages = [x for x in task.languages if _matches(_filled(source, split, x))]
    return tuple(languages) or task.languages


def _rows(name, source: Source, split, language, labels) -> Iterator[Placed]:
    """Rows of one language in our columns."""
    if split not in source.splits:
        raise InputError(f"{source.name} has no split for '{split}'; it has "
                         f"{', '.join(source.splits)}")
    source_language = source.names.get(language, language)
    if source.kind == "files":
        rows = _file_rows(name, source, split, language)
    else:
        read = {"hub": read_hub, "tfds": read_tfds}[source.kind]
        rows = read(source, split, source_language, labels)
    rows = ((_renamed(row, source.rename), where) for row, where in rows)
    if not source.by_language:
        rows = _of_language(rows, source.place, source_language)
    for row, where in rows:
        try:
            yield (row if source.make is None else source.make(row, source_language)), where
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{where}: cannot be read ({error!r:.300}); its columns: {listed(row)}"
                             ) from None


def _renamed(row: Row, names: dict[str, str]) -> Row:
    """The row in our columns; a renamed column replaces an existing one of that name."""
    others = {column: value for column, value in row.items() if column not in names}
    return others | {ours: row[theirs] for theirs, ours in names.items() if theirs in row}


def _of_language(rows: Iterator[Placed], place: str, language: str) -> Iterator[Placed]:
    """The rows whose column `language`, if there is one, names this language."""
    others, matched = {}, False
    for row, where in rows:
        if row.get("language", language) == language:
            matched = True
            yield row, where
        else:
            others[str(row["language"])] = True
    if others and not matched:
        raise InputError(f"{place} has no rows in '{language}'; its column 'language' has "
                         f"{listed(others)}")


def _file_rows(name: str, source: Source, split: str, language: str) -> Iterator[Placed]:
    """Rows of all files that match a pattern, in order of file names."""
    if not MAGIC.search(source.place) and not Path(source.place).expanduser().exists():
        raise InputError(f"{source.place} is missing: task '{name}' reads its rows from it")
    if "{split}" not in source.place and _share_rows(source):
        raise InputError(f"{source.place} has no {{split}}: training and test rows would be the "
                         f"same; write {{split}} where the file names of task '{name}' have train, "
                         "dev or test, or give each split its own rows")
    place = _filled(source, split, language)
    if source.answers:
        return islice(_aligned(place, _filled(replace(source, place=source.answers), split,
                                              language)), *_bounds(source, split))
    files = _matches(place)
    if not files:
        what = "matches no file" if MAGIC.search(str(place)) else "is missing"
        raise InputError(f"{place} {what}: task '{name}' reads split '{split}' in '{language}' "
                         "from it")
    rows = (row for file in files for row in read_file(file, source.columns, source.quoted))
    return islice(rows, *_bounds(source, split))


def _share_rows(source: Source) -> bool:
    """Whether two splits of one file have rows in common."""
    bounds = sorted((first or 0, inf if end is None else end)
                    for first, end in (_bounds(source, split) for split in source.splits))
    return any(end > first for (_, end), (first, _) in pairwise(bounds))


def _bounds(source: Source, split: str) -> tuple[int | None, int | None]:
    selected = source.rows(split)[1]
    return selected.start, selected.stop


def _aligned(texts: Path, answers: Path) -> Iterator[Placed]:
    """Rows of parallel text: a line of one file, and the same line of the other."""
    lines, targets = read_lines(texts), read_lines(answers)
    check_aligned({str(texts): lines, str(answers): targets})
    for number, (text, target) in enumerate(zip(lines, targets, strict=True), start=1):
        yield {"text": text, "target": target}, f"{texts}:{number}"


def check_aligned(lines: dict[str, Sequence[str]]) -> None:
    """Raises InputError if parallel texts, by name, have different numbers of lines."""
    shortest, longest = (pick(lines, key=lambda x: len(lines[x])) for pick in (min, max))
    if (n := len(lines[shortest])) < len(lines[longest]):
        raise InputError(f"'{longest}' has {len(lines[longest])} lines, '{shortest}' {n}: line "
                         f"{n + 1} has no counterpart; expected translations line by line")


def _matches(place: Path) -> list[Path]:
    if place.is_file():  # whatever characters its name has
        return [place]
    anchor = Path(place.anchor)
    return sorted(x for x in anchor.glob(str(place.relative_to(anchor))) if x.is_file())


def _borrow(rows: list[Placed], column: str, others: list[Placed], language: str):
    """Rows with one column copied from the same rows in another language."""
    if len(rows) != len(others) or not all(column in row for row, _ in others):
        where = [*rows, *others][0][1]
        raise InputError(f"{where}: {len(rows)} rows, but {len(others)} in '{language}', from "
                         f"which column '{column}' is copied")
    return [({**row, column: other[column]}, where)
            for (row, where), (other, _) in zip(rows, others, strict=True)]


def _once(rows: Iterator[Placed]) -> Iterator[Placed]:
    """Rows without duplicates, which have the same `id`, if there is one, and the same content.

    Raises:
      InputError: two different rows have the same id.
    """
    seen: dict[str, tuple[int, str]] = {}
    duplicates = 0
    try:
        for row, where in rows:
            if row.get("id") is not None:
                content = hash(str(row))
                before, first_place = seen.setdefault(str(row["id"]), (content, where))
                if before != content:
                    raise InputError(f"{where}: id {row['id']!r:.80} is already used by "
                                     f"{first_place}, a different row; ids must be unique (or "
                                     "rename the column)")
                if first_place != where:
                    duplicates += 1
                    last = f"{where} is {first_place}"
                    continue
            yield row, where
    finally:
        if duplicates:
            logger.warning("%d duplicate rows skipped (same id and content), such as %s",
                           duplicates, last)


def _example(
    task: Task, row: dict[str, Any], where: str, language: str, theirs: dict[str, str]
) -> Example:
    """A row as an example; `theirs` has the source's names of our columns, where they differ."""
    try:
        query = task.prompt.format(**row)
        answer = None if task.unlabelled else row[task.target_column]
    except KeyError as error:
        name = error.args[0]
        also = f", which the task calls '{theirs[name]}' there," if name in theirs else ""
        raise InputError(
            f"{where}: column '{name}'{also} is missing; its columns: {listed(row)}"
        ) from None
    for column in re.findall(r"{(\w+)}", task.prompt):
        _check_cell(row[column], column, where)
    if task.unlabelled:
        return Example(query, "", -1, language)
    if not task.labels:
        _check_cell(answer, "target", where)
        return Example(query, str(answer), -1, language)
    label = _label(task, answer, where)
    return Example(query, task.labels[label], label, language)


def _check_cell(value: Any, column: str, where: str) -> None:
    """Raises InputError for a cell that is empty, or not a scalar."""
    if isinstance(value, dict | list | bytes):  # bytes: from Parquet without a text type
        raise InputError(f"{where}: column '{column}': expected text, got {value!r:.80}")
    if is_blank(value):
        raise InputError(f"{where}: column '{column}' is empty")


def _label(task: Task, value: Any, where: str) -> int:
    """The class of a label, in any case, or of the data's spelling of it."""
    text = str(value).strip().casefold()
    for names in (task.labels, task.spellings or range(len(task.labels))):
        options = [str(name).casefold() for name in names]
        if text in options:
            return options.index(text)
    raise InputError(
        f"{where}: label {value!r:.80} is not one of {', '.join(task.labels)} "
        f"(or {', '.join(task.spellings) or f'0 … {len(task.labels) - 1}'})"
    )
