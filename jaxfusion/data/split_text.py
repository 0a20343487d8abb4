"""Unlabelled text: the encoder reads a prefix of random length, the LLM learns the rest.

As LangBridge trains on plain corpora (arXiv:2401.10695, section 4.1; `collate_fn` of its authors'
train_langbridge.py): the length in encoder tokens is uniform from 32 to the encoder's limit; the
text is split where the next token begins; no end token follows the rest, since the document goes
on. There all texts of a batch share one length; here each has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxfusion.data.batching import DECODER_STEP, Ragged, Shapes, TokenRow, in_parts
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError

LEAST = 32  # fewest encoder tokens, including the end token, if the text is long enough
SPARE = 16  # tokens at a truncation that may differ from those of the full text


@dataclass(frozen=True)
class Continued:
    """Texts that are split differently in every epoch.

    Attributes:
      texts: those of at least two encoder tokens.
      ids: the first encoder ids of each text, behind those of the encoder's prefix.
      begins: the text offset of each id; negative in the prefix.
      around: the encoder's special tokens before and after every text.
      short: how many texts were skipped because they are too short to split.
      latents: of the bridge.
    """

    texts: list[str]
    ids: Ragged
    begins: Ragged
    short: int
    tokenizers: Tokenizers
    around: tuple[list[int], list[int]]
    max_encoder_tokens: int
    max_decoder_tokens: int
    seed: int
    latents: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def prefixes(self) -> np.ndarray:
        """Number of the prefix's ids in front of each text. [N]"""
        inside = np.concatenate([[0], np.cumsum(np.array(self.begins.ids) < 0)])
        return np.diff(inside[np.array(self.begins.ends)])

    def at(self, epoch: int) -> "Split":
        """The texts as split in an epoch."""
        return Split(self, epoch)

    def shapes(self, buckets: Sequence[int]) -> Shapes:
        """Shapes that fit every split: the rest has its maximum length."""
        longest = self.max_encoder_tokens
        sizes = (*(b for b in sorted(buckets) if b < longest), longest)
        text = -(-self.max_decoder_tokens // DECODER_STEP) * DECODER_STEP
        return Shapes(sizes, (text,) * len(sizes), self.max_decoder_tokens, self.latents)


@dataclass(frozen=True)
class Split(Sequence[TokenRow]):
    """The rows of one epoch, created on access."""

    whole: Continued
    epoch: int

    def __len__(self) -> int:
        return len(self.whole)

    @cached_property
    def heads(self) -> np.ndarray:
        """Encoder tokens read of each text with its prefix, without the special ones."""
        most, prefix = self.whole.ids.lengths - 1, self.whole.prefixes
        least = np.clip(LEAST - sum(map(len, self.whole.around)), prefix + 1, most)
        chance = np.random.default_rng((self.whole.seed, self.epoch)).random(len(most))
        return least + (chance * (most - least + 1)).astype(int)

    @property
    def lengths(self) -> np.ndarray:
        """Encoder tokens of each row, with the special ones."""
        return self.heads + sum(map(len, self.whole.around))

    def parts(self, i: int) -> tuple[str, str]:
        """The prefix of a text that the encoder reads, and the rest."""
        cut = self.whole.begins[i][self.heads[i]]
        return self.whole.texts[i][:cut], self.whole.texts[i][cut:]

    def __getitem__(self, i: int) -> TokenRow:
        tokenizers, limit = self.whole.tokenizers, self.whole.max_decoder_tokens
        before, after = self.whole.around
        ids = [*before, *self.whole.ids[i][: self.heads[i]], *after]
        rest = self.parts(i)[1]
        target, = tokenizers.encode_texts([rest[: 16 * limit]])
        if len(target) < limit + SPARE and len(rest) > 16 * limit:
            target, = tokenizers.encode_texts([rest])
        return TokenRow(ids, [], target[:limit], self.whole.latents)


def tokenize_texts(
    examples: Sequence[Example], tokenizers: Tokenizers, *, max_encoder_tokens: int,
    max_decoder_tokens: int, seed: int, latents: int = 0,
) -> Continued:
    """Texts ready to be split, of at most `max_encoder_tokens` with special tokens and prefix.

    Raises:
      InputError: no text has two tokens, the limit leaves no room for them, the encoder's
        tokenizer does not give the offsets of its tokens, or texts of several languages and an
        encoder that is told which.
    """
    if not tokenizers.encoder.is_fast:
        raise InputError("unlabelled text needs an encoder tokenizer with offsets (a "
                         "tokenizer.json)")
    if tokenizers.languages and len({example.language for example in examples}) > 1:
        raise InputError("unlabelled text in several languages needs an encoder that is not told "
                         "the language of a text: choose one language as data.language")
    texts, ids, begins, short = [], Ragged(), Ragged(), 0
    around, prefix = tokenizers.around_query(examples[0].language), tokenizers.query_prefix
    room = max_encoder_tokens - sum(map(len, around)) + 1
    for part in in_parts(examples):
        encoded = tokenizers.encoder([prefix + example.query for example in part],
                                     add_special_tokens=False, return_offsets_mapping=True)
        for example, tokens, offsets in zip(part, encoded["input_ids"], encoded["offset_mapping"],
                                            strict=True):
            # A token may span the prefix's last space and the text's first word.
            starts = [-1 if end <= len(prefix) and prefix else max(start - len(prefix), 0)
                      for start, end in offsets[:room]]
            if not any(start > 0 for start in starts):
                short += 1
                continue
            texts.append(example.query)
            ids.append(tokens[:room])
            begins.append(starts)
    if not texts:
        raise InputError(f"none of the {short} texts has two encoder tokens within "
                         f"data.max_encoder_tokens = {max_encoder_tokens}: nothing to split")
    return Continued(texts, ids, begins, short, tokenizers, around, max_encoder_tokens,
                     max_decoder_tokens, seed, latents)
