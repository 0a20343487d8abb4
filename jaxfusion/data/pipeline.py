"""The training input: a grain dataset of batches, independent of hosts and restarts."""

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
from jaxfusion.fields import TrainConfig
from jaxfusion.nn.bridge import Batch


def subset(
    examples: list[Example], limit: int | None, balanced: bool, seed: int
) -> list[Example]:
    """A seeded sample without replacement; `balanced` draws the same number from every class.

    Raises:
      InputError: there are fewer rows than the limit.
    """
    if limit is None:
        return examples
    order = np.random.default_rng(seed).permutation(len(examples))
    if balanced:
        classes = sorted({example.label for example in examples})
        share = _share(limit, len(classes))
        by_class = [[i for i in order if examples[i].label == c][:share] for c in classes]
        few, least = min(zip(map(len, by_class), classes, strict=True))
        if few < share:
            raise InputError(
                f"data.train_rows is {limit} and data.balanced takes {share} rows of each class, "
                f"but there are {few} of class {least}; set data.train_rows to "
                f"{few * len(classes)} or less, or take all rows with data.balanced=False and "
                f"data.train_rows={len(examples)}")
        chosen = sorted(i for rows in by_class for i in rows)
    elif limit > len(examples):
        raise InputError(f"data.train_rows is {limit}, but there are only {len(examples)} rows; "
                         f"set it to {len(examples)} for all of them")
    else:
        chosen = sorted(order[:limit])
    return [examples[i] for i in chosen]


def _share(limit: int, classes: int) -> int:
    """Rows per class."""
    if limit < classes:
        raise InputError(f"train_rows={limit}, balanced: expected at least one row for each of the "
                         f"{classes} classes")
    return limit // classes


def first_rows(
    examples: Iterable[Example], limit: int, classes: int, balanced: bool
) -> list[Example]:
    """The first rows of a stream; `balanced`: the first of each class, in equal numbers.

    Reads no further than it must, so the rows are not a random sample.

    Raises:
      InputError: the stream ends too early.
    """
    balanced = balanced and classes > 0
    share = _share(limit, classes) if balanced else limit
    room = Counter(dict.fromkeys(range(classes) if balanced else [-1], share))
    chosen = []
    for example in examples:
        key = example.label if balanced else -1
        if room[key] > 0:
            room[key] -= 1
            chosen.append(example)
        if not +room:
            return chosen
    raise InputError(f"data.train_rows is {limit}, but the stream ended after {len(chosen)} rows"
                     + (f", with too few of class {next(iter(+room))}" if balanced else "")
                     + "; set it lower")


class Batches:
    """All training batches by step number, as a grain random-access source.

    Each host builds its own rows of each global batch; all hosts follow the same plan.

    Args:
      place: sharding of a batch's rows; None builds all rows on this host.
      fill: adds to a batch what is known of its texts.
    """

    def __init__(
        self, rows: Sequence[TokenRow] | Continued, layout: Shapes | Packing,
        tokenizers: Tokenizers, batch_size: int, seed: int, steps: int,
        place: jax.sharding.Sharding | None = None,
        fill: Callable[[Batch], Batch] | None = None,
    ):
        self.place, self.fill = place, fill
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
        """The rows of an epoch, and the row numbers of each batch."""
        plan = stratified_plan if isinstance(self.layout, Packing) else epoch_plan
        rows, keys = self.rows, self.keys
        if isinstance(rows, Continued):  # split differently in each epoch
            rows = rows.at(epoch)
            keys = np.searchsorted(self.layout.buckets, rows.lengths)
        return rows, plan(keys, self.batch_size, self.seed, epoch)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.per_epoch)
        rows, plan = self.epoch(epoch)
        rows = [rows[i] for i in plan[number]]
        # The shape depends on the global batch, so that all hosts agree on it.
        groups, shape = self.layout.place(rows, len(self.tokenizers.start), self.batch_size)
        groups += [[]] * (shape.rows - len(groups))
        own = own_rows(shape.rows, self.place)
        batch = collate([groups[i] for i in own], replace(shape, rows=len(own)), self.tokenizers)
        return batch if self.fill is None else self.fill(batch)


def own_rows(rows: int, place: jax.sharding.Sharding | None) -> np.ndarray:
    """The global batch's row numbers on this host's devices, ascending."""
    if place is None:
        return np.arange(rows)
    own = {index[0].indices(rows)[:2]
           for index in place.addressable_devices_indices_map((rows,)).values()}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(own)])


def total_steps(train: TrainConfig, rows: int) -> int:
    """Steps of a run on this number of rows."""
    return train.steps or train.epochs * steps_per_epoch(rows, train.batch_size)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in an epoch; the last may be short."""
    return -(-rows // batch_size)


def iterate(
    batches: Batches, put: Callable[[Any], Any] = lambda batch: batch
) -> grain.DatasetIterator:
    """An iterator whose state can be saved and restored; prefetched batches do not count.

    Args:
      put: transfers a host's batch to the devices; called in a thread, one batch ahead.
    """
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    data = grain.MapDataset.source(batches).to_iter_dataset(options).map(put)
    return iter(grain.experimental.ThreadPrefetchIterDataset(data, prefetch_buffer_size=1))


def batches_taken(position: dict[str, Any]) -> int:
    """The number of batches consumed at an iterator's saved state."""
    return position["next_index"]
