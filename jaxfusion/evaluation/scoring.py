"""Scores a bridge, or its bare LLM: greedy exact match, and likelihood of the labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxfusion.data.batching import (
    Cut,
    TokenRow,
    doubling_buckets,
    find_bare_shapes,
    find_shapes,
    in_order,
    tokenize,
    tokenize_bare,
)
from jaxfusion.data.sources import Example
from jaxfusion.data.task import Task
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.evaluation.generate import make_scorer
from jaxfusion.fields import EvalConfig
from jaxfusion.nn.bridge import Bridge, Params


@dataclass(frozen=True)
class Scored:
    """What came out for each example, in their order.

    Attributes:
      answers: the greedy text, stripped.
      likelihoods: [rows, labels] log-likelihood of each label.
      correct: by scoring name, `greedy_exact` and (for tasks with labels) `likelihood`.
      cut: how many examples were longer than the limits.
    """

    answers: list[str]
    likelihoods: np.ndarray
    correct: dict[str, list[bool]]
    cut: Cut


class Scorer:
    """Scores examples with one compiled program per batch shape.

    `greedy_exact`: the greedy answer equals the target after strip, as the papers score; where the
    task extracts something of both, that.
    `likelihood`: the correct label has the largest summed log-probability; behind a bridge with
    the end token that training put after every answer, for the bare LLM without it.
    """

    def __init__(
        self, bridge: Bridge, tokenizers: Tokenizers, config: EvalConfig,
        text_prompt: str = "", bare: bool = False,
    ):
        self.tokenizers, self.config = tokenizers, config
        self.text_prompt, self.bare, self.latents = text_prompt, bare, bridge.latents
        self.score = make_scorer(bridge, config.max_new_tokens, tokenizers.eos, bare)

    def __call__(
        self, params: Params, examples: Sequence[Example], task: Task,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Scored:
        """Scores the examples; `progress` is told how many rows each batch had."""
        rows, cut = self._rows(examples)
        labels, extract = task.labels, task.extract or str.strip
        buckets = doubling_buckets(self.config.max_encoder_tokens)
        if self.bare:
            buckets = doubling_buckets(self.config.max_decoder_tokens)
        shapes = (find_bare_shapes if self.bare else find_shapes)(rows, buckets)
        answers, likelihoods = [""] * len(rows), np.zeros((len(rows), len(labels)))
        for numbers, batch in in_order(rows, shapes, self.tokenizers, self.config.batch_size):
            options, mask = self._options([examples[i] for i in numbers], labels)
            tokens, scores = jax.device_get(self.score(params, batch, options, mask))
            for row, number in enumerate(numbers):
                answers[number] = self._text(tokens[row])
                likelihoods[number] = scores[: len(labels), row]
            progress(len(numbers))
        correct = {
            "greedy_exact": [
                extract(answer) == extract(example.target)
                for answer, example in zip(answers, examples, strict=True)
            ]
        }
        if labels:
            correct["likelihood"] = [
                bool(np.argmax(found) == example.label)
                for found, example in zip(likelihoods, examples, strict=True)
            ]
        return Scored(answers, likelihoods, correct, cut)

    def _rows(self, examples: Sequence[Example]) -> tuple[list[TokenRow], Cut]:
        c = self.config
        if self.bare:
            return tokenize_bare(examples, self.tokenizers, c.max_decoder_tokens)
        return tokenize(
            examples, self.tokenizers, text_prompt=self.text_prompt,
            max_encoder_tokens=c.max_encoder_tokens, max_decoder_tokens=c.max_decoder_tokens,
            with_target=False, latents=self.latents,
        )

    def _options(self, examples: Sequence[Example], labels: Sequence[str]):
        """Ids and mask [C B T] of every row's labels; without labels, one empty option."""
        prompts = [
            example.query if self.bare else self.text_prompt.replace("{query}", example.query)
            for example in examples
        ]
        end = [] if self.bare else [self.tokenizers.eos]
        ids = [
            [answer + end for answer in self.tokenizers.encode_answers(
                prompts, [label] * len(prompts))]
            for label in labels
        ] or [[[] for _ in prompts]]
        longest = max(len(answer) for rows in ids for answer in rows)
        # Letters are read from the prompt's last logits; longer answers share few shapes.
        longest = longest if longest <= 1 else max(8, longest)
        shape = (len(ids), self.config.batch_size, longest)
        options, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for c, rows in enumerate(ids):
            for b, answer in enumerate(rows):
                options[c, b, : len(answer)] = answer
                mask[c, b, : len(answer)] = True
        return options, mask

    def _text(self, tokens: np.ndarray) -> str:
        """The answer up to its end token."""
        ended = np.flatnonzero(tokens == self.tokenizers.eos)
        kept = tokens[: ended[0]] if len(ended) else tokens
        return self.tokenizers.decoder.decode(kept.tolist(), skip_special_tokens=True).strip()
