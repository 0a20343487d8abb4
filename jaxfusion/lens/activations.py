"""What training of an LLM's top blocks reads of every prompt, computed once and kept.

Everything below the first trained block is frozen and is that of the untouched model, too: its
output for every prompt, and the untouched model's states above it, are all that a step needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.data.batching import DECODER_STEP, Shape, TokenRow, collate
from jaxfusion.data.pipeline import own_rows
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.sharding.hosts import fetch
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class Kept:
    """Of R prompts in C languages, the central one first, with n trained blocks.

    Attributes:
      hidden: [R C N E] what the first trained block reads.
      positions, segments: [R C N]; segment 0 is padding.
      last: [R C] the slot of the prompt's last token.
      before: [R C n E] the untouched model's states there, behind each of the top blocks.
      mean: [R n E] the mean of these states over the central prompt's tokens.
      slots, tokens, answered: [R C T] slots whose next token belongs to the answer, that token, and
        True where there is one.
    """

    hidden: Float[Array, "R C N E"]
    positions: Int[Array, "R C N"]
    segments: Int[Array, "R C N"]
    last: Int[Array, "R C"]
    before: Float[Array, "R C n E"]
    mean: Float[Array, "R n E"]
    slots: Int[Array, "R C T"]
    tokens: Int[Array, "R C T"]
    answered: Bool[Array, "R C T"]


jax.tree_util.register_dataclass(
    Kept, data_fields=list(Kept.__dataclass_fields__), meta_fields=[])


ALONG = ("hidden", "positions", "segments")  # arrays whose third axis is the slots


def split(config: DecoderConfig, blocks: int) -> tuple[DecoderConfig, DecoderConfig]:
    """The shapes of the blocks below and of the top `blocks`.

    Raises:
      InputError: the LLM has no more blocks than these.
    """
    if not 1 <= blocks < config.num_layers:
        raise InputError(f"lens.blocks is {blocks}, the LLM has {config.num_layers} blocks: wanted "
                         f"1 to {config.num_layers - 1}")
    below = config.num_layers - blocks
    return (replace(config, num_layers=below, windows=config.windows[:below]),
            replace(config, num_layers=blocks, windows=config.windows[below:]))


def cut(params: dict[str, Any], start: int, stop: int | None) -> dict[str, Any]:
    """A decoder's parameters with blocks `start` to `stop` alone."""
    return {**params, "blocks": jax.tree.map(lambda x: x[start:stop], params["blocks"])}


def last_and_mean(last: Int[Array, "B"], segments: Int[Array, "B N"]) -> Float[Array, "B 2 N"]:
    """Weights of the slots: all on the last one, and the same on every real one."""
    real = segments != 0
    mean = real / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    return jnp.stack([jax.nn.one_hot(last, segments.shape[1]), mean], axis=1)


def keep(
    bridge: Bridge, params: Params, rows: dict[str, Sequence[TokenRow]], tokenizers: Tokenizers,
    blocks: int, batch_size: int, buckets: Sequence[int] = (), folder: Path | None = None,
) -> Kept:
    """Runs every prompt once through the untouched model.

    Args:
      bridge: the LLM alone, or behind a bridge.
      rows: prompts by language, the central one first, aligned.
      blocks: that will train.
      buckets: lengths that get compiled besides the longest prompt's.
      folder: where to keep what is large, mapped into memory; None keeps it in memory.
    """
    first = split(bridge.decoder.config, blocks)[0].num_layers
    flat = [texts[r] for r in range(len(next(iter(rows.values())))) for texts in rows.values()]
    lengths = np.array([len(row.text) + len(row.target) for row in flat])
    order = np.argsort(lengths, kind="stable")  # prompts of a bucket side by side
    whole = _shape_of_all(flat, tokenizers, batch_size)

    def reserve(name: str, like: np.ndarray) -> np.ndarray:
        along = (whole.length,) if name in ALONG else like.shape[1:2]
        size = (len(flat), *along, *like.shape[2:])
        if folder is None:
            return np.zeros(size, like.dtype)
        return np.memmap(folder / name, like.dtype, "w+", shape=size)

    found: dict[str, np.ndarray] = {}
    for start in range(0, len(flat), batch_size):
        rows_of = order[start : start + batch_size]
        part = [flat[i] for i in rows_of]
        rest = whole.length - max(lengths)  # header, prefix and what rounding added
        fitting = [rest + b for b in buckets if max(lengths[rows_of]) <= b < max(lengths)]
        shape = replace(whole, length=min(fitting, default=whole.length))
        batch = collate([[row] for row in part], shape, tokenizers)
        last = _last_slots(batch, part)
        hidden, states = fetch(reader(bridge, first)(params, batch, last))
        made = {"hidden": hidden, "before": states[:, :, 0], "mean": states[:, :, 1], "last": last,
                "positions": batch.dec_positions, "segments": batch.dec_segments,
                "slots": batch.target_slots, "tokens": batch.target_tokens,
                "answered": batch.target_mask}
        for name, x in made.items():
            if name not in found:
                found[name] = reserve(name, x)
            filled = (rows_of, slice(x.shape[1])) if name in ALONG else (rows_of,)
            found[name][filled] = x[: len(part)]
    found = {name: x.reshape(-1, len(rows), *x.shape[1:]) for name, x in found.items()}
    return Kept(**{**found, "mean": found["mean"][:, 0]})


@lru_cache(2)  # what a sweep keeps is read by one program
def reader(bridge: Bridge, first: int) -> Callable[..., tuple[Array, Array]]:
    """The jitted `(params, batch, last [B]) -> (what block `first` reads [B N E], states behind it
    and the blocks above at the last slots and as means [B n 2 E])`."""

    @jax.jit
    def read(params: Params, batch: Batch, last):
        batch = jax.tree.map(lambda x: constrain(x, "rows", None), batch)
        # One pass through all blocks: cut in two, the parameters would be copied.
        states, hidden = bridge.states(
            params, batch, last_and_mean(last, batch.dec_segments), first)
        return hidden, jnp.moveaxis(states[first:], 0, 1)

    return read


def _shape_of_all(rows: Sequence[TokenRow], tokenizers: Tokenizers, batch_size: int) -> Shape:
    """One shape that holds every row: a step runs languages of all lengths side by side."""
    up = lambda n: -(-n // DECODER_STEP) * DECODER_STEP  # noqa: E731
    slots = up(max(len(row.query) for row in rows))
    prefix = (rows[0].latents or slots) + 1 if slots else 0
    text = max(len(row.text) + len(row.target) for row in rows)
    targets = max(1, *(len(row.target) for row in rows))
    return Shape(batch_size, slots, up(len(tokenizers.start) + prefix + text), targets)


def _last_slots(batch: Batch, rows: Sequence[TokenRow]) -> np.ndarray:
    """The last slot of every row's prompt; anything where there is no row."""
    real = batch.dec_segments != 0
    answers = np.zeros(len(real), np.int32)
    answers[: len(rows)] = [len(row.target) for row in rows]
    return np.maximum(real.sum(axis=1) - 1 - answers, 0).astype(np.int32)


class KeptBatches:
    """Batches of kept prompts by step number: every prompt once an epoch, in a seeded order.

    Raises:
      InputError: fewer prompts than a batch has.
    """

    def __init__(self, kept: Kept, batch_size: int, seed: int, steps: int, place=None):
        self.kept, self.batch_size, self.seed, self.steps = kept, batch_size, seed, steps
        self.place = place
        if len(kept.last) < batch_size:
            raise InputError(f"train.batch_size is {batch_size}, but there are only "
                             f"{len(kept.last)} prompts; set it lower or data.rows higher")

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Kept:
        n = len(self.kept.last)
        order = grain.MapDataset.range(n).shuffle(seed=self.seed).repeat()
        chosen = np.array([order[step * self.batch_size + i] for i in range(self.batch_size)])
        chosen = chosen[own_rows(self.batch_size, self.place)]
        return jax.tree.map(lambda x: np.asarray(x[chosen]), self.kept)


def top(decoder: Decoder, blocks: int) -> Decoder:
    """The top blocks as a decoder of their own."""
    return decoder.clone(config=split(decoder.config, blocks)[1])
