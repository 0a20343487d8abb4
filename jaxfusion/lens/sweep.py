"""Trains a Lens run's top blocks: caches their inputs, then frees the rest of the LLM."""

import logging
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxfusion import config as configs
from jaxfusion.data.pipeline import total_steps
from jaxfusion.errors import InputError
from jaxfusion.fields import LensRunConfig
from jaxfusion.lens.activations import (
    ActivationBatches,
    Activations,
    cache_activations,
    slice_blocks,
    top,
)
from jaxfusion.lens.model import LensModel, load_lens_model
from jaxfusion.lens.objective import Manipulation, Supervised, aims, make_goals
from jaxfusion.lens.probe import Probe
from jaxfusion.lens.prompts import training_rows
from jaxfusion.nn.decoder import Decoder
from jaxfusion.sharding.hosts import all_or_none, check_peers
from jaxfusion.sharding.mesh import sharding
from jaxfusion.training.checkpoint import saved_steps, trained_part
from jaxfusion.training.loop import fit
from jaxfusion.training.optimizer import group_of_each
from jaxfusion.training.origin import different
from jaxfusion.training.state import Flat
from jaxfusion.training.step import Loss
from jaxfusion.training.trainer import Run
from jaxfusion.training.workdir import begin, check_workdir

CACHE = ".kept-"  # prefix of directories with activations on disk
logger = logging.getLogger(__name__)


def train_all(
    config: LensRunConfig, runs: dict[str, LensRunConfig], texts: dict[str, list[str]],
    answers: list[str] | None, model: LensModel, probe: Probe, workdir: Path, mesh,
) -> tuple[LensModel, dict[str, float]]:
    """Trains every unfinished run, each in its own directory.

    The activations are cached first; then the LLM, which takes most of the memory, is freed until
    all runs are done.

    Args:
      model: emptied if anything is trained.

    Returns:
      The model, reloaded if anything was trained, and the seconds of each trained run.

    Raises:
      InputError: invalid settings or workdir of a run; or the LLM has changed.
    """
    prompts = {name: min(run.data.rows, len(texts[config.data.central]))
               for name, run in runs.items()}
    with all_or_none():
        due = {name: run for name, run in runs.items()
               if not at_end(run, folder_of(name, workdir), prompts[name])}
    check_peers(due=str(list(due)))
    for name in [name for name in runs if name not in due]:
        logger.info("finished: %s at step %d", folder_of(name, workdir),
                    total_steps(runs[name].train, prompts[name]))
    if not due:
        return model, {}
    seconds = _cache_and_train(config, due, prompts, texts, answers, model, probe, workdir)
    with all_or_none():
        reloaded, _ = load_lens_model(config, mesh)
    if different(reloaded.identity, model.identity):
        raise InputError(f"{config.bridge or config.decoder.checkpoint} was changed while the top "
                         "blocks trained; start again with another --workdir")
    return reloaded, seconds


def _cache_and_train(
    config: LensRunConfig, due: dict[str, LensRunConfig], prompts: dict[str, int],
    texts: dict[str, list[str]], answers: list[str] | None, model: LensModel, probe: Probe,
    workdir: Path,
) -> dict[str, float]:
    """Caches activations and trains. A separate function, so that returning frees its memory before
    the model is reloaded."""
    decoder, params = model.bridge.decoder, model.params["decoder"]
    jobs = {name: make_job(run, decoder, params, probe) for name, run in due.items()}
    kinds: dict[tuple[bool, int], int] = {}  # -> the most prompts of a run of this kind
    for name, run in due.items():
        kinds[cache_key(run)] = max(prompts[name], kinds.get(cache_key(run), 0))
    cached, seconds = {}, {}
    # Besides the blocks, the losses of Lens need only the final norm.
    unread = () if any(supervised for supervised, _ in kinds) else ("embed", "head")
    with ExitStack() as stack:
        for (supervised, blocks), most in kinds.items():
            with all_or_none():
                rows, tokenizers = training_rows(
                    config, model, {language: x[:most] for language, x in texts.items()},
                    answers[:most] if supervised else None)
            disk = None if config.lens.keep == "memory" else Path(stack.enter_context(
                tempfile.TemporaryDirectory(dir=workdir, prefix=CACHE)))
            cached[supervised, blocks] = cache_activations(
                model.bridge, model.params, rows, tokenizers, blocks, config.eval.batch_size,
                config.data.buckets, disk)
        trained_with = {part: x for part, x in params.items() if part not in unread}
        tops = {blocks: slice_blocks(trained_with, decoder.config.num_layers - blocks, None)
                for blocks in {blocks for _, blocks in kinds}}
        model.params.clear()
        del params, trained_with
        for name, run in due.items():
            logger.info("\n%s", name)
            clock = time.monotonic()
            own = jax.tree.map(lambda x, n=prompts[name]: x[:n], cached[cache_key(run)])
            train_top(run, folder_of(name, workdir), jobs[name], tops[run.lens.blocks], own,
                      model.identity)
            seconds[name] = time.monotonic() - clock
    return seconds


def cache_key(run: LensRunConfig) -> tuple[bool, int]:
    """The key of a run's cached activations: whether it reads answers, and its trained blocks."""
    return run.lens.method == "supervised", run.lens.blocks


def folder_of(name: str, workdir: Path) -> Path:
    """The workdir of a sweep's run."""
    return workdir / configs.directory_name(name)


def at_end(run: LensRunConfig, workdir: Path, prompts: int) -> bool:
    """Whether a workdir has a readable checkpoint of the run's last step.

    Raises:
      InputError: the workdir belongs to another run.
    """
    check_workdir(run, workdir)
    last = total_steps(run.train, prompts)
    return last in saved_steps(workdir) and trained_part(workdir)[0] == last


@dataclass(frozen=True)
class TopJob:
    """A run's loss, trained parameters and goals.

    Attributes:
      groups: optimiser group of each trained parameter. aims: the loss's goals and weights by path.
    """

    loss: Loss
    groups: dict[str, str]
    aims: Flat


def make_job(run: LensRunConfig, decoder: Decoder, params, probe: Probe) -> TopJob:
    """The job of a run on an LLM.

    Raises:
      InputError: optimiser groups that train anything but blocks, or goals that the probe's
        languages do not allow.
    """
    c = run.lens
    groups = group_of_each(traverse_util.flatten_dict({"decoder": params}, sep="/"),
                           run.optimizer.groups)
    if other := [name for name in groups if not name.startswith("decoder/blocks/")]:
        raise InputError(f"optimizer.groups train {other[0]}: a Lens run can train only "
                         "decoder/blocks/")
    upper = top(decoder, c.blocks)
    if c.method == "supervised":
        return TopJob(loss_of(upper, None), groups, {})
    goals = make_goals(probe, c.blocks, c.loss_layers, c.rank, c.weights)
    return TopJob(loss_of(upper, tuple(goals)), groups, aims(goals, c))


@lru_cache(4)  # the same object for equal losses, so that the compiled step is reused
def loss_of(upper: Decoder, layers: tuple[int, ...] | None) -> Loss:
    """The loss of manipulation after these trained blocks; None: of supervised tuning."""
    return (Supervised(upper) if layers is None else Manipulation(upper, layers)).loss


def train_top(
    run: LensRunConfig, workdir: Path, job: TopJob, params, cached: Activations,
    identity: dict[str, str],
) -> None:
    """Trains the top blocks on cached activations, from the workdir's state to the last step.

    Args:
      params: of the top blocks, and other parameters that the loss reads; not modified.
      identity: of the model that they are of; kept in the workdir.
    """
    part = traverse_util.flatten_dict({"decoder": params}, sep="/")
    steps = total_steps(run.train, len(cached.last))
    # Copies: steps donate them, and other runs start from the same blocks.
    trainable = {name: jnp.array(part[name], jnp.float32) for name in job.groups}
    frozen = {name: x for name, x in part.items() if name not in job.groups} | job.aims
    with begin(run, workdir) as start:
        batches = ActivationBatches(cached, run.train.batch_size, run.train.seed, steps,
                                    sharding(start.mesh, "batch"))
        # Methods are scored side by side at the end, so the newest checkpoint counts.
        fit(Run(start.config, job.loss, trainable, frozen, job.groups, batches, steps,
                None, None, job.loss, origin=identity), start)
