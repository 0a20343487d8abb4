"""Towers in 8 and 4 bits: rounding, what a bridge computes with them, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    DECODERS,
    ENCODERS,
    debug_config,
    leave_unscored,
    losses,
    make_config,
    make_run,
    relative,
)
from test_bridge import QUERY, TARGET, TEXT, make_batch, make_bridge

from jaxfusion.bridge.job import start_from, train
from jaxfusion.config import changed, check
from jaxfusion.errors import InputError
from jaxfusion.fields import ROLES, GroupConfig
from jaxfusion.hf.load import open_tensors
from jaxfusion.nn.aligner import Aligner
from jaxfusion.nn.bridge import OWN
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.quantised import (
    dequantise,
    is_quantised,
    layout,
    product,
    quantise,
    scale_path,
)
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.open_run import open_run
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import describe
from jaxfusion.training.load import load_model
from jaxfusion.training.state import merge

KERNELS = {  # logical names and shape of a kernel, and the shapes of its scales
    "q": (("embed", "heads", "head_dim"), (64, 3, 10), (1, 3, 10), (2, 3, 10)),
    "o": (("heads", "head_dim", "embed"), (3, 64, 10), (1, 1, 10), (3, 2, 10)),
    "narrow": (("embed", "mlp"), (36, 10), (1, 10), (9, 10)),
    "blocks": (("layers", "embed", "mlp"), (5, 32, 10), (5, 1, 10), (5, 1, 10)),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_weights_are_rounded_to_the_nearest_step(name, dtype):
    names, shape, *scales = KERNELS[name]
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weights[..., 0] = 0
    integers, sizes, kept = layout("a/kernel", names, shape, dtype)
    assert sizes == scales[dtype == "int4"]
    assert all(n is None or n == m for n, m in zip(kept, names, strict=True))
    values, scale = quantise(weights, sizes, integers)
    lowest = {"int8": -128, "int4": -8}[dtype]
    whole = values.astype(int)
    assert values.dtype == integers and whole.min() == lowest and whole.max() < -lowest
    step = np.abs(dequantise(jnp.ones(shape, jnp.int8), jnp.asarray(scale)))
    error = np.abs(dequantise(jnp.asarray(values), jnp.asarray(scale)) - weights)
    # The step above the last one, of the other sign than the largest weight, is not there.
    assert np.all(error <= np.where(whole == -lowest - 1, step, step / 2) * (1 + 1e-5))
    assert np.all(whole[..., 0] == 0)
    if dtype == "int4":
        steps = 8 * step / 7  # those of a scale of max / 7
        assert error.std() < 0.95 * (np.rint(weights / steps) * steps - weights).std()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["q", "o", "narrow"])
def test_a_product_is_that_of_the_restored_weights(name, dtype):
    names, shape, *_ = KERNELS[name]
    rng, inputs = np.random.default_rng(1), 2 if name == "o" else 1
    integers, sizes, _ = layout("a/kernel", names, shape, dtype)
    held = [jnp.asarray(x) for x in quantise(rng.normal(size=shape), sizes, integers)]
    x = jnp.asarray(rng.normal(size=(7, np.prod(shape[:inputs]))), jnp.float32)
    restored = dequantise(*held).reshape(x.shape[1], -1)
    found = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(product(x, *held, inputs))))(x)
    wanted = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(x @ restored)))(x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative(ours, theirs) < 1e-5


def boxed_of(bridge):
    """Parameters with the names of their axes."""
    return jax.jit(bridge.init, static_argnums=1)(jax.random.key(0), (*ROLES, *OWN))


def in_dtype(boxed, dtype):
    """The towers' parameters as they are held in `dtype`, and with the restored weights."""
    held, restored = {}, {}
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    for keys, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        path = "/".join(str(key.key) for key in keys)
        held[path] = restored[path] = box.value
        if path.startswith(("encoder/", "decoder/")) and is_quantised(path):
            integers, sizes, _ = layout(path, box.names, box.value.shape, dtype)
            values, scale = map(jnp.asarray, quantise(np.asarray(box.value), sizes, integers))
            held |= {path: values, scale_path(path): scale}
            restored[path] = dequantise(values, scale)
    return merge(held, {}), merge(restored, {})


MORE = [("modernbert", "gemma2", "last"), ("umt5", "qwen2", "layer"),
        ("bert", "qwen3", "transformer_softmax"), ("xlm-roberta", "phi3", "last"),
        ("m2m_100", "gemma3", "global_softmax")]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("encoder,decoder,fusion", [
    ("mt5", "llama3", "global_softmax"),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)])
def test_loss_and_gradients_are_those_of_the_restored_weights(encoder, decoder, fusion, dtype):
    """In float32, with an aligner, which reads the LLM's own maps of keys and values."""
    decoder = DECODERS[decoder]
    bridge = make_bridge(fusion, encoder=ENCODERS[encoder], decoder=decoder,
                         aligner=Aligner("linear", decoder.num_layers, decoder.d_model))
    held, restored = in_dtype(boxed_of(bridge), dtype)
    batch = make_batch(QUERY, TEXT, TARGET, slots=8, length=14)

    @jax.jit
    def step(params):
        own = {part: params.pop(part) for part in OWN}
        own["aligner"]["gate"] = own["aligner"]["gate"] + 0.5
        return jax.value_and_grad(lambda own: bridge.loss({**params, **own}, batch)[0])(own)

    found, wanted = step(dict(held)), step(dict(restored))
    assert relative(found[0], wanted[0]) < 1e-5
    for ours, theirs in zip(*map(jax.tree.leaves, (found[1], wanted[1])), strict=True):
        assert float(jnp.max(jnp.abs(ours - theirs))) < 1e-5 * max(1.0, jnp.abs(theirs).max())


def test_integers_without_their_scale_are_refused():
    bridge = make_bridge("last")
    held, _ = in_dtype(boxed_of(bridge), "int8")
    batch = make_batch(QUERY, TEXT, TARGET, slots=8, length=14)
    del held["decoder"]["blocks"]["mlp"]["up"]["scale"]
    with pytest.raises(ValueError, match="mlp/up has int8 weights, and its scale is missing"):
        jax.eval_shape(bridge.loss, held, batch)


@pytest.fixture(scope="module")
def quantised_run(cache_dir, tmp_path_factory):
    """A short run over an LLM in 8 bits and an encoder in 4."""
    workdir = tmp_path_factory.mktemp("quantised") / "run"
    config = make_config(cache_dir, encoder__dtype="int4", decoder__dtype="int8")
    with pytest.MonkeyPatch.context() as patch:
        leave_unscored(patch)
        train(config, workdir)
    return config, workdir


def test_a_run_learns_and_its_export_has_the_towers_own_weights(quantised_run, tmp_path):
    config, workdir = quantised_run
    steps = losses(workdir)
    assert steps[12] < 0.8 * steps[2]
    run = open_run(workdir)
    kernel = run.model.frozen["decoder/blocks/mlp/up/kernel"]
    assert kernel.dtype == jnp.int8
    assert run.model.frozen["encoder/blocks/mlp/up/kernel"].dtype == jnp.int4
    assert run.model.frozen["decoder/final_norm/scale"].dtype == jnp.bfloat16
    export(workdir, tmp_path / "out", merge=True)
    original, exported = (open_tensors(path).read("model.layers.0.mlp.up_proj.weight") for path in (
        Path(config.decoder.checkpoint), tmp_path / "out" / "decoder"))
    np.testing.assert_array_equal(exported, original)
    scale = run.model.frozen["decoder/blocks/mlp/up/scale"][0]
    wanted = quantise(original.T, scale.shape, jnp.dtype("int8"))
    np.testing.assert_array_equal(kernel[0], wanted[0])


def test_a_run_may_go_on_in_another_dtype(quantised_run):
    config, _ = quantised_run
    assert changed(config, replace(config, decoder=replace(config.decoder, dtype="int4"))) == []


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_is_quantised_does_not_train(cache_dir, dtype):
    config = make_config(cache_dir, encoder__dtype=dtype)
    groups = {**config.optimizer.groups, "more": GroupConfig(("encoder/final_norm/.*",))}
    config = replace(config, optimizer=replace(config.optimizer, groups=groups))
    with pytest.raises(InputError, match=f"encoder.dtype is '{dtype}', but optimizer.groups.more "
                                         "trains 'encoder/final_norm/scale'; set encoder.dtype"):
        load_model(config, make_mesh())


def test_what_an_earlier_run_trained_in_a_tower_is_not_cut_to_integers(tiny, tmp_path):
    make_run(tmp_path / "first", tiny, trained=("encoder/blocks/mlp/.*",))
    config = open_run(tmp_path / "first").config
    config = replace(config, encoder=replace(config.encoder, dtype="int8"), optimizer=replace(
        config.optimizer, groups={"bridge": GroupConfig(("projector/.*",))}))
    with pytest.raises(InputError, match=r"set encoder\.dtype to bfloat16"):
        start_from(load_model(config, make_mesh()), tmp_path / "first")


def test_lens_moves_floats_alone():
    config = debug_config(decoder={"dtype": "int8"})
    with pytest.raises(InputError, match=r"decoder\.dtype is 'int8', which Lens cannot move; set "
                                         r"decoder\.dtype to bfloat16 or float32"):
        check(config)


def test_no_float_copy_of_a_tower_is_kept(cache_dir):
    """The backward pass restores a layer's weights when it needs them."""
    shape = DecoderConfig(vocab_size=64, d_model=256, d_ff=1024, num_layers=12, num_heads=4,
                          num_kv_heads=4, head_dim=64)
    needs = {}
    for dtype in ("bfloat16", "int8", "int4"):
        bridge = make_bridge("last", decoder=shape)
        bridge = replace(bridge, decoder=bridge.decoder.clone(dtype=jnp.bfloat16))
        boxed = jax.eval_shape(lambda b=bridge: b.init(jax.random.key(0), (*ROLES, *OWN)))
        params = describe(lambda b=boxed: b, make_mesh(), {"decoder": dtype})
        batch = make_batch(QUERY, TEXT, TARGET, slots=8, length=14)

        def step(own, frozen, bridge=bridge, batch=batch):
            return jax.grad(lambda own: bridge.loss(merge(own, frozen), batch)[0])(own)

        own = {path: x for path, x in params.items() if path.startswith("projector/")}
        frozen = {path: x for path, x in params.items() if path not in own}
        needs[dtype] = jax.jit(step).lower(own, frozen).compile().memory_analysis()
    blocks = 12 * (4 * 256 * 256 + 3 * 256 * 1024)
    for dtype in ("int8", "int4"):
        more = needs[dtype].temp_size_in_bytes - needs["bfloat16"].temp_size_in_bytes
        assert more < blocks / 12 * 8, dtype  # one layer in float32 and in bfloat16
