"""Scores a workdir's best checkpoint on tasks and languages."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE, directory_name
from jaxfusion.data.seen import fingerprints, read_seen
from jaxfusion.data.sources import Example, at_hand, read_examples
from jaxfusion.data.task import Task
from jaxfusion.data.tasks import check_languages, configured, get_task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.layers import layer_weigher, token_weights
from jaxfusion.evaluation.metrics import accuracy
from jaxfusion.evaluation.report import Results, merge_results
from jaxfusion.evaluation.runs import ALONE, DETAILS, Details
from jaxfusion.evaluation.scoring import Scored, Scorer, for_task
from jaxfusion.fields import DECODING, CompareConfig, Config, TaskConfig
from jaxfusion.files import WRITER, only_writer
from jaxfusion.sharding.hosts import check_peers, is_first
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.frozen import OWN, frozen_part
from jaxfusion.training.state import Model, load_model, merge, overlay

logger = logging.getLogger(__name__)
Rows = dict[str, dict[str, list[Example]]]  # by task and language
SHOWN = 80  # characters of a row in messages


def evaluate(
    workdir: Path, *, tasks: tuple[str, ...] = (), languages: tuple[str, ...] = (),
    limit: int | None = None, llm_only: bool = False, data_path: str | None = None,
    drop_seen: bool = False, decoding: dict[str, Any] | None = None,
) -> tuple[Results, Details]:
    """Scores the test split and writes `eval/results.json` (or `eval/llm_only.json`).

    `eval/details.json` (`llm_only_details.json`) has by task and language what is behind them, row
    by row: `queries`, `targets`, `answers`, `likelihoods` of the `labels`, and `correct`, by
    scoring a 0 or 1. Of a fusion with weights also the mean `layer_weights`, and those of the
    first row's `tokens`.

    Args:
      tasks, languages: default to the config's, and these to the training task and all of its
        languages. limit: rows of each.
      llm_only: the LLM alone, on the text prompt.
      data_path: where the tasks' rows are, as `data.path`; defaults to the config's for the
        training task, and to their own sources for others.
      drop_seen: leaves out, and counts, rows that the run was trained on, in all languages of
        parallel ones; so does `config.eval.drop_seen`.
      decoding: fields of `EvalConfig` in place of the run's own.

    Returns:
      All results that the file now holds (in other processes than the first: what was scored now),
      and the details of what was scored now.

    Raises:
      InputError: no such run, task, language or data; or a test row that was trained on.
    """
    config = load_config(workdir, decoding)
    check_peers(workdir=str(workdir), asked=str((tasks, languages, limit, llm_only, data_path,
                                                 drop_seen, decoding)))
    rows = read_rows(config, tasks, languages, limit, data_path)
    drop_seen = drop_seen or config.eval.drop_seen
    rows = unseen(rows, seen_by(config, workdir), drop_seen, config.tasks)
    mesh = make_mesh(**vars(config.mesh))
    with jax.set_mesh(mesh):
        step, model = load_trained(config, workdir, mesh, llm_only)
        new, details = _score(model, rows, llm_only)
    if not is_first():
        return new, details
    name, more = ("llm_only.json", ALONE) if llm_only else ("results.json", DETAILS)
    about = {"step": step, "limit": limit, "encoder": config.encoder.checkpoint,
             "decoder": config.decoder.checkpoint, "drop_seen": drop_seen, "data_path": data_path,
             "decoding": {name: getattr(config.eval, name) for name in DECODING}}
    about = json.loads(json.dumps(about))
    folder = workdir / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    # Of several at once each adds its languages.
    with only_writer(folder / WRITER, folder, wait=True):
        merge_results(folder / more, details, about, indent=None)
        return merge_results(folder / name, new, about), details


def load_config(workdir: Path, decoding: dict[str, Any] | None = None) -> Config:
    """The config of a bridge's workdir.

    Args:
      decoding: fields of `eval` in place of its own.

    Raises:
      InputError: it is none, or that of another job.
    """
    config = configs.load(workdir / CONFIG_FILE)
    if isinstance(config, CompareConfig):
        inside = ", ".join(str(workdir / x) for runs in places(config).values() for x in runs)
        raise InputError(f"{workdir} is a comparison; give one of its bridges: {inside}")
    if not isinstance(config, Config):
        raise InputError(f"{workdir} holds no bridge but a run of job '{config.job}'")
    config = replace(config, eval=replace(config.eval, **decoding or {}))
    configs.check(config)
    return config


def places(config: CompareConfig) -> dict[str, list[Path]]:
    """Where below its workdir a comparison keeps the runs of each variant, seed by seed."""
    return {
        str(fields["name"]): [Path(directory_name(fields["name"]), *inside) for inside in (
            [(f"seed_{seed}",) for seed in config.seeds] or [()])]
        for fields in config.variants
    }


def load_trained(
    config: Config, workdir: Path, mesh, llm_only: bool = False
) -> tuple[int, Model]:
    """The step of a workdir's best checkpoint, and the model with it.

    Args:
      llm_only: the towers alone, as at step 0: no checkpoint is needed.

    Raises:
      InputError: there is none, or it does not fit.
    """
    if llm_only:
        return 0, load_model(config, mesh)
    step, trained = trained_part(workdir)
    model = load_model(config, mesh)
    complete = not any(path.startswith(OWN) for path in model.frozen)
    return step, overlay(model, frozen_part(workdir, config, complete) | trained, str(workdir))


def read_rows(
    config: Config, tasks: tuple[str, ...], languages: tuple[str, ...], limit: int | None,
    data_path: str | None,
) -> Rows:
    """Test rows of every task and language asked for, all read before anything is scored."""
    wanted: Rows = {}
    for name in tasks or config.eval.tasks or (config.data.task,):
        task, path = get_task(name, config.tasks), data_path
        if name == config.data.task:  # another task's rows are not where this one's are
            task, path = configured(task, config.data), data_path or config.data.path
        chosen = languages or config.eval.languages or at_hand(name, task, "test", path)
        check_languages(name, chosen, config.tasks)
        wanted[name] = {language: read_examples(name, task, "test", language, path)[:limit]
                        for language in chosen}
    return wanted


def seen_by(config: Config, workdir: Path) -> np.ndarray:
    """Fingerprints of what a run, and those that it started from, were trained on."""
    found = read_seen(workdir)
    if found is None:
        logger.warning("%s does not say what it was trained on: test rows are not compared with "
                       "it", workdir)
        found = np.zeros(0, np.uint64)
    if config.train.init_from is None:
        return found
    before = Path(config.train.init_from)
    if not (before / CONFIG_FILE).is_file():
        logger.warning("%s started from %s, which is not there: test rows are not compared with "
                       "what that was trained on", workdir, before)
        return found
    return np.union1d(found, seen_by(load_config(before), before))


def unseen(
    rows: Rows, seen: np.ndarray, drop: bool, own: Mapping[str, TaskConfig] | None = None
) -> Rows:
    """Test rows that were not trained on.

    Args:
      own: the config's own tasks.

    Raises:
      InputError: one that was, unless such rows are to be left out.
    """
    kept: Rows = {}
    for name, by_language in rows.items():
        found = {language: np.isin(fingerprints(x.query for x in examples), seen)
                 for language, examples in by_language.items()}
        task = get_task(name, own)
        parallel = [x for x in by_language if task.parallel and x not in task.sources]
        if len({len(found[language]) for language in parallel}) > 1:
            parallel = []  # the user's own files, of which rows are missing
        for language, examples in by_language.items():
            known = found[language]
            if drop and language in parallel:  # translations stay or go together
                known = np.any([found[x] for x in parallel], axis=0)
            if known.any() and not drop:
                first = int(np.argmax(known))
                raise InputError(
                    f"test row {first + 1} of '{name}' in '{language}' was trained on: "
                    f"'{examples[first].query[:SHOWN]}' ({known.sum()} of {len(known)} rows were); "
                    "train without these rows, or leave them out of the test with --drop_seen "
                    "(config.eval.drop_seen)")
            if known.all():
                raise InputError(f"all {len(known)} test rows of '{name}' in '{language}' were "
                                 "trained on")
            if known.any():
                logger.warning("%s %s: %d of %d test rows left out, as they (or the same rows in "
                               "another language) were trained on", name, language, known.sum(),
                               len(known))
            kept.setdefault(name, {})[language] = [
                x for x, was in zip(examples, known, strict=True) if not was]
    return kept


def _score(model: Model, rows: Rows, llm_only: bool) -> tuple[Results, Details]:
    config, results, details = model.config, {}, {}
    params = merge(model.trainable, model.frozen)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=sum(
            len(x) for by_language in rows.values() for x in by_language.values()))
        for name, by_language in rows.items():
            progress.update(bar, description=name)
            task = get_task(name, config.tasks)
            found = _score_task(model, params, name, task, by_language, llm_only,
                                lambda n: progress.advance(bar, n))
            for language, part in by_language.items():
                scored = found[language]
                results.setdefault(name, {})[language] = {
                    scoring: accuracy(correct) for scoring, correct in scored.correct.items()}
                results[name][language]["exact_match"]["unfinished"] = sum(scored.unfinished)
                details.setdefault(name, {})[language] = {
                    **_detail(part, scored), "labels": task.labels}
                if not llm_only:
                    details[name][language] |= _layers(model, params, part)
    return results, details


def _score_task(
    model: Model, params, name: str, task: Task, by_language: dict[str, list[Example]],
    llm_only: bool, progress: Callable[[int], None],
) -> dict[str, Scored]:
    """What came out for each language; those whose answers end alike share batches."""
    config, found = model.config, {}
    together = [[x] for x in by_language] if task.stop else [list(by_language)]
    for languages in together:
        settings = for_task(config.eval, task, languages[0])
        scorer = Scorer(model.bridge, model.tokenizers, settings, config.data.text_prompt, llm_only)
        examples = [x for language in languages for x in by_language[language]]
        numbers = [i for language in languages for i in range(len(by_language[language]))]
        scored = scorer(params, examples, task, progress, numbers)
        if scored.cut.any:
            logger.warning("%s, longer than the limits: %s", name, scored.cut)
        if any(scored.unfinished) and not task.labels:
            logger.warning("%s %s: %d of %d answers were cut at %d new tokens before their end; "
                           "raise eval.max_new_tokens (--max_new_tokens)", name,
                           ", ".join(languages), sum(scored.unfinished), len(examples),
                           settings.max_new_tokens)
        start = 0
        for language in languages:
            end = start + len(by_language[language])
            found[language], start = scored.part(start, end), end
    return found


def _detail(examples: list[Example], scored: Scored) -> dict[str, Any]:
    return {
        "correct": {scoring: [int(right) for right in correct]
                    for scoring, correct in scored.correct.items()},
        "queries": [x.query for x in examples], "targets": [x.target for x in examples],
        "answers": scored.answers, "likelihoods": scored.likelihoods.round(4).tolist(),
    }


def _layers(model: Model, params, examples: list[Example]) -> dict[str, Any]:
    """What the fusion takes: on average, and for the first row's tokens."""
    inside = model.bridge, model.tokenizers, model.config.eval
    weigh = layer_weigher(*inside)
    return {"layer_weights": weigh and weigh(params, examples),
            "tokens": token_weights(*inside, params, examples[0])}
