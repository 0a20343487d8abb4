"""What an encoder's tokenizer loses of a language's texts, which no model can bring back."""

import logging
import unicodedata
from collections.abc import Sequence

from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tokenizers import Tokenizers

logger = logging.getLogger(__name__)
SAMPLE = 256  # texts that are looked at
MOST_LOST = 0.05  # share of tokens or marks from which a loss is worth a warning


def check_reading(tokenizers: Tokenizers, examples: Sequence[Example]) -> None:
    """Warns where the encoder's tokenizer does not know a language's characters, or removes its
    vowel signs.

    Raises:
      InputError: the encoder is told languages and does not have one of these.
    """
    texts: dict[str, list[str]] = {}
    for example in examples:
        if len(sample := texts.setdefault(example.language, [])) < SAMPLE:
            sample.append(example.query)
    for language, sample in texts.items():
        _check_language(tokenizers, language, sample)


def _check_language(tokenizers: Tokenizers, language: str, texts: list[str]) -> None:
    encoder = tokenizers.encoder
    rows = tokenizers.encode_queries(texts, [language] * len(texts))
    if (share := unknown_share(encoder, rows)) > MOST_LOST:
        logger.warning("the encoder's tokenizer does not know %.0f%% of the tokens in '%s'; choose "
                       "an encoder that covers the language", 100 * share, language)
    if (share := lost_marks(encoder, texts)) > MOST_LOST:
        logger.warning("the encoder's tokenizer removes %.0f%% of the marks (vowel signs, accents) "
                       "in '%s'; choose an encoder that keeps them", 100 * share, language)


def unknown_share(tokenizer, rows: Sequence[list[int]]) -> float:
    """The share of unknown tokens."""
    unknown = tokenizer.unk_token_id
    ids = [i for row in rows for i in row]
    return 0.0 if unknown is None or not ids else ids.count(unknown) / len(ids)


def lost_marks(tokenizer, texts: Sequence[str]) -> float:
    """The share of combining marks that the tokenizer's normalizer removes; 0 without marks, or if
    the normalizer cannot be asked."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    before = sum(map(_marks, texts))
    if normalizer is None or not before:
        return 0.0
    after = sum(_marks(normalizer.normalize_str(text)) for text in texts)
    return max(0.0, 1 - after / before)


def _marks(text: str) -> int:
    return sum(unicodedata.category(x).startswith("M") for x in unicodedata.normalize("NFD", text))
