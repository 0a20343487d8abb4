"""Reads pretraining text from a directory, and induces bilingual lexicons from its pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxfusion.errors import InputError

Pair = tuple[str, str]


@dataclass(frozen=True)
class Document:
    """One text; `answer` is the LLM's answer after it, or empty."""

    language: str
    text: str
    answer: str = ""


@dataclass(frozen=True)
class Corpus:
    """The text of a directory.

    Attributes:
      documents: from `text-LANGUAGE.txt`, a text per line, and `solved-LANGUAGE.tsv`, text and
        answer.
      pairs: from `pairs-LANGUAGE.tsv`: the pivot (English) and the language, by language.
    """

    documents: list[Document]
    pairs: dict[str, list[Pair]]


def read_corpus(path: Path, languages: Sequence[str] = ()) -> Corpus:
    """Reads a directory's texts and pairs, in all its languages or in the given ones.

    Raises:
      InputError: missing files, or a line with the wrong number of fields.
    """
    available = sorted(file.stem.removeprefix("text-") for file in path.glob("text-*.txt"))
    if not available:
        raise InputError(f"{path} has no text-LANGUAGE.txt to pretrain on")
    absent = [name for name in languages if name not in available]
    if absent:
        raise InputError(f"{path} has no text in '{absent[0]}'; it has {', '.join(available)}")
    documents, pairs = [], {}
    for name in languages or available:
        documents += [Document(name, line) for _, line in _lines(path / f"text-{name}.txt")]
        for text, answer in _fields(path / f"solved-{name}.tsv"):
            documents.append(Document(name, text, answer))
        if rows := _fields(path / f"pairs-{name}.tsv"):
            pairs[name] = rows
    if not documents:
        raise InputError(f"the text files in {path} are empty")
    return Corpus(documents, pairs)


def _lines(file: Path) -> list[tuple[int, str]]:
    """Non-blank lines with their numbers."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from None
    return [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _fields(file: Path) -> list[Pair]:
    rows = []
    for number, line in _lines(file) if file.is_file() else ():
        fields = tuple(line.split("\t"))
        if len(fields) != 2:
            raise InputError(f"{file}:{number}: {len(fields)} tab-separated fields, expected 2")
        rows.append(fields)
    return rows


def induce_lexicon(
    pairs: Sequence[Pair], rounds: int = 8, least: float = 0.3
) -> tuple[dict[str, str], dict[str, str]]:
    """Word translations in both directions, with IBM Model 1 (Brown et al., 1993) for each.

    Args:
      pairs: sentences and their translations, words separated by spaces.
      rounds: of expectation maximisation.
      least: translations with a lower probability are dropped.
    """
    forward = _model_1(pairs, rounds, least)
    return forward, _model_1([(b, a) for a, b in pairs], rounds, least)


def _model_1(pairs: Sequence[Pair], rounds: int, least: float) -> dict[str, str]:
    """The most likely translation of every source word: argmax_f t(f | e).

    Each target token is aligned to one source token of its sentence, or to none (NULL).
    """
    sources: dict[str, int] = {"": 0}
    targets: dict[str, int] = {}
    e, f, token, tokens = [], [], [], 0
    for source, target in pairs:
        from_ids = [0, *(sources.setdefault(w, len(sources)) for w in source.split())]
        for word in target.split():
            to = targets.setdefault(word, len(targets))
            e += from_ids
            f += [to] * len(from_ids)
            token += [tokens] * len(from_ids)
            tokens += 1
    cells, cell = np.unique(np.array(e) * len(targets) + np.array(f), return_inverse=True)
    cell_source = cells // len(targets)
    t = np.ones(len(cells))
    for _ in range(rounds):
        share = t[cell]
        share = share / np.bincount(token, share, tokens)[token]
        t = np.bincount(cell, share, len(cells))
        t = t / np.bincount(cell_source, t, len(sources))[cell_source]
    source_words, target_words = list(sources), list(targets)
    best: dict[str, str] = {}
    for i in np.argsort(t):  # ascending, so that the most likely one overwrites the others
        if t[i] >= least and cell_source[i] != 0:
            best[source_words[cell_source[i]]] = target_words[cells[i] % len(targets)]
    return best
