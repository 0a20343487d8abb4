"""The decoder against transformers' PyTorch Llama: logits, cached decoding, masks."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative
from transformers import AutoConfig, AutoModelForCausalLM

from jaxfusion.hf.config_json import DECODER_FAMILIES, decoder_config, decoder_json
from jaxfusion.hf.load import read_config
from jaxfusion.hf.save import write_tower
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.nn.decoder import Decoder, DecoderConfig, init_cache
from jaxfusion.nn.rope import LinearScaling, Llama3Scaling, LongScaling, Rope

BASE = DecoderConfig(
    vocab_size=101, d_model=48, d_ff=80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=12,
    norm_eps=2e-4, rope=Rope(777.0), max_length=64,
)
GEMMA = replace(BASE, activation="gelu_tanh", embed_scale=48**0.5, norm_offset=1.0,
                tie_embeddings=True)
LONG = LongScaling((1.0, 1.1, 1.2, 1.5, 2.0, 2.5), (1.0, 2.0, 4.0, 5.0, 7.0, 9.0), 24,
                   math.sqrt(1 + math.log(64 / 24) / math.log(24)))
# Every family, and what its members differ in. Windows are shorter than the texts.
CASES = {
    "llama2": replace(BASE, num_kv_heads=6),
    "llama3": BASE,
    "llama31": replace(BASE, rope=Rope(777.0, Llama3Scaling(8.0, 1.0, 4.0, 24))),
    "llama32_tied": replace(
        BASE, rope=Rope(777.0, Llama3Scaling(32.0, 1.5, 5.0, 16)), tie_embeddings=True
    ),
    "codellama": replace(BASE, rope=Rope(1e6, LinearScaling(3.0))),
    "mistral_v01": replace(BASE, family="mistral", windows=(7,) * 3),
    "mistral_v03": replace(BASE, family="mistral"),
    "qwen2": replace(BASE, family="qwen2", qkv_bias=True),
    "qwen25_window": replace(BASE, family="qwen2", qkv_bias=True, windows=(None, 7, 7)),
    "qwen3": replace(BASE, family="qwen3", qk_norm=True, tie_embeddings=True),
    "phi3": replace(BASE, family="phi3", windows=(11,) * 3),
    "phi35_longrope": replace(BASE, family="phi3", num_heads=4, rope=Rope(777.0, LONG)),
    "phi4_partial": replace(BASE, family="phi3", rope=Rope(777.0, None, 0.5)),
    "gemma": replace(GEMMA, family="gemma"),
    "gemma2": replace(GEMMA, family="gemma2", post_norms=True, windows=(7, None, 7),
                      attn_scale=20**-0.5, attn_cap=3.0, logit_cap=4.0),
    "gemma3": replace(GEMMA, family="gemma3_text", post_norms=True, qk_norm=True,
                      num_layers=7, windows=(7,) * 5 + (None, 7), attn_scale=20**-0.5,
                      rope=Rope(1e6, LinearScaling(8.0)), local_rope=Rope(10_000.0)),
}


@pytest.fixture(scope="module", params=CASES)
def theirs(request, tmp_path_factory):
    """A case's config, our random parameters, and transformers' model of their files."""
    config, path = CASES[request.param], tmp_path_factory.mktemp("theirs")
    params = random_params(config, 0)
    rng = np.random.default_rng(0)  # norms start at ones, which would hide a mixed-up one
    params = jax.tree_util.tree_map_with_path(
        lambda keys, x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype)
        if keys[-1].key == "scale" else x, params)
    write_tower(path, config, params)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    return config, {"params": params}, model


def apply(config, params, *args, method="__call__", remat="none"):
    """The decoder, compiled as a whole."""
    return jax.jit(partial(Decoder(config, remat=remat).apply, method=method))(params, *args)


def plain(tokens):
    """Positions and segments of rows without padding."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return positions, np.ones_like(positions)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 101, (2, 30))


def test_logits_equal_transformers(theirs, tokens):
    config, params, model = theirs
    with torch.no_grad():
        reference = model(torch.tensor(tokens)).logits.numpy()
    logits = apply(config, params, tokens, *plain(tokens), method="score")
    assert relative(logits, reference) < 1e-5
    assert np.std(reference) > 1.0, "logits must spread, or the comparison says little"


def test_config_of_transformers_five_is_read_too(theirs, tmp_path):
    """It spells rotary embeddings and kinds of layers otherwise than 4."""
    config, _, model = theirs
    model.config.save_pretrained(tmp_path)
    assert decoder_config(read_config(tmp_path), "config.json") == config


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family, tmp_path):
    least = {"model_type": family, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 32, "num_attention_heads": 32, "pad_token_id": None}
    AutoConfig.for_model(**least).save_pretrained(tmp_path)
    ours, theirs = (decoder_config(x, "config.json") for x in (least, read_config(tmp_path)))
    # Lengths only matter to longrope, which names its own.
    assert replace(ours, max_length=0) == replace(theirs, max_length=0)


def test_a_magnitude_of_its_own_is_kept():
    config = CASES["phi35_longrope"]
    scaling = replace(config.rope.scaling, magnitude=1.5)
    config = replace(config, rope=replace(config.rope, scaling=scaling))
    assert decoder_config(decoder_json(config), "config.json") == config
    other = replace(config, family="mistral")
    assert decoder_config(decoder_json(other), "config.json") == other


def test_cached_decoding_equals_transformers(theirs, tokens):
    config, params, model = theirs
    tokens = tokens[:, :24]  # longrope changes its frequencies beyond: cached keys stay behind
    with torch.no_grad():
        reference = model(torch.tensor(tokens)).logits.numpy()
    run = jax.jit(Decoder(config).apply)
    cache = init_cache(config, 2, 24, jnp.float32)
    positions, segments = plain(tokens)
    logits = []
    # A prompt of 18 tokens at once, then one by one.
    for start, end in [(0, 18), *((i, i + 1) for i in range(18, 24))]:
        part = slice(start, end)
        x = apply(config, params, tokens[:, part], method="embed")
        x, cache = run(params, x, positions[:, part], segments[:, part], cache, start)
        logits.append(apply(config, params, x, method="logits"))
    assert relative(jnp.concatenate(logits, axis=1), reference) < 1e-5


def test_no_gradient_from_the_future(tokens):
    decoder, params = Decoder(BASE), {"params": random_params(BASE, 0)}
    positions, segments = plain(tokens)
    x = decoder.apply(params, tokens, method="embed")

    def at(x, slot):
        hidden, _ = decoder.apply(params, x, positions, segments)
        return jnp.sum(hidden[:, slot] ** 3)

    gradient = jax.jit(jax.grad(at))
    for slot in (0, 13, 29):
        reach = np.abs(gradient(x, slot)).sum(axis=(0, 2))
        assert (reach[: slot + 1] > 0).all() and (reach[slot + 1 :] == 0).all()


def test_padding_anywhere_and_neighbours_change_nothing(tokens):
    """Real tokens scattered among padding of any content, and another segment between them."""
    params = {"params": random_params(BASE, 0)}
    alone = apply(BASE, params, tokens, *plain(tokens), method="score")
    rng = np.random.default_rng(1)
    slots = np.sort(rng.permutation(50)[:30])
    wide, positions = rng.integers(0, 101, (2, 50)), rng.integers(0, 60, (2, 50))
    segments = rng.integers(0, 2, (2, 50)) * 2  # padding, or the segment 2
    wide[:, slots], positions[:, slots], segments[:, slots] = tokens, np.arange(30), 1
    spread = apply(BASE, params, wide, positions, segments, method="score")
    assert relative(spread[:, slots], alone) < 1e-5


def test_remat_gives_the_same_gradients(tokens):
    params = {"params": random_params(BASE, 0)}
    positions, segments = plain(tokens)
    x = Decoder(BASE).apply(params, tokens, method="embed")

    def gradient(remat):
        out = lambda x: apply(BASE, params, x, positions, segments, remat=remat)[0]  # noqa: E731
        return jax.jit(jax.grad(lambda x: jnp.sum(out(x) ** 3)))(x)

    for remat in ("dots", "full"):
        assert relative(gradient(remat), gradient("none")) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_block_at_some_slots_is_the_whole_one_there(case):
    """Values and gradients; padding on the left of some rows and on the right of others."""
    whole = CASES[case]
    config = replace(whole, num_layers=1, windows=whole.windows[-1:])
    decoder, rng = Decoder(config), np.random.default_rng(0)
    params = random_params(config, 0)
    stream = jnp.asarray(rng.normal(size=(3, 20, config.d_model)), jnp.float32)
    real = np.arange(20) >= np.array([[0], [6], [0]])
    real[2, 13:] = False
    positions = np.where(real, np.cumsum(real, axis=1) - 1, 0)
    at = np.array([[3, 19], [6, 18], [0, 12]])
    wanted = rng.normal(size=(3, 2, config.d_model))

    def run(at_once):
        def total(params, stream):
            queries = at if at_once else None
            out = decoder.apply({"params": params}, stream, positions, real.astype(int), queries,
                                method="last_block")
            out = out if at_once else jnp.take_along_axis(out, at[:, :, None], axis=1)
            return jnp.sum(out * wanted), out

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, stream)

    for ours, theirs in zip(*(jax.tree.leaves(run(x)) for x in (True, False)), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * max(1.0, np.abs(theirs).max())
    with pytest.raises(ValueError, match="is for a decoder of one block"):
        Decoder(BASE).apply({"params": random_params(BASE, 0)}, stream, positions,
                            real.astype(int), at, method="last_block")
