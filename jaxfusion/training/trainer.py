"""The trainer of any job: its state, its step, its batches."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxfusion.data.pipeline import iterate
from jaxfusion.errors import InputError
from jaxfusion.fields import Job, OptimizerConfig, TrainConfig
from jaxfusion.sharding.mesh import sharding
from jaxfusion.training.checkpoint import Best, Checkpoints, abstract_like, best_of
from jaxfusion.training.optimizer import make_optimizer, make_schedules
from jaxfusion.training.state import Flat, State, count_params
from jaxfusion.training.step import Loss, Metrics, make_train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that a run needs, loaded.

    Attributes:
      config: as resolved; it is saved in the workdir.
      loss: of a batch.
      trainable, frozen: parameters by path. groups: the optimiser group of each trained one.
      batches: training batches by step number. steps: their number.
      score: trained parameters -> development scores; None: the run is not scored while it trains.
        best: the name of the score that decides which checkpoint is kept.
      plain_loss: the loss in the form whose FLOPs are counted.
      seen: fingerprints of the texts that are trained on; kept in the workdir.
      kept: frozen parameters that the workdir has to hold; None where it holds them already.
      patience: scores that may be no better, one after the other; None: any number.
      origin: digests of models and rows, for the workdir; None where there are none.
    """

    config: Job
    loss: Loss
    trainable: Flat
    frozen: Flat
    groups: dict[str, str]
    batches: grain.sources.RandomAccessDataSource
    steps: int
    score: Callable[[Flat], dict[str, float]] | None
    best: str | None
    plain_loss: Loss
    seen: np.ndarray | None = None
    kept: dict[str, np.ndarray] | None = None
    patience: int | None = None
    origin: dict[str, str] | None = None


def by_another(best: Best, now: str) -> bool:
    """Whether a best score may be of another score than the one that decides now. Versions that
    stored no name had another one for tasks with labels alone."""
    return now.rpartition("/")[2] == "likelihood" if best.name is None else best.name != now


@dataclass(frozen=True)
class Due:
    """What is to be done after a step.

    Attributes:
      stop: the run ends here, before its last step.
    """

    log: bool
    score: bool
    save: bool
    stop: bool


class Trainer:
    """The state of a run, the step that changes it, and the batches that it reads.

    Attributes:
      state: on the mesh. done: the steps behind it. data: batches, of this host and on the mesh.
      best: the best score so far; None where nothing was scored.
      unscored: whether the step that was restored is due to be scored, but SIGTERM came.
    """

    def __init__(self, run: Run, mesh: Mesh):
        c = run.config.optimizer
        optimizer = make_optimizer(c, run.groups, run.steps)
        state = State(jnp.zeros((), jnp.int32), run.trainable, optimizer.init(run.trainable))
        self.run, self.mesh, self.done = run, mesh, 0
        self.best: Best | None = None
        self.unscored = False
        self.state = jax.tree.map(lambda x: _on_mesh(x, mesh), state)
        self.data = iterate(run.batches, lambda rows: (rows, put_batch(rows, mesh)))
        self.key = jax.random.key(run.config.train.seed)
        self.step = compiled_step(Step(
            run.loss, run.config.train.accumulate, run.steps, c, run.groups,
            jax.tree.map(lambda x: x.sharding, self.state), optimizer))
        logger.info("%s parameters train, %s are frozen; %s steps",
                    *(f"{n:,}" for n in (count_params(run.trainable), count_params(run.frozen),
                                         run.steps)))

    def restore(self, checkpoints: Checkpoints) -> None:
        """Goes to the newest checkpoint, if there is one.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        restored = checkpoints.restore_newest(abstract_like(self.state))
        if restored is None:
            return
        self.state, notes = restored
        if notes.data:  # adopted checkpoints have none
            self.data.set_state(notes.data)
        self.done, self.best = int(self.state.step), notes.best
        # As earlier versions left it.
        if self.best is None and notes.score is not None:
            self.best = best_of(None, self.done, notes.score)
        scored = self.run.score is None or notes.score is not None
        self.unscored = not scored and self.due(stop=False).score and self.done > 0
        if self.best and by_another(self.best, self.run.best):
            self._say_which_score()
        logger.info("%s %s at step %d", "finished:" if self.ended else "resuming",
                    checkpoints.path.parent, self.done)

    def _say_which_score(self) -> None:
        """Warns that the best checkpoint so far is not the best by the score that decides now."""
        logger.warning(
            "the best score so far, %.3f at step %d, is of %s; %s %s: start again with another "
            "--workdir to choose by one score", self.best.score, self.best.step,
            self.best.name or "an earlier version, which may have chosen by another",
            "runs of today choose by" if self.ended else
            "scores from here on are compared with it all the same, and are of", self.run.best)

    @property
    def ended(self) -> bool:
        """Whether no step is left, or scores were no better for as long as patience lasts."""
        patience = self.run.patience
        return self.done >= self.run.steps or (
            None not in (patience, self.best) and self.best.since >= patience)

    def do_step(self, batch: Any) -> Metrics:
        """One step; returns before the device has finished it."""
        self.state, metrics = self.step(self.state, self.run.frozen, batch, self.key)
        self.done += 1
        return metrics

    def due(self, stop: bool) -> Due:
        """What to do after the last completed step.

        Args:
          stop: the run is asked to end here.
        """
        c, step = self.run.config.train, self.done
        last = step == self.run.steps
        stop = stop and not last
        score = last or (step % c.eval_every == 0 and not stop)
        save = score or stop or step % c.checkpoint_every == 0
        return Due(log=save or step % c.log_every == 0, score=score, save=save, stop=stop)


@dataclass(frozen=True)
class Step:
    """What a training step is compiled from; equal ones are the same program.

    Dictionaries are not hashable: they are compared, but not hashed.

    Attributes:
      loss, groups: as of `Run`. accumulate: parts of a batch. steps: of the schedule.
      shardings: of the state.
      update: the optax optimizer; derived from the fields above, so it is not compared.
    """

    loss: Loss
    accumulate: int
    steps: int
    optimizer: OptimizerConfig = field(hash=False)
    groups: dict[str, str] = field(hash=False)
    shardings: State = field(hash=False)
    update: optax.GradientTransformation = field(compare=False)


@lru_cache(2)  # the runs of a sweep compile once
def compiled_step(step: Step):
    """The jitted step; see `make_train_step`."""
    schedules = make_schedules(step.optimizer, step.steps)
    return make_train_step(step.loss, step.update, schedules, step.shardings, step.accumulate)


def batch_multiple(train: TrainConfig, mesh) -> int:
    """Data shards times accumulation steps; the batch size must be a multiple.

    Raises:
      InputError: the batch does not divide.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if train.batch_size % (shards * train.accumulate):
        raise InputError(f"train.batch_size {train.batch_size} does not divide by mesh data×fsdp "
                         f"= {shards} times train.accumulate = {train.accumulate}")
    return shards * train.accumulate


def put_batch(batch: Any, mesh) -> Any:
    """A host's rows of a batch, as its part of the global arrays on the mesh."""
    place = sharding(mesh, "batch")
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)


def _on_mesh(x: jax.Array, mesh) -> jax.Array:
    """Arrays made off the mesh (counters) go on every device; the others stay where they are."""
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        return x
    return jax.device_put(x, sharding(mesh))
