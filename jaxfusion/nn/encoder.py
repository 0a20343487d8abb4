"""One encoder; a family is a set of values of its config.

Families: T5 v1.1, mT5 and umT5 (arXiv:1910.10683, 2010.11934, 2304.09151), BERT and XLM-R
(1810.04805, 1911.02116), M2M100 and NLLB (2010.11125, 2207.04672), ModernBERT (2412.13663).

State numbering is Hugging Face's: `h_0` the embedding output, `h_1 … h_{L-1}` the residual stream
after each block, `h_L` after the final norm, if the family has one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.nn.attention import (
    FUSED,
    LayerWindows,
    Pattern,
    plain_attention,
    segment_mask,
    usable,
)
from jaxfusion.nn.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    fan_in_normal,
    named,
    rematerialised,
)
from jaxfusion.nn.positions import RelativeBias, sinusoids, token_positions
from jaxfusion.nn.rope import Rope, rope_tables, rotate
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class EncoderConfig(LayerWindows):
    """Shape and features of an encoder. The defaults are mT5's.

    Attributes:
      family: `model_type` of its `config.json`, which decides how tensors are named.
      positions: `relative` (a bias by T5's buckets), `learned`, `sinusoidal` or `rotary`.
      num_buckets, max_distance: of relative positions.
      bias_per_layer: every block has its own relative bias (umT5); else all share the first one.
      max_length: tokens that a table of learned positions holds; None: no limit.
      first_position: the number of the first token (XLM-R, M2M100: id of padding + 1).
      counts_padding: positions count the padding in front of a text too (BERT).
      token_types: rows of the table of token types, of which the first is added; 0: no table.
      rope: of all layers, or of those without a window where `local_rope` is given.
      windows: each layer's window: a token sees those fewer than this many positions away, on both
        sides; None is all. Empty: no layer has one.
      local_rope: of the layers with a window.
      norm: `rms` or `layer`.
      bias: linear maps and norms have biases.
      post_norm: a norm follows every residual sum (BERT), in place of one before every sublayer.
      embed_norm, final_norm: the embeddings, and the last block's output, are normalised.
      first_norm: False: the first block's attention reads the embeddings as they are (ModernBERT).
      activation: a name in `ACTIVATIONS`. gated: `act(x W_gate) * (x W_up)` in place of
        `act(x W_up)`.
      attn_scale: factor of the attention scores; None is head_dim**-0.5. T5 folds it into its
        weights.
      embed_scale: factor of token embeddings (M2M100: sqrt(d_model)).
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    bias_per_layer: bool = False
    family: str = "mt5"
    positions: str = "relative"
    max_length: int | None = None
    first_position: int = 0
    counts_padding: bool = False
    token_types: int = 0
    rope: Rope = field(default_factory=Rope)
    windows: tuple[int | None, ...] = ()
    local_rope: Rope | None = None
    norm: str = "rms"
    bias: bool = False
    post_norm: bool = False
    embed_norm: bool = False
    final_norm: bool = True
    first_norm: bool = True
    activation: str = "gelu_tanh"
    gated: bool = True
    attn_scale: float | None = 1.0
    embed_scale: float = 1.0

    @property
    def scale(self) -> float:
        """The factor of the attention scores."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def bias_init(self) -> Callable | None:
        """The initialiser of biases; None: no biases."""
        return nn.initializers.normal(0.1) if self.bias else None

    def make_norm(self, dtype: jnp.dtype, name: str) -> nn.Module:
        """A norm of this family."""
        if self.norm == "rms":
            return RMSNorm(self.norm_eps, dtype, name=name)
        return LayerNorm(self.norm_eps, dtype, self.bias, name=name)

    def make_relative_bias(self) -> RelativeBias:
        """T5's bias of the scores."""
        return RelativeBias(self.num_buckets, self.max_distance, self.num_heads,
                            name="relative_bias")


class Context(NamedTuple):
    """What every block reads besides the stream, the same for all of them.

    Attributes:
      segments: of the slots. masks: of every kind of block; None where a kernel reads the segments.
      bias: the relative bias that all blocks share. rotary: tables of every kind of block.
      probe: every block returns the inner product of its output with it.
    """

    segments: Int[Array, "B S"]
    masks: Bool[Array, "k B S S"] | None
    bias: Float[Array, "N S S"] | None
    rotary: tuple[Array, Array] | None
    probe: Float[Array, "B S D"] | None


class SelfAttention(nn.Module):
    """Bidirectional attention."""

    config: EncoderConfig
    dtype: jnp.dtype
    dropout: float
    attention: str

    @nn.compact
    def __call__(self, x, kind, context: Context, bias, deterministic):
        c = self.config
        shape, names = (c.d_model, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        into = partial(Linear, shape, names, dtype=self.dtype, bias_init=c.bias_init)
        # As T5 starts its queries, with the scale of the scores in their weights.
        q = into(init=fan_in_normal(c.d_model * c.head_dim * c.scale**2), name="q")(x)
        k = into(init=fan_in_normal(c.d_model), name="k")(x)
        v = into(init=fan_in_normal(c.d_model), name="v")(x)
        if context.rotary is not None:
            rotary = tuple(tables[kind] for tables in context.rotary)
            q, k = rotate(q, rotary), rotate(k, rotary)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        if context.masks is not None:
            mixed = plain_attention(q, k, v, context.masks[kind], scale=c.scale, bias=bias,
                                    dropout=drop)
        else:
            every = [partial(FUSED[self.attention], pattern=Pattern(False, c.scale, window))
                     for window in c.kinds]
            mixed = every[0](q, k, v, context.segments, bias=bias) if len(every) == 1 else (
                jax.lax.switch(kind, every, q, k, v, context.segments))
        return Linear(
            shape[1:] + shape[:1], names[1:] + names[:1], fan_in_normal(c.num_heads * c.head_dim),
            self.dtype, c.bias_init, inputs=2, name="o",
        )(mixed)


class FeedForward(nn.Module):
    """`act(x W_gate) * (x W_up)` (arXiv:2002.05202) or `act(x W_up)`, then down."""

    config: EncoderConfig
    dtype: jnp.dtype
    dropout: float

    @nn.compact
    def __call__(self, x, deterministic):
        c, act = self.config, ACTIVATIONS[self.config.activation]
        into = partial(
            Linear, (c.d_model, c.d_ff), ("embed", "mlp"), fan_in_normal(c.d_model), self.dtype,
            c.bias_init,
        )
        up = into(name="up")(x)
        hidden = act(into(name="gate")(x)) * up if c.gated else act(up)
        hidden = constrain(hidden, "batch", "length", "mlp")
        hidden = nn.Dropout(self.dropout, deterministic=deterministic)(hidden)
        return Linear(
            (c.d_ff, c.d_model), ("mlp", "embed"), fan_in_normal(c.d_ff), self.dtype,
            c.bias_init, name="down",
        )(hidden)


class Block(nn.Module):
    """One block, in the form `nn.scan` wants.

    Carries `(x, mixed)`; scanned over are the block's weight in the mix, the kind of its window and
    its number. Emits the residual stream if `emit == 'states'`, its inner product with
    `context.probe` if `emit == 'dots'`.
    """

    config: EncoderConfig
    dtype: jnp.dtype
    dropout: float
    deterministic: bool
    emit: str
    attention: str

    @nn.compact
    def __call__(self, carry, weight, kind, number, context: Context):
        x, mixed = carry
        c, common = self.config, (self.dtype, self.dropout)
        if len(c.kinds) == 1:
            kind = 0  # known when compiled: nothing is copied
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        norm = partial(c.make_norm, self.dtype)
        bias = c.make_relative_bias()(x.shape[1]) if (
            c.bias_per_layer) else context.bias
        attend = SelfAttention(c, *common, self.attention, name="attn")
        feed = FeedForward(c, *common, name="mlp")
        if c.post_norm:
            x = norm("attn_norm")(x + drop(attend(x, kind, context, bias, self.deterministic)))
            x = norm("mlp_norm")(x + drop(feed(x, self.deterministic)))
        else:
            h = norm("attn_norm")(x)
            h = h if c.first_norm else jnp.where(number == 0, x, h)
            x = x + drop(attend(h, kind, context, bias, self.deterministic))
            x = x + drop(feed(norm("mlp_norm")(x), self.deterministic))
        x = constrain(x, "batch", "length", None)
        if mixed is not None:
            mixed = mixed + weight * x.astype(jnp.float32)
        emitted = {"states": lambda: x, "dots": lambda: inner(context.probe, x), "": lambda: None}
        return (x, mixed), emitted[self.emit]()


def inner(a: Array, b: Array) -> Float[Array, ""]:
    """The inner product of two arrays of one shape, in float32."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


class Encoder(nn.Module):
    """An encoder, with three ways to read its layers without holding more than they need.

    Attributes:
      config: shape and features.
      dtype: of parameters and activations; norms, softmax and mixes run in float32.
      dropout: the rate where T5 has dropout, in every family: of the embeddings, attention weights,
        sublayers, the feed-forward's hidden units and the final norm (papers' runs left it on by
        accident: 0.1).
      remat: what the backward pass recomputes: `none`, or a name in `REMAT_POLICIES`.
      attention: a name in `KERNELS`; with dropout it is always plain.
    """

    config: EncoderConfig
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
        embeddings: bool = False,
        deterministic: bool = True,
    ):
        """Encodes; the tokens of a segment must be contiguous; padding may be anywhere.

        Args:
          tokens: ids.
          segments: 0 (or False) at padding; tokens see only their own segment.
          mix: layer weights; the weighted sum is carried along, no stack of states is held.
          probe: returns the inner product of every state with this array, again without a stack.
          states: returns all of h_1 … h_L. embeddings: with h_0 before them.
          deterministic: False applies dropout with the rng named 'dropout'.

        Returns:
          `h_L` [B S D]; with `mix` the float32 sum `Σ_l mix_l h_l` [B S D]; with `probe` the
          products `⟨probe, h_l⟩` [L]; with `states` the stack [L B S D], with `embeddings` too
          [L+1 B S D].
        """
        c = self.config
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        positions = token_positions(segments, c.counts_padding)
        first = x = constrain(drop(self._embed(tokens, positions)), "batch", "length", None)
        emit = "states" if states else "dots" if probe is not None else ""
        blocks = nn.scan(
            rematerialised(Block, self.remat), variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.num_layers, in_axes=(0, 0, 0, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.dropout, deterministic, emit, self.attention, name="blocks")
        # The last block's raw output is not a state: h_L is read after the final norm, below.
        raw = jnp.zeros(c.num_layers) if mix is None else mix.at[-1].set(0.0)
        mixed = None if mix is None else jnp.zeros(x.shape, jnp.float32)
        (x, mixed), emitted = blocks(
            (x, mixed), raw, jnp.array(c.kind_of_layer), jnp.arange(c.num_layers),
            self._context(segments, positions, probe, deterministic))
        last = drop(c.make_norm(self.dtype, "final_norm")(x)) if c.final_norm else x
        if states:
            stack = emitted.at[-1].set(last)
            return jnp.concatenate([first[None], stack]) if embeddings else stack
        if probe is not None:
            return emitted.at[-1].set(inner(probe, last))
        return last if mix is None else mixed + mix[-1] * last.astype(jnp.float32)

    def _embed(self, tokens, positions) -> Float[Array, "B S D"]:
        """`h_0`: token embeddings, with positions and token types where the family adds them."""
        c = self.config
        init = nn.initializers.normal(1.0 / c.embed_scale)
        x = Embedding(c.vocab_size, c.d_model, init, self.dtype, name="embed")(tokens)
        x = x * jnp.asarray(c.embed_scale, self.dtype)
        number = positions + c.first_position
        if c.positions == "sinusoidal":
            x = x + sinusoids(number, c.d_model).astype(self.dtype)
        if c.positions == "learned":
            table = self._table("positions", c.first_position + c.max_length)
            x = x + jnp.take(table, number, axis=0, mode="clip")
        if c.token_types:
            x = x + self._table("token_types", c.token_types)[0]
        return c.make_norm(self.dtype, "embed_norm")(x) if c.embed_norm else x

    def _table(self, name: str, rows: int) -> Float[Array, "rows D"]:
        init = named(nn.initializers.normal(1.0), None, "embed")
        return self.param(name, init, (rows, self.config.d_model), self.dtype).astype(self.dtype)

    def _context(self, segments, positions, probe, deterministic) -> Context:
        """Masks, relative bias and rotary tables of a batch."""
        c, (rows, length) = self.config, segments.shape
        kernel = "plain" if self.dropout and not deterministic else usable(
            self.attention, rows, length, c.head_dim, self.dtype)
        masks = None if kernel != "plain" else jnp.stack([
            segment_mask(segments, window) for window in c.kinds])
        bias, rotary = None, None
        if c.positions == "relative" and not c.bias_per_layer:
            bias = c.make_relative_bias()(length)
        if c.positions == "rotary":
            ropes = [c.local_rope if window and c.local_rope else c.rope for window in c.kinds]
            most = jnp.max(jnp.where(segments != 0, positions, 0), axis=1)
            rotary = jax.tree.map(lambda *x: jnp.stack(x), *(
                rope_tables(rope, c.head_dim, positions, most) for rope in ropes))
        return Context(segments, masks, bias, rotary, probe)
