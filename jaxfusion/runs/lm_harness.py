"""Runs EleutherAI's lm-evaluation-harness on a bridge: needs the extra `lm_eval`.

    python -m jaxfusion.runs.lm_harness --model jaxfusion \
        --model_args workdir=runs/xnli_paper --tasks xcopa,xstorycloze

Registers the model `jaxfusion`; the command line is the harness' own. The encoder reads the
context of a request; the LLM scores or generates the continuation.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install -e '.[lm_eval]'")

from jaxfusion.data.batching import TokenRow, in_order
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.options import make_options
from jaxfusion.runs.open_run import open_run

logger = logging.getLogger(__name__)
# No labels; few-shot examples come first, so the question is at the end.
FREE = Task("{text}", (), (), keeps_end=True)
Likelihoods = list[tuple[float, bool]]


@register_model("jaxfusion")
class JaxFusion(LM):
    """A run of `train.py`, or its bare LLM.

    Args:
      workdir: of the run.
      llm_only: use the bare LLM.
      end: whether a likelihood includes the end token, as in training and in `eval.py`; never for
        the bare LLM.
      batch_size: default: the run's.
      language: of the texts, for an encoder that is told it (NLLB, M2M100).
      device, max_batch_size: passed by the harness and ignored; jax uses all devices.

    Raises:
      InputError: no such run.
    """

    def __init__(
        self, workdir: str | None = None, llm_only: bool = False, end: bool = True,
        batch_size: int | str | None = None, device: str | None = None,
        max_batch_size: int | None = None, language: str = "",
    ):
        super().__init__()
        if workdir is None:
            raise InputError("workdir is missing; give --model_args workdir=DIR")
        given = {"batch_size": int(batch_size)} if str(batch_size or "").isdigit() else {}
        self.run = open_run(Path(workdir), given, llm_only)
        if llm_only:  # the harness' tasks have prompts of their own
            data = replace(self.run.config.data, text_prompt="")
            self.run = replace(self.run, config=replace(self.run.config, data=data))
        self.language = self.run.checked_language(language)
        self.params = self.run.params  # read before the harness makes its tasks
        self.bare, self.end, self.workdir = llm_only, end and not llm_only, workdir

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness' request cache."""
        return self.run.config.decoder.checkpoint

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> Likelihoods:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        Spaces between context and continuation belong to the context, as in jaxfusion's prompts;
        options of the same context share one pass.
        """
        asked = [_at_seam(*request.args) for request in requests]
        empty = sum(not context.strip() for context, _ in asked)
        if empty and not self.bare:
            logger.warning("%d of %d requests have no context: the encoder reads nothing, the LLM "
                           "alone decides", empty, len(asked))
        contexts = list(dict.fromkeys(context for context, _ in asked))
        places = defaultdict(list)
        for i, (context, _) in enumerate(asked):
            places[context].append(i)
        prompts = [self._prompt(context) for context, _ in asked]
        ids = self.run.tokenizers.encode_answers(prompts, [answer for _, answer in asked])
        ending = self.run.tokenizers.ending if self.end else []
        ids = [[*answer, *ending] for answer in ids]
        rows, cut = self.run.scorer(FREE).rows(
            [Example(context, "", -1, self.language) for context in contexts], FREE.keeps_end)
        if cut.any:
            logger.warning("contexts longer than the limits: %s", cut)
        scores_of = self._score(rows, [[ids[i] for i in places[context]] for context in contexts])
        by_place = {i: x for context, scores in zip(contexts, scores_of, strict=True)
                    for i, x in zip(places[context], scores, strict=True)}
        return [by_place[i] for i in range(len(asked))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of full texts under the bare LLM, in windows that do not overlap.

        Raises:
          InputError: the model is a bridge, which reads texts and does not predict them.
        """
        if not self.bare:
            raise InputError("a bridge's encoder reads its text and does not predict it; give "
                             "--model_args llm_only=True for perplexity tasks")
        tokenizers, limit = self.run.tokenizers, self.run.config.eval.max_decoder_tokens
        rows, options, counts = [], [], []
        for ids in tokenizers.encode_texts([request.args[0] for request in requests]):
            windows = [make_disjoint_window(x)
                       for x in get_rolling_token_windows(ids, 0, limit, 1)]
            # The first window's context is the start of every row; later contexts follow it.
            rows += [TokenRow([], context if i else [], []) for i, (context, _) in
                     enumerate(windows)]
            options += [[list(wanted)] for _, wanted in windows]
            counts.append(len(windows))
        scores = iter(score for (score, _), in self._score(rows, options))
        return [sum(next(scores) for _ in range(count)) for count in counts]

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Answers up to a stop string or the end token."""
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        answers = [""] * len(requests)
        for places in groups.values():
            scorer = self.run.scorer(FREE, **_decoding(requests[places[0]].args[1]))
            examples = [Example(requests[i].args[0], "", -1, self.language) for i in places]
            with self.run.on_mesh():
                for i, answer in zip(places, scorer(self.params, examples, FREE).answers,
                                     strict=True):
                    answers[i] = answer
        return answers

    def _prompt(self, context: str) -> str:
        """The LLM's text before the answer."""
        if self.bare:
            return context
        return self.run.config.data.text_prompt.replace("{query}", context)

    def _score(
        self, rows: Sequence[TokenRow], options: Sequence[list[list[int]]]
    ) -> list[Likelihoods]:
        """Each option's log-likelihood after its row, and whether it is greedy."""
        scorer = self.run.scorer(FREE, max_new_tokens=0)
        size, tokenizers = self.run.config.eval.batch_size, self.run.tokenizers
        # An LLM without BOS starts a text without context after its end token.
        rows = [row if row.query or row.text or tokenizers.start
                else replace(row, text=[tokenizers.eos]) for row in rows]
        most, scored = max(map(len, options), default=0), [[] for _ in rows]
        score = scorer.program(rows)
        with self.run.on_mesh():
            for numbers, batch in in_order(rows, scorer.shapes(rows), tokenizers, size):
                ids = [[options[i][c] if c < len(options[i]) else [] for i in numbers]
                       for c in range(most)]
                _, scores, greedy = jax.device_get(
                    score(self.params, batch, make_options(ids, size)))
                for row, i in enumerate(numbers):
                    scored[i] = [(float(scores[c, row]), bool(greedy[c, row]))
                                for c in range(len(options[i]))]
        return scored


def _at_seam(context: str, continuation: str) -> tuple[str, str]:
    """Context and answer, with the spaces between them moved to the context's end."""
    answer = continuation.lstrip()
    return context + continuation[: len(continuation) - len(answer)], answer


def _decoding(asked: dict[str, Any]) -> dict[str, Any]:
    """The harness' generation settings as fields of `EvalConfig`.

    Raises:
      InputError: an unsupported setting.
    """
    asked = dict(asked)
    until, sample = asked.pop("until", None) or (), asked.pop("do_sample", False)
    fields = {"stop": (until,) if isinstance(until, str) else tuple(until)}
    names = {"max_gen_toks": "max_new_tokens", "temperature": "temperature", "top_p": "top_p"}
    for name in [name for name in names if name in asked]:
        fields[names[name]] = asked.pop(name)
    if asked:
        raise InputError(f"generation setting {', '.join(asked)} is not supported; known: until, "
                         f"do_sample, {', '.join(names)}")
    return fields if sample else {**fields, "temperature": 0.0, "top_p": 1.0}


if __name__ == "__main__":
    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(f"error: {error}")
