"""The run: load, resume, step, score, save."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxfusion import config as configs
from jaxfusion.config import Config
from jaxfusion.data.batching import Cut, find_shapes, tokenize
from jaxfusion.data.packing import find_packing
from jaxfusion.data.pipeline import Batches, iterate, steps_per_epoch, subset
from jaxfusion.data.sources import Example, read_examples
from jaxfusion.data.tasks import check_languages, get_task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.metrics import accuracy
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.nn.bridge import Batch
from jaxfusion.sharding.mesh import make_mesh, sharding
from jaxfusion.training.checkpoint import BEST, Checkpoints, abstract_like, saved_steps
from jaxfusion.training.logs import RunLog
from jaxfusion.training.optimizer import make_optimizer, make_schedule
from jaxfusion.training.state import Model, State, count, load_model, merge, overlay
from jaxfusion.training.step import make_train_step

CONFIG_FILE = "config.json"
COMMIT = re.compile(r"[0-9a-f]{40}")  # what a branch or tag was resolved to at the first start
logger = logging.getLogger(__name__)


def train(config: Config, workdir: Path) -> State:
    """Runs a config in a workdir from where it stands to its last step.

    Returns:
      The final state.

    Raises:
      InputError: whatever is wrong with the config, checkpoints, data or workdir.
    """
    config = check_workdir(config, workdir)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        run = prepare(config, mesh, fresh=not saved_steps(workdir))
        workdir.mkdir(parents=True, exist_ok=True)
        configs.save(run.model.config, workdir / CONFIG_FILE)
        checkpoints = Checkpoints(workdir)
        try:
            return _run(run, checkpoints, workdir, mesh)
        finally:
            checkpoints.close()


def check_workdir(config: Config, workdir: Path) -> Config:
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
    for role in ("encoder", "decoder"):
        was, now = getattr(old, role), getattr(config, role)
        moving = now.revision is None or not COMMIT.fullmatch(now.revision)
        if moving and now.checkpoint == was.checkpoint:
            config = replace(config, **{role: replace(now, revision=was.revision)})
    differences = configs.changed(old, config)
    if differences:
        raise InputError(
            f"{workdir} was written by another config; choose another --workdir or undo: "
            + "; ".join(differences)
        )
    return config


@dataclass(frozen=True)
class Run:
    """Everything a run needs, loaded."""

    model: Model
    batches: Batches
    dev: list[Example]
    labels: tuple[str, ...]
    steps: int


def prepare(config: Config, mesh, fresh: bool = True) -> Run:
    """Loads data and model, and says what was found; only a fresh run starts from another."""
    task = get_task(config.data.task)
    check_languages(config.data.task, (config.data.language,))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch_size % shards:
        raise InputError(
            f"train.batch_size {config.train.batch_size} does not divide by mesh data×fsdp "
            f"= {shards}"
        )
    examples, dev = (
        read_examples(config.data.task, task, split, config.data.language, config.data.path)
        for split in ("train", "dev")
    )
    examples = subset(examples, config.data.train_rows, config.data.balanced, config.train.seed)
    model = load_model(config, mesh)
    if config.train.init_from is not None and fresh:
        model = start_from(model, Path(config.train.init_from))
    rows, cut = tokenize(
        examples, model.tokenizers, text_prompt=config.data.text_prompt,
        max_encoder_tokens=config.data.max_encoder_tokens,
        max_decoder_tokens=config.data.max_decoder_tokens, with_target=True,
    )
    layout = find_shapes(rows, config.data.buckets)
    if config.data.pack:
        layout = find_packing(
            rows, config.train.batch_size, len(model.tokenizers.bos), config.train.seed,
            2 * config.data.max_encoder_tokens, multiple=shards,
        )
    steps = config.train.steps or config.train.epochs * steps_per_epoch(
        len(rows), config.train.batch_size
    )
    batches = Batches(
        rows, layout, model.tokenizers, config.train.batch_size, config.train.seed, steps
    )
    _describe(model, len(rows), cut, steps)
    return Run(model, batches, dev[: config.data.dev_rows], task.labels, steps)


def start_from(model: Model, workdir: Path) -> Model:
    """The model with the trained part of another run (the second stage of a two-stage recipe)."""
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(f"train.init_from: {workdir} is no workdir of a run")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step, trained = checkpoints.restore_trained()
    finally:
        checkpoints.close()
    logger.info("starting from step %d of %s", step, workdir)
    absent = sorted(set(model.trainable) - set(trained))
    if absent:
        logger.warning("it has no %s: these start afresh", ", ".join(absent))
    return overlay(model, trained, str(workdir))


def _describe(model: Model, rows: int, cut: Cut, steps: int) -> None:
    trained, frozen = count(model.trainable), count(model.frozen)
    logger.info("%s parameters train, %s are frozen", f"{trained:,}", f"{frozen:,}")
    logger.info("%s training rows, %s steps", f"{rows:,}", f"{steps:,}")
    if cut.any:
        logger.warning("longer than the limits: %s", cut)


def _run(run: Run, checkpoints: Checkpoints, workdir: Path, mesh) -> State:
    """Restores the newest checkpoint, if any, and steps to the end."""
    config, model = run.model.config, run.model
    optimizer = make_optimizer(config.optimizer, model.groups, run.steps)
    state = State(jnp.zeros((), jnp.int32), model.trainable, optimizer.init(model.trainable))
    state = jax.tree.map(lambda x: _on_mesh(x, mesh), state)
    data = iterate(run.batches)
    restored = checkpoints.restore_newest(abstract_like(state))
    if restored is not None:
        state, position = restored
        data.set_state(position)
        done = int(state.step)
        logger.info("%s %s at step %d", "resuming" if done < run.steps else "finished:",
                    workdir, done)
    score = _dev_scorer(run)
    schedules = {
        name: make_schedule(config.optimizer, group.learning_rate, run.steps)
        for name, group in config.optimizer.groups.items()
    }
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn = make_train_step(model.bridge, optimizer, schedules, shardings)
    with RunLog(workdir, run.steps, int(state.step)) as log:
        state = _loop(run, state, step_fn, data, checkpoints, score, log, mesh)
    checkpoints.wait()
    return state


def _loop(run: Run, state: State, step_fn, data, checkpoints, score, log: RunLog, mesh) -> State:
    config, key = run.model.config.train, jax.random.key(run.model.config.train.seed)
    done = logged = int(state.step)
    pending = None
    while done < run.steps:
        batch = put_batch(next(data), mesh)
        state, metrics = step_fn(state, run.model.frozen, batch, key)
        done += 1
        # Read the step before this one: the device never waits for the log.
        if pending is not None:
            logged = _log(log, *pending, logged, config.batch_size)
            pending = None
        evaluate = done % config.eval_every == 0 or done == run.steps
        save = evaluate or done % config.checkpoint_every == 0
        if save or done % config.log_every == 0:
            pending = (done, metrics)
        if save:
            # Nothing is saved that was not looked at.
            logged = _log(log, *pending, logged, config.batch_size)
            pending = None
            dev = score(state) if evaluate else None
            if dev is not None:
                log.write(done, {f"dev/{name}": value for name, value in dev.items()})
                log.say(f"step {done}  dev " + "  ".join(f"{k} {v:.3f}" for k, v in dev.items()))
            checkpoints.save(state, data.get_state(), dev and dev[BEST])
            log.restart_clock()
    return state


def _log(log: RunLog, step: int, metrics, logged: int, batch_size: int) -> int:
    """Writes a step's metrics; training on a loss that is no number ends here."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.train(step, values, (step - logged) * batch_size)
    if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        raise InputError(
            f"the loss is {values['loss']} and its gradient's norm {values['grad_norm']} at step "
            f"{step}: lower the learning rate, or use "
            "float32 (encoder.dtype, decoder.dtype); the last checkpoint is untouched"
        )
    return step


def _dev_scorer(run: Run) -> Callable[[State], dict[str, float]]:
    """Accuracy on the development rows, by scoring name."""
    config, model = run.model.config, run.model
    scorer = Scorer(model.bridge, model.tokenizers, config.eval, config.data.text_prompt)

    def score(state: State) -> dict[str, float]:
        params = merge(state.trainable, model.frozen)
        scored = scorer(params, run.dev, run.labels)
        if scored.cut.any:
            logger.warning("development rows longer than the limits: %s", scored.cut)
        correct = scored.correct
        return {name: accuracy(rows)["accuracy"] for name, rows in correct.items()}

    return score


def put_batch(batch: Batch, mesh) -> Batch:
    """A host's rows of a batch, as its part of the global arrays on the mesh."""
    place = sharding(mesh, "batch")
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)


def _on_mesh(x: jax.Array, mesh) -> jax.Array:
    """Arrays made off the mesh (counters) go on every device; the others stay where they are."""
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        return x
    return jax.device_put(x, sharding(mesh))
