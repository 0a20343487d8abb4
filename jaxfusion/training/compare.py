"""Several bridges, trained and scored in turn, and one report on all of them."""

import json
import logging
import re
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxfusion import config as configs
from jaxfusion.config import directory_name, variants
from jaxfusion.data.sources import read_examples
from jaxfusion.data.task import Task
from jaxfusion.data.tasks import NLI_PROMPT, check_languages, get_task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.comparison import Comparison, as_json, markdown, table
from jaxfusion.evaluation.pictures import draw_accuracy, draw_layers
from jaxfusion.evaluation.shortcuts import lookup_correct, surface
from jaxfusion.fields import CompareConfig, Config
from jaxfusion.files import write_whole
from jaxfusion.training.bridge import train
from jaxfusion.training.checkpoint import saved_steps
from jaxfusion.training.evaluate import evaluate
from jaxfusion.training.loop import CONFIG_FILE, check_workdir

LLM_ALONE = "LLM alone"
logger = logging.getLogger(__name__)


def compare(config: CompareConfig, workdir: Path) -> Comparison:
    """Trains every variant in `WORKDIR/VARIANT`, scores it and the bare LLM, and reports.

    Classes are scored by likelihood over the labels, free text by exact match. Writes `report.md`,
    `report.json`, `accuracy.png` and `layers.png`. Started again, it goes on where it stopped:
    variants that are trained are only scored.

    Raises:
      InputError: whatever is wrong with one of the variants.
    """
    runs = variants(config)
    check(config, runs)
    check_workdir(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    configs.save(config, workdir / CONFIG_FILE)
    details, seconds = {}, {}
    for name, run in runs.items():
        logger.info("\n%s", name)
        where, start = workdir / directory_name(name), time.monotonic()
        fresh = not saved_steps(where)
        try:
            train(run, where)
        except InputError:
            if not any(workdir.glob("*/")):  # nothing began: a mended config may start here
                (workdir / CONFIG_FILE).unlink()
                workdir.rmdir()
            raise
        trained = time.monotonic()
        details[name] = evaluate(where, limit=config.rows)[1]
        seconds[name] = {"score": time.monotonic() - trained}
        if fresh:
            seconds[name]["train"] = trained - start
    logger.info("\n%s", LLM_ALONE)
    start = time.monotonic()
    details = {LLM_ALONE: evaluate(where, limit=config.rows, llm_only=True)[1], **details}
    seconds[LLM_ALONE] = {"score": time.monotonic() - start}
    comparison = _compare(config, runs, details)
    _report(comparison, get_task(comparison.task, config.base.tasks), seconds, workdir)
    return comparison


def check(config: CompareConfig, runs: dict[str, Config]) -> None:
    """Raises InputError for what would only show after the first variant was trained."""
    if LLM_ALONE in runs:
        raise InputError(f"'{LLM_ALONE}' is no name for a variant: the report has it already")
    tasks = {run.data.task for run in runs.values()}
    if len(tasks) > 1:
        raise InputError(f"variants are compared on one task, got {', '.join(sorted(tasks))}")
    task, = tasks
    if get_task(task, config.base.tasks).unlabelled:
        raise InputError(f"task '{task}' is text to learn from, where nothing can be compared")
    if set(config.base.eval.tasks) - {task}:
        raise InputError(f"a comparison scores its training task '{task}' alone, got "
                         f"eval.tasks {', '.join(config.base.eval.tasks)}")
    for names in (*config.groups.values(), config.development, config.base.eval.languages):
        check_languages(task, names, config.base.tasks)


def _compare(config: CompareConfig, runs: dict[str, Config], details) -> Comparison:
    first, name = next(iter(runs)), config.base.data.task
    task, languages = get_task(name, config.base.tasks), details[first][name]
    scoring = task.scoring
    warm = [variant for variant, run in runs.items()
            if run.projector.warm_start and run.train.init_from is None]
    notes = []
    if warm:
        notes.append("Warm start, which is not in the papers: the projector begins at a "
                     f"regression onto the LLM's embeddings ({', '.join(warm)}).")
    if config.development:
        notes.append(f"Recipes were chosen on {', '.join(config.development)}; no mean has them.")
    groups = {group: tuple(x for x in names if x in languages)
              for group, names in config.groups.items()}
    return Comparison(
        name, scoring,
        {model: {x: found[name][x]["correct"][scoring] for x in languages}
         for model, found in details.items()},
        {group: names for group, names in groups.items() if names},
        first, _baselines(config, task),
        {model: weights for model, found in details.items() if (weights := {
            x: found[name][x]["layer_weights"] for x in languages
            if found[name][x]["layer_weights"]})},
        tuple(notes),
    )


def _baselines(config: CompareConfig, task: Task) -> dict[str, float]:
    """Accuracy of the most frequent label, and for inference of a lookup of the surface."""
    if not task.labels:
        return {}
    data, language = config.base.data, config.base.data.language
    train_rows, test_rows = (
        [_columns(task, x.query) | {"label": x.target}
         for x in read_examples(data.task, task, split, language, data.path)]
        for split in ("train", "test")
    )
    test_rows = test_rows[: config.rows]
    features = {"the most frequent label": lambda row: ()}
    if task.prompt == NLI_PROMPT:
        features["a lookup of word overlap, quantifiers and negation"] = surface
    found = {name: lookup_correct(train_rows, test_rows, f) for name, f in features.items()}
    return {name: sum(correct) / len(correct) for name, correct in found.items()}


def _columns(task: Task, query: str) -> dict[str, str]:
    """The columns that a prompt was filled with."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.*)", re.escape(task.prompt))
    return re.fullmatch(pattern, query, re.DOTALL).groupdict()


def _report(comparison: Comparison, task: Task, seconds, workdir: Path) -> None:
    chance = 1 / len(task.labels) if task.labels else None
    draw_accuracy(comparison, workdir / "accuracy.png", chance)
    if comparison.layer_weights:
        draw_layers(comparison, workdir / "layers.png")
    page = markdown(comparison)
    write_whole(workdir / "report.md", page)
    figures = {**as_json(comparison), "seconds": seconds}
    write_whole(workdir / "report.json", json.dumps(figures, indent=2) + "\n")
    header, *rows = table(comparison)
    shown = Table(*header, title=f"{comparison.task}: accuracy in %, {comparison.scoring}",
                  caption=page.rpartition("\n\n")[2].strip())
    for i, row in enumerate(rows):
        if i == len(comparison.languages):  # means follow
            shown.add_section()
        shown.add_row(*row)
    Console(width=None if Console().is_terminal else 120).print(shown)
