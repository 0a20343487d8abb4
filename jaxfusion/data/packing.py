"""Packs several short examples into one row, so that few slots are padding.

Segments separate the examples of a row; attention, positions and the loss are as for each example
alone. Every batch has one example from each stratum of lengths, so that batches are alike and one
shape fits nearly all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxfusion.data.batching import DECODER_STEP, BatchLayout, BatchShape, TokenRow, lengths_of

STEP = 16  # encoder slots are rounded up to a multiple of this
SAMPLE = 512  # examples used to choose the shape, in full batches


@dataclass(frozen=True)
class Packing:
    """How batches are packed.

    Attributes:
      shape: of nearly every batch; one that does not fit gets more rows and another compilation.
      multiple: the number of rows is a multiple of this, so that devices get equal shares.
    """

    shape: BatchShape
    multiple: int = 1

    def place(self, rows: Sequence[TokenRow], before: int, batch_size: int) -> BatchLayout:
        """Packs the examples first-fit, longest first."""
        groups = pack(rows, self.shape, before)
        rows_needed = _round_up(max(self.shape.rows, len(groups)), self.multiple)
        return groups, replace(self.shape, rows=rows_needed)

    def shape_for(self, rows: Sequence[TokenRow], before: int) -> BatchShape:
        """The shape of a batch of these examples."""
        return self.place(rows, before, len(rows))[1]


def sizes(row: TokenRow, before: int) -> np.ndarray:
    """Encoder, decoder and target slots of an example."""
    decoder = before + row.prefix + len(row.text) + len(row.target)
    return np.array([len(row.query), decoder, len(row.target)])


def pack(rows: Sequence[TokenRow], shape: BatchShape, before: int) -> list[list[TokenRow]]:
    """First-fit-decreasing bin packing into rows of `shape`, whose number of rows is ignored."""
    room: list[np.ndarray] = []
    groups: list[list[TokenRow]] = []
    for row in sorted(rows, key=lambda row: len(row.query), reverse=True):
        size = sizes(row, before)
        fits = (i for i, free in enumerate(room) if (size <= free).all())
        i = next(fits, None)
        if i is None:
            room.append(np.array([shape.slots, shape.length, shape.targets]))
            groups.append([])
            i = len(groups) - 1
        room[i] -= size
        groups[i].append(row)
    return groups


def find_packing(
    rows: Sequence[TokenRow], batch_size: int, before: int, seed: int, longest_row: int,
    multiple: int = 1,
) -> Packing:
    """The packing with the least work, averaged over a sample of batches.

    Args:
      longest_row: most encoder slots of a row (raised to the longest example's if smaller).
    """
    queries, texts, targets = lengths_of(rows)
    plan = stratified_plan(queries, batch_size, seed, epoch=0)
    batches = [[rows[i] for i in numbers] for numbers in plan[: max(1, SAMPLE // batch_size)]]
    # Every example must fit into an empty row.
    prefix = np.where(queries > 0, (rows[0].latents or queries) + 1, 0)
    least = np.array([x.max() for x in (queries, before + prefix + texts + targets, targets)])
    first, last = (_round_up(n, STEP) for n in (least[0], max(least[0], longest_row)))
    shapes = [
        shape for slots in range(first, last + 1, STEP)
        for shape in _candidates(batches, slots, least, before)
    ]
    packings = [Packing(shape, multiple) for shape in shapes]
    work = [np.mean([_work(packing.shape_for(rows, before)) for rows in batches])
            for packing in packings]
    return packings[int(np.argmin(work))]


def _candidates(
    batches: list[list[TokenRow]], slots: int, least: np.ndarray, before: int
) -> list[BatchShape]:
    """Shapes with `slots` encoder slots, and decoder slots for all rows or only for most."""
    packed = [pack(rows, BatchShape(0, slots, 10**9, 10**9), before) for rows in batches]
    used = [sum(sizes(row, before) for row in group) for groups in packed for group in groups]
    targets = int(max(least[2], np.max(used, axis=0)[2]))
    lengths = np.maximum(np.quantile(used, [0.5, 0.8, 1.0], axis=0)[:, 1], least[1])
    count = int(np.median([len(groups) for groups in packed]))
    return [
        BatchShape(count, slots, _round_up(length, DECODER_STEP), targets)
        for length in set(lengths)
    ]


def _work(shape: BatchShape) -> float:
    """Slots, plus a surcharge for attention, whose cost per slot grows with the row."""
    return shape.rows * sum(n * (1 + n / 2048) for n in (shape.slots, shape.length))


def _round_up(n: float, step: int) -> int:
    return -(-int(n) // step) * step


def stratified_plan(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """The row numbers of each batch of one epoch: every row once, batches alike in lengths.

    Rows are sorted by length and divided into `batch_size` strata; each batch gets a random row of
    every stratum. If the rows do not divide evenly, some batches lack one of the shortest stratum.
    """
    rng = np.random.default_rng((seed, epoch))
    n = len(lengths)
    batches = -(-n // batch_size)
    order = rng.permutation(n)
    order = order[np.argsort(-lengths[order], kind="stable")]
    strata = [rng.permutation(order[i : i + batches]) for i in range(0, n, batches)]
    plan = [np.array([s[j] for s in strata if j < len(s)]) for j in range(batches)]
    return [plan[i] for i in rng.permutation(batches)]
