"""A Lens run: probe an LLM's languages, move them, score it beside its baselines, draw."""

import json
import logging
import time
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxfusion import config as configs
from jaxfusion.data.batching import TokenRow, tokenize_bare
from jaxfusion.data.parallel import read_parallel
from jaxfusion.data.sources import Example, read_examples
from jaxfusion.data.tasks import check_languages, get_task
from jaxfusion.data.tokenizers import Tokenizers, chat_turn, load_tokenizer
from jaxfusion.errors import InputError, choose
from jaxfusion.evaluation.comparison import Comparison, as_json, markdown
from jaxfusion.evaluation.pictures import draw_accuracy, draw_languages
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.fields import DTYPES, METHODS, REMATS, LensRunConfig
from jaxfusion.files import write_whole
from jaxfusion.hf.configs import decoder_config
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import load_params, read_config
from jaxfusion.hf.tables import table
from jaxfusion.lens import probe as probing
from jaxfusion.lens.manipulate import (
    Kept,
    KeptBatches,
    Manipulation,
    Supervised,
    cut,
    keep,
    make_goals,
    split,
)
from jaxfusion.lens.probe import Probe
from jaxfusion.nn.bridge import Bridge
from jaxfusion.nn.decoder import Decoder, make_edits
from jaxfusion.sharding.hosts import is_first
from jaxfusion.sharding.mesh import make_mesh, sharding
from jaxfusion.training.loop import CONFIG_FILE, Run, batch_shares, check_workdir, run_to_end
from jaxfusion.training.optimizer import group_of_each
from jaxfusion.training.state import Flat, describe, kernel_for

PROBE_FILE = "probe.safetensors"
UNTOUCHED = "LLM"  # the model as it was, in tables
logger = logging.getLogger(__name__)


class Model:
    """The LLM on the mesh, with its tokenizer."""

    def __init__(self, config: LensRunConfig, mesh):
        tower = config.decoder
        path, self.commit = resolve(tower.checkpoint, tower.revision)
        shape = decoder_config(read_config(path), f"{path}/config.json")
        self.decoder = Decoder(shape, jnp.dtype(choose("dtype", tower.dtype, DTYPES)),
                               choose("remat", tower.remat, REMATS),
                               kernel_for("decoder", tower.attention))
        tokens = jnp.zeros((1, 2), jnp.int32)
        places = describe(lambda: self.decoder.init(
            jax.random.key(0), tokens, tokens, tokens, method="score")["params"], mesh)
        flat = load_params(path, table(shape), places)
        self.params = traverse_util.unflatten_dict(flat, sep="/")
        tokenizer = load_tokenizer(path, shape.vocab_size, "decoder")
        turn = chat_turn(tokenizer) if config.data.chat_template else None
        self.tokenizers = Tokenizers(None, tokenizer, turn)
        self.bridge = Bridge(None, self.decoder, None, "last")


def lens(config: LensRunConfig, workdir: Path) -> Comparison | None:
    """Probes, runs every method of the sweep (or the config's own), scores them and reports.

    Writes `probe.safetensors`, `languages.png`, a directory with checkpoints for each method that
    trains, and with `eval.tasks` `report.md`, `report.json` and `accuracy.png`. Started again, it
    goes on where it stopped.

    Raises:
      InputError: whatever is wrong with the config, data, checkpoint or workdir.
    """
    config = check_workdir(config, workdir)
    runs = variants(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        model = Model(config, mesh)
        config = replace(config, decoder=replace(
            config.decoder, revision=model.commit or config.decoder.revision))
        texts, answers = read_parallel(config.data)
        rows = prompt_rows(config, model.tokenizers, texts)
        workdir.mkdir(parents=True, exist_ok=True)
        if is_first():
            configs.save(config, workdir / CONFIG_FILE)
        found = probe(config, model, rows)
        if is_first():
            probing.save(found, workdir / PROBE_FILE, asdict(config))
        say_probe(found)

        @lru_cache(2)  # what several runs of a sweep share
        def kept(supervised: bool, blocks: int, number: int) -> Kept:
            return keep(model.decoder, model.params,
                        training_rows(config, model, texts, answers, supervised, number),
                        model.tokenizers.start, blocks, config.eval.batch_size)

        examples = read_tasks(config)
        correct, seconds, moved = {UNTOUCHED: score(config, model, examples)}, {}, {}
        for name, run in runs.items():
            logger.info("\n%s", name)
            clock = time.monotonic()
            edits, params = None, model.params
            if run.lens.method in ("lens", "supervised"):
                params = trained(run, workdir / configs.directory_name(name), model, found, kept)
                moved[name] = probe(config, model, rows, params)
            elif run.lens.method != "none":
                edits = partial(make_language_edits, run, found)
            seconds[name] = {"train": time.monotonic() - clock}
            correct[name] = score(config, model, examples, params, edits)
    if not is_first():
        return None
    draw_languages(found, moved, workdir / "languages.png")
    return report(config, correct, seconds, workdir) if examples else None


def variants(config: LensRunConfig) -> dict[str, LensRunConfig]:
    """The runs of a sweep by name, each a config of its own; without a sweep the config's own."""
    choose("lens.method", config.lens.method, METHODS)
    if not config.sweep:
        return {config.lens.method: config}
    return configs.sweep(config)


def prompt_rows(config: LensRunConfig, tokenizers: Tokenizers, texts) -> dict[str, list[TokenRow]]:
    """Prompts as ids, by language; too long ones lose their beginning, which is said."""
    found, most = {}, config.data.max_tokens
    for name, prompts in texts.items():
        prompts = prompts[: config.data.probe_rows]
        found[name], cut_rows = tokenize_bare(
            [Example(prompt, "", -1) for prompt in prompts], tokenizers, most)
        if cut_rows.any:
            logger.warning("%s: %d prompts lose their beginning at %d tokens", name,
                           cut_rows.texts, most)
    return found


def training_rows(config, model: Model, texts, answers, supervised: bool, number: int):
    """The prompts that are trained on, with their answers for supervised tuning."""
    if supervised and answers is None:
        raise InputError("supervised tuning needs answers: set data.answer to their column")
    found = {}
    for name, prompts in texts.items():
        prompts = prompts[:number]
        rows, _ = tokenize_bare([Example(prompt, "", -1) for prompt in prompts], model.tokenizers,
                                config.data.max_tokens)
        if supervised:
            ends = model.tokenizers.encode_answers(prompts, answers[:number])
            rows = [replace(row, target=[*end, model.tokenizers.eos])
                    for row, end in zip(rows, ends, strict=True)]
        found[name] = rows
    return found


def probe(config: LensRunConfig, model: Model, rows, params=None) -> Probe:
    """The means of the LLM as it was, or with other parameters."""
    return probing.probe(model.decoder, model.params if params is None else params, rows,
                         model.tokenizers, config.data.buckets, config.eval.batch_size)


def say_probe(found: Probe) -> None:
    """How far the languages lie from the central one in the last layer, against their spread."""
    spread = np.sqrt(found.variances[-1].sum(axis=-1).mean())
    distances = np.linalg.norm(found.displacements(found.layers), axis=-1)
    logger.info("%d prompts probed; distance to %s in the last layer, in units of the spread: %s",
                found.rows, found.languages[0],
                ", ".join(f"{name} {d / spread:.2f}" for name, d in zip(
                    found.languages[1:], distances[1:], strict=True)))


def trained(run: LensRunConfig, workdir: Path, model: Model, found: Probe, kept) -> dict[str, Any]:
    """The LLM's parameters after a run of `run_to_end` on its top blocks."""
    supervised = run.lens.method == "supervised"
    blocks = run.lens.blocks
    _, top = split(model.decoder.config, blocks)
    first = model.decoder.config.num_layers - blocks
    upper = model.decoder.clone(config=top)
    goals = make_goals(found, blocks, run.lens.loss_layers, run.lens.rank, run.lens.weights)
    part = traverse_util.flatten_dict({"decoder": cut(model.params, first, None)}, sep="/")
    groups = group_of_each(part, run.optimizer.groups)
    if other := [name for name in groups if not name.startswith("decoder/blocks/")]:
        raise InputError(f"optimizer.groups train {other[0]}: of a Lens run only decoder/blocks/ "
                         "can train")
    job = Supervised(upper) if supervised else Manipulation(
        upper, goals, run.lens.align, run.lens.separate, run.lens.retain)

    def prepare(config, mesh, fresh):
        batch_shares(config.train, mesh)
        data = kept(supervised, blocks, config.data.rows)
        per_epoch = -(-len(data.last) // config.train.batch_size)
        steps = config.train.steps or config.train.epochs * per_epoch
        batches = KeptBatches(data, config.train.batch_size, config.train.seed, steps,
                              sharding(mesh, "batch"))
        trainable = {name: part[name].astype(jnp.float32) for name in groups}
        frozen = {name: x for name, x in part.items() if name not in groups}
        return Run(config, job.loss, trainable, frozen, groups, batches, steps,
                   lambda _: {"none": 0.0}, "none", job.loss)

    state = run_to_end(run, workdir, prepare)
    return with_top(model.params, state.trainable, first)


def with_top(params: dict[str, Any], trained_part: Flat, first: int) -> dict[str, Any]:
    """The parameters with trained blocks in the place of those from `first` on."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, x in trained_part.items():
        name = name.removeprefix("decoder/")
        flat[name] = jnp.concatenate([flat[name][:first], x.astype(flat[name].dtype)])
    return traverse_util.unflatten_dict(flat, sep="/")


def make_language_edits(run: LensRunConfig, found: Probe, language: str) -> dict[str, Any]:
    """What steering and disentangling change in the LLM when it reads a language."""
    c, layers, width = run.lens, found.layers, found.means.shape[-1]
    third = layers // 3
    chosen = c.layers or tuple(range(third + 1, layers - third + 1))
    rank = c.rank or len(found.languages) - 1
    shift, basis = np.zeros((layers, width)), np.zeros((layers, width, rank))
    strength = np.zeros(layers)
    for layer in chosen:
        spaces = found.subspaces(layer, c.rank)
        if c.method == "steering":
            weight = c.strength * c.weights.get(language, 1.0)
            shift[layer - 1] = weight * found.displacements(layer, c.rank)[
                found.languages.index(language)]
        else:
            basis[layer - 1], strength[layer - 1] = spaces.specific, c.strength
    return make_edits(*(jnp.asarray(x, jnp.float32) for x in (shift, basis, strength)))


def read_tasks(config: LensRunConfig) -> dict[tuple[str, str], list[Example]]:
    """Test rows of every task, in the central language and the targets."""
    found = {}
    for name in config.eval.tasks:
        languages = config.eval.languages or (config.data.central, *config.data.targets)
        check_languages(name, languages)
        for language in languages:
            found[name, language] = read_examples(
                name, get_task(name), config.data.task_split, language, config.data.task_path
            )[: config.data.task_rows]
    return found


def score(config: LensRunConfig, model: Model, examples, params=None, edits=None):
    """What is right, by task and language, of the LLM with other parameters or edits."""
    scorer = Scorer(model.bridge, model.tokenizers, config.eval, bare=True)
    tree = {"decoder": model.params if params is None else params}
    found = {}
    for (task, language), rows in examples.items():
        extra = {} if edits is None else {"edits": edits(language)}
        scored = scorer({**tree, **extra}, rows, get_task(task))
        kind = "likelihood" if get_task(task).labels else "greedy_exact"
        found.setdefault(task, {})[language] = [int(x) for x in scored.correct[kind]]
    return found


def report(config: LensRunConfig, correct, seconds, workdir: Path) -> Comparison:
    """Writes the tables of all tasks; returns the first one's comparison."""
    pages, figures, comparisons = [], {"seconds": seconds}, []
    for task in config.eval.tasks:
        languages = config.eval.languages or config.data.targets
        others = tuple(name for name in languages if name != config.data.central)
        labels = get_task(task).labels
        comparison = Comparison(
            task, "likelihood" if labels else "greedy_exact",
            {name: found[task] for name, found in correct.items()}, {"targets": others},
            UNTOUCHED, {}, {}, (f"{config.data.central} is the central language.",))
        comparisons.append(comparison)
        pages.append(markdown(comparison))
        figures[task] = as_json(comparison)
    write_whole(workdir / "report.md", "\n".join(pages))
    write_whole(workdir / "report.json", json.dumps(figures, indent=2) + "\n")
    labels = get_task(comparisons[0].task).labels
    draw_accuracy(comparisons[0], workdir / "accuracy.png", 1 / len(labels) if labels else None)
    print("\n".join(pages))
    return comparisons[0]
