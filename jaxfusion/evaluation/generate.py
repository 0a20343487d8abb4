"""Generates answers and scores given ones, both from one pass over the prompt."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxfusion.evaluation.options import Options
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.cache import Cache, init_cache
from jaxfusion.sharding.rules import constrain, replicated

Score = Callable[..., tuple[Int[Array, "B T"], Float[Array, "C B"], Bool[Array, "C B"]]]

CHUNK = 4  # nodes of every row whose logits are held at once


@dataclass(frozen=True)
class Decoding:
    """How an answer's tokens are chosen.

    Attributes:
      max_new_tokens: of an answer. eos: ends it, and pads the rest.
      temperature: 0: greedy; above 0: sampled.
      top_p: sample from the smallest set of most likely tokens with this total probability
        (nucleus sampling, arXiv:1904.09751). seed: of the samples.
    """

    max_new_tokens: int
    eos: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@lru_cache(8)  # the development scores and the final ones share their compiled programs
def make_scorer(bridge: Bridge, decoding: Decoding, bare: bool, shared: int = 0) -> Score:
    """The jitted `(params, batch, options, ends=None, numbers=None)`, which returns
    `(tokens, scores, greedy)`.

    `ends` [V] is True at tokens that end an answer, besides `eos`; `numbers` [B] seed each row's
    samples, independently of its batch. `tokens` [B max_new_tokens] is the answer, padded with
    `eos` after its end, `scores` [C B] the log-likelihood of each option, summed over its tokens,
    and `greedy` [C B] whether all of its tokens are the most likely ones.

    Args:
      bare: the LLM alone, on batches whose rows are text.
      shared: see `prefill`.
    """

    def score(params: Params, batch: Batch, options: Options, ends=None, numbers=None):
        slots = max(decoding.max_new_tokens, options.nodes.shape[1])
        batch = jax.tree.map(lambda x: constrain(x, "rows", *[None] * (x.ndim - 1)), batch)
        cache, logits = prefill(bridge, params, batch, slots, bare, shared)
        position = jnp.max(batch.dec_positions, axis=1) + 1
        start = batch.dec_tokens.shape[1]
        empty = ~jnp.any(batch.dec_segments != 0, axis=1)
        tokens = generate(bridge, params, cache, logits, position, start, decoding, empty, ends,
                          numbers)
        return replicated((tokens, *log_likelihoods(
            bridge, params, cache, logits, position, start, options)))

    return jax.jit(score)


def prefill(
    bridge: Bridge, params: Params, batch: Batch, slots: int, bare: bool, shared: int = 0
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads the prompts; returns the cache with `slots` free slots, and each row's next logits.

    Args:
      shared: how many slots all rows begin with in the same way; they are read once.
    """
    cache, hidden = read_prompts(bridge, params, batch, slots, bare, shared)
    # Positions are 0 at padding, so the last real slot has the largest position.
    last = jnp.argmax(batch.dec_positions[:, shared:], axis=1)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return cache, bridge.logits(params, final)


def read_prompts(
    bridge: Bridge, params: Params, batch: Batch, slots: int, bare: bool, shared: int = 0
) -> tuple[Cache, Float[Array, "B N E"]]:
    """As `prefill`, with the hidden states of all slots behind the shared ones."""
    inputs, extra = (bridge.embed(params, batch.dec_tokens), None) if bare else (
        bridge.read(params, batch))
    rows, length, _ = inputs.shape
    cache = init_cache(bridge.decoder.config, rows, length + slots, bridge.decoder.dtype)
    places = batch.dec_positions, batch.dec_segments
    if shared:
        one = init_cache(bridge.decoder.config, 1, shared, bridge.decoder.dtype)
        _, one = bridge.decode(params, inputs[:1, :shared], *(x[:1, :shared] for x in places), one)
        whole = (one.k, one.v, *(x[:, :shared] for x in places))
        cache = Cache(*(x.at[:, :, :shared].set(new) if x.ndim > 2 else x.at[:, :shared].set(new)
                        for x, new in zip((cache.k, cache.v, cache.positions, cache.segments),
                                          whole, strict=True)))
    positions, segments = (x[:, shared:] for x in places)
    hidden, cache = bridge.decode(params, inputs[:, shared:], positions, segments,
                                  replace(cache, extra=extra), shared)
    return cache, hidden


def generate(
    bridge: Bridge, params: Params, cache: Cache, logits: Float[Array, "B V"],
    position: Int[Array, "B"], start: int, decoding: Decoding, done: Bool[Array, "B"],
    ends: Bool[Array, "V"] | None, numbers: Int[Array, "B"] | None,
) -> Int[Array, "B T"]:
    """Generates tokens until every row has ended. [B max_new_tokens]

    Args:
      cache, logits: from `prefill`.
      position: of the first new token in each row. start: its slot in the cache.
      done: rows that need no answer.
      ends, numbers: as in `make_scorer`.
    """
    rows, eos = position.shape[0], decoding.eos
    tokens = jnp.full((rows, decoding.max_new_tokens), eos, jnp.int32)
    if not decoding.max_new_tokens:
        return tokens

    def unfinished(state):
        step, _, done, _, _ = state
        return (step < decoding.max_new_tokens) & ~jnp.all(done)

    def next_token(state):
        step, tokens, done, cache, logits = state
        chosen = jnp.where(done, eos, choose_tokens(logits, decoding, numbers, step))
        tokens = tokens.at[:, step].set(chosen)
        cache, logits = extend(bridge, params, cache, chosen, position + step, start + step)
        ended = (chosen == eos) | (False if ends is None else ends[chosen])
        return step + 1, tokens, done | ended, cache, logits

    state = (0, tokens, done, cache, logits)
    return jax.lax.while_loop(unfinished, next_token, state)[1]


def extend(
    bridge: Bridge, params: Params, cache: Cache, tokens: Int[Array, "B"],
    position: Int[Array, "B"], slot: Int[Array, ""] | int,
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads one token more in every row, into one slot of the cache; returns the next logits."""
    ones = jnp.ones((tokens.shape[0], 1), jnp.int32)
    hidden, cache = bridge.decode(params, bridge.embed(params, tokens[:, None]), position[:, None],
                                  ones, cache, slot)
    return cache, bridge.logits(params, hidden[:, 0])


def choose_tokens(
    logits: Float[Array, "B V"], decoding: Decoding, numbers: Int[Array, "B"] | None,
    step: Int[Array, "*B"] | int,
) -> Int[Array, "B"]:
    """Each row's next token; samples depend only on the seed, the row's number and the step, which
    is that of all rows or of each."""
    if not decoding.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    every = partial(jnp.full, logits.shape[0])
    top_p = every(decoding.top_p) if decoding.top_p < 1 else None
    keys = row_keys(every(decoding.seed, jnp.uint32), numbers, step)
    return draw_tokens(logits, every(decoding.temperature), top_p, keys)


def row_keys(
    seeds: Int[Array, "B"], numbers: Int[Array, "B"], step: Int[Array, "*B"] | int
) -> Key[Array, "B"]:
    """The random key of each row's token at a step, which is that of all rows or of each."""
    def one(seed, number, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)

    return jax.vmap(one)(seeds, numbers, jnp.broadcast_to(step, numbers.shape))


def draw_tokens(
    logits: Float[Array, "B V"], temperature: Float[Array, "B"],
    top_p: Float[Array, "B"] | None, keys: Key[Array, "B"],
) -> Int[Array, "B"]:
    """A sample of each row's next token.

    Args:
      temperature: of each row, above 0. top_p: of each row; None: 1 for all, which sorts nothing.
      keys: see `row_keys`.
    """
    logits = logits.astype(jnp.float32) / temperature[:, None]
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(chances, axis=-1) - chances < top_p[:, None]
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where((logits < least) & (top_p[:, None] < 1), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def log_likelihoods(
    bridge: Bridge, params: Params, cache: Cache, logits: Float[Array, "B V"],
    position: Int[Array, "B"], start: int, options: Options,
) -> tuple[Float[Array, "C B"], Bool[Array, "C B"]]:
    """Summed log-probability of each option after its row's prompt, and whether it is greedy.

    The prompt's last logits score first tokens; those after it come from one pass over the nodes.
    Logits are computed for `CHUNK` nodes at a time, so memory does not grow with the vocabulary
    times the nodes.
    """
    count, rows, length = options.tokens.shape
    token, after = (jnp.moveaxis(x, 0, 1).reshape(rows, count * length)
                    for x in (options.tokens, options.after))

    def read(logits: Float[Array, "B n V"], first: Array | int):
        """Log-probability of every token, and whether it is the likeliest; 0 and False for those
        that other nodes than `first` to `first + n - 1` predict."""
        _, n, size = logits.shape
        place = after - first
        here = (place >= 0) & (place < n)
        place = jnp.where(here, place, 0)
        found = jnp.take_along_axis(logits.reshape(rows, n * size), place * size + token, axis=1)
        whole = jnp.take_along_axis(jax.nn.logsumexp(logits, axis=-1), place, axis=1)
        likeliest = jnp.take_along_axis(jnp.argmax(logits, axis=-1), place, axis=1) == token
        return jnp.where(here, found - whole, 0.0), here & likeliest

    def add(found, chunk):
        hidden, first = chunk
        new = read(bridge.logits(params, hidden), first)
        return (found[0] + new[0], found[1] | new[1]), None

    found = read(logits[:, None], -1)
    if nodes := options.nodes.shape[1]:
        real = jnp.diagonal(options.visible, axis1=1, axis2=2).astype(jnp.int32)
        hidden, _ = bridge.decode(params, bridge.embed(params, options.nodes),
                                  position[:, None] + options.depth, real, cache, start,
                                  options.visible)
        chunks = -(-nodes // CHUNK)
        hidden = jnp.pad(hidden, ((0, 0), (0, chunks * CHUNK - nodes), (0, 0)))
        hidden = jnp.moveaxis(hidden.reshape(rows, chunks, CHUNK, -1), 1, 0)
        found = jax.lax.scan(add, found, (hidden, CHUNK * jnp.arange(chunks)))[0]
    chances, greedy = (jnp.moveaxis(x.reshape(rows, count, length), 0, 1) for x in found)
    return (jnp.sum(chances, axis=-1, where=options.mask),
            jnp.all(greedy | ~options.mask, axis=-1))
