"""From the encoder's width to the decoder's, and the learned end of the prefix (LangBridge)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxfusion.nn.layers import Einsum, named, symmetric_uniform


class Projector(nn.Module):
    """`linear`: D→E with bias. `ffn`: D→d_ff, exact (erf) GELU, →E. Then one learned end vector.

    Attributes:
      kind: `linear` or `ffn`.
      d_out: E.
      end_std: standard deviation the end vector starts with (LangBridge 1, 2508.09091 0).
      d_ff: hidden width of `ffn`; None for LangBridge's 2D.
    """

    kind: str
    d_out: int
    end_std: float
    d_ff: int | None = None

    @nn.compact
    def __call__(self, features: Float[Array, "B S D"]) -> Float[Array, "B S+1 E"]:
        """The projected features, and the end vector as one more slot after them."""
        d_in, width = features.shape[-1], self.d_out
        x = features.astype(jnp.float32)
        if self.kind == "ffn":
            d_ff = self.d_ff or 2 * d_in
            x = jax.nn.gelu(self._linear(d_in, d_ff, "hidden")(x), approximate=False)
            d_in = d_ff
        x = self._linear(d_in, width, "out")(x)
        end_init = named(nn.initializers.normal(self.end_std), "bridge_out")
        end = self.param("end", end_init, (width,), jnp.float32)
        end = jnp.broadcast_to(end, (x.shape[0], 1, width))
        return jnp.concatenate([x, end], axis=1)

    def _linear(self, d_in: int, d_out: int, name: str) -> Einsum:
        """`nn.Linear` with PyTorch's initialisation, as the authors start it."""
        init = symmetric_uniform(d_in**-0.5)
        names = ("bridge_in", "bridge_out")
        return Einsum("bsd,de->bse", (d_in, d_out), names, init, bias_init=init, name=name)
