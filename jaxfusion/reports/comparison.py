"""Compares several models on the same rows: tables with intervals and significance."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxfusion.reports.statistics import bootstrap_mean, holm, mcnemar, sign_flip, wilson_interval

ALL_GROUPS = "all groups"
Interval = tuple[float, float]
Cell = tuple[float, Interval]  # a fraction and its 95% interval
LEVEL = 0.05  # of significance, for all tests of a comparison together


@dataclass(frozen=True)
class PairedTest:
    """A paired test of a model against the reference, in a language or a group.

    Attributes:
      difference: of the accuracies, with its bootstrap interval. rows: all that were compared.
      gained, lost: rows that the model gets right more, or less, often.
      p, corrected: the p-value; the same after Holm's correction for all tests of the comparison.
    """

    difference: Cell
    rows: int
    gained: int
    lost: int
    p: float
    corrected: float = 1.0

    @property
    def sure(self) -> int:
        """1 for better, -1 for worse, 0 unless both the test and the interval say so."""
        value, (low, high) = self.difference
        return int(np.sign(value)) if self.corrected < LEVEL and low * high > 0 else 0


@dataclass(frozen=True)
class Comparison:
    """The results of several models on one task.

    Attributes:
      task, scoring: the task, and the scoring of its answers.
      correct: model -> language -> 0 or 1 for each row, or for each row of every seed
        [seeds, rows]. Rows are the same for all models.
      groups: of languages, by name.
      reference: the model that others are compared with.
      baselines: accuracy of baselines without understanding, by name.
      layer_weights: model -> language -> weight of each layer.
      notes: remarks for the reader, a line each.
      central: the language that should not get worse; its difference to the reference is shown.
    """

    task: str
    scoring: str
    correct: dict[str, dict[str, Sequence[int] | Sequence[Sequence[int]]]]
    groups: dict[str, tuple[str, ...]]
    reference: str
    baselines: dict[str, float]
    layer_weights: dict[str, dict[str, list[float]]]
    notes: tuple[str, ...] = ()
    central: str | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages: those without a group first, then by group."""
        scored = next(iter(self.correct.values()))
        grouped = dict.fromkeys(name for names in self.groups.values() for name in names)
        return (*(name for name in scored if name not in grouped),
                *(name for name in grouped if name in scored))

    def rows(self, model: str, language: str, minus: str | None = None) -> np.ndarray:
        """The share of seeds that got each row right, or its difference to `minus`. [rows]"""
        rows = self._arrays[model][language].mean(axis=0)
        return rows if minus is None else rows - self.rows(minus, language)

    @cached_property
    def _arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """`correct` as [seeds, rows], made once: a report on 200 languages reads each often."""
        return {model: {name: np.atleast_2d(np.asarray(rows, float)) for name, rows in by.items()}
                for model, by in self.correct.items()}

    def seeds(self, model: str) -> int:
        """The number of a model's runs."""
        return max(len(rows) for rows in self._arrays[model].values())

    def deviation(self, model: str, languages: Sequence[str]) -> float | None:
        """Standard deviation across seeds of the mean over languages; None for one seed."""
        if self.seeds(model) == 1:
            return None
        by_language = [self._arrays[model][name].mean(axis=1) for name in languages]
        return float(np.std(np.mean(by_language, axis=0), ddof=1))

    def cell(self, model: str, language: str) -> Cell:
        """Accuracy in a language; Wilson's interval for one seed, bootstrap for several."""
        rows = self.rows(model, language)
        if self.seeds(model) > 1:
            return bootstrap_mean([rows])
        return float(rows.mean()), wilson_interval(int(rows.sum()), len(rows))

    def mean(self, model: str, group: str, minus: str | None = None) -> Cell:
        """Mean over a group's languages, or its difference to `minus`; bootstrap."""
        return bootstrap_mean([self.rows(model, name, minus) for name in self.group(group)])

    def change(self, model: str, language: str) -> Cell:
        """Difference of a model's accuracy in a language to the reference; bootstrap."""
        return bootstrap_mean([self.rows(model, language, self.reference)])

    def p_value(self, model: str, languages: Sequence[str]) -> float:
        """P-value of the difference to the reference: McNemar's test for one language and one seed,
        otherwise the paired permutation test."""
        alone = self.seeds(model) == self.seeds(self.reference) == len(languages) == 1
        if alone:
            return mcnemar(self.rows(self.reference, languages[0]), self.rows(model, languages[0]))
        return sign_flip([self.rows(model, name, self.reference) for name in languages])

    @cached_property
    def tests(self) -> dict[str, dict[str, PairedTest]]:
        """The tests of every other model, by model and line of the table."""
        found = {(model, line): self._test(model, names)
                 for model in self.correct if model != self.reference
                 for line, names in self.lines.items()}
        corrected = holm([test.p for test in found.values()])
        by_model: dict[str, dict[str, PairedTest]] = {}
        for ((model, line), test), p in zip(found.items(), corrected, strict=True):
            by_model.setdefault(model, {})[line] = replace(test, corrected=p)
        return by_model

    def _test(self, model: str, names: Sequence[str]) -> PairedTest:
        every = [self.rows(model, name, self.reference) for name in names]
        changed = np.concatenate(every)
        return PairedTest(bootstrap_mean(every), len(changed), int(np.sum(changed > 0)),
                    int(np.sum(changed < 0)), self.p_value(model, names))

    @property
    def lines(self) -> dict[str, tuple[str, ...]]:
        """What is compared, by its name in tables: each language, then the mean of each group."""
        return {**{name: (name,) for name in self.languages},
                **{mean_of(group): self.group(group) for group in self.group_names}}

    def group(self, name: str) -> tuple[str, ...]:
        """The languages of a group; `all groups` is their union."""
        every = dict.fromkeys(x for names in self.groups.values() for x in names)
        grouped, scored = every if name == ALL_GROUPS else self.groups[name], set(self.languages)
        return tuple(x for x in grouped if x in scored)

    def groups_of(self, language: str) -> list[str]:
        """The groups of a language, except `all`."""
        return [name for name, names in self.groups.items() if language in names and name != "all"]

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups, and `all groups` unless the last group includes all languages."""
        names = [name for name in self.groups if self.group(name)]
        every = set(self.group(ALL_GROUPS))
        if not names or set(self.group(names[-1])) == every:
            return tuple(names)
        return (*names, ALL_GROUPS)


def table(c: Comparison) -> list[list[str]]:
    """Header and rows: languages, means of groups, differences to the reference."""
    models = list(c.correct)
    others = [m for m in models if m != c.reference]

    def spread(model: str, *languages: str) -> str:
        deviation = c.deviation(model, languages)
        return "" if deviation is None else f" ± {100 * deviation:.1f}"

    rows = [["", "", *models]]
    rows += [[name, ", ".join(c.groups_of(name)),
              *(show(c.cell(m, name)) + spread(m, name) for m in models)] for name in c.languages]
    for group in c.group_names:
        rows.append([mean_of(group), "", *(
            show(c.mean(m, group)) + spread(m, *c.group(group)) for m in models)])
    if c.group_names and others:
        last = c.group_names[-1]
        differences = {m: show(c.mean(m, last, minus=c.reference), sign="+") for m in others}
        rows.append([f"minus {c.reference}", "", *(differences.get(m, "") for m in models)])
    if c.central in c.languages:
        changes = {m: show(c.change(m, c.central), sign="+") for m in others}
        rows.append([f"{c.central} minus {c.reference}", "",
                     *(changes.get(m, "") for m in models)])
    return rows


def differences(c: Comparison, model: str) -> list[list[str]]:
    """Header and rows: a model's differences to the reference, by language and group.

    P-values are uncorrected and, in the last column, corrected for the number of all tests of the
    comparison (Holm).
    """
    rows = [["", "rows", c.reference, model, "difference", "gained", "lost", "p", "p, Holm"]]
    for line, names in c.lines.items():
        test = c.tests[model][line]
        means = [np.mean([c.rows(m, x).mean() for x in names]) for m in (c.reference, model)]
        rows.append([
            line, f"{test.rows:,}", *(f"{100 * x:.1f}" for x in means),
            show(test.difference, sign="+"), f"{test.gained:,}", f"{test.lost:,}",
            show_p(test.p), show_p(test.corrected),
        ])
    return rows


def mean_of(group: str) -> str:
    """A group's line in tables."""
    return f"mean of {group}"


def show_p(p: float) -> str:
    """A p-value with three digits, never 0."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def as_markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header."""
    header, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |"
                     for row in (header, ["---"] * len(header), *rest)) + "\n"


def as_texts(rows: list[list[str]]) -> list[list[str]]:
    """A table with `as_text` applied to its cells."""
    return [[as_text(cell) for cell in row] for row in rows]


def as_text(cell: str) -> str:
    """Text escaped for a Markdown table: no tags, no ends of cells."""
    return html.escape(cell, quote=False).replace("|", "\\|").replace("\n", " ")


def show(cell: Cell, sign: str = "") -> str:
    """`61.2 [58, 64]`: a cell in %."""
    value, (low, high) = (100 * cell[0], tuple(100 * x for x in cell[1]))
    return f"{value:{sign}.1f} [{low:{sign}.0f}, {high:{sign}.0f}]"


def markdown(c: Comparison) -> str:
    """The comparison as a Markdown page section."""
    return as_markdown(as_texts(table(c))) + "\n" + "\n".join(remarks(c)) + "\n"


def remarks(c: Comparison) -> list[str]:
    """The remarks below the table, a line each."""
    seeds = {model: c.seeds(model) for model in c.correct if c.seeds(model) > 1}
    counted = ", ".join(f"{model}: {number}" for model, number in seeds.items())
    spread = [f"± is the standard deviation across seeds ({counted}); intervals are over rows."]
    return [f"Accuracy in % on {c.task}, {c.scoring}, {row_range(c)} rows per language, 95% "
            "intervals.",
            *(spread if seeds else ()),
            *(f"Without understanding: {name} {100 * x:.1f}." for name, x in c.baselines.items()),
            *c.notes]


def row_range(c: Comparison) -> str:
    """The number of rows of a language: `204`, or `16 to 959`."""
    numbers = sorted({c.rows(c.reference, name).size for name in c.languages})
    return " to ".join(f"{n:,}" for n in {numbers[0]: 0, numbers[-1]: 0})


def as_json(c: Comparison) -> dict[str, Any]:
    """All figures of the comparison."""
    def cell(value: Cell) -> dict[str, Any]:
        return {"accuracy": value[0], "ci95": list(value[1])}

    def spread(names: Sequence[str]) -> dict[str, float]:
        return {m: x for m in c.correct if (x := c.deviation(m, names)) is not None}

    named = {**{name: (name,) for name in c.languages}, **{g: c.group(g) for g in c.group_names}}
    short = {**{name: name for name in c.languages}, **{mean_of(g): g for g in c.group_names}}
    return {
        "task": c.task, "scoring": c.scoring, "reference": c.reference, "baselines": c.baselines,
        "languages": {m: {name: cell(c.cell(m, name)) for name in c.languages} for m in c.correct},
        "groups": {m: {g: cell(c.mean(m, g)) for g in c.group_names} for m in c.correct},
        "differences": {m: {g: cell(c.mean(m, g, minus=c.reference)) for g in c.group_names}
                        for m in c.correct if m != c.reference},
        "p_values": {m: {short[line]: test.p for line, test in tests.items()}
                     for m, tests in c.tests.items()},
        "deviations": {x: by_model for x, names in named.items() if (by_model := spread(names))},
        **({"central": {m: cell(c.change(m, c.central)) for m in c.correct if m != c.reference}}
           if c.central in c.languages else {}),
        "layer_weights": c.layer_weights, "notes": list(c.notes),
    }
