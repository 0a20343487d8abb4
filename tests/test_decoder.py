"""The decoder against transformers' PyTorch Llama: logits, cached decoding, masks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import BASE, DECODERS, apply, plain, relative
from transformers import AutoConfig, AutoModelForCausalLM

from jaxfusion.hf.decoders import decoder_config, decoder_json
from jaxfusion.hf.json_fields import FAMILIES
from jaxfusion.hf.load import read_config
from jaxfusion.hf.save import write_tower
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.nn.cache import init_cache
from jaxfusion.nn.decoder import Decoder


@pytest.fixture(scope="module", params=DECODERS)
def theirs(request, tmp_path_factory):
    """A case's config, our random parameters, and transformers' model of their files."""
    config, path = DECODERS[request.param], tmp_path_factory.mktemp("theirs")
    params = random_params(config, 0)
    rng = np.random.default_rng(0)  # norms start at ones, which would hide a mixed-up one
    params = jax.tree_util.tree_map_with_path(
        lambda keys, x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype)
        if keys[-1].key == "scale" else x, params)
    write_tower(path, config, params)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    return config, {"params": params}, model


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


@pytest.mark.parametrize("family", FAMILIES["decoder"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family, tmp_path):
    least = {"model_type": family, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 32, "num_attention_heads": 32, "pad_token_id": None}
    AutoConfig.for_model(**least).save_pretrained(tmp_path)
    ours, theirs = (decoder_config(x, "config.json") for x in (least, read_config(tmp_path)))
    # Lengths only matter to longrope, which names its own.
    assert replace(ours, max_length=0) == replace(theirs, max_length=0)


def test_a_magnitude_of_its_own_is_kept():
    config = DECODERS["phi35_longrope"]
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


# One of each kind of window, rotary table and cap.
KINDS = ("llama3", "qwen25_window", "phi35_longrope", "gemma2", "gemma3")


@pytest.mark.parametrize("case", [
    x if x in KINDS else pytest.param(x, marks=pytest.mark.slow) for x in DECODERS])
def test_a_block_at_some_slots_is_the_whole_one_there(case):
    """Values and gradients; padding on the left of some rows and on the right of others."""
    whole = DECODERS[case]
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
