"""The bridge's run: what it loads, what it learns from, how it is scored."""

import logging
from pathlib import Path

from jaxfusion.data.batching import find_shapes, tokenize
from jaxfusion.data.packing import find_packing
from jaxfusion.data.pipeline import Batches, steps_per_epoch, subset
from jaxfusion.data.seen import fingerprints
from jaxfusion.data.sources import Example, read_examples
from jaxfusion.data.task import Task
from jaxfusion.data.tasks import check_languages, get_task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.metrics import accuracy
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.fields import Config
from jaxfusion.sharding.mesh import sharding
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.loop import CONFIG_FILE, Run, batch_shares, run_to_end
from jaxfusion.training.state import Flat, Model, State, load_model, merge, overlay, plain
from jaxfusion.training.warm_start import warm_start

logger = logging.getLogger(__name__)


def train(config: Config, workdir: Path, profile: tuple[int, int] | None = None) -> State:
    """Trains a bridge; see `run_to_end`."""
    return run_to_end(config, workdir, prepare, profile)


def prepare(config: Config, mesh, fresh: bool = True) -> Run:
    """Loads data and model, and says what was found; only a fresh run starts from another."""
    task = get_task(config.data.task)
    check_languages(config.data.task, (config.data.language,))
    shares = batch_shares(config.train, mesh)
    examples, dev = (
        read_examples(config.data.task, task, split, config.data.language, config.data.path)
        for split in ("train", "dev")
    )
    examples = subset(examples, config.data.train_rows, config.data.balanced, config.train.seed)
    model = load_model(config, mesh)
    if config.train.init_from is not None and fresh:
        model = start_from(model, Path(config.train.init_from))
    elif config.projector.warm_start and fresh:
        model = warm_start(model, examples)
    rows, cut = tokenize(
        examples, model.tokenizers, text_prompt=config.data.text_prompt,
        max_encoder_tokens=config.data.max_encoder_tokens,
        max_decoder_tokens=config.data.max_decoder_tokens, with_target=True,
        latents=model.bridge.latents,
    )
    layout = find_shapes(rows, config.data.buckets)
    if config.data.pack:
        layout = find_packing(
            rows, config.train.batch_size, len(model.tokenizers.start), config.train.seed,
            2 * config.data.max_encoder_tokens, multiple=shares,
        )
    steps = config.train.steps or config.train.epochs * steps_per_epoch(
        len(rows), config.train.batch_size
    )
    batches = Batches(
        rows, layout, model.tokenizers, config.train.batch_size, config.train.seed, steps,
        sharding(mesh, "batch"),
    )
    logger.info("%s training rows", f"{len(rows):,}")
    if cut.any:
        logger.warning("longer than the limits: %s", cut)
    return Run(
        model.config, model.bridge.loss, model.trainable, model.frozen, model.groups, batches,
        steps, _dev_scorer(model, dev[: config.data.dev_rows], task), "exact_match",
        plain(model.bridge).loss, fingerprints(example.query for example in examples),
    )


def start_from(model: Model, workdir: Path) -> Model:
    """The model with the trained part of another run (the second stage of a two-stage recipe)."""
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(f"train.init_from: {workdir} is no workdir of a run")
    step, trained = trained_part(workdir)
    logger.info("starting from step %d of %s", step, workdir)
    absent = sorted(set(model.trainable) - set(trained))
    if absent:
        logger.warning("it has no %s: these start afresh", ", ".join(absent))
    return overlay(model, trained, str(workdir))


def _dev_scorer(model: Model, dev: list[Example], task: Task):
    """Trained parameters -> accuracy on the development rows, by scoring name."""
    config = model.config
    scorer = Scorer(model.bridge, model.tokenizers, config.eval, config.data.text_prompt)

    def score(trainable: Flat) -> dict[str, float]:
        scored = scorer(merge(trainable, model.frozen), dev, task)
        if scored.cut.any:
            logger.warning("development rows longer than the limits: %s", scored.cut)
        return {name: accuracy(rows)["accuracy"] for name, rows in scored.correct.items()}

    return score
