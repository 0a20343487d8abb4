"""The lexicon of the pocket world: concepts in English, and pseudo-words in other scripts.

Concepts are named by their English word. The English taxonomy is hand-written; the other languages
are generated from a seed. No two languages share a word.
"""

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jaxfusion.cli import typed
from jaxfusion.errors import InputError

VERSION = 1  # of the world: stored with its files and with the models trained on it
WORLD_FILE = "world.json"
ABOUT_FILE = "pretraining.json"
TREES = {
    "noun": {
        "animal": {
            "dog": ("poodle", "beagle", "terrier", "spaniel"),
            "bird": ("sparrow", "crow", "eagle", "parrot"),
            "insect": ("beetle", "moth", "wasp", "cricket"),
            "horse": ("stallion", "mare", "foal", "mustang"),
        },
        "person": {
            "artist": ("painter", "singer", "dancer", "poet"),
            "worker": ("farmer", "baker", "miner", "tailor"),
            "athlete": ("boxer", "skater", "rower", "sprinter"),
            "leader": ("king", "queen", "mayor", "chief"),
        },
    },
    "place": {
        "building": {"house": ("cabin", "villa", "cottage", "hut"),
                     "shop": ("bakery", "pharmacy", "market", "kiosk")},
        "water": {"river": ("creek", "brook", "stream", "canal"),
                  "lake": ("pond", "lagoon", "pool", "reservoir")},
        "land": {"forest": ("grove", "jungle", "thicket", "orchard"),
                 "hill": ("dune", "slope", "mound", "ridge")},
    },
    "colour": {"red": ("scarlet", "crimson"), "blue": ("navy", "azure"),
               "green": ("olive", "emerald"), "brown": ("chestnut", "hazel")},
    # The two sides of a pair are complements: what does not move rests.
    "verb": {
        "motion": {"move": ("run", "walk", "crawl"), "rest": ("sleep", "sit", "wait")},
        "voice": {"speak": ("shout", "whisper", "sing"), "listen": ("eavesdrop", "hear", "heed")},
        "effort": {"work": ("cook", "dig", "sew"), "play": ("joke", "gamble", "juggle")},
        "coming": {"arrive": ("appear", "enter", "return"),
                   "leave": ("depart", "escape", "retire")},
        "fortune": {"win": ("triumph", "conquer", "prevail"),
                    "lose": ("fail", "surrender", "falter")},
        "mood": {"rejoice": ("laugh", "smile", "cheer"), "grieve": ("sob", "weep", "mourn")},
    },
}
ANTONYMS = (("big", "small"), ("young", "old"), ("happy", "sad"), ("rich", "poor"),
            ("clean", "dirty"), ("strong", "weak"))
NUMBERS = ("two", "three", "four", "five")
PREPOSITIONS = ("near", "behind", "beside")
QUESTIONS = ("what colour", "how many", "where", "what does")
GRAMMAR = ("the", "every", "no", "not")


@dataclass(frozen=True)
class Language:
    """How one language writes the world.

    Attributes:
      script: a name in `SCRIPTS`, or None for English.
      group: rich, mid or poor: the amount of text.
      reported: False for the languages used to choose recipes.
      texts, pairs: number of monolingual texts, and of sentences with their English translation.
      solved: number of tasks with answers, for an LLM.
      verb_first, adjective_last, place_first, postposition, determiner_last: word order.
      definite: how it expresses `the`: a word, a prefix, a suffix, or nothing.
      plural: of nouns, a prefix or a suffix.
      negation: a word before or after the verb, or a prefix or suffix of it.
    """

    script: str | None
    group: str
    reported: bool
    texts: int
    pairs: int
    verb_first: bool = False
    adjective_last: bool = False
    place_first: bool = False
    postposition: bool = False
    determiner_last: bool = False
    definite: str = "word"
    plural: str = "suffix"
    negation: str = "before"
    solved: int = 0


# Names are scripts, not languages: `sinh` is not Sinhala, only written in its letters.
LANGUAGES: dict[str, Language] = {
    "en": Language(None, "english", True, 24_000, 0, solved=160_000),
    "deva": Language("deva", "rich", False, 12_000, 6_000, place_first=True, postposition=True,
                     definite="none", negation="before", solved=12_000),
    "arab": Language("arab", "rich", True, 12_000, 6_000, verb_first=True, adjective_last=True,
                     definite="prefix", negation="before"),
    "latn_a": Language("latn_a", "rich", True, 12_000, 6_000, adjective_last=True,
                       negation="after", solved=24_000),
    "beng": Language("beng", "mid", True, 6_000, 3_000, place_first=True, postposition=True,
                     definite="suffix", negation="after"),
    "taml": Language("taml", "mid", True, 5_000, 2_500, place_first=True, postposition=True,
                     definite="none", negation="suffix"),
    "ethi": Language("ethi", "mid", True, 4_000, 2_000, definite="suffix", plural="suffix",
                     negation="prefix"),
    "latn_b": Language("latn_b", "poor", False, 2_000, 1_000, verb_first=True,
                       determiner_last=True, plural="prefix", negation="before"),
    "mlym": Language("mlym", "poor", True, 1_500, 750, place_first=True, postposition=True,
                     definite="none", negation="suffix"),
    "sinh": Language("sinh", "poor", True, 1_200, 600, place_first=True, postposition=True,
                     adjective_last=True, definite="suffix", negation="prefix"),
    "thaa": Language("thaa", "poor", True, 1_000, 500, verb_first=True, adjective_last=True,
                     determiner_last=True, definite="suffix", plural="prefix", negation="after"),
}

# Consonants and vowels of each script; a syllable is one of each.
SCRIPTS = {
    "deva": ("कखगजतदनपबमयरलवसह", ("", "ा", "ि", "ु", "े", "ो")),
    "arab": ("بتجدرزسشعفقكلمنه", ("ا", "و", "ي")),
    "latn_a": ("bdfgklmnprstvz", ("a", "e", "i", "o", "u", "ai")),
    "beng": ("কখগজতদনপবমযরলসহ", ("", "া", "ি", "ু", "ে", "ো")),
    "taml": ("கசஞடணதநபமயரலவழ", ("", "ா", "ி", "ு", "ெ", "ொ")),
    "ethi": ("ለመረሰቀበተነከወዘየደገጠ", None),  # each letter opens a row of seven syllables
    "latn_b": ("qxcjhwñçšžłř", ("ä", "ö", "ü", "å", "y")),
    "mlym": ("കഗചജതദനപബമയരലവസഹ", ("", "ാ", "ി", "ു", "െ", "ൊ")),
    "sinh": ("කගචජතදනපබමයරලවසහ", ("", "ා", "ි", "ු", "ෙ", "ො")),
    "thaa": ("ހށނރބޅކއވމފދތލގސ", ("ަ", "ާ", "ި", "ު", "ެ", "ޮ")),
}


def paths(tree: dict, above: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Each concept of a tree -> the concepts above it, root first."""
    ancestors = {}
    for name, below in tree.items():
        ancestors[name] = above
        children = below if isinstance(below, dict) else {key: {} for key in below}
        ancestors |= paths(children, (*above, name))
    return ancestors


@lru_cache
def concepts() -> tuple[str, ...]:
    """All concepts that have a word: those of the trees, except the names of verb pairs."""
    trees = [name for kind, tree in TREES.items() for name in paths(tree)
             if not (kind == "verb" and name in tree)]
    adjectives = [word for pair in ANTONYMS for word in pair]
    return (*trees, *adjectives, *NUMBERS, *PREPOSITIONS, *QUESTIONS, *GRAMMAR)


@lru_cache
def words(language: str) -> dict[str, str]:
    """The pseudo-word of every concept, and the affixes `-the`, `-plural`, `-not`, `-many`."""
    rng = random.Random(f"{VERSION} {language}")
    consonants, vowels = SCRIPTS[LANGUAGES[language].script]

    def syllable() -> str:
        if vowels is None:
            return chr(ord(rng.choice(consonants)) + rng.randrange(7))
        return rng.choice(consonants) + rng.choice(vowels)

    lexicon: dict[str, str] = {}
    for name in ("-the", "-plural", "-not", "-many", *concepts()):
        # Short, so that a vocabulary of a few thousand has full words of most languages.
        length = 1 if name.startswith("-") else 2
        while (word := "".join(syllable() for _ in range(length))) in lexicon.values():
            pass
        lexicon[name] = word
    return lexicon


def check_version(path: Path) -> None:
    """Raises InputError if a directory has rows or a model of another version of the world.

    Directories that do not come from the pocket world are ignored.
    """
    worlds, model = (path / WORLD_FILE, path.parent / WORLD_FILE), path / ABOUT_FILE
    made_with, command = None, ""
    if world := next((file for file in worlds if file.is_file()), None):
        made_with = json.loads(world.read_text("utf-8"))
        command = f"python -m jaxfusion.data.pocket.world {world.parent}"
    elif model.is_file():
        about = json.loads(model.read_text("utf-8"))
        made_with, role = about["world"], about["config"]["tower"]["role"]
        command = f"{typed('train')} --config pocket_{role}"
    if made_with is not None and made_with["version"] != VERSION:
        raise InputError(
            f"{path} has version {made_with['version']} of the pocket world, expected version "
            f"{VERSION}; make it again: {command}"
        )
