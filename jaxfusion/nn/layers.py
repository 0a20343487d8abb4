"""Layers that both towers share. Letters of shapes: docs/architecture.md."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxfusion.nn import quantised
from jaxfusion.sharding.rules import constrain

Names = tuple[str | None, ...]


def fan_in_normal(fan_in: int, gain: float = 1.0) -> Callable:
    """Normal initialiser with standard deviation `gain / sqrt(fan_in)`."""
    return nn.initializers.normal(gain / math.sqrt(fan_in))


def symmetric_uniform(bound: float) -> Callable:
    """Uniform initialiser on [-bound, bound]; PyTorch's `nn.Linear` has bound `1/sqrt(fan_in)`."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def named(init: Callable, *names: str | None) -> Callable:
    """The initialiser `init` of a parameter whose axes bear these logical names."""
    return nn.with_logical_partitioning(init, names)


ACTIVATIONS = {
    "silu": jax.nn.silu, "relu": jax.nn.relu, "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


# What a backward pass keeps of a block; the rest it computes again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """A block for `nn.scan`, by `none` (it keeps everything) or a name in `REMAT_POLICIES`."""
    if remat == "none":
        return block
    return nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)


class Linear(nn.Module):
    """A linear map of an input's last axes. Its kernel may be quantised: it then has a `scale`.

    Attributes:
      shape: the kernel's: axes that are read, then those that come out.
      names: the kernel's logical axes.
      init: the kernel's initialiser.
      bias_init: the bias's initialiser; None: no bias.
      inputs: how many of the kernel's axes are read.
    """

    shape: tuple[int, ...]
    names: Names
    init: Callable
    dtype: jnp.dtype = jnp.float32
    bias_init: Callable | None = None
    inputs: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        read, out = self.shape[: self.inputs], self.shape[self.inputs :]
        kernel = self.param("kernel", named(self.init, *self.names), self.shape, self.dtype)
        # One product of two matrices: gradients of einsums over more axes need transposed copies,
        # which take CPUs as long as the products.
        width = math.prod(read)
        rows = x.astype(self.dtype).reshape(-1, width)
        if self.has_variable("params", "scale"):
            scale = self.get_variable("params", "scale")
            y = quantised.product(rows, kernel, scale, self.inputs)
        else:
            quantised.check_floats(self.path, kernel)
            y = rows @ kernel.astype(self.dtype).reshape(width, -1)
        y = y.reshape(*x.shape[: x.ndim - self.inputs], *out)
        if self.bias_init is None:
            return y
        init = named(self.bias_init, *self.names[self.inputs :])
        return y + self.param("bias", init, out, self.dtype).astype(self.dtype)


class RMSNorm(nn.Module):
    """`x / rms(x) * (scale + offset)`, in float32 for any dtype of x (Zhang & Sennrich, 2019)."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        init = named(nn.initializers.ones, "norm")
        scale = self.param("scale", init, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (normed * (scale.astype(jnp.float32) + self.offset)).astype(self.dtype)


class LayerNorm(nn.Module):
    """`(x − mean) / std * scale + bias`, in float32 for any dtype of x (arXiv:1607.06450)."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        init = named(nn.initializers.ones, "norm")
        scale = self.param("scale", init, (x.shape[-1],), self.dtype)
        centred = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * scale.astype(jnp.float32)
        if self.bias:
            init = named(nn.initializers.normal(0.1), "norm")
            y = y + self.param("bias", init, (x.shape[-1],), self.dtype).astype(jnp.float32)
        return y.astype(self.dtype)


class Embedding(nn.Module):
    """A table of token embeddings; `attend` is the tied output head. A quantised table has a
    `scale`."""

    vocab_size: int
    d_model: int
    init: Callable
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = named(self.init, "vocab", "embed")
        self.embedding = self.param(
            "embedding", init, (self.vocab_size, self.d_model), self.dtype
        )
        self.scale = self.get_variable("params", "scale")  # [V 1]; None: not quantised
        if self.scale is None:
            quantised.check_floats(self.path, self.embedding)

    def __call__(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        # Every device reads its columns for its neighbours' tokens too, and then they exchange: the
        # table stays where it is, and no device ever holds the vectors of the whole batch.
        tokens = constrain(tokens, "looked_up", "length")
        if self.scale is None:
            vectors = jnp.take(self.embedding.astype(self.dtype), tokens, axis=0)
        else:
            vectors, scale = (jnp.take(x, tokens, axis=0) for x in (self.embedding, self.scale))
            vectors = (vectors.astype(jnp.float32) * scale).astype(self.dtype)
        return constrain(vectors, "looked_up", "length", "embed")

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits against every embedding, accumulated in float32."""
        logits = jnp.einsum(
            "...d,vd->...v", x, self.embedding.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits if self.scale is None else logits * self.scale[:, 0]


def weighted_sums(
    weights: Float[Array, "B P N"], x: Float[Array, "B N E"]
) -> Float[Array, "B P E"]:
    """P weighted sums over the slots of every row, in float32."""
    return jnp.einsum("bpn,bne->bpe", weights, x, preferred_element_type=jnp.float32,
                      precision=jax.lax.Precision.HIGHEST)


def pick(x: Float[Array, "B N D"], slots: Int[Array, "B Q"] | None) -> Float[Array, "B Q D"]:
    """Some slots of every row; None is all."""
    return x if slots is None else jnp.take_along_axis(x, slots[:, :, None], axis=1)
