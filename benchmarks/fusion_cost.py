"""What our own fusion costs beside Transformer Softmax: parameters, FLOPs and time.

    python benchmarks/fusion_cost.py --out benchmarks/results/fusion_cost.json

Of the fusion alone at the size of mT5-large, and of a whole training step of the quickstart
(gradient of all that trains). The two take turns.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from claims import OWN, bridges
from flax import linen as nn
from timing import alternate, compiled, machine, medians, parser, report, show

from jaxfusion.nn.fusion import LayerAttention, TransformerSoftmax
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.testing.debug import make_inputs
from jaxfusion.training.bridge import prepare
from jaxfusion.training.flops import count_flops
from jaxfusion.training.loop import put_batch
from jaxfusion.training.step import gradient

THEIRS = "transformer_softmax"
LAYERS, ROWS, TOKENS, WIDTH = 24, 4, 128, 1024  # of the fusion alone


def measure(calls: dict[str, tuple[Callable, tuple, int]], repeats: int) -> dict[str, Any]:
    """Of each function on its arguments, and its number of fusion parameters, what it costs."""
    programs = {name: (compiled(jax.jit(f), *args)[0], args)
                for name, (f, args, _) in calls.items()}
    seconds = alternate({
        name: lambda program=program, args=args: jax.block_until_ready(program(*args))
        for name, (program, args) in programs.items()
    }, repeats)
    return {
        name: {"parameters": parameters, "flops": count_flops(f, *args),
               "seconds": seconds[name], "median_seconds": medians(seconds)[name]}
        for name, (f, args, parameters) in calls.items()
    }


def fusion_alone(module: nn.Module) -> tuple[Callable, tuple, int]:
    """Gradient of a scalar of the features under training noise."""
    states = jax.random.normal(jax.random.key(0), (LAYERS, ROWS, TOKENS, WIDTH))
    real = jnp.ones((ROWS, TOKENS), bool)
    params = nn.unbox(module.init(jax.random.key(1), states[:, :1, :1], real[:1, :1]))

    def scalar(params, states):
        out, _ = module.apply(params, states, real, deterministic=False,
                              rngs={"dropout": jax.random.key(2)})
        return jnp.sum(out**2)

    return jax.grad(scalar), (params, states), _size(params)


def whole_step(config, mesh) -> tuple[Callable, tuple, int]:
    """Gradient of the first training batch's loss."""
    config = replace(config, projector=replace(config.projector, warm_start=False))
    run = prepare(make_inputs(config), mesh)
    batch = put_batch(run.batches[0], mesh)

    def step(trainable, frozen, batch):
        return gradient(run.loss, trainable, frozen, batch, jax.random.key(0))

    fusion = {path: x for path, x in run.trainable.items() if path.startswith("fusion/")}
    return step, (run.trainable, run.frozen, batch), _size(fusion)


def _size(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def main() -> None:
    args = parser(__doc__, repeats=15).parse_args()
    modules = {OWN: LayerAttention(LAYERS), THEIRS: TransformerSoftmax(LAYERS, WIDTH)}
    result = {"machine": machine(), "alone": measure(
        {name: fusion_alone(module) for name, module in modules.items()}, args.repeats)}
    mesh, configs = make_mesh(1, 1, 1), bridges()
    with jax.set_mesh(mesh):
        result["step"] = measure(
            {name: whole_step(configs[name], mesh) for name in modules}, args.repeats)
    for part in ("alone", "step"):
        show(part, ["", "parameters", "GFLOPs", "ms"], [
            [name, f"{x['parameters']:,}", f"{x['flops'] / 1e9:.1f}",
             f"{1e3 * x['median_seconds']:.0f}"] for name, x in result[part].items()])
    report(result, args.out)


if __name__ == "__main__":
    main()
