"""The bridge (2401.10695, 2508.09091): encoder → fusion → projector → splice → decoder.

Everything here is a function of a parameter tree `{'encoder', 'fusion', 'projector', 'aligner',
'decoder'}` and a batch; nothing is stored. The tree may have `edits` of the decoder's states
(`make_edits`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.nn.aligner import Aligner, extra_of
from jaxfusion.nn.cache import Cache, Extra
from jaxfusion.nn.decoder import Decoder
from jaxfusion.nn.encoder import Encoder
from jaxfusion.nn.fusion import GlobalSoftmax, TransformerSoftmax, add_noise, second_pass_mix
from jaxfusion.nn.projector import Projector, Resampler

Params = dict[str, Any]
OWN = ("fusion", "projector", "aligner")  # parts that are a bridge's own


@dataclass(frozen=True)
class Batch:
    """One batch of fixed shape. Padding may be anywhere in a decoder row.

    Attributes:
      enc_tokens: [B S] encoder ids.
      enc_segments: [B S] 0 at padding; tokens of an example share a number and are contiguous.
      dec_tokens: [B N] ids at text slots, 0 elsewhere.
      dec_source: [B N] which of the projector's slots fills a prefix slot, the last being the end
        vector; -1 for text.
      dec_positions: [B N] place among the example's real tokens.
      dec_segments: [B N] 0 at padding, else the example's number in its row.
      target_slots: [B T] decoder slots whose next token is a target.
      target_tokens, target_mask: [B T] those tokens, and True where there is one.
      enc_states: [B S l D] the encoder's states in the layers that the fusion reads
        (`Bridge.read_layers`), if they are known; None: the encoder computes them.
    """

    enc_tokens: Int[Array, "B S"]
    enc_segments: Int[Array, "B S"]
    dec_tokens: Int[Array, "B N"]
    dec_source: Int[Array, "B N"]
    dec_positions: Int[Array, "B N"]
    dec_segments: Int[Array, "B N"]
    target_slots: Int[Array, "B T"]
    target_tokens: Int[Array, "B T"]
    target_mask: Bool[Array, "B T"]
    enc_states: Float[Array, "B S l D"] | None = None


jax.tree_util.register_dataclass(
    Batch, data_fields=list(Batch.__dataclass_fields__), meta_fields=[]
)


@dataclass(frozen=True)
class Bridge:
    """The parts and how they read the encoder.

    Attributes:
      encoder, decoder, projector: modules; of the LLM alone only the decoder is one.
      aligner: gives every LLM layer more to read; None: the LLM reads the prefix alone.
      align_padding: as LayAlign's authors have it: the aligner reads h_0 … h_{L-1}, not
        h_1 … h_L, and padding up to the longest text is read too.
      fusion: `last`, `layer`, `global_softmax` or `transformer_softmax`.
      fusion_layer: l of `layer`, 1 … L as Hugging Face numbers states.
      fusion_dropout, fusion_d_ff: of `transformer_softmax`.
      fusion_noise: standard deviation of Gaussian noise on the features in training, relative to
        their rms; 0 has none.
      backward: of `global_softmax` in training: 'stack' keeps all states, 'second_pass' none.
    """

    encoder: Encoder | None
    decoder: Decoder
    projector: Projector | Resampler | None
    fusion: str
    fusion_layer: int = 0
    fusion_dropout: float = 0.1
    fusion_d_ff: int = 2048
    fusion_noise: float = 0.0
    backward: str = "stack"
    aligner: Aligner | None = None
    align_padding: bool = False

    @property
    def latents(self) -> int:
        """How many slots every prefix has; 0 where it has one for each encoder token."""
        return self.projector.latents if isinstance(self.projector, Resampler) else 0

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Numbers of the encoder's states that the bridge reads, of 0 … L."""
        layers = self.encoder.config.num_layers
        if self.aligner is not None:
            return tuple(range(0 if self.align_padding else 1, layers + 1))
        if self.fusion == "last":
            return (layers,)
        return (self.fusion_layer,) if self.fusion == "layer" else tuple(range(1, layers + 1))

    @property
    def fusion_module(self) -> nn.Module | None:
        """The fusion's Linen module; None for those without parameters."""
        c = self.encoder.config
        if self.fusion == "global_softmax":
            return GlobalSoftmax(c.num_layers)
        if self.fusion == "transformer_softmax":
            return TransformerSoftmax(
                c.num_layers, c.d_model, self.fusion_d_ff, self.fusion_dropout
            )
        return None

    def init(self, key: Array, parts: tuple[str, ...] = OWN) -> Params:
        """Fresh parameters of the named parts, boxed with their logical axis names."""
        c, tokens = self.encoder.config, jnp.zeros((1, 2), jnp.int32)
        real, features = tokens == 0, jnp.zeros((1, 2, c.d_model))
        keys = dict(zip(("encoder", "fusion", "projector", "decoder"),
                        jax.random.split(key, 4), strict=True), aligner=jax.random.fold_in(key, 4))
        make = {
            "encoder": lambda k: self.encoder.init(k, tokens, real),
            "decoder": lambda k: self.decoder.init(k, tokens, tokens, tokens, method="score"),
            "projector": lambda k: self.projector.init(k, features, real),
            "fusion": lambda k: self._init_fusion(k, features, real),
            "aligner": lambda k: self._init_aligner(k, features),
        }
        return {part: make[part](keys[part]).get("params", {}) for part in parts}

    def _init_fusion(self, key, features, real):
        if self.fusion_module is None:
            return {}
        if self.fusion == "global_softmax":
            return self.fusion_module.init(key)
        states = jnp.zeros((self.encoder.config.num_layers, *features.shape))
        return self.fusion_module.init(key, states, real)

    def _init_aligner(self, key, features):
        if self.aligner is None:
            return {}
        return self.aligner.init(key, jnp.zeros((self.encoder.config.num_layers, *features.shape)))

    def _encode(self, params: Params, batch: Batch, key: Array | None, **read):
        train = key is not None
        return self.encoder.apply(
            {"params": params["encoder"]}, batch.enc_tokens, batch.enc_segments,
            deterministic=not train, rngs={"dropout": jax.random.fold_in(key, 0)} if train else {},
            **read,
        )

    def _kept(self, batch: Batch, first: int, last: int) -> Float[Array, "l B S D"]:
        """The known states `first` to `last` of a batch."""
        layers = self.read_layers
        if batch.enc_states.shape[2] != len(layers):
            raise ValueError(f"enc_states has {batch.enc_states.shape[2]} layers, expected the "
                             f"{len(layers)} that this bridge reads")
        start = layers[0]
        return jnp.moveaxis(batch.enc_states[:, :, first - start : last - start + 1], 2, 0)

    def fuse(
        self, params: Params, batch: Batch, key: Array | None = None
    ) -> tuple[Float[Array, "B S D"], Array | None]:
        """Features of every encoder token, and the layer weights behind them.

        Args:
          key: for dropout; None (evaluation) has none, and holds a stack of states only for
            `transformer_softmax`.

        Returns:
          Features; weights [L] (`layer`, `global_softmax`), [L B S] (`transformer_softmax`), or
          None (`last`).
        """
        train, layers = key is not None, self.encoder.config.num_layers
        encode = partial(self._encode, params, batch, key)
        kept = None if batch.enc_states is None else partial(self._kept, batch)
        if self.fusion == "last":
            return encode() if kept is None else kept(layers, layers)[0], None
        if self.fusion == "layer":
            if not 1 <= self.fusion_layer <= layers:
                raise ValueError(f"fusion_layer is {self.fusion_layer}, expected 1 to {layers}")
            mix = jax.nn.one_hot(self.fusion_layer - 1, layers)
            if kept is None:
                return encode(mix=mix), mix
            return kept(self.fusion_layer, self.fusion_layer)[0], mix
        fusion = partial(self.fusion_module.apply, {"params": params["fusion"]})
        if self.fusion == "transformer_softmax":
            states = encode(states=True) if kept is None else kept(1, layers)
            rngs = {"dropout": jax.random.fold_in(key, 1)} if train else {}
            return fusion(states, batch.enc_segments != 0, deterministic=not train, rngs=rngs)
        mix = fusion()
        if kept is None and not train:
            return encode(mix=mix), mix
        if kept is None and self.backward == "second_pass":
            return second_pass_mix(
                lambda encoder, **read: self._encode({"encoder": encoder}, batch, key, **read),
                params["encoder"], mix), mix
        states = encode(states=True) if kept is None else kept(1, layers)
        return jnp.einsum("l,lbsd->bsd", mix, states, preferred_element_type=jnp.float32), mix

    def splice(self, params: Params, batch: Batch, prefix: Float[Array, "B P E"]) -> Array:
        """Decoder inputs: prefix slots from `prefix`, the others embedded text. [B N E]"""
        text = self.embed(params, batch.dec_tokens)
        index = jnp.maximum(batch.dec_source, 0)[:, :, None]
        from_prefix = jnp.take_along_axis(prefix, index, axis=1).astype(text.dtype)
        return jnp.where((batch.dec_source >= 0)[:, :, None], from_prefix, text)

    def read(
        self, params: Params, batch: Batch, key: Array | None = None
    ) -> tuple[Float[Array, "B N E"], Extra | None]:
        """Decoder inputs of a batch, and what its layers read besides; without an encoder the
        inputs are those of the text."""
        if self.encoder is None:
            return self.embed(params, batch.dec_tokens), None
        if self.aligner is not None and batch.enc_states is None:
            states = self._encode(params, batch, key, states=True, embeddings=self.align_padding)
            batch = replace(batch, enc_states=jnp.moveaxis(states, 0, 2))
        features, _ = self.fuse(params, batch, key)
        if self.fusion_noise and key is not None:
            features = add_noise(features, self.fusion_noise, jax.random.fold_in(key, 3))
        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, 2)}
        prefix = self.projector.apply(
            {"params": params["projector"]}, features, batch.enc_segments != 0,
            deterministic=key is None, rngs=rngs,
        )
        return self.splice(params, batch, prefix), self._align(params, batch)

    def _align(self, params: Params, batch: Batch) -> Extra | None:
        if self.aligner is None:
            return None
        layers, segments = self.encoder.config.num_layers, batch.enc_segments
        if self.align_padding:  # up to the longest text of the batch
            segments = jnp.broadcast_to(jnp.any(segments != 0, axis=0), segments.shape).astype(int)
        first = self.read_layers[0]
        states = self._kept(batch, first, first + layers - 1)
        sources, gate = self.aligner.apply({"params": params["aligner"]}, states)
        return extra_of(self.decoder.config, self.decoder.dtype,
                        params["decoder"]["blocks"]["attn"], sources, gate, segments)

    def decode(
        self, params: Params, embeddings: Array, positions, segments,
        cache: Cache | None = None, start: Array | int = 0, visible: Array | None = None,
        extra: Extra | None = None,
    ) -> tuple[Array, Cache | None]:
        """The decoder's hidden states and cache; see `Decoder.__call__`."""
        return self._decode(params, embeddings, positions, segments, cache, start, visible, extra)

    def states(self, params: Params, batch: Batch, probe: Array, keep: int | None = None):
        """What the decoder's layers hold of a batch of texts for the LLM alone; see
        `Decoder.states`."""
        return self._decode(params, self.embed(params, batch.dec_tokens), batch.dec_positions,
                            batch.dec_segments, probe, keep, method="states")

    def logits(self, params: Params, hidden: Array) -> Array:
        """Next-token logits of hidden states, float32."""
        return self._decode(params, hidden, method="logits")

    def embed(self, params: Params, tokens: Array) -> Array:
        """Decoder embeddings of token ids."""
        return self._decode(params, tokens, method="embed")

    def target_logits(
        self, params: Params, batch: Batch, key: Array | None = None
    ) -> Float[Array, "B T V"]:
        """Logits at the target slots alone; the vocabulary is never spread over all N slots."""
        inputs, extra = self.read(params, batch, key)
        hidden, _ = self.decode(
            params, inputs, batch.dec_positions, batch.dec_segments, extra=extra)
        wanted = jnp.take_along_axis(hidden, batch.target_slots[:, :, None], axis=1)
        return self.logits(params, wanted)

    def loss(
        self, params: Params, batch: Batch, key: Array | None = None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Summed cross-entropy of the target tokens over their global number, and that number."""
        losses = optax.softmax_cross_entropy_with_integer_labels(
            self.target_logits(params, batch, key), batch.target_tokens)
        count = jnp.sum(batch.target_mask)
        return jnp.sum(losses, where=batch.target_mask) / jnp.maximum(count, 1), count

    def _decode(self, params: Params, *args, **kwargs):
        edits = {"edits": params["edits"]} if "edits" in params else {}
        return self.decoder.apply({"params": params["decoder"], **edits}, *args, **kwargs)
