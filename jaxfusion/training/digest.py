"""Digests of arrays: independent of their sharding, different after any change.

Each word of an array is mixed with its place by the finalizer of MurmurHash3 (A. Appleby, public
domain), and the mixed words are added up. A sum does not care how an array is split, so devices and
hosts add their own parts, and a checkpoint can be checked on another mesh. The finalizer maps no
two words to one, so a change within one word always shows; others go unseen once in 2**64.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfusion.sharding.rules import replicated

GOLDEN, FIRST, SECOND = (np.uint32(x) for x in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))
PART = 1 << 15  # words that are mixed at a time: they stay in a CPU core's cache
PARTS = 64  # that a thread takes at a time


def digests(tree: Any) -> dict[str, str]:
    """The digest of every array of a tree by its path.

    Arrays may be sharded over several processes, which then have to call this together.
    """
    named = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    # On a CPU of one process NumPy reads an array in place, which is faster.
    here = jax.process_count() == 1 and jax.default_backend() == "cpu"
    sums = {name: sums_on_host(np.asarray(x)) if here else sums_on_device(x)
            for name, x in named.items()}
    return {name: _text(named[name], x) for name, x in jax.device_get(sums).items()}


def host_digests(flat: dict[str, np.ndarray]) -> dict[str, str]:
    """As `digests`, of NumPy arrays by name."""
    return {name: _text(x, sums_on_host(x)) for name, x in flat.items()}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _text(x: Any, sums: np.ndarray) -> str:
    """Dtype and shape belong to it."""
    return f"{x.dtype}{list(x.shape)} {int(sums[0]):08x}{int(sums[1]):08x}"


def _mixed(words, places_times_golden):
    """MurmurHash3's finalizer of words, each with its place."""
    x = words ^ places_times_golden
    x ^= x >> 16
    x *= FIRST
    x ^= x >> 13
    x *= SECOND
    x ^= x >> 16
    return x


@jax.jit
def sums_on_device(x: jax.Array) -> jax.Array:
    """The mixed words' sum, and the sum of each times `2 place + 1`: two words."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    size = min(x.dtype.itemsize, 4)  # 8 bytes become two words
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)
    places, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        places += along * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = _mixed(words, places * GOLDEN)
    weighed = mixed * (places * np.uint32(2) + np.uint32(1))
    return replicated(jnp.stack([jnp.sum(y, dtype=jnp.uint32) for y in (mixed, weighed)]))


def sums_on_host(x: np.ndarray) -> np.ndarray:
    """As `sums_on_device`, of a NumPy array."""
    flat = np.ascontiguousarray(x).reshape(-1)
    words = flat.view(f"uint{8 * min(flat.dtype.itemsize, 4)}")
    starts = range(0, len(words), PARTS * PART)
    some = [words[start : start + PARTS * PART] for start in starts]
    if len(some) < 2:
        return sum(map(_sums_of, some, starts), np.zeros(2, np.uint32))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return sum(threads.map(_sums_of, some, starts), np.zeros(2, np.uint32))


def _sums_of(words: np.ndarray, first: int) -> np.ndarray:
    """Of words of which the first has this place."""
    within = np.arange(min(PART, len(words)), dtype=np.uint32)
    times_golden, weights = within * GOLDEN, within * np.uint32(2) + np.uint32(1)
    sums = np.zeros(2, np.uint32)
    for start in range(0, len(words), PART):
        part = words[start : start + PART].astype(np.uint32, copy=False)
        place, size = np.array([first + start], np.uint64).astype(np.uint32), len(part)
        mixed = _mixed(part, times_golden[:size] + place * GOLDEN)
        total = mixed.sum(dtype=np.uint32)
        mixed *= weights[:size]
        sums += np.array([total, mixed.sum(dtype=np.uint32)])
        sums[1:] += np.uint32(2) * place * total
    return sums
