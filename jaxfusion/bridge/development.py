"""Development rows of a bridge, in one language or several, and the scores of a run on them."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import islice

import jax
import numpy as np

from jaxfusion.bridge.rows import shapes_of, tokenized
from jaxfusion.data.batching import Cut
from jaxfusion.data.pipeline import Batches, steps_per_epoch
from jaxfusion.data.rows.examples import Example, at_hand, read_stream
from jaxfusion.data.tasks.catalogue import check_languages
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError, listed
from jaxfusion.evaluation.scoring import Scorer, for_task
from jaxfusion.fields import Config
from jaxfusion.nn.bridge import Bridge
from jaxfusion.reports.statistics import accuracy
from jaxfusion.sharding.mesh import sharding
from jaxfusion.training.load import Model
from jaxfusion.training.state import Flat, merge
from jaxfusion.training.trainer import put_batch

Rows = dict[str, list[Example]]  # by language
Score = Callable[[Flat], dict[str, float]]  # trained parameters -> scores by name
logger = logging.getLogger(__name__)


def read_development(config: Config, task: Task) -> Rows:
    """The first `data.dev_rows` rows of each language of development.

    Raises:
      InputError: a language has none; or as in `read_stream`.
    """
    c = config.data
    languages = _languages(config, task)
    check_languages(c.task, languages, config.tasks)
    if c.dev_decides not in ("mean", *languages):
        raise InputError(f"data.dev_decides is '{c.dev_decides}', expected mean, or a language of "
                         f"development: {listed(languages)}")
    have = at_hand(c.task, task, "dev", c.path) if c.dev_languages else ()
    if absent := [x for x in c.dev_languages if x not in have]:
        raise InputError(f"data.dev_languages has {listed(absent)}, but the development rows of "
                         f"task '{c.task}' are in {listed(have)}")
    return {language: list(islice(read_stream(c.task, task, "dev", language, c.path), c.dev_rows))
            for language in languages}


def _languages(config: Config, task: Task) -> tuple[str, ...]:
    """Those of development."""
    return config.data.dev_languages or task.training_languages(config.data.language)


def deciding(config: Config, task: Task) -> str:
    """The name of the score that decides which checkpoint is best."""
    one = config.data.dev_decides
    alone = len(_languages(config, task)) < 2 or one == "mean"
    return task.development if alone else f"{one}/{task.development}"


def make_score(model: Model, dev: Rows, task: Task, mesh) -> Score:
    """Scores of all languages: their means by name and, of several, also `LANGUAGE/NAME`."""
    make = _likelihood if task.development == "log_likelihood" else _correctness
    of = {language: make(model, rows, task, language, mesh) for language, rows in dev.items()}

    def score(trainable: Flat) -> dict[str, float]:
        every = {language: one(trainable) for language, one in of.items()}
        means = {name: float(np.mean([scores[name] for scores in every.values()]))
                 for name in next(iter(every.values()))}
        return means if len(every) < 2 else means | {
            f"{language}/{name}": value
            for language, scores in every.items() for name, value in scores.items()}

    return score


def _correctness(model: Model, rows: list[Example], task: Task, language: str, mesh) -> Score:
    """Accuracy in a language, by scoring name."""
    config = model.config
    scorer = Scorer(model.bridge, model.tokenizers, for_task(config.eval, task, language),
                    config.data.text_prompt, keep=config.encoder.keep_states)
    say_once = lru_cache(1)(_say_cut)  # the rows are the same ones every time

    def score(trainable: Flat) -> dict[str, float]:
        scored = scorer(merge(trainable, model.frozen), rows, task)
        say_once(scored.cut)
        return {name: accuracy(right)["accuracy"] for name, right in scored.correct.items()}

    return score


def _say_cut(cut: Cut | None) -> None:
    if cut and cut.any:
        logger.warning("development rows longer than the limits: %s", cut)


def _likelihood(model: Model, rows: list[Example], task: Task, language: str, mesh) -> Score:
    """The mean log-likelihood of a target's token; a text without one is split at the place where
    the first epoch would."""
    c = model.config
    texts, cut = tokenized(c, task, rows, model.tokenizers, model.bridge.latents)
    _say_cut(cut)
    batches = Batches(
        texts, shapes_of(c, texts), model.tokenizers, c.train.batch_size, c.train.seed,
        steps_per_epoch(len(texts), c.train.batch_size), sharding(mesh, "batch"))

    def score(trainable: Flat) -> dict[str, float]:
        found = [jax.device_get(_loss(model.bridge, trainable, model.frozen,
                                      put_batch(batches[i], mesh))) for i in range(len(batches))]
        total = sum(float(count) for _, count in found)
        return {"log_likelihood": -sum(float(mean * count) for mean, count in found) / total}

    return score


@partial(jax.jit, static_argnums=0)  # one program for all languages
def _loss(bridge: Bridge, trainable: Flat, frozen: Flat, batch):
    return bridge.loss(merge(trainable, frozen), batch)
