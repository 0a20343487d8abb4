"""Compares the collapsed Transformer Softmax with the authors' layer in PyTorch.

    python benchmarks/fusion.py --out fusion.json

Same parameters, same states, float32, no dropout. Times the forward pass, and the gradient (forward
and backward) of a scalar of the features with respect to the fusion's parameters; the states are
frozen inputs without gradients.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_reference
from flax import linen as nn
from timing import alternate, compiled, machine, medians, parser, report, show, speedup

from jaxfusion.nn.fusion import TransformerSoftmax

BATCH = 4


@dataclass(frozen=True)
class Problem:
    """One random fusion with its input, and the vector that reduces its output to a scalar."""

    module: TransformerSoftmax
    params: Any
    states: jax.Array  # [L B S D]
    probe: jax.Array  # [B S D]


def make_problem(tokens: int, d_model: int, layers: int) -> Problem:
    """Random states of `tokens` tokens; parameters differ from their initial values, so that all of
    them matter."""
    module = TransformerSoftmax(layers, d_model, dropout=0.0)
    keys = iter(jax.random.split(jax.random.key(0), 4))
    shape = (layers, BATCH, tokens // BATCH, d_model)
    states = jax.random.normal(next(keys), shape)
    params = nn.unbox(module.init(next(keys), states[:, :1, :1], jnp.ones((1, 1), bool)))["params"]
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(next(keys), len(leaves))
    moved = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, noise, strict=True)]
    probe = jax.random.normal(next(keys), shape[1:])
    return Problem(module, jax.tree.unflatten(tree, moved), states, probe)


def make_ours(problem: Problem) -> tuple[dict[str, Callable], dict[str, float]]:
    """Our forward and gradient calls, and the compilation seconds of each."""
    mask = jnp.ones(problem.states.shape[1:3], bool)

    def forward(params, states):
        return problem.module.apply({"params": params}, states, mask)[0]

    def scalar(params, states, probe):
        return jnp.sum(forward(params, states) * probe)

    args = (problem.params, problem.states)
    run_forward, forward_seconds = compiled(jax.jit(forward), *args)
    run_gradient, gradient_seconds = compiled(jax.jit(jax.grad(scalar)), *args, problem.probe)
    calls = {
        "forward": lambda: jax.block_until_ready(run_forward(*args)),
        "gradient": lambda: jax.block_until_ready(run_gradient(*args, problem.probe)),
    }
    return calls, {"forward": forward_seconds, "gradient": gradient_seconds}


def make_theirs(problem: Problem) -> tuple[dict[str, Callable], torch.nn.Module]:
    """PyTorch's forward and gradient calls, and the layer that stores the gradients."""
    layers, _, _, d_model = problem.states.shape
    layer = torch_reference.TransformerSoftmax(layers, d_model, problem.module.d_ff, dropout=0.0)
    torch_reference.copy_params({"fusion": problem.params}, fusion=layer)
    states = torch.from_numpy(np.moveaxis(np.array(problem.states), 0, 2).copy())
    probe = torch.from_numpy(np.array(problem.probe))

    def gradient():
        layer.train().zero_grad()
        (layer(states) * probe).sum().backward()

    def forward():
        with torch.inference_mode():
            return layer.eval()(states)

    return {"forward": forward, "gradient": gradient}, layer


def differences(
    ours: dict[str, Callable], theirs: dict[str, Callable], layer: torch.nn.Module
) -> dict[str, float]:
    """Largest differences from PyTorch, each tensor's relative to its largest entry."""
    features = relative(torch.from_numpy(np.array(ours["forward"]())), theirs["forward"]())
    theirs["gradient"]()
    ours_as_theirs = copy.deepcopy(layer)
    torch_reference.copy_params({"fusion": ours["gradient"]()}, fusion=ours_as_theirs)
    pairs = zip(ours_as_theirs.parameters(), layer.parameters(), strict=True)
    gradients = max(relative(a.detach(), b.grad) for a, b in pairs)
    return {"features": features, "gradients": gradients}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def measure(problem: Problem, repeats: int) -> dict[str, Any]:
    """Checks that both compute the same result, then times them."""
    ours, compile_seconds = make_ours(problem)
    theirs, layer = make_theirs(problem)
    result = {"largest_relative_difference": differences(ours, theirs, layer)}
    for what in ("forward", "gradient"):
        seconds = alternate({"jaxfusion": ours[what], "torch": theirs[what]}, repeats)
        result[what] = {
            "seconds": seconds, "median_seconds": medians(seconds),
            "compile_seconds": compile_seconds[what],
            "times_faster": speedup(seconds, "jaxfusion", "torch"),
        }
    return result


def main() -> None:
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--tokens", type=int, default=512, help=f"a multiple of {BATCH}")
    flags.add_argument("--d_model", type=int, default=1024)
    flags.add_argument("--layers", type=int, default=24)
    args = flags.parse_args()
    result = {
        "benchmark": "fusion", "machine": machine(),
        "tokens": args.tokens, "d_model": args.d_model, "layers": args.layers,
    }
    result |= measure(make_problem(args.tokens, args.d_model, args.layers), args.repeats)
    rows = [
        [what, *(f"{1e3 * seconds:.1f} ms" for seconds in result[what]["median_seconds"].values()),
         f"{result[what]['times_faster']['of_medians']:.1f}×",
         f"{result[what]['compile_seconds']:.2f} s"]
        for what in ("forward", "gradient")
    ]
    show(f"Transformer Softmax, {args.tokens} tokens, D={args.d_model}, L={args.layers}",
         ["", "jaxfusion", "torch", "times faster", "compilation"], rows)
    report(result, args.out)


if __name__ == "__main__":
    main()
