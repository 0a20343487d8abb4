"""The run of any job: resume, step, score, save."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.pipeline import iterate
from jaxfusion.data.seen import SEEN, write_seen
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
from jaxfusion.files import WRITER, no_room, only_writer
from jaxfusion.hf.hub import COMMIT
from jaxfusion.sharding.hosts import check_peers, is_first, wait_for_peers, with_peers
from jaxfusion.sharding.mesh import make_mesh, sharding
from jaxfusion.training.checkpoint import Checkpoints, abstract_like
from jaxfusion.training.frozen import FROZEN_FILE, write_frozen
from jaxfusion.training.logs import METRICS, TENSORBOARD, Done, RunLog
from jaxfusion.training.meter import PROFILE, Meter, Signals, Trace
from jaxfusion.training.optimizer import make_optimizer, make_schedule
from jaxfusion.training.state import Flat, State, count
from jaxfusion.training.step import Loss, make_train_step

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what is being written
# What a start leaves that came to no step, and one that has saved none.
OF_NO_START = {WRITER, *(f".{CONFIG_FILE}{end}" for end in (".partial", ".sum", ".sum.partial"))}
OF_A_START = OF_NO_START | {CONFIG_FILE, SEEN, FROZEN_FILE, METRICS, TENSORBOARD, PROFILE, *(
    f".{file}{end}" for file in (SEEN, FROZEN_FILE, METRICS)
    for end in (".partial", ".sum", ".sum.partial"))}
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
    """Runs a config in a workdir from where it stands to its last step; see `go_on`."""
    with only_run(config, workdir):
        return go_on(config, workdir, prepare, profile)


@contextmanager
def only_run(config: Job, workdir: Path) -> Iterator[None]:
    """Makes the workdir, and keeps other processes from writing there while the block runs. What
    nothing came of goes again.

    Raises:
      InputError: the workdir holds another run, or another process writes there.
    """
    with_peers(lambda: check_workdir(config, workdir))
    with ExitStack() as stack:
        def take() -> None:
            if not is_first():
                return
            try:
                made = [x for x in (workdir, *workdir.parents) if not x.exists()]
                workdir.mkdir(parents=True, exist_ok=True)
                stack.callback(_remove_empty, made)
                stack.enter_context(only_writer(workdir / WRITER, workdir))
            except OSError as error:  # all processes have to hear of it
                raise InputError(f"{workdir} cannot be written: {error}") from None

        with_peers(take)
        with no_room(workdir):
            yield


def _remove_empty(directories: list[Path]) -> None:
    """Removes directories, the innermost first, up to one that holds something."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def go_on(
    config: Job, workdir: Path, prepare: Callable[..., Run],
    profile: tuple[int, int] | None = None,
) -> State:
    """Runs a config in a workdir that is kept by `only_run`, to its last step.

    Args:
      prepare: `(config, mesh, fresh) -> Run` of the job; `fresh` is False when it is resumed.
      profile: first and last step of a trace in `WORKDIR/profile`.

    Returns:
      The final state.

    Raises:
      InputError: whatever is wrong with the config, checkpoints, data, workdir or other processes;
        or the disk is full.
      Stopped: SIGTERM came; the state is saved.
    """
    config = with_peers(lambda: check_workdir(config, workdir))
    check_peers(config=json.dumps(dataclasses.asdict(config), sort_keys=True))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir)
        check_peers(checkpoints=str(checkpoints.steps))
        run = with_peers(lambda: prepare(config, mesh, fresh=not checkpoints.steps))
        logger.info("%s parameters train, %s are frozen; %s steps",
                    *(f"{n:,}" for n in (count(run.trainable), count(run.frozen), run.steps)))
        try:
            with Signals() as signals:
                return _run(run, checkpoints, workdir, mesh, Trace(workdir, profile), signals)
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

    A config under which nothing was saved gives way to another one: its start failed, or was
    stopped.

    Raises:
      InputError: the workdir holds another run, or is none.
    """
    file = workdir / CONFIG_FILE
    if has_magic(str(workdir.absolute())):
        raise InputError(f"{workdir.absolute()} has one of * ? [ in it, which the library that "
                         "writes checkpoints takes for a pattern; choose another --workdir")
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir} is a file, expected a directory; choose another --workdir")
    if not file.is_file():
        if workdir.exists() and any(x.name not in OF_NO_START for x in workdir.iterdir()):
            raise InputError(
                f"{workdir} is not empty and no run's workdir: {CONFIG_FILE} is missing"
            )
        return config
    old = configs.load(file)
    if not _has_begun(workdir):
        if configs.changed(old, config):
            logger.info("%s: no step was saved under the %s there, which is replaced", workdir,
                        CONFIG_FILE)
        return config
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
    if from_hub and config.data.bos is None:
        config = replace(config, data=replace(config.data, bos=old.data.bos))
    differences = configs.changed(old, config)
    if differences:
        raise InputError(
            f"{workdir} was written by another config; choose another --workdir or undo: "
            + "; ".join(differences)
        )
    return config


def _has_begun(workdir: Path) -> bool:
    """Whether a workdir holds more than a start leaves that has saved nothing."""
    checkpoints = workdir / "checkpoints"
    if checkpoints.is_dir() and any(
            path.name.partition(".")[0].isdigit() and TEMPORARY not in path.name
            for path in checkpoints.iterdir()):
        return True
    return any(path.name not in OF_A_START and path != checkpoints for path in workdir.iterdir())


def _moves(revision: str | None) -> bool:
    """Whether what a revision names may be another tomorrow."""
    return revision is None or not COMMIT.fullmatch(revision)


def _same_rows(was: DataConfig, now: DataConfig) -> DataConfig:
    """The data with its hub commit as the earlier start resolved it."""
    if _moves(now.revision) and (was.task, was.path) == (now.task, now.path):
        return replace(now, revision=was.revision)
    return now


def _run(
    run: Run, checkpoints: Checkpoints, workdir: Path, mesh, trace: Trace, signals: Signals
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
        if position:  # a bridge of others has none
            data.set_state(position)
        done = int(state.step)
        logger.info("%s %s at step %d", "resuming" if done < run.steps else "finished:",
                    workdir, done)
    step_fn = train_step(Step(run.loss, config.train.accumulate, run.steps, config.optimizer,
                              run.groups, jax.tree.map(lambda x: x.sharding, state)))
    _write_config(run, workdir)
    meter = Meter(run.plain_loss, mesh)
    with RunLog(workdir, run.steps, int(state.step), is_first()) as log, trace:
        state = _loop(run, state, step_fn, data, checkpoints, log, mesh, meter, trace, signals)
    checkpoints.wait()
    return state


def _write_config(run: Run, workdir: Path) -> None:
    """Says in the workdir what run it is, once all that a start can fail by is done."""
    if is_first():
        configs.save(run.config, workdir / CONFIG_FILE)
        if run.seen is not None:
            write_seen(workdir, run.seen)
        if run.kept is not None:
            write_frozen(workdir, run.kept)
    wait_for_peers("config")


def _loop(
    run: Run, state: State, step_fn, data, checkpoints, log: RunLog, mesh, meter: Meter,
    trace: Trace, signals: Signals,
) -> State:
    config, key = run.config.train, jax.random.key(run.config.train.seed)
    done = first = int(state.step)
    pending = None
    while done < run.steps:
        rows, batch = next(data)
        meter.add(rows, state.trainable, run.frozen, batch, key)
        trace.before(done + 1)
        state, metrics = step_fn(state, run.frozen, batch, key)
        if done == first:  # which compiles: no speed has that in it
            jax.block_until_ready(metrics)
            log.restart_clock()
            meter.untime()
        done += 1
        trace.after(done, metrics)
        # Read the step before this one: the device never waits for the log.
        if pending is not None:
            _log(log, *pending)
            pending = None
        stop = signals.stop(done) and done < run.steps
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
