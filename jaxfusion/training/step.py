"""One training step: loss and gradient of the trained part, and its update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxfusion.nn.bridge import Params
from jaxfusion.sharding.rules import constrain
from jaxfusion.training.state import Flat, State, merge

Metrics = dict[str, Array]
# (parameter tree, batch, dropout key) -> mean loss of the targets, and their number.
Loss = Callable[[Params, Any, Array], tuple[Array, Array]]


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, schedules: dict[str, Callable],
    shardings: State | None = None, accumulate: int = 1,
) -> Callable[[State, Flat, Any, Array], tuple[State, Metrics]]:
    """The jitted step `(state, frozen, batch, key) -> (state, metrics)`; the state is donated.

    Args:
      loss: of a batch, under all parameters.
      schedules: learning rate by group name, for the metrics.
      shardings: of the state; it comes out as it went in, or the second step compiles again.
      accumulate: number of micro-batches whose gradients are accumulated.
    """

    def step(state: State, frozen: Flat, batch: Any, key: Array) -> tuple[State, Metrics]:
        # The key depends on the step alone, so a resumed run drops what an undisturbed one drops.
        key = jax.random.fold_in(key, state.step)
        value, targets, grads = gradient(loss, state.trainable, frozen, batch, key, accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "target_tokens": targets,
            **{f"learning_rate/{name}": rate(state.step) for name, rate in schedules.items()},
        }
        return State(state.step + 1, trainable, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def gradient(
    loss: Loss, trainable: Flat, frozen: Flat, batch: Any, key: Array, accumulate: int = 1
) -> tuple[Array, Array, Flat]:
    """Mean loss of a batch, its number of targets, and the gradient of the trained part.

    With accumulation it is still the mean over all targets of the batch.
    """

    def total(trainable: Flat, part: Any, key: Array):
        mean, count = loss(merge(trainable, frozen), part, key)
        return mean * (count if accumulate > 1 else 1), count

    grad = jax.value_and_grad(total, has_aux=True)
    if accumulate == 1:
        (mean, count), grads = grad(trainable, batch, key)
        return mean, count, grads

    def add(sums, part):
        number, rows = part
        (value, count), grads = grad(trainable, rows, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, sums, (value, count.astype(jnp.float32), grads)), None

    # Strided split, so that each micro-batch is spread over all devices.
    parts = jax.tree.map(lambda x: jnp.moveaxis(
        x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
    parts = jax.tree.map(lambda x: constrain(x, None, "batch", *[None] * (x.ndim - 2)), parts)
    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(
        add, (zero, zero, jax.tree.map(jnp.zeros_like, trainable)), (jnp.arange(accumulate), parts))
    value, count, grads = sums
    return value / jnp.maximum(count, 1), count, jax.tree.map(
        lambda x: x / jnp.maximum(count, 1), grads)
