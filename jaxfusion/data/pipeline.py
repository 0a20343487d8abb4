"""The training input: a grain dataset of batches, the same whatever the hosts and restarts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import grain
import jax
import numpy as np

from jaxfusion.data.batching import Shapes, TokenRow, collate, epoch_plan
from jaxfusion.data.packing import Packing, stratified_plan
from jaxfusion.data.sources import Example
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
        share = limit // len(classes)
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


class Batches:
    """All training batches by step number, as grain's random-access source.

    Each host makes its own rows of each global batch; the plan is the same on all of them.

    Args:
      place: of the rows of a batch on the devices; None makes all rows here.
    """

    def __init__(
        self, rows: Sequence[TokenRow], layout: Shapes | Packing, tokenizers: Tokenizers,
        batch_size: int, seed: int, steps: int, place: jax.sharding.Sharding | None = None,
    ):
        self.place = place
        self.rows, self.layout, self.tokenizers = rows, layout, tokenizers
        self.batch_size, self.steps = batch_size, steps
        self.per_epoch = steps_per_epoch(len(rows), batch_size)
        if isinstance(layout, Packing):
            plan, keys = stratified_plan, np.array([len(row.query) for row in rows])
        else:
            plan, keys = epoch_plan, np.array([layout.bucket(row) for row in rows])
        self.plan = lru_cache(2)(lambda epoch: plan(keys, batch_size, seed, epoch))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.per_epoch)
        rows = [self.rows[i] for i in self.plan(epoch)[number]]
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


def iterate(batches: Batches) -> grain.DatasetIterator:
    """An iterator whose state can be saved and set, reading ahead in background threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
