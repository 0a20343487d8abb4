"""Greedy answers and likelihoods of given answers, both from one pass over the prompt."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.decoder import Cache, init_cache
from jaxfusion.sharding.rules import constrain, replicated

Score = Callable[..., tuple[Int[Array, "B T"], Float[Array, "C B"]]]


@lru_cache(8)  # the development scores and the final ones share their compiled programs
def make_scorer(bridge: Bridge, max_new_tokens: int, eos: int, bare: bool) -> Score:
    """The jitted `(params, batch, options, options_mask) -> (tokens, scores)`.

    `options` [C B T] are the ids of each row's possible answers, `options_mask` is True at real
    ones. Of the result, `tokens` [B max_new_tokens] is the greedy answer, padded with `eos` from
    its end on, and `scores` [C B] the log-likelihood of each option, summed over its tokens.

    Args:
      bare: the LLM alone, on batches whose rows are text.
    """

    def score(params: Params, batch: Batch, options, options_mask):
        slots = max(max_new_tokens, options.shape[-1])
        batch = jax.tree.map(lambda x: constrain(x, "rows", None), batch)
        cache, logits = prefill(bridge, params, batch, slots, bare)
        position = jnp.max(batch.dec_positions, axis=1) + 1
        start = batch.dec_tokens.shape[1]
        empty = ~jnp.any(batch.dec_segments != 0, axis=1)
        tokens = greedy(bridge, params, cache, logits, position, start, max_new_tokens, eos, empty)

        def likelihood(option):
            return log_likelihood(bridge, params, cache, logits, position, start, *option)

        return replicated((tokens, jax.lax.map(likelihood, (options, options_mask))))

    return jax.jit(score)


def prefill(
    bridge: Bridge, params: Params, batch: Batch, slots: int, bare: bool
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads the prompts: their cache with `slots` free ones behind, and each row's next logits."""
    inputs = bridge.embed(params, batch.dec_tokens) if bare else bridge.inputs(params, batch)
    rows, length, _ = inputs.shape
    cache = init_cache(bridge.decoder.config, rows, length + slots, bridge.decoder.dtype)
    hidden, cache = bridge.decode(
        params, inputs, batch.dec_positions, batch.dec_segments, cache, 0
    )
    # Positions are 0 at padding, so the last real slot is the one with the largest.
    last = jnp.argmax(batch.dec_positions, axis=1)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return cache, bridge.logits(params, final)


def greedy(
    bridge: Bridge, params: Params, cache: Cache, logits: Float[Array, "B V"],
    position: Int[Array, "B"], start: int, max_new_tokens: int, eos: int, done: Bool[Array, "B"],
) -> Int[Array, "B T"]:
    """The most likely next token, again and again, until every row has ended.

    Args:
      cache, logits: from `prefill`.
      position: of the first new token in each row. start: its slot in the cache.
      done: rows that need no answer.
    """
    rows = position.shape[0]
    tokens = jnp.full((rows, max_new_tokens), eos, jnp.int32)
    if not max_new_tokens:
        return tokens
    ones = jnp.ones((rows, 1), jnp.int32)

    def unfinished(state):
        step, _, done, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def extend(state):
        step, tokens, done, cache, logits = state
        chosen = jnp.where(done, eos, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = tokens.at[:, step].set(chosen)
        hidden, cache = bridge.decode(
            params, bridge.embed(params, chosen[:, None]), (position + step)[:, None], ones,
            cache, start + step,
        )
        logits = bridge.logits(params, hidden[:, 0])
        return step + 1, tokens, done | (chosen == eos), cache, logits

    state = (0, tokens, done, cache, logits)
    return jax.lax.while_loop(unfinished, extend, state)[1]


def log_likelihood(
    bridge: Bridge, params: Params, cache: Cache, logits: Float[Array, "B V"],
    position: Int[Array, "B"], start: int, option: Int[Array, "B T"], mask: Bool[Array, "B T"],
) -> Float[Array, "B"]:
    """Summed log-probability of each row's `option` after its prompt.

    Options of one token cost nothing more: the prompt's last logits foretell them.
    """
    before, read = logits[:, None], option[:, :-1]
    if read.shape[1]:
        positions = position[:, None] + jnp.arange(read.shape[1])
        hidden, _ = bridge.decode(params, bridge.embed(params, read), positions,
                                  mask[:, :-1].astype(jnp.int32), cache, start)
        before = jnp.concatenate([before, bridge.logits(params, hidden)], axis=1)
    log_probs = jax.nn.log_softmax(before, axis=-1)
    taken = jnp.take_along_axis(log_probs, option[:, :, None], axis=-1)[:, :, 0]
    return jnp.sum(jnp.where(mask, taken, 0.0), axis=1)
