"""Training of an LLM's top blocks alone, on activations that were computed once.

Everything below the first trained block is frozen and is that of the untouched model, too: its
output for every prompt, and the untouched model's final states, are kept. A step runs only the
trained blocks: no second model and, but for supervised tuning, no logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.data.batching import TokenRow
from jaxfusion.data.pipeline import own_rows
from jaxfusion.errors import InputError
from jaxfusion.lens.losses import Goal, align, retain, separate
from jaxfusion.lens.probe import Probe
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.sharding.hosts import fetch
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class Kept:
    """What is kept of every prompt; C languages, the central one first, n trained blocks.

    Attributes:
      hidden: [R C T E] what the first trained block reads.
      positions, segments: [R C T]; segment 0 is padding.
      last: [R C] the slot of the prompt's last token.
      before: [R C n E] the untouched model's states there, behind each of the top blocks.
      mean: [R E] the mean of its final states of the central prompt.
      answer: [R C T] the next token where it belongs to the answer. answered: [R C T] True there.
    """

    hidden: Float[Array, "R C T E"]
    positions: Int[Array, "R C T"]
    segments: Int[Array, "R C T"]
    last: Int[Array, "R C"]
    before: Float[Array, "R C n E"]
    mean: Float[Array, "R E"]
    answer: Int[Array, "R C T"]
    answered: Bool[Array, "R C T"]


jax.tree_util.register_dataclass(
    Kept, data_fields=list(Kept.__dataclass_fields__), meta_fields=[])


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


def cut(params: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """A decoder's parameters with blocks `start` to `stop` alone."""
    return {**params, "blocks": jax.tree.map(lambda x: x[start:stop], params["blocks"])}


def keep(
    decoder: Decoder, params: dict[str, Any], rows: dict[str, Sequence[TokenRow]],
    start: list[int], blocks: int, batch_size: int,
) -> Kept:
    """Runs every prompt once through the untouched model.

    Args:
      params: of the decoder. rows: prompts by language, the central one first, aligned.
      start: ids that every prompt starts with. blocks: that will train.
    """
    arrays = _lay_out(rows, start)
    below, _ = split(decoder.config, blocks)
    first = below.num_layers
    lower, upper = (decoder.clone(config=c) for c in split(decoder.config, blocks))

    def read(params, tokens, positions, segments, last):
        x, _, _ = lower.apply({"params": cut(params, 0, first)},
                              decoder.apply({"params": params}, tokens, method="embed"),
                              positions, segments, method="run")
        states, mean = top_states(upper, cut(params, first, None), x, positions, segments, last)
        return x, states, mean

    run, found = jax.jit(read), []
    names = ("tokens", "positions", "segments", "last")
    flat = [arrays[name].reshape(-1, *arrays[name].shape[2:]) for name in names]
    for i in range(0, len(flat[0]), batch_size):
        part = [x[i : i + batch_size] for x in flat]
        spare = batch_size - len(part[0])
        part = [np.pad(x, ((0, spare), *[(0, 0)] * (x.ndim - 1))) for x in part]
        x, states, mean = fetch(run(params, *part))
        real = batch_size - spare
        found.append((x[:real], np.moveaxis(states, 0, 1)[:real], mean[:real]))
    shape = arrays["last"].shape
    hidden, before, mean = (
        np.concatenate(x).reshape(*shape, *x[0].shape[1:]) for x in zip(*found, strict=True))
    return Kept(hidden, arrays["positions"], arrays["segments"], arrays["last"],
                np.asarray(before, np.float32), np.asarray(mean[:, 0], np.float32),
                arrays["answer"], arrays["answered"])


def _lay_out(rows: dict[str, Sequence[TokenRow]], start: list[int]) -> dict[str, np.ndarray]:
    """All prompts as arrays [R C T], each from slot 0 on."""
    languages = list(rows.values())
    whole = [[[*start, *row.text, *row.target] for row in texts] for texts in languages]
    longest = max(len(ids) for texts in whole for ids in texts)
    shape = (len(languages[0]), len(languages), -(-longest // 8) * 8)
    names = ("tokens", "positions", "segments", "answer")
    found = {name: np.zeros(shape, np.int32) for name in names}
    found["answered"], found["last"] = np.zeros(shape, bool), np.zeros(shape[:2], np.int32)
    for c, texts in enumerate(whole):
        for r, ids in enumerate(texts):
            n, answers = len(ids), len(languages[c][r].target)
            found["tokens"][r, c, :n] = ids
            found["positions"][r, c, :n] = np.arange(n)
            found["segments"][r, c, :n] = 1
            found["last"][r, c] = n - answers - 1
            found["answer"][r, c, n - answers - 1 : n - 1] = ids[n - answers :]
            found["answered"][r, c, n - answers - 1 : n - 1] = True
    return found


def top_states(
    upper: Decoder, params: dict[str, Any], hidden, positions, segments, last
) -> tuple[Float[Array, "n B E"], Float[Array, "B E"]]:
    """States of one slot behind each of the top blocks, the last after the final norm; and the mean
    of the final states over real tokens."""
    final, states = _final(upper, params, hidden, positions, segments, last)
    states = states.at[-1].set(final[jnp.arange(len(final)), last])
    real = (segments != 0)[:, :, None]
    mean = jnp.sum(jnp.where(real, final, 0), axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
    return states.astype(jnp.float32), mean.astype(jnp.float32)


def _final(upper: Decoder, params, hidden, positions, segments, last):
    call = partial(upper.apply, {"params": params})
    x, _, states = call(hidden, positions, segments, read=last, method="run")
    return call(x, method="normalise"), states


class KeptBatches:
    """Batches of kept prompts by step number: every prompt once an epoch, in a seeded order."""

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
        return jax.tree.map(lambda x: x[chosen], self.kept)


@dataclass(frozen=True)
class Manipulation:
    """The loss of the top blocks on kept prompts.

    Attributes:
      upper: the top blocks as a decoder of their own.
      goals: at the trained blocks' states, by their number from 0 on.
      align, separate, retain: weights of the losses.
    """

    upper: Decoder
    goals: dict[int, Goal]
    align: float
    separate: float
    retain: float

    def loss(self, params: dict[str, Any], batch: Kept, key: Array | None = None):
        """`λ_retain retain + Σ_layers Σ_k (λ_sep separate_k + λ_align align_k)`, mean over prompts,
        and their number."""
        rows, languages = batch.last.shape
        flat = [x.reshape(rows * languages, *x.shape[2:])
                for x in (batch.hidden, batch.positions, batch.segments, batch.last)]
        flat[0] = constrain(flat[0], "rows", None, None)
        states, mean = top_states(self.upper, params["decoder"], *flat)
        states = states.reshape(len(states), rows, languages, -1)
        total = self.retain * retain(mean.reshape(rows, languages, -1)[:, 0], batch.mean)
        for layer, goal in self.goals.items():
            total += self.align * align(states[layer], goal)
            total += self.separate * separate(states[layer], batch.before[:, :, layer], goal)
        return jnp.mean(total), jnp.array(rows)


@dataclass(frozen=True)
class Supervised:
    """The same blocks tuned on answers: mean cross-entropy of their tokens, in all languages."""

    upper: Decoder

    def loss(self, params: dict[str, Any], batch: Kept, key: Array | None = None):
        """The loss, and the number of answers' tokens."""
        rows, languages = batch.last.shape
        flat = [x.reshape(rows * languages, *x.shape[2:])
                for x in (batch.hidden, batch.positions, batch.segments, batch.last)]
        final, _ = _final(self.upper, params["decoder"], *flat)
        logits = self.upper.apply({"params": params["decoder"]}, final, method="logits")
        answer, answered = (x.reshape(len(flat[0]), -1) for x in (batch.answer, batch.answered))
        chances = jnp.take_along_axis(jax.nn.log_softmax(logits), answer[:, :, None], axis=-1)
        count = jnp.sum(answered)
        return -jnp.sum(jnp.where(answered, chances[..., 0], 0.0)) / jnp.maximum(count, 1), count


def make_goals(
    found: Probe, blocks: int, layers: Sequence[int], rank: int | None, weights: dict[str, float]
) -> dict[int, Goal]:
    """What to aim at behind the trained blocks.

    Args:
      layers: numbered from 1 on in the whole LLM; empty is the last.
      weights: w_k of languages; 1 unless given.

    Raises:
      InputError: a layer that does not train, or an unknown language.
    """
    first, goals = found.layers - blocks, {}
    if unknown := set(weights) - set(found.languages[1:]):
        raise InputError(f"lens.weights names {', '.join(sorted(unknown))}, which is no target; "
                         f"targets are {', '.join(found.languages[1:])}")
    scale = np.array([weights.get(name, 1.0) for name in found.languages[1:]])
    for layer in layers or (found.layers,):
        if not first < layer <= found.layers:
            raise InputError(f"lens.loss_layers has {layer}, but blocks {first + 1} to "
                             f"{found.layers} train")
        spaces = found.subspaces(layer, rank)
        moves = scale[:, None] * (found.displacements(layer, rank)[1:] @ spaces.specific)
        goals[layer - first - 1] = Goal(*(
            jnp.asarray(x, jnp.float32) for x in (spaces.direction, spaces.specific, moves)))
    return goals
