"""Rotary position embeddings and the ways that published LLMs stretch them."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Llama3Scaling:
    """RoPE frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class LinearScaling:
    """RoPE positions divided by a factor (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True)
class LongScaling:
    """Phi-3's `longrope` (LongRoPE, arXiv:2402.13753): a divisor of each frequency.

    Attributes:
      short, long: divisors, up to the original length and beyond it.
      magnitude: factor of both cosine and sine.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    magnitude: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a layer: base, scaling, and how many of a head's dimensions turn."""

    theta: float = 10_000.0
    scaling: Llama3Scaling | LinearScaling | LongScaling | None = None
    partial: float = 1.0  # share of the head's dimensions, the first ones


Tables = tuple[Float[Array, "B N F"], Float[Array, "B N F"]]  # cosine and sine


def rope_tables(rope: Rope, head_dim: int, positions: Int[Array, "B N"], most: Array) -> Tables:
    """Cosine and sine of every position's angles, in radians.

    Args:
      head_dim: H; F is half of those that turn.
      most: [B] largest position of each row so far, which `longrope` asks for.
    """
    scaling = rope.scaling
    turned = int(head_dim * rope.partial)
    frequencies = 1.0 / rope.theta ** (jnp.arange(0, turned, 2, dtype=jnp.float32) / turned)
    magnitude = 1.0
    if isinstance(scaling, LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        # Long waves are slowed by `factor`, short ones kept, those between interpolated.
        turns = scaling.original_length * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (keep + (1.0 - keep) / scaling.factor)
    elif isinstance(scaling, LongScaling):
        beyond = (most >= scaling.original_length)[:, None, None]
        divisors = jnp.where(beyond, jnp.array(scaling.long), jnp.array(scaling.short))
        frequencies, magnitude = frequencies / divisors, scaling.magnitude
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: Float[Array, "B N K H"], tables: Tables) -> Float[Array, "B N K H"]:
    """Rotary position embedding (RoFormer, arXiv:2104.09864, eq. 34), halves paired as HF does."""
    cos, sin = (table[:, :, None] for table in tables)
    turned = 2 * cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide[..., :turned], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin, wide[..., turned:]]
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
