"""One causal LM; a family is a set of values of its config (Llama 2: arXiv:2307.09288)."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.nn.layers import Einsum, Embedding, RMSNorm, dot_product_attention, fan_in_normal
from jaxfusion.sharding.rules import constrain

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Llama3Scaling:
    """RoPE frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class LinearScaling:
    """RoPE positions divided by a factor (`rope_type: linear`)."""

    factor: float


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and features of a causal LM."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | LinearScaling | None = None
    tie_embeddings: bool = False


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far.

    Attributes:
      k, v: [L B C K H], C slots.
      positions: [B C], of each slot's token among the real tokens of its row.
      segments: [B C]; 0 marks an empty or padding slot.
    """

    k: Float[Array, "L B C K H"]
    v: Float[Array, "L B C K H"]
    positions: Int[Array, "B C"]
    segments: Int[Array, "B C"]


jax.tree_util.register_dataclass(
    Cache, data_fields=["k", "v", "positions", "segments"], meta_fields=[]
)


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of `slots` tokens for each of `batch` rows."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty)


def rope_frequencies(config: DecoderConfig) -> Float[Array, "F"]:
    """Angular frequency of each pair of head dimensions, in radians per position."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    # Long waves are slowed by `factor`, short ones kept, those between interpolated.
    waves = scaling.original_length * frequencies / (2 * math.pi)  # turns in the original length
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((waves - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rotate(
    x: Float[Array, "B N K H"], positions: Int[Array, "B N"], frequencies: Float[Array, "F"]
) -> Float[Array, "B N K H"]:
    """Rotary position embedding (RoFormer, arXiv:2104.09864, eq. 34), halves paired as HF does."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def causal_mask(q_positions, q_segments, k_positions, k_segments) -> Bool[Array, "B N C"]:
    """Who may look at whom: earlier or same position of the same segment; segment 0 is padding.

    It knows nothing of slots, so padding may lie anywhere.
    """
    same = q_segments[:, :, None] == k_segments[:, None, :]
    before = q_positions[:, :, None] >= k_positions[:, None, :]
    return same & before & (k_segments != 0)[:, None, :]


class SelfAttention(nn.Module):
    """Grouped-query causal attention with rotary positions (GQA: arXiv:2305.13245)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, positions, mask, kv, start):
        c = self.config
        into = partial(Einsum, "bnd,dkh->bnkh", init=fan_in_normal(c.d_model), dtype=self.dtype)
        into_q = partial(into, (c.d_model, c.num_heads, c.head_dim),
                         ("embed", "heads", "head_dim"))
        into_kv = partial(into, (c.d_model, c.num_kv_heads, c.head_dim),
                          ("embed", "kv_heads", "head_dim"))
        frequencies = rope_frequencies(c)
        q = rotate(into_q(name="q")(x), positions, frequencies)
        k = rotate(into_kv(name="k")(x), positions, frequencies)
        v = into_kv(name="v")(x)
        if kv is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            k = write(kv[0], k.astype(kv[0].dtype), start, axis=1)
            v = write(kv[1], v.astype(kv[1].dtype), start, axis=1)
        mixed = dot_product_attention(q, k, v, mask, scale=c.head_dim**-0.5)
        out = Einsum(
            "bnkh,khd->bnd", (c.num_heads, c.head_dim, c.d_model), ("heads", "head_dim", "embed"),
            fan_in_normal(c.num_heads * c.head_dim), self.dtype, name="o",
        )(mixed)
        return out, None if kv is None else (k, v)


class FeedForward(nn.Module):
    """SwiGLU, `silu(x W_gate) * (x W_up)`, then down (Shazeer, arXiv:2002.05202)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c = self.config
        into = partial(
            Einsum, "bnd,df->bnf", (c.d_model, c.d_ff), ("embed", "mlp"),
            fan_in_normal(c.d_model), self.dtype,
        )
        hidden = jax.nn.silu(into(name="gate")(x)) * into(name="up")(x)
        return Einsum(
            "bnf,fd->bnd", (c.d_ff, c.d_model), ("mlp", "embed"),
            fan_in_normal(c.d_ff), self.dtype, name="down",
        )(hidden)


class Block(nn.Module):
    """One pre-norm block, in the form `nn.scan` wants: x is carried, its cache scanned over."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, kv, positions, mask, start):
        c = self.config
        h = RMSNorm(c.norm_eps, self.dtype, name="attn_norm")(x)
        h, kv = SelfAttention(c, self.dtype, name="attn")(h, positions, mask, kv, start)
        x = x + h
        h = RMSNorm(c.norm_eps, self.dtype, name="mlp_norm")(x)
        x = x + FeedForward(c, self.dtype, name="mlp")(h)
        return constrain(x, "batch", "length", None), kv


class Decoder(nn.Module):
    """A causal LM in three steps, so that callers may put anything between them.

    `embed(tokens)`, then the module itself on embeddings, then `logits(hidden)` at the positions
    that are wanted.

    Attributes:
      config: shape and features.
      dtype: of parameters and activations; norms, softmax and logits run in float32.
      remat: what the backward pass recomputes: `none`, or a name in `REMAT_POLICIES`.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        # Random heads give logits that spread over several units, so that argmax has no ties.
        head_init = fan_in_normal(c.d_model, gain=3.0)
        embed_init = head_init if c.tie_embeddings else nn.initializers.normal(1.0)
        self.embedder = Embedding(c.vocab_size, c.d_model, embed_init, self.dtype, name="embed")
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        self.blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, name="blocks")
        self.final_norm = RMSNorm(c.norm_eps, self.dtype, name="final_norm")
        if not c.tie_embeddings:
            self.head = Embedding(c.vocab_size, c.d_model, head_init, self.dtype, name="head")

    def embed(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N E"]:
        """Embeddings of token ids."""
        return self.embedder(tokens)

    def __call__(
        self,
        embeddings: Float[Array, "B N E"],
        positions: Int[Array, "B N"],
        segments: Int[Array, "B N"],
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B N E"], Cache | None]:
        """Hidden states after the final norm.

        Args:
          embeddings: one vector per slot.
          positions: of each slot among its row's real tokens; anything at padding.
          segments: 0 at padding; tokens see only their own segment.
          cache: what came before; the new tokens are written from slot `start` on.
          start: first slot of the new tokens in the cache, the same for every row.

        Returns:
          Hidden states, and the cache with the new tokens in it (None if none was given).
        """
        k_positions, k_segments, kv = positions, segments, None
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            k_positions = write(cache.positions, positions)
            k_segments = write(cache.segments, segments)
            kv = (cache.k, cache.v)
        mask = causal_mask(positions, segments, k_positions, k_segments)
        x = constrain(embeddings.astype(self.dtype), "batch", "length", None)
        x, kv = self.blocks(x, kv, positions, mask, start)
        new_cache = None if cache is None else Cache(*kv, k_positions, k_segments)
        return self.final_norm(x), new_cache

    def logits(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Next-token logits in float32."""
        table = self.embedder if self.config.tie_embeddings else self.head
        return table.attend(hidden)

    def score(self, tokens, positions, segments) -> Float[Array, "B N V"]:
        """Next-token logits at every slot of plain text; also what `init` traces."""
        hidden, _ = self(self.embed(tokens), positions, segments)
        return self.logits(hidden)
