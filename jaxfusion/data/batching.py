"""Examples → token rows → batches of a few fixed shapes. NumPy only, deterministic."""

import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.nn.bridge import Batch

PART = 256  # examples tokenized at a time: a tokenizer allocates 150 bytes per token
PROGRESS_SECONDS = 10  # between two log lines on progress
logger = logging.getLogger(__name__)
DECODER_STEP = 8  # text lengths are rounded up to a multiple of this, to keep shapes few


@dataclass(frozen=True)
class TokenRow:
    """One example as ids.

    Attributes:
      query: the encoder's ids; empty for the bare LLM.
      text: decoder ids between prefix and answer.
      target: answer ids and EOS; empty if the answer is to be generated.
      latents: prefix slots of a resampler; 0: one slot for each id of the query.
    """

    query: list[int]
    text: list[int]
    target: list[int]
    latents: int = 0

    @property
    def prefix(self) -> int:
        """Decoder slots before the text, including the end vector."""
        return (self.latents or len(self.query)) + 1 if self.query else 0


class Ragged(Sequence[list[int]]):
    """Rows of ids, concatenated in one array of 4 bytes per id; a list takes 8 to 36."""

    def __init__(self):
        self.ids, self.ends = array("i"), array("q", [0])

    def append(self, ids: Sequence[int]) -> None:
        """Adds a row."""
        self.ids.extend(ids)
        self.ends.append(len(self.ids))

    @property
    def lengths(self) -> np.ndarray:
        """Number of ids in each row. [N]"""
        return np.diff(np.array(self.ends))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> list[int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.ids[self.ends[i] : self.ends[i + 1]].tolist()


class TokenRows(Sequence[TokenRow]):
    """Rows in compact storage; each TokenRow is created on access."""

    def __init__(self, latents: int = 0):
        self.queries, self.texts, self.targets = Ragged(), Ragged(), Ragged()
        self.latents = latents

    def append(self, query: list[int], text: list[int], target: list[int]) -> None:
        """Adds a row."""
        for part, ids in ((self.queries, query), (self.texts, text), (self.targets, target)):
            part.append(ids)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return TokenRow(self.queries[i], self.texts[i], self.targets[i], self.latents)


def lengths_of(rows: Sequence[TokenRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of ids in the query, text and target of each row: three times [N]."""
    if isinstance(rows, TokenRows):
        return rows.queries.lengths, rows.texts.lengths, rows.targets.lengths
    lengths = [(len(row.query), len(row.text), len(row.target)) for row in rows]
    return tuple(np.array(lengths, np.int64).reshape(-1, 3).T)


# The examples in each row of a batch, and the batch's shape.
BatchLayout = tuple[list[list[TokenRow]], "BatchShape"]


@dataclass(frozen=True)
class Cut:
    """How many examples were truncated, and the limits."""

    queries: int
    texts: int
    targets: int
    max_encoder_tokens: int
    max_decoder_tokens: int
    max_total_tokens: int | None = None

    def __str__(self) -> str:
        queries = f"cut: {self.queries} queries at {self.max_encoder_tokens} encoder tokens, "
        if self.max_total_tokens is not None:
            return (f"{queries}{self.texts} prompts at {self.max_decoder_tokens} decoder tokens, "
                    f"{self.targets} targets at {self.max_total_tokens} tokens with their queries")
        return (f"{queries}{self.texts} prompts and {self.targets} targets at "
                f"{self.max_decoder_tokens} decoder tokens")

    @property
    def any(self) -> bool:
        """Whether any example was truncated."""
        return self.queries + self.texts + self.targets > 0


def tokenize(
    examples: Sequence[Example],
    tokenizers: Tokenizers,
    *,
    text_prompt: str,
    max_encoder_tokens: int,
    max_decoder_tokens: int,
    with_target: bool,
    max_total_tokens: int | None = None,
    keeps_end: bool = False,
    latents: int = 0,
) -> tuple[TokenRows, Cut]:
    """Rows of a bridge: `start + prefix + end + text prompt + target + EOS`.

    Args:
      text_prompt: the text after the prefix; `{query}` is replaced by the encoder's text.
      max_encoder_tokens: limit of the query; truncation keeps the prefix and special tokens.
      max_decoder_tokens: limit of the text prompt, truncated at its beginning, and of the target
        with its EOS.
      with_target: False leaves the target empty, for generation.
      max_total_tokens: limit of query and target together; replaces the target's limit.
      keeps_end: whether a query is truncated at its beginning.
      latents: of the bridge.
    """
    rows, cut = TokenRows(latents), np.zeros(3, int)
    for part in in_parts(examples):
        prompts = [text_prompt.replace("{query}", example.query) for example in part]
        languages = [example.language for example in part]
        queries = tokenizers.encode_queries([example.query for example in part], languages)
        texts = _each_once(tokenizers.encode_prompts, prompts)
        targets = [[] for _ in part]
        if with_target:
            answers = _each_once(tokenizers.encode_answers, prompts,
                                 [example.target for example in part])
            targets = [[*answer, *tokenizers.ending] for answer in answers]
        for query, text, target, language in zip(queries, texts, targets, languages, strict=True):
            length = len(query)
            if length > max_encoder_tokens:
                query = _shortened(query, tokenizers.kept_of_query(language), max_encoder_tokens,
                                   keeps_end)
            limit = (max_decoder_tokens if max_total_tokens is None
                     else max(0, max_total_tokens - len(query) - len(tokenizers.start)))
            cut += (length > max_encoder_tokens, len(text) > max_decoder_tokens,
                    len(target) > limit)
            rows.append(query, text[-max_decoder_tokens:], target[:limit])
    return rows, Cut(*cut.tolist(), max_encoder_tokens, max_decoder_tokens, max_total_tokens)


def _shortened(
    query: list[int], kept_around: tuple[int, int], limit: int, keeps_end: bool
) -> list[int]:
    """A query of `limit` tokens with those around its text; the text's beginning goes if it
    `keeps_end`, else its end."""
    before, after = kept_around
    text = query[before : len(query) - after]
    room = max(limit - before - after, 0)
    kept = text[len(text) - room :] if keeps_end else text[:room]
    return [*query[:before], *kept, *query[len(query) - after :]][:limit]


def in_parts(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Examples in parts of `PART`: a fast tokenizer encodes a part in parallel, and its output is
    large. Logs progress every `PROGRESS_SECONDS`."""
    begin = reported = time.monotonic()
    for start in range(0, len(examples), PART):
        now = time.monotonic()
        if start and now - reported > PROGRESS_SECONDS:
            reported, speed = now, start / (now - begin)
            logger.info("%s of %s rows tokenized, %s rows/s, %.0f s left", f"{start:,}",
                        f"{len(examples):,}", f"{speed:,.0f}", (len(examples) - start) / speed)
        yield examples[start : start + PART]


def _each_once(encode, *columns: list[str]) -> list[list[int]]:
    """Ids of every row; equal rows are encoded once, as distinct prompts and labels are few."""
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
) -> tuple[TokenRows, Cut]:
    """Rows of the bare LLM: `start + query + target + EOS`.

    A query that is too long is truncated at its beginning, so it still ends in its `Label:`.

    Args:
      with_target: False leaves the target empty, for generation.
    """
    rows, too_long = TokenRows(), 0
    for part in in_parts(examples):
        queries = [example.query for example in part]
        texts, targets = tokenizers.encode_bare(queries), [[] for _ in part]
        if with_target:
            answers = tokenizers.encode_answers(queries, [example.target for example in part])
            targets = [[*answer, *tokenizers.ending] for answer in answers]
        for text, target in zip(texts, targets, strict=True):
            too_long += len(text) > max_decoder_tokens
            rows.append([], text[-max_decoder_tokens:], target)
    return rows, Cut(0, too_long, 0, 0, max_decoder_tokens)


@dataclass(frozen=True)
class BatchShape:
    """The sizes of one batch: rows, and encoder, decoder and target slots of a row."""

    rows: int
    slots: int
    length: int
    targets: int


@dataclass(frozen=True)
class Shapes:
    """The batch shapes of a set of rows, one example per row, by length bucket.

    Attributes:
      buckets: encoder lengths, ascending.
      texts: decoder slots for text and target, for each bucket.
      targets: slots for targets.
      latents: of the rows.
    """

    buckets: tuple[int, ...]
    texts: tuple[int, ...]
    targets: int
    latents: int = 0

    def bucket(self, row: TokenRow) -> int:
        """Index of the smallest bucket that fits the row."""
        fits = zip(self.buckets, self.texts, strict=True)
        return next(
            i for i, (query, text) in enumerate(fits)
            if len(row.query) <= query and len(row.text) + len(row.target) <= text
        )

    def buckets_of(self, rows: Sequence[TokenRow]) -> np.ndarray:
        """`bucket` of every row. [N]"""
        queries, texts, targets = lengths_of(rows)
        # The first bucket that fits the query, and the first that fits the rest: texts ascend.
        return np.maximum(np.searchsorted(self.buckets, queries),
                          np.searchsorted(self.texts, texts + targets))

    def place(self, rows: Sequence[TokenRow], before: int, batch_size: int) -> BatchLayout:
        """One example per row, in the smallest shape that fits all of them."""
        index = max(self.bucket(row) for row in rows)
        slots = self.buckets[index]
        length = before + (self.latents or slots) + (1 if slots else 0) + self.texts[index]
        return [[row] for row in rows], BatchShape(batch_size, slots, length, self.targets)


def find_shapes(rows: Sequence[TokenRow], buckets: Sequence[int]) -> Shapes:
    """Shapes that fit all rows, without empty buckets."""
    queries, texts, targets = lengths_of(rows)
    longest = int(queries.max())
    sizes = sorted({*(b for b in buckets if b < longest), _first_at_least(buckets, longest)})
    used, slots, text = [], [], 0
    for low, high in zip([-1, *sizes], sizes, strict=False):
        inside = (texts + targets)[(low < queries) & (queries <= high)]
        if len(inside):
            text = max(text, int(inside.max()))
            used.append(high)
            slots.append(-(-text // DECODER_STEP) * DECODER_STEP)
    return Shapes(tuple(used), tuple(slots), max(1, int(targets.max())), rows[0].latents)


def find_bare_shapes(rows: Sequence[TokenRow], buckets: Sequence[int]) -> Shapes:
    """Shapes of rows without a prefix: buckets of text lengths."""
    lengths = np.unique(lengths_of(rows)[1]).tolist()
    texts = tuple(sorted({_first_at_least(buckets, length) for length in lengths}))
    return Shapes((0,) * len(texts), texts, 1)


def _first_at_least(buckets: Sequence[int], length: int) -> int:
    return min((b for b in buckets if b >= length), default=length)


def round_length(length: int) -> int:
    """The length rounded up to one of few: 1 to 8, then four for every doubling (10, 12, 14, 16,
    20 …)."""
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step


def length_buckets(longest: int, first: int = 32) -> tuple[int, ...]:
    """32, 40, 48, 56, 64, 80 … below `longest`, four for every doubling, then `longest`."""
    buckets, size = [], first
    while size < longest:
        buckets.append(size)
        size = round_length(size + 1)
    return (*buckets, longest)


def collate(
    groups: Sequence[Sequence[TokenRow]], shape: BatchShape, tokenizers: Tokenizers
) -> Batch:
    """One batch: each group's examples packed into a row, the rest padding."""
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
    """The row numbers of each batch of one epoch: every row once, grouped by bucket.

    Rows are shuffled, grouped by bucket and split into batches; then the batches are shuffled. The
    last batch may be short. The plan depends only on its arguments, so it is the same for any
    number of hosts and after any restart.
    """
    # A repeated grain dataset is reshuffled in each repetition.
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
    """Every row once, for evaluation: row numbers and their batch, largest shapes last. The first
    batch may be short: what fills it up then has the smallest shape."""
    buckets = shapes.buckets_of(rows)
    order = np.argsort(buckets, kind="stable")
    for numbers in np.split(order, range(len(rows) % batch_size, len(rows), batch_size)):
        if len(numbers):
            placed = shapes.place([rows[i] for i in numbers], len(tokenizers.start), batch_size)
            yield numbers, collate(*placed, tokenizers)
