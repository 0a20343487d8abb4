"""How the encoder's layers become one feature per token (arXiv:2508.09091; LangBridge 2401.10695).

`last` reads h_L, `layer` one fixed h_l, `global_softmax` weighs the layers by one learned
distribution, `transformer_softmax` by one for every token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxfusion.nn.layers import Linear, named, symmetric_uniform


class GlobalSoftmax(nn.Module):
    """`α = softmax(τ·w)`, one weight per layer (2508.09091, Global Softmax).

    As the authors start it: `w = 3e-5`, `τ = 100 + 1e5·t` with `t = 1e-5`. The large scale is
    what lets the weights move at a learning rate of 3e-5.
    """

    num_layers: int

    @nn.compact
    def __call__(self) -> Float[Array, "L"]:
        w_init = named(nn.initializers.constant(3e-5), "bridge_out")
        w = self.param("w", w_init, (self.num_layers,), jnp.float32)
        t = self.param("t", named(nn.initializers.constant(1e-5)), (), jnp.float32)
        return jax.nn.softmax((100.0 + 1e5 * t) * w)


class TransformerSoftmax(nn.Module):
    """Token-wise layer weights (2508.09091, Transformer Softmax), in collapsed form.

    The paper runs one post-norm transformer layer (one head, ReLU) over `[cls, h_1 + p_1, …,
    h_L + p_L]` of every token and reads the cls row alone. That row's query is the same vector
    for every token, so with `q = (W_q cls + b_q)/√D` and `u = W_kᵀ q` the scores are
    `(h_l + p_l)·u + q·b_k`, and as attention weights sum to one, `W_v` applies once, after the
    mean. The same function and gradients, without keys, values or (L+1)-long activations.

    Attributes:
      num_layers: L. d_model: D. d_ff: width of the feed-forward.
      dropout: of attention weights, of both sublayers' outputs, and inside the feed-forward.
      dtype: float32; float64 in tests.
    """

    num_layers: int
    d_model: int
    d_ff: int = 2048
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "L B S D"],
        mask: Bool[Array, "B S"],
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "L B S"]]:
        """Returns the fused features, 0 at padding, and the layer weights of every token."""
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        norm = partial(
            nn.LayerNorm, epsilon=1e-5, use_fast_variance=False,
            dtype=self.dtype, param_dtype=self.dtype,
            scale_init=named(nn.initializers.ones, "norm"),
            bias_init=named(nn.initializers.zeros, "norm"),
        )
        cls = self._param("cls", nn.initializers.zeros, self.d_model)
        p = self._param("positions", nn.initializers.normal(1.0), self.num_layers, self.d_model)
        o = self._attend(states, cls, p, drop)
        y = norm(name="attn_norm")(cls + drop(o))
        h = drop(jax.nn.relu(self._linear(self.d_model, self.d_ff, "up")(y)))
        h = self._linear(self.d_ff, self.d_model, "down")(h)
        z = norm(name="mlp_norm")(y + drop(h))
        logits = self._linear(self.d_model, self.num_layers, "weigh")(z)
        weights = jnp.moveaxis(jax.nn.softmax(logits, axis=-1), -1, 0)
        fused = weigh(weights, states, self.dtype)
        return jnp.where(mask[:, :, None], fused, 0.0), weights

    def _param(self, name: str, init, *shape: int) -> Array:
        names = ("bridge_in", "bridge_out")[-len(shape) :]
        return self.param(name, named(init, *names), shape, self.dtype)

    def _linear(self, d_in: int, d_out: int, name: str) -> Linear:
        """`nn.Linear` with PyTorch's initialisation."""
        init = symmetric_uniform(d_in**-0.5)
        names = ("bridge_in", "bridge_out")
        return Linear((d_in, d_out), names, init, self.dtype, init, name=name)

    def _attend(self, states, cls, p, drop) -> Float[Array, "B S D"]:
        """The cls row's attention output `W_o (W_v c + b_v Σa) + b_o`."""
        d = self.d_model
        # As PyTorch starts attention: Glorot over the joint [3D, D] matrix, zero biases.
        glorot, zeros = symmetric_uniform((6 / (4 * d)) ** 0.5), nn.initializers.zeros
        q, k, v = (self._param(f"{name}_kernel", glorot, d, d) for name in "qkv")
        b_q, b_k, b_v = (self._param(f"{name}_bias", zeros, d) for name in "qkv")
        o, b_o = (self._param("o_kernel", symmetric_uniform(d**-0.5), d, d),
                  self._param("o_bias", zeros, d))
        query = (cls @ q + b_q) / d**0.5
        u = k @ query
        at_layers = jnp.einsum("lbsd,d->lbs", states, u, preferred_element_type=self.dtype)
        at_layers = at_layers + (p @ u)[:, None, None]
        at_cls = jnp.broadcast_to(cls @ u, at_layers.shape[1:])
        # The key bias adds the same to every score and so has no effect; the paper's layer has it.
        scores = jnp.concatenate([at_cls[None], at_layers]) + query @ b_k
        a = drop(jax.nn.softmax(scores, axis=0))
        mean = weigh(a[1:], states, self.dtype) + jnp.einsum("lbs,ld->bsd", a[1:], p)
        mean = mean + a[0][:, :, None] * cls
        # Without dropout the weights sum to one; with it, the value bias is scaled by their sum.
        values = mean @ v + jnp.sum(a, axis=0)[:, :, None] * b_v
        return values @ o + b_o


def weigh(
    weights: Float[Array, "L B S"], states: Float[Array, "L B S D"], dtype=jnp.float32
) -> Float[Array, "B S D"]:
    """`Σ_l weights_l h_l` for every token, accumulated in `dtype`.

    A loop over the layers, as each state is read once in place; an einsum over `l` would
    first transpose the whole stack.
    """

    def add(total, layer):
        weight, state = layer
        return total + weight[:, :, None] * state.astype(dtype), None

    return jax.lax.scan(add, jnp.zeros(states.shape[1:], dtype), (weights, states))[0]


def add_noise(
    features: Float[Array, "B S D"], noise: float, key: Array
) -> Float[Array, "B S D"]:
    """Features with Gaussian noise of this standard deviation, relative to each token's rms.

    What learns behind the fusion reads English alone; noise keeps it from fitting more of those
    features than holds for other languages (training with noise: Bishop, 1995).
    """
    square = jnp.mean(jnp.square(features.astype(jnp.float32)), axis=-1, keepdims=True)
    some = square > 0  # at padding there may be none, and a root has no gradient at 0
    rms = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
    return features + noise * rms * jax.random.normal(key, features.shape)


def second_pass_mix(encode, params, mix: Float[Array, "L"]) -> Float[Array, "B S D"]:
    """`Σ_l mix_l h_l` whose backward pass runs the frozen encoder again instead of keeping states.

    ∂L/∂mix_l = ⟨g, h_l⟩ needs every state once more; a second pass takes these L inner products
    in its own loop, so memory does not grow with L.

    Args:
      encode: `encode(params, mix=…)` gives the sum, `encode(params, probe=g)` the inner products.
      params: the encoder's; they get no gradient.
      mix: layer weights.
    """

    @jax.custom_vjp
    def mixed(params, mix):
        return encode(params, mix=mix)

    def forward(params, mix):
        return encode(params, mix=mix), params

    def backward(params, g):
        return None, encode(params, probe=g)

    mixed.defvjp(forward, backward)
    return mixed(params, mix)
