"""AdamW with a learning rate and weight decay for each group of trained parameters."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import optax

from jaxfusion.errors import InputError, near_match
from jaxfusion.fields import GroupConfig, OptimizerConfig


def group_of_each(paths: Iterable[str], groups: dict[str, GroupConfig]) -> dict[str, str]:
    """The group of every parameter path that some pattern matches in full; others are frozen.

    Raises:
      InputError: a pattern matches nothing, or two groups claim one parameter.
    """
    paths, owner = list(paths), {}
    for name, group in groups.items():
        for pattern in group.patterns:
            matched = [path for path in paths if re.fullmatch(pattern, path)]
            if not matched:
                raise InputError(
                    f"optimizer.groups.{name}: pattern '{pattern}' matches no parameter"
                    f"{near_match(pattern, paths)}"
                )
            for path in matched:
                if owner.setdefault(path, name) != name:
                    raise InputError(
                        f"parameter '{path}' is in two groups, '{owner[path]}' and '{name}'"
                    )
    return owner


def make_schedules(config: OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """The learning rate of each group by step."""
    return {name: make_schedule(config, group.learning_rate, steps)
            for name, group in config.groups.items()}


def make_schedule(
    config: OptimizerConfig, learning_rate: float, steps: int
) -> Callable[[Any], Any]:
    """Linear warm-up from 0, then cosine to 0 at `steps`, or constant."""
    # As in transformers; a single step has no warm-up, in which it would learn nothing.
    warmup = min(math.ceil(config.warmup_fraction * steps), steps - 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, 1))
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, warmup), optax.constant_schedule(learning_rate)],
        [warmup],
    )


def make_optimizer(
    config: OptimizerConfig, owner: dict[str, str], steps: int
) -> optax.GradientTransformation:
    """Clips the global gradient norm, then AdamW (arXiv:1711.05101), each group at its own rate.

    Args:
      owner: the group of every trained parameter, by path.
      steps: length of the schedule.
    """
    schedules = make_schedules(config, steps)
    adamw = {
        name: optax.adamw(
            schedules[name], config.b1, config.b2, config.eps, weight_decay=group.weight_decay,
        )
        for name, group in config.groups.items()
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), optax.partition(adamw, owner)
    )
