"""LayAlign: all encoder states as extra keys and values of every LLM layer (arXiv:2502.11405)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxfusion.nn.cache import Extra
from jaxfusion.nn.decoder import DecoderConfig, head_map, head_norm
from jaxfusion.nn.layers import Linear, named, symmetric_uniform
from jaxfusion.sharding.rules import constrain


class Aligner(nn.Module):
    """A key source and a value source for each LLM layer, and its gate, which starts at 0.

    `Z = relu(W_1 H + b_1)` over the layer axis, n → 2M; `A = Z W_2 + b_2`, D → E; as `mlp` also
    `A = relu(A) W_3 + b_3`. LLM layer i reads keys from `A_2i` and values from `A_2i+1`.

    Attributes:
      kind: `linear` or `mlp` (the authors' `structure`).
      num_layers: M, of the LLM. d_out: E.
    """

    kind: str
    num_layers: int
    d_out: int

    @nn.compact
    def __call__(
        self, states: Float[Array, "n B S D"]
    ) -> tuple[Float[Array, "M 2 B S E"], Float[Array, "M"]]:
        """Sources and gates."""
        n, *rows, d_in = states.shape
        mixed = self._linear(n, 2 * self.num_layers, "mix")(jnp.moveaxis(states, 0, -1))
        x = jax.nn.relu(jnp.moveaxis(mixed, -1, 0))
        if self.kind == "mlp":
            x = jax.nn.relu(self._linear(d_in, self.d_out, "hidden")(x))
            d_in = self.d_out
        x = self._linear(d_in, self.d_out, "out")(x)
        gate = self.param("gate", named(nn.initializers.zeros, "layers"), (self.num_layers,))
        return x.reshape(self.num_layers, 2, *rows, self.d_out), gate

    def _linear(self, d_in: int, d_out: int, name: str) -> Linear:
        """`nn.Linear` with PyTorch's initialisation."""
        init = symmetric_uniform(d_in**-0.5)
        return Linear((d_in, d_out), ("bridge_in", "bridge_out"), init, bias_init=init, name=name)


def extra_of(
    config: DecoderConfig, dtype: jnp.dtype, attention: dict, sources: Float[Array, "M 2 B S E"],
    gate: Float[Array, "M"], segments: Int[Array, "B S"],
) -> Extra:
    """What every layer reads of the sources by its own maps to keys and values.

    Args:
      attention: the parameters of all layers' attention, stacked.
      segments: of the sources, as `Extra.segments`.
    """

    def read(layer: dict, source: Float[Array, "2 B S E"]):
        k, v = (head_map(config, dtype, name).apply({"params": layer[name]}, x)
                for name, x in zip("kv", source.astype(dtype), strict=True))
        if config.qk_norm:
            k = head_norm(config, dtype, "k_norm").apply({"params": layer["k_norm"]}, k)
        return k, v

    sources = constrain(sources, "layers", None, "batch", "length", None)
    return Extra(*jax.vmap(read)(attention, sources), gate, segments)
