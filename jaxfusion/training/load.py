"""From a config to a model on the mesh: towers from their checkpoints, the rest initialised."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxfusion.data.languages import language_tokens
from jaxfusion.data.pocket.lexicon import check_version
from jaxfusion.data.tokenizers import (
    Tokenizers,
    adds_bos,
    chat_turn,
    load_tokenizer,
    read_end_tokens,
)
from jaxfusion.errors import InputError
from jaxfusion.fields import ROLES, Config, DecoderSettings
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import load_params, read_shape
from jaxfusion.hf.tables import tower_table
from jaxfusion.nn.bridge import Bridge, Params
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import EncoderConfig
from jaxfusion.training.build import Plan, describe, initialise_own, kernel_for, plan_model
from jaxfusion.training.origin import origin_of
from jaxfusion.training.state import Flat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A bridge with its parameters, split in two.

    Attributes:
      config: with the hub commits that were resolved.
      trainable, frozen: parameters by path; together all of them.
      groups: the optimiser group of every trained parameter.
      origin: digests of both towers; see `training/origin.py`.
    """

    config: Config
    bridge: Bridge
    tokenizers: Tokenizers
    trainable: Flat
    frozen: Flat
    groups: dict[str, str]
    origin: dict[str, str]


@dataclass(frozen=True)
class Towers:
    """Both towers' checkpoints, of which no weight is read yet.

    Attributes:
      config: with the hub commits and BOS that were resolved. paths, shapes: by role.
    """

    config: Config
    paths: dict[str, Path]
    shapes: dict[str, EncoderConfig | DecoderConfig]
    tokenizers: Tokenizers

    @cached_property
    def origin(self) -> dict[str, str]:
        """Digests of both; see `training/origin.py`."""
        names = [getattr(self.config, role).checkpoint for role in ROLES]
        return origin_of({role: (self.paths[role], getattr(self.tokenizers, role))
                          for role in ROLES}, " and ".join(names))


def open_towers(config: Config) -> Towers:
    """Finds both towers, and reads their shapes and tokenizers.

    Raises:
      InputError: whatever is wrong with names, files, shapes or tokenizers.
    """
    paths, config = find_towers(config)
    shapes = read_shapes(paths)
    tokenizers = load_tokenizers(config, paths, shapes)
    if config.data.bos is None:  # what it is now is kept for every later start
        config = replace(config, data=replace(config.data, bos=adds_bos(tokenizers.decoder)))
    return Towers(config, paths, shapes, tokenizers)


def load_model(config: Config, mesh: Mesh) -> Model:
    """Reads both towers, initialises the own parts, and puts all of it on the mesh.

    Raises:
      InputError: whatever is wrong with names, files, shapes, tokenizers or patterns.
    """
    towers = open_towers(config)
    return read_model(towers, plan_model(towers.config, towers.shapes, mesh))


def read_model(towers: Towers, plan: Plan) -> Model:
    """The planned model: towers from their checkpoints, the rest from the run's seed.

    Raises:
      InputError: a checkpoint lacks a tensor, or has it in another shape.
    """
    flat = initialise_own(plan, towers.config.train.seed)
    for role in ROLES:
        prefix = f"{role}/"
        params = {name.removeprefix(prefix): leaf for name, leaf in plan.params.items()
                  if name.startswith(prefix)}
        tensors = load_params(towers.paths[role], tower_table(towers.shapes[role]), params)
        flat |= {prefix + name: x for name, x in tensors.items()}
    return Model(
        towers.config, plan.bridge, towers.tokenizers,
        trainable={path: flat[path] for path in flat if path in plan.groups},
        frozen={path: flat[path] for path in flat if path not in plan.groups},
        groups=plan.groups,
        origin=towers.origin,
    )


@dataclass(frozen=True)
class LLM:
    """An LLM alone, on the mesh.

    Attributes:
      commit: the hub commit of its files.
      params: with `decoder`. tokenizers: without an encoder's.
      origin: digests of it; see `training/origin.py`.
    """

    commit: str | None
    decoder: Decoder
    params: Params
    tokenizers: Tokenizers
    origin: dict[str, str]


def load_llm(tower: DecoderSettings, chat: bool | None, bos: bool | None, mesh: Mesh) -> LLM:
    """Reads an LLM.

    Args:
      chat: whether prompts get its chat template; None: if it has one.
      bos: whether they begin with BOS, as `data.bos`.

    Raises:
      InputError: whatever is wrong with name, files, shape, tokenizer or template.
    """
    path, commit = resolve(tower.checkpoint, tower.revision)
    shape = read_shape("decoder", path)
    decoder = Decoder(shape, jnp.dtype(tower.dtype), tower.remat,
                      kernel_for("decoder", tower.attention))
    tokens = jnp.zeros((1, 2), jnp.int32)
    places = describe(lambda: decoder.init(
        jax.random.key(0), tokens, tokens, tokens, method="score")["params"], mesh)
    params = traverse_util.unflatten_dict(load_params(path, tower_table(shape), places), sep="/")
    tokenizer = load_tokenizer(path, shape.vocab_size, "decoder")
    chat = bool(tokenizer.chat_template) if chat is None else chat
    tokenizers = Tokenizers(None, tokenizer, chat_turn(tokenizer) if chat else None,
                            read_end_tokens(path, shape.vocab_size), bos=bos)
    return LLM(commit, decoder, {"decoder": params}, tokenizers,
               origin_of({"decoder": (path, tokenizer)}, tower.checkpoint))


def overlay(model: Model, trained: dict[str, np.ndarray], source: str) -> Model:
    """The model with another run's trained part in place of its own parameters of those names.

    Raises:
      InputError: a parameter that this model lacks or has in another shape.
    """
    placed = replaced(model.frozen | model.trainable, trained, source)
    return replace(
        model,
        trainable={path: placed[path] for path in model.trainable},
        frozen={path: placed[path] for path in model.frozen},
    )


def replaced(current: Flat, trained: dict[str, np.ndarray], source: str) -> Flat:
    """Replaces parameters by name with those of another run.

    Raises:
      InputError: a parameter that is not among them or has another shape, or one of a tower that
        is quantised here: its integers mean nothing without their scales.
    """
    for path, array in trained.items():
        if path not in current or current[path].shape != array.shape:
            have = list(current[path].shape) if path in current else "no such parameter"
            raise InputError(
                f"{source} does not fit this config: '{path}' is {list(array.shape)} there, "
                f"{have} here"
            )
        if not jnp.issubdtype(current[path].dtype, jnp.floating):
            role = path.split("/")[0]
            raise InputError(f"{source} has a trained '{path}', and {role}.dtype quantises what a "
                             f"checkpoint has alone; set {role}.dtype to bfloat16 or float32")
    placed = {
        path: jax.device_put(array.astype(current[path].dtype), current[path].sharding)
        for path, array in trained.items()
    }
    return current | placed


def find_towers(config: Config) -> tuple[dict[str, Path], Config]:
    """Both checkpoint directories, and the config with the commits that hub ids resolved to."""
    paths = {}
    for role in ROLES:
        tower = getattr(config, role)
        paths[role], commit = resolve(tower.checkpoint, tower.revision)
        check_version(paths[role])
        config = replace(config, **{role: replace(tower, revision=commit or tower.revision)})
    return paths, config


def read_shapes(paths: dict[str, Path]) -> dict[str, EncoderConfig | DecoderConfig]:
    """The shape of each tower, from its `config.json`."""
    return {role: read_shape(role, path) for role, path in paths.items()}


def load_tokenizers(config: Config, paths: dict[str, Path], shapes) -> Tokenizers:
    """Both towers' tokenizers, the encoder's with what the config adds to it."""
    added = {"encoder": config.encoder.added_tokens, "decoder": ()}
    encoder, decoder = (
        load_tokenizer(paths[role], shapes[role].vocab_size, role, added[role]) for role in ROLES
    )
    turn = chat_turn(decoder) if config.data.chat_template else None
    ends = read_end_tokens(paths["decoder"], shapes["decoder"].vocab_size)
    languages = language_tokens(encoder) if shapes["encoder"].family == "m2m_100" else None
    return Tokenizers(encoder, decoder, turn, ends, config.data.target_eos, config.data.bos,
                      config.encoder.prefix, languages)
