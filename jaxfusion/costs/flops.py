"""Counts the FLOPs of a function's matrix products from its jaxpr, including loop iterations."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params


def count_flops(function: Callable, *arguments: Any) -> float:
    """Multiplications and additions of all matrix products in one call, summed over all devices.

    Args:
      arguments: arrays or their shapes; nothing is computed.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _dot(equation)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [_of(sub) for sub in jaxprs_in_params(equation.params)]
        # A conditional counts as its most expensive branch.
        total += times * (max(inner, default=0.0) if equation.primitive.name == "cond"
                          else sum(inner))
    return total


def _dot(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
