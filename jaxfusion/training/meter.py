"""How much goes through the steps of a run."""

from typing import Any

import jax
import numpy as np

from jaxfusion.costs.chips import chip_of
from jaxfusion.costs.flops import count_flops
from jaxfusion.training.logs import Done
from jaxfusion.training.step import Loss, gradient


class Meter:
    """Counts what went through the steps since it was last asked.

    Tokens are those of both towers; with several processes they are extrapolated from this one;
    FLOPs are the model's, counting padding, but not recomputation.
    """

    def __init__(self, plain_loss: Loss, mesh):
        self.loss, self.known = plain_loss, {}
        chip = chip_of(mesh.devices.flat[0])
        self.peak = chip and chip.flops * mesh.devices.size
        self._begin()

    def _begin(self) -> None:
        self.examples = self.tokens = self.slots = 0
        self.untimed = (0, 0)
        self.flops = 0.0

    def add(self, rows: Any, trainable, frozen, batch: Any, key) -> None:
        """Counts one step.

        Args:
          rows: of the batch, this process's. batch: all of it, on the mesh.
        """
        segments = [x for name, x in vars(rows).items() if name.endswith("segments")]
        # Other processes may have other rows, or the same ones.
        share = len(jax.tree.leaves(batch)[0]) / len(segments[0])
        self.examples += round(share * count_examples(segments))
        self.tokens += round(share * sum(int(np.count_nonzero(x)) for x in segments))
        self.slots += round(share * sum(x.size for x in segments))
        if self.peak is not None:
            shape = tuple(x.shape for x in jax.tree.leaves(batch))
            if shape not in self.known:
                self.known[shape] = count_flops(lambda *x: gradient(self.loss, *x), trainable,
                                                frozen, batch, key)
            self.flops += self.known[shape]

    def exclude_from_speed(self) -> None:
        """Drops what was counted so far from the speed, such as the step that compiled."""
        tokens, slots = self.tokens, self.slots
        self._begin()
        self.untimed = (tokens, slots)

    def take(self) -> Done:
        """What was counted; resets the counts."""
        tokens, slots = np.add(self.untimed, (self.tokens, self.slots))
        done = Done(self.examples, self.tokens, self.flops, self.peak,
                    float(tokens / slots) if slots else None)
        self._begin()
        return done


def count_examples(segments: list[np.ndarray]) -> int:
    """Examples of a batch: segments of a row are numbered from 1, and a row of padding has none.

    Args:
      segments: [B …] of each tower.
    """
    return int(np.max([x.reshape(len(x), -1).max(axis=1, initial=0) for x in segments],
                      axis=0).sum())
