"""From the encoder's width to the decoder's, and the learned end of the prefix.

LangBridge (arXiv:2401.10695) has `linear`, `ffn` and `resampler` (its `latent`), MindMerger
(arXiv:2405.17386) `mapping`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxfusion.nn.attention import plain_attention
from jaxfusion.nn.layers import Linear, named, symmetric_uniform

# The hidden layer's activation; LangBridge's GELU is the exact (erf) one.
ACTIVATIONS = {"ffn": partial(jax.nn.gelu, approximate=False), "mapping": jax.nn.relu}


def linear(d_in: int, d_out: int, name: str, bias: bool = True) -> Linear:
    """`nn.Linear` with PyTorch's initialisation, as the authors start it."""
    init = symmetric_uniform(d_in**-0.5)
    names = ("bridge_in", "bridge_out")
    return Linear((d_in, d_out), names, init, bias_init=init if bias else None,
                  name=name)


class Projector(nn.Module):
    """`linear`: D→E with bias. `ffn` and `mapping`: D→d_ff, activation, →E. Then one end vector.

    Attributes:
      kind: `linear`, `ffn` or `mapping`.
      d_out: E.
      end_std: standard deviation the end vector starts with (LangBridge 1, the others 0).
      d_ff: hidden width; None for the papers' 2D.
    """

    kind: str
    d_out: int
    end_std: float
    d_ff: int | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, "B S D"], mask: Bool[Array, "B S"], *,
        deterministic: bool = True,
    ) -> Float[Array, "B S+1 E"]:
        """The projected features, and the end vector as one more slot after them."""
        d_in, width = features.shape[-1], self.d_out
        x = features.astype(jnp.float32)
        if self.kind != "linear":
            d_ff = self.d_ff or 2 * d_in
            x = ACTIVATIONS[self.kind](linear(d_in, d_ff, "hidden")(x))
            d_in = d_ff
        x = linear(d_in, width, "out")(x)
        return _append_end(self, x)


class Resampler(nn.Module):
    """A fixed number of slots that attend to the features (Perceiver, as LangBridge's `latent`).

    One pre-norm cross-attention of `latents` queries with keys and values over [features;
    latents], without biases; a feed-forward ×4 with exact GELU; a projection without bias; the end
    vector; LayerNorm over all.

    Attributes:
      d_out: E. end_std: as in `Projector`.
      latents: Q. num_heads, head_dim: of the attention. dropout: after the feed-forward.
    """

    d_out: int
    end_std: float
    latents: int = 64
    num_heads: int = 8
    head_dim: int = 64
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self, features: Float[Array, "B S D"], mask: Bool[Array, "B S"], *,
        deterministic: bool = True,
    ) -> Float[Array, "B Q+1 E"]:
        """The latents as they read each row's real features, and the end vector after them."""
        x, d = features.astype(jnp.float32), features.shape[-1]
        inner = self.num_heads * self.head_dim
        norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False,
                       scale_init=named(nn.initializers.ones, "norm"),
                       bias_init=named(nn.initializers.zeros, "norm"))
        start = named(nn.initializers.normal(1.0), "bridge_in", "bridge_out")
        latents = self.param("latents", start, (self.latents, d), jnp.float32)
        latents = jnp.broadcast_to(latents, (x.shape[0], *latents.shape))
        asking = norm(name="latent_norm")(latents)
        seen = jnp.concatenate([norm(name="feature_norm")(x), asking], axis=1)
        q, k, v = (
            linear(d, inner, name, bias=False)(z).reshape(*z.shape[:2], self.num_heads, -1)
            for name, z in (("q", asking), ("k", seen), ("v", seen))
        )
        ones = jnp.ones((x.shape[0], self.latents), bool)
        visible = jnp.concatenate([mask, ones], axis=1)[:, None]
        visible = jnp.broadcast_to(visible, (x.shape[0], self.latents, visible.shape[-1]))
        mixed = plain_attention(q, k, v, visible, scale=self.head_dim**-0.5)
        y = latents + linear(inner, d, "o", bias=False)(mixed.reshape(*latents.shape[:2], inner))
        h = ACTIVATIONS["ffn"](linear(d, 4 * d, "up")(y))
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y + linear(4 * d, d, "down")(h))
        y = _append_end(self, linear(d, self.d_out, "out", bias=False)(y))
        return norm(name="norm")(y)


def _append_end(module: Projector | Resampler, x: Float[Array, "B P E"]) -> Float[Array, "B P+1 E"]:
    init = named(nn.initializers.normal(module.end_std), "bridge_out")
    end = module.param("end", init, (module.d_out,), jnp.float32)
    return jnp.concatenate([x, jnp.broadcast_to(end, (x.shape[0], 1, module.d_out))], axis=1)
