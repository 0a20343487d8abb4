"""The pocket world's tasks and texts, in English and ten made-up languages.

    python -m jaxfusion.data.pocket.world OUT            # all texts and tasks of the world

Its inference task has no shortcuts: for every combination of quantifier, negation and position of
the changed words all classes are equally frequent, so only the words' meaning separates them.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from jaxfusion.data.pocket.grammar import (
    KIND,
    PAIRS_OF_VERBS,
    UP,
    Sentence,
    deny,
    english,
    label,
    levels,
    random_sentence,
    render,
    within,
)
from jaxfusion.data.pocket.lexicon import LANGUAGES, VERSION, WORLD_FILE, words
from jaxfusion.data.tasks.catalogue import NLI_LABELS, NLI_PROMPT, QA_PROMPT
from jaxfusion.data.tasks.spec import SPLITS
from jaxfusion.errors import InputError, choose
from jaxfusion.files import new_directory

PARALLEL = 4000
TASK_ROWS = {"train": 12_000, "dev": 300, "test": 600}

# The verb changes between premise and hypothesis, and at most one word of the subject.
CHANGES = (None, "noun", "place", "adjective")
NEUTRAL_SUBJECT = 0.75  # share of neutral pairs with a changed subject that it makes neutral


def random_inference(
    rng: random.Random, split: str, modified: float = 0.5
) -> tuple[Sentence, Sentence, str]:
    """Premise, hypothesis and label: first the structure is drawn, then the label, then the words.

    The premise's verb is specific; the hypothesis's is general and may be negated, so that with
    one sentence alone all labels are equally likely. A changed word of the subject becomes more
    general after `the`, more specific after `every`, or unrelated.
    """
    universal, denied = rng.random() < 0.4, rng.random() < 0.5
    change = rng.choice(CHANGES) if modified else None
    target = rng.choice(NLI_LABELS)
    by_subject = change and target == "Neutral" and rng.random() < NEUTRAL_SUBJECT
    relation = rng.choice(("Entailment", "Contradiction")) if by_subject else target
    while True:
        premise = random_sentence(rng, universal, modified)
        if change is not None and getattr(premise, change) is None:
            continue
        specific, general = _verbs(rng, relation, denied)
        old, new = _subject(rng, change, not by_subject, universal) if change else (None, None)
        if change:
            premise = replace(premise, **{change: old})
        premise = replace(premise, verb=specific)
        hypothesis = deny(replace(premise, verb=general), denied)
        if change:
            hypothesis = replace(hypothesis, **{change: new})
        if premise.split == hypothesis.split == split:
            assert label(premise, hypothesis) == target
            return premise, hypothesis, target


def _verbs(rng: random.Random, relation: str, denied: bool) -> tuple[str, str]:
    """A specific verb, and a general one that (negated or not) has this relation to it."""
    specific, general = rng.choice(levels("verb")[0]), levels("verb")[1]
    pair, side = UP[specific][:2]
    if relation == "Neutral":
        return specific, rng.choice([v for v in general if UP[v][0] != pair])
    same = (relation == "Entailment") != denied
    return specific, next(v for v in general if UP[v][0] == pair and (v == side) == same)


def _subject(rng: random.Random, kind: str, nested: bool, universal: bool) -> tuple[str, str]:
    """A word of the subject in the premise and in the hypothesis, nested or unrelated."""
    kind = "colour" if kind == "adjective" else kind
    specific, general = rng.choice(levels(kind)[0]), levels(kind)[1]
    other = rng.choice([x for x in general if within(specific, x) == nested])
    return (other, specific) if universal else (specific, other)


@dataclass(frozen=True)
class Question:
    """Two sentences, a question about the subject of one of them, and the answer in English."""

    text: tuple[Sentence, Sentence]
    asked: str
    noun: str
    answer: str


def random_question(rng: random.Random, split: str) -> Question:
    """A random question whose two sentences belong to the split."""
    asked, slot = rng.choice((("what colour", "adjective"), ("how many", "number"),
                              ("where", "place"), ("what does", "verb")))
    while True:
        text = tuple(random_sentence(rng) for _ in range(2))
        if any(getattr(s, slot) is None or s.split != split for s in text):
            continue
        if text[0].noun == text[1].noun or (asked == "what colour" and any(
                KIND.get(s.adjective) != "colour" for s in text)):
            continue
        about = rng.choice(text)
        return Question(text, asked, about.noun, getattr(about, slot))


def render_question(question: Question, language: str) -> dict[str, str]:
    """The question's columns `text`, `question` and `target`."""
    if language == "en":
        asked = f"{question.asked} the {question.noun}"
    else:
        w = words(language)
        asked = f"{w[question.asked]} {w[question.noun]}"
    return {"text": " , ".join(render(s, language) for s in question.text),
            "question": asked, "target": question.answer}


def render_inference(premise: Sentence, hypothesis: Sentence, answer: str, language: str):
    """The inference's columns `premise`, `hypothesis` and `label`."""
    return {"premise": render(premise, language), "hypothesis": render(hypothesis, language),
            "label": answer}


def task_rows(task: str, split: str, language: str, rows: int, seed: int = 0) -> Iterator[dict]:
    """Rows of a task, with the same meanings in every language.

    Raises:
      InputError: unknown task, split or language.
    """
    choose("pocket task", task, TASKS)
    choose("split of the pocket world", split, SPLITS)
    choose("pocket language", language, LANGUAGES)
    write = TASKS[task][1]
    return (write(meaning, language) for meaning in _meanings(task, split, rows, seed))


@lru_cache(2)  # rendered in every language
def _meanings(task: str, split: str, rows: int, seed: int) -> list:
    """The rows of a task as meanings, before they are rendered."""
    rng = random.Random(f"{VERSION} {seed} {task} {split}")
    return [TASKS[task][0](rng, split) for _ in range(rows)]


TASKS = {
    "pocket_nli": (random_inference, lambda row, language: render_inference(*row, language)),
    "pocket_qa": (random_question, render_question),
}


def texts(language: str, rows: int, seed: int = 0) -> Iterator[str]:
    """Unlabelled text of a language, from training frames only: sentences, and both tasks' prompts
    without answers."""
    rng = random.Random(f"{VERSION} {seed} texts {language}")
    for _ in range(rows):
        kind = rng.random()
        if kind < 0.35:
            pair = random_inference(rng, "train")
            yield NLI_PROMPT.format(**render_inference(*pair, language)).strip()
        elif kind < 0.5:
            question = random_question(rng, "train")
            yield QA_PROMPT.format(**render_question(question, language)).strip()
        else:
            yield render(_sentence(rng), language)


def pairs(language: str, rows: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Sentences in English and a language, from training frames only."""
    rng = random.Random(f"{VERSION} {seed} pairs {language}")
    for _ in range(rows):
        sentence = _sentence(rng)
        yield english(sentence), render(sentence, language)


def solved(language: str, rows: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Prompts and English answers for the LLM: inference, questions and English lexical facts."""
    rng = random.Random(f"{VERSION} {seed} solved" + (f" {language}" if language != "en" else ""))
    for _ in range(rows):
        kind = rng.random()
        if kind < 0.7:
            # A third without modifiers: the simple case is learned first and helps the others.
            modified = 0.0 if kind < 0.25 else 0.5
            columns = render_inference(*random_inference(rng, "train", modified), language)
            yield NLI_PROMPT.format(**columns).strip(), columns["label"]
        elif kind < 0.88 or language != "en":
            columns = render_question(random_question(rng, "train"), language)
            yield QA_PROMPT.format(**columns).strip(), columns["target"]
        else:
            yield _fact(rng)


def _fact(rng: random.Random) -> tuple[str, str]:
    """A lexical fact as prompt and answer."""
    general = levels("verb")[1]
    if rng.random() < 0.2:
        verb = rng.choice(general)
        opposite = next(v for v in general if UP[v][0] == UP[verb][0] and v != verb)
        return f"{verb} is the opposite of", opposite
    above = {c: [x for x in UP[c][:-1] if x not in PAIRS_OF_VERBS] for c in UP}
    concept = rng.choice([c for c, names in above.items() if names])
    return f"{concept} is a kind of", rng.choice(above[concept])


def _sentence(rng: random.Random, split: str = "train") -> Sentence:
    while True:
        universal = rng.random() < 0.3
        sentence = deny(random_sentence(rng, universal), rng.random() < 0.4)
        if sentence.split == split:
            return sentence


def write_texts(out: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Writes the pretraining data into a directory; `scale` shrinks it.

    `text-LANGUAGE.txt` (a text a line), `pairs-LANGUAGE.tsv` (English, then the language), and
    `solved-LANGUAGE.tsv` (prompt, answer).
    """
    for name, language in LANGUAGES.items():
        _write(out / f"text-{name}.txt", texts(name, _scaled(language.texts, scale), seed))
        if language.pairs:
            rows = pairs(name, _scaled(language.pairs, scale), seed)
            _write(out / f"pairs-{name}.tsv", ("\t".join(row) for row in rows))
        if language.solved:
            rows = solved(name, _scaled(language.solved, scale), seed)
            _write(out / f"solved-{name}.tsv", ("\t".join(row) for row in rows))
    _sign(out, scale, seed)


def parallel(rows: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Inference prompts in English and every other language with solved tasks, and the answer;
    from training frames only."""
    rng = random.Random(f"{VERSION} {seed} parallel")
    names = [name for name, language in LANGUAGES.items() if language.solved]
    for _ in range(rows):
        pair = random_inference(rng, "train")
        columns = {name: render_inference(*pair, name) for name in names}
        # With the trailing space, which becomes part of the answer's first token.
        yield {**{name: NLI_PROMPT.format(**x) for name, x in columns.items()},
               "answer": columns["en"]["label"]}


def write_parallel(out: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Writes `parallel.jsonl` into a directory: a column per language, and `answer`."""
    _write(out / "parallel.jsonl", (json.dumps(row, ensure_ascii=False)
                                    for row in parallel(_scaled(PARALLEL, scale), seed)))
    _sign(out, scale, seed)


def write_tasks(out: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Writes `TASK/SPLIT-LANGUAGE.jsonl` into a directory; `scale` shrinks the training rows."""
    for task, split, name in product(TASKS, SPLITS, LANGUAGES):
        if split == "train" and name != "en":
            continue  # training is in English only
        (out / task).mkdir(exist_ok=True)
        number = _scaled(TASK_ROWS[split], scale) if split == "train" else TASK_ROWS[split]
        rows = task_rows(task, split, name, number, seed)
        _write(out / task / f"{split}-{name}.jsonl",
               (json.dumps(row, ensure_ascii=False) for row in rows))
    _sign(out, scale, seed)


def write_translations(out: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Writes `SPLIT-LANGUAGE.jsonl` into a directory: sentences with their English translations."""
    for split, (name, language) in product(SPLITS, LANGUAGES.items()):
        if not language.pairs:
            continue
        rng = random.Random(f"{VERSION} {seed} translations {split} {name}")
        number = _scaled(language.pairs, scale) if split == "train" else TASK_ROWS[split]
        sentences = (_sentence(rng, split) for _ in range(number))
        _write(out / f"{split}-{name}.jsonl",
               (json.dumps({"text": render(x, name), "target": english(x)}, ensure_ascii=False)
                for x in sentences))
    _sign(out, scale, seed)


def _sign(out: Path, scale: float, seed: int) -> None:
    about = {"version": VERSION, "seed": seed, "scale": scale}
    (out / WORLD_FILE).write_text(json.dumps(about), "utf-8")


def _scaled(rows: int, scale: float) -> int:
    return max(1, round(rows * scale))


def _write(file: Path, lines) -> None:
    with file.open("w", encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        with new_directory(args.out) as partial:
            write_texts(partial, args.scale, args.seed)
            write_tasks(partial, args.scale, args.seed)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: world {VERSION}, languages {', '.join(LANGUAGES)}")


if __name__ == "__main__":
    main()
