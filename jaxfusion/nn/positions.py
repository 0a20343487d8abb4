"""Where an encoder's tokens are: relative biases, places in a text, sinusoids."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxfusion.nn.layers import named


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "S S"]:
    """Bucket of every (query, key) distance, both directions (T5, arXiv:1910.10683, section 2.1).

    Half of the buckets are for keys after the query; of each half, half are exact distances and
    the others grow logarithmically up to `max_distance`, where the last one takes the rest.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact)
    log_scale = np.float32(math.log(max_distance / exact))
    logarithmic = exact + (np.log(far) / log_scale * np.float32(half - exact)).astype(np.int32)
    near = np.abs(distance) < exact
    bucket = np.where(near, np.abs(distance), np.minimum(logarithmic, half - 1))
    return bucket + np.where(distance > 0, half, 0)


def token_positions(
    segments: Int[Array, "B S"], counts_padding: bool = False
) -> Int[Array, "B S"]:
    """Place of every token in its text, from 0; anything at padding.

    Args:
      segments: 0 at padding; the tokens of a segment are contiguous.
      counts_padding: a row's first text begins at slot 0, whatever padding precedes it, as
        transformers counts for BERT.
    """
    segments, slots = segments.astype(jnp.int32), jnp.arange(segments.shape[1])
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    starts = (segments != before) & (segments != 0)
    if counts_padding:
        starts &= jnp.cumsum(starts, axis=1) > 1
    return slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)


def sinusoids(positions: Int[Array, "B S"], width: int) -> Float[Array, "B S D"]:
    """Sine and cosine of every position (fairseq's form of arXiv:1706.03762, section 3.5)."""
    half = width // 2
    frequencies = jnp.exp(jnp.arange(half) * (-math.log(10_000) / (half - 1)))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, 0), (0, width % 2)))


class RelativeBias(nn.Module):
    """The learned attention bias of every head by relative position bucket."""

    num_buckets: int
    max_distance: int
    num_heads: int

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "N S S"]:
        init = named(nn.initializers.normal(1.0), "buckets", "heads")
        table = self.param("embedding", init, (self.num_buckets, self.num_heads), jnp.float32)
        buckets = relative_buckets(length, self.num_buckets, self.max_distance)
        return jnp.take(table.astype(jnp.float32), buckets, axis=0).transpose(2, 0, 1)
