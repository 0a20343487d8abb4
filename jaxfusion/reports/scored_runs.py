"""Reads runs that `eval.py` scored, and compares them on the same rows."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxfusion.cli import typed
from jaxfusion.config import directory_name
from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.errors import InputError, choose
from jaxfusion.files import is_as_written, read_json
from jaxfusion.reports.comparison import Comparison
from jaxfusion.reports.language_groups import standard_groups

DETAILS, ALONE = "details.json", "llm_only_details.json"
FIELDS = {"correct", "queries", "targets", "answers", "likelihoods", "labels"}  # of every language
LLM_ALONE = "LLM alone"  # in tables
logger = logging.getLogger(__name__)
Details = dict[str, dict[str, dict[str, Any]]]  # by task and language


@dataclass(frozen=True)
class ScoredRun:
    """One run and its scores.

    Attributes:
      place: its workdir, or a file of details. details: see `runs/score.py`.
      about: the settings of the scores. config: of the run. metrics: of its training, by step.
      comparison: config of the comparison that the run is part of; empty if there is none.
      alone: whether the scores are those of the bare LLM.
    """

    place: str
    details: Details
    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)
    alone: bool = False


# Runs of the same model with different seeds, by the model's name.
Models = dict[str, list[ScoredRun]]


def read_run(place: Path, alone: bool = False) -> ScoredRun:
    """The scored run in a workdir, or in a file of details.

    Args:
      alone: read the scores of the bare LLM.

    Raises:
      InputError: the run has not been scored.
    """
    file = place if place.is_file() else place / "eval" / (ALONE if alone else DETAILS)
    workdir = file.parent.parent
    if not file.is_file():
        _check_job(place)
        more = " --llm_only" if alone else ""
        raise InputError(f"{place} has no scores yet ({file} is missing): {typed('eval')} "
                         f"--workdir {place}{more}")
    metrics = workdir / "metrics.jsonl"
    bare = alone or file.name == ALONE
    return ScoredRun(str(place), _json(file), _json(file.with_suffix(".about.json")),
                     _json(workdir / "config.json"), [] if bare else read_metrics(metrics),
                     _enclosing(workdir), bare)


def _check_job(place: Path) -> None:
    """Raises InputError for a workdir that no command scores as a bridge."""
    job = _json(place / "config.json").get("job")
    if job == "lens":
        raise InputError(f"{place} is a Lens run, which its training scores: {lens_report(place)}")
    if job == "compare":
        raise InputError(f"{place} is a comparison: give it alone, or runs of it")


def lens_report(workdir: Path) -> str:
    """Where the report of a Lens run is, for a message; that of one method's run is in the workdir
    of the whole run, above it."""
    places = [workdir, workdir.absolute().parent]
    whole = next((x for x in places if (x / "report.html").is_file()), None)
    if whole is None:
        return "its train.py command writes report.html once all methods are scored"
    return (f"see {whole / 'report.html'}, or write that again with "
            f"{typed('eval')} --workdir {whole} --report")


def _enclosing(workdir: Path) -> dict[str, Any]:
    """The config of the comparison above a workdir `VARIANT` or `VARIANT/seed_N`; else empty."""
    configs = (_json(parent / "config.json") for parent in list(workdir.absolute().parents)[:2])
    return next((config for config in configs if config.get("job") == "compare"), {})


def read_metrics(metrics: Path) -> list[dict[str, float]]:
    """Training's metrics, without a line that is being written; empty if the file is damaged."""
    if not metrics.is_file():
        return []
    written = metrics.read_bytes()
    lines = written[: written.rfind(b"\n") + 1].splitlines()
    try:
        records = [json.loads(line) for line in lines]
    except ValueError:
        records = [None]
    if not is_as_written(metrics, written, grows=True) or not all(
            isinstance(record, dict) and "step" in record for record in records):
        logger.warning("%s is damaged: its curves are skipped", metrics)
        return []
    return records


def _json(file: Path) -> dict[str, Any]:
    return read_json(file, "score the run again") if file.is_file() else {}


def read_models(asked: Sequence[str]) -> Models:
    """Runs by name; each argument is a workdir or, for several seeds, a comma-separated list.

    Raises:
      InputError: a run has not been scored.
    """
    places = {text: [Path(place) for place in text.split(",")] for text in asked}
    every = [place.resolve() for seeds in places.values() for place in seeds]
    if len(places) < len(asked) or len(set(every)) < len(every):
        raise InputError(f"duplicate run: {' '.join(asked)}")
    runs_of = {text: [read_run(place) for place in seeds] for text, seeds in places.items()}
    for name_of in (_variant, _folder):
        names = [name_of(seeds) for seeds in places.values()]
        if len(set(names)) == len(names):
            return dict(zip(names, runs_of.values(), strict=True))
    return runs_of


def _variant(seeds: list[Path]) -> str:
    """The name that a comparison's report has for its run in `VARIANT` or `VARIANT/seed_N`; for
    other runs that of their folder."""
    alone = seeds[0].name == ALONE
    folder = (seeds[0].parent.parent if seeds[0].is_file() else seeds[0]).absolute()
    variants = {directory_name(str(x["name"])): str(x["name"])
                for x in _enclosing(folder).get("variants", ())}
    found = next((variants[x.name] for x in (folder, folder.parent) if x.name in variants), None)
    if found is None:
        return _folder(seeds)
    return LLM_ALONE if alone else found


def _folder(seeds: list[Path]) -> str:
    """The name in tables of `runs/xnli`, `runs/x/last/seed_0,…` or `…/llm_only_details.json`."""
    place = seeds[0]
    if place.name == ALONE:
        return f"{LLM_ALONE} ({place.absolute().parent.parent.name})"
    if place.is_file():
        return place.stem
    return place.absolute().parent.name if len(seeds) > 1 else place.absolute().name


def compare_runs(models: Models, scoring: str | None = None) -> list[Comparison]:
    """A comparison for each task that all models were scored on; the first is the reference.

    Args:
      scoring: the scoring; None: `likelihood` if there are labels, else `exact_match`.

    Raises:
      InputError: the models have no task and language in common, or their rows differ.
    """
    every = [run.details for runs in models.values() for run in runs]
    tasks = list(dict.fromkeys(task for details in every for task in details))
    common = {task: [x for x in every[0].get(task, {}) if all(x in y.get(task, {}) for y in every)]
              for task in tasks}
    for task, languages in common.items():
        absent = dict.fromkeys(x for y in every for x in y.get(task, {}) if x not in languages)
        if absent:
            logger.warning("%s: not every run was scored in %s: skipped", task, ", ".join(absent))
    if not any(common.values()):
        has = [f"{name}: {', '.join(runs[0].details)}" for name, runs in models.items()]
        raise InputError("the runs have no scored task and language in common; "
                         + "; ".join(has))
    known = {task: _scorings(task, languages, models)
             for task, languages in common.items() if languages}
    if scoring is not None:
        choose("scoring", scoring, dict.fromkeys(x for names in known.values() for x in names))
    chosen = {task: scoring or ("likelihood" if "likelihood" in names else "exact_match")
              for task, names in known.items()}
    for task in (x for x in known if chosen[x] not in known[x]):
        logger.warning("%s has no %s: skipped", task, chosen[task])
    return [_compare(task, common[task], models, chosen[task])
            for task in known if chosen[task] in known[task]]


def _scorings(task: str, languages: list[str], models: Models) -> list[str]:
    """The scorings of a task that all runs have.

    Raises:
      InputError: a run was scored by an earlier version, which stored fewer fields.
    """
    every = [(run.place, run.details[task][x]) for runs in models.values() for run in runs
             for x in languages]
    for place, details in every:
        if not set(details) >= FIELDS:
            raise InputError(f"{place} was scored by an earlier version, which did not store "
                             f"{', '.join(sorted(FIELDS - set(details)))}; score it again")
    return [x for x in every[0][1]["correct"] if all(x in y["correct"] for _, y in every)]


def _compare(task: str, languages: list[str], models: Models, scoring: str) -> Comparison:
    for language in languages:
        _check_rows(task, language, models)
    groups, notes = _groups(languages, models)
    return Comparison(
        task, scoring,
        {name: {x: [run.details[task][x]["correct"][scoring] for run in runs] for x in languages}
         for name, runs in models.items()},
        groups, next(iter(models)), {},
        {name: weights for name, runs in models.items()
         if (weights := mean_weights(task, languages, runs))},
        (*_of_translations(task, models), *_warm(models), *notes, *_settings(models)),
    )


def _of_translations(task: str, models: Models) -> tuple[str, ...]:
    """A line on what exact match is worth for translations."""
    own = [run.config.get("tasks", {}).get(task, {}) for runs in models.values() for run in runs]
    if not (any(x.get("answers") for x in own) or (task in TASKS and TASKS[task].translation)):
        return ()
    return ("A good translation rarely equals its reference, so exact match says little. Training "
            "on this task chooses its checkpoint by log-likelihood on development rows.",)


def _warm(models: Models) -> tuple[str, ...]:
    """A line on the models that began at a warm start."""
    def warm(run: ScoredRun) -> bool:
        projector, train = (run.config.get(x, {}) for x in ("projector", "train"))
        return not run.alone and bool(projector.get("warm_start")) and not train.get("init_from")

    names = [name for name, runs in models.items() if any(warm(run) for run in runs)]
    return (("Warm start, which is not in the papers: the projector begins at a regression onto "
             f"the LLM's embeddings ({', '.join(names)}).",) if names else ())


def _groups(
    languages: list[str], models: Models
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Groups of languages and remarks: those of the comparison if all runs are part of one."""
    every = [run.comparison for runs in models.values() for run in runs]
    asked = [{name: config.get(name) for name in ("groups", "development")} for config in every]
    if any(x != asked[0] for x in asked):
        return standard_groups(languages), ()
    chosen_on = asked[0]["development"] or ()
    counted = [x for x in languages if x not in chosen_on]
    groups = {name: members for name, names in (asked[0]["groups"] or {}).items()
              if (members := tuple(x for x in names if x in counted))}
    if not asked[0]["groups"]:
        groups = standard_groups(counted)
    return groups, ((f"Recipes were chosen on {', '.join(chosen_on)}; means exclude them.",)
                    if chosen_on else ())


def _settings(models: Models) -> tuple[str, ...]:
    """A line for each scoring setting in which the runs differ."""
    lines = []
    for setting in ("decoding", "decoder", "encoder", "drop_seen"):
        values = {name: dict.fromkeys(json.dumps(run.about.get(setting)) for run in runs)
                  for name, runs in models.items()}
        if len({x for of_model in values.values() for x in of_model}) > 1:
            lines.append(f"Different {setting}: " + "; ".join(
                f"{name} {' and '.join(of_model)}" for name, of_model in values.items()) + ".")
    return tuple(lines)


def mean_weights(
    task: str, languages: Sequence[str], runs: list[ScoredRun]
) -> dict[str, list[float]]:
    """Layer weights by language, averaged over seeds; empty if a run has none."""
    by_language = {x: [weights for run in runs
                 if (weights := run.details[task][x].get("layer_weights"))] for x in languages}
    return {x: np.mean(seeds, axis=0).tolist() for x, seeds in by_language.items() if seeds}


def _check_rows(task: str, language: str, models: Models) -> None:
    """Raises InputError unless all runs were scored on the same rows in the same order."""
    every = [(run.place, run.details[task][language]) for runs in models.values() for run in runs]
    (first, theirs), *others = [
        (place, [*zip(details["queries"], details["targets"], strict=True)])
        for place, details in every]
    for place, rows in others:
        if len(rows) != len(theirs):
            raise InputError(
                f"{task} {language}: {first} was scored on {len(theirs)} rows, {place} on "
                f"{len(rows)}; score both with the same --limit and the same rows")
        if rows != theirs:
            number = next(i for i, pair in enumerate(zip(rows, theirs, strict=True), start=1)
                          if pair[0] != pair[1])
            raise InputError(f"{task} {language}: row {number} differs between {first} and "
                             f"{place}; score both on the same rows")
