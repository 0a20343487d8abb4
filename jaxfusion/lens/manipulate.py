"""Training of an LLM's top blocks alone, on what was kept of every prompt.

A step runs only the trained blocks: no second model and, but for supervised tuning, no logits.
What the losses aim at comes in as parameters, below `lens/`, so that every setting of a sweep runs
the same compiled step.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from jaxfusion.fields import LensConfig
from jaxfusion.lens.keep import Kept, last_and_mean
from jaxfusion.lens.losses import Goal, align, retain, separate
from jaxfusion.lens.probe import Probe
from jaxfusion.nn.decoder import Decoder
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class Manipulation:
    """The loss of the top blocks on kept prompts.

    Attributes:
      upper: the top blocks as a decoder of their own.
      layers: behind which of them the losses act, numbered from 0 on.
    """

    upper: Decoder
    layers: tuple[int, ...]

    def loss(self, params: dict[str, Any], batch: Kept, key: Array | None = None):
        """`Σ_layers (λ_retain retain + Σ_k (λ_sep separate_k + λ_align align_k))`, mean over
        prompts, and their number.

        Args:
          params: `decoder`, and `lens` of `aims`.
        """
        rows, languages = batch.last.shape
        hidden, positions, segments, last = _flat(batch)
        states, _ = self.upper.apply({"params": params["decoder"]}, hidden, positions, segments,
                                     last_and_mean(last, segments), method="states")
        states = states.reshape(len(states), rows, languages, *states.shape[2:])
        aims, total = params["lens"], 0.0
        for layer in self.layers:
            goal, at = Goal(**aims["goals"][str(layer)]), states[layer, :, :, 0]
            total += aims["align"] * align(at, goal)
            total += aims["separate"] * separate(at, batch.before[:, :, layer], goal)
            total += aims["retain"] * retain(states[layer, :, 0, 1], batch.mean[:, layer])
        return jnp.mean(total), jnp.array(rows)


@dataclass(frozen=True)
class Supervised:
    """The same blocks tuned on answers: mean cross-entropy of their tokens, in all languages."""

    upper: Decoder

    def loss(self, params: dict[str, Any], batch: Kept, key: Array | None = None):
        """The loss, and the number of answers' tokens."""
        hidden, positions, segments, last = _flat(batch)
        slots, tokens, answered = (
            x.reshape(len(last), -1) for x in (batch.slots, batch.tokens, batch.answered))
        decoder = {"params": params["decoder"]}
        final, _ = self.upper.apply(decoder, hidden, positions, segments)
        wanted = jnp.take_along_axis(final, slots[:, :, None], axis=1)
        logits = self.upper.apply(decoder, wanted, method="logits")
        chances = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, :, None], axis=-1)
        count = jnp.sum(answered)
        return -jnp.sum(jnp.where(answered, chances[..., 0], 0.0)) / jnp.maximum(count, 1), count


def _flat(batch: Kept) -> list[Array]:
    """Hidden states, positions, segments and last slots, languages side by side as rows."""
    rows, languages = batch.last.shape
    hidden, *others = (x.reshape(rows * languages, *x.shape[2:]) for x in (
        batch.hidden, batch.positions, batch.segments, batch.last))
    return [constrain(hidden, "rows", None, None), *others]


def make_goals(
    found: Probe, blocks: int, layers: Sequence[int], rank: int | None, weights: dict[str, float]
) -> dict[int, Goal]:
    """What to aim at behind the trained blocks, by their number from 0 on.

    Args:
      layers: numbered from 1 on in the whole LLM; empty is the last.
      weights: w_k of languages; 1 unless given.

    """
    first, goals = found.layers - blocks, {}
    scale = np.array([weights.get(name, 1.0) for name in found.languages[1:]])
    for layer in layers or (found.layers,):
        spaces = found.subspaces(layer, rank)
        moves = scale[:, None] * (found.displacements(layer, rank)[1:] @ spaces.specific)
        goals[layer - first - 1] = Goal(*(
            x.astype(np.float32) for x in (spaces.direction, spaces.specific, moves)))
    return goals


def aims(goals: dict[int, Goal], lens: LensConfig) -> dict[str, np.ndarray]:
    """What `Manipulation.loss` takes besides the LLM, by path: goals, and the losses' weights."""
    tree = {"goals": {str(layer): asdict(goal) for layer, goal in goals.items()},
            **{name: np.float32(getattr(lens, name)) for name in ("align", "separate", "retain")}}
    return traverse_util.flatten_dict({"lens": tree}, sep="/")
