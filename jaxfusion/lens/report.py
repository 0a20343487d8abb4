"""A Lens run's report: every method beside the original LLM, as pages and for trackers."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from jaxfusion.config import directory_name
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.fields import LensRunConfig
from jaxfusion.files import write_whole
from jaxfusion.lens.scores import Scores
from jaxfusion.lens.sweep import folder_of
from jaxfusion.reports.comparison import Comparison, as_json, as_markdown, markdown
from jaxfusion.reports.page import Measure, write_page
from jaxfusion.reports.scored_runs import Models, ScoredRun, read_metrics
from jaxfusion.training.logs import METRICS
from jaxfusion.training.trackers import add_report

UNTOUCHED = "LLM"  # the original model's name in tables
PICTURE = "languages.png"
PLACES = "Languages in the specific subspace"


def write_lens_report(
    config: LensRunConfig, methods: Mapping[str, LensRunConfig], scores: Mapping[str, Scores],
    seconds: Mapping[str, float], workdir: Path,
) -> Comparison | None:
    """Writes `report.html`, `report.md` and `report.json`, prints the tables, and gives scores and
    pages to the trackers.

    Args:
      methods: configs by name. scores: of the original LLM and of every method.
      seconds: of each method that was trained now.

    Returns:
      The comparison on the first task, if there are tasks.
    """
    first = next(iter(scores.values()))
    comparisons = [_comparison(config, task, scores) for task in first.details]
    measures = {name: {method: x.text[name] for method, x in scores.items()}
                for name in first.text}
    tables = [_table(name, by_method) for name, by_method in measures.items()]
    models = _models(config, methods, scores, workdir)
    page = write_page(comparisons, models, workdir, f"Lens: {workdir.absolute().name}",
                      measures=tables, pictures={PLACES: workdir / PICTURE})
    shown = "\n".join([*map(markdown, comparisons), *(
        f"{as_markdown(x.table)}\n{x.caption}\n" for x in tables)])
    print(shown)
    figures = {"table": shown, "seconds": dict(seconds), **measures,
               **{c.task: as_json(c) for c in comparisons}}
    write_whole(workdir / "report.json", json.dumps(figures, indent=2) + "\n")
    _track(config, methods, scores, workdir,
           [page, page.with_suffix(".md"), *sorted(workdir.glob("*.png"))])
    return comparisons[0] if comparisons else None


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
    workdir: Path, files: list[Path],
) -> None:
    """Gives scores and pages to the trackers: a method's to the run that has its curves, those of
    all methods to a run of the whole workdir."""
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
