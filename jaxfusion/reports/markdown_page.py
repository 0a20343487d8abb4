"""A report as Markdown, with the same content as the HTML page."""

import re
from typing import Any

from jaxfusion.reports.comparison import as_markdown, as_text, as_texts


def as_markdown_page(content: dict[str, Any]) -> str:
    """The page; pictures are links to files beside it.

    Args:
      content: as in `write_page`.
    """
    lines = [f"# {as_text(content['title'])}", ""]
    for said in content["summaries"]:
        lines += [as_text(" ".join(said)), ""]
    for part in content["sections"]:
        lines += _section(part)
    for measure in content["measures"]:
        lines += [as_markdown(as_texts(measure.table)), as_text(measure.caption), ""]
    for caption, picture in content["pictures"].items():
        lines += [f"![{as_text(caption)}]({picture.name})", ""]
    if content["curves"]:
        lines += ["## Training", "", f"![training curves]({content['curves'].name})", ""]
    if content["development"]:
        lines += [f"![development by language]({content['development'].name})", ""]
    return "\n".join(lines + _settings(content))


def _section(part: dict[str, Any]) -> list[str]:
    """The lines on one task."""
    lines = [f"## {part['task']}", "", as_markdown(as_texts(part["table"])),
             *part["remarks"], "", f"![accuracy by language]({part['accuracy'].name})", ""]
    if part["layers"]:
        lines += [f"![weight of each layer]({part['layers'].name})", ""]
    for model, rows in part["differences"].items():
        lines += [f"### {as_text(model)} against {as_text(part['reference'])}", "",
                  as_markdown(as_texts(rows))]
        for language, kinds in part["changed"][model].items():
            lines += [f"- {as_text(language)}, {kind}: {inline(x.query)} → **{inline(x.after)}** "
                      f"(before: {inline(x.before)}; right: {inline(x.target)})"
                      for kind, examples in kinds.items() for x in examples]
        lines.append("")
    for model, by_language in part["tokens"].items():
        lines += [f"### Layer weights of each token: {as_text(model)}", ""]
        for language, x in by_language.items():
            layers = [f"layer {i + 1}" for i in range(len(x["weights"][0]))]
            lines += [f"{as_text(language)}: {inline(x['text'])}", "", as_markdown([
                ["token, % of", *layers],
                *([inline(token), *(f"{100 * w:.0f}" for w in weights)]
                  for token, weights in zip(x["tokens"], x["weights"], strict=True))])]
    return lines


def _settings(content: dict[str, Any]) -> list[str]:
    """Settings of each model, versions, configs."""
    lines = ["## Settings", ""]
    for model, about in content["about"].items():
        parts = "; ".join(f"{k} {inline(str(v))}" for k, v in about.items())
        lines += [f"- {as_text(model)}: {parts}"]
    lines += ["- " + ", ".join(f"{k} {v}" for k, v in content["versions"].items()), ""]
    for model, config in content["configs"].items():
        lines += [f"### Config of {as_text(model)}", "", "```json", config, "```", ""]
    return lines


def inline(text: str) -> str:
    """Text within a line or a table's cell."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
