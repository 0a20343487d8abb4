"""Steps compiled for chips that are not there: what they take, and what the numbers rest on."""

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, get_config
from jax.sharding import NamedSharding, PartitionSpec
from program import program_cost

from jaxfusion.bridge.compile_only import TooLarge, compile_only, measure
from jaxfusion.bridge.job import prepare
from jaxfusion.config import from_config_dict
from jaxfusion.costs import chips
from jaxfusion.errors import InputError
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.optimizer import make_optimizer

LAYERS, ROWS, WIDTH, INNER = 6, 256, 1024, 4096


@pytest.fixture(scope="module", autouse=True)
def flags_of_libtpu():
    """libtpu reads XLA's flags again, and ends the process at unknown ones."""
    jax.devices()  # by now the CPU has them
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        yield


def config_of(name, arg="debug", **train):
    config = make_inputs(from_config_dict(get_config(ROOT / "configs" / f"{name}.py", arg)))
    return replace(config, train=replace(config.train, **train))


def compiled(devices, remat, argument=2):
    """The gradient of a stack of two-matrix layers, split over `fsdp` and `tensor`."""
    fsdp = 2 if argument == 2 else len(devices)
    mesh = make_mesh(1, fsdp, len(devices) // fsdp, devices)

    def shape(*sizes, spec):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16,
                                    sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(up, down, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable
                               ) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x, (up, down))[0].astype(jnp.float32))

    with jax.set_mesh(mesh):
        arguments = (shape(LAYERS, WIDTH, INNER, spec=(None, "fsdp", "tensor")),
                     shape(LAYERS, INNER, WIDTH, spec=(None, "tensor", "fsdp")),
                     shape(ROWS, WIDTH, spec=("fsdp", None)))
        place = arguments[argument].sharding
        return jax.jit(jax.grad(loss, argnums=argument), out_shardings=place).lower(
            *arguments).compile()


@pytest.mark.parametrize("where", ["v4-8", "v5e-8", "cpu"])
@pytest.mark.parametrize("remat", [False, True])
def test_loops_count_as_often_as_they_run(where, remat):
    """FLOPs by hand: two products forward, two backward, one again; XLA counts one layer."""
    devices = jax.devices() if where == "cpu" else chips.topology_devices(where)
    program = compiled(devices, remat)
    cost = program_cost(program.as_text())
    products = 4 + remat  # of the second product the result is not needed again
    assert cost.unknown == 0
    by_hand = products * 2 * ROWS * WIDTH * INNER * LAYERS / len(devices)
    assert cost.flops == pytest.approx(by_hand, rel=1e-6)
    assert program.cost_analysis()["flops"] < by_hand / 2
    assert cost.sent > 0
    # Every device reads at least its part of the weights, once in each direction.
    assert cost.bytes > 2 * 2 * LAYERS * WIDTH * INNER * 2 / len(devices)


def test_what_is_sent_is_counted_by_hand():
    """Weights gathered, their gradient summed and scattered, each once for each layer."""
    devices = chips.topology_devices("v4-8")
    cost = program_cost(compiled(devices, False, argument=0).as_text())
    weight, others = 2 * WIDTH * INNER, len(devices) - 1  # in bfloat16
    scattered = cost.collectives["reduce-scatter"]
    assert scattered[0] == LAYERS
    by_hand = LAYERS * weight * others / len(devices)
    assert by_hand <= scattered[1] < 1.2 * by_hand  # the compiler pads
    # Up and down forward, down again backward; and inner activations, for the weights' gradient.
    gathered = LAYERS * (3 * weight + 2 * ROWS * INNER) * others / len(devices)
    assert cost.collectives["all-gather"] == (4 * LAYERS, gathered)


def test_what_a_program_leaves_open_is_said():
    loop = """
HloModule m, num_partitions=4

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,8] all-reduce(%y), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[8,8]) tuple(%j, %z)
}

%cond (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(10)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,8], k: s32[]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  %k = s32[] parameter(1)
  %zero = s32[] constant(START)
  %t = (s32[], f32[8,8]) tuple(%FIRST, %a)
  %w = (s32[], f32[8,8]) while(%t), condition=%cond, body=%body
  %fa = f32[8,8] custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  %gemm = (f32[8,8], s8[64]) custom-call(%a, %a), custom_call_target="__cublas$gemm", \
backend_config={"gemm":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %r = f32[8,8] get-tuple-element(%w), index=1
}
"""
    product = 2 * 8**3
    known = program_cost(loop.replace("START", "4").replace("FIRST", "zero"))
    assert known.flops == 6 * product + product and (known.unknown, known.silent) == (0, 1)
    assert known.collectives == {"all-reduce": (6, 6 * 2 * 8 * 8 * 4 * 3 / 4)}
    open_ended = program_cost(loop.replace("START", "0").replace("FIRST", "k"))
    assert open_ended.unknown == 1 and open_ended.flops == 2 * product


def test_the_compilers_own_refusal_is_one_line(cache_dir):
    config = config_of("tpu_v4", batch_size=1 << 18)
    with pytest.raises(TooLarge, match=r"takes [\d.]+ GiB or more .* TPU v5 lite has 15"):
        measure(config, chips.topology_devices("v5e-1"))


@pytest.mark.parametrize("topology", [
    "v4-8", *(pytest.param(x, marks=pytest.mark.slow) for x in ("v5e-8", "v5p-8", "v6e-8"))])
def test_the_debug_step_compiles_for_every_tpu(topology, cache_dir, capsys):
    needs = compile_only(config_of("tpu_v4"), topology)
    out = capsys.readouterr()
    assert json.loads(out.out.splitlines()[-1])["peak"] == needs.peak
    assert "at the chip's peak" in out.err and "model FLOPs" in out.err
    assert 0 < needs.peak < needs.allowed
    assert needs.chips == {"v4": 4, "v5p": 4}.get(topology.split("-")[0], 8)
    chip = chips.chip_of(chips.topology_devices(topology)[0])
    assert needs.least_seconds * chip.flops * needs.chips == pytest.approx(needs.model_flops)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4-8", "v4-32"])
def test_the_full_step_fits(topology):
    needs = compile_only(config_of("tpu_v4", None), topology)
    assert needs.peak < needs.allowed


def test_arguments_are_what_a_run_holds(cache_dir):
    config = config_of("gpu", batch_size=16, accumulate=2)
    needs, _ = measure(config, jax.devices())
    mesh = make_mesh(1, -1, 1)
    with jax.set_mesh(mesh):
        run = prepare(config, mesh)
        moments = make_optimizer(config.optimizer, run.groups, 10).init(run.trainable)

    def held(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert held([run.trainable, run.frozen]) == needs.weights
    assert abs(held(moments) - needs.optimizer) < 100  # counters
    assert needs.peak >= needs.weights + needs.optimizer + needs.batch


def test_too_large_says_what_would_fit(cache_dir, monkeypatch, capsys):
    config = config_of("gpu", batch_size=32)
    config = replace(config, encoder=replace(config.encoder, dtype="bfloat16"),
                     decoder=replace(config.decoder, remat="none"))
    roomy, _ = measure(config, jax.devices())
    parts = replace(config, train=replace(config.train, accumulate=2))
    parts = replace(parts, **{role: replace(getattr(parts, role), dtype="bfloat16", remat="full")
                              for role in ("encoder", "decoder")})
    small, _ = measure(parts, jax.devices())
    assert small.activations < 0.7 * roomy.activations
    limit = (small.peak + roomy.peak) / 2
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e12, limit, 1e12, 1e12))
    with pytest.raises(InputError, match=r"the step takes .* GiB of each chip") as error:
        compile_only(config)
    flags = re.findall(r"--config\.(\w+)\.(\w+)=(\w+)", str(error.value))
    assert "it fits" in str(error.value) and flags
    for group, name, value in flags:
        part = getattr(config, group)
        kind = type(getattr(part, name))
        config = replace(config, **{group: replace(part, **{name: kind(value)})})
    assert compile_only(config).peak <= limit
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e12, 1.0, 1e12, 1e12))
    with pytest.raises(InputError, match=r"it does not fit with .* either; take more dev"):
        compile_only(replace(config, train=replace(config.train, accumulate=4)))


def test_names_of_slices():
    with pytest.raises(InputError, match="unknown topology 'v4-7'; known: v4-8, v4-16"):
        chips.topology_devices("v4-7")
    for name in ("v4-64", "v5e-1", "v5e-16", "v6e-256"):
        cores = 2 if name.startswith("v4") else 1
        assert len(chips.topology_devices(name)) == int(name.split("-")[1]) // cores


def test_flops_of_a_jaxpr():
    from jaxfusion.costs.flops import count_flops

    x, w = jnp.zeros((3, 8, 16)), jnp.zeros((5, 16, 16))

    def stack(x, w):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.dot)(x, w), None), x, w)[0]

    assert count_flops(stack, x, w) == 2 * math.prod(x.shape) * 16 * 5
    grad = jax.grad(lambda x: jnp.sum(jax.checkpoint(stack)(x, w) ** 2))
    assert count_flops(grad, x) >= 2 * 2 * math.prod(x.shape) * 16 * 5
