"""A Lens run: probes an LLM's languages, trains or edits it, scores it against baselines."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.coverage import SAMPLE, check_joints
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.errors import InputError
from jaxfusion.fields import DTYPES, LensRunConfig, ParallelConfig
from jaxfusion.lens import probe as probing
from jaxfusion.lens.model import LensModel, load_lens_model
from jaxfusion.lens.parallel_text import read_parallel
from jaxfusion.lens.probe import Probe, load_probe, save_probe
from jaxfusion.lens.prompts import PromptRows, probe_as_authors, prompt_rows
from jaxfusion.lens.report import PICTURE, UNTOUCHED, write_lens_report
from jaxfusion.lens.scores import Questions, Scores, read_questions, score_model
from jaxfusion.lens.sweep import CACHE, folder_of, train_all
from jaxfusion.nn.bridge import Params
from jaxfusion.nn.decoder import make_edits
from jaxfusion.reports.colours import colours_of
from jaxfusion.reports.comparison import Comparison
from jaxfusion.reports.pictures import draw_languages
from jaxfusion.runs.open_run import open_run
from jaxfusion.sharding.hosts import all_or_none, check_peers, is_first
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import saved_steps, trained_part
from jaxfusion.training.origin import PROBE_FILE, check_origin, digest_of
from jaxfusion.training.state import Flat
from jaxfusion.training.trainer import batch_multiple
from jaxfusion.training.workdir import check_workdir, only_run

TRAINING = ("lens", "supervised")
logger = logging.getLogger(__name__)


def lens(config: LensRunConfig, workdir: Path) -> Comparison | None:
    """Probes the LLM, runs every method of the sweep (or the config's own), and reports scores.

    Writes `probe.safetensors`, `languages.png`, a directory with checkpoints for each method that
    trains, and `report.html`, `report.md`, `report.json` with their pictures; scores and report
    also go to the trackers. The same call resumes a stopped run.

    Returns:
      The comparison on the first task, if there are tasks.

    Raises:
      InputError: whatever is wrong with the config, data, checkpoint or workdir.
    """
    with all_or_none():
        config = _with_llm(config)
    mesh = make_mesh(**vars(config.mesh))
    with only_run(config, workdir):
        with jax.set_mesh(mesh):
            with all_or_none():
                run = prepare(config, workdir, mesh)
            run.write_config()
            probe = run.probe()
            before = run.picture(probe)
            scores = run.score_untrained(probe)
            seconds = run.train(probe)
            trained, moved = run.score_trained()
        if not is_first():
            return None
        names = (UNTOUCHED, *run.methods)
        draw_languages(before, moved, workdir / PICTURE, colours_of(names))
        scores = {name: (scores | trained)[name] for name in names}
        return write_lens_report(run.config, run.methods, scores, seconds, workdir)


def _with_llm(config: LensRunConfig) -> LensRunConfig:
    """The config with its bridge's LLM, if it has a bridge."""
    if not config.bridge:
        return config
    llm = open_run(Path(config.bridge)).config.decoder
    if llm.dtype not in DTYPES:
        logger.warning("%s holds its LLM in %s, which Lens cannot move: reading it in bfloat16",
                       config.bridge, llm.dtype)
        llm = replace(llm, dtype="bfloat16")
    return replace(config, decoder=llm)


@dataclass
class LensRun:
    """A Lens run with everything that it reads.

    Attributes:
      config: as resolved. methods: configs of the sweep by name.
      texts: prompts by language. answers: theirs, if any. questions: of the tasks.
      model: the LLM; while methods train it is out of memory.
      probed: prompts to probe, by language. rows: the same as tokens.
    """

    config: LensRunConfig
    workdir: Path
    mesh: Mesh
    methods: dict[str, LensRunConfig]
    texts: dict[str, list[str]]
    answers: list[str] | None
    questions: Questions
    model: LensModel
    probed: dict[str, list[str]]
    rows: PromptRows

    @property
    def training(self) -> dict[str, LensRunConfig]:
        """The methods that train."""
        return {name: run for name, run in self.methods.items() if run.lens.method in TRAINING}

    def write_config(self) -> None:
        """Saves the config, and removes the caches of a killed run."""
        check_peers(config=json.dumps(asdict(self.config), sort_keys=True),
                    prompts=json.dumps([self.texts, self.answers, self.probed]),
                    checkpoint=str(self.model.identity))
        if is_first():
            configs.save(self.config, self.workdir / CONFIG_FILE)
            for leftover in self.workdir.glob(f"{CACHE}*"):
                shutil.rmtree(leftover)

    def probe(self) -> Probe:
        """The probe of the untouched LLM: this run's own, another run's, or a new one."""
        own, languages = self.workdir / PROBE_FILE, tuple(self.probed)
        identity = self.model.identity
        if self.config.data.probe:  # which may have read other prompts
            probe = load_probe(Path(self.config.data.probe), languages,
                               {part: x for part, x in identity.items() if part != "rows"})
        elif own.is_file():
            probe = load_probe(own, languages, identity)
        elif self.config.lens.recipe == "paper_code":
            probe = probe_as_authors(self.model, self.probed)
        else:
            probe = self.probe_again()
        if is_first():
            save_probe(probe, own, identity, asdict(self.config))
        log_probe(probe)
        return probe

    def probe_again(self) -> Probe:
        """A probe of the LLM as it is now."""
        c = self.config
        return probing.probe(self.model.bridge, self.model.params, self.rows,
                             self.model.tokenizers, c.data.buckets, c.eval.batch_size)

    def picture(self, probe: Probe) -> Probe:
        """The probe to draw, of the prompts that are probed again after training; another run's
        probe, or that of the authors' code, has others."""
        if self.config.lens.recipe == "default" and not self.config.data.probe:
            return probe
        return self.probe_again()

    def score_untrained(self, probe: Probe) -> dict[str, Scores]:
        """Scores of the LLM as it is, and of the methods that train nothing."""
        scores = {UNTOUCHED: score_model(self.config, self.model, self.questions)}
        for name, run in self.methods.items():
            if run.lens.method not in TRAINING:
                edits = None if run.lens.method == "none" else partial(
                    make_language_edits, run, probe)
                scores[name] = score_model(self.config, self.model, self.questions, edits)
        return scores

    def train(self, probe: Probe) -> dict[str, float]:
        """Trains what is not trained yet; returns the seconds of each method."""
        self.model, seconds = train_all(self.config, self.training, self.texts, self.answers,
                                        self.model, probe, self.workdir, self.mesh)
        return seconds

    def score_trained(self) -> tuple[dict[str, Scores], dict[str, Probe]]:
        """Scores and probes of the methods that train."""
        scores, probes = {}, {}
        for name in self.training:
            with all_or_none():
                _, blocks = trained_part(folder_of(name, self.workdir))
            with top_blocks(self.model.params, blocks):
                probes[name] = self.probe_again()
                scores[name] = score_model(self.config, self.model, self.questions)
        return scores, probes


def probe_texts(c: ParallelConfig, texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """The prompts to probe by language: from their own file, or the first of `texts`.

    Raises:
      InputError: as in `read_parallel`.
    """
    if c.probe_path is not None:
        texts, _ = read_parallel(replace(c, path=c.probe_path, answer=None))
    return {name: prompts[: c.probe_rows] for name, prompts in texts.items()}


def prepare(config: LensRunConfig, workdir: Path, mesh: Mesh) -> LensRun:
    """Reads and checks all inputs before anything is computed.

    Raises:
      InputError: whatever is wrong with them, or with the settings of a method.
    """
    config = check_workdir(config, workdir)
    runs = method_configs(config)
    texts, answers = read_parallel(config.data)
    for name, run in runs.items():
        if run.lens.method not in TRAINING:
            continue
        batch_multiple(run.train, mesh)
        if run.lens.method == "supervised" and answers is None:
            raise InputError("supervised tuning needs answers: set data.answer to their column")
        if (number := min(run.data.rows, len(texts[config.data.central]))) < run.train.batch_size:
            raise InputError(f"train.batch_size of '{name}' is {run.train.batch_size}, but there "
                             f"are only {number} prompts; set it lower or data.rows higher")
    questions = read_questions(config, runs, texts)
    model, config = load_lens_model(config, mesh)
    probed = probe_texts(config.data, texts)
    model = replace(model, identity={
        **model.identity, "rows": digest_of([texts, answers, probed])})
    for folder in (folder_of(name, workdir) for name in runs):
        if saved_steps(folder):
            check_origin(folder, model.identity)
    if model.bare:
        asked = [(x.query, x.target) for (name, _), rows in questions.tasks.items()
                 if get_task(name, config.tasks).labels for x in rows[:1]]
        if any(run.lens.method == "supervised" for run in runs.values()):
            asked += zip(texts[config.data.central][:SAMPLE], answers[:SAMPLE], strict=True)
        check_joints(model.tokenizers, asked)
    check_layers(runs, model.bridge.decoder.config.num_layers)
    # A saved run must name the LLM that it was trained on.
    runs = {name: replace(run, decoder=config.decoder) for name, run in runs.items()}
    rows = prompt_rows(config, model, probed)
    return LensRun(config, workdir, mesh, runs, texts, answers, questions, model, probed, rows)


def method_configs(config: LensRunConfig) -> dict[str, LensRunConfig]:
    """The configs of a sweep's runs by name; without a sweep the config's own.

    Raises:
      InputError: unknown names, or settings that contradict each other.
    """
    runs = configs.sweep(config) if config.sweep else {config.lens.method: config}
    for name, run in runs.items():
        if name == UNTOUCHED:
            raise InputError(f"a run of a sweep is named '{name}', the name of the original LLM in "
                             "tables; choose another name")
        if run.lens.method == "disentangle" and run.lens.strength < 0:
            raise InputError(f"lens.strength is {run.lens.strength}, expected 0 or more to remove "
                             "a subspace")
        if unknown := sorted(set(run.lens.weights) - set(config.data.targets)):
            raise InputError(f"lens.weights names {', '.join(unknown)}, which is not a target; "
                             f"targets are {', '.join(config.data.targets)}")
        _check_shared(config, name, run)
        rank, most = run.lens.rank, len(config.data.targets)
        if rank is not None and rank > most:
            raise InputError(f"lens.rank is {rank}, expected 1 to {most} with {most + 1} languages")
        losses = (run.lens.align, run.lens.separate, run.lens.retain)
        decay = [group for group, x in run.optimizer.groups.items() if x.weight_decay]
        if run.lens.method == "lens" and not any(losses) and decay:
            raise InputError(f"lens.align, separate and retain of '{name}' are all 0, but "
                             f"optimizer.groups.{decay[0]} has a weight decay, which would only "
                             "shrink the blocks; set a loss's weight, or weight_decay=0")
    if config.lens.recipe == "paper_code" and (config.bridge or not config.data.chat_template):
        raise InputError("lens.recipe='paper_code' needs the chat format of an LLM alone: remove "
                         "bridge and set data.chat_template=True")
    return runs


def _check_shared(config: LensRunConfig, name: str, run: LensRunConfig) -> None:
    """Raises InputError if a run of a sweep changes a setting that all of them share."""
    def shared(c: LensRunConfig) -> dict[str, Any]:
        data = replace(c.data, rows=0)
        return {"decoder": c.decoder, "bridge": c.bridge, "data": data, "mesh": c.mesh,
                "eval": c.eval, "lens.recipe": c.lens.recipe, "lens.keep": c.lens.keep}

    ours, theirs = shared(config), shared(run)
    if other := [field for field in ours if ours[field] != theirs[field]]:
        raise InputError(f"sweep '{name}' sets {other[0]}, which all runs of a sweep share; only "
                         "data.rows may differ")


def check_layers(runs: dict[str, LensRunConfig], layers: int) -> None:
    """Raises InputError for layers that the LLM does not have."""
    for run in runs.values():
        c = run.lens
        if c.method in TRAINING:
            first = layers - c.blocks + 1
            if not 1 <= c.blocks < layers:
                raise InputError(f"lens.blocks is {c.blocks}, expected 1 to {layers - 1}, since "
                                 f"the LLM has {layers} blocks")
            if outside := [x for x in c.loss_layers if not first <= x <= layers]:
                raise InputError(f"lens.loss_layers has {outside[0]}, expected layers that train: "
                                 f"{first} to {layers}")
        # The last layer's states are after the final norm, where edits do not apply.
        elif outside := [x for x in c.layers if not 1 <= x < layers]:
            raise InputError(f"lens.layers has {outside[0]}, expected 1 to {layers - 1}")


def log_probe(probe: Probe) -> None:
    """Logs the languages' distances to the central one in the last layer, in units of spread."""
    spread = np.sqrt(probe.variances[-1].sum(axis=-1).mean())
    distances = np.linalg.norm(probe.means[-1] - probe.means[-1][0], axis=-1)
    logger.info("%d prompts probed; distance to %s in the last layer, in units of the spread: %s",
                probe.rows, probe.languages[0],
                ", ".join(f"{name} {d / spread:.2f}" for name, d in zip(
                    probe.languages[1:], distances[1:], strict=True)))


@contextmanager
def top_blocks(params: Params, part: Flat) -> Iterator[None]:
    """Replaces the LLM's top blocks inside the block; see `swap_top`."""
    own = swap_top(params, part)
    try:
        yield
    finally:
        swap_top(params, own)


def swap_top(params: Params, part: Flat) -> Flat:
    """Replaces the LLM's top blocks in place: a second LLM would not fit into memory.

    Args:
      params: with `decoder`, which is replaced. part: by path, from `decoder/blocks/` on.

    Returns:
      The previous blocks.
    """
    flat = traverse_util.flatten_dict({"decoder": params["decoder"]}, sep="/")
    places = {name: flat[name].sharding for name in part}
    part = {name: jax.device_put(x.astype(flat[name].dtype), places[name])
            for name, x in part.items()}
    old, new = _swap({name: flat[name] for name in part}, part)
    new = jax.device_put(new, places)  # restores the shardings' own spelling
    params["decoder"] = traverse_util.unflatten_dict({**flat, **new}, sep="/")["decoder"]
    return old


@partial(jax.jit, donate_argnums=0)
def _swap(params: Flat, part: Flat) -> tuple[Flat, Flat]:
    first = {name: len(x) - len(part[name]) for name, x in params.items()}
    old = {name: x[first[name]:] for name, x in params.items()}
    new = {name: x.at[first[name]:].set(part[name]) for name, x in params.items()}
    return old, new


def make_language_edits(run: LensRunConfig, probe: Probe, language: str) -> dict[str, Any]:
    """The edits of steering or disentangling when the LLM reads a language."""
    c, layers, width = run.lens, probe.layers, probe.means.shape[-1]
    third = layers // 3
    chosen = c.layers or tuple(range(third + 1, layers - third + 1))
    rank = c.rank or len(probe.languages) - 1
    shift, basis = np.zeros((layers, width)), np.zeros((layers, width, rank))
    strength = np.zeros(layers)
    for layer in chosen:
        spaces = probe.subspaces(layer, c.rank)
        if c.method == "steering":
            weight = c.strength * c.weights.get(language, 1.0)
            shift[layer - 1] = weight * probe.displacements(layer, c.rank)[
                probe.languages.index(language)]
        else:
            basis[layer - 1], strength[layer - 1] = spaces.specific, c.strength
    return make_edits(*(jnp.asarray(x, jnp.float32) for x in (shift, basis, strength)))
