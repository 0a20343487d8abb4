"""Training of a Lens run's top blocks: what they read is kept, then the LLM makes room for it."""

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
from jaxfusion.errors import InputError
from jaxfusion.fields import LensRunConfig
from jaxfusion.lens.activations import Kept, KeptBatches, cut, keep, top
from jaxfusion.lens.model import Model, load_model
from jaxfusion.lens.objective import Manipulation, Supervised, aims, make_goals
from jaxfusion.lens.probe import Probe
from jaxfusion.lens.prompts import training_rows
from jaxfusion.nn.decoder import Decoder
from jaxfusion.sharding.hosts import all_or_none, check_peers
from jaxfusion.sharding.mesh import sharding
from jaxfusion.training.checkpoint import saved_steps, trained_part
from jaxfusion.training.loop import fit
from jaxfusion.training.optimizer import group_of_each
from jaxfusion.training.state import Flat
from jaxfusion.training.step import Loss
from jaxfusion.training.trainer import Run
from jaxfusion.training.workdir import begin, check_workdir

KEPT = ".kept-"  # how directories of activations on disk begin
logger = logging.getLogger(__name__)


def train_all(
    config: LensRunConfig, runs: dict[str, LensRunConfig], texts: dict[str, list[str]],
    answers: list[str] | None, model: Model, found: Probe, workdir: Path, mesh,
) -> tuple[Model, dict[str, float]]:
    """Trains every run that is not at its end, each in a directory of its own.

    What all of them read is kept first; then the LLM leaves memory, of which it takes most, until
    they are done.

    Args:
      model: emptied, if anything is to be trained.

    Returns:
      The model, loaded anew if anything was trained, and the seconds of those that were.

    Raises:
      InputError: whatever is wrong with a run's settings or workdir; or the LLM has changed.
    """
    prompts = {name: min(run.data.rows, len(texts[config.data.central]))
               for name, run in runs.items()}
    with all_or_none():
        due = {name: run for name, run in runs.items()
               if not at_end(run, folder_of(name, workdir), prompts[name])}
    check_peers(due=str(list(due)))
    if not due:
        return model, {}
    seconds = _keep_and_train(config, due, prompts, texts, answers, model, found, workdir)
    with all_or_none():
        again, _ = load_model(config, mesh)
    if again.identity != model.identity:
        raise InputError(f"{config.bridge or config.decoder.checkpoint} was changed while the top "
                         "blocks trained; start again with another --workdir")
    return again, seconds


def _keep_and_train(
    config: LensRunConfig, due: dict[str, LensRunConfig], prompts: dict[str, int],
    texts: dict[str, list[str]], answers: list[str] | None, model: Model, found: Probe,
    workdir: Path,
) -> dict[str, float]:
    """A function of its own, so that all it holds is gone when the model is loaded anew."""
    decoder, params = model.bridge.decoder, model.params["decoder"]
    jobs = {name: make_job(run, decoder, params, found) for name, run in due.items()}
    kinds: dict[tuple[bool, int], int] = {}  # and the most prompts that a run of it reads
    for name, run in due.items():
        kinds[kind_of(run)] = max(prompts[name], kinds.get(kind_of(run), 0))
    kept, seconds = {}, {}
    # Of what is no block, the losses of Lens read the final norm alone.
    unread = () if any(supervised for supervised, _ in kinds) else ("embed", "head")
    with ExitStack() as stack:
        for (supervised, blocks), most in kinds.items():
            with all_or_none():
                rows, tokenizers = training_rows(
                    config, model, {language: x[:most] for language, x in texts.items()},
                    answers[:most] if supervised else None)
            disk = None if config.lens.keep == "memory" else Path(stack.enter_context(
                tempfile.TemporaryDirectory(dir=workdir, prefix=KEPT)))
            kept[supervised, blocks] = keep(
                model.bridge, model.params, rows, tokenizers, blocks, config.eval.batch_size,
                config.data.buckets, disk)
        read = {part: x for part, x in params.items() if part not in unread}
        tops = {blocks: cut(read, decoder.config.num_layers - blocks, None)
                for blocks in {blocks for _, blocks in kinds}}
        model.params.clear()
        del params, read
        for name, run in due.items():
            logger.info("\n%s", name)
            clock = time.monotonic()
            own = jax.tree.map(lambda x, n=prompts[name]: x[:n], kept[kind_of(run)])
            train_top(run, folder_of(name, workdir), jobs[name], tops[run.lens.blocks], own)
            seconds[name] = time.monotonic() - clock
    return seconds


def kind_of(run: LensRunConfig) -> tuple[bool, int]:
    """By what it differs what runs keep: whether answers are read, and the blocks that train."""
    return run.lens.method == "supervised", run.lens.blocks


def folder_of(name: str, workdir: Path) -> Path:
    """The workdir of a run of the sweep."""
    return workdir / configs.directory_name(name)


def steps_of(run: LensRunConfig, prompts: int) -> int:
    """The steps of a run on so many prompts."""
    return run.train.steps or run.train.epochs * -(-prompts // run.train.batch_size)


def at_end(run: LensRunConfig, workdir: Path, prompts: int) -> bool:
    """Whether a workdir holds the run's last step, and it can be read.

    Raises:
      InputError: the workdir holds another run.
    """
    check_workdir(run, workdir)
    last = steps_of(run, prompts)
    return last in saved_steps(workdir) and trained_part(workdir)[0] == last


@dataclass(frozen=True)
class TopJob:
    """What a run trains, and for what.

    Attributes:
      groups: optimiser group of each parameter that trains. aims: what the loss aims at, by path.
    """

    loss: Loss
    groups: dict[str, str]
    aims: Flat


def make_job(run: LensRunConfig, decoder: Decoder, params, found: Probe) -> TopJob:
    """The job of a run on an LLM.

    Raises:
      InputError: optimiser groups that train something but blocks, or goals that the probe's
        languages do not allow.
    """
    c = run.lens
    groups = group_of_each(traverse_util.flatten_dict({"decoder": params}, sep="/"),
                           run.optimizer.groups)
    if other := [name for name in groups if not name.startswith("decoder/blocks/")]:
        raise InputError(f"optimizer.groups train {other[0]}: of a Lens run only decoder/blocks/ "
                         "can train")
    upper = top(decoder, c.blocks)
    if c.method == "supervised":
        return TopJob(loss_of(upper, None), groups, {})
    goals = make_goals(found, c.blocks, c.loss_layers, c.rank, c.weights)
    return TopJob(loss_of(upper, tuple(goals)), groups, aims(goals, c))


@lru_cache(4)  # equal losses as one object, by which the compiled step is known again
def loss_of(upper: Decoder, layers: tuple[int, ...] | None) -> Loss:
    """The loss of manipulation behind these trained blocks; of supervised tuning without them."""
    return (Supervised(upper) if layers is None else Manipulation(upper, layers)).loss


def train_top(run: LensRunConfig, workdir: Path, job: TopJob, params, kept: Kept) -> None:
    """Trains the top blocks on what was kept, from where the workdir is to the last step.

    Args:
      params: of the top blocks, and what is read besides; they stay as they are.
    """
    part = traverse_util.flatten_dict({"decoder": params}, sep="/")
    steps = steps_of(run, len(kept.last))
    # Copies: the steps take them, and other runs start with the same blocks.
    trainable = {name: jnp.array(part[name], jnp.float32) for name in job.groups}
    frozen = {name: x for name, x in part.items() if name not in job.groups} | job.aims
    with begin(run, workdir) as start:
        batches = KeptBatches(kept, run.train.batch_size, run.train.seed, steps,
                              sharding(start.mesh, "batch"))
        fit(Run(start.config, job.loss, trainable, frozen, job.groups, batches, steps,
                lambda _: {"none": 0.0}, "none", job.loss), start)
