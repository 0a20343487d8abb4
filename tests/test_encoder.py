"""The encoder against transformers' PyTorch one, and its three ways to be read."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from helpers import DECODERS, ENCODERS, UNUSUAL, relative, torch_encoder

from jaxfusion.config import default_config, from_config_dict
from jaxfusion.errors import InputError
from jaxfusion.hf.decoders import decoder_config
from jaxfusion.hf.encoders import encoder_config, encoder_json
from jaxfusion.hf.load import load_params, read_shape
from jaxfusion.hf.tables import tower_table
from jaxfusion.miniatures.checkpoints import random_params, write_random_tower
from jaxfusion.nn.encoder import Encoder
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import plan_model


def apply(config, params, tokens, mask, states=False, **read):
    """The encoder, compiled as a whole."""
    run = jax.jit(lambda *args, **read: Encoder(config).apply(*args, states=states, **read))
    return run(params, tokens, mask, **read)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 97, (3, 40))
    mask = np.arange(40) < np.array([[40], [29], [1]])
    return np.where(mask, tokens, 0), mask


@pytest.mark.parametrize("left", [0, 9])
@pytest.mark.parametrize("family", ENCODERS)
def test_every_state_equals_transformers(family, left, batch, tmp_path):
    config, (tokens, mask) = ENCODERS[family], batch
    padding = max(config.first_position - 1, 0)
    tokens = np.where(mask, np.maximum(tokens, padding + 1), padding)
    tokens = np.pad(tokens, ((0, 0), (left, 0)), constant_values=padding)
    mask = np.pad(mask, ((0, 0), (left, 0)))
    write_random_tower(tmp_path, config)
    theirs = torch_encoder(family).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), torch.tensor(mask).long(), output_hidden_states=True)
    params = {"params": random_params(config, 0)}
    states = apply(config, params, tokens, mask, states=True)
    assert len(states) == len(out.hidden_states) - 1
    for ours, reference in zip(states, out.hidden_states[1:], strict=True):
        assert relative(ours[mask], reference.numpy()[mask]) < 1e-5
    last = apply(config, params, tokens, mask)
    assert relative(last[mask], out.last_hidden_state.numpy()[mask]) < 1e-5


@pytest.mark.parametrize("family", ENCODERS)
def test_a_family_is_read_back_as_it_was_written(family, tmp_path):
    config = ENCODERS[family]
    write_random_tower(tmp_path, config)
    assert read_shape("encoder", tmp_path) == config
    params = random_params(config, 0)
    flat = traverse_util.flatten_dict(params, sep="/")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
             for path, x in flat.items()}
    loaded = load_params(tmp_path, tower_table(config), specs)
    for path, x in flat.items():
        assert np.array_equal(loaded[path], x), path


@pytest.mark.parametrize("family", ENCODERS)
def test_mix_and_probe_equal_the_stack(family, batch):
    (tokens, mask), config = batch, ENCODERS[family]
    params = {"params": random_params(config, 1)}
    states = apply(config, params, tokens, mask, states=True)
    weights = jax.random.normal(jax.random.key(0), (config.num_layers,))
    probe = jax.random.normal(jax.random.key(1), states.shape[1:])
    mixed = apply(config, params, tokens, mask, mix=weights)
    assert relative(mixed, jnp.einsum("l,lbsd->bsd", weights, states)) < 1e-5
    dots = apply(config, params, tokens, mask, probe=probe)
    assert relative(dots, jnp.einsum("bsd,lbsd->l", probe, states)) < 1e-5


@pytest.mark.parametrize("family", ENCODERS)
def test_a_packed_row_gives_what_each_text_gives_alone(family, batch):
    (tokens, mask), config = batch, ENCODERS[family]
    params = {"params": random_params(config, 1)}
    alone = apply(config, params, tokens, mask, states=True)
    row, segments, gap = np.full((1, 75), 5), np.zeros((1, 75), int), 3
    row[0, :40], segments[0, :40] = tokens[0], 1
    row[0, 40 + gap:72], segments[0, 40 + gap:72] = tokens[1, :29], 2
    packed = apply(config, params, row, segments, states=True)
    assert relative(packed[:, 0, :40], alone[:, 0]) < 1e-5
    assert relative(packed[:, 0, 40 + gap:72], alone[:, 1, :29]) < 1e-5


@pytest.mark.parametrize("left", [0, 7])
@pytest.mark.parametrize("family", [x for x in ENCODERS if x != "bert"])
def test_padding_on_either_side_changes_nothing(family, batch, left):
    (tokens, mask), config = batch, ENCODERS[family]
    params = {"params": random_params(config, 1)}
    padded = np.full((3, 55), 5)
    wide_mask = np.zeros((3, 55), bool)
    padded[:, left : left + 40], wide_mask[:, left : left + 40] = tokens, mask
    alone = apply(config, params, tokens, mask)
    wide = apply(config, params, padded, wide_mask)
    assert relative(wide[:, left : left + 40][mask], alone[mask]) < 2e-6


def test_dropout_acts_only_when_asked(batch):
    tokens, mask = batch
    encoder, params = Encoder(UNUSUAL, dropout=0.1), {"params": random_params(UNUSUAL, 1)}
    plain = encoder.apply(params, tokens, mask)
    run = lambda seed: encoder.apply(  # noqa: E731
        params, tokens, mask, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert np.array_equal(plain, Encoder(UNUSUAL).apply(params, tokens, mask))
    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), plain) and not np.array_equal(run(0), run(1))


@pytest.mark.parametrize("kind", ["Bert", "XLMRoberta", "M2M100", "ModernBert", "MT5", "UMT5"])
def test_transformers_defaults_are_ours(kind):
    """A config.json without a field means what transformers means."""
    theirs = getattr(transformers, f"{kind}Config")
    full = theirs().to_dict()
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "d_model", "d_ff", "d_kv", "num_layers", "num_heads",
             "encoder_ffn_dim", "encoder_layers", "encoder_attention_heads", "feed_forward_proj")
    short = {name: full[name] for name in sizes if name in full}
    assert encoder_config(short, "short") == encoder_config(full, "full")


@pytest.mark.parametrize("family,change,message", [
    ("bert", {"model_type": "llama"}, "model_type 'llama' is a decoder-only LLM, expected an enc"),
    ("bert", {"is_decoder": True}, "is_decoder is true, expected an encoder"),
    ("bert", {"model_type": "albert"}, "model_type 'albert' is not supported as encoder; known: m"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_k"),
    ("bert", {"hidden_act": "tanh"}, "hidden_act is 'tanh', expected gelu or gelu_new"),
    ("bert", {"num_attention_heads": 5}, "width 36 is not divisible by 5 attention heads"),
    ("xlm-roberta", {"max_position_embeddings": 3}, "max_position_embeddings is 3, expected more"),
    ("m2m_100", {"scale_embedding": "yes"}, "scale_embedding is 'yes', expected true or false"),
    ("modernbert", {"mlp_bias": True}, "mlp_bias is true, which is not supported for modernbert"),
    ("modernbert", {"layer_types": ["full_attention"]}, "expected a list of 6 entries"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
     "rope_type 'yarn' is not supported for modernbert"),
])
def test_a_config_that_cannot_be_read_is_refused(family, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        encoder_config({**encoder_json(ENCODERS[family]), **change}, "config.json")


def test_an_encoder_as_llm_is_refused():
    with pytest.raises(InputError, match=r"model_type 'bert' is an encoder, expected a decoder"):
        decoder_config(encoder_json(ENCODERS["bert"]), "config.json")


def test_texts_longer_than_the_table_of_positions_are_refused():
    config = from_config_dict(default_config())
    shapes = {"encoder": replace(ENCODERS["bert"], max_length=300), "decoder": DECODERS["llama3"]}
    with pytest.raises(InputError, match=r"eval\.max_encoder_tokens is 512, .* holds 300 tokens"):
        plan_model(config, shapes, make_mesh())
