"""A Lens run's report: every method beside the original LLM, as pages and for trackers."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE, directory_name
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.errors import InputError
from jaxfusion.fields import LensRunConfig
from jaxfusion.files import read_json, write_checked, write_whole
from jaxfusion.lens.scores import Scores
from jaxfusion.lens.sweep import folder_of
from jaxfusion.reports.comparison import Comparison, as_json, as_markdown, markdown
from jaxfusion.reports.page import Measure, write_page
from jaxfusion.reports.scored_runs import Models, ScoredRun, read_metrics
from jaxfusion.training.logs import METRICS
from jaxfusion.training.trackers import add_report

UNTOUCHED = "LLM"  # the original model's name in tables
PICTURE = "languages.png"
SCORES = "scores.json"  # of every method, with every answer
PLACES = "Languages in the specific subspace"


def write_lens_report(
    config: LensRunConfig, methods: Mapping[str, LensRunConfig], scores: Mapping[str, Scores],
    seconds: Mapping[str, float], workdir: Path,
) -> Comparison | None:
    """Writes `scores.json`, `report.html`, `report.md` and `report.json`, prints the tables, and
    gives scores and pages to the trackers.

    Args:
      methods: configs by name. scores: of the original LLM and of every method.
      seconds: of each method that was trained now.

    Returns:
      The comparison on the first task, if there are tasks.
    """
    write_checked(workdir / SCORES, json.dumps(
        {name: asdict(x) for name, x in scores.items()}, ensure_ascii=False))
    comparisons, figures = _write_pages(config, methods, scores, workdir)
    print(figures["table"])
    figures["seconds"] = dict(seconds)
    write_whole(workdir / "report.json", json.dumps(figures, indent=2) + "\n")
    _track(config, methods, scores, workdir)
    return comparisons[0] if comparisons else None


def write_again(workdir: Path) -> Path:
    """Writes `report.html` and `report.md` again, from the scores that a run left.

    Returns:
      The HTML file.

    Raises:
      InputError: no scores of a whole run in `workdir`, or damaged ones.
    """
    config, repair = configs.load(workdir / CONFIG_FILE), "start the run's train.py command again"
    if not (workdir / SCORES).is_file():
        above = workdir.absolute().parent
        if (above / SCORES).is_file():
            raise InputError(f"{workdir} is one method of the run {above}, which has the report: "
                             f"give --workdir {above}")
        raise InputError(f"{workdir / SCORES} is missing: give the workdir of the whole run, or, "
                         f"if an earlier version wrote it, {repair}")
    scores = {name: Scores(**x) for name, x in read_json(workdir / SCORES, repair).items()}
    methods = configs.sweep(config) if config.sweep else {config.lens.method: config}
    _write_pages(config, methods, scores, workdir)
    return workdir / "report.html"


def _write_pages(
    config: LensRunConfig, methods: Mapping[str, LensRunConfig], scores: Mapping[str, Scores],
    workdir: Path,
) -> tuple[list[Comparison], dict[str, Any]]:
    """Writes the pages; returns the comparisons, and what `report.json` has of them."""
    first = next(iter(scores.values()))
    comparisons = [_comparison(config, task, scores) for task in first.details]
    measures = {name: {method: x.text[name] for method, x in scores.items()}
                for name in first.text}
    tables = [_table(name, by_method) for name, by_method in measures.items()]
    models = _models(config, methods, scores, workdir)
    write_page(comparisons, models, workdir, f"Lens: {workdir.absolute().name}",
               measures=tables, pictures={PLACES: workdir / PICTURE})
    shown = "\n".join([*map(markdown, comparisons), *(
        f"{as_markdown(x.table)}\n{x.caption}\n" for x in tables)])
    return comparisons, {"table": shown, **measures, **{c.task: as_json(c) for c in comparisons}}


def _comparison(
    config: LensRunConfig, task: str, scores: Mapping[str, Scores]
) -> Comparison:
    central = config.data.central
    languages = config.eval.languages or config.data.targets
    scoring = get_task(task, config.tasks).scoring
    return Comparison(
        task, scoring, {name: x.correct(task, scoring) for name, x in scores.items()},
        {"targets": tuple(x for x in languages if x != central)}, UNTOUCHED, {}, {},
        central=central)


def _table(measure: str, by_method: dict[str, dict[str, float]]) -> Measure:
    """A measure's table: a row for each language."""
    languages = next(iter(by_method.values()))
    return Measure(
        f"{measure.capitalize()}, on prompts that were neither probed nor trained on.",
        [["", *by_method], *([x, *(f"{values[x]:.3g}" for values in by_method.values())]
                             for x in languages)])


def _models(
    config: LensRunConfig, methods: Mapping[str, LensRunConfig], scores: Mapping[str, Scores],
    workdir: Path,
) -> Models:
    """Every method as a scored run, with its curves if it was trained."""
    llm = config.bridge or config.decoder.checkpoint

    def run(name: str) -> ScoredRun:
        folder, method = folder_of(name, workdir), methods.get(name)
        about = {"LLM": llm, "method": "none" if method is None else method.lens.method}
        return ScoredRun(
            str(folder if folder.is_dir() else workdir), scores[name].details, about,
            {} if method is None else json.loads(json.dumps(asdict(method))),
            read_metrics(folder / METRICS))

    return {name: [run(name)] for name in scores}


def _track(
    config: LensRunConfig, methods: Mapping[str, LensRunConfig], scores: Mapping[str, Scores],
    workdir: Path,
) -> None:
    """Gives scores and pages to the trackers: a method's to the run that has its curves, those of
    all methods to a run of the whole workdir."""
    files = [*(workdir / f"report.{x}" for x in ("html", "md")), *sorted(workdir.glob("*.png"))]
    for name, method in methods.items():
        if metrics := read_metrics(folder_of(name, workdir) / METRICS):
            add_report(method, folder_of(name, workdir), int(metrics[-1]["step"]),
                       _figures(scores[name]), files)
    every = {f"{directory_name(name)}/{figure}": value for name, x in scores.items()
             for figure, value in _figures(x).items()}
    add_report(config, workdir, 0, every, files)


def _figures(scores: Scores) -> dict[str, float]:
    """`score/TASK/LANGUAGE` as a fraction, and the other measures by language; names as every
    tracker takes them."""
    found = {f"score/{task}/{language}": float(np.mean(next(iter(part["correct"].values()))))
             for task, by_language in scores.details.items()
             for language, part in by_language.items()}
    found |= {f"{measure}/{language}": value for measure, by_language in scores.text.items()
              for language, value in by_language.items()}
    return {re.sub(r"[^\w\-. /]", "", name): value for name, value in found.items()}
