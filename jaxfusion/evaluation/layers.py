"""Which encoder layers a fusion takes."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jaxfusion.data.batching import doubling_buckets, find_shapes, in_order, tokenize
from jaxfusion.data.sources import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.fields import EvalConfig
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.sharding.rules import replicated

ROWS = 100  # of each language are looked at


def layer_weigher(
    bridge: Bridge, tokenizers: Tokenizers, config: EvalConfig
) -> Callable[[Params, Sequence[Example]], list[float]] | None:
    """`(params, examples) -> mean weight of each layer 1 … L`, over all real tokens.

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
    """`tokens` of an example's query, and their `weights`: of each token those of layers 1 … L.

    None for a fusion without weights.
    """
    if bridge.fusion_module is None:
        return None
    (_, batch), = _batches(bridge, tokenizers, config, [example], 1)
    weights = np.asarray(_fuser(bridge)(params, batch), float)
    ids = batch.enc_tokens[batch.enc_segments != 0]
    if weights.ndim == 1:  # the same for all
        weights = np.broadcast_to(weights[:, None, None], (len(weights), 1, len(ids)))
    return {"tokens": tokenizers.encoder.convert_ids_to_tokens(ids.tolist()),
            "weights": weights[:, 0, : len(ids)].T.round(4).tolist()}


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
    shapes = find_shapes(rows, doubling_buckets(config.max_encoder_tokens))
    return in_order(rows, shapes, tokenizers, batch_size)
