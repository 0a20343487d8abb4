"""`eval/results.json` and the tables on the terminal."""

import json
import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxfusion.errors import InputError, listed
from jaxfusion.files import read_json, sum_of, write_checked
from jaxfusion.reports.comparison import Comparison, differences, remarks, table

logger = logging.getLogger(__name__)
DAMAGED = "damaged"  # in the name of results that cannot be read

# task -> language -> scoring -> {accuracy, n, ci95}
Results = dict[str, dict[str, dict[str, dict[str, Any]]]]


def merge_results(
    file: Path, new: Results, about: dict[str, Any], indent: int | None = 2
) -> Results:
    """Merges results into a file, which keeps its results for other tasks and languages.

    Results with other settings (another checkpoint, another limit on rows) are not mixed: the old
    file is renamed after its step, a damaged one to `damaged`.

    Args:
      about: the settings of the results; stored next to them as `NAME.about.json`. Has a field
        `step`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    about_file = file.with_suffix(".about.json")
    results: Results = {}
    if file.is_file():
        results, tag = _read(file, about_file, about)
        if tag is not None:
            backup = _free_name(file, tag)
            if tag == DAMAGED:
                logger.warning("%s or %s is damaged: renamed to %s, starting a new one", file,
                               about_file.name, backup.name)
            else:
                old = read_json(about_file, "")
                others = [x for x in {**old, **about} if old.get(x) != about.get(x)]
                logger.info("%s is of other settings (%s): renamed to %s, starting a new one", file,
                            listed(others), backup.name)
            _move(file, backup)
            _move(about_file, backup.with_suffix(".about.json"))
    for task, languages in new.items():
        results.setdefault(task, {}).update(languages)
    _write(about_file, about, indent)
    _write(file, results, indent)
    return results


def read_results(file: Path, about: dict[str, Any]) -> Results:
    """The results in a file that have these settings; none if it is missing or damaged."""
    return _read(file, file.with_suffix(".about.json"), about)[0] if file.is_file() else {}


def _read(file: Path, about_file: Path, about: dict[str, Any]) -> tuple[Results, str | None]:
    """The results with the same settings; or the tag to rename a file with other settings."""
    try:
        old = read_json(about_file, "")
        if old != about:
            return {}, f"step{int(old['step'])}"
        results = read_json(file, "")
    except (InputError, OSError, KeyError, TypeError, ValueError):
        return {}, DAMAGED
    valid = all(isinstance(languages, dict) for languages in results.values())
    return (results, None) if valid else ({}, DAMAGED)


def _move(file: Path, to: Path) -> None:
    """Renames a file and its checksum."""
    for was, now in ((file, to), (sum_of(file), sum_of(to))):
        if was.is_file():
            was.rename(now)


def _free_name(file: Path, tag: str) -> Path:
    """`results.TAG.json`, or `results.TAG-2.json` … if it exists."""
    candidate, number = file.with_suffix(f".{tag}.json"), 1
    while candidate.exists():
        number += 1
        candidate = file.with_suffix(f".{tag}-{number}.json")
    return candidate


def _write(file: Path, content: Any, indent: int | None) -> None:
    write_checked(file, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def print_table(results: Results, title: str) -> None:
    """Prints a table per task: accuracy and 95% interval for each language, and the mean."""
    for task, languages in results.items():
        scorings = sorted({name for scores in languages.values() for name in scores})
        table = Table("language", "n", *scorings, title=escape(f"{task}: {title}"),
                      caption="accuracy in %, with 95% interval")
        for language, scores in languages.items():
            n = next(iter(scores.values()))["n"]
            table.add_row(escape(language), str(n), *(_cell(scores[name]) for name in scorings))
        if len(languages) > 1:
            table.add_section()
            means = [
                sum(scores[name]["accuracy"] for scores in languages.values()) / len(languages)
                for name in scorings
            ]
            table.add_row("mean", "", *(f"{100 * mean:5.1f}" for mean in means))
        Console(width=None if Console().is_terminal else 100).print(table)


def print_comparison(c: Comparison) -> None:
    """Prints the table of a comparison and its remarks."""
    _print(table(c), f"{c.task}: accuracy in %, {c.scoring}", "\n".join(remarks(c)),
           len(c.languages))


def print_differences(c: Comparison) -> None:
    """Prints a table of differences to the reference for every other model."""
    for model in c.correct:
        if model != c.reference:
            _print(differences(c, model), f"{c.task}, {c.scoring}: {model} against {c.reference}",
                   "p: McNemar's exact test for one language, the paired permutation test for "
                   "means and seeds; Holm's correction is for all lines on this task",
                   len(c.languages))


def _print(rows: list[list[str]], title: str, caption: str, languages: int) -> None:
    header, *rows = rows
    shown = Table(*map(escape, header), title=escape(title), caption=escape(caption))
    for i, row in enumerate(rows):
        if i == languages:  # means follow
            shown.add_section()
        shown.add_row(*map(escape, row))  # a language may be named like rich's markup
    Console(width=None if Console().is_terminal else 120).print(shown)


def _cell(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:5.1f}  [{100 * low:.1f}, {100 * high:.1f}]"
