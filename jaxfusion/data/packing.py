"""Several short examples in one row, so that hardly a slot is padding.

Examples of a row are told apart by their segment; attention, positions and the loss are those of
each example alone. Every batch holds one example of each stratum of lengths, so that batches are
alike and one shape serves nearly all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxfusion.data.batching import Placed, Shape, TokenRow

STEP = 16  # slots are rounded up to this
SAMPLE = 32  # batches that the shape is chosen on


@dataclass(frozen=True)
class Packing:
    """How a batch is packed.

    Attributes:
      shape: of nearly every batch; one that does not fit takes more rows, and compiles once more.
    """

    shape: Shape

    def place(self, rows: Sequence[TokenRow], bos: int, batch_size: int) -> Placed:
        """The examples first-fit, longest first."""
        groups = pack(rows, self.shape, bos)
        return groups, replace(self.shape, rows=max(self.shape.rows, len(groups)))


def sizes(row: TokenRow, bos: int) -> np.ndarray:
    """Encoder, decoder and target slots that an example takes."""
    prefix = len(row.query) + 1 if row.query else 0
    decoder = bos + prefix + len(row.text) + len(row.target)
    return np.array([len(row.query), decoder, len(row.target)])


def pack(rows: Sequence[TokenRow], shape: Shape, bos: int) -> list[list[TokenRow]]:
    """First-fit-decreasing bin packing into rows of `shape` (its number of rows aside)."""
    room: list[np.ndarray] = []
    groups: list[list[TokenRow]] = []
    for row in sorted(rows, key=lambda row: len(row.query), reverse=True):
        size = sizes(row, bos)
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
    rows: Sequence[TokenRow], batch_size: int, bos: int, seed: int, longest_row: int
) -> Packing:
    """The shape with the least work on a sample of batches.

    Args:
      longest_row: encoder slots of a row at most (but never fewer than the longest example has).
    """
    plan = stratified_plan(np.array([len(r.query) for r in rows]), batch_size, seed, epoch=0)
    batches = [[rows[i] for i in numbers] for numbers in plan[:SAMPLE]]
    least = _round_up(max(len(row.query) for row in rows))
    candidates = [
        _tight_shape(batches, slots, bos)
        for slots in range(least, max(least, _round_up(longest_row)) + 1, STEP)
    ]
    # No example may be too large for an empty row.
    most = np.max([sizes(row, bos) for row in rows], axis=0)
    candidates = [
        replace(shape, length=max(shape.length, int(most[1])),
                targets=max(shape.targets, int(most[2])))
        for shape in candidates
    ]
    return Packing(min(candidates, key=_work))


def _tight_shape(batches: list[list[TokenRow]], slots: int, bos: int) -> Shape:
    """The smallest shape with that many encoder slots that holds the batches."""
    unlimited = Shape(0, slots, 10**9, 10**9)
    packed = [pack(rows, unlimited, bos) for rows in batches]
    used = np.max(
        [sum(sizes(row, bos) for row in group) for groups in packed for group in groups], axis=0
    )
    length = -(-int(used[1]) // 8) * 8
    return Shape(max(map(len, packed)), slots, length, int(used[2]))


def _work(shape: Shape) -> float:
    """Slots, with a surcharge for attention, whose work per slot grows with the row."""
    return shape.rows * sum(n * (1 + n / 2048) for n in (shape.slots, shape.length))


def _round_up(n: int) -> int:
    return -(-n // STEP) * STEP


def stratified_plan(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Which rows make which batch of one epoch: every row once, each batch alike in lengths.

    Rows are sorted by length and cut into `batch_size` strata; each batch gets a random row of
    every stratum. Where the rows do not divide, some batches lack one of the shortest stratum.
    """
    rng = np.random.default_rng((seed, epoch))
    n = len(lengths)
    batches = -(-n // batch_size)
    order = rng.permutation(n)
    order = order[np.argsort(-lengths[order], kind="stable")]
    strata = [rng.permutation(order[i : i + batches]) for i in range(0, n, batches)]
    plan = [np.array([s[j] for s in strata if j < len(s)]) for j in range(batches)]
    return [plan[i] for i in rng.permutation(batches)]
