"""Answers a user's own file row by row; the same call resumes a stopped one."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from jaxfusion.data.rows.examples import Example
from jaxfusion.data.rows.files import is_blank, read_file
from jaxfusion.data.tasks.spec import Placed, Task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import Scored, softmax
from jaxfusion.fields import DECODING
from jaxfusion.files import (
    is_as_written,
    no_room,
    note_of,
    note_sums,
    only_writer,
    read_json,
    sum_of,
    write_checked,
)
from jaxfusion.runs.open_run import OpenRun, open_run

logger = logging.getLogger(__name__)
BATCHES = 8  # sorted by length and written together
OURS = ("answer", "prediction", "probabilities")  # output columns


def answer_file(
    workdir: Path, source: Path, out: Path, *, language: str = "", llm_only: bool = False,
    decoding: dict[str, Any] | None = None,
) -> int:
    """Answers every row of a file with a bridge or its bare LLM.

    A row has the columns of the task's prompt, or a column `prompt` with the full text. Each line
    of `out` is the row with an `answer`; for a task with labels also the most likely one as
    `prediction`, and the `probabilities` of all. `NAME.about.json` next to `out` has the settings
    of the answers.

    Args:
      source: `.jsonl` or another file that `read_file` reads.
      language: of the rows, for an encoder that is told it; a row's own column `language` wins.
      out: `.jsonl`; rows that it already has are not answered again.
      decoding: fields of `EvalConfig` that override the run's own.

    Returns:
      The number of newly answered rows.

    Raises:
      InputError: no such run or file, a missing column, or an `out` with other rows or settings.
    """
    if out.suffix != ".jsonl" or out.is_dir():
        raise InputError(f"the output is {out}, expected the name of a .jsonl file")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out} is the input; give another file for the output")
    run = open_run(workdir, decoding, llm_only)
    task, config, rows = run.task, run.config.eval, list(read_file(source))
    if not rows:
        raise InputError(f"{source} has no rows")
    examples = [Example(query_of(task, row, where), "", -1, language_of(run, row, language, where))
                for row, where in rows]
    with run.on_mesh(), _alone(out) as file:
        scorer = run.scorer(task)
        done = _begin(out, rows, {
            "workdir": str(workdir.absolute()), "step": run.step, "llm_only": llm_only,
            "language": language, **{name: asdict(config)[name] for name in DECODING}})
        written = out.read_bytes()
        length, digest = len(written), blake2b(written, digest_size=16)
        for numbers in _chunks(done, len(rows), BATCHES * config.batch_size):
            scored = scorer(run.params, [examples[i] for i in numbers], task, numbers=numbers)
            if scored.cut.any:
                logger.warning("rows %d to %d, longer than the limits: %s", numbers[0] + 1,
                               numbers[-1] + 1, scored.cut)
            lines = "".join(_lines(task, [rows[i][0] for i in numbers], scored))
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
            length += len(lines.encode())
            digest.update(lines.encode())
            note_sums(out, [[length, digest.hexdigest()]])
    return len(rows) - done


def _chunks(done: int, rows: int, size: int) -> Iterator[range]:
    """The numbers of the remaining rows in chunks, with a progress bar."""
    console = Console(stderr=True)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
                  disable=not console.is_terminal) as progress:
        bar = progress.add_task("answering", total=rows, completed=done)
        for start in range(done, rows, size):
            yield range(start, min(start + size, rows))
            progress.update(bar, completed=min(start + size, rows))


@contextmanager
def _alone(out: Path) -> Iterator[TextIO]:
    """Opens the file to append to, locked.

    Raises:
      InputError: another process writes it, or the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with (only_writer(note_of(out), out), no_room(out),
          out.open("a", encoding="utf-8") as file):
        yield file


def query_of(task: Task, row: dict[str, Any], where: str) -> str:
    """The encoder's text of a row: its `prompt`, or the task's prompt with the row's columns.

    Raises:
      InputError: a column is missing or empty, or has the name of an output column.
    """
    reserved = [name for name in OURS if name in row]
    if reserved:
        raise InputError(f"{where}: column '{reserved[0]}' is an output column; rename it")
    columns = re.findall(r"{(\w+)}", task.prompt)
    if "prompt" in row and "prompt" not in columns:
        columns, text = ["prompt"], "{prompt}"
    else:
        text = task.prompt
    for name in columns:
        if name not in row:
            raise InputError(f"{where}: column '{name}' is missing; expected {', '.join(columns)} "
                             f"(or the full text as 'prompt'), got {', '.join(row)}")
        if is_blank(row[name]):
            raise InputError(f"{where}: column '{name}' is empty")
    return text.format(**row)


def language_of(run: OpenRun, row: dict[str, Any], language: str, where: str) -> str:
    """The language of a row for an encoder that is told it, else nothing.

    Raises:
      InputError: the encoder does not have the language, or none is given.
    """
    own = row.get("language")
    if run.llm_only or run.tokenizers.languages is None or is_blank(own):
        own = language
    try:
        return run.checked_language(str(own))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _begin(out: Path, rows: list[Placed], about: dict[str, Any]) -> int:
    """The number of rows that `out` already answers; removes an incomplete last line.

    Raises:
      InputError: `out` has other settings or other rows.
    """
    about_file = out.with_name(f"{out.name}.about.json")
    about = json.loads(json.dumps(about))
    if not out.stat().st_size:
        sum_of(out).unlink(missing_ok=True)  # of a removed file
        write_checked(about_file, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        return 0
    restart = f"give another --output, or remove {out}"
    if not about_file.is_file():
        raise InputError(f"{about_file} is missing (the settings of {out}): {restart}")
    old = read_json(about_file, restart)
    old = {"language": "", **old}  # of answers from before encoders were told languages
    for name in about:
        if old.get(name) != about[name]:
            raise InputError(f"{out} was started with {name} {old.get(name)!r}, not "
                             f"{about[name]!r}; give another --output, or remove it")
    content = out.read_bytes()
    if not is_as_written(out, content, grows=True):
        raise InputError(f"{out} is damaged: it does not match its checksum; {restart}")
    content = content[: content.rfind(b"\n") + 1]
    os.truncate(out, len(content))
    try:
        lines = content.decode().split("\n")[:-1]  # rows may contain other line separators
    except UnicodeDecodeError as error:
        raise InputError(f"{out} is damaged ({error}): {restart}") from None
    for number, (line, (row, where)) in enumerate(zip(lines, rows, strict=False), start=1):
        written = _written(line, f"{out}:{number} is damaged: {restart}")
        if {name: written.get(name) for name in row} != json.loads(_dump(row)):
            raise InputError(f"{out}:{number} answers a different row than {where}; give another "
                             "--output, or remove it")
    if len(lines) > len(rows):
        raise InputError(f"{out} has {len(lines)} answers, but there are {len(rows)} rows; give "
                         "another --output, or remove it")
    return len(lines)


def _written(line: str, damaged: str) -> dict[str, Any]:
    """A parsed output line; raises InputError if it is not one."""
    try:
        written = json.loads(line)
    except ValueError:
        raise InputError(damaged) from None
    if not isinstance(written, dict) or not isinstance(written.get("answer"), str):
        raise InputError(damaged)
    return written


def _lines(task: Task, rows: list[dict[str, Any]], scored: Scored) -> list[str]:
    lines = []
    for row, answer, likelihoods in zip(rows, scored.answers, scored.likelihoods, strict=True):
        columns = {"answer": answer}
        if task.labels:
            chances = dict(zip(task.labels, softmax(likelihoods).round(4).tolist(), strict=True))
            columns |= {"prediction": max(chances, key=chances.get), "probabilities": chances}
        lines.append(_dump({**row, **columns}) + "\n")
    return lines


def _dump(row: dict[str, Any]) -> str:
    """A row as JSON: NaN becomes null, types that JSON does not have become text."""
    return json.dumps({name: None if value != value else value for name, value in row.items()},
                      ensure_ascii=False, default=str)
