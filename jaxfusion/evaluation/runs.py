"""Runs as `eval.py` left them, side by side: on the same rows, or refused."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxfusion.data.seen import fingerprints
from jaxfusion.errors import InputError, choose
from jaxfusion.evaluation.comparison import Comparison
from jaxfusion.evaluation.groups import standard_groups

DETAILS, ALONE = "details.json", "llm_only_details.json"
LLM_ALONE = "LLM alone"  # in tables
Details = dict[str, dict[str, dict[str, Any]]]  # by task and language


@dataclass(frozen=True)
class ScoredRun:
    """One run and what it was scored.

    Attributes:
      place: its workdir, or a file of details. details: see `training/evaluate.py`.
      about: what the scores are of. config: the run's. metrics: its training's, step by step.
    """

    place: str
    details: Details
    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)


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
    lines = metrics.read_text("utf-8").splitlines() if metrics.is_file() and not alone else []
    return ScoredRun(str(place), _json(file), _json(file.with_suffix(".about.json")),
                     _json(workdir / "config.json"), [json.loads(line) for line in lines])


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def read_models(asked: Sequence[str]) -> Models:
    """Runs by name; each of `asked` is a workdir or, of several seeds, some with commas between.

    Raises:
      InputError: one has not been scored.
    """
    places = {text: [Path(place) for place in text.split(",")] for text in asked}
    if len(places) < len(asked):
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
    comparisons = []
    for task in every[0]:
        languages = [x for x in every[0][task] if all(x in y.get(task, {}) for y in every)]
        if languages:
            comparisons.append(_compare(task, languages, models, scoring))
    if not comparisons:
        has = [f"{name}: {', '.join(runs[0].details)}" for name, runs in models.items()]
        raise InputError("the runs were scored on no task and language in common; "
                         + "; ".join(has))
    return comparisons


def _compare(
    task: str, languages: list[str], models: Models, scoring: str | None
) -> Comparison:
    first = next(iter(models.values()))[0].details[task][languages[0]]["correct"]
    if scoring is not None:
        choose("scoring", scoring, first)
    scoring = scoring or ("likelihood" if "likelihood" in first else "exact_match")
    for language in languages:
        _check_rows(task, language, models)
    return Comparison(
        task, scoring,
        {name: {x: [run.details[task][x]["correct"][scoring] for run in runs] for x in languages}
         for name, runs in models.items()},
        standard_groups(languages), next(iter(models)), {},
        {name: found for name, runs in models.items()
         if (found := mean_weights(task, languages, runs))},
    )


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
        (place, fingerprints(f"{query}\n{target}" for query, target in zip(
            found["queries"], found["targets"], strict=True))) for place, found in every]
    for place, rows in others:
        if len(rows) != len(theirs):
            raise InputError(
                f"{task} {language}: {first} was scored on {len(theirs)} rows, {place} on "
                f"{len(rows)}; score both with the same --limit and the same rows")
        if (rows != theirs).any():
            raise InputError(f"{task} {language}: row {int(np.argmax(rows != theirs)) + 1} is "
                             f"another in {first} than in {place}; score both on the same rows")
