"""States of a frozen encoder, computed once for each text and kept for every later use of it."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxfusion.data.batching import TokenRow, find_shapes, in_order, length_buckets, lengths_of
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.files import cache_dir
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.encoder import Encoder
from jaxfusion.sharding.hosts import fetch

BATCH = 64  # texts that the encoder reads at a time
logger = logging.getLogger(__name__)
Fill = Callable[[Batch], Batch]


def keep_states(
    bridge: Bridge, params: Params, rows: Sequence[TokenRow], tokenizers: Tokenizers, limit: float
) -> Fill | None:
    """The function that puts these rows' states into a batch of them (`Batch.enc_states`); None if
    they take more than `limit` GiB, cannot be kept, or several processes share the encoder.

    Runs of one process with the same encoder that read the same layers share what is kept, up to
    `limit` for each set of layers. It is in a file without a name in the cache directory, of which
    the system holds in memory what fits.
    """
    if not limit or jax.process_count() > 1:
        return None
    try:
        kept = _kept(bridge.encoder, bridge.read_layers, limit, _content(params["encoder"]))
        return kept.fill if kept.add(params, rows, tokenizers) else None
    except OSError as error:
        logger.warning("the encoder's states cannot be kept in %s (%s): they are computed at every "
                       "use", cache_dir(), error)
        return None


class KeptStates:
    """States `[tokens, layers, D]` of texts, found by their ids."""

    def __init__(self, encoder: Encoder, layers: tuple[int, ...], limit: float):
        shape = (len(layers), encoder.config.d_model)
        room = int(limit * 2**30) // (int(np.prod(shape)) * np.dtype(encoder.dtype).itemsize)
        cache_dir().mkdir(parents=True, exist_ok=True)
        # Takes space only as it is written, and none after the process.
        self.file = tempfile.TemporaryFile(dir=cache_dir())  # noqa: SIM115
        self.states = np.memmap(self.file, encoder.dtype, "w+", shape=(max(room, 1), *shape))
        self.room, self.used, self.places, self.said = room, 0, {}, False
        last = layers == (encoder.config.num_layers,)

        def encode(params: Params, batch: Batch):
            call = partial(encoder.apply, {"params": params["encoder"]}, batch.enc_tokens,
                           batch.enc_segments)
            if last:
                return call()[:, :, None]
            embeddings = layers[0] == 0
            states = call(states=True, embeddings=embeddings)
            return jnp.moveaxis(states[jnp.array(layers) - (not embeddings)], 0, 2)

        self.encode = jax.jit(encode)

    def add(self, params: Params, rows: Sequence[TokenRow], tokenizers: Tokenizers) -> bool:
        """Computes the states of rows that are not kept yet; False if they do not fit.

        Raises:
          OSError: they cannot be written; those kept before are as they were.
        """
        new = list({_key(row.query): row for row in rows
                    if row.query and _key(row.query) not in self.places}.values())
        if not new:
            return True
        lengths = lengths_of(new)[0]
        needed, size = self.used + int(lengths.sum()), self.states[0].nbytes
        if needed > self.room:
            if not self.said:
                logger.warning(
                    "the encoder's states of %s texts take %.1f GiB with those kept before, more "
                    "than encoder.keep_states = %.1f: they are computed at every use",
                    f"{len(new):,}", needed * size / 2**30, self.room * size / 2**30)
            self.said = True
            return False
        shapes = find_shapes(new, length_buckets(int(lengths.max())))
        used, places = self.used, {}
        self.file.seek(used * size)  # not through the map, where a full disk is a bus error
        # In an order that depends on these rows alone, so that a resumed run has the same states.
        for numbers, batch in in_order(new, shapes, tokenizers, min(BATCH, len(new))):
            found = fetch(self.encode(params, batch))
            for i, number in enumerate(numbers):
                states = found[i, : lengths[number]]
                self.file.write(np.ascontiguousarray(states).tobytes())
                places[_key(new[number].query)] = used
                used += len(states)
        self.file.flush()
        self.used, self.places = used, self.places | places
        return True

    def fill(self, batch: Batch) -> Batch:
        """The batch with its states; those of padding are 0."""
        shape = (*batch.enc_tokens.shape, *self.states.shape[1:])
        states = np.zeros(shape, self.states.dtype)
        for i, segments in enumerate(batch.enc_segments):
            for segment in range(1, int(segments.max(initial=0)) + 1):
                at = np.flatnonzero(segments == segment)
                if len(at):
                    start = self.places[_key(batch.enc_tokens[i, at])]
                    states[i, at] = self.states[start : start + len(at)]
        return replace(batch, enc_states=states)


@lru_cache(4)  # the variants of a comparison take turns
def _kept(
    encoder: Encoder, layers: tuple[int, ...], limit: float, content: tuple[float, ...]
) -> KeptStates:
    return KeptStates(encoder, layers, limit)


def _key(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


@jax.jit
def _sums(params: Params):
    return [(jnp.sum(x, dtype=jnp.float32), jnp.sum(jnp.square(x), dtype=jnp.float32))
            for x in jax.tree.leaves(params)]


def _content(params: Params) -> tuple[float, ...]:
    """What tells one encoder's parameters from another's."""
    return tuple(float(x) for pair in _sums(params) for x in pair)
