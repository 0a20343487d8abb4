"""A comparison in two sentences: what was compared, and what is sure."""

from collections.abc import Sequence

from jaxfusion.reports.comparison import LEVEL, Comparison, PairedTest, mean_of, row_range, show

NAMED = 3  # languages that are named; more are counted
WAYS = {
    "likelihood": "by the likelihood of the labels",
    "likelihood_norm": "by the likelihood of the labels per character",
    "exact_match": "by exact match",
}


def summary(c: Comparison) -> tuple[str, str]:
    """What was compared, and what is sure of it, a sentence each.

    A difference is sure only if its test is below 0.05 after Holm's correction for all tests of
    the comparison and its interval leaves 0 out. Both are over rows: they speak of these runs.
    """
    others = [model for model in c.correct if model != c.reference]
    where = (f"in each of {len(c.languages)} languages" if len(c.languages) > 1
             else f"in {c.languages[0]}")
    asked = f"{row_range(c)} rows {where}, {WAYS.get(c.scoring, c.scoring)}"
    counts = {c.seeds(model) for model in c.correct}
    each = f", {counts.pop()} seeds each" if len(counts) == 1 and counts != {1} else ""
    named = {model: model if each or c.seeds(model) == 1 else f"{model} ({c.seeds(model)} seeds)"
             for model in c.correct}
    if not others:
        seeds = f", {c.seeds(c.reference)} seeds" if each else ""
        return f"{c.reference} was scored on {c.task}: {asked}{seeds}.", _alone(c)
    verb = "were" if len(others) > 1 else "was"
    return (f"{_listed([named[x] for x in others])} {verb} compared with {named[c.reference]} on "
            f"{c.task}: the same {asked}{each}.", _sure(c))


def unscored(models: Sequence[str]) -> tuple[str, str]:
    """The two sentences on models without a task."""
    return (f"{_listed(models)} {'were' if len(models) > 1 else 'was'} run without a task to be "
            "scored on.", "No difference is claimed, as nothing was tested.")


def _alone(c: Comparison) -> str:
    """The sentence on a model that was compared with none."""
    names = c.group(c.group_names[-1]) if c.group_names else c.languages
    right = show(c.mean(c.reference, c.group_names[-1]) if c.group_names else
                 c.cell(c.reference, names[0]))
    where = f"on the {mean_of(c.group_names[-1])}" if c.group_names else f"in {names[0]}"
    return (f"It gets {right} % right {where} (95% interval), and no difference is claimed, as no "
            "other model was scored on these rows.")


def _sure(c: Comparison) -> str:
    """The sentence on differences to the reference."""
    line = mean_of(c.group_names[-1]) if c.group_names else None
    line = c.languages[0] if len(c.languages) == 1 else line
    found = [f"{model} is {said}" for model, tests in c.tests.items()
             if (said := _verdict(c, tests, line))]
    unsure = [model for model, tests in c.tests.items() if not _verdict(c, tests, line)]
    number = sum(len(tests) for tests in c.tests.values())
    correction = f" after Holm's correction for all {number} tests" if number > 1 else ""
    rule = f"p < {LEVEL}{correction}, and a 95% interval without 0"
    if not found:
        return f"No difference to {c.reference} is sure for these runs ({rule})."
    unsure = [f"no difference is sure for {_listed(unsure, 'or')}"] if unsure else []
    return f"Sure for these runs: {'; '.join([*found, *unsure])} ({rule})."


def _verdict(c: Comparison, tests: dict[str, PairedTest], line: str | None) -> str:
    """What is sure of a model: on the mean `line`, and how many languages; empty if nothing."""
    parts = []
    if line is not None and tests[line].sure:
        value, interval = tests[line].difference
        word = "better" if value > 0 else "worse"
        size = show((abs(value), interval if value > 0 else (-interval[1], -interval[0])))
        parts.append(f"{word} by {size} points " + (
            f"in {line}" if line in c.languages else f"on the {line}"))
    if len(c.languages) > 1:
        by_way = {word: [name for name in c.languages if tests[name].sure == sign]
                  for word, sign in (("better", 1), ("worse", -1))}
        some = [f"{word} in {_counted(c, names)}" for word, names in by_way.items() if names]
        if some and line is not None and not parts:
            return f"{_listed(some)}, with no sure difference on the {line}"
        parts += some
    return _listed(parts) if parts else ""


def _counted(c: Comparison, names: Sequence[str]) -> str:
    """A few languages by name, more by number."""
    if len(names) <= NAMED:
        return _listed(names)
    return f"{len(names)} of {len(c.languages)} languages"


def _listed(names: Sequence[str], word: str = "and") -> str:
    """`a, b and c`."""
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
