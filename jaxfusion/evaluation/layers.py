"""Analysis of encoder layers: fusion weights, mean states, translation retrieval."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxfusion.data.batching import find_shapes, in_order, length_buckets, tokenize
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.fields import EvalConfig
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.sharding.rules import replicated

ROWS = 100  # examples per language


def layer_weigher(
    bridge: Bridge, tokenizers: Tokenizers, config: EvalConfig
) -> Callable[[Params, Sequence[Example]], list[float]] | None:
    """The function `(params, examples) -> mean weight of each layer 1 … L` over all real tokens.

    None for a fusion without weights (`last`, `layer`).
    """
    if bridge.fusion_module is None:
        return None
    fuse = _fuser(bridge)

    def weigh(params: Params, examples: Sequence[Example]) -> list[float]:
        total, tokens = 0.0, 0
        for _, batch in _batches(bridge, tokenizers, config, examples[:ROWS], config.batch_size):
            weights, real = np.asarray(fuse(params, batch)), batch.enc_segments != 0
            if weights.ndim == 1:
                return weights.tolist()
            total = total + weights[:, real].sum(axis=1)
            tokens += real.sum()
        return (total / tokens).tolist()

    return weigh


def token_weights(
    bridge: Bridge, tokenizers: Tokenizers, config: EvalConfig, params: Params, example: Example
) -> dict[str, Any] | None:
    """The `tokens` of an example's query, and the `weights` of layers 1 … L for each token.

    None for a fusion without weights.
    """
    if bridge.fusion_module is None:
        return None
    (_, batch), = _batches(bridge, tokenizers, config, [example], 1)
    return row_weights(bridge, tokenizers, params, batch)


def row_weights(
    bridge: Bridge, tokenizers: Tokenizers, params: Params, batch: Batch
) -> dict[str, Any]:
    """`token_weights` of the example in a batch of one row; the fusion has weights."""
    weights = np.asarray(_fuser(bridge)(params, batch), float)
    ids = batch.enc_tokens[batch.enc_segments != 0]
    if weights.ndim == 1:  # the same for all tokens
        weights = np.broadcast_to(weights[:, None, None], (len(weights), 1, len(ids)))
    return {"tokens": tokenizers.encoder.convert_ids_to_tokens(ids.tolist()),
            "weights": weights[:, 0, : len(ids)].T.round(4).tolist()}


def mean_states(
    bridge: Bridge, tokenizers: Tokenizers, config: EvalConfig, params: Params,
    examples: Sequence[Example],
) -> Float[np.ndarray, "L N D"]:
    """The mean state over each query's real tokens, for each layer 1 … L."""
    read, by_example = _reader(bridge), {}
    for numbers, batch in _batches(bridge, tokenizers, config, examples, config.batch_size):
        means = np.asarray(read(params, batch))
        by_example |= {int(number): means[:, i] for i, number in enumerate(numbers)}
    return np.stack([by_example[i] for i in range(len(examples))], axis=1)


def retrieval_accuracy(
    states: Float[np.ndarray, "L N D"], central: Float[np.ndarray, "L N D"],
    centred: bool = False,
) -> list[float]:
    """The share of sentences whose nearest sentence in the central language is their translation.

    One value per layer; nearest by cosine, among all N sentences of the central language.

    Args:
      states, central: of the same sentences in the same order.
      centred: whether each language's mean over its sentences is subtracted first.
    """
    pair = [x - x.mean(axis=1, keepdims=True) if centred else x for x in (states, central)]
    ours, theirs = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in pair)
    nearest = np.einsum("lnd,lmd->lnm", ours, theirs).argmax(axis=-1)
    return (nearest == np.arange(states.shape[1])).mean(axis=1).tolist()


@lru_cache(4)
def _reader(bridge: Bridge) -> Callable[[Params, Batch], jax.Array]:
    """The jitted mean states of a batch. [L B D]"""
    def read(params: Params, batch: Batch) -> Float[Array, "L B D"]:
        states = bridge.encoder.apply({"params": params["encoder"]}, batch.enc_tokens,
                                      batch.enc_segments, states=True)
        real = (batch.enc_segments != 0).astype(jnp.float32)
        sums = jnp.einsum("lbsd,bs->lbd", states, real, preferred_element_type=jnp.float32)
        return replicated(sums / jnp.maximum(real.sum(axis=1), 1)[:, None])

    return jax.jit(read)


@lru_cache(4)
def _fuser(bridge: Bridge) -> Callable[[Params, Batch], jax.Array]:
    """The jitted layer weights of a batch."""
    return jax.jit(lambda params, batch: replicated(bridge.fuse(params, batch)[1]))


def _batches(
    bridge: Bridge, tokenizers: Tokenizers, config: EvalConfig, examples: Sequence[Example],
    batch_size: int,
) -> Iterator[tuple[np.ndarray, Batch]]:
    rows, _ = tokenize(
        examples, tokenizers, text_prompt="", with_target=False,
        max_encoder_tokens=config.max_encoder_tokens,
        max_decoder_tokens=config.max_decoder_tokens, latents=bridge.latents,
    )
    shapes = find_shapes(rows, length_buckets(config.max_encoder_tokens))
    return in_order(rows, shapes, tokenizers, batch_size)
