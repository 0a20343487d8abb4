"""Generates answers and scores given ones, both from one pass over the prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.cache import Cache, init_cache
from jaxfusion.sharding.rules import constrain, replicated

Score = Callable[..., tuple[Int[Array, "B T"], Float[Array, "C B"], Bool[Array, "C B"]]]


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
def make_scorer(bridge: Bridge, decoding: Decoding, bare: bool) -> Score:
    """The jitted `(params, batch, options, mask, ends=None, numbers=None)`, which returns
    `(tokens, scores, greedy)`.

    `options` [C B T] are the ids of each row's possible answers, `mask` is True at real ids.
    `ends` [V] is True at tokens that end an answer, besides `eos`; `numbers` [B] seed each row's
    samples, independently of its batch. `tokens` [B max_new_tokens] is the answer, padded with
    `eos` after its end, `scores` [C B] the log-likelihood of each option, summed over its tokens,
    and `greedy` [C B] whether all of its tokens are the most likely ones.

    Args:
      bare: the LLM alone, on batches whose rows are text.
    """

    def score(params: Params, batch: Batch, options, mask, ends=None, numbers=None):
        slots = max(decoding.max_new_tokens, options.shape[-1])
        batch = jax.tree.map(lambda x: constrain(x, "rows", None), batch)
        cache, logits = prefill(bridge, params, batch, slots, bare)
        position = jnp.max(batch.dec_positions, axis=1) + 1
        start = batch.dec_tokens.shape[1]
        empty = ~jnp.any(batch.dec_segments != 0, axis=1)
        tokens = generate(bridge, params, cache, logits, position, start, decoding, empty, ends,
                          numbers)

        def likelihood(option):
            return log_likelihood(bridge, params, cache, logits, position, start, *option)

        return replicated((tokens, *jax.lax.map(likelihood, (options, mask))))

    return jax.jit(score)


def prefill(
    bridge: Bridge, params: Params, batch: Batch, slots: int, bare: bool
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads the prompts; returns the cache with `slots` free slots, and each row's next logits."""
    inputs = bridge.embed(params, batch.dec_tokens) if bare else bridge.inputs(params, batch)
    rows, length, _ = inputs.shape
    cache = init_cache(bridge.decoder.config, rows, length + slots, bridge.decoder.dtype)
    hidden, cache = bridge.decode(
        params, inputs, batch.dec_positions, batch.dec_segments, cache, 0
    )
    # Positions are 0 at padding, so the last real slot has the largest position.
    last = jnp.argmax(batch.dec_positions, axis=1)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return cache, bridge.logits(params, final)


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
    ones = jnp.ones((rows, 1), jnp.int32)

    def unfinished(state):
        step, _, done, _, _ = state
        return (step < decoding.max_new_tokens) & ~jnp.all(done)

    def extend(state):
        step, tokens, done, cache, logits = state
        chosen = jnp.where(done, eos, choose_tokens(logits, decoding, numbers, step))
        tokens = tokens.at[:, step].set(chosen)
        hidden, cache = bridge.decode(
            params, bridge.embed(params, chosen[:, None]), (position + step)[:, None], ones,
            cache, start + step,
        )
        logits = bridge.logits(params, hidden[:, 0])
        ended = (chosen == eos) | (False if ends is None else ends[chosen])
        return step + 1, tokens, done | ended, cache, logits

    state = (0, tokens, done, cache, logits)
    return jax.lax.while_loop(unfinished, extend, state)[1]


def choose_tokens(
    logits: Float[Array, "B V"], decoding: Decoding, numbers: Int[Array, "B"] | None,
    step: Int[Array, ""] | int,
) -> Int[Array, "B"]:
    """Each row's next token; samples depend only on the seed, the row's number and the step."""
    if not decoding.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / decoding.temperature
    if decoding.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(chances, axis=-1) - chances < decoding.top_p
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    key = jax.random.fold_in(jax.random.key(decoding.seed), step)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def log_likelihood(
    bridge: Bridge, params: Params, cache: Cache, logits: Float[Array, "B V"],
    position: Int[Array, "B"], start: int, option: Int[Array, "B T"], mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Summed log-probability of each row's `option` after its prompt, and whether it is greedy.

    Options of one token need no extra pass: the prompt's last logits score them.
    """
    before, inputs = logits[:, None], option[:, :-1]
    if inputs.shape[1]:
        positions = position[:, None] + jnp.arange(inputs.shape[1])
        hidden, _ = bridge.decode(params, bridge.embed(params, inputs), positions,
                                  mask[:, :-1].astype(jnp.int32), cache, start)
        before = jnp.concatenate([before, bridge.logits(params, hidden)], axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(before, option)
    greedy = jnp.all((jnp.argmax(before, axis=-1) == option) | ~mask, axis=1)
    return -jnp.sum(losses, axis=1, where=mask), greedy
