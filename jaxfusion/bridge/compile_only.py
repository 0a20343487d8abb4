"""The training step compiled for hardware that need not be there: its memory, FLOPs and time.

Nothing is read or computed: the step is lowered from shapes alone.
"""

import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxfusion.costs.chips import GIB, chip_of, topology_devices
from jaxfusion.costs.flops import count_flops
from jaxfusion.data.batching import DECODER_STEP
from jaxfusion.errors import InputError, first_line
from jaxfusion.fields import ROLES, Config
from jaxfusion.hf.known_shapes import backbone_shape
from jaxfusion.nn.bridge import Batch
from jaxfusion.sharding.mesh import make_mesh, sharding
from jaxfusion.training.build import Plan, plain, plan_model
from jaxfusion.training.optimizer import make_optimizer, make_schedules
from jaxfusion.training.state import State
from jaxfusion.training.step import gradient, make_train_step
from jaxfusion.training.trainer import batch_multiple

STEPS = 1000  # of the schedule; any number gives the same program


@dataclass(frozen=True)
class Needs:
    """What one step takes of each chip, and of all chips together where it says so.

    Attributes:
      chip, chips, mesh: what it was compiled for.
      weights, optimizer, batch: bytes of the step's arguments. activations: bytes of all else that
        lives at once. peak: their sum. allowed: bytes that a program may use; None if not known.
      model_flops: of all chips, without what is computed again.
      least_seconds: a step's time if the model's FLOPs ran at the chip's published peak; None if
        that is not known.
      compile_seconds: what compiling took here.
    """

    chip: str
    chips: int
    mesh: dict[str, int]
    weights: float
    optimizer: float
    batch: float
    activations: float
    peak: float
    allowed: float | None
    model_flops: float
    least_seconds: float | None
    compile_seconds: float


class TooLarge(InputError):
    """The program does not fit the chip's memory."""


def compile_only(config: Config, topology: str | None = None) -> Needs:
    """Compiles the step, prints its needs as a table and, as the last line of stdout, as JSON.

    The batch is the largest without packing; what scoring takes is not in it.

    Args:
      topology: a TPU slice such as `v4-32`; None takes the devices that are here.

    Raises:
      InputError: it cannot be compiled, or does not fit; then with a setting that would fit.
    """
    devices = jax.devices() if topology is None else topology_devices(topology)
    try:
        needs, _ = measure(config, devices)
    except TooLarge as error:
        raise InputError(f"{error}; {_what_fits(config, devices, topology)}") from None
    _print(needs)
    print(json.dumps(asdict(needs)))
    return needs


def measure(config: Config, devices: list[jax.Device]) -> tuple[Needs, jax.stages.Compiled]:
    """Compiles the step for the devices.

    Returns:
      What it takes, and the program.

    Raises:
      TooLarge: the program does not fit.
      InputError: the mesh or the batch does not divide.
    """
    mesh = make_mesh(**vars(config.mesh), devices=devices)
    shapes = {role: backbone_shape(role, getattr(config, role).checkpoint,
                                   getattr(config, role).revision) for role in ROLES}
    batch_multiple(config.train, mesh)
    with jax.set_mesh(mesh):
        plan = plan_model(config, shapes, mesh)
        state, batch, key = _arguments(config, plan, mesh)
        step = _step(config, plan, state)
        clock = time.monotonic()
        lowered = step.lower(state, plan.frozen, batch, key)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _refusal(error, devices[0]) from None
        seconds = time.monotonic() - clock
        useful = count_flops(lambda *x: gradient(plain(plan.bridge).loss, *x),
                             state.trainable, plan.frozen, batch, key)
    memory = compiled.memory_analysis()
    parts = {"weights": _bytes([state.trainable, plan.frozen]),
             "optimizer": _bytes(state.opt_state), "batch": _bytes(batch)}
    peak = peak_bytes(memory)
    activations = peak - memory.argument_size_in_bytes
    chip = chip_of(devices[0])
    if chip is not None and peak > chip.memory:  # a GPU's compiler does not know what it has
        raise TooLarge(f"the step takes {peak / GIB:.1f} GiB of each chip, {devices[0].device_kind}"
                       f" has {chip.memory / GIB:.2f}")
    needs = Needs(
        devices[0].device_kind, len(devices), dict(mesh.shape), **parts, activations=activations,
        peak=peak, allowed=chip and chip.memory, model_flops=useful,
        least_seconds=chip and useful / len(devices) / chip.flops, compile_seconds=seconds,
    )
    return needs, compiled


def peak_bytes(memory: Any) -> int:
    """Of a program's `memory_analysis()`: what comes out takes the place of what is donated."""
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def _arguments(config: Config, plan: Plan, mesh) -> tuple[State, Batch, jax.ShapeDtypeStruct]:
    """The step's arguments at their largest, as shapes on the mesh."""
    optimizer = make_optimizer(config.optimizer, plan.groups, STEPS)
    whole = sharding(mesh)

    def placed(path, leaf):
        name = path[-1].key if path and hasattr(path[-1], "key") else None
        return leaf.update(sharding=plan.params[name].sharding if name in plan.params else whole)

    moments = jax.tree_util.tree_map_with_path(
        placed, jax.eval_shape(optimizer.init, plan.trainable))
    state = State(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), plan.trainable, moments)
    return state, _batch(config, plan, mesh), jax.eval_shape(jax.random.key, 0).update(
        sharding=whole)


def _batch(config: Config, plan: Plan, mesh) -> Batch:
    """A batch whose every row is as long as the limits allow, one example in each."""
    c, rows = config.data, config.train.batch_size
    targets, text = c.max_decoder_tokens, c.max_decoder_tokens if c.text_prompt else 0
    slots = c.max_encoder_tokens
    behind = -(-(text + targets) // DECODER_STEP) * DECODER_STEP
    # BOS, the prefix and its end vector, text and answer.
    length = 1 + (plan.bridge.latents or slots) + 1 + behind
    sizes = {"enc": slots, "dec": length, "target": targets}
    place = sharding(mesh, "batch")
    return Batch(**{
        name: jax.ShapeDtypeStruct((rows, sizes[name.split("_")[0]]),
                                   bool if name == "target_mask" else jnp.int32, sharding=place)
        for name in Batch.__dataclass_fields__ if name != "enc_states"  # the encoder computes them
    })


def _step(config: Config, plan: Plan, state: State):
    """The step as `Trainer` makes it."""
    optimizer = make_optimizer(config.optimizer, plan.groups, STEPS)
    schedules = make_schedules(config.optimizer, STEPS)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return make_train_step(plan.bridge.loss, optimizer, schedules, shardings,
                           config.train.accumulate)


def _bytes(tree: Any) -> float:
    """Bytes of a tree's arrays on one device; two numbers of 4 bits share one."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               / (2 if x.dtype.name == "int4" else 1) for x in jax.tree.leaves(tree))


def _refusal(error: Exception, device: jax.Device) -> InputError:
    """The compiler's refusal as one line."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "HbmOom" not in str(error):
        return InputError(f"{device.device_kind}'s compiler refuses the step: {first_line(error)}")
    sizes = (re.search(r"Used ([\d.]+[MGT]) of ([\d.]+[MGT]) hbm", str(error)) or re.search(
        r"\(([\d.]+[MGT])\) exceeds available HBM \(([\d.]+[MGT])\)", str(error)))
    if sizes is None:
        return TooLarge(f"the step does not fit the memory of {device.device_kind}")
    used, limit = (float(x[:-1]) * {"M": 1 / 1024, "G": 1, "T": 1024}[x[-1]]
                   for x in sizes.groups())
    return TooLarge(f"the step takes {used:.1f} GiB or more of each chip, {device.device_kind} has "
                    f"{limit:.2f}")


def _what_fits(config: Config, devices: list[jax.Device], topology: str | None) -> str:
    """The first of some settings, each on top of those before it, under which the step fits."""
    chosen: list[str] = []
    for flag, changed in _savings(config, len(devices)):
        chosen.append(flag)
        print(f"does not fit; trying {' '.join(chosen)}", file=sys.stderr)
        try:
            needs, _ = measure(changed, devices)
        except TooLarge:
            continue
        except InputError:  # a batch that divides no further
            chosen.pop()
            continue
        return f"it fits ({needs.peak / GIB:.1f} GiB) with {' '.join(chosen)}"
    where = "more chips (--topology)" if topology else "more devices"
    return f"it does not fit with {' '.join(chosen)} either; take {where} or smaller backbones"


def _savings(config: Config, devices: int):
    """Settings that save memory, cheapest first, as flags and as the config with all so far."""
    if (config.mesh.data, config.mesh.tensor) != (1, 1) and config.mesh.fsdp != devices:
        config = replace(config, mesh=replace(config.mesh, data=1, fsdp=-1, tensor=1))
        yield "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor=1", config
    for role in reversed(ROLES):
        tower = getattr(config, role)
        if tower.dtype != "bfloat16":
            config = replace(config, **{role: replace(tower, dtype="bfloat16")})
            yield f"--config.{role}.dtype=bfloat16", config
    for role in reversed(ROLES):
        tower = getattr(config, role)
        if tower.remat != "full":
            config = replace(config, **{role: replace(tower, remat="full")})
            yield f"--config.{role}.remat=full", config
    while config.train.accumulate < config.train.batch_size:
        parts = 2 * config.train.accumulate
        config = replace(config, train=replace(config.train, accumulate=parts))
        yield f"--config.train.accumulate={parts}", config


def _print(needs: Needs) -> None:
    table = Table("one step", f"each of {needs.chips} × {needs.chip}", title=str(needs.mesh))
    for name in ("weights", "optimizer", "batch", "activations", "peak"):
        table.add_row(name, f"{getattr(needs, name) / GIB:.2f} GiB")
    if needs.allowed:
        table.add_row("allowed", f"{needs.allowed / GIB:.2f} GiB")
    table.add_row("model FLOPs (its share)", f"{needs.model_flops / needs.chips / 1e12:.2f} T")
    if needs.least_seconds is not None:
        table.add_row("at the chip's peak", f"{1e3 * needs.least_seconds:.0f} ms")
    table.add_row("compiled here in", f"{needs.compile_seconds:.0f} s")
    Console(stderr=True).print(table)
