"""The assembled bridge: splice, padding, second pass, and what a compiled step holds in memory."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import relative

from jaxfusion.data.batching import BatchShape, TokenRow, collate, find_shapes
from jaxfusion.data.packing import Packing
from jaxfusion.fields import OptimizerConfig
from jaxfusion.nn.bridge import Batch, Bridge
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import Encoder, EncoderConfig
from jaxfusion.nn.projector import Projector, Resampler
from jaxfusion.training.optimizer import group_of_each, make_optimizer
from jaxfusion.training.state import State, merge
from jaxfusion.training.step import make_train_step

ENCODER = EncoderConfig(61, d_model=24, d_ff=32, num_layers=4, num_heads=2, head_dim=8)
DECODER = DecoderConfig(67, d_model=32, d_ff=48, num_layers=2, num_heads=4, num_kv_heads=2,
                        head_dim=8)
PARTS = ("encoder", "fusion", "projector", "decoder")
FUSIONS = ("last", "layer", "global_softmax", "transformer_softmax")


def make_bridge(fusion, projector="linear", encoder=ENCODER, decoder=DECODER, **options) -> Bridge:
    projector = (Resampler(decoder.d_model, 1.0, latents=5) if projector == "resampler"
                 else Projector(projector, decoder.d_model, 1.0))
    return Bridge(Encoder(encoder), Decoder(decoder), projector, fusion, 2,
                  fusion_d_ff=16, **options)


def make_params(bridge, seed=0):
    params = nn.unbox(jax.jit(bridge.init, static_argnums=1)(jax.random.key(seed), PARTS))
    # Away from the start, where weights are uniform and a mistake in them would not show.
    keys = iter(jax.random.split(jax.random.key(seed + 1), 99))
    params["fusion"] = jax.tree.map(
        lambda x: x + (1e-2 if x.ndim else 1e-7) * jax.random.normal(next(keys), x.shape),
        params["fusion"],
    )
    return params


def make_batch(query, text, target, *, slots, length, order=None, latents=0) -> Batch:
    """One row: real decoder slots in the given places, in order, garbage in all others."""
    rng = np.random.default_rng(0)
    n = len(query)
    source = [-1, *range(n), latents or slots, *[-1] * (len(text) + len(target))]
    tokens = [1, *[0] * (n + 1), *text, *target]
    places = np.arange(len(tokens)) if order is None else np.asarray(order)
    row = {
        "dec_tokens": rng.integers(0, 60, length),
        "dec_source": rng.integers(-1, latents or slots, length),
        "dec_positions": rng.integers(0, 40, length), "dec_segments": np.zeros(length, int),
    }
    row["dec_tokens"][places], row["dec_source"][places] = tokens, source
    row["dec_positions"][places], row["dec_segments"][places] = np.arange(len(tokens)), 1
    total, k = len(tokens), len(target)
    return Batch(
        enc_tokens=np.array([query + [7] * (slots - n)]),
        enc_segments=(np.arange(slots) < n)[None].astype(int),
        **{name: value[None] for name, value in row.items()},
        target_slots=places[total - k - 1 : total - 1][None],
        target_tokens=np.array([target]), target_mask=np.ones((1, k), bool),
    )


QUERY, TEXT, TARGET = [5, 9, 11, 3, 30], [8, 4], [12, 40, 2]


@pytest.mark.parametrize("fusion,projector", [
    *((f, "linear") for f in FUSIONS), *(("last", p) for p in ("ffn", "mapping", "resampler")),
])
def test_padding_anywhere_changes_nothing(fusion, projector):
    bridge = make_bridge(fusion, projector)
    params = make_params(bridge)
    latents = {"latents": bridge.latents}  # of the resampler five, as many as the query has ids
    alone = make_batch(QUERY, TEXT, TARGET, slots=5, length=12, **latents)
    scattered = make_batch(QUERY, TEXT, TARGET, slots=9, length=31, **latents,
                           order=np.sort(np.random.default_rng(3).permutation(31)[:12]))
    logits = jax.jit(bridge.target_logits)
    assert relative(logits(params, scattered), logits(params, alone)) < 1e-5


def test_prefix_is_spliced_in_order():
    """BOS, projected features of real tokens, end vector, text: written out with embeddings."""
    bridge = make_bridge("last")
    params = make_params(bridge)
    batch = make_batch(QUERY, TEXT, TARGET, slots=8, length=14)
    features, _ = bridge.fuse(params, batch)
    out = params["projector"]["out"]
    prefix = features[0, :5] @ out["kernel"] + out["bias"]
    embed = params["decoder"]["embed"]["embedding"]
    expected = jnp.concatenate(
        [embed[jnp.array([1])], prefix, params["projector"]["end"][None],
         embed[jnp.array(TEXT + TARGET)]]
    )
    assert relative(bridge.read(params, batch)[0][0, :12], expected) < 1e-6


def test_layer_reads_the_state_of_that_number():
    bridge = make_bridge("layer")
    params = make_params(bridge)
    batch = make_batch(QUERY, TEXT, TARGET, slots=5, length=12)
    states = bridge.encoder.apply(
        {"params": params["encoder"]}, batch.enc_tokens, batch.enc_segments, states=True
    )
    assert relative(bridge.fuse(params, batch)[0], states[1]) < 1e-6


def test_noise_is_for_training_alone():
    calm, noisy = make_bridge("last"), make_bridge("last", fusion_noise=0.5)
    params, key = make_params(calm), jax.random.key(5)
    batch = make_batch(QUERY, TEXT, TARGET, slots=5, length=12)
    assert np.array_equal(calm.read(params, batch)[0], noisy.read(params, batch)[0])
    assert relative(noisy.read(params, batch, key)[0], calm.read(params, batch, key)[0]) > 0.1


def test_second_pass_gives_the_stack_s_gradients():
    batch = make_batch(QUERY, TEXT, TARGET, slots=8, length=14)
    stack = make_bridge("global_softmax", encoder=ENCODER)
    stack = replace(stack, encoder=replace(stack.encoder, dropout=0.1))
    second = replace(stack, backward="second_pass")
    params, key = make_params(stack), jax.random.key(5)

    def gradient(bridge):
        loss = lambda trained: bridge.loss({**params, **trained}, batch, key)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))({x: params[x] for x in ("fusion", "projector")})

    ours, theirs = gradient(second), gradient(stack)
    assert float(jnp.abs(theirs["fusion"]["w"]).max()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


# What a compiled step holds, by XLA's own account; shapes only, nothing is allocated.

WIDE = {
    "encoder": EncoderConfig(20_000, d_model=64, d_ff=64, num_layers=16, num_heads=2, head_dim=16),
    "decoder": DecoderConfig(30_000, d_model=64, d_ff=64, num_layers=2, num_heads=2,
                             num_kv_heads=2, head_dim=16),
}
B, S, N, T = 4, 256, 264, 4


def wide_batch() -> Batch:
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    bools = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bool)  # noqa: E731
    return Batch(ints(B, S), ints(B, S), ints(B, N), ints(B, N), ints(B, N), ints(B, N),
                 ints(B, T), ints(B, T), bools(B, T))


def abstract_flat(bridge):
    from flax import traverse_util

    params = jax.eval_shape(lambda: nn.unbox(bridge.init(jax.random.key(0), PARTS)))
    return traverse_util.flatten_dict(params, sep="/")


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_training_step_memory(fusion):
    bridge = make_bridge(fusion, **WIDE, fusion_dropout=0.0)
    flat = abstract_flat(bridge)
    config = OptimizerConfig()
    groups = group_of_each(flat, config.groups)
    trainable = {path: x for path, x in flat.items() if path in groups}
    frozen = {path: x for path, x in flat.items() if path not in groups}
    optimizer = make_optimizer(config, groups, 10)
    state = State(jax.ShapeDtypeStruct((), jnp.int32), trainable,
                  jax.eval_shape(optimizer.init, trainable))
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = make_train_step(bridge.loss, optimizer, {}).lower(
        state, frozen, wide_batch(), key
    ).compile()
    memory = compiled.memory_analysis()
    assert f"f32[{B},{N},30000]" not in compiled.as_text()
    assert memory.temp_size_in_bytes < 4 * B * N * 30_000
    # No gradient of frozen weights leaves the step: outputs are the state and a few scalars.
    assert memory.output_size_in_bytes < size(state) + 4096
    # Neither a gradient nor a copy of a frozen table lives inside: the smaller one would show.
    for shape in ("f32[20000,64]", "f32[30000,64]"):
        made = [line for line in compiled.as_text().splitlines()
                if f"= {shape}" in line and "parameter(" not in line]
        assert not made, made


@pytest.mark.parametrize("fusion", FUSIONS)
def test_evaluation_holds_no_stack_of_states(fusion):
    bridge = make_bridge(fusion, **WIDE)
    from flax import traverse_util

    params = {"fusion": {}, **traverse_util.unflatten_dict(abstract_flat(bridge), sep="/")}
    compiled = jax.jit(lambda p, b: bridge.fuse(p, b)[0]).lower(params, wide_batch()).compile()
    stack = f"f32[16,{B},{S},64]"
    assert (stack in compiled.as_text()) == (fusion == "transformer_softmax")


def test_frozen_and_trainable_merge_to_the_whole():
    bridge = make_bridge("last")
    flat = abstract_flat(bridge)
    groups = group_of_each(flat, OptimizerConfig().groups)
    split = [{p: x for p, x in flat.items() if (p in groups) == trained}
             for trained in (True, False)]
    assert set(merge(*split)) == {"encoder", "fusion", "projector", "decoder"}
    assert all(path.startswith("projector/") for path in groups)


@pytest.mark.parametrize("fusion", ["global_softmax", "transformer_softmax"])
def test_packed_and_unpacked_losses_and_gradients_agree(fusion):
    bridge = make_bridge(fusion, fusion_dropout=0.0)
    params = make_params(bridge)
    rng = np.random.default_rng(0)
    rows = [
        TokenRow(rng.integers(2, 60, n).tolist(), rng.integers(2, 60, t).tolist(),
                 rng.integers(2, 60, k).tolist())
        for n, t, k in [(3, 0, 2), (9, 2, 3), (5, 1, 1), (12, 0, 4), (2, 3, 2)]
    ]
    tokenizers = SimpleNamespace(start=[1])
    apart = collate(*find_shapes(rows, (8, 16)).place(rows, 1, 5), tokenizers)
    groups, shape = Packing(BatchShape(1, 18, 40, 9)).place(rows, 1, 5)
    packed = collate(groups, shape, tokenizers)
    assert packed.enc_tokens.shape == (2, 18) and max(map(len, groups)) == 3

    def gradient(batch):
        trained = {x: params[x] for x in ("fusion", "projector")}
        loss = lambda t: bridge.loss({**params, **t}, batch, jax.random.key(0))[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(trained)

    (loss, grads), (expected, expected_grads) = gradient(packed), gradient(apart)
    assert abs(loss - expected) < 1e-5 * expected
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        # k's bias and q have no gradient but rounding while cls is 0.
        assert np.max(np.abs(ours - theirs)) < 1e-5 * max(1.0, np.max(np.abs(theirs)))
