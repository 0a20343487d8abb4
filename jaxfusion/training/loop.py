"""The run of any job: resume, step, score, save."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.pipeline import iterate
from jaxfusion.data.seen import write_seen
from jaxfusion.errors import InputError, Stopped
from jaxfusion.fields import (
    ROLES,
    Config,
    DataConfig,
    Job,
    LensRunConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxfusion.hf.hub import COMMIT
from jaxfusion.sharding.hosts import check_peers, is_first, wait_for_peers, with_peers
from jaxfusion.sharding.mesh import make_mesh, sharding
from jaxfusion.training.checkpoint import Checkpoints, abstract_like, saved_steps
from jaxfusion.training.frozen import write_frozen
from jaxfusion.training.logs import Done, RunLog
from jaxfusion.training.meter import Meter, Sigterm, Trace
from jaxfusion.training.optimizer import make_optimizer, make_schedule
from jaxfusion.training.state import Flat, State, count
from jaxfusion.training.step import Loss, make_train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that a run needs, loaded.

    Attributes:
      config: as resolved; it is saved in the workdir.
      loss: of a batch.
      trainable, frozen: parameters by path. groups: the optimiser group of each trained one.
      batches: training batches by step number. steps: their number.
      score: trained parameters -> development scores. best: the score that checkpoints are kept by.
      plain_loss: the loss in the form whose FLOPs are counted.
      seen: fingerprints of the texts that are trained on; kept in the workdir.
      kept: frozen parameters that the workdir has to hold; None where it holds them already.
    """

    config: Job
    loss: Loss
    trainable: Flat
    frozen: Flat
    groups: dict[str, str]
    batches: grain.sources.RandomAccessDataSource
    steps: int
    score: Callable[[Flat], dict[str, float]]
    best: str
    plain_loss: Loss
    seen: np.ndarray | None = None
    kept: dict[str, np.ndarray] | None = None


def run_to_end(
    config: Job, workdir: Path, prepare: Callable[..., Run],
    profile: tuple[int, int] | None = None,
) -> State:
    """Runs a config in a workdir from where it stands to its last step.

    Args:
      prepare: `(config, mesh, fresh) -> Run` of the job; `fresh` is False when it is resumed.
      profile: first and last step of a trace in `WORKDIR/profile`.

    Returns:
      The final state.

    Raises:
      InputError: whatever is wrong with the config, checkpoints, data, workdir or other processes.
      Stopped: SIGTERM came; the state is saved.
    """
    config = with_peers(lambda: check_workdir(config, workdir))
    check_peers(config=json.dumps(dataclasses.asdict(config), sort_keys=True))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        steps = saved_steps(workdir)
        check_peers(checkpoints=str(steps))
        run = with_peers(lambda: prepare(config, mesh, fresh=not steps))
        logger.info("%s parameters train, %s are frozen; %s steps",
                    *(f"{n:,}" for n in (count(run.trainable), count(run.frozen), run.steps)))
        workdir.mkdir(parents=True, exist_ok=True)
        if is_first():
            configs.save(run.config, workdir / CONFIG_FILE)
            if run.seen is not None:
                write_seen(workdir, run.seen)
            if run.kept is not None:
                write_frozen(workdir, run.kept)
        wait_for_peers("config")
        checkpoints = Checkpoints(workdir)
        try:
            with Sigterm() as sigterm:
                return _run(run, checkpoints, workdir, mesh, Trace(workdir, profile), sigterm)
        finally:
            checkpoints.close()


@dataclass(frozen=True)
class Step:
    """What a training step is compiled from; equal ones are the same program.

    Attributes:
      loss, groups: as of `Run`. accumulate: parts of a batch. steps: of the schedule.
      shardings: of the state.
    """

    loss: Loss
    accumulate: int
    steps: int
    optimizer: OptimizerConfig = field(hash=False)
    groups: dict[str, str] = field(hash=False)
    shardings: State = field(hash=False)


@lru_cache(2)  # the runs of a sweep compile once
def train_step(step: Step):
    """The compiled step; see `make_train_step`."""
    c = step.optimizer
    schedules = {name: make_schedule(c, group.learning_rate, step.steps)
                 for name, group in c.groups.items()}
    return make_train_step(step.loss, make_optimizer(c, step.groups, step.steps), schedules,
                           step.shardings, step.accumulate)


def batch_shares(train: TrainConfig, mesh) -> int:
    """Into how many equal parts the rows of a batch go: of the mesh, and one after the other.

    Raises:
      InputError: the batch does not divide.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if train.batch_size % (shards * train.accumulate):
        raise InputError(f"train.batch_size {train.batch_size} does not divide by mesh data×fsdp "
                         f"= {shards} times train.accumulate = {train.accumulate}")
    return shards * train.accumulate


def check_workdir(config: Job, workdir: Path) -> Job:
    """The config, with hub commits as the workdir's earlier start resolved them.

    Raises:
      InputError: the workdir holds another run.
    """
    file = workdir / CONFIG_FILE
    if not file.is_file():
        if workdir.exists() and any(workdir.iterdir()):
            raise InputError(
                f"{workdir} is not empty and no run's workdir: {CONFIG_FILE} is missing"
            )
        return config
    old = configs.load(file)
    if old.job != config.job:
        raise InputError(f"{workdir} holds a run of job '{old.job}', this config's job is "
                         f"'{config.job}'; choose another --workdir")
    from_hub = isinstance(config, Config | LensRunConfig)
    for role in [x for x in ROLES if from_hub and hasattr(config, x)]:
        was, now = getattr(old, role), getattr(config, role)
        if _moves(now.revision) and now.checkpoint == was.checkpoint:
            config = replace(config, **{role: replace(now, revision=was.revision)})
    if isinstance(config, Config):
        config = replace(config, data=_same_rows(old.data, config.data))
    differences = configs.changed(old, config)
    if differences:
        raise InputError(
            f"{workdir} was written by another config; choose another --workdir or undo: "
            + "; ".join(differences)
        )
    return config


def _moves(revision: str | None) -> bool:
    """Whether what a revision names may be another tomorrow."""
    return revision is None or not COMMIT.fullmatch(revision)


def _same_rows(was: DataConfig, now: DataConfig) -> DataConfig:
    """The data with its hub commit as the earlier start resolved it."""
    if _moves(now.revision) and (was.task, was.path) == (now.task, now.path):
        return replace(now, revision=was.revision)
    return now


def _run(
    run: Run, checkpoints: Checkpoints, workdir: Path, mesh, trace: Trace, sigterm: Sigterm
) -> State:
    """Restores the newest checkpoint, if any, and steps to the end."""
    config = run.config
    optimizer = make_optimizer(config.optimizer, run.groups, run.steps)
    state = State(jnp.zeros((), jnp.int32), run.trainable, optimizer.init(run.trainable))
    state = jax.tree.map(lambda x: _on_mesh(x, mesh), state)
    data = iterate(run.batches, lambda rows: (rows, put_batch(rows, mesh)))
    restored = checkpoints.restore_newest(abstract_like(state))
    if restored is not None:
        state, position = restored
        data.set_state(position)
        done = int(state.step)
        logger.info("%s %s at step %d", "resuming" if done < run.steps else "finished:",
                    workdir, done)
    step_fn = train_step(Step(run.loss, config.train.accumulate, run.steps, config.optimizer,
                              run.groups, jax.tree.map(lambda x: x.sharding, state)))
    meter = Meter(run.plain_loss, mesh)
    with RunLog(workdir, run.steps, int(state.step), is_first()) as log, trace:
        state = _loop(run, state, step_fn, data, checkpoints, log, mesh, meter, trace, sigterm)
    checkpoints.wait()
    return state


def _loop(
    run: Run, state: State, step_fn, data, checkpoints, log: RunLog, mesh, meter: Meter,
    trace: Trace, sigterm: Sigterm,
) -> State:
    config, key = run.config.train, jax.random.key(run.config.train.seed)
    done = first = int(state.step)
    pending = None
    while done < run.steps:
        rows, batch = next(data)
        meter.add(rows, config.batch_size, state.trainable, run.frozen, batch, key)
        trace.before(done + 1)
        state, metrics = step_fn(state, run.frozen, batch, key)
        if done == first:  # which compiles: no speed has that in it
            jax.block_until_ready(metrics)
            log.restart_clock()
            meter.take()
        done += 1
        trace.after(done, metrics)
        # Read the step before this one: the device never waits for the log.
        if pending is not None:
            _log(log, *pending)
            pending = None
        stop = sigterm.came(done) and done < run.steps
        evaluate = done == run.steps or (done % config.eval_every == 0 and not stop)
        save = evaluate or stop or done % config.checkpoint_every == 0
        if save or done % config.log_every == 0:
            pending = (done, metrics, meter.take())
        if save:
            # Nothing is saved that was not looked at.
            _log(log, *pending)
            pending = None
            dev = run.score(state.trainable) if evaluate else None
            if dev is not None:
                log.write(done, {f"dev/{name}": value for name, value in dev.items()})
                log.say(f"step {done}  dev " + "  ".join(f"{k} {v:.3f}" for k, v in dev.items()))
            checkpoints.save(state, data.get_state(), dev and dev[run.best])
            log.restart_clock()
        if stop:
            checkpoints.wait()
            raise Stopped(f"stopped by SIGTERM after step {done}, which is saved; the same "
                          "command goes on from there")
    return state


def _log(log: RunLog, step: int, metrics, done: Done) -> None:
    """Writes a step's metrics; training on a loss that is no number ends here."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.train(step, values, done)
    if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        raise InputError(
            f"the loss is {values['loss']} and its gradient's norm {values['grad_norm']} at step "
            f"{step}: lower the learning rate, or use "
            "float32 (encoder.dtype, decoder.dtype); the last checkpoint is untouched"
        )


def put_batch(batch: Any, mesh) -> Any:
    """A host's rows of a batch, as its part of the global arrays on the mesh."""
    place = sharding(mesh, "batch")
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)


def _on_mesh(x: jax.Array, mesh) -> jax.Array:
    """Arrays made off the mesh (counters) go on every device; the others stay where they are."""
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        return x
    return jax.device_put(x, sharding(mesh))
