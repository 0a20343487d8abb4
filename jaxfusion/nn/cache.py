"""The keys and values that a decoder keeps between calls."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from jaxfusion.nn.decoder import DecoderConfig


@dataclass(frozen=True)
class Extra:
    """Keys and values that every layer attends to besides its own (`nn.aligner`).

    Attributes:
      k, v: [L B S K H]; the keys are not rotated.
      gate: [L] factor of what a layer reads there.
      segments: [B S], as of the decoder's slots that may look there; 0: nobody may.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    gate: Float[Array, "L"]
    segments: Int[Array, "B S"]


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: [L B C K H], C slots.
      positions: [B C], of each slot's token among the real tokens of its row.
      segments: [B C]; 0 marks an empty or padding slot.
      extra: what every layer reads besides.
    """

    k: Float[Array, "L B C K H"]
    v: Float[Array, "L B C K H"]
    positions: Int[Array, "B C"]
    segments: Int[Array, "B C"]
    extra: Extra | None = None


jax.tree_util.register_dataclass(
    Extra, data_fields=list(Extra.__dataclass_fields__), meta_fields=[]
)
jax.tree_util.register_dataclass(
    Cache, data_fields=list(Cache.__dataclass_fields__), meta_fields=[]
)


def init_cache(config: "DecoderConfig", batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of `slots` tokens for each of `batch` rows."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty)
