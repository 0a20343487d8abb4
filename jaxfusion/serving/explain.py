"""What the page shows besides an answer: the labels' probabilities, the tokens' layer weights."""

from typing import Any

import jax

from jaxfusion.data.rows.examples import Example
from jaxfusion.evaluation.generate import Decoding, make_scorer
from jaxfusion.evaluation.layers import row_weights
from jaxfusion.evaluation.scoring import softmax
from jaxfusion.serving.engine import Ask, gather, shape_of
from jaxfusion.serving.served import Served


def explain(model: Served, text: str, language: str = "") -> dict[str, Any]:
    """`labels` with probabilities, best first (none for free text), and the encoder's `tokens`
    with the `weights` of layers 1 … L for each (None for the LLM alone, and for a fusion that
    reads a single layer).

    Raises:
      InputError: see `Served.prompt`.
    """
    row = model.prompt(text, language)
    batch = gather(model, shape_of(Ask(row, 0)), [row], 1)
    by_token = None
    if not model.bare and model.bridge.fusion_module is not None:
        by_token = row_weights(model.bridge, model.tokenizers, model.params, batch)
    return {"labels": _labels(model, batch, Example(text, "", -1, language)),
            "fusion": None if model.bare else model.bridge.fusion,
            **(by_token or {"tokens": None, "weights": None})}


def _labels(model: Served, batch, example: Example) -> list[dict[str, Any]]:
    labels = model.task.labels
    if not labels:
        return []
    score = make_scorer(model.bridge, Decoding(0, model.tokenizers.eos), model.bare)
    options = model.scorer.options([example], labels)
    _, scores, _ = jax.device_get(score(model.params, batch, options))
    chances = softmax(scores[: len(labels), 0]).tolist()
    pairs = zip(labels, chances, strict=True)
    return [{"label": label, "probability": chance}
            for label, chance in sorted(pairs, key=lambda pair: -pair[1])]
