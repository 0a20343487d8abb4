"""The pocket world: a small typed grammar, written in English and ten made-up languages.

    python -m jaxfusion.data.pocket OUT            # all texts and tasks of the world

Its inference task cannot be solved by shortcuts: in every cell of quantifier, negation and place of
the changed words each class is as frequent as the others, so only the meaning of the changed words
tells them apart. Meaning is set inclusion (natural logic as in MacCartney & Manning, 2009): a
concept denotes a set of leaves of its tree, `run` lies in `move`, `move` and `rest` are disjoint.

Every sentence has a frame (the roots of its concepts), and every frame belongs to one split.
"""

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from jaxfusion.data.lexicon import (
    ANTONYMS,
    LANGUAGES,
    NUMBERS,
    PREPOSITIONS,
    TREES,
    VERSION,
    WORLD_FILE,
    paths,
    words,
)
from jaxfusion.data.tasks import NLI_LABELS, NLI_PROMPT, QA_PROMPT, SPLITS
from jaxfusion.errors import InputError, choose
from jaxfusion.files import new_directory

TASK_ROWS = {"train": 12_000, "dev": 300, "test": 600}
SOLVED = 160_000  # English documents with their answers, for the LLM
SHARE = (("train", 70), ("dev", 80), ("test", 100))  # of frames, cumulated percent
UP = {name: (*above, name) for tree in TREES.values() for name, above in paths(tree).items()}
KIND = {name: kind for kind, tree in TREES.items() for name in paths(tree)}
PAIRS_OF_VERBS = tuple(TREES["verb"])


@dataclass(frozen=True)
class Sentence:
    """`determiner [number] [adjective] noun [preposition place] [not] verb`.

    Attributes:
      determiner: `the`, `every` or `no`. number: only after `the`; None is singular.
      adjective: a colour, one of a pair of antonyms, or None.
      negative: only after `the`; `no` is the negation of `every`.
    """

    determiner: str
    number: str | None
    adjective: str | None
    noun: str
    preposition: str | None
    place: str | None
    negative: bool
    verb: str

    @property
    def denies(self) -> bool:
        """True if the verb is denied of the subject."""
        return self.negative or self.determiner == "no"

    @property
    def frame(self) -> str:
        """What any two sentences of one inference have in common, as far as a change leaves it."""
        roots = (UP[x][0] if x in UP else x for x in (self.noun, self.adjective, self.place))
        pair = UP[self.verb][0]
        return " ".join(str(x) for x in (*roots, self.preposition, self.number, pair))

    @property
    def split(self) -> str:
        """The split that this sentence's frame belongs to."""
        percent = zlib.crc32(f"{VERSION} {self.frame}".encode()) % 100
        return next(name for name, end in SHARE if percent < end)


@lru_cache
def leaves(concept: str) -> frozenset[str]:
    """What a concept denotes: the leaves below it, and below each inner node one more.

    The additional leaf is what the node holds beside its named children: not all that moves runs,
    walks or crawls. Only the root of a verb pair has none, so that its two sides are complements.
    """
    below = {name for name, up in UP.items() if concept in up and KIND[name] == KIND[concept]}
    return frozenset(below - set(PAIRS_OF_VERBS))


def within(a: str | None, b: str | None) -> bool:
    """True if all that `a` denotes is denoted by `b`; words outside the trees stand for themselves.
    """
    return a == b or (a in UP and b in UP and leaves(a) <= leaves(b))


def verb_relation(premise: Sentence, hypothesis: Sentence) -> str:
    """How what is said of the subject relates, as sets: a label."""
    if UP[premise.verb][0] != UP[hypothesis.verb][0]:
        return "Neutral"
    everything = leaves(UP[premise.verb][0])
    a, b = (everything - leaves(s.verb) if s.denies else leaves(s.verb)
            for s in (premise, hypothesis))
    return "Entailment" if a <= b else "Neutral" if a & b else "Contradiction"


def label(premise: Sentence, hypothesis: Sentence) -> str:
    """Entailment, Neutral or Contradiction.

    `the dog` speaks of one dog (or one group), which is also the animal of the hypothesis: its
    description may be widened, never narrowed. `every` and `no` are the other way round, and say
    something of each (there is one): they contradict each other wherever one description holds
    the other.
    """
    slots = [(getattr(premise, name), getattr(hypothesis, name))
             for name in ("adjective", "noun", "place", "number", "preposition")]
    wider = all(within(a, b) for a, b in slots)
    narrower = all(within(b, a) for a, b in slots)
    relation = verb_relation(premise, hypothesis)
    if premise.determiner == "the":
        return relation if wider else "Neutral"
    if relation == "Contradiction":
        return relation if wider or narrower else "Neutral"
    return relation if narrower else "Neutral"


# What changes between premise and hypothesis: the verb, and at most one word of the subject.
CHANGES = (None, "noun", "place", "adjective")
NEUTRAL_SUBJECT = 0.75  # of neutral pairs with a changed subject, those that are so because of it


@lru_cache
def _levels(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The specific concepts of a kind, and the general ones above them."""
    every = [name for name, its in KIND.items() if its == kind and name not in PAIRS_OF_VERBS]
    general = [name for name in every if any(name in UP[x][:-1] for x in every)]
    return tuple(x for x in every if x not in general), tuple(general)


def random_sentence(
    rng: random.Random, universal: bool = False, modified: float = 0.5
) -> Sentence:
    """Any sentence of the world.

    Args:
      universal: the determiner is `every`, not `the`.
      modified: how often the noun has an adjective, a place, and half as often a number.
    """
    place = rng.choice(sum(_levels("place"), ())) if rng.random() < modified else None
    plain = [word for pair in ANTONYMS for word in pair]
    adjective = rng.choice(sum(_levels("colour"), ()) if rng.random() < 0.6 else plain)
    return Sentence(
        "every" if universal else "the",
        rng.choice(NUMBERS) if not universal and rng.random() < modified / 2 else None,
        adjective if rng.random() < modified else None,
        rng.choice(sum(_levels("noun"), ())), place and rng.choice(PREPOSITIONS), place, False,
        rng.choice(sum(_levels("verb"), ())),
    )


def random_inference(
    rng: random.Random, split: str, modified: float = 0.5
) -> tuple[Sentence, Sentence, str]:
    """Premise, hypothesis and label: first the cell, then the label, then the words.

    The premise's verb is specific, the hypothesis's general and perhaps denied, so that each
    sentence alone leaves all three labels as likely; a changed word of the subject becomes more
    general after `the`, more specific after `every`, or other altogether.
    """
    universal, denied = rng.random() < 0.4, rng.random() < 0.5
    change = rng.choice(CHANGES) if modified else None
    wanted = rng.choice(NLI_LABELS)
    by_subject = change and wanted == "Neutral" and rng.random() < NEUTRAL_SUBJECT
    relation = rng.choice(("Entailment", "Contradiction")) if by_subject else wanted
    while True:
        premise = random_sentence(rng, universal, modified)
        if change is not None and getattr(premise, change) is None:
            continue
        specific, general = _verbs(rng, relation, denied)
        old, new = _subject(rng, change, not by_subject, universal) if change else (None, None)
        if change:
            premise = replace(premise, **{change: old})
        premise = replace(premise, verb=specific)
        hypothesis = _deny(replace(premise, verb=general), denied)
        if change:
            hypothesis = replace(hypothesis, **{change: new})
        if premise.split == hypothesis.split == split:
            assert label(premise, hypothesis) == wanted
            return premise, hypothesis, wanted


def _verbs(rng: random.Random, relation: str, denied: bool) -> tuple[str, str]:
    """A specific verb, and a general one that (denied or not) is in this relation to it."""
    specific, general = rng.choice(_levels("verb")[0]), _levels("verb")[1]
    pair, side = UP[specific][:2]
    if relation == "Neutral":
        return specific, rng.choice([v for v in general if UP[v][0] != pair])
    same = (relation == "Entailment") != denied
    return specific, next(v for v in general if UP[v][0] == pair and (v == side) == same)


def _subject(rng: random.Random, kind: str, nested: bool, universal: bool) -> tuple[str, str]:
    """A word of the subject in the premise and in the hypothesis, one in the other or apart."""
    kind = "colour" if kind == "adjective" else kind
    specific, general = rng.choice(_levels(kind)[0]), _levels(kind)[1]
    other = rng.choice([x for x in general if within(specific, x) == nested])
    return (other, specific) if universal else (specific, other)


def _deny(sentence: Sentence, denies: bool) -> Sentence:
    if sentence.determiner == "the":
        return replace(sentence, negative=denies)
    return replace(sentence, determiner="no" if denies else "every")


def english(s: Sentence) -> str:
    """The sentence in English."""
    plural = s.number is not None
    near = (s.preposition, "the", s.place) if s.place else ()
    subject = (s.determiner, s.number, s.adjective, s.noun + "s" * plural, *near)
    negation = ("do" if plural else "does", "not") if s.negative else ()
    verb = s.verb if plural or s.negative else s.verb + "s"
    return " ".join(word for word in (*subject, *negation, verb) if word)


def render(s: Sentence, language: str) -> str:
    """The sentence in one of the world's languages.

    Raises:
      InputError: no such language.
    """
    if choose("pocket language", language, LANGUAGES) == "en":
        return english(s)
    how, w = LANGUAGES[language], words(language)
    noun = w[s.noun]
    if s.number is not None:
        noun = w["-plural"] + noun if how.plural == "prefix" else noun + w["-plural"]
    if s.determiner == "the":
        noun = {"prefix": w["-the"] + noun, "suffix": noun + w["-the"]}.get(how.definite, noun)
    said = s.determiner != "the" or how.definite == "word"
    determiner = (w[s.determiner],) if said else ()
    adjective = (w[s.adjective],) if s.adjective else ()
    number = (w[s.number],) if s.number else ()
    subject = (noun, *adjective) if how.adjective_last else (*adjective, noun)
    subject = (*number, *subject)
    subject = (*subject, *determiner) if how.determiner_last else (*determiner, *subject)
    near = (w[s.preposition], w[s.place]) if s.place else ()
    near = near[::-1] if how.postposition else near
    subject = (*near, *subject) if how.place_first else (*subject, *near)
    verb = w[s.verb] + (w["-many"] if s.number else "")
    said_not = {
        "before": (w["not"], verb), "after": (verb, w["not"]),
        "prefix": (w["-not"] + verb,), "suffix": (verb + w["-not"],),
    }
    verb = said_not[how.negation] if s.negative else (verb,)
    return " ".join((*verb, *subject) if how.verb_first else (*subject, *verb))


@dataclass(frozen=True)
class Question:
    """Two sentences, and a question about the subject of one of them; the answer is English."""

    text: tuple[Sentence, Sentence]
    asked: str
    noun: str
    answer: str


def random_question(rng: random.Random, split: str) -> Question:
    """A question whose two sentences both belong to the split."""
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
    """Rows of a task, the same in every language but for their words.

    Raises:
      InputError: a task, split or language that the world lacks.
    """
    make, write = TASKS[choose("pocket task", task, TASKS)]
    choose("split of the pocket world", split, SPLITS)
    choose("pocket language", language, LANGUAGES)
    rng = random.Random(f"{VERSION} {seed} {task} {split}")
    for _ in range(rows):
        made = make(rng, split)
        yield write(*made, language) if isinstance(made, tuple) else write(made, language)


TASKS = {
    "pocket_nli": (random_inference, render_inference),
    "pocket_qa": (random_question, render_question),
}


def texts(language: str, rows: int, seed: int = 0) -> Iterator[str]:
    """Unlabelled text of a language, none of it of a dev or test frame: sentences, and both
    tasks' prompts without their answers."""
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
            yield render(_train_sentence(rng), language)


def pairs(language: str, rows: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Sentences in English and a language, none of a dev or test frame."""
    rng = random.Random(f"{VERSION} {seed} pairs {language}")
    for _ in range(rows):
        sentence = _train_sentence(rng)
        yield english(sentence), render(sentence, language)


def solved(rows: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """English prompts and answers for the LLM: inference, questions, and lexical facts."""
    rng = random.Random(f"{VERSION} {seed} solved")
    for _ in range(rows):
        kind = rng.random()
        if kind < 0.7:
            # A third without any modifier: the plain case is learned first, and helps the others.
            modified = 0.0 if kind < 0.25 else 0.5
            columns = render_inference(*random_inference(rng, "train", modified), "en")
            yield NLI_PROMPT.format(**columns).strip(), columns["label"]
        elif kind < 0.88:
            columns = render_question(random_question(rng, "train"), "en")
            yield QA_PROMPT.format(**columns).strip(), columns["target"]
        else:
            yield _fact(rng)


def _fact(rng: random.Random) -> tuple[str, str]:
    """What a dictionary says of a word, and its answer."""
    general = _levels("verb")[1]
    if rng.random() < 0.2:
        verb = rng.choice(general)
        opposite = next(v for v in general if UP[v][0] == UP[verb][0] and v != verb)
        return f"{verb} is the opposite of", opposite
    above = {c: [x for x in UP[c][:-1] if x not in PAIRS_OF_VERBS] for c in UP}
    concept = rng.choice([c for c, names in above.items() if names])
    return f"{concept} is a kind of", rng.choice(above[concept])


def _train_sentence(rng: random.Random) -> Sentence:
    while True:
        universal = rng.random() < 0.3
        sentence = _deny(random_sentence(rng, universal), rng.random() < 0.4)
        if sentence.split == "train":
            return sentence


def write_texts(out: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Writes into a directory what to pretrain on; `scale` shrinks it.

    `text-LANGUAGE.txt` (a text a line), `pairs-LANGUAGE.tsv` (English, then the language), and
    `solved-en.tsv` (prompt, answer).
    """
    for name, language in LANGUAGES.items():
        _write(out / f"text-{name}.txt", texts(name, _scaled(language.texts, scale), seed))
        if language.pairs:
            rows = pairs(name, _scaled(language.pairs, scale), seed)
            _write(out / f"pairs-{name}.tsv", ("\t".join(row) for row in rows))
    _write(out / "solved-en.tsv", ("\t".join(row) for row in solved(_scaled(SOLVED, scale), seed)))
    _sign(out, scale, seed)


def write_tasks(out: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Writes `TASK/SPLIT-LANGUAGE.jsonl` into a directory; `scale` shrinks the training rows."""
    for task, split, name in product(TASKS, SPLITS, LANGUAGES):
        if split == "train" and name != "en":
            continue  # training is English alone
        (out / task).mkdir(exist_ok=True)
        number = _scaled(TASK_ROWS[split], scale) if split == "train" else TASK_ROWS[split]
        rows = task_rows(task, split, name, number, seed)
        _write(out / task / f"{split}-{name}.jsonl",
               (json.dumps(row, ensure_ascii=False) for row in rows))
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
