"""Language models with a single tower, for pretraining miniatures."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxfusion.nn.decoder import Decoder
from jaxfusion.nn.encoder import Encoder


@dataclass(frozen=True)
class TextBatch:
    """One batch of texts and targets.

    Attributes:
      tokens: [B S] input ids.
      segments: [B S] 0 at padding.
      targets: [B S] id to predict at each slot: the next token, or the original one.
      weights: [B S] of each prediction in the loss; 0 at padding.
    """

    tokens: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    weights: Float[Array, "B S"]


jax.tree_util.register_dataclass(
    TextBatch, data_fields=["tokens", "segments", "targets", "weights"], meta_fields=[]
)


@dataclass(frozen=True)
class TextLM:
    """An encoder that restores tokens, or a decoder that predicts the next ones.

    The encoder's head is its own embedding table and not part of the checkpoint, since mT5 encoders
    do not have one. The table starts at a tenth of T5's standard deviation: from T5's, Adam would
    need hundreds of steps more.
    """

    role: str
    tower: Encoder | Decoder
    noise: float = 0.0  # on the decoder's embeddings in training, relative to their rms

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh parameters `{role: …}`, boxed with their logical axis names."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        args = (tokens, tokens) if self.role == "encoder" else (tokens, tokens, tokens)
        method = None if self.role == "encoder" else "score"
        params = self.tower.init(key, *args, method=method)["params"]
        if self.role == "encoder":
            params["embed"] = jax.tree.map(lambda x: 0.1 * x, params["embed"])
        return {self.role: params}

    def logits(
        self, params: dict[str, Any], batch: TextBatch, key: Array | None = None
    ) -> Float[Array, "B S V"]:
        """Logits of the token at each slot, or of the one after it.

        Args:
          key: of the noise; None (evaluation): no noise.
        """
        params = params[self.role]
        if self.role == "decoder":
            positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
            run = partial(self.tower.apply, {"params": params})
            x = run(batch.tokens, method="embed")
            if key is not None and self.noise:
                x = x + self.noise * jnp.sqrt(jnp.mean(x**2)) * _noise(key, x.shape)
            return run(run(x, positions, batch.segments)[0], method="logits")
        states = self.tower.apply({"params": params}, batch.tokens, batch.segments)
        return jnp.einsum("bsd,vd->bsv", states, params["embed"]["embedding"],
                          preferred_element_type=jnp.float32)

    def loss(self, params: dict[str, Any], batch: TextBatch, key: Array | None = None):
        """Weighted mean cross-entropy of the targets, and the sum of the weights."""
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self.logits(params, batch, key), batch.targets)
        weight = jnp.sum(batch.weights)
        return jnp.sum(batch.weights * losses) / jnp.maximum(weight, 1e-9), weight

    def hits(self, params: dict[str, Any], batch: TextBatch, least: float):
        """How many slots with a weight of at least `least` have the target as most likely token,
        and how many such slots there are."""
        right = jnp.argmax(self.logits(params, batch), axis=-1) == batch.targets
        counted = batch.weights >= least
        return jnp.sum(counted & right), jnp.sum(counted)


def _noise(key: Array, shape: tuple[int, int, int]) -> Float[Array, "B S D"]:
    """Unit noise for each token (NEFTune, arXiv:2310.05914), plus the same amount for each text.

    A bridge's output deviates from the embeddings in both ways: token by token, and by the offset
    between the encoder's languages. Large LLMs tolerate that; a miniature has to learn it.
    """
    token, text = jax.random.split(key)
    return jax.random.normal(token, shape) + jax.random.normal(text, (shape[0], 1, shape[2]))
