"""What happens around the steps of a run: traces, logs, scores, checkpoints, signals."""

import logging
import math
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxfusion.errors import InputError
from jaxfusion.sharding.hosts import is_first
from jaxfusion.training.checkpoint import Checkpoints, best_of
from jaxfusion.training.logs import Done, RunLog
from jaxfusion.training.meter import Meter
from jaxfusion.training.step import Metrics
from jaxfusion.training.trackers import open_trackers
from jaxfusion.training.trainer import Due, Trainer

PROFILE = "profile"  # in a workdir
logger = logging.getLogger(__name__)


class Hook:
    """Runs before and after every step, and around all of them as a context manager."""

    def __enter__(self) -> "Hook":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def before(self, step: int, rows: Any, batch: Any) -> None:
        """Before a step.

        Args:
          rows: of the batch, this process's. batch: all of it, on the mesh.
        """

    def after(self, step: int, metrics: Metrics, due: Due) -> None:
        """After a step was dispatched; reading `metrics` waits for it."""


class Profile(Hook):
    """A profile of some steps in `WORKDIR/profile`, for TensorBoard and Perfetto."""

    def __init__(self, workdir: Path, steps: tuple[int, int] | None):
        self.out, self.steps, self.running = workdir / PROFILE, steps, False

    def before(self, step: int, rows: Any, batch: Any) -> None:
        """Starts at the first of the steps, or where a resumed run finds itself among them."""
        if self.steps and is_first() and not self.running and (
            self.steps[0] <= step <= self.steps[1]
        ):
            jax.profiler.start_trace(self.out, create_perfetto_trace=True)
            self.running = True

    def after(self, step: int, metrics: Metrics, due: Due) -> None:
        """Stops after the last of them, once the device has finished it."""
        if self.running and step >= self.steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False

    def __exit__(self, *_: Any) -> None:
        self._stop()
        if self.steps and is_first() and not self.out.is_dir():
            logger.warning("no trace was written: steps %d to %d are not among those of this run",
                           *self.steps)


class Log(Hook):
    """Metrics and speed on the terminal, as JSONL and for trackers.

    A step's metrics are read after the next one is dispatched, so the device never waits for the
    log; before a checkpoint they are read immediately, so nothing unchecked is saved.
    """

    def __init__(self, trainer: Trainer, workdir: Path):
        self.trainer, self.first = trainer, trainer.done
        self.meter = Meter(trainer.run.plain_loss, trainer.mesh)
        trackers = open_trackers(trainer.run.config, workdir, self.first) if is_first() else []
        self.out = RunLog(workdir, trainer.run.steps, self.first, is_first(), trackers)
        self.pending: tuple[int, Metrics, Done] | None = None

    def __enter__(self) -> "Log":
        self.out.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.out.__exit__(*error)

    def before(self, step: int, rows: Any, batch: Any) -> None:
        """Counts what goes through the step."""
        trainer = self.trainer
        self.meter.add(rows, trainer.state.trainable, trainer.run.frozen, batch, trainer.key)

    def after(self, step: int, metrics: Metrics, due: Due) -> None:
        """Logs the step before this one, where it was due, and this one if it is saved."""
        if step == self.first + 1:  # it includes compilation, so the speed leaves it out
            jax.block_until_ready(metrics)
            self.out.restart_clock()
            self.meter.exclude_from_speed()
        self._flush()
        if due.log:
            self.pending = (step, metrics, self.meter.take())
        if due.save:
            self._flush()

    def _flush(self) -> None:
        """Writes what is pending; training on a loss that is not a number ends here."""
        if self.pending is None:
            return
        step, metrics, done = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.out.train(step, values, done)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise InputError(
                f"the loss is {values['loss']} and its gradient's norm {values['grad_norm']} at "
                f"step {step}: lower the learning rate, or use float32 (encoder.dtype, "
                "decoder.dtype); the last checkpoint is untouched"
            )


class Save(Hook):
    """Scores and checkpoints."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, log: Log):
        self.trainer, self.checkpoints, self.log = trainer, checkpoints, log

    def __enter__(self) -> "Save":
        if self.trainer.unscored:
            self._save(self.trainer.done, score=True)
        return self

    def after(self, step: int, metrics: Metrics, due: Due) -> None:
        """Scores the state on the development rows and saves it, where that is due."""
        if due.save:
            self._save(step, due.score)
        if due.stop:
            self.checkpoints.wait()

    def _save(self, step: int, score: bool) -> None:
        trainer, out, scored = self.trainer, self.log.out, None
        if score and trainer.run.score is not None:
            scores = trainer.run.score(trainer.state.trainable)
            scored = scores[trainer.run.best]
            trainer.best = best_of(trainer.best, step, scored, trainer.run.best)
            out.write(step, {f"dev/{name}": value for name, value in scores.items()})
            out.say(f"step {step}  dev {_in_a_line(scores, trainer.run.best)}")
        self.checkpoints.save(trainer.state, trainer.data.get_state(), scored, trainer.best)
        out.restart_clock()
        if trainer.ended and step < trainer.run.steps:
            out.say(f"training ends here: {trainer.run.best} was no better in {trainer.best.since} "
                    f"scores than {trainer.best.score:.3f} at step {trainer.best.step} "
                    "(data.dev_patience)")


def _in_a_line(scores: dict[str, float], best: str) -> str:
    """Every score, but of those by language only the kind that decides; and which one decides what
    the best checkpoint is."""
    kind = best.rpartition("/")[2]
    means = {name: value for name, value in scores.items() if "/" not in name}
    by_language = {name.removesuffix(f"/{kind}"): value for name, value in scores.items()
                   if name.endswith(f"/{kind}")}
    said = ["  ".join(f"{name} {value:.3f}" for name, value in part.items())
            for part in (means, by_language)]
    of_languages = f"  ({kind}: {said[1]})" if by_language else ""
    return said[0] + of_languages + (f"  ({best} decides)" if len(scores) > 1 else "")


class Signals:
    """Handles SIGTERM at the end of a step, in all processes at the same one. Ctrl-C ends the run
    immediately, or at the end of the step if a callback swallows it."""

    def __enter__(self) -> "Signals":
        self.heard = self.interrupted = False
        self.before = {}
        # With several processes, jax's preemption service receives SIGTERM and agrees on a step.
        with suppress(ValueError):  # signal handlers can only be set in the main thread
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

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step, the same in all processes.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed, and a callback swallowed the exception.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.heard
