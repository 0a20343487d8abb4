"""Warm start (not in the papers): fits the projector to the LLM's embeddings before training."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from jaxfusion.data.batching import TokenRow, find_shapes, in_order, length_buckets
from jaxfusion.data.rows.examples import Example, in_turn
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.nn.bridge import Params
from jaxfusion.nn.projector import Projector
from jaxfusion.sharding.hosts import fetch
from jaxfusion.training.load import Model, overlay
from jaxfusion.training.state import merge

ROWS = 1024  # training texts that are looked at
BATCH = 64  # of texts, through the encoder
STEPS, TOKENS, RATE = 800, 1024, 3e-3  # of the regression: Adam, cosine to 0
NOISE = 0.7  # on the features, relative to their spread


def warm_start(model: Model, examples: Sequence[Example]) -> Model:
    """The model with its projector at the regression from features to LLM embeddings.

    Every encoder token of a text is to become the mean embedding of the LLM tokens that share
    characters with it, special tokens and the end vector that of the text's last LLM token. No
    label is used. Noise on the features keeps what is learned of one language broad enough for
    the others (for a linear projector it is ridge regression: Bishop, 1995).

    Raises:
      InputError: a tokenizer does not know its offsets, or the projector has no slot for each
        token.
    """
    if model.bridge.latents:
        raise InputError("projector.warm_start is for projectors with a slot for each token, not "
                         "for resampler; set projector.warm_start=False")
    params = merge(model.trainable, model.frozen)
    by_language: dict[str, list[Example]] = {}
    for example in examples:
        by_language.setdefault(example.language, []).append(example)
    looked_at = [*islice(in_turn(by_language.values()), ROWS)]
    features, targets, end = _pairs(model, params, looked_at)
    mean, spread = features.mean(axis=0), features.std()
    start = dict(_regress(model.bridge.projector, params["projector"],
                          (features - mean) / spread, targets, model.config.train.seed))
    # The first layer reads features as they are.
    first = start["hidden" if "hidden" in start else "out"]
    first["kernel"] = first["kernel"] / spread
    first["bias"] = first["bias"] - mean @ first["kernel"]
    flat = traverse_util.flatten_dict({"projector": {**start, "end": jnp.asarray(end)}}, sep="/")
    return overlay(model, {path: np.asarray(x) for path, x in flat.items()}, "the warm start")


def _pairs(model: Model, params: Params, examples: Sequence[Example]):
    """Features and target embeddings of all encoder tokens [N D], [N E], and the end vector [E]."""
    limit = model.config.data.max_encoder_tokens
    found = zip(*_aligned(examples, model.tokenizers), strict=True)
    fitting = [pair for pair in found if len(pair[0]) <= limit]
    if not fitting:
        raise InputError(f"projector.warm_start: each of {len(examples)} texts is longer than "
                         f"data.max_encoder_tokens = {limit}; set it higher, or warm_start=False")
    queries, targets = zip(*fitting, strict=True)
    rows = [TokenRow(query, [], []) for query in queries]
    fuse = jax.jit(lambda params, batch: model.bridge.fuse(params, batch)[0])
    vector_of = _embeddings(model, params, targets)
    x, y = [], []
    shapes = find_shapes(rows, length_buckets(limit))
    for numbers, batch in in_order(rows, shapes, model.tokenizers, BATCH):
        features = fetch(fuse(params, batch)).astype(np.float32)
        for row, number in zip(features, numbers, strict=False):
            x.append(row[: len(queries[number])])
            y.append(np.stack([vector_of(ids).mean(axis=0) for ids in targets[number]]))
    end = np.mean([vector_of(target[-1]).mean(axis=0) for target in targets], axis=0)
    return np.concatenate(x), np.concatenate(y), end


def _embeddings(
    model: Model, params: Params, targets: Sequence[Sequence[Sequence[int]]]
) -> Callable[[Sequence[int]], np.ndarray]:
    """A look-up of the LLM's vectors of tokens [n E] in float32, as its first block reads them:
    scaled where the family scales them, restored where the table is quantised."""
    known = np.unique([token for target in targets for ids in target for token in ids])
    embed = jax.jit(lambda params, tokens: model.bridge.embed(params, tokens))
    vectors = fetch(embed(params, known[None]))[0].astype(np.float32)
    return lambda ids: vectors[np.searchsorted(known, ids)]


def _regress(
    projector: Projector, start: Params, x: np.ndarray, y: np.ndarray, seed: int
) -> Params:
    """The projector's parameters after minimising the squared error, batch by batch."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(state, key):
        params, opt_state = state
        pick, noise = jax.random.split(key)
        chosen = jax.random.randint(pick, (TOKENS,), 0, len(x))
        seen = x[chosen] + NOISE * jax.random.normal(noise, (TOKENS, x.shape[1]))

        def error(params):
            real = jnp.ones((1, TOKENS), bool)
            projected = projector.apply({"params": params}, seen[None], real)[0, :-1]
            return jnp.mean((projected - y[chosen]) ** 2)

        updates, opt_state = optimizer.update(jax.grad(error)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(seed), STEPS)
    (params, _), _ = jax.jit(partial(jax.lax.scan, step))((start, optimizer.init(start)), keys)
    return params


def _aligned(examples: Sequence[Example], tokenizers: Tokenizers):
    """Encoder ids of each text, and for each of them the LLM tokens it shares characters with; the
    first one for what stands before the text, the last one for what follows it."""
    # A space at the end belongs to the answer, as in `Tokenizers.encode_answers`.
    texts, prefix = [x.query.rstrip() for x in examples], tokenizers.query_prefix
    if not (tokenizers.encoder.is_fast and tokenizers.decoder.is_fast):
        raise InputError(
            "projector.warm_start needs tokenizers that tell their offsets (tokenizer.json)")
    ours, theirs = (
        tokenizer(prefixed, return_offsets_mapping=True, add_special_tokens=False)
        for tokenizer, prefixed in ((tokenizers.encoder, [prefix + text for text in texts]),
                                    (tokenizers.decoder, texts)))
    queries, targets = [], []
    for i, example in enumerate(examples):
        before, after = tokenizers.around_query(example.language)
        ids, spans = theirs["input_ids"][i], theirs["offset_mapping"][i]
        queries.append([*before, *ours["input_ids"][i], *after])
        shared = [
            [token for token, (a, b) in zip(ids, spans, strict=True)
             if min(end - len(prefix), b) > max(start - len(prefix), a)]
            or (ids[:1] if 0 < end <= len(prefix) else ids[-1:])
            for start, end in ours["offset_mapping"][i]
        ]
        targets.append([*[ids[:1]] * len(before), *shared, *[ids[-1:]] * len(after)])
    return queries, targets
