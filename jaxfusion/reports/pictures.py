"""Draws figures to files. Labels are Latin: matplotlib's font has few other scripts.

Figures do not use pyplot: they need no display and do not change a notebook's state.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps, rcParams
from matplotlib.figure import Figure

from jaxfusion.reports.comparison import Comparison

rcParams["text.parse_math"] = False  # a model's name may look like a formula
WIDTH = 0.8  # of all bars of a language


def draw_accuracy(comparison: Comparison, out: Path, chance: float | None = None) -> None:
    """Draws a bar per language and model, with intervals, and the chance level."""
    c, languages = comparison, comparison.languages
    columns = min(5, len(c.correct) + 1)  # of the legend
    lines = -(-(len(c.correct) + 1) // columns)
    size = (max(7.0, 1.0 + 0.95 * len(languages)), 4.0 + 0.25 * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    width = WIDTH / len(c.correct)
    colours = colormaps["viridis"](np.linspace(0.05, 0.9, len(c.correct) - 1))
    for i, model in enumerate(c.correct):
        cells = [c.cell(model, name) for name in languages]
        values = np.array([value for value, _ in cells])
        ends = np.array([interval for _, interval in cells])
        axes.bar(
            np.arange(len(languages)) + (i + 0.5) * width - WIDTH / 2, 100 * values, width,
            label=model, color="0.75" if i == 0 else colours[i - 1],
            yerr=100 * np.abs(ends.T - values), error_kw={"elinewidth": 0.6, "ecolor": "0.3"},
        )
    if chance is not None:
        axes.axhline(100 * chance, color="0.2", linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(languages)), [
        "\n".join([name, *wrap(", ".join(c.groups_of(name)), 10)]) for name in languages
    ])
    axes.set(ylabel=f"accuracy on {c.task}, %", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False,
                fontsize=9)
    figure.savefig(out, dpi=150)


def draw_layers(comparison: Comparison, out: Path) -> None:
    """Draws the weight of each layer: a panel per fusion, a row per language."""
    draw_by_layer({fusion: {x: by_language[x] for x in comparison.languages if x in by_language}
                   for fusion, by_language in comparison.layer_weights.items()},
                  "mean weight, %", out)


def draw_by_layer(
    panels: dict[str, dict[str, Sequence[float]]], label: str, out: Path
) -> None:
    """Draws a panel for each title, with a row per language and a column for each layer 1 … L.

    Args:
      panels: title -> language -> a fraction for each layer. label: of the fractions, in %.
    """
    rows = max(len(by_language) for by_language in panels.values())
    figure = Figure(figsize=(1.0 + 4.2 * len(panels), max(2.8, 1.4 + 0.28 * rows)),
                    layout="constrained")
    axes_of = figure.subplots(1, len(panels), squeeze=False)[0]
    highest = max(max(values) for by in panels.values() for values in by.values())
    for axes, (title, by_language) in zip(axes_of, panels.items(), strict=True):
        values = np.array(list(by_language.values()))
        image = axes.imshow(100 * values, cmap="viridis", vmin=0, vmax=100 * highest,
                            aspect="auto")
        for (row, layer), value in np.ndenumerate(values):
            axes.text(layer, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                      color="black" if value > 0.6 * highest else "white")
        axes.set_xticks(range(values.shape[1]), [str(i + 1) for i in range(values.shape[1])])
        axes.set_yticks(range(len(by_language)), list(by_language))
        axes.set(title=title, xlabel="encoder layer")
    figure.colorbar(image, ax=axes_of.tolist(), label=label)
    figure.savefig(out, dpi=150)


def draw_sentences(
    panels: dict[str, dict[str, Float[np.ndarray, "N D"]]], out: Path, joined: int = 0
) -> None:
    """Draws sentences in the plane of their first two principal components.

    Args:
      panels: title -> language -> vectors of the same sentences in each language.
      joined: the number of sentences whose translations are connected by a grey line.
    """
    figure = Figure(figsize=(1.0 + 4.6 * len(panels), 4.4), layout="constrained")
    for axes, (title, by_language) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        every = np.stack(list(by_language.values()))  # [languages, sentences, D]
        flat = every.reshape(-1, every.shape[-1])
        plane = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)[2][:2]
        points_of = (every - flat.mean(axis=0)) @ plane.T
        for sentence in range(joined):
            axes.plot(*points_of[:, sentence].T, color="0.8", linewidth=0.6, zorder=0)
        colours = colormaps["tab20"](np.arange(len(points_of)) % 20)
        for name, points, colour in zip(by_language, points_of, colours, strict=True):
            axes.scatter(*points.T, s=12, color=colour, label=name)
        axes.set(title=title, xticks=[], yticks=[])
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5),
                markerscale=2)
    figure.savefig(out, dpi=150)


def draw_curves(metrics: dict[str, list[list[dict[str, float]]]], out: Path) -> bool:
    """Draws loss and development score by step: a line per run, a colour per model.

    Args:
      metrics: model -> for each seed the records of `metrics.jsonl`.

    Returns:
      Whether there was anything to draw.
    """
    runs = [(i, model, records) for i, (model, seeds) in enumerate(metrics.items())
            for records in seeds]
    counts = Counter(name for _, _, records in runs for x in records for name in x)
    dev = [name for name in ("dev/likelihood", "dev/exact_match")
           if counts[name] > len(runs)][:1]  # one point is not a curve
    if not runs:
        return False
    figure = Figure(figsize=(4.8 * (1 + len(dev)), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(dev), squeeze=False)
    for axes, name in zip(panels[0], ["loss", *dev], strict=True):
        named = set()
        for i, model, records in runs:
            points = [(x["step"], x[name]) for x in records if name in x]
            axes.plot(*zip(*points, strict=True), color=f"C{i}", linewidth=1.2,
                      marker="." if len(points) < 20 else None,
                      label=None if model in named else model)
            named.add(model)
        axes.set(xlabel="step", title=name.replace("/", " ").replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)
    return True


def draw_development(metrics: dict[str, list[list[dict[str, float]]]], out: Path) -> bool:
    """Draws the development score of each language by step: a panel per model, a line per run.

    Args:
      metrics: as in `draw_curves`.

    Returns:
      Whether a run has such scores of several languages, at two steps or more.
    """
    panels = {}
    for model, seeds in metrics.items():
        names = {name for records in seeds for record in records for name in record
                 if name.count("/") == 2}  # dev/LANGUAGE/SCORE
        kind = next((x for x in ("likelihood", "exact_match", "log_likelihood")
                     if any(name.endswith(f"/{x}") for name in names)), None)
        points = {name.split("/")[1]: [
            [(record["step"], record[name]) for record in records if name in record]
            for records in seeds] for name in sorted(names) if name.endswith(f"/{kind}")}
        if any(len(line) > 1 for lines in points.values() for line in lines):
            panels[f"{model}: dev {kind.replace('_', ' ')}"] = points
    if not panels:
        return False
    languages = list(dict.fromkeys(x for points in panels.values() for x in points))
    palette = colormaps["tab10" if len(languages) <= 10 else "tab20"]
    colours = {language: palette(i % palette.N) for i, language in enumerate(languages)}
    figure = Figure(figsize=(1.0 + 4.4 * len(panels), 3.6), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, points) in zip(drawn, panels.items(), strict=True):
        for language, lines in points.items():
            for i, line in enumerate(lines):
                axes.plot(*zip(*line, strict=True), color=colours[language], linewidth=1.2,
                          marker="." if len(line) < 20 else None,
                          label=None if i else language)
        axes.set(xlabel="step", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    drawn[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5),
                     ncols=-(-len(languages) // 20))
    figure.savefig(out, dpi=150)
    return True


def draw_languages(before, after: dict[str, Any], out: Path) -> None:
    """Draws languages in the plane of the last layer's first two specific directions, before and
    after; and the singular values by layer.

    Args:
      before: the `Probe` of the original LLM. after: those of trained LLMs, by name.
    """
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    plane, values = figure.subplots(1, 2)
    basis = before.subspaces(before.layers).specific[:, :2]
    markers = "osD^vP*X"
    for i, (name, probe) in enumerate({"before": before, **after}.items()):
        # Relative to the central language: a shift common to all languages is not a difference.
        points = (probe.means[-1] - probe.means[-1][0]) @ basis
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
        plane.scatter(*points.T, marker=markers[i % len(markers)], label=name, s=36,
                      facecolors="none" if i else "0.2", edgecolors=f"C{i}" if i else "0.2")
        if i == 0:
            for language, point in zip(probe.languages, points, strict=True):
                plane.annotate(language, point, textcoords="offset points", xytext=(5, 5))
    plane.set(xlabel="first specific direction", ylabel="second specific direction",
              title=f"last layer, {before.languages[0]} at the origin")
    plane.legend(frameon=False, fontsize=8)
    layers = range(1, before.layers + 1)
    for i, line in enumerate(zip(*(before.subspaces(x).singular_values for x in layers),
                                 strict=True)):
        values.plot(layers, line, marker="o", label=f"value {i + 1}")
    values.set(xlabel="layer", ylabel="singular value of the language means", yscale="log")
    values.set_xticks(list(layers)[:: max(1, before.layers // 12)])
    for ticks in (values.yaxis.set_major_formatter, values.yaxis.set_minor_formatter):
        ticks("{x:g}")
    values.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (plane, values):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
