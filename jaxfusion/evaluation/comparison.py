"""Several models on the same rows of the same languages: the table, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxfusion.evaluation.metrics import bootstrap_mean, wilson_interval

Interval = tuple[float, float]
Cell = tuple[float, Interval]  # a fraction and its 95% interval


@dataclass(frozen=True)
class Comparison:
    """What each model got right.

    Attributes:
      task, scoring: whose rows, and how an answer counts.
      correct: model -> language -> 0 or 1 for each row; rows are the same in all languages.
      groups: of languages, by name.
      reference: the model that others are compared with.
      baselines: accuracy of what needs no understanding, by name.
      layer_weights: model -> language -> weight of each layer.
      notes: what a reader must know, a line each.
      central: the language that must not lose; its difference to the reference is shown.
    """

    task: str
    scoring: str
    correct: dict[str, dict[str, Sequence[int]]]
    groups: dict[str, tuple[str, ...]]
    reference: str
    baselines: dict[str, float]
    layer_weights: dict[str, dict[str, list[float]]]
    notes: tuple[str, ...] = ()
    central: str | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        """Those of the groups in their order, before them all others."""
        scored = next(iter(self.correct.values()))
        grouped = [name for names in self.groups.values() for name in names]
        return (*(name for name in scored if name not in grouped),
                *(name for name in grouped if name in scored))

    def cell(self, model: str, language: str) -> Cell:
        """Accuracy in a language, with Wilson's interval."""
        rows = self.correct[model][language]
        return sum(rows) / len(rows), wilson_interval(sum(rows), len(rows))

    def mean(self, model: str, group: str, minus: str | None = None) -> Cell:
        """Mean over a group's languages, or its difference to another model's; bootstrap."""
        names = self.group(group)
        return bootstrap_mean([self._rows(model, name, minus) for name in names])

    def change(self, model: str, language: str) -> Cell:
        """How much more of a language a model gets right than the reference; bootstrap."""
        return bootstrap_mean([self._rows(model, language, self.reference)])

    def _rows(self, model: str, language: str, minus: str | None) -> np.ndarray:
        rows = np.array(self.correct[model][language], float)
        return rows if minus is None else rows - np.array(self.correct[minus][language], float)

    def group(self, name: str) -> tuple[str, ...]:
        """The languages of a group; of `all groups` those of every one."""
        grouped = self.groups.get(name) or tuple(x for g in self.groups.values() for x in g)
        return tuple(x for x in grouped if x in self.languages)

    @property
    def group_names(self) -> tuple[str, ...]:
        if not self.group("all groups"):
            return ()
        return (*(n for n in self.groups if self.group(n)), "all groups")


def table(c: Comparison) -> list[list[str]]:
    """Header and rows: languages, then means of groups, then differences to the reference."""
    models = list(c.correct)
    others = [m for m in models if m != c.reference]
    group_of = {name: group for group, names in c.groups.items() for name in names}
    rows = [["", "", *models]]
    rows += [[name, group_of.get(name, ""), *(_show(c.cell(m, name)) for m in models)]
             for name in c.languages]
    for group in c.group_names:
        rows.append([f"mean of {group}", "", *(_show(c.mean(m, group)) for m in models)])
    if c.group_names:
        differences = {m: _show(c.mean(m, "all groups", minus=c.reference), sign="+")
                       for m in others}
        rows.append([f"minus {c.reference}", "", *(differences.get(m, "") for m in models)])
    if c.central in c.languages:
        changes = {m: _show(c.change(m, c.central), sign="+") for m in others}
        rows.append([f"{c.central} minus {c.reference}", "",
                     *(changes.get(m, "") for m in models)])
    return rows


def _show(cell: Cell, sign: str = "") -> str:
    value, (low, high) = (100 * cell[0], tuple(100 * x for x in cell[1]))
    return f"{value:{sign}.1f} [{low:{sign}.0f}, {high:{sign}.0f}]"


def markdown(c: Comparison) -> str:
    """The comparison as a Markdown page section."""
    header, *rows = table(c)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    numbers = sorted({len(rows) for rows in c.correct[c.reference].values()})
    n = " to ".join(f"{n:,}" for n in {numbers[0]: 0, numbers[-1]: 0})
    about = [f"Accuracy in % on `{c.task}`, {c.scoring}, {n} rows per language, 95% intervals.",
             *(f"Without understanding: {name} {100 * x:.1f}." for name, x in c.baselines.items()),
             *c.notes]
    return "\n".join([*lines, "", *about]) + "\n"


def as_json(c: Comparison) -> dict[str, Any]:
    """All figures of the comparison."""
    def cell(value: Cell) -> dict[str, Any]:
        return {"accuracy": value[0], "ci95": list(value[1])}

    return {
        "task": c.task, "scoring": c.scoring, "reference": c.reference, "baselines": c.baselines,
        "languages": {m: {name: cell(c.cell(m, name)) for name in c.languages} for m in c.correct},
        "groups": {m: {g: cell(c.mean(m, g)) for g in c.group_names} for m in c.correct},
        "differences": {m: {g: cell(c.mean(m, g, minus=c.reference)) for g in c.group_names}
                        for m in c.correct if m != c.reference},
        **({"central": {m: cell(c.change(m, c.central)) for m in c.correct if m != c.reference}}
           if c.central in c.languages else {}),
        "layer_weights": c.layer_weights, "notes": list(c.notes),
    }
