"""Answers of many rows, where those that have ended make room for others.

Continuous batching (Orca: Yu et al., OSDI 2022). A batch that waits for its longest answer computes
mostly padding where lengths differ. Here the host looks at the batch whenever a quarter of its rows
has ended, and new prompts take their places in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.data.batching import Shapes, TokenRow, collate
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.evaluation.generate import Decoding, choose_tokens, extend, prefill
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.cache import Cache, Extra
from jaxfusion.sharding.rules import constrain, replicated

PARTS = 4  # refills that replace all rows of a batch


@dataclass(frozen=True)
class Running:
    """B answers on their way.

    Attributes:
      cache: with a ring of T slots behind the prompts'. All rows write the same slot in a step, and
        none has more than T tokens, so a slot is written again only when its token is unwanted.
      logits: [B V] of the next token. position: [B] of it among the row's tokens.
      tokens: [B T] the answers, padded with the end token. count: [B] tokens that are chosen.
      done: [B] answers that have ended; rows without a prompt, too.
      numbers: [B] of the rows, which seed samples. step: how often a slot was written.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    position: Int[Array, "B"]
    tokens: Int[Array, "B T"]
    count: Int[Array, "B"]
    done: Bool[Array, "B"]
    numbers: Int[Array, "B"]
    step: Int[Array, ""]


jax.tree_util.register_dataclass(
    Running, data_fields=list(Running.__dataclass_fields__), meta_fields=[]
)


@dataclass(frozen=True)
class Programs:
    """What runs on the devices, compiled for every shape of prompts.

    Attributes:
      begin: `(params, batch, numbers)` reads prompts. refill: `(running, new, places)` puts others
        that were read into these rows of the batch; a place of B is dropped. It is a program of its
        own, as it depends on both shapes, and prompts are not compiled again for each pair.
      proceed: `(params, running, ends, most)` goes on until at most `most` answers are unfinished;
        also returns `done` and `tokens`.
    """

    begin: Callable[..., Running]
    refill: Callable[..., Running]
    proceed: Callable[..., tuple[Running, Bool[Array, "B"], Int[Array, "B T"]]]


@lru_cache(8)
def make_programs(bridge: Bridge, decoding: Decoding, bare: bool, shared: int = 0) -> Programs:
    """The programs of an LLM or bridge; arguments as in `generate.make_scorer`."""
    most = decoding.max_new_tokens

    def begin(params: Params, batch: Batch, numbers: Int[Array, "B"]) -> Running:
        batch = jax.tree.map(lambda x: constrain(x, "rows", *[None] * (x.ndim - 1)), batch)
        cache, logits = prefill(bridge, params, batch, most, bare, shared)
        rows = logits.shape[0]
        return Running(
            cache, logits, jnp.max(batch.dec_positions, axis=1) + 1,
            jnp.full((rows, most), decoding.eos, jnp.int32), jnp.zeros(rows, jnp.int32),
            ~jnp.any(batch.dec_segments != 0, axis=1), numbers, jnp.zeros((), jnp.int32))

    def refill(running: Running, new: Running, places: Int[Array, "b"]) -> Running:
        by_row = {x: _put(getattr(running, x), getattr(new, x), places) for x in
                  ("logits", "position", "tokens", "count", "done", "numbers")}
        return Running(_put_cache(running.cache, new.cache, places), step=running.step, **by_row)

    def proceed(params, running: Running, ends, unfinished):
        def more(now: Running):
            return jnp.sum(~now.done) > unfinished

        last = jax.lax.while_loop(more, lambda now: one_token(params, now, ends), running)
        return last, *replicated((last.done, last.tokens))

    def one_token(params, now: Running, ends) -> Running:
        rows, prompts = jnp.arange(now.done.shape[0]), now.cache.segments.shape[1] - most
        chosen = jnp.where(now.done, decoding.eos,
                           choose_tokens(now.logits, decoding, now.numbers, now.count))
        tokens = now.tokens.at[rows, now.count].set(chosen, mode="drop")
        count = now.count + ~now.done
        ended = (chosen == decoding.eos) | (count == most) | (
            False if ends is None else ends[chosen])
        cache, logits = extend(bridge, params, now.cache, chosen, now.position,
                               prompts + now.step % most)
        return Running(cache, logits, now.position + 1, tokens, count, now.done | ended,
                       now.numbers, now.step + 1)

    return Programs(jax.jit(begin), jax.jit(refill, donate_argnums=0),
                    jax.jit(proceed, donate_argnums=1))


def _put_cache(cache: Cache, new: Cache, places: Int[Array, "b"]) -> Cache:
    """The cache with the rows of a shorter one at these places."""
    extra, more = cache.extra, new.extra
    if extra is not None:
        extra = Extra(_put(extra.k, more.k, places, 1), _put(extra.v, more.v, places, 1),
                      extra.gate, _put(extra.segments, more.segments, places))
    return Cache(_put(cache.k, new.k, places, 1), _put(cache.v, new.v, places, 1),
                 _put(cache.positions, new.positions, places),
                 _put(cache.segments, new.segments, places), extra)


def _put(old: Array, new: Array, places: Int[Array, "b"], axis: int = 0) -> Array:
    """Rows, along an axis, replaced by others, which are padded to the length of the old ones."""
    missing = [(0, 0 if i == axis else size - new.shape[i]) for i, size in enumerate(old.shape)]
    return old.at[(slice(None),) * axis + (places,)].set(jnp.pad(new, missing), mode="drop")


def answer_all(
    programs: Programs, params: Params, rows: Sequence[TokenRow], shapes: Shapes,
    tokenizers: Tokenizers, batch_size: int, numbers: Int[np.ndarray, "N"],
    ends: Bool[np.ndarray, "V"] | None = None,
    fill: Callable[[Batch], Batch] | None = None,
) -> Iterator[tuple[int, Int[np.ndarray, "T"]]]:
    """Answers all rows; yields each one's index and tokens as soon as the host sees its end.

    Args:
      numbers: of the rows, which seed their samples. ends: as in `generate.make_scorer`.
      fill: adds to a batch what is known of its texts.
    """
    share = max(1, batch_size // PARTS)

    def read(chosen: np.ndarray, size: int) -> tuple[Batch, np.ndarray]:
        placed = shapes.place([rows[i] for i in chosen], len(tokenizers.start), size)
        batch, seeds = collate(*placed, tokenizers), np.resize(numbers[chosen], size)
        return batch if fill is None else fill(batch), seeds.astype(np.int32)

    # The longest first: the others fit into their cache.
    waiting = np.argsort(-shapes.buckets_of(rows), kind="stable")
    first, waiting = waiting[:batch_size], waiting[batch_size:]
    placed = np.full(batch_size, -1)  # which row has each place; -1: none
    placed[: len(first)] = first
    running = programs.begin(params, *read(first, batch_size))
    while (placed >= 0).any():
        free = min(share, len(waiting))
        unfinished = int((placed >= 0).sum()) - free if free else 0
        running, done, tokens = programs.proceed(params, running, ends, unfinished)
        done, tokens = jax.device_get((done, tokens))
        for place in np.flatnonzero(done & (placed >= 0)):
            yield int(placed[place]), tokens[place]
            placed[place] = -1
        while len(waiting) and (placed < 0).sum() >= min(share, len(waiting)):
            new, waiting = waiting[:share], waiting[share:]
            places = np.full(share, batch_size)
            places[: len(new)] = np.flatnonzero(placed < 0)[: len(new)]
            placed[places[: len(new)]] = new
            running = programs.refill(
                running, programs.begin(params, *read(new, share)), places)
