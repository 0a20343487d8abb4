"""One causal LM; a family is a set of values of its config (Llama 2: arXiv:2307.09288)."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.nn.attention import (
    FUSED,
    Causal,
    LayerWindows,
    Pattern,
    capped,
    causal_mask,
    plain_attention,
    usable,
)
from jaxfusion.nn.cache import Cache, Extra
from jaxfusion.nn.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    RMSNorm,
    fan_in_normal,
    pick,
    rematerialised,
    weighted_sums,
)
from jaxfusion.nn.rope import Rope, rope_tables, rotate
from jaxfusion.sharding.rules import constrain


@dataclass(frozen=True)
class DecoderConfig(LayerWindows):
    """Shape and features of a causal LM.

    Attributes:
      family: `model_type` of its `config.json`, which decides how tensors are named.
      activation: `silu` (SwiGLU), `gelu_tanh` or the exact `gelu` (GeGLU).
      qkv_bias: queries, keys and values have biases (Qwen2).
      qk_norm: queries and keys are normalised head by head (Qwen3, Gemma 3).
      max_length: tokens it was made for.
      rope: of all layers, or of those without a window where `local_rope` is given.
      windows: how many tokens each layer looks back on, its own counted; None is all. Empty: none
        has a window.
      local_rope: of the layers with a window (Gemma 3).
      attn_scale: factor of the attention scores; None is head_dim**-0.5.
      attn_cap, logit_cap: bounds of scores and logits, `cap * tanh(x / cap)` (Gemma 2).
      embed_scale: factor of token embeddings (Gemma: sqrt(d_model)).
      norm_offset: added to the scale of every norm (Gemma: 1).
      post_norms: what attention and feed-forward give is normalised again (Gemma 2 and 3).
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope: Rope = field(default_factory=Rope)
    tie_embeddings: bool = False
    family: str = "llama"
    max_length: int = 131_072
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    local_rope: Rope | None = None
    attn_scale: float | None = None
    attn_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0
    norm_offset: float = 0.0
    post_norms: bool = False


def make_edits(
    shift: Float[Array, "L E"], basis: Float[Array, "L E r"], strength: Float[Array, "L"]
) -> dict[str, Any]:
    """The collection `edits` of a decoder: behind block l, `h ← h + shift_l − s_l B_l B_lᵀ h`.

    Steering adds a direction (Lens, arXiv:2410.04407); taking out the language-specific subspace in
    middle layers is disentanglement.

    Args:
      shift, basis: the vectors and the subspaces' orthonormal columns. strength: s_l, 0 or more.
    """
    return {"blocks": {"shift": shift, "basis": basis * jnp.sqrt(strength)[:, None, None]}}


class Context(NamedTuple):
    """What every block reads besides the stream, the same for all of them.

    Attributes:
      rotary, masks: rotary tables and masks of every kind of block; no masks where a kernel reads
        the segments.
      segments: of the slots. start: the first slot of the new tokens in the cache.
      probe: weights of slots [B P N]: every block returns the P weighted sums of its output.
      keep: number of the block whose input is wanted. queries: the only slots [B Q] that are
        computed beyond their keys and values; None is all.
      extra_mask: who may look at which of the extra keys.
      causal: what is known of the masks, whatever they hold.
    """

    rotary: tuple[Array, Array]
    masks: Bool[Array, "k B N C"] | None
    segments: Int[Array, "B N"]
    start: Int[Array, ""] | int = 0
    probe: Float[Array, "B P N"] | None = None
    keep: int | None = None
    queries: Int[Array, "B Q"] | None = None
    extra_mask: Bool[Array, "B N S"] | None = None
    causal: Causal | None = None

    def of_kind(self, kind: Int[Array, ""] | int) -> "Context":
        """The context of a block, with the tables of its kind alone."""
        rotary, masks = jax.tree.map(lambda every: every[kind], (self.rotary, self.masks))
        return self._replace(rotary=rotary, masks=masks)


def head_map(config: DecoderConfig, dtype: jnp.dtype, name: str) -> Linear:
    """The map to queries, keys or values: `q`, `k` or `v`."""
    c = config
    heads, axis = (c.num_heads, "heads") if name == "q" else (c.num_kv_heads, "kv_heads")
    return Linear((c.d_model, heads, c.head_dim), ("embed", axis, "head_dim"),
                  fan_in_normal(c.d_model), dtype,
                  bias_init=nn.initializers.normal(0.5) if c.qkv_bias else None, name=name)


def head_norm(config: DecoderConfig, dtype: jnp.dtype, name: str) -> RMSNorm:
    """The norm of queries or keys, head by head: `q_norm` or `k_norm`."""
    return RMSNorm(config.norm_eps, dtype, config.norm_offset, name=name)


class SelfAttention(nn.Module):
    """Grouped-query causal attention with rotary positions (GQA: arXiv:2305.13245)."""

    config: DecoderConfig
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(self, x, kv, kind, extra, context: Context):
        c, queries, rotary = self.config, context.queries, context.rotary
        q, k, v = (head_map(c, self.dtype, name)(pick(x, queries) if name == "q" else x)
                   for name in "qkv")
        if c.qk_norm:
            q, k = head_norm(c, self.dtype, "q_norm")(q), head_norm(c, self.dtype, "k_norm")(k)
        q, k = rotate(q, tuple(pick(table, queries) for table in rotary)), rotate(k, rotary)
        if kv is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            k = write(kv[0], k.astype(kv[0].dtype), context.start, axis=1)
            v = write(kv[1], v.astype(kv[1].dtype), context.start, axis=1)
            kv = k, v
        q = constrain(q, "batch", "length", "heads", "head_dim")
        scale = c.head_dim**-0.5 if c.attn_scale is None else c.attn_scale
        if context.masks is not None:
            mixed = plain_attention(q, k, v, context.masks, scale=scale, cap=c.attn_cap,
                                    causal=context.causal)
        else:
            every = [
                partial(FUSED[self.attention], pattern=Pattern(True, scale, window, c.attn_cap))
                for window in c.kinds
            ]
            mixed = every[0](q, k, v, context.segments) if len(every) == 1 else (
                jax.lax.switch(kind, every, q, k, v, context.segments))
        if extra is not None:
            k, v, gate = extra
            read = plain_attention(q, k, v, context.extra_mask, scale=scale, cap=c.attn_cap)
            mixed = mixed + gate.astype(mixed.dtype) * read
        out = Linear(
            (c.num_heads, c.head_dim, c.d_model), ("heads", "head_dim", "embed"),
            fan_in_normal(c.num_heads * c.head_dim), self.dtype, inputs=2, name="o",
        )(mixed)
        return out, kv


class FeedForward(nn.Module):
    """Gated: `act(x W_gate) * (x W_up)`, then down (Shazeer, arXiv:2002.05202)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c = self.config
        into = partial(
            Linear, (c.d_model, c.d_ff), ("embed", "mlp"),
            fan_in_normal(c.d_model), self.dtype,
        )
        hidden = ACTIVATIONS[c.activation](into(name="gate")(x)) * into(name="up")(x)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Linear(
            (c.d_ff, c.d_model), ("mlp", "embed"),
            fan_in_normal(c.d_ff), self.dtype, name="down",
        )(hidden)


class Block(nn.Module):
    """One pre-norm block, in the form `nn.scan` wants: the stream is carried, the cache scanned.

    Returns the cache and, with `context.probe`, weighted sums of the stream behind the block; with
    `context.queries` the stream at these slots. With `context.keep` the input of that block is
    carried along. A variable collection `edits` may add a vector to the stream behind the block,
    and project out a subspace (see `make_edits`).
    """

    config: DecoderConfig
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(self, carried, kv, kind, number, extra, context: Context):
        c, (x, kept) = self.config, carried
        if kept is not None:
            kept = jnp.where(number == context.keep, x, kept)
        if len(c.kinds) == 1:
            kind = 0  # known when compiled: nothing is copied
        context = context.of_kind(kind)
        norm = partial(RMSNorm, c.norm_eps, self.dtype, c.norm_offset)
        after = norm if c.post_norms else lambda name: lambda h: h
        h = norm(name="attn_norm")(x)
        attention = SelfAttention(c, self.dtype, self.attention, name="attn")
        h, kv = attention(h, kv, kind, extra, context)
        stream, x = x, pick(x, context.queries) + after(name="attn_post_norm")(h)
        h = norm(name="mlp_norm")(x)
        h = FeedForward(c, self.dtype, name="mlp")(h)
        x = x + after(name="mlp_post_norm")(h)
        if self.has_variable("edits", "shift"):
            basis = self.get_variable("edits", "basis").astype(x.dtype)
            x = x + self.get_variable("edits", "shift").astype(x.dtype) - (x @ basis) @ basis.T
        x = constrain(x, "batch", "length", None)
        if context.queries is not None:
            return (stream, kept), (kv, x)
        return (x, kept), (kv, None if context.probe is None else weighted_sums(context.probe, x))


class Decoder(nn.Module):
    """A causal LM in three steps, so that callers may put anything between them.

    `embed(tokens)`, then the module itself on embeddings, then `logits(hidden)` at the positions
    that are wanted.

    Attributes:
      config: shape and features.
      dtype: of parameters and activations; norms, softmax and logits run in float32.
      remat: what the backward pass recomputes: `none`, or a name in `REMAT_POLICIES`.
      attention: a name in `KERNELS`; with a cache it is always plain.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "plain"

    def setup(self):
        c = self.config
        # Random heads give logits that spread over several units, so that argmax has no ties.
        head_init = fan_in_normal(c.d_model, gain=3.0)
        embed_init = head_init if c.tie_embeddings else nn.initializers.normal(1.0)
        self.embedder = Embedding(c.vocab_size, c.d_model, embed_init, self.dtype, name="embed")
        self.blocks = nn.scan(
            rematerialised(Block, self.remat), variable_axes={"params": 0, "edits": 0},
            split_rngs={"params": True}, length=c.num_layers,
            in_axes=(0, 0, 0, 0, nn.broadcast), metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.attention, name="blocks")
        self.final_norm = RMSNorm(c.norm_eps, self.dtype, c.norm_offset, name="final_norm")
        if not c.tie_embeddings:
            self.head = Embedding(c.vocab_size, c.d_model, head_init, self.dtype, name="head")

    def embed(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N E"]:
        """Embeddings of token ids, as the first block reads them."""
        scale = jnp.asarray(self.config.embed_scale, self.dtype)  # rounded as Gemma's authors do
        return self.embedder(tokens) * scale

    def __call__(
        self, embeddings: Float[Array, "B N E"], positions: Int[Array, "B N"],
        segments: Int[Array, "B N"], cache: Cache | None = None,
        start: Int[Array, ""] | int = 0, visible: Bool[Array, "B N N"] | None = None,
        extra: Extra | None = None,
    ) -> tuple[Float[Array, "B N E"], Cache | None]:
        """Hidden states after the final norm.

        Args:
          embeddings: one vector per slot.
          positions: of each slot among its segment's tokens, which are in the order of their slots;
            anything at padding.
          segments: 0 at padding; tokens see only their own segment.
          cache: what came before; the new tokens are written from slot `start` on.
          start: first slot of the new tokens in the cache, the same for every row.
          visible: which of the new tokens each of them may see; with a cache. It adds none to those
            that positions and segments allow. None: all of these.
          extra: what every layer also reads. With a cache, the cache's own counts.

        Returns:
          Hidden states, and the cache with the new tokens in it (None if none was given).
        """
        keys, kv = (positions, segments), None
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            keys = write(cache.positions, positions), write(cache.segments, segments)
            kv, extra = (cache.k, cache.v), cache.extra
        context = self._context(positions, segments, keys, fused=cache is None)
        if visible is not None:
            new = jax.lax.dynamic_slice_in_dim(context.masks, start, visible.shape[1], axis=-1)
            context = context._replace(masks=jax.lax.dynamic_update_slice_in_dim(
                context.masks, new & visible, start, axis=-1))
        elif isinstance(start, int):  # a row's tokens are in the order of their slots
            context = context._replace(causal=Causal(start))
        x, kv, _, _ = self._run(embeddings, context._replace(start=start), kv, extra)
        return self.final_norm(x), None if cache is None else Cache(*kv, *keys, extra)

    def stream(
        self, embeddings, positions, segments, probe: Float[Array, "B P N"] | None = None
    ) -> tuple[Float[Array, "B N E"], Float[Array, "L B P E"] | None]:
        """The residual stream behind the last block, before the final norm; and, behind every
        block, its sums over the slots by the weights `probe`."""
        context = self._context(positions, segments, (positions, segments))
        x, _, sums, _ = self._run(embeddings, context._replace(probe=probe))
        return x, sums

    def states(
        self, embeddings, positions, segments, probe: Float[Array, "B P N"],
        keep: int | None = None, key_segments: Int[Array, "B N"] | None = None,
    ) -> tuple[Float[Array, "L B P E"], Float[Array, "B N E"] | None]:
        """`h_1 … h_L` as Hugging Face numbers them, the last after the final norm: of each the sums
        over the slots by the weights `probe`, in float32; and the input of block `keep` (from 0).

        Args:
          key_segments: of the slots as they are seen, where other than as they see; with plain
            attention.
        """
        seen = segments if key_segments is None else key_segments
        context = self._context(positions, segments, (positions, seen))
        x, _, sums, kept = self._run(embeddings, context._replace(probe=probe, keep=keep))
        return sums.at[-1].set(weighted_sums(probe, self.final_norm(x))), kept

    def last_block(
        self, embeddings, positions, segments, queries: Int[Array, "B Q"] | None = None
    ) -> Float[Array, "B Q E"]:
        """Hidden states of a decoder of one block at the slots `queries`; of the others only keys
        and values are computed."""
        if self.config.num_layers > 1:
            raise ValueError("last_block is for a decoder of one block")
        if queries is None:
            return self(embeddings, positions, segments)[0]
        context = self._context(positions, segments, (positions, segments), fused=False)
        masks = jnp.stack([pick(mask, queries) for mask in context.masks])
        context = context._replace(masks=masks, queries=queries)
        return self.final_norm(self._run(embeddings, context)[2][0])

    def _context(self, positions, segments, keys, fused: bool = True) -> Context:
        """Rotary tables and masks; `keys`: positions and segments of what is attended to."""
        c = self.config
        kernel = usable(self.attention, *positions.shape, c.head_dim, self.dtype, c.attn_cap
                        ) if fused else "plain"
        masks = None if kernel != "plain" else jnp.stack([
            causal_mask(positions, segments, *keys, window) for window in c.kinds])
        most = jnp.max(jnp.where(segments != 0, positions, 0), axis=1)
        ropes = [c.local_rope if window and c.local_rope else c.rope for window in c.kinds]
        rotary = jax.tree.map(lambda *x: jnp.stack(x), *(
            rope_tables(rope, c.head_dim, positions, most) for rope in ropes))
        return Context(rotary, masks, segments)

    def _run(self, embeddings, context: Context, kv=None, extra: Extra | None = None):
        """All blocks: the stream, keys and values, what the blocks return, and the kept input."""
        c, by_layer = self.config, None
        if extra is not None:
            seen = extra.segments[:, None, :]
            context = context._replace(
                extra_mask=(context.segments[:, :, None] == seen) & (seen != 0))
            by_layer = extra.k, extra.v, extra.gate
        x = constrain(embeddings.astype(self.dtype), "batch", "length", None)
        carried = x, None if context.keep is None else jnp.zeros_like(x)
        (x, kept), (kv, out) = self.blocks(
            carried, kv, jnp.array(c.kind_of_layer), jnp.arange(c.num_layers), by_layer, context)
        return x, kv, out, kept

    def logits(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Next-token logits in float32."""
        table = self.embedder if self.config.tie_embeddings else self.head
        return capped(table.attend(hidden), self.config.logit_cap)

    def score(self, tokens, positions, segments) -> Float[Array, "B N V"]:
        """Next-token logits at every slot of plain text; also what `init` traces."""
        hidden, _ = self(self.embed(tokens), positions, segments)
        return self.logits(hidden)
