"""Training of a Lens run's top blocks: what they read is kept, then the LLM makes room for it."""

import logging
import tempfile
import time
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import jax.numpy as jnp
from flax import traverse_util

from jaxfusion import config as configs
from jaxfusion.errors import InputError
from jaxfusion.fields import LensRunConfig
from jaxfusion.lens.keep import Kept, KeptBatches, cut, keep, top
from jaxfusion.lens.manipulate import Manipulation, Supervised, aims, make_goals
from jaxfusion.lens.model import Model, load_model
from jaxfusion.lens.probe import Probe
from jaxfusion.lens.prompts import training_rows
from jaxfusion.nn.decoder import Decoder
from jaxfusion.sharding.hosts import with_peers
from jaxfusion.sharding.mesh import sharding
from jaxfusion.training.checkpoint import saved_steps
from jaxfusion.training.loop import Run, check_workdir, run_to_end
from jaxfusion.training.optimizer import group_of_each

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
      The model, loaded anew if anything was trained, and the seconds of every run.
    """
    due, seconds = {}, {}
    for name, run in runs.items():
        number = min(run.data.rows, len(texts[run.data.central]))
        folder = folder_of(name, workdir)
        with_peers(lambda run=run, folder=folder: check_workdir(run, folder))
        if steps_of(run, number) not in saved_steps(folder):
            due[name] = run, (run.lens.method == "supervised", run.lens.blocks, number)
    if not due:
        return model, seconds
    with ExitStack() as stack:
        kept, tops, decoder = {}, {}, model.bridge.decoder
        for wanted in dict.fromkeys(wanted for _, wanted in due.values()):
            supervised, blocks, number = wanted
            rows, tokenizers = training_rows(
                config, model, {name: prompts[:number] for name, prompts in texts.items()},
                answers[:number] if supervised else None)
            disk = None if config.lens.keep == "memory" else Path(stack.enter_context(
                tempfile.TemporaryDirectory(dir=workdir, prefix=KEPT)))
            kept[wanted] = keep(model.bridge, model.params, rows, tokenizers, blocks,
                                config.eval.batch_size, config.data.buckets, disk)
            tops[blocks] = cut(model.params["decoder"], decoder.config.num_layers - blocks, None)
        model.params.clear()
        for name, (run, wanted) in due.items():
            logger.info("\n%s", name)
            clock = time.monotonic()
            train_top(run, folder_of(name, workdir), decoder, tops[run.lens.blocks], found,
                      kept[wanted])
            seconds[name] = time.monotonic() - clock
    return load_model(config, mesh)[0], seconds


def folder_of(name: str, workdir: Path) -> Path:
    """The workdir of a run of the sweep."""
    return workdir / configs.directory_name(name)


def steps_of(run: LensRunConfig, prompts: int) -> int:
    """The steps of a run on so many prompts."""
    return run.train.steps or run.train.epochs * -(-prompts // run.train.batch_size)


def train_top(
    run: LensRunConfig, workdir: Path, decoder: Decoder, params, found: Probe, kept: Kept
) -> None:
    """Trains the top blocks on what was kept, as `run_to_end` does.

    Args:
      decoder: the whole LLM's. params: of its top blocks, and what is no block; they stay.

    Raises:
      InputError: optimiser groups that train something else.
    """
    supervised, blocks = run.lens.method == "supervised", run.lens.blocks
    goals = make_goals(found, blocks, run.lens.loss_layers, run.lens.rank, run.lens.weights)
    part = traverse_util.flatten_dict({"decoder": params}, sep="/")
    groups = group_of_each(part, run.optimizer.groups)
    if other := [name for name in groups if not name.startswith("decoder/blocks/")]:
        raise InputError(f"optimizer.groups train {other[0]}: of a Lens run only decoder/blocks/ "
                         "can train")
    loss = loss_of(top(decoder, blocks), None if supervised else tuple(goals))

    def start(config, mesh, fresh):
        steps = steps_of(config, len(kept.last))
        batches = KeptBatches(kept, config.train.batch_size, config.train.seed, steps,
                              sharding(mesh, "batch"))
        # Copies: the steps take them, and other runs start with the same blocks.
        trainable = {name: jnp.array(part[name], jnp.float32) for name in groups}
        frozen = {name: x for name, x in part.items() if name not in groups}
        frozen |= {} if supervised else aims(goals, run.lens)
        return Run(config, loss, trainable, frozen, groups, batches, steps,
                   lambda _: {"none": 0.0}, "none", loss)

    run_to_end(run, workdir, start)


@lru_cache(4)  # equal losses as one object, by which the compiled step is known again
def loss_of(upper: Decoder, layers: tuple[int, ...] | None):
    """The loss of manipulation behind these trained blocks; of supervised tuning without them."""
    return (Supervised(upper) if layers is None else Manipulation(upper, layers)).loss
