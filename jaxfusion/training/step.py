"""One training step: loss and gradient of the trained part, and its update."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array

from jaxfusion.nn.bridge import Params
from jaxfusion.training.state import Flat, State, merge

Metrics = dict[str, Array]
# (parameter tree, batch, dropout key) -> mean loss of the targets, and their number.
Loss = Callable[[Params, Any, Array], tuple[Array, Array]]


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, schedules: dict[str, Callable],
    shardings: State | None = None,
) -> Callable[[State, Flat, Any, Array], tuple[State, Metrics]]:
    """The jitted step `(state, frozen, batch, key) -> (state, metrics)`; the state is donated.

    Args:
      loss: of a batch, under all parameters.
      schedules: learning rate by group name, for the metrics.
      shardings: of the state; it comes out as it went in, or the second step compiles again.
    """

    def of_trainable(trainable: Flat, frozen: Flat, batch: Any, key: Array):
        return loss(merge(trainable, frozen), batch, key)

    def step(state: State, frozen: Flat, batch: Any, key: Array) -> tuple[State, Metrics]:
        # The key depends on the step alone, so a resumed run drops what an undisturbed one drops.
        key = jax.random.fold_in(key, state.step)
        (value, targets), grads = jax.value_and_grad(of_trainable, has_aux=True)(
            state.trainable, frozen, batch, key
        )
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
