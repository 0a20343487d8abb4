"""Which encoder layers a fusion takes."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxfusion.data.batching import doubling_buckets, find_shapes, in_order, tokenize
from jaxfusion.data.sources import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.fields import EvalConfig
from jaxfusion.nn.bridge import Bridge, Params
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
    fuse = jax.jit(lambda params, batch: replicated(bridge.fuse(params, batch)[1]))

    def weigh(params: Params, examples: Sequence[Example]) -> list[float]:
        rows, _ = tokenize(
            examples[:ROWS], tokenizers, text_prompt="", with_target=False,
            max_encoder_tokens=config.max_encoder_tokens,
            max_decoder_tokens=config.max_decoder_tokens,
        )
        shapes = find_shapes(rows, doubling_buckets(config.max_encoder_tokens))
        total, tokens = 0.0, 0
        for _, batch in in_order(rows, shapes, tokenizers, config.batch_size):
            weights, real = np.asarray(fuse(params, batch)), batch.enc_segments != 0
            if weights.ndim == 1:
                return weights.tolist()
            total = total + weights[:, real].sum(axis=1)
            tokens += real.sum()
        return (total / tokens).tolist()

    return weigh
