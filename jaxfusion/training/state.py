"""The state of a training run, and parameters as flat trees by path."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import traverse_util
from jaxtyping import Array, Int

from jaxfusion.nn.bridge import Params
from jaxfusion.nn.quantised import scales_of

Flat = dict[str, Any]  # parameter path, as 'decoder/blocks/attn/q/kernel' -> array


@dataclass(frozen=True)
class State:
    """What a training step changes, and a checkpoint holds.

    Attributes:
      step: steps done.
      trainable: trained parameters by path, float32.
      opt_state: the optimiser's.
    """

    step: Int[Array, ""]
    trainable: Flat
    opt_state: optax.OptState


jax.tree_util.register_dataclass(
    State, data_fields=["step", "trainable", "opt_state"], meta_fields=[]
)


def merge(trainable: Flat, frozen: Flat) -> Params:
    """The parameter tree that the bridge takes."""
    # `last` and `layer` have no parameters; the bridge expects the key.
    nested = traverse_util.unflatten_dict({**frozen, **trainable}, sep="/")
    return {"fusion": {}, **nested}


def count_params(flat: Flat) -> int:
    """Number of scalars in a flat tree, without the scales of what is quantised."""
    scales = scales_of(flat)
    return sum(x.size for path, x in flat.items() if path not in scales)
