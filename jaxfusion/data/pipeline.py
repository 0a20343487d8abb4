"""The training input: a grain dataset of batches, the same whatever the hosts and restarts."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

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
    """

    def __init__(
        self, rows: Sequence[TokenRow], layout: Shapes | Packing, tokenizers: Tokenizers,
        batch_size: int, seed: int, steps: int,
    ):
        hosts = jax.process_count()
        if batch_size % hosts:
            raise InputError(f"batch_size {batch_size} does not divide by {hosts} hosts")
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
        placed = self.layout.place(rows, len(self.tokenizers.start), self.batch_size)
        return own_rows(collate(*placed, self.tokenizers))


def own_rows(batch: Any) -> Any:
    """This host's part of a global batch's rows."""
    def part(x):
        share = len(x) // jax.process_count()
        return x[jax.process_index() * share : (jax.process_index() + 1) * share]

    return jax.tree.map(part, batch)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in an epoch; the last may be short."""
    return -(-rows // batch_size)


def iterate(batches: Batches) -> grain.DatasetIterator:
    """An iterator whose state can be saved and set, reading ahead in background threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
