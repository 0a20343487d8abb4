"""The pocket world's grammar: the meaning of a sentence, inference, and surface forms.

Meaning is set inclusion (natural logic as in MacCartney & Manning, 2009): a concept denotes a set
of leaves of its tree; `run` is a subset of `move`; `move` and `rest` are disjoint. Every sentence
has a frame (the roots of its concepts), and every frame belongs to one split.
"""

import random
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

from jaxfusion.data.pocket.lexicon import (
    ANTONYMS,
    LANGUAGES,
    NUMBERS,
    PREPOSITIONS,
    TREES,
    VERSION,
    paths,
    words,
)
from jaxfusion.errors import choose

SHARE = (("train", 70), ("dev", 80), ("test", 100))  # of frames, cumulative percent
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
        """Whether the verb is negated."""
        return self.negative or self.determiner == "no"

    @property
    def frame(self) -> str:
        """The roots of the sentence's concepts, with its preposition, number and verb pair."""
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
    """The set that a concept denotes: the leaves below it, plus one for each inner node.

    The additional leaf stands for whatever the named children leave out: not all that moves runs,
    walks or crawls. The root of a verb pair has none, so that its two sides are complements.
    """
    below = {name for name, up in UP.items() if concept in up and KIND[name] == KIND[concept]}
    return frozenset(below - set(PAIRS_OF_VERBS))


def within(a: str | None, b: str | None) -> bool:
    """Whether `a` denotes a subset of `b`; words outside the trees denote only themselves."""
    return a == b or (a in UP and b in UP and leaves(a) <= leaves(b))


def verb_relation(premise: Sentence, hypothesis: Sentence) -> str:
    """The label that relates the two predicates, as sets."""
    if UP[premise.verb][0] != UP[hypothesis.verb][0]:
        return "Neutral"
    everything = leaves(UP[premise.verb][0])
    a, b = (everything - leaves(s.verb) if s.denies else leaves(s.verb)
            for s in (premise, hypothesis))
    return "Entailment" if a <= b else "Neutral" if a & b else "Contradiction"


def label(premise: Sentence, hypothesis: Sentence) -> str:
    """Entailment, Neutral or Contradiction.

    `the dog` refers to one dog (or one group), which is also the animal of the hypothesis: its
    description may be widened, never narrowed. For `every` and `no` it is the reverse. They assume
    that the subject exists, so they contradict each other if one description includes the other.
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


@lru_cache
def levels(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The specific concepts of a kind, and the general concepts above them."""
    every = [name for name, its in KIND.items() if its == kind and name not in PAIRS_OF_VERBS]
    general = [name for name in every if any(name in UP[x][:-1] for x in every)]
    return tuple(x for x in every if x not in general), tuple(general)


def random_sentence(
    rng: random.Random, universal: bool = False, modified: float = 0.5
) -> Sentence:
    """A random sentence of the world.

    Args:
      universal: whether the determiner is `every` instead of `the`.
      modified: probability of an adjective and of a place; a number has half of it.
    """
    place = rng.choice(sum(levels("place"), ())) if rng.random() < modified else None
    plain = [word for pair in ANTONYMS for word in pair]
    adjective = rng.choice(sum(levels("colour"), ()) if rng.random() < 0.6 else plain)
    return Sentence(
        "every" if universal else "the",
        rng.choice(NUMBERS) if not universal and rng.random() < modified / 2 else None,
        adjective if rng.random() < modified else None,
        rng.choice(sum(levels("noun"), ())), place and rng.choice(PREPOSITIONS), place, False,
        rng.choice(sum(levels("verb"), ())),
    )


def deny(sentence: Sentence, denies: bool) -> Sentence:
    """The sentence with its verb negated, or not."""
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
      InputError: unknown language.
    """
    if choose("pocket language", language, LANGUAGES) == "en":
        return english(s)
    how, w = LANGUAGES[language], words(language)
    noun = w[s.noun]
    if s.number is not None:
        noun = w["-plural"] + noun if how.plural == "prefix" else noun + w["-plural"]
    if s.determiner == "the":
        noun = {"prefix": w["-the"] + noun, "suffix": noun + w["-the"]}.get(how.definite, noun)
    has_word = s.determiner != "the" or how.definite == "word"
    determiner = (w[s.determiner],) if has_word else ()
    adjective = (w[s.adjective],) if s.adjective else ()
    number = (w[s.number],) if s.number else ()
    subject = (noun, *adjective) if how.adjective_last else (*adjective, noun)
    subject = (*number, *subject)
    subject = (*subject, *determiner) if how.determiner_last else (*determiner, *subject)
    near = (w[s.preposition], w[s.place]) if s.place else ()
    near = near[::-1] if how.postposition else near
    subject = (*near, *subject) if how.place_first else (*subject, *near)
    verb = w[s.verb] + (w["-many"] if s.number else "")
    negated = {
        "before": (w["not"], verb), "after": (verb, w["not"]),
        "prefix": (w["-not"] + verb,), "suffix": (verb + w["-not"],),
    }
    verb = negated[how.negation] if s.negative else (verb,)
    return " ".join((*verb, *subject) if how.verb_first else (*subject, *verb))
