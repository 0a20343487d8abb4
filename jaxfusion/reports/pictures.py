"""Draws figures to files. Labels are Latin: matplotlib's font has few other scripts.

Every picture is two files: `NAME.png` for light pages, `NAME_dark.png` for dark ones. Methods and
languages have the colours of `colours_of` in both. Figures do not use pyplot: they need no display
and do not change a notebook's state.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

from jaxfusion.reports.colours import GREY, colours_of
from jaxfusion.reports.comparison import Cell, Comparison

rcParams["text.parse_math"] = False  # a model's name may look like a formula
WIDTH = 0.8  # of all bars of a language
INCH = 150  # dots
ROW = 11.0  # inches of bars
FAR = 100  # losses of such a ratio have a logarithmic axis
# The page's own background and text.
DARK = {f"{part}.facecolor": "#16191d" for part in ("figure", "axes", "savefig")} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#e4e6e8") | {
    "axes.edgecolor": "#8a9097"}
Metrics = dict[str, list[list[dict[str, float]]]]


def dark(picture: Path) -> Path:
    """Where a picture's dark variant is."""
    return picture.with_stem(f"{picture.stem}_dark")


def themes(out: Path) -> Iterator[Path]:
    """A picture's two files; what is drawn after each has the colours of its theme."""
    for file, colours in ((out, {}), (dark(out), DARK)):
        with rc_context(colours):
            yield file


def draw_accuracy(comparison: Comparison, out: Path, chance: float | None = None) -> None:
    """Draws a bar per language and model, with intervals, and the chance level."""
    c = comparison
    cells = {model: {name: c.cell(model, name) for name in c.languages} for model in c.correct}
    each = max(0.9, 0.16 * len(c.correct))  # inches of a language
    rows = -(-len(c.languages) // max(1, int(ROW / each)))
    columns = -(-len(c.languages) // rows)
    lines = -(-(len(c.correct) + 1) // 6)  # of the legend
    size = (max(7.0, 1.0 + each * columns), 2.8 * rows + 0.75 + 0.25 * lines)
    for file in themes(out):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
        for row, axes in enumerate(panels):
            languages = c.languages[row * columns : (row + 1) * columns]
            shown = _bars(axes, {model: [by[x] for x in languages] for model, by in cells.items()})
            if chance is not None:
                shown.append(axes.axhline(100 * chance, color=rcParams["text.color"],
                                          linestyle=":", linewidth=1))
            axes.set_xticks(range(len(languages)), [
                "\n".join([name, *wrap(", ".join(c.groups_of(name)), 12)]) for name in languages
            ], fontsize=9)
            axes.set(ylabel=f"accuracy on {c.task}, %", ylim=(0, 100), xlim=(-0.6, columns - 0.4))
        names = [*c.correct, *(() if chance is None else ("chance",))]
        panels[0].legend(shown, names, ncols=-(-len(names) // lines), loc="lower left",
                         bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9)
        _save(figure, file)


def _bars(axes, cells: dict[str, list[Cell]]) -> list[Any]:
    """A group of bars for each language, a bar for each model; returns those of each model."""
    width, drawn = WIDTH / len(cells), []
    for i, (model, colour) in enumerate(colours_of(cells).items()):
        values = np.array([value for value, _ in cells[model]])
        ends = np.array([interval for _, interval in cells[model]])
        drawn.append(axes.bar(
            np.arange(len(values)) + (i + 0.5) * width - WIDTH / 2, 100 * values, width,
            color=colour, yerr=100 * np.abs(ends.T - values),
            error_kw={"elinewidth": 0.6, "ecolor": rcParams["text.color"]}))
    return drawn


def _save(figure: Figure, file: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=INCH)


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
    layers = max(len(values) for by in panels.values() for values in by.values())
    size = (1.0 + max(4.2, 0.34 * layers) * len(panels), max(2.8, 1.4 + 0.28 * rows))
    highest = max(max(values) for by in panels.values() for values in by.values())
    for file in themes(out):
        figure = Figure(figsize=size, layout="constrained")
        axes_of = figure.subplots(1, len(panels), squeeze=False)[0]
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
        figure.savefig(file, dpi=INCH)


def draw_sentences(
    panels: dict[str, dict[str, Float[np.ndarray, "N D"]]], out: Path, joined: int = 0
) -> None:
    """Draws sentences in the plane of their first two principal components.

    Args:
      panels: title -> language -> vectors of the same sentences in each language.
      joined: the number of sentences whose translations are connected by a grey line.
    """
    for file in themes(out):
        figure = Figure(figsize=(1.0 + 4.6 * len(panels), 4.4), layout="constrained")
        for axes, (title, by_language) in zip(
                figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            every = np.stack(list(by_language.values()))  # [languages, sentences, D]
            flat = every.reshape(-1, every.shape[-1])
            plane = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)[2][:2]
            points_of = (every - flat.mean(axis=0)) @ plane.T
            for sentence in range(joined):
                axes.plot(*points_of[:, sentence].T, color=GREY, alpha=0.5, linewidth=0.6,
                          zorder=0)
            for name, points in zip(by_language, points_of, strict=True):
                axes.scatter(*points.T, s=12, color=colours_of(by_language)[name], label=name)
            axes.set(title=title, xticks=[], yticks=[])
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5),
                    markerscale=2)
        _save(figure, file)


def smooth(values: Sequence[float]) -> np.ndarray | None:
    """The moving average of a curve: at each point, of as many before as behind it.

    A window is a tenth of the points, at least three; it is smaller near the ends, so that the
    average follows a steep curve without delay. None for a curve of fewer than six points, where
    it would hide more than it shows.
    """
    if len(values) < 6:
        return None
    half, last = max(1, len(values) // 20), len(values) - 1
    widths = [min(half, i, last - i) for i in range(len(values))]
    return np.array([np.mean(values[i - width : i + width + 1])
                     for i, width in enumerate(widths)])


def draw_curves(metrics: Metrics, out: Path, colours: dict[str, str] | None = None) -> bool:
    """Draws loss and development score by step: a line per run, a colour per model.

    The loss is drawn faint, and strong where it is smoothed.

    Args:
      metrics: model -> for each seed the records of `metrics.jsonl`.
      colours: of the models, where others have theirs too.

    Returns:
      Whether there was anything to draw.
    """
    runs = [(model, records) for model, seeds in metrics.items() for records in seeds]
    counts = Counter(name for _, records in runs for x in records for name in x)
    dev = [name for name in ("dev/likelihood", "dev/exact_match")
           if counts[name] > len(runs)][:1]  # one point is not a curve
    if not runs:
        return False
    colours = colours or colours_of(metrics)
    for file in themes(out):
        figure = Figure(figsize=(5.6 * (1 + len(dev)), 3.6), layout="constrained")
        panels = figure.subplots(1, 1 + len(dev), squeeze=False)[0]
        for axes, name in zip(panels, ["loss", *dev], strict=True):
            for model, seeds in metrics.items():
                for i, records in enumerate(seeds):
                    points = [(x["step"], x[name]) for x in records if name in x]
                    _plot(axes, points, colours[model], None if i else model, name == "loss")
            axes.set(xlabel="step", title=name.replace("/", " ").replace("_", " "))
        losses = [x["loss"] for _, records in runs for x in records if "loss" in x]
        if min(losses, default=0) > 0 and max(losses) > FAR * min(losses):
            panels[0].set_yscale("log")
            panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].legend(frameon=False, fontsize=8)
        _save(figure, file)
    return True


def _plot(axes, points: list[tuple[float, float]], colour: str, label: str | None,
          smoothed: bool = False) -> None:
    """One curve; smoothed, the raw one is faint behind it."""
    steps, values = zip(*points, strict=True) if points else ((), ())
    strong = smooth(values) if smoothed else None
    if strong is not None:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, values if strong is None else strong, color=colour, linewidth=1.6,
              marker="." if strong is None and len(points) < 20 else None, label=label)


def draw_development(metrics: Metrics, out: Path) -> bool:
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
    colours = colours_of(x for points in panels.values() for x in points)
    for file in themes(out):
        figure = Figure(figsize=(1.0 + 4.4 * len(panels), 3.6), layout="constrained")
        drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, points) in zip(drawn, panels.items(), strict=True):
            for language, lines in points.items():
                for i, line in enumerate(lines):
                    _plot(axes, line, colours[language], None if i else language)
            axes.set(xlabel="step", title=title)
        drawn[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5),
                         ncols=-(-len(colours) // 20))
        _save(figure, file)
    return True


def draw_languages(
    before, after: dict[str, Any], out: Path, colours: dict[str, str] | None = None
) -> None:
    """Draws languages in the plane of the last layer's first two specific directions, before and
    after; and the singular values by layer.

    Args:
      before: the `Probe` of the original LLM. after: those of trained LLMs, by name.
      colours: of the names, where others have theirs too.
    """
    colours = colours or colours_of(after)
    layers = range(1, before.layers + 1)
    lines = list(zip(*(before.subspaces(x).singular_values for x in layers), strict=True))
    for file in themes(out):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        plane, values = figure.subplots(1, 2)
        _draw_plane(plane, before, after, {**colours, "before": rcParams["text.color"]})
        for i, line in enumerate(lines):
            values.plot(layers, line, marker="o", color=rcParams["text.color"],
                        alpha=1 - 0.8 * i / len(lines), label=f"value {i + 1}")
        values.set(xlabel="layer", ylabel="singular value of the language means", yscale="log")
        values.set_xticks(list(layers)[:: max(1, before.layers // 12)])
        for ticks in (values.yaxis.set_major_formatter, values.yaxis.set_minor_formatter):
            ticks("{x:g}")
        values.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        _save(figure, file)


def _draw_plane(axes, before, after: dict[str, Any], colours: dict[str, str]) -> None:
    """The languages as points: one colour and marker for each LLM."""
    basis, markers = before.subspaces(before.layers).specific[:, :2], "osD^vP*X"
    for i, (name, probe) in enumerate({"before": before, **after}.items()):
        # Relative to the central language: a shift common to all languages is not a difference.
        points = (probe.means[-1] - probe.means[-1][0]) @ basis
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
        axes.scatter(*points.T, marker=markers[i % len(markers)], label=name, s=36,
                     facecolors="none" if i else colours[name], edgecolors=colours[name])
        if i == 0:
            for language, point in zip(probe.languages, points, strict=True):
                axes.annotate(language, point, textcoords="offset points", xytext=(5, 5))
    axes.set(xlabel="first specific direction", ylabel="second specific direction",
             title=f"last layer, {before.languages[0]} at the origin")
    axes.legend(frameon=False, fontsize=8)
