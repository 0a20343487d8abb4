"""Writes a report as one self-contained HTML file, and as Markdown with pictures."""

import json
import platform
import re
import unicodedata
from base64 import b64encode
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2

from jaxfusion.config import directory_name
from jaxfusion.files import write_whole
from jaxfusion.reports.comparison import (
    Comparison,
    as_markdown,
    as_text,
    as_texts,
    differences,
    remarks,
    table,
)
from jaxfusion.reports.pictures import draw_accuracy, draw_curves, draw_development, draw_layers
from jaxfusion.reports.scored_runs import Models

EXAMPLES = 3  # gained and lost rows shown for each language
LIBRARIES = ("jaxfusion", "jax", "flax", "optax", "transformers", "numpy")


@dataclass(frozen=True)
class ChangedAnswer:
    """A row that two models answer differently, one of them correctly."""

    query: str
    target: str
    before: str
    after: str


def write_page(
    comparisons: list[Comparison], models: Models, folder: Path, title: str, name: str = "report"
) -> Path:
    """Writes `NAME.html`, `NAME.md` and their pictures; returns the HTML file.

    Args:
      comparisons: one for each task; see `compare_runs`.
      models: their runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if name == "report" else f"{name}_"
    sections = [_section(c, models, folder, prefix if len(comparisons) == 1 else
                         f"{prefix}{directory_name(c.task)}_") for c in comparisons]
    curves = folder / f"{prefix}curves.png"
    trained = {model: [run.metrics for run in runs if run.metrics]
               for model, runs in models.items()}
    trained = {model: x for model, x in trained.items() if x}
    drawn = draw_curves(trained, curves)
    development = folder / f"{prefix}development.png"
    content = {
        "title": title, "sections": sections, "curves": curves if drawn else None,
        "development": development if draw_development(trained, development) else None,
        "about": {model: _about(runs) for model, runs in models.items()},
        "configs": {model: json.dumps(runs[0].config, indent=2, ensure_ascii=False)
                    for model, runs in models.items() if runs[0].config},
        "versions": {"python": platform.python_version(),
                     **{x: metadata.version(x) for x in LIBRARIES}},
    }
    page = folder / f"{name}.html"
    write_whole(page, _environment().get_template("page.html.jinja").render(content))
    write_whole(folder / f"{name}.md", _markdown(content))
    return page


def token_table(tokens: dict[str, Any]) -> str:
    """The `tokens` of a text and their layer `weights`, as an HTML table."""
    return str(_environment().get_template("tokens.html.jinja").module.token_rows(tokens))


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(loader=jinja2.PackageLoader("jaxfusion.reports", "."),
                             autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"embed": _embed, "shade": _shade, "direction": _direction}
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
        "task": c.task, "table": table(c), "remarks": remarks(c), "accuracy": accuracy,
        "reference": c.reference, "layers": layers if c.layer_weights else None,
        "differences": {model: differences(c, model) for model in others},
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
    values_of = {name: list(dict.fromkeys(str(run.about.get(name)) for run in runs))
                 for name in names}
    shown = {"workdir": ", ".join(run.place for run in runs),
             **{name: ", ".join(values) for name, values in values_of.items()}}
    return {name: value for name, value in shown.items() if value not in ("None", "False", "")}


def _embed(picture: Path) -> str:
    return "data:image/png;base64," + b64encode(picture.read_bytes()).decode()


def _shade(weight: float) -> str:
    """The CSS of a cell: more colour for more weight."""
    colour = "#fff" if weight > 0.6 else "inherit"
    return f"background: rgb(33 110 160 / {weight:.2f}); color: {colour}"


def _direction(text: str) -> str:
    """`rtl` if most letters are right-to-left: a prompt's first words may be English."""
    counts = Counter(unicodedata.bidirectional(letter) for letter in text)
    return "rtl" if counts["R"] + counts["AL"] > counts["L"] else "ltr"


def _markdown(content: dict[str, Any]) -> str:
    lines = [f"# {as_text(content['title'])}", ""]
    for part in content["sections"]:
        lines += [f"## {part['task']}", "", as_markdown(as_texts(part["table"])),
                  *part["remarks"], "", f"![accuracy by language]({part['accuracy'].name})", ""]
        if part["layers"]:
            lines += [f"![weight of each layer]({part['layers'].name})", ""]
        for model, rows in part["differences"].items():
            lines += [f"### {as_text(model)} against {as_text(part['reference'])}", "",
                      as_markdown(as_texts(rows))]
            for language, kinds in part["changed"][model].items():
                for kind, examples in kinds.items():
                    lines += [
                        f"- {as_text(language)}, {kind}: {_inline(x.query)} → "
                        f"**{_inline(x.after)}** (before: {_inline(x.before)}; right: "
                        f"{_inline(x.target)})"
                        for x in examples]
            lines.append("")
        for model, by_language in part["tokens"].items():
            lines += [f"### Layer weights of each token: {as_text(model)}", ""]
            for language, x in by_language.items():
                layers = [f"layer {i + 1}" for i in range(len(x["weights"][0]))]
                lines += [f"{as_text(language)}: {_inline(x['text'])}", "", as_markdown([
                    ["token, % of", *layers],
                    *([_inline(token), *(f"{100 * w:.0f}" for w in weights)]
                      for token, weights in zip(x["tokens"], x["weights"], strict=True))])]
    if content["curves"]:
        lines += ["## Training", "", f"![training curves]({content['curves'].name})", ""]
    if content["development"]:
        lines += [f"![development by language]({content['development'].name})", ""]
    lines += ["## Settings", ""]
    for model, about in content["about"].items():
        parts = "; ".join(f"{k} {_inline(str(v))}" for k, v in about.items())
        lines += [f"- {as_text(model)}: {parts}"]
    lines += ["- " + ", ".join(f"{k} {v}" for k, v in content["versions"].items()), ""]
    for model, config in content["configs"].items():
        lines += [f"### Config of {as_text(model)}", "", "```json", config, "```", ""]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """Text within a line or a table's cell."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
