"""The losses of an LLM's top blocks on cached activations.

A step runs only the trained blocks: no second model and, except for supervised tuning, no logits.
The losses' goals are passed as parameters below `lens/`, so that all settings of a sweep share one
compiled step.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

from jaxfusion.fields import LensConfig
from jaxfusion.lens.activations import Activations, last_and_mean, slice_blocks, split, top
from jaxfusion.lens.losses import Goal, align, retain, separate
from jaxfusion.lens.probe import Probe
from jaxfusion.nn.decoder import Decoder
from jaxfusion.nn.layers import weighted_sums
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class Manipulation:
    """The loss of the top blocks on cached prompts.

    Attributes:
      upper: the top blocks as a separate decoder.
      layers: the blocks whose output the losses use, numbered from 0.
    """

    upper: Decoder
    layers: tuple[int, ...]

    def loss(self, params: dict[str, Any], batch: Activations, key: Array | None = None):
        """`Σ_layers (λ_retain retain + Σ_k (λ_sep separate_k + λ_align align_k))`, averaged over
        prompts, and the number of prompts.

        Args:
          params: `decoder`, and `lens` from `aims`.
        """
        aims, total = params["lens"], 0.0
        for layer, (states, mean) in zip(self.layers, self.states(params["decoder"], batch),
                                     strict=True):
            goal = Goal(**aims["goals"][str(layer)])
            total += aims["align"] * align(states, goal)
            total += aims["separate"] * separate(states, batch.before[:, :, layer], goal)
            total += aims["retain"] * retain(mean, batch.mean[:, layer])
        return jnp.mean(total), jnp.array(len(batch.last))

    def states(self, params, batch: Activations) -> list[tuple[Array, Array]]:
        """For every layer the prompts' last states [R C E], and the central prompts' mean [R E].

        In the last block only central prompts run in full, for their mean; the others run only
        their last slot.
        """
        rows, languages = batch.last.shape
        stream = flatten(batch)
        read = last_and_mean(stream.last, stream.segments)
        hidden, below = run_below_last(self.upper, params, stream, read)

        def of(chosen: slice) -> Stream:
            return jax.tree.map(lambda x: x.reshape(rows, languages, *x.shape[1:])[:, chosen]
                                .reshape(-1, *x.shape[1:]), stream._replace(hidden=hidden))

        central, targets = of(slice(1)), of(slice(1, None))
        central_states = run_last(self.upper, params, central)
        ends = run_last(self.upper, params, targets, targets.last[:, None])
        weights = last_and_mean(central.last, central.segments)
        last, mean = jnp.moveaxis(weighted_sums(weights, central_states), 1, 0)
        ends = ends.reshape(rows, languages - 1, -1)
        by_layer = [(jnp.concatenate([last[:, None], ends], axis=1), mean)]
        below = below.reshape(len(below), rows, languages, *below.shape[2:])
        by_layer = [(x[:, :, 0], x[:, 0, 1]) for x in below] + by_layer
        return [by_layer[layer] for layer in self.layers]


@dataclass(frozen=True)
class Supervised:
    """Supervised tuning of the same blocks: mean cross-entropy of answers, in all languages."""

    upper: Decoder

    def loss(self, params: dict[str, Any], batch: Activations, key: Array | None = None):
        """The loss, and the number of answer tokens."""
        stream, decoder = flatten(batch), params["decoder"]
        slots, tokens, answered = (
            x.reshape(len(stream.last), -1) for x in (batch.slots, batch.tokens, batch.answered))
        hidden, _ = run_below_last(self.upper, decoder, stream)
        states = run_last(self.upper, decoder, stream._replace(hidden=hidden), slots)
        logits = self.upper.apply({"params": decoder}, states, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        count = jnp.sum(answered)
        return jnp.sum(losses, where=answered) / jnp.maximum(count, 1), count


class Stream(NamedTuple):
    """The blocks' inputs for R prompts in C languages, flattened to B = R C rows."""

    hidden: Float[Array, "B N E"]
    positions: Int[Array, "B N"]
    segments: Int[Array, "B N"]
    last: Int[Array, "B"]


def flatten(batch: Activations) -> Stream:
    """Flattens prompts and languages to rows."""
    rows, languages = batch.last.shape
    hidden, *others = (x.reshape(rows * languages, *x.shape[2:]) for x in (
        batch.hidden, batch.positions, batch.segments, batch.last))
    return Stream(constrain(hidden, "rows", None, None), *others)


def run_below_last(
    upper: Decoder, params, stream: Stream, read: Float[Array, "B P N"] | None = None
) -> tuple[Float[Array, "B N E"], Float[Array, "n B P E"] | None]:
    """Runs all trained blocks but the last: returns the last one's input, and for each block the
    sums over slots weighted by `read`."""
    blocks = upper.config.num_layers - 1
    if not blocks:
        none = None if read is None else jnp.zeros((0, *read.shape[:2], stream.hidden.shape[-1]))
        return stream.hidden, none
    below = upper.clone(config=split(upper.config, 1)[0])
    return below.apply({"params": slice_blocks(params, 0, blocks)}, stream.hidden,
                       stream.positions, stream.segments, read, method="stream")


def run_last(
    upper: Decoder, params, stream: Stream, at: Int[Array, "B Q"] | None = None
) -> Float[Array, "B Q E"]:
    """Runs the last block and the final norm, only at the slots `at`; None: at all slots."""
    blocks = upper.config.num_layers
    last = top(upper, 1) if blocks > 1 else upper
    return last.apply({"params": slice_blocks(params, blocks - 1, blocks)}, stream.hidden,
                      stream.positions, stream.segments, at, method="last_block")


def make_goals(
    probe: Probe, blocks: int, layers: Sequence[int], rank: int | None, weights: dict[str, float]
) -> dict[int, Goal]:
    """The goals of the trained blocks, by their number from 0.

    Args:
      layers: numbered from 1 in the full LLM; empty: the last.
      weights: w_k of languages; default 1.
    """
    first, goals = probe.layers - blocks, {}
    scale = np.array([weights.get(name, 1.0) for name in probe.languages[1:]])
    for layer in layers or (probe.layers,):
        spaces = probe.subspaces(layer, rank)
        moves = scale[:, None] * (probe.displacements(layer, rank)[1:] @ spaces.specific)
        goals[layer - first - 1] = Goal(*(
            x.astype(np.float32) for x in (spaces.direction, spaces.specific, moves)))
    return goals


def aims(goals: dict[int, Goal], lens: LensConfig) -> dict[str, np.ndarray]:
    """The goals and weights of `Manipulation.loss`, by path."""
    tree = {"goals": {str(layer): asdict(goal) for layer, goal in goals.items()},
            **{name: np.float32(getattr(lens, name)) for name in ("align", "separate", "retain")}}
    return traverse_util.flatten_dict({"lens": tree}, sep="/")
