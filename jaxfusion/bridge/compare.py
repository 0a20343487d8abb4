"""Several bridges, trained and scored in turn, and one report on all of them."""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxfusion import config as configs
from jaxfusion.bridge.job import read_data, train
from jaxfusion.cli import typed
from jaxfusion.config import CONFIG_FILE, run_folders, variants
from jaxfusion.data.contamination import fingerprints
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.catalogue import NLI_PROMPT, check_languages, get_task
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError
from jaxfusion.fields import CompareConfig, Config, Job
from jaxfusion.files import read_json, sum_of, write_checked
from jaxfusion.reports.baselines import lookup_correct, surface
from jaxfusion.reports.comparison import Comparison, as_json, markdown
from jaxfusion.reports.page import write_page
from jaxfusion.reports.scored_runs import (
    ALONE,
    LLM_ALONE,
    Models,
    compare_runs,
    read_models,
    read_run,
)
from jaxfusion.reports.terminal import print_comparison
from jaxfusion.runs.score import evaluate, read_rows, unseen
from jaxfusion.sharding.hosts import all_or_none, check_peers, is_first
from jaxfusion.training.checkpoint import Best, chosen_by, saved_steps
from jaxfusion.training.trackers import IDS, add_files
from jaxfusion.training.trainer import by_another
from jaxfusion.training.workdir import check_workdir, only_run

REPORT = "report.json"
UNNAMED = "the score of an earlier version (exact_match where there are labels)"
logger = logging.getLogger(__name__)


def compare(config: CompareConfig, workdir: Path) -> Comparison | None:
    """Trains every variant in `WORKDIR/VARIANT`, scores it and the bare LLM, and reports.

    With `config.seeds` each is trained in `WORKDIR/VARIANT/seed_N` for every one of them.

    Classes are scored by likelihood over the labels, free text by exact match. Writes `report.md`,
    `report.html`, `report.json` and pictures. Started again, it goes on where it stopped.

    Returns:
      The comparison; in processes other than the first, None.

    Raises:
      InputError: whatever is wrong with one of the variants.
    """
    runs = variants(config)
    check_comparison(config, runs)
    with only_run(config, workdir):
        return _compare(config, runs, workdir)


def _compare(
    config: CompareConfig, runs: dict[str, Config], workdir: Path
) -> Comparison | None:
    check_peers(config=json.dumps(asdict(config), sort_keys=True))
    with all_or_none():
        check_workdir(config, workdir)  # by now it may be another's
        _, task, trained, _ = read_data(config.base)
        check_unseen(config.base, config.rows, trained)
    if is_first():
        configs.save(config, workdir / CONFIG_FILE)
    seconds, folders = {name: {} for name in runs}, run_folders(config)
    # Seed by seed: what an interrupted comparison has is as much of each variant.
    for i, seed in enumerate(config.seeds or (None,)):
        for name, run in runs.items():
            logger.info("\n%s%s", name, "" if seed is None else f", seed {seed}")
            if seed is not None:
                run = replace(run, train=replace(run.train, seed=seed))
            _train_and_score(config, run, workdir / folders[name][i], workdir, seconds[name])
    logger.info("\n%s", LLM_ALONE)
    start, last = time.monotonic(), list(folders.values())[-1][-1]
    evaluate(workdir / last, limit=config.rows, llm_only=True, again=False)
    seconds[LLM_ALONE] = {"score": time.monotonic() - start}
    return _write_report(config, workdir, task, trained, seconds) if is_first() else None


def _write_report(
    config: CompareConfig, workdir: Path, task: Task, trained: list[Example],
    seconds: dict[str, dict[str, float]],
) -> Comparison:
    """Writes and prints what was scored; `seconds` of each variant, by what they went into."""
    models = read_variants(config, workdir)
    scored = models[LLM_ALONE][0].details[config.base.data.task]
    baselines = _baselines(task, trained, scored.get(config.base.data.language))
    comparison = side_by_side(config, models, baselines)
    figures = {**as_json(comparison), "table": markdown(comparison), "seconds": seconds}
    write_checked(workdir / REPORT, json.dumps(figures, indent=2) + "\n")
    _write_page([comparison], models, workdir, f"{comparison.task}: {workdir.name}")
    print_comparison(comparison)
    return comparison


def _train_and_score(
    config: CompareConfig, run: Config, where: Path, workdir: Path, seconds: dict[str, float]
) -> None:
    """Trains one run and scores it, as far as neither was done; adds to the seconds."""
    start, fresh = time.monotonic(), not saved_steps(where)
    try:
        train(run, where)
    except InputError:
        if is_first() and not any(workdir.glob("*/")):  # nothing began: another config may start
            (workdir / CONFIG_FILE).unlink()
            sum_of(workdir / CONFIG_FILE).unlink()
        raise
    trained = time.monotonic()
    evaluate(where, limit=config.rows, share_states=True, again=False)
    seconds["score"] = seconds.get("score", 0.0) + time.monotonic() - trained
    if fresh:
        seconds["train"] = seconds.get("train", 0.0) + trained - start


def read_variants(config: CompareConfig, workdir: Path) -> Models:
    """The LLM alone and every variant, as they were scored.

    Raises:
      InputError: one has not been scored.
    """
    of = {name: [workdir / where for where in runs] for name, runs in run_folders(config).items()}
    last = list(of.values())[-1][-1]
    return {LLM_ALONE: [read_run(last, alone=True)],
            **{name: [read_run(where) for where in runs] for name, runs in of.items()}}


def check_comparison(config: CompareConfig, runs: dict[str, Config]) -> None:
    """Raises InputError for what would only show after the first variant was trained."""
    if LLM_ALONE in runs:
        raise InputError(f"'{LLM_ALONE}' is reserved for the report; rename this variant")
    tasks = {run.data.task for run in runs.values()}
    if len(tasks) > 1:
        raise InputError(f"variants are compared on one task, got {', '.join(sorted(tasks))}")
    task, = tasks
    if get_task(task, config.base.tasks).unlabelled:
        raise InputError(f"task '{task}' is text to learn from, where nothing can be compared")
    if set(config.base.eval.tasks) - {task}:
        raise InputError(f"a comparison scores its training task '{task}' alone, got "
                         f"eval.tasks {', '.join(config.base.eval.tasks)}")
    if config.base.seeds:
        raise InputError("the seeds of a comparison are its own field, not of its base: set "
                         "config.seeds")
    if len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"config.seeds contains duplicates: {config.seeds}")
    for names in (*config.groups.values(), config.development, config.base.eval.languages):
        check_languages(task, names, config.base.tasks)


def check_unseen(config: Config, limit: int | None, trained: list[Example]) -> None:
    """Raises InputError, before anything is trained, for a test row among the training rows, unless
    such rows are to be left out."""
    if not config.eval.drop_seen:
        rows = read_rows(config, (), (), limit, None)
        unseen(rows, fingerprints(x.query for x in trained), drop=False)


def side_by_side(
    config: CompareConfig, models: Models, baselines: dict[str, float], scoring: str | None = None
) -> Comparison:
    """The comparison of what was scored; the others are compared with the first variant."""
    name = config.base.data.task
    found = next((c for c in compared(models, scoring) if c.task == name), None)
    if found is None:
        raise InputError(f"task '{name}' is not counted by '{scoring}'; leave --scoring out")
    return replace(found, reference=next(iter(variants(config))), baselines=baselines)


def _baselines(
    task: Task, trained: list[Example], details: dict[str, Any] | None
) -> dict[str, float]:
    """Accuracy of the most frequent label, and for inference of a lookup of the surface.

    Args:
      details: of the scored rows in the language of training; None where there are none.
    """
    if not task.labels or details is None:
        return {}
    scored = zip(details["queries"], details["targets"], strict=True)
    rows = [[(x.query, x.target) for x in trained], list(scored)]
    found = {"the most frequent label": [[{"label": label} for _, label in part] for part in rows]}
    features = {"the most frequent label": lambda row: ()}
    if task.prompt == NLI_PROMPT:
        name = "a lookup of word overlap, quantifiers and negation"
        features[name] = surface
        found[name] = [[_columns(task, query) | {"label": label} for query, label in part]
                       for part in rows]
    right = {name: lookup_correct(*found[name], f) for name, f in features.items()}
    return {name: sum(correct) / len(correct) for name, correct in right.items()}


def _columns(task: Task, query: str) -> dict[str, str]:
    """The columns that a prompt was filled with."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.*)", re.escape(task.prompt))
    return re.fullmatch(pattern, query, re.DOTALL).groupdict()


def gather(asked: Sequence[str], scoring: str | None = None) -> tuple[Models, list[Comparison]]:
    """What `--compare` prints, and the report of a comparison shows.

    Args:
      asked: a comparison's workdir; or two runs or more, each a workdir, or several seeds by comma.
        The first run is the reference, or the first variant.
      scoring: how an answer counts; None is `likelihood` where there are labels.

    Raises:
      InputError: one run alone, or one that has not been scored.
    """
    first = Path(asked[0])
    config = read_config(first) if len(asked) == 1 else None
    if isinstance(config, CompareConfig):
        models, written = read_variants(config, first), first / REPORT
        baselines = read_json(written, "start the comparison once more")["baselines"] if (
            written.is_file()) else {}
        return models, [side_by_side(config, models, baselines, scoring)]
    if len(asked) < 2:
        raise InputError("--compare takes two runs or more, or a comparison's workdir, got "
                         f"{asked[0]} alone")
    models = read_models(asked)
    return models, compared(models, scoring)


def compared(models: Models, scoring: str | None = None) -> list[Comparison]:
    """As `compare_runs`, with a remark if the runs' checkpoints were chosen by different scores: in
    a comparison that an earlier version began they may be."""
    chosen = {name: set().union(*(chosen_by(_workdir(x.place)) for x in runs if not x.alone))
              for name, runs in models.items()}
    every = set().union(*chosen.values())
    names = every - {None}
    notes = ()
    if len(names) > 1 or (None in every and any(by_another(Best(0, 0.0), x) for x in names)):
        said = "; ".join(f"{name} by {' and '.join(sorted(x or UNNAMED for x in by))}"
                         for name, by in chosen.items() if by)
        notes = (f"Checkpoints were chosen by different scores, which favours some: {said}.",)
    return [replace(c, notes=(*c.notes, *notes)) for c in compare_runs(models, scoring)]


def _workdir(place: str) -> Path:
    """The workdir of a scored run, which may be given by its file of details."""
    path = Path(place)
    return path.parent.parent if path.is_file() else path


def read_config(workdir: Path) -> Job | None:
    """The config of a workdir; None where there is none."""
    return configs.load(workdir / CONFIG_FILE) if (workdir / CONFIG_FILE).is_file() else None


def report(workdirs: list[Path], scoring: str | None = None) -> Path:
    """Writes the page on what was scored, of a comparison or of one bridge (of several seeds).

    A bridge is compared with its bare LLM where that was scored on the same rows.

    Args:
      scoring: how an answer counts; None is `likelihood` where there are labels.

    Returns:
      The HTML file: in a comparison's workdir, in `eval/` of a bridge's (the last one's).

    Raises:
      InputError: nothing has been scored.
    """
    workdir = workdirs[-1]
    if isinstance(configs.load(workdir / CONFIG_FILE), CompareConfig):
        (models, comparisons), folder = gather([str(workdir)], scoring), workdir
    else:
        models = {workdir.absolute().name: [read_run(x) for x in workdirs]}
        models, comparisons = _beside_the_llm(models, workdir, scoring)
        folder = workdir / "eval"
    title = f"{', '.join(c.task for c in comparisons)}: {workdir.absolute().name}"
    return _write_page(comparisons, models, folder, title)


def _write_page(
    comparisons: list[Comparison], models: Models, folder: Path, title: str
) -> Path:
    """The page, which the trackers of its runs get too."""
    page = write_page(comparisons, models, folder, title)
    files = [page, page.with_suffix(".md"), *sorted(folder.glob("*.png"))]
    for workdir in dict.fromkeys(Path(run.place) for runs in models.values() for run in runs):
        if (workdir / IDS).is_file():
            add_files(workdir, files)
    return page


def _beside_the_llm(
    models: Models, workdir: Path, scoring: str | None
) -> tuple[Models, list[Comparison]]:
    """The models with the bare LLM before them, where it was scored on the same rows."""
    if (workdir / "eval" / ALONE).is_file():
        both = {LLM_ALONE: [read_run(workdir, alone=True)], **models}
        try:
            return both, compared(both, scoring)
        except InputError as error:
            logger.warning("without the bare LLM to compare with: %s", error)
    else:
        logger.info("without the bare LLM to compare with; score it with: %s "
                    "--workdir %s --llm_only", typed("eval"), workdir)
    return models, compared(models, scoring)
