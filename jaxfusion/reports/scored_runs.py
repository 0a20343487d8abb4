"""Runs as `eval.py` left them, side by side: on the same rows, or refused."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxfusion.errors import InputError, choose
from jaxfusion.files import is_as_written, read_json
from jaxfusion.reports.comparison import Comparison
from jaxfusion.reports.language_groups import standard_groups

DETAILS, ALONE = "details.json", "llm_only_details.json"
KEPT = {"correct", "queries", "targets", "answers", "likelihoods", "labels"}  # of every language
LLM_ALONE = "LLM alone"  # in tables
logger = logging.getLogger(__name__)
Details = dict[str, dict[str, dict[str, Any]]]  # by task and language


@dataclass(frozen=True)
class ScoredRun:
    """One run and what it was scored.

    Attributes:
      place: its workdir, or a file of details. details: see `runs/score.py`.
      about: what the scores are of. config: the run's. metrics: its training's, step by step.
      comparison: config of the comparison that the run is part of; empty where there is none.
    """

    place: str
    details: Details
    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)


# Runs of the same model with other seeds, by the model's name.
Models = dict[str, list[ScoredRun]]


def read_run(place: Path, alone: bool = False) -> ScoredRun:
    """What a workdir (or a file of details) holds.

    Args:
      alone: the scores of the bare LLM.

    Raises:
      InputError: it has not been scored.
    """
    file = place if place.is_file() else place / "eval" / (ALONE if alone else DETAILS)
    workdir = file.parent.parent
    if not file.is_file():
        more = " --llm_only" if alone else ""
        raise InputError(f"{place} has no scores yet ({file} is missing): python eval.py "
                         f"--workdir {place}{more}")
    metrics = workdir / "metrics.jsonl"
    bare = alone or file.name == ALONE
    return ScoredRun(str(place), _json(file), _json(file.with_suffix(".about.json")),
                     _json(workdir / "config.json"), [] if bare else _records(metrics),
                     _enclosing(workdir))


def _enclosing(workdir: Path) -> dict[str, Any]:
    """The config of the comparison in whose workdir this one is: `VARIANT` or `VARIANT/seed_N`."""
    found = (_json(parent / "config.json") for parent in list(workdir.absolute().parents)[:2])
    return next((config for config in found if config.get("job") == "compare"), {})


def _records(metrics: Path) -> list[dict[str, float]]:
    """Training's metrics up to a line that is being written; none where they are damaged."""
    if not metrics.is_file():
        return []
    written = metrics.read_bytes()
    lines = written[: written.rfind(b"\n") + 1].splitlines()
    try:
        found = [json.loads(line) for line in lines]
    except ValueError:
        found = [None]
    if not is_as_written(metrics, written, grows=True) or not all(
            isinstance(record, dict) and "step" in record for record in found):
        logger.warning("%s is damaged: its curves are left out", metrics)
        return []
    return found


def _json(file: Path) -> dict[str, Any]:
    return read_json(file, "score the run again") if file.is_file() else {}


def read_models(asked: Sequence[str]) -> Models:
    """Runs by name; each of `asked` is a workdir or, of several seeds, some with commas between.

    Raises:
      InputError: one has not been scored.
    """
    places = {text: [Path(place) for place in text.split(",")] for text in asked}
    every = [place.resolve() for seeds in places.values() for place in seeds]
    if len(places) < len(asked) or len(set(every)) < len(every):
        raise InputError(f"a run is given twice: {' '.join(asked)}")
    found = {text: [read_run(place) for place in seeds] for text, seeds in places.items()}
    names = {text: _name(seeds) for text, seeds in places.items()}
    if len(set(names.values())) < len(names):
        names = {text: text for text in names}
    return {names[text]: runs for text, runs in found.items()}


def _name(seeds: list[Path]) -> str:
    """`runs/xnli`, `runs/x/last/seed_0,…` and `…/eval/llm_only_details.json` as in tables."""
    place = seeds[0]
    if place.name == ALONE:
        return f"{LLM_ALONE} ({place.absolute().parent.parent.name})"
    if place.is_file():
        return place.stem
    return place.absolute().parent.name if len(seeds) > 1 else place.absolute().name


def compare_runs(models: Models, scoring: str | None = None) -> list[Comparison]:
    """A comparison of every task that all models were scored on; the first is the reference.

    Args:
      scoring: how an answer counts; None is `likelihood` where there are labels.

    Raises:
      InputError: they have no language of a task in common, or their rows differ.
    """
    every = [run.details for runs in models.values() for run in runs]
    tasks = list(dict.fromkeys(task for details in every for task in details))
    common = {task: [x for x in every[0].get(task, {}) if all(x in y.get(task, {}) for y in every)]
              for task in tasks}
    for task, languages in common.items():
        absent = dict.fromkeys(x for y in every for x in y.get(task, {}) if x not in languages)
        if absent:
            logger.warning("%s: not every run was scored in %s: left out", task, ", ".join(absent))
    if not any(common.values()):
        has = [f"{name}: {', '.join(runs[0].details)}" for name, runs in models.items()]
        raise InputError("the runs were scored on no task and language in common; "
                         + "; ".join(has))
    known = {task: _scorings(task, languages, models)
             for task, languages in common.items() if languages}
    if scoring is not None:
        choose("scoring", scoring, dict.fromkeys(x for names in known.values() for x in names))
    chosen = {task: scoring or ("likelihood" if "likelihood" in names else "exact_match")
              for task, names in known.items()}
    for task in (x for x in known if chosen[x] not in known[x]):
        logger.warning("%s has no %s: left out", task, chosen[task])
    return [_compare(task, common[task], models, chosen[task])
            for task in known if chosen[task] in known[task]]


def _scorings(task: str, languages: list[str], models: Models) -> list[str]:
    """The ways of counting that all runs have of a task.

    Raises:
      InputError: a run was scored by a version that kept less.
    """
    every = [(run.place, run.details[task][x]) for runs in models.values() for run in runs
             for x in languages]
    for place, found in every:
        if not set(found) >= KEPT:
            raise InputError(f"{place} was scored by an earlier version, which kept no "
                             f"{', '.join(sorted(KEPT - set(found)))}; score it again")
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
        {name: found for name, runs in models.items()
         if (found := mean_weights(task, languages, runs))},
        (*notes, *_settings(models)),
    )


def _groups(
    languages: list[str], models: Models
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Groups of languages, and what to say of them: those of the comparison that all runs are part
    of, if they are."""
    every = [run.comparison for runs in models.values() for run in runs]
    asked = [{name: config.get(name) for name in ("groups", "development")} for config in every]
    if any(x != asked[0] for x in asked):
        return standard_groups(languages), ()
    chosen_on = asked[0]["development"] or ()
    counted = [x for x in languages if x not in chosen_on]
    groups = {name: kept for name, names in (asked[0]["groups"] or {}).items()
              if (kept := tuple(x for x in names if x in counted))}
    if not asked[0]["groups"]:
        groups = standard_groups(counted)
    return groups, ((f"Recipes were chosen on {', '.join(chosen_on)}; no mean has them.",)
                    if chosen_on else ())


def _settings(models: Models) -> tuple[str, ...]:
    """A line for every setting of scoring in which the runs differ."""
    lines = []
    for setting in ("decoding", "decoder", "encoder", "drop_seen"):
        values = {name: dict.fromkeys(json.dumps(run.about.get(setting)) for run in runs)
                  for name, runs in models.items()}
        if len({x for found in values.values() for x in found}) > 1:
            lines.append(f"Not the same {setting}: " + "; ".join(
                f"{name} {' and '.join(found)}" for name, found in values.items()) + ".")
    return tuple(lines)


def mean_weights(
    task: str, languages: Sequence[str], runs: list[ScoredRun]
) -> dict[str, list[float]]:
    """Layer weights by language, averaged over seeds; empty for what has none."""
    found = {x: [weights for run in runs
                 if (weights := run.details[task][x].get("layer_weights"))] for x in languages}
    return {x: np.mean(seeds, axis=0).tolist() for x, seeds in found.items() if seeds}


def _check_rows(task: str, language: str, models: Models) -> None:
    """Raises InputError unless all runs were scored on the same rows in the same order."""
    every = [(run.place, run.details[task][language]) for runs in models.values() for run in runs]
    (first, theirs), *others = [
        (place, [*zip(found["queries"], found["targets"], strict=True)]) for place, found in every]
    for place, rows in others:
        if len(rows) != len(theirs):
            raise InputError(
                f"{task} {language}: {first} was scored on {len(theirs)} rows, {place} on "
                f"{len(rows)}; score both with the same --limit and the same rows")
        if rows != theirs:
            number = next(i for i, pair in enumerate(zip(rows, theirs, strict=True), start=1)
                          if pair[0] != pair[1])
            raise InputError(f"{task} {language}: row {number} is another in {first} than in "
                             f"{place}; score both on the same rows")
