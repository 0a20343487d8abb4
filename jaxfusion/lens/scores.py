"""What every method of a Lens run is measured by, and its report."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxfusion.data.rows.examples import Example, read_examples
from jaxfusion.data.tasks.catalogue import check_languages, get_task
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.perplexity import fidelity, load_identifier, perplexity
from jaxfusion.evaluation.scoring import Scorer, for_task
from jaxfusion.fields import LensRunConfig
from jaxfusion.files import write_whole
from jaxfusion.lens.model import Model
from jaxfusion.reports.comparison import Comparison, as_json, markdown
from jaxfusion.reports.pictures import draw_accuracy

UNTOUCHED = "LLM"  # the model as it was, in tables
REPLY = Task("{text}", (), ())  # a prompt that is answered freely
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """What is asked of every method.

    Attributes:
      tasks: test rows, by task and language.
      texts: whose perplexity is measured, by language. replies: prompts to answer.
      identify: names the language of a text; None where nothing is answered.
    """

    tasks: dict[tuple[str, str], list[Example]]
    texts: dict[str, list[str]]
    replies: dict[str, list[str]]
    identify: Callable[[str], str] | None


@dataclass
class Scores:
    """What one method reached.

    Attributes:
      correct: 0 or 1 of every row, by task and language.
      text: of `perplexity`, `bits per byte` and `replies in their language`: by language.
    """

    correct: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    text: dict[str, dict[str, float]] = field(default_factory=dict)


def read_questions(
    config: LensRunConfig, runs: dict[str, LensRunConfig], texts: dict[str, list[str]]
) -> Questions:
    """Everything that is asked of all runs, read before anything is computed.

    Raises:
      InputError: a task's data is missing, or too few prompts are left to measure text by.
    """
    c, languages = config.data, (config.data.central, *config.data.targets)
    tasks = {}
    for name in config.eval.tasks:
        task = get_task(name, config.tasks)
        known = task.languages
        check_languages(name, config.eval.languages, config.tasks)
        chosen = config.eval.languages or tuple(x for x in languages if x in known)
        if not chosen:
            raise InputError(f"task '{name}' has none of {', '.join(languages)}; it has "
                             f"{', '.join(known)}")
        for language in chosen:
            tasks[name, language] = read_examples(
                name, task, c.task_split, language, c.task_path)[: c.task_rows]
    if config.bridge and c.perplexity_rows:
        raise InputError("data.perplexity_rows is for an LLM that reads text itself; leave bridge "
                         "out")
    # Never on rows that the probe or the blocks were fitted on.
    have = len(texts[c.central])
    probed = 0 if c.probe_path else have if c.probe_rows is None else c.probe_rows
    used = max(probed, *(run.data.rows for run in runs.values()))
    wanted = max(c.perplexity_rows, c.reply_rows)
    if wanted > max(0, have - used):
        raise InputError(f"data.perplexity_rows and reply_rows ask for {wanted} prompts that were "
                         f"neither probed nor trained on; of {have} prompts {used} are: set "
                         "data.probe_rows and data.rows lower")
    identify = load_identifier() if c.reply_rows else None
    questions = Questions(
        tasks, *({name: rows[used : used + number] for name, rows in texts.items() if number}
                 for number in (c.perplexity_rows, c.reply_rows)), identify)
    for name, prompts in questions.replies.items():
        if not fidelity(prompts, c.codes.get(name, name), identify):
            raise InputError(f"no prompt in '{name}' is found to be in it; set data.codes to its "
                             f"ISO 639-1 code, found: {identify(prompts[0])}")
    return questions


def measure(
    config: LensRunConfig, model: Model, questions: Questions, edits=None
) -> Scores:
    """Asks the LLM as it is now all questions.

    Args:
      edits: language -> what is changed while the LLM reads that language.
    """
    found, c = Scores(), config.eval

    def params(language: str):
        return model.params if edits is None else {**model.params, "edits": edits(language)}

    def ask(task: Task, language: str, rows: list[Example]):
        # Letters need no decoding.
        asked = for_task(replace(c, max_new_tokens=0) if task.labels else c, task, language)
        scorer = Scorer(model.bridge, model.tokenizers, asked, model.text_prompt, model.bare)
        return scorer(params(language), rows, task)

    for (name, language), rows in questions.tasks.items():
        task = get_task(name, config.tasks)
        right = ask(task, language, rows).correct[task.scoring]
        found.correct.setdefault(name, {})[language] = [int(x) for x in right]
    for language, texts in questions.texts.items():
        measured = perplexity(model.bridge, params(language), texts, model.tokenizers,
                              c.max_decoder_tokens, c.batch_size)
        for name, value in measured.items():
            found.text.setdefault(name.replace("_", " "), {})[language] = value
    for language, prompts in questions.replies.items():
        answers = ask(REPLY, language, [Example(x, "", -1) for x in prompts]).answers
        code = config.data.codes.get(language, language)
        found.text.setdefault("replies in the prompt's language", {})[language] = fidelity(
            answers, code, questions.identify)
    return found


def report(
    config: LensRunConfig, scores: dict[str, Scores], seconds: dict[str, float], workdir: Path
) -> Comparison | None:
    """Writes the tables; returns the first task's comparison."""
    pages, figures, comparisons = [], {"seconds": seconds}, []
    central = config.data.central
    for task in next(iter(scores.values())).correct:
        languages = config.eval.languages or config.data.targets
        others = tuple(x for x in languages if x != central)
        comparison = Comparison(
            task, get_task(task, config.tasks).scoring,
            {name: x.correct[task] for name, x in scores.items()},
            {"targets": others}, UNTOUCHED, {}, {}, central=central)
        comparisons.append(comparison)
        pages.append(markdown(comparison))
        figures[task] = as_json(comparison)
    for measure, by_language in next(iter(scores.values())).text.items():
        found = {name: x.text[measure] for name, x in scores.items()}
        lines = [["", *found], ["---"] * (len(found) + 1),
                 *([x, *(f"{values[x]:.3g}" for values in found.values())] for x in by_language)]
        pages.append("\n".join("| " + " | ".join(line) + " |" for line in lines)
                     + f"\n\n{measure.capitalize()}, on prompts that were neither probed nor "
                     "trained on.\n")
        figures[measure] = found
    if not pages:
        return None
    write_whole(workdir / "report.md", "\n".join(pages))
    write_whole(workdir / "report.json", json.dumps(figures, indent=2) + "\n")
    print("\n".join(pages))
    if not comparisons:
        return None
    labels = get_task(comparisons[0].task, config.tasks).labels
    draw_accuracy(comparisons[0], workdir / "accuracy.png", 1 / len(labels) if labels else None)
    return comparisons[0]
