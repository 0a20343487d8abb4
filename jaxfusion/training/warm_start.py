"""A start for the projector that the papers do not have: where the LLM already is at home."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxfusion.data.batching import TokenRow, doubling_buckets, find_shapes, in_order
from jaxfusion.data.sources import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.training.state import Model, merge

ROWS = 1024  # training texts that are looked at
BATCH = 64
RIDGE = 1e-3  # of the features' mean variance


def warm_start(model: Model, examples: Sequence[Example]) -> Model:
    """The model with its projector at the ridge regression from features to LLM embeddings.

    Every encoder token of a text is to become the mean embedding of the LLM tokens that share
    characters with it, special tokens and the end vector that of the text's last LLM token. No
    label is used.

    Raises:
      InputError: the projector is not linear, or a tokenizer does not know its offsets.
    """
    if model.config.projector.name != "linear":
        raise InputError(
            f"projector.warm_start needs projector.name='linear', got "
            f"'{model.config.projector.name}'"
        )
    limit = model.config.data.max_encoder_tokens
    texts = [example.query for example in examples[:ROWS]]
    params = merge(model.trainable, model.frozen)
    found = zip(*_aligned(texts, model.tokenizers), strict=True)
    queries, targets = zip(*(pair for pair in found if len(pair[0]) <= limit), strict=True)
    table = np.asarray(params["decoder"]["embed"]["embedding"], np.float32)
    rows = [TokenRow(query, [], []) for query in queries]
    fuse = jax.jit(lambda params, batch: model.bridge.fuse(params, batch)[0])
    shapes = find_shapes(rows, doubling_buckets(limit))
    width = model.bridge.encoder.config.d_model + 1
    gram, moment = np.zeros((width, width)), np.zeros((width, table.shape[1]))
    for numbers, batch in in_order(rows, shapes, model.tokenizers, BATCH):
        features = np.asarray(fuse(params, batch), np.float64)
        for row, number in zip(features, numbers, strict=False):
            y = np.stack([table[ids].mean(axis=0) for ids in targets[number]])
            x = np.concatenate([row[: len(y)], np.ones((len(y), 1))], axis=1)
            gram += x.T @ x
            moment += x.T @ y
    # The mean is not shrunk.
    penalty = np.eye(width) * RIDGE * np.trace(gram[:-1, :-1]) / (width - 1)
    penalty[-1, -1] = 0.0
    solution = np.linalg.solve(gram + penalty, moment)
    end = np.mean([table[target[-1]].mean(axis=0) for target in targets], axis=0)
    start = {"projector/out/kernel": solution[:-1], "projector/out/bias": solution[-1],
             "projector/end": end}
    placed = {
        path: jax.device_put(jnp.asarray(start[path], x.dtype), x.sharding)
        for path, x in model.trainable.items() if path in start
    }
    return replace(model, trainable=model.trainable | placed)


def _aligned(texts: list[str], tokenizers: Tokenizers):
    """Encoder ids of each text, and for each of them the LLM tokens it shares characters with."""
    try:
        ours = tokenizers.encoder(texts, return_offsets_mapping=True)
        theirs = tokenizers.decoder(texts, return_offsets_mapping=True, add_special_tokens=False)
    except NotImplementedError:
        raise InputError(
            "projector.warm_start needs tokenizers that tell their offsets (tokenizer.json)"
        ) from None
    targets = []
    for i in range(len(texts)):
        ids, spans = theirs["input_ids"][i], theirs["offset_mapping"][i]
        targets.append([
            [token for token, (a, b) in zip(ids, spans, strict=True)
             if min(end, b) > max(start, a)] or ids[-1:]
            for start, end in ours["offset_mapping"][i]
        ])
    return ours["input_ids"], targets
