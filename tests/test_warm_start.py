"""The projector's warm start against a least-squares solver, and what it needs."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import tiny_model, write_family

from jaxfusion.bridge.warm_start import NOISE, _aligned, _pairs, warm_start
from jaxfusion.data.rows.examples import Example
from jaxfusion.errors import InputError
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.load import load_model
from jaxfusion.training.state import merge

TEXTS = ["badu fege Label: ", "kilo muna", "pa re si to zu", "bo bo bo"]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny_model(tiny, "last")


def test_tokens_are_aligned_by_their_characters(model):
    queries, targets = _aligned([Example(x, "", 0) for x in TEXTS], model.tokenizers)
    for text, query, target in zip(TEXTS, queries, targets, strict=True):
        llm = model.tokenizers.decoder(text.rstrip(), add_special_tokens=False)["input_ids"]
        assert len(target) == len(query)
        assert {token for tokens in target for token in tokens} <= set(llm)
        assert target[-1] == llm[-1:]  # the encoder's end token stands where the text ends
        words = model.tokenizers.decoder.decode(
            list(dict.fromkeys(token for tokens in target[:-1] for token in tokens)))
        assert text.split()[0][:2] in words


def objective(kernel, bias, x, y):
    """Squared error under noise on x (in units of its spread), per row."""
    scaled = kernel * x.std()  # x is standardised by one number
    return (np.mean(np.sum((x @ kernel + bias - y) ** 2, axis=1))
            + NOISE**2 * np.sum(scaled**2))


@pytest.mark.slow
def test_a_linear_start_is_near_the_best_under_noise(model):
    examples = [Example(text, "", 0) for text in TEXTS * 4]
    start = warm_start(model, examples).trainable
    x, y, end = _pairs(model, merge(model.trainable, model.frozen),
                       [Example(x, "", 0) for x in TEXTS * 4])
    x, y = x.astype(float), y.astype(float)
    mean, spread = x.mean(axis=0), x.std()
    z = (x - mean) / spread
    gram = z.T @ z / len(z) + NOISE**2 * np.eye(z.shape[1])
    best = np.linalg.solve(gram, z.T @ (y - y.mean(axis=0)) / len(z)) / spread
    lowest = objective(best, y.mean(axis=0) - mean @ best, x, y)
    found, fresh = (
        objective(*(np.asarray(params[f"projector/out/{name}"], float)
                    for name in ("kernel", "bias")), x, y)
        for params in (start, model.trainable))
    assert lowest <= found < 1.15 * lowest < fresh
    np.testing.assert_allclose(start["projector/end"], end, atol=1e-6)
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, model.trainable)


@pytest.mark.parametrize("family,dtype", [("gemma", "float32"), ("llama3", "int8")])
def test_targets_are_what_the_llm_reads(family, dtype, tiny, tmp_path):
    """Scaled as Gemma's embeddings are, and restored from integers."""
    write_family(family, tiny, tmp_path / "llm")
    model = tiny_model(tiny, "last", decoder=tmp_path / "llm")
    config = replace(model.config, decoder=replace(model.config.decoder, dtype=dtype))
    model = load_model(config, make_mesh())
    examples = [Example("badu", "", 0)]
    _, y, end = _pairs(model, merge(model.trainable, model.frozen), examples)
    ((*_, last),) = _aligned(examples, model.tokenizers)[1]
    table = np.asarray(model.frozen["decoder/embed/embedding"], np.float32)
    scale = (np.asarray(model.frozen["decoder/embed/scale"]) if dtype == "int8"
             else model.bridge.decoder.config.embed_scale)
    wanted = (table * scale)[last].mean(axis=0)
    np.testing.assert_allclose(end, wanted, rtol=1e-2, atol=1e-3 * np.abs(wanted).max())
    np.testing.assert_allclose(y[-1], end, atol=1e-6)


@pytest.mark.slow
def test_a_feed_forward_start_leaves_little_of_the_error(tiny):
    model = tiny_model(tiny, "last", name="ffn")
    examples = [Example(text, "", 0) for text in TEXTS * 4]
    started = warm_start(model, examples)
    x, y, _ = _pairs(model, merge(model.trainable, model.frozen),
                     [Example(x, "", 0) for x in TEXTS])

    def error(trainable):
        params = merge(trainable, model.frozen)["projector"]
        real = np.ones((1, len(x)), bool)
        projected = model.bridge.projector.apply({"params": params}, x[None], real)[0, :-1]
        return np.mean((projected - y) ** 2)

    assert error(started.trainable) < 0.2 * error(model.trainable)


def test_tokenizers_without_offsets_are_refused(model):
    tokenizers = replace(model.tokenizers, encoder=SimpleNamespace(is_fast=False))
    with pytest.raises(InputError, match="tokenizers that tell their offsets"):
        warm_start(replace(model, tokenizers=tokenizers), [Example("a", "", 0)])


def test_texts_that_are_all_too_long_are_named(model):
    config = replace(model.config, data=replace(model.config.data, max_encoder_tokens=8))
    with pytest.raises(InputError, match=r"each of 3 texts is longer than data\.max_encoder_t"):
        warm_start(replace(model, config=config), [Example("badu fege " * 9, "", 0)] * 3)
