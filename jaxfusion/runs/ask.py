"""One input, answered: the text, how likely each label is, and the layers behind each token."""

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
    workdir: Path, text: str, *, llm_only: bool = False, decoding: dict[str, Any] | None = None
) -> str:
    """Prints and returns the answer to one input.

    Args:
      text: the columns of the task's prompt in their order, with a bar between.
      llm_only: the bare LLM answers.
      decoding: fields of `EvalConfig` in place of the run's own.

    Raises:
      InputError: no such run, or another number of columns.
    """
    run = open_run(workdir, decoding, llm_only)
    query = fill(run.task, text)
    if not llm_only and (strange := unknown_words(run.tokenizers.encoder, text)):
        print(f"not in the encoder's vocabulary, so spelled or skipped: {', '.join(strange)}")
    with run.on_mesh():
        scored = run.scorer(run.task)(run.params, [Example(query, "", -1)], run.task)
    console = Console(highlight=False)
    console.print(f"answer: [bold]{escape(scored.answers[0])}[/bold]")
    for label, chance in zip(run.task.labels, softmax(scored.likelihoods[0]), strict=True):
        console.print(f"  {100 * chance:5.1f} %  {escape(label)}")
    if not llm_only:
        _print_weights(console, run, query)
    return scored.answers[0]


def fill(task: Task, text: str) -> str:
    """The task's prompt with the columns of `text`.

    Raises:
      InputError: another number of columns than the prompt has.
    """
    columns = re.findall(r"{(\w+)}", task.prompt)
    fields = [field.strip() for field in text.split("|")]
    if len(fields) != len(columns) or not all(fields):
        wanted = " | ".join(column.upper() for column in columns)
        raise InputError(f"--ask got {len([f for f in fields if f])} of the columns "
                         f"{', '.join(columns)}; write: --ask \"{wanted}\"")
    return task.prompt.format(**dict(zip(columns, fields, strict=True)))


def unknown_words(tokenizer, text: str) -> list[str]:
    """Words with a piece that the vocabulary lacks, or that fall apart into single characters."""
    found = []
    for word in dict.fromkeys(text.replace("|", " ").split()):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        pieces = [piece.strip("▁") for piece in tokenizer.convert_ids_to_tokens(ids)]
        spelled = len(word) > 2 and all(len(piece) <= 1 for piece in pieces)
        if tokenizer.unk_token_id in ids or spelled:
            found.append(word)
    return found


def _print_weights(console: Console, run: OpenRun, query: str) -> None:
    """A row per encoder token with the weight of each layer, for fusions that have weights."""
    found = run.layers_of(query)
    if found is None:
        console.print(f"fusion '{run.config.fusion.name}' takes one layer alone")
        return
    layers = range(1, len(found["weights"][0]) + 1)
    table = Table("token", *(f"layer {i}" for i in layers), title="weight of each layer, in %")
    for token, weights in zip(found["tokens"], found["weights"], strict=True):
        cells = (f"{SHADES[min(4, int(5 * x))]} {100 * x:4.1f}" for x in weights)
        table.add_row(escape(token), *cells)
    console.print(table)
