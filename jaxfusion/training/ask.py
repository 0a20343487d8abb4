"""One input, answered: the text, how likely each label is, and the layers behind each token."""

import re
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxfusion.data.sources import Example
from jaxfusion.data.task import Task
from jaxfusion.data.tasks import get_task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.layers import token_weights
from jaxfusion.evaluation.scoring import Scorer, for_task, softmax
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.evaluate import load_config, load_trained
from jaxfusion.training.state import Model, merge

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
    config = load_config(workdir, decoding)
    task = get_task(config.data.task, config.tasks)
    query = fill(task, text)
    mesh = make_mesh(**vars(config.mesh))
    with jax.set_mesh(mesh):
        _, model = load_trained(config, workdir, mesh, llm_only)
        if not llm_only and (strange := unknown_words(model.tokenizers.encoder, text)):
            print(f"not in the encoder's vocabulary, so spelled or skipped: {', '.join(strange)}")
        params = merge(model.trainable, model.frozen)
        example = Example(query, "", -1)
        scorer = Scorer(model.bridge, model.tokenizers, for_task(config.eval, task),
                        config.data.text_prompt, llm_only)
        scored = scorer(params, [example], task)
        console = Console(highlight=False)
        console.print(f"answer: [bold]{escape(scored.answers[0])}[/bold]")
        for label, chance in zip(task.labels, softmax(scored.likelihoods[0]), strict=True):
            console.print(f"  {100 * chance:5.1f} %  {escape(label)}")
        if not llm_only:
            _print_weights(console, model, params, example)
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


def _print_weights(console: Console, model: Model, params, example: Example) -> None:
    """A row per encoder token with the weight of each layer, for fusions that have weights."""
    found = token_weights(model.bridge, model.tokenizers, model.config.eval, params, example)
    if found is None:
        console.print(f"fusion '{model.bridge.fusion}' takes one layer alone")
        return
    layers = range(1, len(found["weights"][0]) + 1)
    table = Table("token", *(f"layer {i}" for i in layers), title="weight of each layer, in %")
    for token, weights in zip(found["tokens"], found["weights"], strict=True):
        cells = (f"{SHADES[min(4, int(5 * x))]} {100 * x:4.1f}" for x in weights)
        table.add_row(escape(token), *cells)
    console.print(table)
