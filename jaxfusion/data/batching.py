"""Examples → token rows → batches of a few fixed shapes. NumPy only; everything deterministic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from jaxfusion.data.sources import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.nn.bridge import Batch

DECODER_STEP = 8  # text lengths are rounded up to this, so that shapes stay few


@dataclass(frozen=True)
class TokenRow:
    """One example as ids.

    Attributes:
      query: the encoder's ids; empty for the bare LLM.
      text: decoder ids between prefix and answer.
      target: answer ids and EOS; empty where the answer is to be generated.
      latents: prefix slots of a resampler; 0 where there is one for each id of the query.
    """

    query: list[int]
    text: list[int]
    target: list[int]
    latents: int = 0

    @property
    def prefix(self) -> int:
        """Decoder slots before the text, the end vector counted."""
        return (self.latents or len(self.query)) + 1 if self.query else 0


# The examples of each row of a batch, and the batch's shape.
Placed = tuple[list[list[TokenRow]], "Shape"]


@dataclass(frozen=True)
class Cut:
    """How many examples were longer than a limit and by what limit they were cut."""

    queries: int
    texts: int
    targets: int
    max_encoder_tokens: int
    max_decoder_tokens: int

    def __str__(self) -> str:
        return (
            f"cut: {self.queries} queries at {self.max_encoder_tokens} encoder tokens, "
            f"{self.texts} prompts and {self.targets} targets at "
            f"{self.max_decoder_tokens} decoder tokens"
        )

    @property
    def any(self) -> bool:
        """Whether any example was cut."""
        return self.queries + self.texts + self.targets > 0


def tokenize(
    examples: Sequence[Example],
    tokenizers: Tokenizers,
    *,
    text_prompt: str,
    max_encoder_tokens: int,
    max_decoder_tokens: int,
    with_target: bool,
    latents: int = 0,
) -> tuple[list[TokenRow], Cut]:
    """Rows of a bridge: `start + prefix + end + text prompt + target + EOS`.

    Args:
      text_prompt: what follows the prefix; `{query}` is replaced by the encoder's text.
      max_encoder_tokens: of the query; its end token is kept when it is cut.
      max_decoder_tokens: of the text prompt, whose end is kept, and of the target with its EOS.
      with_target: False leaves the answer to be generated.
      latents: the bridge's.
    """
    prompts = [text_prompt.replace("{query}", example.query) for example in examples]
    queries = tokenizers.encode_queries([example.query for example in examples])
    texts = _each_once(tokenizers.encode_prompts, prompts)
    targets = [[] for _ in examples]
    if with_target:
        answers = _each_once(tokenizers.encode_answers, prompts,
                             [example.target for example in examples])
        targets = [[*answer, tokenizers.eos] for answer in answers]
    cut = Cut(
        sum(len(query) > max_encoder_tokens for query in queries),
        sum(len(text) > max_decoder_tokens for text in texts),
        sum(len(target) > max_decoder_tokens for target in targets),
        max_encoder_tokens, max_decoder_tokens,
    )
    rows = [
        TokenRow(
            query if len(query) <= max_encoder_tokens
            else [*query[: max_encoder_tokens - 1], query[-1]],
            text[-max_decoder_tokens:], target[:max_decoder_tokens], latents,
        )
        for query, text, target in zip(queries, texts, targets, strict=True)
    ]
    return rows, cut


def _each_once(encode, *columns: list[str]) -> list[list[int]]:
    """Ids of every row; prompts and labels are few, and rows that are equal are encoded once."""
    rows = list(zip(*columns, strict=True))
    if not rows:
        return []
    distinct = list(dict.fromkeys(rows))
    ids = encode(*(list(column) for column in zip(*distinct, strict=True)))
    known = dict(zip(distinct, ids, strict=True))
    return [known[row] for row in rows]


def tokenize_bare(
    examples: Sequence[Example], tokenizers: Tokenizers, max_decoder_tokens: int,
    with_target: bool = False,
) -> tuple[list[TokenRow], Cut]:
    """Rows of the bare LLM: `start + query + target + EOS`.

    A query that is too long loses its beginning, so that it still ends in its `Label:`.

    Args:
      with_target: False leaves the answer to be generated.
    """
    queries = [example.query for example in examples]
    texts, targets = tokenizers.encode_bare(queries), [[] for _ in examples]
    if with_target:
        answers = tokenizers.encode_answers(queries, [example.target for example in examples])
        targets = [[*answer, tokenizers.eos] for answer in answers]
    too_long = sum(len(text) > max_decoder_tokens for text in texts)
    rows = [TokenRow([], text[-max_decoder_tokens:], target)
            for text, target in zip(texts, targets, strict=True)]
    return rows, Cut(0, too_long, 0, 0, max_decoder_tokens)


@dataclass(frozen=True)
class Shape:
    """The sizes of one batch: rows, encoder slots, decoder slots and target slots of a row."""

    rows: int
    slots: int
    length: int
    targets: int


@dataclass(frozen=True)
class Shapes:
    """The few batch shapes of a set of rows, one example in each: by buckets of lengths.

    Attributes:
      buckets: encoder lengths, ascending.
      texts: for each bucket the slots for text and target in the decoder.
      targets: slots for targets.
      latents: of the rows.
    """

    buckets: tuple[int, ...]
    texts: tuple[int, ...]
    targets: int
    latents: int = 0

    def bucket(self, row: TokenRow) -> int:
        """Index of the smallest bucket that holds the row."""
        fits = zip(self.buckets, self.texts, strict=True)
        return next(
            i for i, (query, text) in enumerate(fits)
            if len(row.query) <= query and len(row.text) + len(row.target) <= text
        )

    def place(self, rows: Sequence[TokenRow], before: int, batch_size: int) -> Placed:
        """Each example in a row of its own, in the smallest shape that holds all of them."""
        index = max(self.bucket(row) for row in rows)
        slots = self.buckets[index]
        length = before + (self.latents or slots) + (1 if slots else 0) + self.texts[index]
        return [[row] for row in rows], Shape(batch_size, slots, length, self.targets)


def find_shapes(rows: Sequence[TokenRow], buckets: Sequence[int]) -> Shapes:
    """Shapes that hold all rows, leaving out buckets that would stay empty."""
    longest = max(len(row.query) for row in rows)
    sizes = sorted({*(b for b in buckets if b < longest), _first_at_least(buckets, longest)})
    used, texts, text = [], [], 0
    for low, high in zip([-1, *sizes], sizes, strict=False):
        held = [len(r.text) + len(r.target) for r in rows if low < len(r.query) <= high]
        if held:
            text = max(text, *held)
            used.append(high)
            texts.append(-(-text // DECODER_STEP) * DECODER_STEP)
    targets = max(1, *(len(row.target) for row in rows))
    return Shapes(tuple(used), tuple(texts), targets, rows[0].latents)


def find_bare_shapes(rows: Sequence[TokenRow], buckets: Sequence[int]) -> Shapes:
    """Shapes of rows without prefix: buckets of text lengths."""
    lengths = [len(row.text) for row in rows]
    texts = tuple(sorted({_first_at_least(buckets, length) for length in lengths}))
    return Shapes((0,) * len(texts), texts, 1)


def _first_at_least(buckets: Sequence[int], length: int) -> int:
    return min((b for b in buckets if b >= length), default=length)


def doubling_buckets(longest: int, first: int = 64) -> tuple[int, ...]:
    """64, 128, 256 … up to and including `longest`."""
    buckets = [longest]
    size = first
    while size < longest:
        buckets.append(size)
        size *= 2
    return tuple(sorted(buckets))


def collate(
    groups: Sequence[Sequence[TokenRow]], shape: Shape, tokenizers: Tokenizers
) -> Batch:
    """One batch: the examples of each group side by side in a row, the rest padding."""
    encoder, decoder = (shape.rows, shape.slots), (shape.rows, shape.length)
    target = (shape.rows, shape.targets)
    ints = partial(np.zeros, dtype=np.int32)
    batch = Batch(
        enc_tokens=ints(encoder), enc_segments=ints(encoder),
        dec_tokens=ints(decoder), dec_source=ints(decoder) - 1,
        dec_positions=ints(decoder), dec_segments=ints(decoder),
        target_slots=ints(target), target_tokens=ints(target),
        target_mask=np.zeros(target, bool),
    )
    for i, group in enumerate(groups):
        start = (0, 0, 0)
        for segment, row in enumerate(group, start=1):
            start = _fill(batch, i, segment, start, row, tokenizers.start)
    return batch


def _fill(
    batch: Batch, i: int, segment: int, start: tuple[int, int, int], row: TokenRow,
    before: list[int],
) -> tuple[int, int, int]:
    """Writes one example into row i; returns the first free encoder, decoder and target slot."""
    (e, d, t), n, k = start, len(row.query), len(row.target)
    first, end_slot = (0, row.latents) if row.latents else (e, batch.enc_tokens.shape[1])
    prefix = [*range(first, first + row.prefix - 1), end_slot] if n else []
    tokens = [*before, *([0] * len(prefix)), *row.text, *row.target]
    total = len(tokens)
    batch.enc_tokens[i, e : e + n] = row.query
    batch.enc_segments[i, e : e + n] = segment
    batch.dec_tokens[i, d : d + total] = tokens
    batch.dec_source[i, d + len(before) : d + len(before) + len(prefix)] = prefix
    batch.dec_positions[i, d : d + total] = np.arange(total)
    batch.dec_segments[i, d : d + total] = segment
    batch.target_slots[i, t : t + k] = np.arange(d + total - k - 1, d + total - 1)
    batch.target_tokens[i, t : t + k] = row.target
    batch.target_mask[i, t : t + k] = True
    return e + n, d + total, t + k


def epoch_plan(buckets: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Which rows make which batch of one epoch: every row once, rows of a bucket together.

    Rows are shuffled, grouped by bucket, cut into batches, and the batches shuffled again; the
    last one may be short. It depends on nothing but its arguments, so any number of hosts and
    any place to resume from see the same batches.
    """
    # A shuffled grain dataset, repeated, shuffles each repetition anew.
    n = len(buckets)
    shuffled = grain.MapDataset.range(n).shuffle(seed=seed).repeat()
    order = np.fromiter((shuffled[i] for i in range(epoch * n, (epoch + 1) * n)), np.int64, n)
    order = order[np.argsort(buckets[order], kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    shuffled = grain.MapDataset.range(len(batches)).shuffle(seed=seed + 1).repeat()
    start = epoch * len(batches)
    return [batches[shuffled[start + i]] for i in range(len(batches))]


def in_order(
    rows: Sequence[TokenRow], shapes: Shapes, tokenizers: Tokenizers, batch_size: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every row once, for evaluation: row numbers and their batch, longest shapes last."""
    buckets = np.array([shapes.bucket(row) for row in rows])
    order = np.argsort(buckets, kind="stable")
    for start in range(0, len(rows), batch_size):
        numbers = order[start : start + batch_size]
        placed = shapes.place([rows[i] for i in numbers], len(tokenizers.start), batch_size)
        yield numbers, collate(*placed, tokenizers)
