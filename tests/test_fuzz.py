"""What users hand in, damaged and mixed at random: a right value, or one line that says what is
wrong. Fields of configs are in test_schema.py."""

import copy
import json
import random

import pytest
from test_decoder import CASES as DECODERS
from test_mt5 import CASES as ENCODERS

from jaxfusion.errors import InputError
from jaxfusion.hf.configs import decoder_config, decoder_json, encoder_config, encoder_json

pytestmark = pytest.mark.slow
BAD = (None, True, False, 0, 1, 2, -1, 7, 10**9, 10**400, 0.0, 0.5, -2.5, 1e300, float("nan"),
       float("inf"), "", "x", "silu", "two\nlines", "\ud800", "x" * 10_000, [], [0], [1, "x"],
       ["full_attention"], [[]], {}, {"x": 1}, {"rope_type": "linear"}, {"type": "x\ny"})


def ours(read, *args, **kwargs):
    """The value, or None for an error that is one line of reasonable length."""
    try:
        return read(*args, **kwargs)
    except InputError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 1000, said[:2000]
        return None


def places(tree, path=()):
    """Every value inside of JSON, by its path."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def with_value(tree, path, value):
    tree = copy.deepcopy(tree)
    at(tree, path[:-1])[path[-1]] = value
    return tree


# Checkpoints


def of_transformers_5(values):
    """A config.json of an LLM with its rotary embeddings as transformers 5 spells them."""
    values = dict(values)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta"),
            **(values.pop("rope_scaling") or {})}
    if "type" in rope:
        rope["rope_type"] = rope.pop("type")
    if "rope_local_base_freq" in values:
        local = {"rope_type": "default", "rope_theta": values.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
    return {**values, "rope_parameters": rope}


SHAPES = {
    **{name: (encoder_config, encoder_json, c) for name, c in ENCODERS.items()},
    **{name: (decoder_config, decoder_json, c) for name, c in DECODERS.items()},
    **{f"{name}_v5": (decoder_config, lambda c: of_transformers_5(decoder_json(c)), c)
       for name, c in DECODERS.items()},
}
UNREAD = {"architectures", "is_encoder_decoder", "dropout_rate", "pad_token_id", "eos_token_id"}


@pytest.mark.parametrize("name", SHAPES)
def test_every_field_of_a_checkpoints_config(name):
    """What is taken is what the file says: it is there again when the shape is written."""
    read, write, shape = SHAPES[name]
    values = write(shape)
    assert read(values, "config.json") == shape
    for path in places(values):
        for value in BAD:
            found = ours(read, with_value(values, path, value), "config.json")
            if found is not None and value is not None and path[0] not in UNREAD:
                again = write(found)
                assert at(again, path) == value and type(at(again, path)) is not bool or (
                    at(again, path) is value), (path, value)
