"""Writes a report as one self-contained HTML file, and as Markdown with pictures."""

import json
import platform
import unicodedata
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from struct import unpack
from types import MappingProxyType
from typing import Any

import jinja2

from jaxfusion.config import directory_name
from jaxfusion.files import write_whole
from jaxfusion.reports.colours import colours_of
from jaxfusion.reports.comparison import Comparison, differences, remarks, table
from jaxfusion.reports.markdown_page import as_markdown_page
from jaxfusion.reports.pictures import (
    INCH,
    dark,
    draw_accuracy,
    draw_curves,
    draw_development,
    draw_layers,
)
from jaxfusion.reports.scored_runs import Models
from jaxfusion.reports.summary import summary, unscored

EXAMPLES = 3  # gained and lost rows shown for each language
LIBRARIES = ("jaxfusion", "jax", "flax", "optax", "transformers", "numpy")


@dataclass(frozen=True)
class ChangedAnswer:
    """A row that two models answer differently, one of them correctly."""

    query: str
    target: str
    before: str
    after: str


@dataclass(frozen=True)
class Measure:
    """A table of other figures than accuracy: what they are, and the rows with their header."""

    caption: str
    table: list[list[str]]


def write_page(
    comparisons: list[Comparison], models: Models, folder: Path, title: str, name: str = "report",
    measures: Sequence[Measure] = (), pictures: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Writes `NAME.html`, `NAME.md` and their pictures; returns the HTML file.

    Args:
      comparisons: one for each task; see `compare_runs`.
      models: their runs.
      measures: more tables. pictures: more pictures in the folder, by caption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if name == "report" else f"{name}_"
    sections = [_section(c, models, folder, prefix if len(comparisons) == 1 else
                         f"{prefix}{directory_name(c.task)}_") for c in comparisons]
    content = {
        "title": title, "sections": sections,
        "summaries": [x["summary"] for x in sections] or [unscored(list(models))],
        "colours": colours_of(models), "measures": measures, "pictures": pictures,
        **_curves(models, folder, prefix),
        "about": {model: _about(runs) for model, runs in models.items()},
        "configs": {model: json.dumps(runs[0].config, indent=2, ensure_ascii=False)
                    for model, runs in models.items() if runs[0].config},
        "versions": {"python": platform.python_version(),
                     **{x: metadata.version(x) for x in LIBRARIES}},
    }
    page = folder / f"{name}.html"
    write_whole(page, _environment().get_template("page.html.jinja").render(content))
    write_whole(folder / f"{name}.md", as_markdown_page(content))
    return page


def _curves(models: Models, folder: Path, prefix: str) -> dict[str, Path | None]:
    """The pictures of training, where there is anything to draw."""
    trained = {model: [run.metrics for run in runs if run.metrics]
               for model, runs in models.items()}
    trained = {model: x for model, x in trained.items() if x}
    curves, development = (folder / f"{prefix}{x}.png" for x in ("curves", "development"))
    return {"curves": curves if draw_curves(trained, curves, colours_of(models)) else None,
            "development": development if draw_development(trained, development) else None}


def token_table(tokens: dict[str, Any]) -> str:
    """The `tokens` of a text and their layer `weights`, as an HTML table."""
    return str(_environment().get_template("tokens.html.jinja").module.token_rows(tokens))


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(loader=jinja2.PackageLoader("jaxfusion.reports", "."),
                             autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"embed": _embed, "shade": _shade, "direction": _direction, "dark": dark,
                    "width": _width, "narrow": _narrow}
    return env


def _section(c: Comparison, models: Models, folder: Path, prefix: str) -> dict[str, Any]:
    """The page's section on one task."""
    first = next(iter(models.values()))[0].details[c.task]
    labels = len(next(iter(first.values()))["likelihoods"][0])
    accuracy, layers = folder / f"{prefix}accuracy.png", folder / f"{prefix}layers.png"
    draw_accuracy(c, accuracy, 1 / labels if labels else None)
    if c.layer_weights:
        draw_layers(c, layers)
    others = [model for model in c.correct if model != c.reference]
    return {
        "task": c.task, "summary": summary(c), "table": table(c), "rows": len(c.languages),
        "groups": {name: ", ".join(c.groups_of(name)) for name in c.languages},
        "remarks": remarks(c), "accuracy": accuracy,
        "reference": c.reference, "layers": layers if c.layer_weights else None,
        "differences": {model: differences(c, model) for model in others},
        "sure": {model: {line: bool(test.sure) for line, test in c.tests[model].items()}
                 for model in others},
        "changed": {model: _changed(c, models, model) for model in others},
        "tokens": {model: by_language for model, runs in models.items() if (by_language := {
            language: {**x, "text": part["queries"][0]} for language in c.languages
            if (x := (part := runs[0].details[c.task][language]).get("tokens"))
            and len({tuple(weights) for weights in x["weights"]}) > 1})},
    }


def _changed(
    c: Comparison, models: Models, model: str
) -> dict[str, dict[str, list[ChangedAnswer]]]:
    """The first rows gained and lost against the reference by language, for the first seeds."""
    changed = {}
    for language in c.languages:
        before, after = (models[x][0].details[c.task][language] for x in (c.reference, model))
        right = [x["correct"][c.scoring] for x in (before, after)]
        rows = {"gained": [], "lost": []}
        for i, (was, now) in enumerate(zip(*right, strict=True)):
            kind = "gained" if now > was else "lost"
            if now != was and len(rows[kind]) < EXAMPLES:
                answers = [_answer(x, i, c.scoring) for x in (before, after)]
                rows[kind].append(
                    ChangedAnswer(before["queries"][i], before["targets"][i], *answers))
        if any(rows.values()):
            changed[language] = rows
    return changed


def _answer(details: dict[str, Any], row: int, scoring: str) -> str:
    """A model's answer: its text, or its most likely label."""
    scores = details["likelihoods"][row]
    if scoring == "exact_match" or not scores:
        return details["answers"][row]
    lengths = [len(x) for x in details["labels"]] if scoring == "likelihood_norm" else None
    scores = [x / n for x, n in zip(scores, lengths, strict=True)] if lengths else scores
    return details["labels"][scores.index(max(scores))]


def _about(runs) -> dict[str, Any]:
    """The settings of a model's scores, for the reader."""
    names = dict.fromkeys(name for run in runs for name in run.about)
    values_of = {name: list(dict.fromkeys(_said(run.about.get(name)) for run in runs))
                 for name in names}
    shown = {"workdir": ", ".join(run.place for run in runs),
             **{name: ", ".join(values) for name, values in values_of.items()}}
    return {name: value for name, value in shown.items() if value not in ("None", "False", "")}


def _said(value: Any) -> str:
    """A setting's value; of several, those that are set, each by its name."""
    return ", ".join(f"{name} {x}" for name, x in value.items() if x not in (None, [], "")) if (
        isinstance(value, dict)) else str(value)


def _embed(picture: Path) -> str:
    return "data:image/png;base64," + b64encode(picture.read_bytes()).decode()


def _width(picture: Path) -> int:
    """How many CSS pixels wide a PNG is shown: as large as its text is in print."""
    dots, = unpack(">I", picture.read_bytes()[16:20])
    return round(96 * dots / INCH)


def _narrow(table: list[list[str]]) -> list[list[str]]:
    """A table without its second column, the groups: they go below the language."""
    return [[first, *rest] for first, _, *rest in table]


def _shade(weight: float) -> str:
    """The CSS of a cell: more colour for more weight."""
    colour = "#fff" if weight > 0.6 else "inherit"
    return f"background: rgb(33 110 160 / {weight:.2f}); color: {colour}"


def _direction(text: str) -> str:
    """`rtl` if most letters are right-to-left: a prompt's first words may be English."""
    counts = Counter(unicodedata.bidirectional(letter) for letter in text)
    return "rtl" if counts["R"] + counts["AL"] > counts["L"] else "ltr"
