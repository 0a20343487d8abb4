"""Answers one input: prints the text, each label's probability, and each token's layer weights."""

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import softmax
from jaxfusion.runs.open_run import OpenRun, open_run

SHADES = " ░▒▓█"


def ask(
    workdir: Path, text: str, *, language: str = "", llm_only: bool = False,
    decoding: dict[str, Any] | None = None,
) -> str:
    """Prints and returns the answer to one input.

    Args:
      text: the columns of the task's prompt in order, separated by `|`.
      language: of the text, for an encoder that is told it.
      llm_only: use the bare LLM.
      decoding: fields of `EvalConfig` that override the run's own.

    Raises:
      InputError: no such run, or the wrong number of columns.
    """
    run = open_run(workdir, decoding, llm_only)
    example = Example(fill(run.task, text), "", -1, run.checked_language(language))
    if not llm_only and (unknown := unknown_words(run.tokenizers.encoder, text)):
        print(f"not in the encoder's vocabulary, so spelled or skipped: {', '.join(unknown)}")
    with run.on_mesh():
        scored = run.scorer(run.task)(run.params, [example], run.task)
    console = Console(highlight=False)
    console.print(f"answer: [bold]{escape(scored.answers[0])}[/bold]")
    for label, chance in zip(run.task.labels, softmax(scored.likelihoods[0]), strict=True):
        console.print(f"  {100 * chance:5.1f} %  {escape(label)}")
    if not llm_only:
        _print_weights(console, run, example)
    return scored.answers[0]


def fill(task: Task, text: str) -> str:
    """The task's prompt with the columns of `text`.

    Raises:
      InputError: the wrong number of columns.
    """
    columns = re.findall(r"{(\w+)}", task.prompt)
    fields = [field.strip() for field in text.split("|")]
    if len(fields) != len(columns) or not all(fields):
        template = " | ".join(column.upper() for column in columns)
        raise InputError(f"--ask got {len([f for f in fields if f])} of the columns "
                         f"{', '.join(columns)}; write: --ask \"{template}\"")
    _check_unfilled(task, text, columns)
    return task.prompt.format(**dict(zip(columns, fields, strict=True)))


def _check_unfilled(task: Task, text: str, columns: list[str]) -> None:
    """Raises InputError for a whole prompt, which would be put into the prompt once more."""
    first, *others = around = [x.strip() for x in re.split(r"{\w+}", task.prompt)]
    # One word, or quotes, may begin and end a column too.
    if not first or not any(re.search(r"\w\s*[^\w\s]|\w\s+\w", x) for x in around):
        return
    begins = re.escape(first) + r"\b" * first[-1].isalnum()
    if re.fullmatch(".+".join([begins, *map(re.escape, others)]), text.strip(), re.DOTALL):
        raise InputError(f"--ask takes the columns {', '.join(columns)}, not the whole prompt; "
                         f"leave out what is around them in '{task.prompt}'")


def unknown_words(tokenizer, text: str) -> list[str]:
    """Words with an unknown piece, or that are split into single characters."""
    unknown = []
    for word in dict.fromkeys(text.replace("|", " ").split()):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        pieces = [piece.removeprefix("##").strip("▁Ġ")
                  for piece in tokenizer.convert_ids_to_tokens(ids)]
        spelled = len(word) > 2 and all(len(piece) <= 1 for piece in pieces)
        if tokenizer.unk_token_id in ids or spelled:
            unknown.append(word)
    return unknown


def _print_weights(console: Console, run: OpenRun, example: Example) -> None:
    """Prints a row per encoder token with the weight of each layer, if the fusion has weights."""
    by_token = run.layers_of(example.query, example.language)
    if by_token is None:
        console.print(f"fusion '{run.config.fusion.name}' uses a single layer")
        return
    layers = range(1, len(by_token["weights"][0]) + 1)
    table = Table("token", *(f"layer {i}" for i in layers), title="weight of each layer, in %")
    for token, weights in zip(by_token["tokens"], by_token["weights"], strict=True):
        cells = (f"{SHADES[min(4, int(5 * x))]} {100 * x:4.1f}" for x in weights)
        table.add_row(escape(token), *cells)
    console.print(table)
