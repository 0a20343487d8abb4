"""Scores every method of a Lens run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jaxfusion.data.rows.examples import Example, read_examples
from jaxfusion.data.tasks.catalogue import check_languages, get_task
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.perplexity import fidelity, load_identifier, perplexity
from jaxfusion.evaluation.scoring import Scorer, check_scorable, for_task
from jaxfusion.fields import LensRunConfig
from jaxfusion.lens.model import LensModel
from jaxfusion.reports.scored_runs import Details
from jaxfusion.runs.score import detail

REPLY = Task("{text}", (), ())  # a prompt with a free answer


@dataclass(frozen=True)
class Questions:
    """The questions for every method.

    Attributes:
      tasks: test rows, by task and language.
      texts: for perplexity, by language. replies: prompts to answer, by language.
      identify: identifies the language of a text; None without replies.
    """

    tasks: dict[tuple[str, str], list[Example]]
    texts: dict[str, list[str]]
    replies: dict[str, list[str]]
    identify: Callable[[str], str] | None


@dataclass
class Scores:
    """The scores of one method.

    Attributes:
      details: every row and its answer, by task and language; see `runs/score.py`.
      text: `perplexity`, `bits per byte` and the share of replies in the prompt's language, by
        language.
    """

    details: Details = field(default_factory=dict)
    text: dict[str, dict[str, float]] = field(default_factory=dict)

    def correct(self, task: str, scoring: str) -> dict[str, list[int]]:
        """0 or 1 for every row of a task, by language."""
        return {x: part["correct"][scoring] for x, part in self.details[task].items()}


def read_questions(
    config: LensRunConfig, runs: dict[str, LensRunConfig], texts: dict[str, list[str]]
) -> Questions:
    """Reads the questions for all runs, before anything is computed.

    Raises:
      InputError: a task's data is missing, or too few held-out prompts are left.
    """
    c, languages = config.data, (config.data.central, *config.data.targets)
    tasks = {}
    for name in config.eval.tasks:
        task = get_task(name, config.tasks)
        check_scorable(config.eval, name, task)
        known = task.languages
        check_languages(name, config.eval.languages, config.tasks)
        chosen = config.eval.languages or tuple(x for x in languages if x in known)
        if not chosen:
            raise InputError(f"task '{name}' has none of {', '.join(languages)}; it has "
                             f"{', '.join(known)}")
        for language in chosen:
            tasks[name, language] = read_examples(
                name, task, c.task_split, language, c.task_path)[: c.task_rows]
    if c.reply_rows:
        check_scorable(config.eval, "replies", REPLY)
    if config.bridge and c.perplexity_rows:
        raise InputError("data.perplexity_rows needs an LLM that reads text itself; remove bridge")
    # Only on prompts that were neither probed nor trained on.
    available = len(texts[c.central])
    probed = 0 if c.probe_path else available if c.probe_rows is None else c.probe_rows
    used = max(probed, *(run.data.rows for run in runs.values()))
    held_out = max(c.perplexity_rows, c.reply_rows)
    if held_out > max(0, available - used):
        raise InputError(f"data.perplexity_rows and reply_rows need {held_out} prompts that were "
                         f"neither probed nor trained on, but {used} of {available} prompts are: "
                         "set data.probe_rows and data.rows lower")
    identify = load_identifier() if c.reply_rows else None
    questions = Questions(
        tasks, *({name: rows[used : used + number] for name, rows in texts.items() if number}
                 for number in (c.perplexity_rows, c.reply_rows)), identify)
    for name, prompts in questions.replies.items():
        if not fidelity(prompts, c.codes.get(name, name), identify):
            raise InputError(f"no prompt in '{name}' is identified as that language; set "
                             f"data.codes to its ISO 639-1 code, got: {identify(prompts[0])}")
    return questions


def score_model(
    config: LensRunConfig, model: LensModel, questions: Questions, edits=None
) -> Scores:
    """The scores of the LLM in its current state on all questions.

    Args:
      edits: language -> edits of the LLM while it reads that language.
    """
    scores, c = Scores(), config.eval

    def params(language: str):
        return model.params if edits is None else {**model.params, "edits": edits(language)}

    def ask(task: Task, language: str, rows: list[Example]):
        # Labels are scored by likelihood and need no decoding.
        asked = for_task(replace(c, max_new_tokens=0) if task.labels else c, task, language)
        scorer = Scorer(model.bridge, model.tokenizers, asked, model.text_prompt, model.bare)
        return scorer(params(language), rows, task)

    for (name, language), rows in questions.tasks.items():
        task = get_task(name, config.tasks)
        found = {**detail(rows, ask(task, language, rows)), "labels": task.labels}
        found["correct"] = {task.scoring: found["correct"][task.scoring]}
        scores.details.setdefault(name, {})[language] = found
    for language, texts in questions.texts.items():
        measured = perplexity(model.bridge, params(language), texts, model.tokenizers,
                              c.max_decoder_tokens, c.batch_size)
        for name, value in measured.items():
            scores.text.setdefault(name.replace("_", " "), {})[language] = value
    for language, prompts in questions.replies.items():
        answers = ask(REPLY, language, [Example(x, "", -1) for x in prompts]).answers
        code = config.data.codes.get(language, language)
        scores.text.setdefault("replies in the prompt's language", {})[language] = fidelity(
            answers, code, questions.identify)
    return scores
