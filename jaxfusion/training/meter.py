"""Around the steps of a run: how fast they are, a trace of some of them, and SIGTERM."""

import logging
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxfusion.sharding.chips import chip_of
from jaxfusion.sharding.hosts import is_first
from jaxfusion.training.flops import count_flops
from jaxfusion.training.logs import Done
from jaxfusion.training.step import Loss, gradient

logger = logging.getLogger(__name__)


class Meter:
    """Counts what went through the steps since it was last asked.

    Tokens are those of both towers, of several processes as many as this one's rows let expect;
    FLOPs are the model's, of slots with and without tokens, and nothing that is computed again.
    """

    def __init__(self, plain_loss: Loss, mesh):
        self.loss, self.known = plain_loss, {}
        chip = chip_of(mesh.devices.flat[0])
        self.peak = chip and chip.flops * mesh.devices.size
        self._begin()

    def _begin(self) -> None:
        self.examples = self.tokens = self.slots = 0
        self.flops = 0.0

    def add(self, rows: Any, examples: int, trainable, frozen, batch: Any, key) -> None:
        """Counts one step.

        Args:
          rows: of the batch, this process's. batch: all of it, on the mesh.
        """
        segments = [x for name, x in vars(rows).items() if name.endswith("segments")]
        # Other processes may have other rows, or the same ones.
        share = len(jax.tree.leaves(batch)[0]) / len(segments[0])
        self.examples += examples
        self.tokens += round(share * sum(int(np.count_nonzero(x)) for x in segments))
        self.slots += round(share * sum(x.size for x in segments))
        if self.peak is not None:
            shape = tuple(x.shape for x in jax.tree.leaves(batch))
            if shape not in self.known:
                self.known[shape] = count_flops(lambda *x: gradient(self.loss, *x), trainable,
                                                frozen, batch, key)
            self.flops += self.known[shape]

    def take(self) -> Done:
        """What was counted; begins anew."""
        done = Done(self.examples, self.tokens, self.slots, self.flops, self.peak)
        self._begin()
        return done


class Trace:
    """A profile of some steps in `WORKDIR/profile`, for TensorBoard and Perfetto."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self.out, self.steps, self.running = workdir / "profile", steps, False

    def before(self, step: int) -> None:
        """Starts at the first of the steps, or where a resumed run finds itself among them."""
        if self.steps and is_first() and not self.running and (
            self.steps[0] <= step <= self.steps[1]
        ):
            jax.profiler.start_trace(self.out, create_perfetto_trace=True)
            self.running = True

    def after(self, step: int, metrics: Any) -> None:
        """Stops after the last of them, once the device is through with it."""
        if self.running and step >= self.steps[1]:
            jax.block_until_ready(metrics)
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if one is running, and writes it."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        if self.steps and is_first() and not self.out.is_dir():
            logger.warning("no trace was written: steps %d to %d are not among those of this run",
                           *self.steps)


class Sigterm:
    """Whether SIGTERM came, to any of the processes: all of them hear of it at the same step."""

    def __enter__(self) -> "Sigterm":
        self.heard = False
        try:
            # Of several processes jax's coordination service is told, and tells all.
            self.before = None if jax.process_count() > 1 else signal.signal(
                signal.SIGTERM, self._hear)
        except ValueError:  # not in the main thread: whoever has it decides
            self.before = None
        return self

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _hear(self, *_: Any) -> None:
        self.heard = True

    def came(self, step: int) -> bool:
        """True at the step after which to stop."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.heard
