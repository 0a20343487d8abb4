"""Continuous batching: every row is answered as it is in a batch of its own."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_bridge import DECODER, make_bridge

from jaxfusion.data.batching import TokenRow, collate, find_bare_shapes, find_shapes
from jaxfusion.evaluation import continuous
from jaxfusion.evaluation.continuous import answer_all, make_programs
from jaxfusion.evaluation.generate import Decoding, make_scorer
from jaxfusion.evaluation.options import make_options
from jaxfusion.fields import ROLES
from jaxfusion.nn.aligner import Aligner
from jaxfusion.nn.bridge import OWN

TOKENIZERS = SimpleNamespace(start=[1])
BUCKETS = (4, 8, 12)
WINDOWS = replace(DECODER, windows=(None, 3))


def random_rows(count, bare):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 12, (count, 2))
    queries, texts = ([rng.integers(3, 50, n).tolist() for n in column] for column in sizes.T)
    return [TokenRow([] if bare else query, query if bare else text[:2], [])
            for query, text in zip(queries, texts, strict=True)]


@pytest.mark.parametrize(("bare", "decoder", "aligned", "temperature", "batch_size"), [
    (False, DECODER, False, 0.0, 4), (True, WINDOWS, False, 1.0, 8), (False, DECODER, True, 0.0, 5),
    (False, DECODER, False, 0.0, 1),
])
def test_rows_are_answered_as_alone(bare, decoder, aligned, temperature, batch_size):
    """With samples, other ends than EOS, fewer rows than places, and one row more than they."""
    aligner = {"aligner": Aligner("mlp", decoder.num_layers, decoder.d_model)} if aligned else {}
    bridge = make_bridge("global_softmax", "mapping", decoder=decoder, **aligner)
    params = nn.unbox(jax.jit(bridge.init, static_argnums=1)(jax.random.key(0), (*ROLES, *OWN)))
    if aligned:
        params["aligner"]["gate"] = jnp.array([0.7, -0.4])
    decoding = Decoding(6, 2, temperature=temperature, seed=3)
    ends = np.random.default_rng(1).random(decoder.vocab_size) < 0.2
    rows = random_rows(19, bare)
    shapes = find_bare_shapes(rows, BUCKETS) if bare else find_shapes(rows, BUCKETS)
    score = make_scorer(bridge, decoding, bare)
    numbers = np.arange(100, 100 + len(rows))
    alone = []
    for row, number in zip(rows, numbers, strict=True):
        batch = collate(*shapes.place([row], 1, 1), TOKENIZERS)
        alone.append(score(params, batch, make_options([[[]]], 1), ends, np.array([number]))[0][0])
    assert len({int((answer != 2).sum()) for answer in alone}) > 1  # they differ in length
    programs = make_programs(bridge, decoding, bare)
    for count in (19, batch_size + 1, 1):
        found = dict(answer_all(programs, params, rows[:count], shapes, TOKENIZERS, batch_size,
                                numbers, ends))
        assert sorted(found) == list(range(count))
        assert all(np.array_equal(found[i], alone[i]) for i in found)


def test_prompts_are_compiled_once_for_each_shape(monkeypatch):
    """Not for each pair of their shape and that of the longest row, which differs by language."""
    read, prefill = [], continuous.prefill
    monkeypatch.setattr(continuous, "prefill", lambda bridge, params, batch, *more: (
        read.append(batch.dec_tokens.shape), prefill(bridge, params, batch, *more))[1])
    bridge = make_bridge("last")
    params = nn.unbox(jax.jit(bridge.init, static_argnums=1)(jax.random.key(0), ("decoder",)))
    rows = [TokenRow([], [5] * length, []) for length in (12, 11, 3, 3, 8, 7, 3, 3)]
    programs, shapes = make_programs(bridge, Decoding(2, 2), True), find_bare_shapes(rows, BUCKETS)
    for part in (rows[:4], rows[4:]):
        assert len(dict(answer_all(programs, params, part, shapes, TOKENIZERS, 2,
                                   np.arange(4)))) == 4
    assert sorted(read) == [(1, 5), (2, 9), (2, 13)]
