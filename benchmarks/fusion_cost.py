"""Measures the cost of feature noise in a training step of the quickstart.

    python benchmarks/fusion_cost.py --out benchmarks/results/fusion_cost.json

Times the gradient of all trained parameters on the first batch; the bridges take turns.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
from claims import FUSION_NOISE, NOISY, bridges, with_noise
from timing import alternate, compiled, machine, medians, parser, report

from jaxfusion.bridge.job import prepare
from jaxfusion.costs.flops import count_flops
from jaxfusion.fields import Config
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.state import count_params
from jaxfusion.training.step import gradient
from jaxfusion.training.trainer import put_batch


def make_step(config: Config, mesh) -> tuple[Callable, tuple]:
    """The gradient and its arguments."""
    config = replace(config, projector=replace(config.projector, warm_start=False))
    run = prepare(make_inputs(config), mesh)

    def step(trainable, frozen, batch):
        return gradient(run.loss, trainable, frozen, batch, jax.random.key(0))

    return step, (run.trainable, run.frozen, put_batch(run.batches[0], mesh))


def main() -> None:
    args = parser(__doc__, repeats=15).parse_args()
    every, mesh = bridges(), make_mesh(1, 1, 1)
    calm = NOISY[FUSION_NOISE]
    configs = {calm: every[calm], FUSION_NOISE: with_noise(every[calm])}
    with jax.set_mesh(mesh):
        steps = {name: make_step(config, mesh) for name, config in configs.items()}
        programs = {name: compiled(jax.jit(step), *inputs)[0]
                    for name, (step, inputs) in steps.items()}
        seconds = alternate({
            name: lambda name=name: jax.block_until_ready(programs[name](*steps[name][1]))
            for name in steps
        }, args.repeats)
        report({"machine": machine(), "steps": {
            name: {"parameters": count_params(inputs[0]), "flops": count_flops(step, *inputs),
                   "seconds": seconds[name], "median_seconds": medians(seconds)[name]}
            for name, (step, inputs) in steps.items()
        }}, args.out)


if __name__ == "__main__":
    main()
