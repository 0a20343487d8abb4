"""Cached activations for training an LLM's top blocks.

All blocks below the first trained one are frozen. A step needs only their output for every prompt,
and the original model's states above it.
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

from jaxfusion.data.batching import DECODER_STEP, BatchShape, TokenRow, collate
from jaxfusion.data.pipeline import own_rows
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.sharding.hosts import fetch
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class Activations:
    """Activations of R prompts in C languages, the central one first, with n trained blocks.

    Attributes:
      hidden: [R C N E] input of the first trained block.
      positions, segments: [R C N]; segment 0 is padding.
      last: [R C] the slot of the prompt's last token.
      before: [R C n E] the original model's states at `last`, after each of the top blocks.
      mean: [R n E] the mean of these states over the central prompt's tokens.
      slots, tokens, answered: [R C T] slots whose next token belongs to the answer, that token, and
        True at real ones.
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
    Activations, data_fields=list(Activations.__dataclass_fields__), meta_fields=[])


PER_SLOT = ("hidden", "positions", "segments")  # arrays whose third axis is the slots


def split(config: DecoderConfig, blocks: int) -> tuple[DecoderConfig, DecoderConfig]:
    """The configs of the blocks below and of the top `blocks`.

    Raises:
      InputError: the LLM does not have more blocks than these.
    """
    if not 1 <= blocks < config.num_layers:
        raise InputError(f"lens.blocks is {blocks}, expected 1 to {config.num_layers - 1}, since "
                         f"the LLM has {config.num_layers} blocks")
    below = config.num_layers - blocks
    return (replace(config, num_layers=below, windows=config.windows[:below]),
            replace(config, num_layers=blocks, windows=config.windows[below:]))


def slice_blocks(params: dict[str, Any], start: int, stop: int | None) -> dict[str, Any]:
    """A decoder's parameters with only blocks `start` to `stop`."""
    return {**params, "blocks": jax.tree.map(lambda x: x[start:stop], params["blocks"])}


def last_and_mean(last: Int[Array, "B"], segments: Int[Array, "B N"]) -> Float[Array, "B 2 N"]:
    """Weights of the slots: 1 at the last one, and equal weights at every real one."""
    real = segments != 0
    mean = real / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    return jnp.stack([jax.nn.one_hot(last, segments.shape[1]), mean], axis=1)


def cache_activations(
    bridge: Bridge, params: Params, rows: dict[str, Sequence[TokenRow]], tokenizers: Tokenizers,
    blocks: int, batch_size: int, buckets: Sequence[int] = (), folder: Path | None = None,
) -> Activations:
    """Runs every prompt once through the original model.

    Args:
      bridge: the LLM alone, or behind a bridge.
      rows: prompts by language, the central one first, aligned.
      blocks: the number of blocks that will train.
      buckets: lengths to compile for, besides the longest prompt's.
      folder: directory of memory-mapped arrays; None keeps them in memory.
    """
    first = split(bridge.decoder.config, blocks)[0].num_layers
    flat = [texts[r] for r in range(len(next(iter(rows.values())))) for texts in rows.values()]
    lengths = np.array([len(row.text) + len(row.target) for row in flat])
    order = np.argsort(lengths, kind="stable")  # prompts of a bucket are contiguous
    full_shape = _shape_of_all(flat, tokenizers, batch_size)

    def allocate(name: str, like: np.ndarray) -> np.ndarray:
        axis = (full_shape.length,) if name in PER_SLOT else like.shape[1:2]
        size = (len(flat), *axis, *like.shape[2:])
        if folder is None:
            return np.zeros(size, like.dtype)
        return np.memmap(folder / name, like.dtype, "w+", shape=size)

    arrays: dict[str, np.ndarray] = {}
    for start in range(0, len(flat), batch_size):
        rows_of = order[start : start + batch_size]
        part = [flat[i] for i in rows_of]
        overhead = full_shape.length - max(lengths)  # header, prefix and rounding
        fitting = [overhead + b for b in buckets if max(lengths[rows_of]) <= b < max(lengths)]
        shape = replace(full_shape, length=min(fitting, default=full_shape.length))
        batch = collate([[row] for row in part], shape, tokenizers)
        last = _last_slots(batch, part)
        hidden, states = fetch(reader(bridge, first)(params, batch, last))
        outputs = {
            "hidden": hidden, "before": states[:, :, 0], "mean": states[:, :, 1], "last": last,
            "positions": batch.dec_positions, "segments": batch.dec_segments,
            "slots": batch.target_slots, "tokens": batch.target_tokens,
            "answered": batch.target_mask}
        for name, x in outputs.items():
            if name not in arrays:
                arrays[name] = allocate(name, x)
            target = (rows_of, slice(x.shape[1])) if name in PER_SLOT else (rows_of,)
            arrays[name][target] = x[: len(part)]
    arrays = {name: x.reshape(-1, len(rows), *x.shape[1:]) for name, x in arrays.items()}
    return Activations(**{**arrays, "mean": arrays["mean"][:, 0]})


@lru_cache(2)  # a sweep reads all its activations with one program
def reader(bridge: Bridge, first: int) -> Callable[..., tuple[Array, Array]]:
    """The jitted `(params, batch, last [B]) -> (input of block `first` [B N E], states after it and
    after the blocks above, at the last slots and as means [B n 2 E])`."""

    @jax.jit
    def read(params: Params, batch: Batch, last):
        batch = jax.tree.map(lambda x: constrain(x, "rows", None), batch)
        # One pass through all blocks: splitting them would copy the parameters.
        states, hidden = bridge.states(
            params, batch, last_and_mean(last, batch.dec_segments), first)
        return hidden, jnp.moveaxis(states[first:], 0, 1)

    return read


def _shape_of_all(rows: Sequence[TokenRow], tokenizers: Tokenizers, batch_size: int) -> BatchShape:
    """One shape that fits every row: a step runs languages of all lengths together."""
    up = lambda n: -(-n // DECODER_STEP) * DECODER_STEP  # noqa: E731
    slots = up(max(len(row.query) for row in rows))
    prefix = (rows[0].latents or slots) + 1 if slots else 0
    text = max(len(row.text) + len(row.target) for row in rows)
    targets = max(1, *(len(row.target) for row in rows))
    return BatchShape(batch_size, slots, up(len(tokenizers.start) + prefix + text), targets)


def _last_slots(batch: Batch, rows: Sequence[TokenRow]) -> np.ndarray:
    """The last slot of every row's prompt; arbitrary for padding rows."""
    real = batch.dec_segments != 0
    answers = np.zeros(len(real), np.int32)
    answers[: len(rows)] = [len(row.target) for row in rows]
    return np.maximum(real.sum(axis=1) - 1 - answers, 0).astype(np.int32)


class ActivationBatches:
    """Batches of cached prompts by step number: every prompt once per epoch, in a seeded order.

    Raises:
      InputError: fewer prompts than the batch size.
    """

    def __init__(self, cached: Activations, batch_size: int, seed: int, steps: int, place=None):
        self.cached, self.batch_size, self.seed, self.steps = cached, batch_size, seed, steps
        self.place = place
        if len(cached.last) < batch_size:
            raise InputError(f"train.batch_size is {batch_size}, but there are only "
                             f"{len(cached.last)} prompts; set it lower or data.rows higher")

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Activations:
        n = len(self.cached.last)
        order = grain.MapDataset.range(n).shuffle(seed=self.seed).repeat()
        chosen = np.array([order[step * self.batch_size + i] for i in range(self.batch_size)])
        chosen = chosen[own_rows(self.batch_size, self.place)]
        return jax.tree.map(lambda x: np.asarray(x[chosen]), self.cached)


def top(decoder: Decoder, blocks: int) -> Decoder:
    """The top blocks as a separate decoder."""
    return decoder.clone(config=split(decoder.config, blocks)[1])
