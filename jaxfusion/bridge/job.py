"""The bridge's run: what it loads, what it learns from, how it is scored."""

import logging
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import jax

from jaxfusion.background import in_background
from jaxfusion.bridge.development import Rows, deciding, make_score, read_development
from jaxfusion.bridge.rows import shapes_of, tokenized
from jaxfusion.bridge.warm_start import warm_start
from jaxfusion.config import CONFIG_FILE, first_stage, stage_before
from jaxfusion.data.batching import TokenRows
from jaxfusion.data.contamination import check_seen, fingerprints
from jaxfusion.data.coverage import SAMPLE, check_joints, check_reading
from jaxfusion.data.packing import find_packing
from jaxfusion.data.pipeline import Batches, first_rows, subset, total_steps
from jaxfusion.data.rows.examples import Example, find_source, in_turn, read_stream
from jaxfusion.data.rows.hub import commit_of
from jaxfusion.data.split_text import Continued
from jaxfusion.data.tasks.catalogue import check_languages, get_task
from jaxfusion.data.tasks.spec import Task, configured
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.evaluation.kept_states import keep_states
from jaxfusion.evaluation.scoring import check_scorable
from jaxfusion.fields import Config
from jaxfusion.nn.bridge import Bridge
from jaxfusion.sharding.hosts import all_or_none, check_peers
from jaxfusion.sharding.mesh import sharding
from jaxfusion.training.build import plain, plan_model
from jaxfusion.training.frozen import earlier_part, frozen_of, to_keep
from jaxfusion.training.load import Model, open_towers, overlay, read_model
from jaxfusion.training.loop import fit
from jaxfusion.training.origin import (
    PARTS,
    check_origin,
    different,
    digest_rows,
    is_known,
    read_origin,
)
from jaxfusion.training.state import Flat, State, merge
from jaxfusion.training.trainer import Run, batch_multiple
from jaxfusion.training.workdir import begin, only_run

logger = logging.getLogger(__name__)


def train(config: Config, workdir: Path, profile: tuple[int, int] | None = None) -> State:
    """Trains a bridge in a workdir, from where it is to its last step; its first stage before it,
    if the config has one.

    Args:
      profile: first and last step of a trace in `WORKDIR/profile`.

    Raises:
      InputError: whatever is wrong with the config, data, checkpoints, workdir or other processes.
      Stopped: SIGTERM came; the state is saved.
    """
    if config.first:
        with only_run(config, workdir):
            logger.info("first stage: %s", stage_before(config, workdir))
            train(first_stage(config), stage_before(config, workdir))
            logger.info("second stage: %s", workdir)
    with begin(config, workdir) as start:
        with all_or_none():
            run = prepare(start.config, start.mesh, start.fresh, workdir)
        return fit(run, start, profile)


def prepare(config: Config, mesh, fresh: bool = True, workdir: Path | None = None) -> Run:
    """Loads data and model; `init_from` and the warm start apply only to a fresh run.

    Args:
      workdir: holds what was frozen in a run that is resumed, and the first stage of others.
    """
    shares = batch_multiple(config.train, mesh)
    with all_or_none():  # before anything that processes compute together
        config, task, examples, dev = read_data(config)
        seen = fingerprints(example.query for example in examples)
        if not fresh:
            check_seen(workdir, seen)
        towers = open_towers(config)
        origin = {**towers.origin, "rows": digest_rows([(x.query, x.target) for x in examples])}
        if not fresh:
            check_origin(workdir, origin)
        check_reading(towers.tokenizers, examples)
        # Not only when the run is scored.
        towers.tokenizers.check_languages((*dev, *config.eval.languages))
        plan = plan_model(towers.config, towers.shapes, mesh)
        _check_kept(config, task, plan.groups)
        tokenized = in_background(
            lambda: _tokenize(config, task, examples, plan.bridge, towers.tokenizers))
        model = read_model(towers, plan)
        rows = tokenized.result()
    check_peers(origin=str(origin))
    earlier = {}
    if not fresh:
        model = overlay(model, frozen_of(model, workdir, config), str(workdir))
    elif before := stage_before(config, workdir):
        model, earlier = start_from(model, before)
    elif config.projector.warm_start:
        model = warm_start(model, examples)
    layout = _layout(config, rows, model, shares)
    steps = total_steps(config.train, len(rows))
    batches = Batches(
        rows, layout, model.tokenizers, config.train.batch_size, config.train.seed, steps,
        sharding(mesh, "batch"),
        keep_states(model.bridge, merge(model.trainable, model.frozen), rows, model.tokenizers,
                    config.encoder.keep_states),
    )
    logger.info("%s training rows", f"{len(rows):,}")
    return Run(
        model.config, model.bridge.loss, model.trainable, model.frozen, model.groups, batches,
        steps, make_score(model, dev, task, mesh), best=deciding(config, task),
        plain_loss=plain(model.bridge).loss, seen=seen,
        kept=to_keep(model, earlier) if fresh else None, patience=config.data.dev_patience,
        origin=origin,
    )


def _check_kept(config: Config, task: Task, trained: Collection[str]) -> None:
    """Raises InputError if states may be kept, but change."""
    if not config.encoder.keep_states:
        return
    for wrong, why in (
        (any(path.startswith("encoder/") for path in trained), "parameters of it are trained"),
        (config.encoder.dropout, f"encoder.dropout is {config.encoder.dropout}"),
        (config.aligner.recipe == "paper_code", "aligner.recipe='paper_code' reads padding"),
        (task.unlabelled, f"task '{config.data.task}' splits its texts in each epoch"),
        (jax.process_count() > 1, f"this run has {jax.process_count()} processes"),
    ):
        if wrong:
            raise InputError("encoder.keep_states is for the same states of the same texts in one "
                             f"process, but {why}; set it to 0")


def read_data(config: Config) -> tuple[Config, Task, list[Example], Rows]:
    """The config with its dataset's commit, the task, and the rows of training and development."""
    c = config.data
    task = get_task(c.task, config.tasks)
    languages = task.training_languages(c.language)
    check_languages(c.task, languages, config.tasks)
    if task.unlabelled and (c.pack or c.text_prompt or c.chat_template):
        raise InputError(f"task '{c.task}' is unlabelled text, which fills its rows and follows "
                         "no prompt: leave data.pack, text_prompt and chat_template out")
    if task.development == "exact_match":
        check_scorable(config.eval, c.task, task)
    task = configured(task, c)
    if task.source and "test" not in task.source.splits and not task.unlabelled and c.path is None:
        logger.warning("task '%s' has no test split: eval.py can score the run only with --tasks "
                       "or --data_path", c.task)
    source = find_source(c.task, task, "train", languages[0], c.path)
    if c.revision and source.kind != "hub":
        raise InputError(f"data.revision is for a hub dataset, and rows are read from "
                         f"{source.place}; leave it out")
    commit = commit_of(source, "train", languages[0])
    if commit is not None:
        config = replace(config, data=replace(c, revision=commit))
        task = configured(task, config.data)
    if c.streaming:
        streams = [read_stream(c.task, task, "train", x, c.path) for x in languages]
        train = first_rows(in_turn(streams), c.train_rows, len(task.labels), c.balanced)
    else:
        rows = list(read_stream(c.task, task, "train", c.language, c.path))
        train = subset(rows, c.train_rows, c.balanced, config.train.seed)
    return config, task, train, read_development(config, task)


def _tokenize(
    config: Config, task: Task, examples: list[Example], bridge: Bridge, tokenizers: Tokenizers
) -> TokenRows | Continued:
    clock, prompt = time.monotonic(), config.data.text_prompt
    check_joints(tokenizers, [(prompt.replace("{query}", x.query), x.target)
                              for x in examples[:SAMPLE]])
    rows, cut = tokenized(config, task, examples, tokenizers, bridge.latents)
    if isinstance(rows, Continued) and rows.short:
        logger.warning("%d texts of fewer than two tokens left out", rows.short)
    if cut and cut.any:
        logger.warning("longer than the limits: %s", cut)
    logger.info("%s rows tokenized in %.1f s", f"{len(rows):,}", time.monotonic() - clock)
    return rows


def _layout(config: Config, rows: TokenRows | Continued, model: Model, shares: int):
    c = config.data
    if c.pack:
        return find_packing(
            rows, config.train.batch_size, len(model.tokenizers.start), config.train.seed,
            2 * c.max_encoder_tokens, multiple=shares,
        )
    return shapes_of(config, rows)


def start_from(model: Model, workdir: Path) -> tuple[Model, Flat]:
    """Overlays another run's own parts and trained parameters (the second stage of a
    two-stage recipe); also returns them."""
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(f"train.init_from: {workdir} is not a workdir of a run")
    _compare_towers(model, workdir)
    step, earlier = earlier_part(workdir)
    logger.info("starting from step %d of %s", step, workdir)
    absent = sorted(set(model.trainable) - set(earlier))
    if absent:
        logger.warning("it has no %s: these start afresh", ", ".join(absent))
    return overlay(model, earlier, str(workdir)), earlier


def _compare_towers(model: Model, workdir: Path) -> None:
    """Warns where an earlier run had other towers: shapes alone do not tell."""
    _, was = read_origin(workdir)
    if not is_known(was, model.origin):
        logger.warning("%s has no record of its towers: what it learned fits the same weights "
                       "alone, and whether this run has them is not known", workdir)
    for part in different(was, model.origin):
        if part != "rows":
            logger.warning("%s learned with %s than this run has: what it learned fits the "
                           "same weights alone", workdir, PARTS[part])
