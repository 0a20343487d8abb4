"""Pretrains one tower from scratch on text files, into a Hugging Face directory."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxfusion.data.contamination import check_seen, fingerprints
from jaxfusion.data.pipeline import total_steps
from jaxfusion.data.pocket.lexicon import ABOUT_FILE, WORLD_FILE, check_version
from jaxfusion.data.tokenizers import train_tokenizer
from jaxfusion.errors import InputError
from jaxfusion.fields import PretrainConfig, TowerConfig
from jaxfusion.files import new_directory
from jaxfusion.hf.save import write_tokenizer, write_tower
from jaxfusion.nn.bridge import Params
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import Encoder, EncoderConfig
from jaxfusion.pretraining.corpus import Document, read_corpus
from jaxfusion.pretraining.objectives import TextBatches, causal_rows, denoising_rows
from jaxfusion.pretraining.text_lm import TextLM
from jaxfusion.sharding.hosts import all_or_none, fetch, is_first
from jaxfusion.sharding.mesh import sharding
from jaxfusion.sharding.rules import replicated
from jaxfusion.training.build import describe, initialise
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.load import replaced
from jaxfusion.training.loop import fit
from jaxfusion.training.optimizer import group_of_each
from jaxfusion.training.state import Flat, State, merge
from jaxfusion.training.trainer import Run, batch_multiple, put_batch
from jaxfusion.training.workdir import begin

CHECKPOINT = "hf"  # below the workdir
logger = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig, workdir: Path, profile: tuple[int, int] | None = None
) -> State:
    """Trains a tower and writes `WORKDIR/hf`, an ordinary Hugging Face directory.

    Raises:
      InputError: invalid config, text, checkpoints or workdir, or processes that disagree.
      Stopped: SIGTERM was received; the state is saved.
    """
    with begin(config, workdir) as start:
        with all_or_none():
            run, tower, tokenizer = prepare(start.config, start.mesh, start.fresh)
            if not start.fresh:
                check_seen(workdir, run.seen)
        state = fit(run, start, profile)
        out = workdir / CHECKPOINT
        if not _is_of(out, config):
            about = _about(config, run.score(state.trainable))
            params = fetch(state.trainable)
            if is_first():
                shutil.rmtree(out, ignore_errors=True)  # from fewer steps
                write_checkpoint(out, tower, tokenizer, params, about)
    return state


def _about(config: PretrainConfig, dev: dict[str, float]) -> dict[str, Any]:
    """The origin of a tower: config, version of the pocket world if there is one, scores."""
    world = Path(config.data.path) / WORLD_FILE
    fields = dataclasses.asdict(config)
    fields["data"]["path"] = Path(config.data.path).name
    return {"world": json.loads(world.read_text("utf-8")) if world.is_file() else None,
            "dev": dev, "config": fields}


def _is_of(out: Path, config: PretrainConfig) -> bool:
    """Whether the directory was written by a run of the same length."""
    try:
        was = json.loads((out / ABOUT_FILE).read_text("utf-8"))["config"]["train"]
        return (was["steps"], was["epochs"]) == (config.train.steps, config.train.epochs)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(config: PretrainConfig, mesh, fresh: bool = True):
    """Returns the run, its tower's shape, and the tokenizer trained on the same text.

    Raises:
      InputError: objective and tower do not fit each other, or text is missing.
    """
    c, role = config.train, config.tower.role
    batch_multiple(c, mesh)
    texts, pairs = read_texts(config)
    tokenizer = train_tokenizer(role, _balanced(texts, config.data.sampling, c.seed),
                                config.tower.vocab_size)
    train_rows, dev_rows = hold_out(texts, config.data.dev_rows, c.seed)
    tower = tower_shape(config.tower, len(tokenizer))
    model = TextLM(role, Encoder(tower) if role == "encoder" else Decoder(tower),
                   config.objective.noise)
    limit, steps = config.data.max_tokens, total_steps(c, len(train_rows))
    if role == "decoder":
        rows, cut = causal_rows(texts, tokenizer, config.objective, limit)
    else:
        rows, cut = denoising_rows(texts, pairs, tokenizer, config.objective, config.data.pivot,
                                   limit)
    if cut:
        logger.warning("%d texts are truncated to %d tokens", cut, limit)
    batches = TextBatches(rows, [d.language for d in texts], train_rows, config.data,
                          c.batch_size, c.seed, steps, sharding(mesh, "batch"))
    logger.info("%s texts, %d tokens in the vocabulary", f"{len(train_rows):,}", len(tokenizer))

    def init() -> Params:
        return model.init(jax.random.key(c.seed))

    trainable = initialise(init, describe(init, mesh))
    if c.init_from is not None and fresh:
        trainable = replaced(trainable, trained_part(Path(c.init_from))[1], c.init_from)
    run = Run(config, model.loss, trainable, {},
              group_of_each(trainable, config.optimizer.groups), batches, steps,
              _dev_scorer(model, batches, dev_rows, mesh, config), best="accuracy",
              plain_loss=model.loss, seen=fingerprints(_every_text(texts, pairs)))
    return run, tower, tokenizer


def _every_text(
    texts: Sequence[Document], pairs: dict[str, list[tuple[str, str]]]
) -> Iterator[str]:
    """All that a run learns from, its tokenizer too."""
    yield from (f"{d.text} {d.answer}" for d in texts)
    yield from (f"{a} {b}" for rows in pairs.values() for a, b in rows)


def read_texts(config: PretrainConfig) -> tuple[list[Document], dict[str, list[tuple[str, str]]]]:
    """The texts that the objective learns from, and, where it reads them, pairs by language.

    Raises:
      InputError: the objective does not train such a tower, or text that it needs is missing.
    """
    name, role = config.objective.name, config.tower.role
    if (name == "causal_lm") != (role == "decoder"):
        raise InputError(f"objective '{name}' does not train a tower of role '{role}': use "
                         "causal_lm for a decoder, masked_lm or code_switch for an encoder")
    path = Path(config.data.path).expanduser()
    check_version(path)
    corpus = read_corpus(path, config.data.languages)
    # Only an LLM learns to answer from solved rows; an encoder reads plain text.
    texts = [d for d in corpus.documents if role == "decoder" or not d.answer]
    if config.data.translations and role == "decoder":
        texts += [Document(language, f"{a} = {b}") for language, rows in corpus.pairs.items()
                  for a, b in rows]
    if name == "code_switch" and config.data.pivot not in {d.language for d in texts}:
        raise InputError(f"{path} has no text-{config.data.pivot}.txt; set data.pivot to the "
                         "language of its pairs' first column")
    if name == "code_switch" and not corpus.pairs:
        raise InputError(f"{path} has no pairs-LANGUAGE.tsv, which objective "
                         "code_switch needs; use masked_lm")
    return texts, corpus.pairs if name == "code_switch" else {}


def hold_out(texts: Sequence[Document], dev_rows: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Numbers of the texts to train on, and of those held out.

    Raises:
      InputError: nothing is left to train on.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    held, train = np.split(order, [dev_rows])
    if not len(train):
        raise InputError(f"data.dev_rows is {dev_rows}, but there are only {len(order)} texts")
    # A text with duplicates in the training rows is not held out.
    seen = {texts[i].text for i in train}
    return train, [i for i in held if texts[i].text not in seen]


def tower_shape(config: TowerConfig, vocab_size: int) -> EncoderConfig | DecoderConfig:
    """The tower's shape; the rows of its table are a multiple of 32."""
    rows = -(-vocab_size // 32) * 32
    shape = (rows, config.d_model, config.d_ff, config.num_layers, config.num_heads)
    if config.role == "encoder":
        return EncoderConfig(*shape, head_dim=config.head_dim)
    return DecoderConfig(*shape, num_kv_heads=config.num_heads, head_dim=config.head_dim,
                         tie_embeddings=True)


def write_checkpoint(
    out: Path, tower: EncoderConfig | DecoderConfig, tokenizer, flat: Flat, about: dict[str, Any]
) -> None:
    """Writes `config.json`, `model.safetensors`, the tokenizer's files and `pretraining.json`.

    Args:
      about: its origin, for `pretraining.json`.
    """
    params, = traverse_util.unflatten_dict(flat, sep="/").values()
    with new_directory(out) as partial:
        write_tower(partial, tower, params)
        write_tokenizer(partial, tokenizer)
        (partial / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def _balanced(documents: Sequence[Document], sampling: float, seed: int) -> list[str]:
    """Texts for the tokenizer, with each language's share as in training (n**sampling)."""
    by_language: dict[str, list[str]] = {}
    for d in documents:
        by_language.setdefault(d.language, []).append(f"{d.text} {d.answer}".strip())
    share = {name: len(texts) ** sampling for name, texts in by_language.items()}
    scale = max(len(by_language[name]) / share[name] for name in share)
    rng = np.random.default_rng(seed)
    return [
        texts[i % len(texts)]
        for name, texts in by_language.items()
        for i in rng.permutation(round(scale * share[name]))
    ]


def _dev_scorer(
    model: TextLM, batches: TextBatches, held_out: Sequence[int], mesh, config: PretrainConfig
):
    """Trained parameters -> weighted loss, and accuracy at slots with the full weight (hidden or
    replaced words; answers), on full batches of the held-out texts."""
    full = max(1.0, config.objective.answer_weight) if model.role == "decoder" else 1.0
    size, rng = batches.batch_size, np.random.default_rng(0)
    if len(held_out) < size:
        raise InputError(f"only {len(held_out)} texts are held out, expected at least "
                         f"train.batch_size ({size}); set data.dev_rows higher")
    dev = [batches.batch(held_out[i : i + size], rng)
           for i in range(0, len(held_out) - size + 1, size)]

    @jax.jit
    def measure(trainable, batch):
        params = merge(trainable, {})
        return replicated(jnp.stack([*model.loss(params, batch),
                                     *model.hits(params, batch, full)]))

    def score(trainable: Flat) -> dict[str, float]:
        loss, weight, hits, counted = np.array(
            [measure(trainable, put_batch(batch, mesh)) for batch in dev]
        ).T
        return {"loss": float((loss * weight).sum() / weight.sum()),
                "accuracy": float(hits.sum() / max(counted.sum(), 1))}

    return score
