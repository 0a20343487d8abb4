"""Align, separate, retain (Lens, arXiv:2410.04407, eq. 5 to 8), in subspace coordinates.

A projection on orthonormal columns and its coordinates have the same norm, so every loss is
computed in r numbers and divided by E, which equals the mean squared error of the full vectors.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Goal:
    """The goals of the losses at one layer.

    Attributes:
      direction: [E], `m_a` normalised.
      specific: [E r], `M_s`.
      moves: [K r], `w_k Δ_k` in coordinates of `M_s`, for each target.
    """

    direction: Float[Array, "E"]
    specific: Float[Array, "E r"]
    moves: Float[Array, "K r"]


def align(states: Float[Array, "B C E"], goal: Goal) -> Float[Array, "B"]:
    """`Σ_k MSE(P_a h_central, P_a h_k)`; gradients flow into both sides.

    Args:
      states: of the central language and the K targets, C = 1 + K.
    """
    along = states @ goal.direction
    return jnp.sum((along[:, :1] - along[:, 1:]) ** 2, axis=1) / states.shape[-1]


def separate(
    states: Float[Array, "B C E"], before: Float[Array, "B C E"], goal: Goal
) -> Float[Array, "B"]:
    """`Σ_k MSE(P_s (h_k − h⁰_k), w_k Δ_k)`."""
    moved = (states - before)[:, 1:] @ goal.specific
    return jnp.sum((moved - goal.moves) ** 2, axis=(1, 2)) / states.shape[-1]


def retain(mean: Float[Array, "B E"], before: Float[Array, "B E"]) -> Float[Array, "B"]:
    """`MSE(mean_t h_central, mean_t h⁰_central)`, means over real tokens."""
    return jnp.mean((mean - before) ** 2, axis=-1)
