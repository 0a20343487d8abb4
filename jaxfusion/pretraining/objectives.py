"""Pretraining batches: inputs, targets and weights of each objective."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxfusion.data.batching import Ragged, in_parts
from jaxfusion.data.pipeline import own_rows
from jaxfusion.fields import CorpusConfig, ObjectiveConfig
from jaxfusion.pretraining.corpus import Document, Pair, induce_lexicon
from jaxfusion.pretraining.text_lm import TextBatch

# One text as ids: inputs, targets, and the weight of each prediction.
TextRow = tuple[list[int], list[int], list[float]]


@dataclass(frozen=True)
class CausalRows:
    """`[BOS] text answer [EOS]`, each token predicting the next; answers have a larger weight."""

    tokens: Ragged
    answers: list[int]  # number of a text's last tokens, before EOS, that are its answer
    answer_weight: float

    def lengths(self) -> np.ndarray:
        """Tokens of each row, at most. [rows]"""
        return self.tokens.lengths - 1

    def row(self, i: int, rng: np.random.Generator) -> TextRow:
        """Inputs, targets and weights of a row, with fresh random draws."""
        ids, answer = self.tokens[i], self.answers[i]
        weights = [1.0] * (len(ids) - 2 - answer) + [self.answer_weight] * answer + [1.0]
        return ids[:-1], ids[1:], weights


def causal_rows(documents: Sequence[Document], tokenizer, config: ObjectiveConfig, most: int):
    """The documents as ids, truncated to `most` tokens, and how many were truncated."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens, answers, cut = Ragged(), [], 0
    for batch in in_parts(documents):
        texts, full_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (
            [d.text for d in batch], [f"{d.text} {d.answer}".strip() for d in batch]))
        for document, text, full in zip(batch, texts, full_ids, strict=True):
            ids = [*bos, *full, tokenizer.eos_token_id]
            cut += len(ids) > most + 1
            tokens.append(ids[: most + 1])
            fits = len(ids) <= most + 1
            answers.append(len(full) - len(text) if document.answer and fits else 0)
    return CausalRows(tokens, answers, config.answer_weight), cut


@dataclass(frozen=True)
class DenoisingRows:
    """Texts as words, some of them masked or replaced by a translation; all are to be restored.

    `masked_lm` masks words (BERT, arXiv:1810.04805). `code_switch` also replaces words by their
    translation into another language of the corpus (as in RAS, arXiv:2010.03142), so that a word
    and its translation get similar representations; translations come from the corpus's own
    sentence pairs.

    Attributes:
      words: each text's words, as indices into `pieces`.
      pieces: the ids of every word of the corpus.
      languages: of each text.
      translations: language -> other language -> word -> word.
      end, mask: ids of the end token and of the mask.
    """

    words: Ragged
    pieces: list[list[int]]
    languages: list[str]
    translations: dict[str, dict[str, dict[int, int]]]
    end: int
    mask: int
    config: ObjectiveConfig
    most: int

    def lengths(self) -> np.ndarray:
        """Tokens of each row, at most. [rows]"""
        return np.array([min(sum(len(self.pieces[w]) for w in words) + 1, self.most)
                         for words in self.words])

    def row(self, i: int, rng: np.random.Generator) -> TextRow:
        """Inputs, targets and weights of a row, with fresh random draws."""
        c, words = self.config, self.words[i]
        partners = self.translations.get(self.languages[i])
        lexicon: dict[int, int] = {}
        if c.name == "code_switch" and partners and rng.random() < c.switched_texts:
            lexicon = partners[list(partners)[rng.integers(len(partners))]]
        inputs, targets, weights = [], [], []
        for word, chance in zip(words, rng.random(len(words)), strict=True):
            true = self.pieces[word]
            shown, weight = true, c.unchanged_weight
            if chance < c.masked:
                shown, weight = [self.mask] * len(true), 1.0
            elif chance < c.masked + c.switched_words and word in lexicon:
                shown, weight = self.pieces[lexicon[word]], 1.0
            # If the translation has more pieces, the extra ones restore the word's last piece.
            inputs += shown
            targets += [true[min(j, len(true) - 1)] for j in range(len(shown))]
            weights += [weight] * len(shown)
        cut = self.most - 1
        return ([*inputs[:cut], self.end], [*targets[:cut], self.end],
                [*weights[:cut], c.unchanged_weight])


def denoising_rows(
    documents: Sequence[Document], pairs: dict[str, list[Pair]], tokenizer,
    config: ObjectiveConfig, pivot: str, most: int,
) -> tuple[DenoisingRows, int]:
    """The documents as words of the encoder's tokenizer, and how many are longer than `most`.

    Args:
      pivot: the language of the pairs' first column.
    """
    index: dict[str, int] = {}
    words = Ragged()
    for d in documents:
        words.append([index.setdefault(w, len(index)) for w in d.text.split()])
    translations = _translations(pairs, index, pivot) if config.name == "code_switch" else {}
    pieces = tokenizer(list(index), add_special_tokens=False)["input_ids"]
    end, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    rows = DenoisingRows(words, pieces, [d.language for d in documents], translations, end, mask,
                         config, most)
    return rows, sum(sum(len(pieces[w]) for w in text) + 1 > most for text in words)


def _translations(pairs: dict[str, list[Pair]], index: dict[str, int], pivot: str):
    """Lexicons between all languages: from pairs with the pivot, and through it."""
    out_of: dict[str, dict[str, str]] = {}  # pivot -> language
    into: dict[str, dict[str, str]] = {}
    for language, rows in pairs.items():
        out_of[language], into[language] = induce_lexicon(rows)
    text: dict[str, dict[str, dict[str, str]]] = {pivot: out_of}
    for language in pairs:
        text[language] = {
            # The pivot as often as all others combined: lexicons through it lose words.
            **{f"{pivot} {n}": into[language] for n in range(max(1, len(pairs) - 1))},
            **{other: {a: out_of[other][b] for a, b in into[language].items()
                       if b in out_of[other]}
               for other in pairs if other != language},
        }
    return {
        language: {
            other: {index.setdefault(a, len(index)): index.setdefault(b, len(index))
                    for a, b in lexicon.items()}
            for other, lexicon in partners.items()
        }
        for language, partners in text.items()
    }


class TextBatches:
    """All pretraining batches by step number, as a grain random-access source.

    A step first samples a length bucket, then texts of that bucket: a language with n texts in
    proportion to n**sampling (mT5, arXiv:2010.11934, section 3.1), its texts uniformly.

    Args:
      rows, languages: of all texts. drawn: the numbers of the training texts.
      place: sharding of a batch's rows; None builds all rows on this host.
    """

    def __init__(
        self, rows: CausalRows | DenoisingRows, languages: Sequence[str], drawn: np.ndarray,
        config: CorpusConfig, batch_size: int, seed: int, steps: int,
        place: jax.sharding.Sharding | None = None,
    ):
        self.place = place
        self.rows, self.batch_size, self.seed, self.steps = rows, batch_size, seed, steps
        self.buckets = tuple(b for b in config.buckets if b < config.max_tokens)
        self.buckets = (*self.buckets, config.max_tokens)
        _, language, texts = np.unique(
            np.array(languages)[drawn], return_inverse=True, return_counts=True
        )
        weight = (texts.astype(float) ** (config.sampling - 1))[language]
        bucket = np.searchsorted(self.buckets, rows.lengths()[drawn])
        inside = [np.flatnonzero(bucket == b) for b in range(len(self.buckets))]
        self.members = [drawn[chosen] for chosen in inside]
        self.cumulated = [np.cumsum(weight[chosen]) for chosen in inside]
        mass = np.array([c[-1] if len(c) else 0.0 for c in self.cumulated])
        self.chance = mass / mass.sum()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> TextBatch:
        rng = np.random.default_rng((self.seed, step))
        bucket = rng.choice(len(self.buckets), p=self.chance)
        cumulated = self.cumulated[bucket]
        drawn = np.searchsorted(cumulated, rng.random(self.batch_size) * cumulated[-1])
        batch, own = self.batch(self.members[bucket][drawn], rng), own_rows(len(drawn), self.place)
        return jax.tree.map(lambda x: x[own], batch)

    def batch(self, numbers: Sequence[int], rng: np.random.Generator) -> TextBatch:
        """The batch of these texts, in the smallest bucket that fits their rows."""
        built = [self.rows.row(i, rng) for i in numbers]
        longest = max(len(inputs) for inputs, _, _ in built)
        shape = (len(built), next(b for b in self.buckets if b >= longest))
        ids = [np.zeros(shape, np.int32) for _ in range(3)]
        weights = np.zeros(shape, np.float32)
        for i, (inputs, targets, weight) in enumerate(built):
            n = len(inputs)
            ids[0][i, :n], ids[1][i, :n], ids[2][i, :n] = inputs, 1, targets
            weights[i, :n] = weight
        return TextBatch(*ids, weights)
