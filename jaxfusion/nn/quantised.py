"""Frozen weights in 8 or 4 bits: integers, and float32 scales (weight-only quantisation).

`w ≈ values · scale`, rounded to nearest. int8 has one scale for all inputs of an output channel
(vector-wise, as in LLM.int8(), arXiv:2208.07339, section 2.1), int4 one for every 32 inputs (groups
of ZeroQuant, arXiv:2206.01861, section 4.1). The weight of the largest magnitude becomes -128 or
-8, whatever its sign, so a scale may be negative (as in llama.cpp's Q4_0): `max|w| / 7` would leave
one of 16 steps unused, and an error an eighth larger. Tables of token embeddings are int8 in both,
with a scale for each token: a table is read as logits too, where 4 bits cost the most.

A quantised kernel is two parameters, `kernel` and `scale`, of the same rank: each axis of the scale
divides the kernel's, and one entry holds for as many of its entries.
"""

import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # inputs that share a scale in int4; fewer where 32 does not divide them
TABLES = ("embed/embedding", "head/embedding")
Names = tuple[str | None, ...]


def dtype_of_activations(dtype: str) -> jnp.dtype:
    """What a tower of this dtype computes in: bfloat16 if its weights are quantised."""
    return jnp.dtype("bfloat16" if dtype in BITS else dtype)


def scale_path(path: str) -> str:
    """The path of the scale that belongs to the weights at `path`."""
    return f"{path.rpartition('/')[0]}/scale"


def scales_of(paths: Iterable[str]) -> set[str]:
    """The paths at which these parameters have their scales, if they are quantised."""
    return {scale_path(path) for path in paths if is_quantised(path)}


def is_quantised(path: str) -> bool:
    """Whether a quantised tower holds the parameter at `path` as integers: its linear maps and
    token tables, not norms, biases and positions."""
    return path.endswith(("/kernel", *TABLES))


def layout(path: str, names: Names, shape: tuple[int, ...], dtype: str) -> tuple[
        jnp.dtype, tuple[int, ...], Names]:
    """How a parameter is held in `int8` or `int4`.

    Args:
      path, names, shape: of the parameter as it is without quantisation.

    Returns:
      The dtype of the integers, and the shape and logical axis names of the scale.
    """
    first = 1 if names[0] == "layers" else 0
    if path.endswith(TABLES):
        inputs, dtype = (1,), "int8"
    else:  # the map out of attention reads two axes, all others one
        inputs = (first, first + 1) if names[first] == "heads" else (first,)
    sizes, kept = list(shape), list(names)
    for axis in inputs:
        sizes[axis], kept[axis] = 1, None
    if dtype == "int4":
        for axis in inputs[:-1]:
            sizes[axis], kept[axis] = shape[axis], names[axis]
        sizes[inputs[-1]] = shape[inputs[-1]] // math.gcd(shape[inputs[-1]], GROUP)
        kept[inputs[-1]] = names[inputs[-1]]
    return jnp.dtype(dtype), tuple(sizes), tuple(kept)


def check_floats(path: tuple[str, ...], weights: Array) -> None:
    """Raises ValueError for integers whose scale was left out, which would be taken for weights."""
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"{'/'.join(path)} has {weights.dtype} weights, and its scale is missing")


def quantise(
    weights: np.ndarray, scale_shape: tuple[int, ...], dtype: jnp.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of some weights; a group of zeros has scale 1.

    Args:
      weights: of any float dtype. scale_shape: each axis divides the weights'.
      dtype: int8 or int4.
    """
    lowest = -2 ** (BITS[dtype.name] - 1)
    tiles = _tiled(weights.astype(np.float32), scale_shape)
    within = tuple(range(1, tiles.ndim, 2))
    high, low = (pick(tiles, axis=within, keepdims=True) for pick in (np.max, np.min))
    scale = np.where(high > -low, high, low) / np.float32(lowest)
    scale = np.where(scale == 0, np.float32(1), scale)
    values = np.clip(np.rint(tiles / scale), lowest, -lowest - 1).astype(np.int8)
    values = values.reshape(weights.shape)
    return values.astype(dtype), scale.reshape(scale_shape)


def dequantise(values: Int[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The weights, in float32."""
    tiles = _tiled(values.astype(jnp.float32), scale.shape)
    return (tiles * jnp.expand_dims(scale, range(1, tiles.ndim, 2))).reshape(values.shape)


def _tiled(x, scale_shape: tuple[int, ...]):
    """`x` with every axis split in two: the scale's, and the entries that share one of it."""
    return x.reshape([part for n, s in zip(x.shape, scale_shape, strict=True)
                      for part in (s, n // s)])


# The backward pass makes the floats again: kept, they would be a copy of the tower.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def product(
    x: Float[Array, "M K"], values: Int[Array, "..."], scale: Float[Array, "..."], inputs: int
) -> Float[Array, "M N"]:
    """`x` times the weights, whose first `inputs` axes are the K that are read.

    Accumulated in float32 and returned in the dtype of `x`.
    """
    width = x.shape[-1]
    if all(n == 1 for n in scale.shape[:inputs]):  # integers up to 128 are exact in bfloat16
        y = jnp.matmul(x, values.reshape(width, -1).astype(x.dtype),
                       preferred_element_type=jnp.float32)
        return (y * scale.reshape(-1)).astype(x.dtype)
    return x @ dequantise(values, scale).astype(x.dtype).reshape(width, -1)
