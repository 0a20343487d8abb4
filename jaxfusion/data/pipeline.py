"""The training input: a grain dataset of batches, the same whatever the hosts and restarts."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import grain
import jax
import numpy as np

from jaxfusion.data.batching import Shapes, TokenRow, collate, epoch_plan, lengths_of
from jaxfusion.data.packing import Packing, stratified_plan
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.split_text import Continued
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.nn.bridge import Batch


def subset(
    examples: list[Example], limit: int | None, balanced: bool, seed: int
) -> list[Example]:
    """A seeded sample without replacement; `balanced` draws the same number from every class.

    Raises:
      InputError: the limit is larger than what is there.
    """
    if limit is None:
        return examples
    order = np.random.default_rng(seed).permutation(len(examples))
    if balanced:
        classes = sorted({example.label for example in examples})
        share = _share(limit, len(classes))
        taken = [[i for i in order if examples[i].label == c][:share] for c in classes]
        short = [c for c, rows in zip(classes, taken, strict=True) if len(rows) < share]
        if short:
            raise InputError(
                f"train_rows={limit}, balanced: class {short[0]} has fewer than {share} rows"
            )
        chosen = sorted(i for rows in taken for i in rows)
    elif limit > len(examples):
        raise InputError(f"train_rows={limit}, but there are only {len(examples)} rows")
    else:
        chosen = sorted(order[:limit])
    return [examples[i] for i in chosen]


def _share(limit: int, classes: int) -> int:
    """Rows of each class."""
    if limit < classes:
        raise InputError(f"train_rows={limit}, balanced: wanted one row or more of each of the "
                         f"{classes} classes")
    return limit // classes


def first_rows(
    examples: Iterable[Example], limit: int, classes: int, balanced: bool
) -> list[Example]:
    """The first rows of a stream; `balanced`: the first of every class, in equal numbers.

    Reads no further than it must, so what it takes is no random sample.

    Raises:
      InputError: the stream ends before.
    """
    balanced = balanced and classes > 0
    share = _share(limit, classes) if balanced else limit
    room = Counter(dict.fromkeys(range(classes) if balanced else [-1], share))
    taken = []
    for example in examples:
        key = example.label if balanced else -1
        if room[key] > 0:
            room[key] -= 1
            taken.append(example)
        if not +room:
            return taken
    raise InputError(f"train_rows={limit}: the stream has ended after {len(taken)} of the rows "
                     "that are wanted" + (f"; of class {next(iter(+room))} it has too few"
                                          if balanced else ""))


class Batches:
    """All training batches by step number, as grain's random-access source.

    Each host makes its own rows of each global batch; the plan is the same on all of them.

    Args:
      place: of the rows of a batch on the devices; None makes all rows here.
    """

    def __init__(
        self, rows: Sequence[TokenRow] | Continued, layout: Shapes | Packing,
        tokenizers: Tokenizers, batch_size: int, seed: int, steps: int,
        place: jax.sharding.Sharding | None = None,
    ):
        self.place = place
        self.rows, self.layout, self.tokenizers = rows, layout, tokenizers
        self.batch_size, self.seed, self.steps = batch_size, seed, steps
        self.per_epoch = steps_per_epoch(len(rows), batch_size)
        self.epoch = lru_cache(2)(self._epoch)
        self.keys = None
        if isinstance(layout, Packing):
            self.keys = lengths_of(rows)[0]
        elif not isinstance(rows, Continued):
            self.keys = layout.buckets_of(rows)

    def _epoch(self, epoch: int) -> tuple[Sequence[TokenRow], list[np.ndarray]]:
        """The rows of an epoch, and which of them make which batch."""
        plan = stratified_plan if isinstance(self.layout, Packing) else epoch_plan
        rows, keys = self.rows, self.keys
        if isinstance(rows, Continued):  # split anew
            rows = rows.at(epoch)
            keys = np.searchsorted(self.layout.buckets, rows.lengths)
        return rows, plan(keys, self.batch_size, self.seed, epoch)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.per_epoch)
        rows, plan = self.epoch(epoch)
        rows = [rows[i] for i in plan[number]]
        # All hosts agree on the shape, which only the whole batch tells.
        groups, shape = self.layout.place(rows, len(self.tokenizers.start), self.batch_size)
        groups += [[]] * (shape.rows - len(groups))
        own = own_rows(shape.rows, self.place)
        return collate([groups[i] for i in own], replace(shape, rows=len(own)), self.tokenizers)


def own_rows(rows: int, place: jax.sharding.Sharding | None) -> np.ndarray:
    """The numbers of a global batch's rows that lie on this host's devices, ascending."""
    if place is None:
        return np.arange(rows)
    own = {index[0].indices(rows)[:2]
           for index in place.addressable_devices_indices_map((rows,)).values()}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(own)])


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in an epoch; the last may be short."""
    return -(-rows // batch_size)


def iterate(
    batches: Batches, put: Callable[[Any], Any] = lambda batch: batch
) -> grain.DatasetIterator:
    """An iterator whose state can be saved and set: of the batches taken, not of those read ahead.

    Args:
      put: what makes a host's batch one on the devices: done in a thread, a batch ahead.
    """
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    data = grain.MapDataset.source(batches).to_iter_dataset(options).map(put)
    return iter(grain.experimental.ThreadPrefetchIterDataset(data, prefetch_buffer_size=1))


def batches_taken(position: dict[str, Any]) -> int:
    """How many batches an iterator's saved state has behind it."""
    return position["next_index"]
