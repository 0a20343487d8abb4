"""The decoder against transformers' PyTorch Llama: logits, cached decoding, masks."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import relative
from transformers import LlamaForCausalLM

from jaxfusion.nn.decoder import Decoder, DecoderConfig, LinearScaling, Llama3Scaling, init_cache
from jaxfusion.testing.checkpoints import random_params, write_random_tower

BASE = DecoderConfig(
    vocab_size=101, d_model=48, d_ff=80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=12,
    norm_eps=2e-4, rope_theta=777.0,
)
CASES = {
    "llama2": replace(BASE, num_kv_heads=6),
    "llama3": BASE,
    "llama31": replace(BASE, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 24)),
    "llama32_tied": replace(
        BASE, rope_scaling=Llama3Scaling(32.0, 1.5, 5.0, 16), tie_embeddings=True
    ),
    "linear": replace(BASE, rope_scaling=LinearScaling(3.0)),
}


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


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tokens, tmp_path):
    config = CASES[case]
    write_random_tower(tmp_path, config)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)).logits.numpy()
    params = {"params": random_params(config, 0)}
    logits = apply(config, params, tokens, *plain(tokens), method="score")
    assert relative(logits, reference) < 1e-5
    assert np.std(reference) > 1.0, "logits must spread, or the comparison says little"


def test_transformers_five_spelling_of_rope_is_read_too(tokens, tmp_path):
    import json

    from jaxfusion.hf.configs import decoder_config, decoder_json

    config = CASES["llama31"]
    old = decoder_json(config)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    for spelling in (old, new):
        assert decoder_config(json.loads(json.dumps(spelling)), "config.json") == config


@pytest.mark.parametrize("case", ["llama2", "llama32_tied"])
def test_cached_decoding_equals_transformers(case, tokens, tmp_path):
    config = CASES[case]
    write_random_tower(tmp_path, config)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)).logits.numpy()
    params = {"params": random_params(config, 0)}
    run = jax.jit(Decoder(config).apply)
    cache = init_cache(config, 2, 30, jnp.float32)
    positions, segments = plain(tokens)
    logits = []
    # A prompt of 20 tokens at once, then one by one.
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
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
