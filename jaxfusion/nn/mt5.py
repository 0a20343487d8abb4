"""The mT5 and umT5 encoder (Xue et al., 2021, arXiv:2010.11934; Chung et al., 2023, 2304.09151).

State numbering is Hugging Face's: `h_0` the embedding output, `h_1 … h_{L-1}` the residual stream
after each block, `h_L` after the final norm.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxfusion.nn.attention import FUSED, Pattern, plain_attention, usable
from jaxfusion.nn.layers import (
    Embedding,
    Linear,
    RMSNorm,
    fan_in_normal,
    named,
    rematerialised,
)
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class MT5Config:
    """Shape of an mT5 or umT5 encoder."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    # umT5: every block has its own relative position bias; mT5: all share the first block's.
    bias_per_layer: bool = False


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "S S"]:
    """Bucket of every (query, key) distance, both directions (T5, arXiv:1910.10683, section 2.1).

    Half of the buckets are for keys after the query; of each half, half are exact distances and
    the others grow logarithmically up to `max_distance`, where the last one takes the rest.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact)
    log_scale = np.float32(math.log(max_distance / exact))
    logarithmic = exact + (np.log(far) / log_scale * np.float32(half - exact)).astype(np.int32)
    near = np.abs(distance) < exact
    bucket = np.where(near, np.abs(distance), np.minimum(logarithmic, half - 1))
    return bucket + np.where(distance > 0, half, 0)


class RelativeBias(nn.Module):
    """The learned attention bias of every head by relative position bucket."""

    config: MT5Config

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "N S S"]:
        c = self.config
        init = named(nn.initializers.normal(1.0), "buckets", "heads")
        table = self.param("embedding", init, (c.num_buckets, c.num_heads), jnp.float32)
        buckets = relative_buckets(length, c.num_buckets, c.max_distance)
        return jnp.take(table.astype(jnp.float32), buckets, axis=0).transpose(2, 0, 1)


class SelfAttention(nn.Module):
    """Bidirectional attention without 1/sqrt(H): T5 folds the scale into its initialisation."""

    config: MT5Config
    dtype: jnp.dtype
    dropout: float
    attention: str

    @nn.compact
    def __call__(self, x, mask, segments, bias, deterministic):
        c = self.config
        shape, names = (c.d_model, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        into = partial(Linear, shape, names, dtype=self.dtype)
        q = into(init=fan_in_normal(c.d_model * c.head_dim), name="q")(x)
        k = into(init=fan_in_normal(c.d_model), name="k")(x)
        v = into(init=fan_in_normal(c.d_model), name="v")(x)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        if mask is not None:
            mixed = plain_attention(q, k, v, mask, scale=1.0, bias=bias, dropout=drop)
        else:
            mixed = FUSED[self.attention](q, k, v, segments, Pattern(False, 1.0), bias)
        return Linear(
            shape[1:] + shape[:1], names[1:] + names[:1],
            fan_in_normal(c.num_heads * c.head_dim), self.dtype, inputs=2, name="o",
        )(mixed)


class FeedForward(nn.Module):
    """Gated GELU, `gelu_tanh(x W_gate) * (x W_up)`, then down."""

    config: MT5Config
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x, deterministic):
        c = self.config
        into = partial(
            Linear, (c.d_model, c.d_ff), ("embed", "mlp"),
            fan_in_normal(c.d_model), self.dtype,
        )
        hidden = jax.nn.gelu(into(name="gate")(x), approximate=True) * into(name="up")(x)
        hidden = constrain(hidden, "batch", "length", "mlp")
        hidden = nn.Dropout(self.dropout, deterministic=deterministic)(hidden)
        return Linear(
            (c.d_ff, c.d_model), ("mlp", "embed"),
            fan_in_normal(c.d_ff), self.dtype, name="down",
        )(hidden)


class Block(nn.Module):
    """One pre-norm block, in the form `nn.scan` wants.

    Carries `(x, mixed)`; scanned over is this block's weight in the mix. Emits the raw residual
    stream if `emit == 'states'`, its inner product with `probe` if `emit == 'dots'`.
    """

    config: MT5Config
    dtype: jnp.dtype
    dropout: float
    deterministic: bool
    emit: str
    attention: str

    @nn.compact
    def __call__(self, carry, weight, mask, segments, bias, probe):
        x, mixed = carry
        c, common = self.config, (self.dtype, self.dropout)
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        if c.bias_per_layer:
            bias = RelativeBias(c, name="relative_bias")(x.shape[1])
        h = RMSNorm(c.norm_eps, self.dtype, name="attn_norm")(x)
        attend = SelfAttention(c, *common, self.attention, name="attn")
        h = attend(h, mask, segments, bias, self.deterministic)
        x = x + drop(h)
        h = RMSNorm(c.norm_eps, self.dtype, name="mlp_norm")(x)
        x = x + drop(FeedForward(c, *common, name="mlp")(h, self.deterministic))
        x = constrain(x, "batch", "length", None)
        if mixed is not None:
            mixed = mixed + weight * x.astype(jnp.float32)
        emitted = {"states": lambda: x, "dots": lambda: inner(probe, x), "": lambda: None}
        return (x, mixed), emitted[self.emit]()


def inner(a: Array, b: Array) -> Float[Array, ""]:
    """The inner product of two arrays of one shape, in float32."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


class MT5Encoder(nn.Module):
    """mT5's encoder, with three ways to read its layers without holding more than they need.

    Attributes:
      config: the shape.
      dtype: of parameters and activations; norms, softmax and mixes run in float32.
      dropout: the rate where mT5 has dropout (papers' runs left it on by accident: 0.1).
      remat: what the backward pass recomputes: `none`, or a name in `REMAT_POLICIES`.
      attention: a name in `KERNELS`; with dropout it is always plain.
    """

    config: MT5Config
    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0
    remat: str = "none"
    attention: str = "plain"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        *,
        mix: Float[Array, "L"] | None = None,
        probe: Float[Array, "B S D"] | None = None,
        states: bool = False,
        deterministic: bool = True,
    ):
        """Encodes; the tokens of a segment must be contiguous; padding may be anywhere.

        Args:
          tokens: ids.
          segments: 0 (or False) at padding; tokens see only their own segment.
          mix: layer weights; the weighted sum is carried along, no stack of states is held.
          probe: returns the inner product of every state with this array, again without a stack.
          states: returns all of h_1 … h_L.
          deterministic: False applies dropout with the rng named 'dropout'.

        Returns:
          `h_L` [B S D]; with `mix` the float32 sum `Σ_l mix_l h_l` [B S D]; with `probe` the
          products `⟨probe, h_l⟩` [L]; with `states` the stack [L B S D].
        """
        c = self.config
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        embed = Embedding(c.vocab_size, c.d_model, nn.initializers.normal(1.0), self.dtype,
                          name="embed")
        x = constrain(drop(embed(tokens)), "batch", "length", None)
        bias = None if c.bias_per_layer else RelativeBias(c, name="relative_bias")(x.shape[1])
        kernel = "plain" if self.dropout and not deterministic else usable(
            self.attention, *tokens.shape, c.head_dim, self.dtype)
        mask = None if kernel != "plain" else (
            segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]

        emit = "states" if states else "dots" if probe is not None else ""
        blocks = nn.scan(
            rematerialised(Block, self.remat), variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.num_layers, in_axes=(0, *[nn.broadcast] * 4),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.dropout, deterministic, emit, self.attention, name="blocks")
        # The last block's raw output is not a state: h_L is read after the final norm, below.
        raw = jnp.zeros(c.num_layers) if mix is None else mix.at[-1].set(0.0)
        mixed = None if mix is None else jnp.zeros(x.shape, jnp.float32)
        (x, mixed), emitted = blocks((x, mixed), raw, mask, segments, bias, probe)
        last = drop(RMSNorm(c.norm_eps, self.dtype, name="final_norm")(x))
        if states:
            return emitted.at[-1].set(last)
        if probe is not None:
            return emitted.at[-1].set(inner(probe, last))
        return last if mix is None else mixed + mix[-1] * last.astype(jnp.float32)
