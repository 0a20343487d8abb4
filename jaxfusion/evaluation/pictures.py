"""Pictures of a comparison. Labels are Latin: matplotlib's own font has few other scripts."""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
import numpy as np

from jaxfusion.evaluation.comparison import Comparison

WIDTH = 0.8  # of a language's bars together


def draw_accuracy(comparison: Comparison, out: Path, chance: float | None = None) -> None:
    """A bar per language and model, with intervals, and the level of chance."""
    c, languages = comparison, comparison.languages
    columns = min(5, len(c.correct) + 1)  # of the legend
    lines = -(-(len(c.correct) + 1) // columns)
    size = (max(7.0, 1.0 + 0.95 * len(languages)), 4.0 + 0.25 * lines)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    width = WIDTH / len(c.correct)
    colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, len(c.correct) - 1))
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
        f"{name}\n{', '.join(c.groups_of(name))}" for name in languages
    ])
    axes.set(ylabel=f"accuracy on {c.task}, %", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False,
                fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def draw_layers(comparison: Comparison, out: Path) -> None:
    """The weight of each layer: a panel per fusion, a row per language."""
    fusions = comparison.layer_weights
    figure, panels = plt.subplots(
        1, len(fusions), squeeze=False, layout="constrained",
        figsize=(1.0 + 4.2 * len(fusions), max(2.8, 1.4 + 0.28 * len(comparison.languages))),
    )
    highest = max(max(weights) for by in fusions.values() for weights in by.values())
    for axes, (name, by_language) in zip(panels[0], fusions.items(), strict=True):
        languages = [x for x in comparison.languages if x in by_language]
        weights = np.array([by_language[x] for x in languages])
        image = axes.imshow(100 * weights, cmap="viridis", vmin=0, vmax=100 * highest,
                            aspect="auto")
        for (row, layer), value in np.ndenumerate(weights):
            axes.text(layer, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                      color="black" if value > 0.6 * highest else "white")
        axes.set_xticks(range(weights.shape[1]), [str(i + 1) for i in range(weights.shape[1])])
        axes.set_yticks(range(len(languages)), languages)
        axes.set(title=name, xlabel="encoder layer")
    figure.colorbar(image, ax=panels[0].tolist(), label="mean weight, %")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def draw_curves(metrics: dict[str, list[list[dict[str, float]]]], out: Path) -> bool:
    """Loss and development score by step: a line for each run, a colour for each model.

    Args:
      metrics: of every model, by seed, the records of `metrics.jsonl`.

    Returns:
      Whether there was anything to draw.
    """
    runs = [(i, model, records) for i, (model, seeds) in enumerate(metrics.items())
            for records in seeds]
    counts = Counter(name for _, _, records in runs for x in records for name in x)
    dev = [name for name in ("dev/likelihood", "dev/exact_match")
           if counts[name] > len(runs)][:1]  # one point is no curve
    if not runs:
        return False
    figure, panels = plt.subplots(1, 1 + len(dev), figsize=(4.8 * (1 + len(dev)), 3.6),
                                  squeeze=False, layout="constrained")
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
    plt.close(figure)
    return True


def draw_languages(before, after: dict[str, Any], out: Path) -> None:
    """Languages in the plane of the first two specific directions of the last layer, before and
    after; and the singular values by layer.

    Args:
      before: the `Probe` of the LLM as it was. after: those of trained ones, by name.
    """
    figure, (plane, values) = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    basis = before.subspaces(before.layers).specific[:, :2]
    markers = "osD^vP*X"
    for i, (name, found) in enumerate({"before": before, **after}.items()):
        # Against the central language: what all share is no difference.
        at = (found.means[-1] - found.means[-1][0]) @ basis
        at = np.pad(at, ((0, 0), (0, 2 - at.shape[1])))
        plane.scatter(*at.T, marker=markers[i % len(markers)], label=name, s=36,
                      facecolors="none" if i else "0.2", edgecolors=f"C{i}" if i else "0.2")
        if i == 0:
            for language, point in zip(found.languages, at, strict=True):
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
    plt.close(figure)
