"""Scores a workdir's best checkpoint on tasks and languages."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxfusion.config import CONFIG_FILE, stage_before
from jaxfusion.data.contamination import fingerprints, read_seen
from jaxfusion.data.coverage import SAMPLE, check_joints, check_reading
from jaxfusion.data.languages import by_every_code
from jaxfusion.data.rows.examples import Example, at_hand, read_examples
from jaxfusion.data.tasks.catalogue import check_languages, get_task
from jaxfusion.data.tasks.spec import Task, configured
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import Scored, check_scorable
from jaxfusion.fields import DECODING, Config, DecoderSettings, EncoderSettings, TaskConfig
from jaxfusion.files import WRITER, only_writer
from jaxfusion.reports.scored_runs import ALONE, DETAILS, Details
from jaxfusion.reports.statistics import accuracy
from jaxfusion.reports.terminal import Results, merge_results, read_results
from jaxfusion.runs.open_run import OpenRun, open_run
from jaxfusion.sharding.hosts import all_or_none, check_peers, is_first

logger = logging.getLogger(__name__)
TaskRows = dict[str, dict[str, list[Example]]]  # by task and language
SHOWN = 80  # characters of a row in messages
PROGRESS_SECONDS = 20  # between two lines on the progress


def evaluate(
    workdir: Path, *, tasks: tuple[str, ...] = (), languages: tuple[str, ...] = (),
    limit: int | None = None, llm_only: bool = False, data_path: str | None = None,
    drop_seen: bool = False, decoding: dict[str, Any] | None = None, share_states: bool = False,
    again: bool = True,
) -> tuple[Results, Details]:
    """Scores the test split and writes `eval/results.json` (or `eval/llm_only.json`).

    `eval/details.json` (`llm_only_details.json`) has the details of each row, by task and
    language: `queries`, `targets`, `answers`, `likelihoods` of the `labels`, and `correct`, 0 or 1
    by scoring. For a fusion with weights also the mean `layer_weights`, and those of the first
    row's `tokens`.

    Args:
      tasks, languages: default: the config's values; if those are empty, the training task and all
        its languages. limit: rows of each.
      llm_only: score the LLM alone, on the query and the text prompt.
      data_path: of the tasks' rows, as `data.path`; default: the config's for the training task,
        the tasks' own sources for others.
      drop_seen: drop rows that the run was trained on (parallel rows in all languages) and report
        their number; `config.eval.drop_seen` does the same.
      decoding: fields of `EvalConfig` that override the run's own.
      share_states: see `open_run`.
      again: False leaves out languages whose same rows were scored with the same settings.

    Returns:
      All results in the file (in processes other than the first: the new ones), and the details of
      the new results.

    Raises:
      InputError: no such run, task, language or data; or a test row that was trained on.
    """
    check_peers(workdir=str(workdir), asked=str((tasks, languages, limit, llm_only, data_path,
                                                 drop_seen, decoding)))
    with all_or_none():
        run = open_run(workdir, decoding, llm_only, share_states)
        config = run.config
        drop_seen = drop_seen or config.eval.drop_seen
        rows = unseen(read_rows(config, tasks, languages, limit, data_path),
                      seen_by(config, workdir), drop_seen, config.tasks)
        if not (languages or config.eval.languages):
            rows = readable(run, rows)
    name, more = ("llm_only.json", ALONE) if llm_only else ("results.json", DETAILS)
    settings = {"limit": limit, "encoder": _held(config.encoder),
                "decoder": _held(config.decoder), "drop_seen": drop_seen,
                "data_path": data_path,
                "decoding": {x: getattr(config.eval, x) for x in DECODING}}
    settings = json.loads(json.dumps(settings))
    folder = workdir / "eval"
    if not again:
        with all_or_none():
            about = {"step": run.trained()[0], **settings}
            scored, texts = (read_results(folder / x, about) for x in (name, more))
        rows = _unscored(rows, scored, texts)
        check_peers(unscored=str({task: list(parts) for task, parts in rows.items()}))
        if not rows:  # no tower is loaded
            return scored, {}
    with run.on_mesh():
        new, details = _score(run, rows)
    if not is_first():
        return new, details
    about = {"step": run.step, **settings}
    folder.mkdir(parents=True, exist_ok=True)
    # Concurrent processes each add their languages.
    with only_writer(folder / WRITER, folder, wait=True):
        merge_results(folder / more, details, about, indent=None)
        return merge_results(folder / name, new, about), details


def _held(tower: EncoderSettings | DecoderSettings) -> str:
    """A tower's checkpoint, and the dtype that it is held in if that rounds it."""
    return tower.checkpoint if tower.dtype == "float32" else f"{tower.checkpoint} in {tower.dtype}"


def read_rows(
    config: Config, tasks: tuple[str, ...], languages: tuple[str, ...], limit: int | None,
    data_path: str | None,
) -> TaskRows:
    """The test rows of every requested task and language, read before anything is scored."""
    rows: TaskRows = {}
    for name in tasks or config.eval.tasks or (config.data.task,):
        task, path = get_task(name, config.tasks), data_path
        if name == config.data.task:  # data.path has the rows of the training task only
            task, path = configured(task, config.data), data_path or config.data.path
        check_scorable(config.eval, name, task)
        chosen = languages or config.eval.languages or at_hand(name, task, "test", path)
        check_languages(name, chosen, config.tasks)
        rows[name] = {language: read_examples(name, task, "test", language, path)[:limit]
                        for language in chosen}
    return rows


def readable(run: OpenRun, rows: TaskRows) -> TaskRows:
    """The rows without languages that nobody asked for and the encoder cannot be told."""
    if run.llm_only or run.tokenizers.languages is None:
        return rows
    told = by_every_code(run.tokenizers.languages)
    left_out = sorted({x for by_language in rows.values() for x in by_language} - told.keys())
    if unread := [name for name, by_language in rows.items() if not told.keys() & by_language]:
        raise InputError(f"the encoder has no token for any language of {', '.join(unread)}")
    if left_out:
        logger.warning("left out, as the encoder has no token for them: %s", ", ".join(left_out))
    return {name: {language: part for language, part in by_language.items() if language in told}
            for name, by_language in rows.items()}


def _unscored(rows: TaskRows, results: Results, details: Details) -> TaskRows:
    """The rows without languages whose same texts are scored."""
    def is_scored(name: str, language: str, part: list[Example]) -> bool:
        known = details.get(name, {}).get(language, {})
        return language in results.get(name, {}) and (
            known.get("queries"), known.get("targets")) == (
            [x.query for x in part], [x.target for x in part])

    left = {name: {language: part for language, part in by_language.items()
                   if not is_scored(name, language, part)}
            for name, by_language in rows.items()}
    return {name: by_language for name, by_language in left.items() if by_language}


def seen_by(config: Config, workdir: Path) -> np.ndarray:
    """Fingerprints of the training texts of a run and of the runs that it started from."""
    seen = read_seen(workdir)
    if seen is None:
        logger.warning("%s has no record of its training rows: test rows are not compared with "
                       "them", workdir)
        seen = np.zeros(0, np.uint64)
    before = stage_before(config, workdir)
    if before is None:
        return seen
    if not (before / CONFIG_FILE).is_file():
        logger.warning("%s started from %s, which is missing: test rows are not compared with its "
                       "training rows", workdir, before)
        return seen
    return np.union1d(seen, seen_by(open_run(before).config, before))


def unseen(
    rows: TaskRows, seen: np.ndarray, drop: bool, own: Mapping[str, TaskConfig] | None = None
) -> TaskRows:
    """The test rows that were not trained on.

    Args:
      drop: drop rows that were trained on, instead of raising. own: the config's own tasks.

    Raises:
      InputError: a row was trained on and `drop` is False, or all rows were.
    """
    unseen_rows: TaskRows = {}
    for name, by_language in rows.items():
        is_seen = {language: np.isin(fingerprints(x.query for x in examples), seen)
                 for language, examples in by_language.items()}
        task = get_task(name, own)
        parallel = [x for x in by_language if task.parallel and x not in task.sources]
        if len({len(is_seen[language]) for language in parallel}) > 1:
            parallel = []  # the user's own files, with missing rows
        for language, examples in by_language.items():
            known = is_seen[language]
            if drop and language in parallel:  # translations are dropped together
                known = np.any([is_seen[x] for x in parallel], axis=0)
            if known.any() and not drop:
                first = int(np.argmax(known))
                raise InputError(
                    f"test row {first + 1} of '{name}' in '{language}' was trained on: "
                    f"'{examples[first].query[:SHOWN]}' ({known.sum()} of {len(known)} rows were); "
                    "train without these rows, or drop them from the test with --drop_seen "
                    "(config.eval.drop_seen)")
            if known.all():
                raise InputError(f"all {len(known)} test rows of '{name}' in '{language}' were "
                                 "trained on")
            if known.any():
                logger.warning("%s %s: %d of %d test rows dropped: they (or the same rows in "
                               "another language) were trained on", name, language, known.sum(),
                               len(known))
            unseen_rows.setdefault(name, {})[language] = [
                x for x, was in zip(examples, known, strict=True) if not was]
    return unseen_rows


def _score(run: OpenRun, rows: TaskRows) -> tuple[Results, Details]:
    results, details = {}, {}
    if not run.llm_only:
        for by_language in rows.values():
            for part in by_language.values():
                check_reading(run.tokenizers, part)
    with progress_of(sum(len(x) for by_language in rows.values() for x in by_language.values())
                     ) as progress:
        for name, by_language in rows.items():
            task = get_task(name, run.config.tasks)
            scored_by_language = _score_task(run, name, task, by_language, progress)
            for language, part in by_language.items():
                scored = scored_by_language[language]
                results.setdefault(name, {})[language] = {
                    scoring: accuracy(correct) for scoring, correct in scored.correct.items()}
                if "exact_match" in scored.correct:
                    results[name][language]["exact_match"]["unfinished"] = sum(scored.unfinished)
                details.setdefault(name, {})[language] = {
                    **detail(part, scored), "labels": task.labels}
                if not run.llm_only:
                    details[name][language] |= _layers(run, part)
    return results, details


@contextmanager
def progress_of(total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` rows are scored: a bar on a terminal, else lines in the log."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("scoring", total=total)
            yield lambda rows: progress.advance(bar, rows)
        return
    begin = reported = time.monotonic()
    done = 0

    def say(rows: int) -> None:
        nonlocal done, reported
        done, now = done + rows, time.monotonic()
        if now - reported > PROGRESS_SECONDS:
            speed, reported = done / (now - begin), now
            logger.info("%s of %s rows scored  %.1f rows/s  %.0f s left", f"{done:,}",
                        f"{total:,}", speed, (total - done) / speed)

    yield say


def _score_task(
    run: OpenRun, name: str, task: Task, by_language: dict[str, list[Example]],
    progress: Callable[[int], None],
) -> dict[str, Scored]:
    """The results for each language; languages with the same stop strings share batches."""
    scored_by_language = {}
    together = [[x] for x in by_language] if task.stop else [list(by_language)]
    for languages in together:
        scorer = run.scorer(task, languages[0])
        examples = [x for language in languages for x in by_language[language]]
        numbers = [i for language in languages for i in range(len(by_language[language]))]
        if run.llm_only and task.labels:
            check_joints(run.tokenizers,
                         [(scorer.text_of(x), x.target) for x in examples[:SAMPLE]])
        scored = scorer(run.params, examples, task, progress, numbers)
        if scored.cut.any:
            logger.warning("%s, longer than the limits: %s", name, scored.cut)
        if any(scored.unfinished) and not task.labels:
            logger.warning("%s %s: %d of %d answers were truncated at %d new tokens; "
                           "raise eval.max_new_tokens (--max_new_tokens)", name,
                           ", ".join(languages), sum(scored.unfinished), len(examples),
                           scorer.config.max_new_tokens)
        start = 0
        for language in languages:
            end = start + len(by_language[language])
            scored_by_language[language], start = scored.part(start, end), end
    return scored_by_language


def detail(examples: list[Example], scored: Scored) -> dict[str, Any]:
    """Every row with its answer, the log-likelihoods of its labels, and whether it is right."""
    return {
        "correct": {scoring: [int(right) for right in correct]
                    for scoring, correct in scored.correct.items()},
        "queries": [x.query for x in examples], "targets": [x.target for x in examples],
        "answers": scored.answers, "likelihoods": scored.likelihoods.round(4).tolist(),
    }


def _layers(run: OpenRun, examples: list[Example]) -> dict[str, Any]:
    """The fusion's layer weights: on average, and for the first row's tokens."""
    texts, language = [x.query for x in examples], examples[0].language
    return {"layer_weights": run.weights_of(texts, language),
            "tokens": run.layers_of(texts[0], language)}
