"""One input, answered: the text, how likely each label is, and the layers behind each token."""

import re
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxfusion.data.batching import find_shapes, in_order, tokenize
from jaxfusion.data.sources import Example
from jaxfusion.data.task import Task
from jaxfusion.data.tasks import get_task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.evaluate import load_config, load_trained
from jaxfusion.training.state import Model, merge

SHADES = " ░▒▓█"


def ask(workdir: Path, text: str) -> str:
    """Prints and returns the greedy answer to one input.

    Args:
      text: the columns of the task's prompt in their order, apart by ` | `.

    Raises:
      InputError: no such run, or another number of columns.
    """
    config = load_config(workdir)
    task = get_task(config.data.task, config.tasks)
    query = fill(task, text)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        _, model = load_trained(config, workdir, mesh)
        if strange := unknown_words(model.tokenizers.encoder, text):
            print(f"not in the encoder's vocabulary, so spelled or skipped: {', '.join(strange)}")
        params = merge(model.trainable, model.frozen)
        example = Example(query, "", -1)
        scorer = Scorer(model.bridge, model.tokenizers, config.eval, config.data.text_prompt)
        scored = scorer(params, [example], task)
        console = Console(highlight=False)
        console.print(f"answer: [bold]{escape(scored.answers[0])}[/bold]")
        for label, chance in zip(task.labels, softmax(scored.likelihoods[0]), strict=True):
            console.print(f"  {100 * chance:5.1f} %  {escape(label)}")
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


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities from log-likelihoods."""
    chances = np.exp(scores - np.max(scores)) if len(scores) else scores
    return chances / chances.sum()


def _print_weights(console: Console, model: Model, params, example: Example) -> None:
    """A row per encoder token with the weight of each layer, for fusions that have weights."""
    config = model.config.eval
    rows, _ = tokenize(
        [example], model.tokenizers, text_prompt="", with_target=False,
        max_encoder_tokens=config.max_encoder_tokens, max_decoder_tokens=config.max_decoder_tokens,
        latents=model.bridge.latents,
    )
    (_, batch), = in_order(rows, find_shapes(rows, ()), model.tokenizers, 1)
    weights = jax.jit(lambda params: model.bridge.fuse(params, batch)[1])(params)
    if weights is None:
        console.print(f"fusion '{model.bridge.fusion}' takes the last layer alone")
        return
    weights = np.asarray(weights)
    if weights.ndim == 1:
        weights = np.broadcast_to(weights[:, None, None], (len(weights), 1, len(rows[0].query)))
    table = Table("token", *(f"layer {i + 1}" for i in range(len(weights))),
                  title="weight of each layer, in %")
    tokens = model.tokenizers.encoder.convert_ids_to_tokens(rows[0].query)
    for i, token in enumerate(tokens):
        cells = (f"{SHADES[min(4, int(5 * x))]} {100 * x:4.1f}" for x in weights[:, 0, i])
        table.add_row(escape(token), *cells)
    console.print(table)
