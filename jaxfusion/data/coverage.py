"""What is lost between texts and ids: a language's characters, the space before an answer."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence

from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tokenizers import Tokenizers

logger = logging.getLogger(__name__)
SAMPLE = 256  # texts that are looked at
MOST_LOST = 0.05  # share of tokens or marks from which a loss is worth a warning
# Thai, Lao, Tibetan, Burmese, Khmer and East Asian but Hangul, which do not separate words.
UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3000-\u9fff\uf900-\ufaff"
# With vowel signs and the danda of Indic scripts, which `\w` does not match.
WORD_ENDS = re.compile(f"(?![{UNSPACED}])[\\w.,:;?!\u061f\u0900-\u0dff]\\Z")
WORD_STARTS = re.compile(f"(?![{UNSPACED}])\\w")
SHOWN = 40  # characters of a word in messages: a text without spaces is one


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


def check_joints(tokenizers: Tokenizers, read: Iterable[tuple[str, str]]) -> None:
    """Warns where a word is glued to the prompt that it answers, as in `Topic:science`: LLMs have
    hardly read such text, and both training and scoring suffer.

    Args:
      read: prompts that the LLM reads, with their answers; with a chat template nothing is glued.
    """
    if tokenizers.turn is not None:
        return
    for prompt, answer in read:
        if WORD_ENDS.search(prompt) and WORD_STARTS.match(answer):
            both = f"{prompt.split()[-1][-SHOWN:]}{answer.split()[0][:SHOWN]}"
            logger.warning("the LLM reads an answer glued to its prompt: '%s'; end the prompt "
                           "(data.text_prompt, or the task's) with a space", both)
            return


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
