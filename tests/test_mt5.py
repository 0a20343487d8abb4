"""The encoder against transformers' PyTorch one, and its three ways to be read."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import ENCODERS, UNUSUAL, relative
from transformers import MT5EncoderModel, UMT5EncoderModel

from jaxfusion.miniatures.checkpoints import random_params, write_random_tower
from jaxfusion.nn.mt5 import MT5Encoder


def apply(config, params, tokens, mask, states=False, **read):
    """The encoder, compiled as a whole."""
    run = jax.jit(lambda *args, **read: MT5Encoder(config).apply(*args, states=states, **read))
    return run(params, tokens, mask, **read)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 97, (3, 40))
    mask = np.arange(40) < np.array([[40], [29], [1]])
    return np.where(mask, tokens, 0), mask


@pytest.mark.parametrize("family", ENCODERS)
def test_every_state_equals_transformers(family, batch, tmp_path):
    config, (tokens, mask) = ENCODERS[family], batch
    write_random_tower(tmp_path, config)
    model = {"mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}[family]
    theirs = model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), torch.tensor(mask), output_hidden_states=True)
    params = {"params": random_params(config, 0)}
    states = apply(config, params, tokens, mask, states=True)
    assert len(states) == len(out.hidden_states) - 1
    for ours, reference in zip(states, out.hidden_states[1:], strict=True):
        assert relative(ours[mask], reference.numpy()[mask]) < 1e-5
    last = apply(config, params, tokens, mask)
    assert relative(last[mask], out.last_hidden_state.numpy()[mask]) < 1e-5


def test_mix_and_probe_equal_the_stack(batch):
    tokens, mask = batch
    params = {"params": random_params(UNUSUAL, 1)}
    states = apply(UNUSUAL, params, tokens, mask, states=True)
    weights = jax.random.normal(jax.random.key(0), (5,))
    probe = jax.random.normal(jax.random.key(1), states.shape[1:])
    mixed = apply(UNUSUAL, params, tokens, mask, mix=weights)
    assert relative(mixed, jnp.einsum("l,lbsd->bsd", weights, states)) < 1e-5
    dots = apply(UNUSUAL, params, tokens, mask, probe=probe)
    assert relative(dots, jnp.einsum("bsd,lbsd->l", probe, states)) < 1e-5


@pytest.mark.parametrize("left", [0, 7])
def test_padding_on_either_side_changes_nothing(batch, left):
    tokens, mask = batch
    params = {"params": random_params(UNUSUAL, 1)}
    padded = np.full((3, 55), 5)
    wide_mask = np.zeros((3, 55), bool)
    padded[:, left : left + 40], wide_mask[:, left : left + 40] = tokens, mask
    alone = apply(UNUSUAL, params, tokens, mask)
    wide = apply(UNUSUAL, params, padded, wide_mask)
    assert relative(wide[:, left : left + 40][mask], alone[mask]) < 1e-6


def test_dropout_acts_only_when_asked(batch):
    tokens, mask = batch
    encoder, params = MT5Encoder(UNUSUAL, dropout=0.1), {"params": random_params(UNUSUAL, 1)}
    plain = encoder.apply(params, tokens, mask)
    run = lambda seed: encoder.apply(  # noqa: E731
        params, tokens, mask, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert np.array_equal(plain, MT5Encoder(UNUSUAL).apply(params, tokens, mask))
    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), plain) and not np.array_equal(run(0), run(1))
