"""Around the steps of a run: how fast they are, a trace of some of them, and signals."""

import logging
import signal
from contextlib import suppress
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

PROFILE = "profile"  # in a workdir
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

    def untime(self) -> None:
        """Leaves out of the speed what was counted, as that of a step that compiles."""
        tokens, slots = self.tokens, self.slots
        self._begin()
        self.untimed = (tokens, slots)

    def take(self) -> Done:
        """What was counted; begins anew."""
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


class Trace:
    """A profile of some steps in `WORKDIR/profile`, for TensorBoard and Perfetto."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self.out, self.steps, self.running = workdir / PROFILE, steps, False

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


class Signals:
    """SIGTERM is kept for the end of a step, where all processes hear of it at once. Ctrl-C ends
    the run at once, or at the end of the step where a callback swallows it."""

    def __enter__(self) -> "Signals":
        self.heard = self.interrupted = False
        self.before = {}
        # Of several processes jax's coordination service is told of SIGTERM, and tells all.
        with suppress(ValueError):  # not in the main thread: whoever has it decides
            if jax.process_count() == 1:
                self.before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self.before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, *_: Any) -> None:
        self.heard = True

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def stop(self, step: int) -> bool:
        """True at the step after which to stop.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed, and nobody has heard of it.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.heard
