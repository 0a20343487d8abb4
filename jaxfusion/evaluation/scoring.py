"""Scores a bridge or its bare LLM: exact match of answers, and likelihood of labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

import jax
import numpy as np

from jaxfusion.data.batching import (
    Cut,
    Shapes,
    TokenRow,
    find_bare_shapes,
    find_shapes,
    in_order,
    length_buckets,
    tokenize,
    tokenize_bare,
)
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.spec import Task
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.evaluation.continuous import answer_all, make_programs
from jaxfusion.evaluation.generate import Decoding, Score, make_scorer
from jaxfusion.evaluation.kept_states import keep_states
from jaxfusion.evaluation.options import Options, make_options
from jaxfusion.fields import EvalConfig
from jaxfusion.nn.bridge import Bridge, Params

SHARED = 32  # what all prompts of the bare LLM begin with is read once, in multiples of this


@dataclass(frozen=True)
class Scored:
    """The results for each example, in order.

    Attributes:
      answers: the text, stripped, without the stop string that ended it; empty if none was asked.
      likelihoods: [rows, labels] log-likelihood of each label.
      correct: by scoring name (see `Scorer`).
      cut: how many examples were truncated.
      unfinished: whether each answer reached `max_new_tokens` before its end.
    """

    answers: list[str]
    likelihoods: np.ndarray
    correct: dict[str, list[bool]]
    cut: Cut
    unfinished: list[bool]

    def part(self, start: int, end: int) -> "Scored":
        """The results for a slice of the examples; `cut` still counts all of them."""
        correct = {name: right[start:end] for name, right in self.correct.items()}
        return Scored(self.answers[start:end], self.likelihoods[start:end], correct, self.cut,
                      self.unfinished[start:end])


def for_task(config: EvalConfig, task: Task, language: str | None = None) -> EvalConfig:
    """The settings with the task's defaults for fields that are not set."""
    most = task.max_new_tokens if config.max_new_tokens is None else config.max_new_tokens
    return replace(config, max_new_tokens=most,
                   stop=config.stop or task.stop.get(language, ()))


def answering(config: EvalConfig) -> EvalConfig:
    """The settings of who asks for answers, where scoring may do without: 0 is left open."""
    return replace(config, max_new_tokens=config.max_new_tokens or None)


def check_scorable(config: EvalConfig, name: str, task: Task) -> None:
    """Raises InputError for a task that is scored by its answers, if none are generated."""
    if config.max_new_tokens == 0 and not task.labels:
        raise InputError(f"eval.max_new_tokens is 0, but task '{name}' has no labels and is scored "
                         "by its answers; set it to 1 or more, or leave it open")


class Scorer:
    """Scores examples with one compiled program per batch shape.

    `exact_match`: the answer equals the target after strip, as in the papers; if the task extracts
    a part of both, the parts are compared. Greedy unless the config has a temperature. It is
    absent with `max_new_tokens=0`, which generates no answers.
    `likelihood`: the correct label has the largest summed log-probability; for a bridge including
    the end token that training puts after every answer, for the bare LLM without it.
    `likelihood_norm`: the same, divided by the label's length in characters, as `acc_norm` in
    EleutherAI's lm-evaluation-harness.
    """

    def __init__(
        self, bridge: Bridge, tokenizers: Tokenizers, config: EvalConfig,
        text_prompt: str = "", bare: bool = False, keep: float = 0.0,
    ):
        """`config` is specific to a task: see `for_task`; `keep` is `encoder.keep_states`.

        Raises:
          InputError: answers may be longer than the LLM's maximum length.
        """
        longest = bridge.decoder.config.max_length
        if config.max_new_tokens > longest:
            raise InputError(f"eval.max_new_tokens is {config.max_new_tokens:,}, but the LLM reads "
                             f"at most {longest:,} tokens; set it lower")
        self.tokenizers, self.config = tokenizers, config
        self.text_prompt, self.bare, self.latents = text_prompt, bare, bridge.latents
        self.bridge, self.keep = bridge, 0.0 if bare else keep
        self.vocabulary = bridge.decoder.config.vocab_size
        self.decoding = Decoding(config.max_new_tokens, tokenizers.eos, config.temperature,
                                 config.top_p, config.seed)

    def __call__(
        self, params: Params, examples: Sequence[Example], task: Task,
        progress: Callable[[int], None] = lambda rows: None,
        numbers: Sequence[int] | None = None,
    ) -> Scored:
        """Scores the examples.

        Args:
          progress: called with the number of rows that were scored.
          numbers: of the examples, to seed their samples; default: their indices.
        """
        rows, cut = self.rows(examples, task.keeps_end)
        row_numbers = np.arange(len(rows)) if numbers is None else np.asarray(numbers)
        answers, likelihoods = [""] * len(rows), np.zeros((len(rows), len(task.labels)))
        unfinished = [False] * len(rows)
        fill = keep_states(self.bridge, params, rows, self.tokenizers, self.keep)
        if self._only_answers(task):
            found = self._answer(params, rows, row_numbers, fill)
        else:
            found = self._score(params, rows, row_numbers, fill, examples, task.labels)
        for number, tokens, chances in found:
            answers[number], unfinished[number] = self._text(tokens)
            likelihoods[number] = chances
            progress(1)
        answered = answers if self.config.max_new_tokens else None
        correct = _correct(task, examples, answered, likelihoods)
        return Scored(answers, likelihoods, correct, cut, unfinished)

    def _only_answers(self, task: Task) -> bool:
        """Whether rows may be answered without regard to which others are in their batch."""
        return bool(self.config.max_new_tokens and not task.labels
                    and not self.bridge.align_padding)

    def _answer(self, params: Params, rows: Sequence[TokenRow], numbers, fill):
        """Every row's index, tokens and likelihoods, of which it has none."""
        programs = make_programs(self.bridge, self.decoding, self.bare, self.shared(rows))
        for row, tokens in answer_all(programs, params, rows, self.shapes(rows), self.tokenizers,
                                      self.config.batch_size, numbers, self._ends, fill):
            yield row, tokens, ()

    def _score(self, params: Params, rows: Sequence[TokenRow], numbers, fill, examples, labels):
        """Every row's index, tokens and likelihoods, batch by batch."""
        score = self.program(rows)
        for chosen, batch in in_order(rows, self.shapes(rows), self.tokenizers,
                                      self.config.batch_size):
            options = self.options([examples[i] for i in chosen], labels)
            batch = batch if fill is None else fill(batch)
            seeds = np.resize(numbers[chosen], self.config.batch_size).astype(np.int32)
            tokens, scores, _ = jax.device_get(
                score(params, batch, options, self._ends, seeds))
            yield from zip(chosen.tolist(), tokens, scores[: len(labels)].T, strict=False)

    def shapes(self, rows: Sequence[TokenRow]) -> Shapes:
        """The batch shapes of these rows."""
        if self.bare:
            return find_bare_shapes(rows, length_buckets(self.config.max_decoder_tokens))
        return find_shapes(rows, length_buckets(self.config.max_encoder_tokens))

    def program(self, rows: Sequence[TokenRow]) -> Score:
        """What scores batches of these rows; see `make_scorer`."""
        return make_scorer(self.bridge, self.decoding, self.bare, self.shared(rows))

    def shared(self, rows: Sequence[TokenRow]) -> int:
        """How many slots all rows begin with in the same way, as few-shot prompts of the bare LLM
        do; 0 if they are too few to be worth a program of their own."""
        if not self.bare or len(rows) < 2:
            return 0
        texts = [row.text for row in rows]
        pairs = zip(min(texts), max(texts), strict=False)  # all others are between these two
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        count = len(self.tokenizers.start) + min(same, *(len(text) - 1 for text in texts))
        return max(count, 0) // SHARED * SHARED  # a text may be empty

    @cached_property
    def _ends(self) -> np.ndarray | None:
        """[V] True at tokens that end an answer: the LLM's other end tokens, and tokens that
        contain a stop string."""
        others = set(self.tokenizers.ends) - {self.tokenizers.eos}
        if not self.config.stop and not others:
            return None
        ends = np.zeros(self.vocabulary, bool)
        ends[list(others)] = True
        if self.config.stop:
            decoder = self.tokenizers.decoder
            pieces = decoder.batch_decode([[i] for i in range(len(decoder))])
            ends[: len(pieces)] |= [any(stop in piece for stop in self.config.stop)
                                    for piece in pieces]
        return ends

    def rows(
        self, examples: Sequence[Example], keeps_end: bool = False
    ) -> tuple[Sequence[TokenRow], Cut]:
        """The examples as ids, without answers."""
        c = self.config
        if self.bare:
            texts = [replace(x, query=self.text_of(x)) for x in examples]
            return tokenize_bare(texts, self.tokenizers, c.max_decoder_tokens)
        return tokenize(
            examples, self.tokenizers, text_prompt=self.text_prompt,
            max_encoder_tokens=c.max_encoder_tokens, max_decoder_tokens=c.max_decoder_tokens,
            with_target=False, keeps_end=keeps_end, latents=self.latents,
        )

    def options(self, examples: Sequence[Example], labels: Sequence[str]) -> Options:
        """Every row's labels; without labels, one empty option."""
        prompts = [self.text_of(example) for example in examples]
        end = [] if self.bare else self.tokenizers.ending
        ids = [
            [answer + end for answer in self.tokenizers.encode_answers(
                prompts, [label] * len(prompts))]
            for label in labels
        ] or [[[] for _ in prompts]]
        return make_options(ids, self.config.batch_size)

    def text_of(self, example: Example) -> str:
        """What the LLM reads before the answer in its own words: alone, the query too."""
        if self.bare and "{query}" not in self.text_prompt:
            return example.query + self.text_prompt
        return self.text_prompt.replace("{query}", example.query)

    def _text(self, tokens: np.ndarray) -> tuple[str, bool]:
        """The answer up to its end token or first stop string, and whether it had neither within
        the limit."""
        text, ended = read_answer(tokens, self.tokenizers, self.config.stop)
        return text.strip(), len(tokens) > 0 and not ended


def read_answer(
    tokens: Sequence[int], tokenizers: Tokenizers, stops: Sequence[str]
) -> tuple[str, bool]:
    """The text up to the first end token or stop string, and whether there was one."""
    ended = np.flatnonzero(np.isin(tokens, tokenizers.ends))
    answer = np.asarray(tokens[: ended[0]] if len(ended) else tokens, int)
    text = tokenizers.decoder.decode(answer.tolist(), skip_special_tokens=True)
    found = [text.find(x) for x in stops if x in text]
    return text[: min(found or [None])], bool(len(ended) or found)


def _correct(
    task: Task, examples: Sequence[Example], answers: list[str] | None, likelihoods: np.ndarray
) -> dict[str, list[bool]]:
    """Which examples are right, by scoring name."""
    correct = {}
    if answers is not None:
        extract = task.extract or str.strip
        pairs = [(extract(answer), extract(example.target))
                 for answer, example in zip(answers, examples, strict=True)]
        # Two empty extractions are not a match: there was no answer.
        correct["exact_match"] = [answer == target != "" for answer, target in pairs]
    if not task.labels:
        return correct
    right, lengths = np.array([example.label for example in examples]), [*map(len, task.labels)]
    correct["likelihood"] = (likelihoods.argmax(axis=1) == right).tolist()
    correct["likelihood_norm"] = ((likelihoods / lengths).argmax(axis=1) == right).tolist()
    return correct


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities from log-likelihoods."""
    chances = np.exp(scores - np.max(scores)) if len(scores) else scores
    return chances / chances.sum()
