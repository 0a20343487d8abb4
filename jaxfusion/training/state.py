"""From a config to a model on the mesh: what is frozen, what trains, and where each part lies."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from jaxfusion.data.pocket.lexicon import check_version
from jaxfusion.data.tokenizers import (
    Tokenizers,
    adds_bos,
    chat_turn,
    load_tokenizer,
    read_end_tokens,
)
from jaxfusion.errors import InputError, choose
from jaxfusion.fields import (
    ATTENTIONS,
    BACKWARDS,
    DTYPES,
    FUSIONS,
    PROJECTORS,
    REMATS,
    ROLES,
    Config,
)
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import load_params, read_shape
from jaxfusion.hf.tables import table
from jaxfusion.nn.attention import why_plain
from jaxfusion.nn.bridge import Bridge, Params
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.mt5 import MT5Config, MT5Encoder
from jaxfusion.nn.projector import Projector, Resampler
from jaxfusion.sharding.rules import fitting_spec, spec
from jaxfusion.training.optimizer import group_of_each

logger = logging.getLogger(__name__)
SAID_BYTES = 1 << 20  # of a parameter in float32: what is smaller may lie on every device unsaid

Flat = dict[str, Any]  # parameter path, as 'decoder/blocks/attn/q/kernel' -> array


@dataclass(frozen=True)
class State:
    """What a training step changes, and a checkpoint holds.

    Attributes:
      step: steps done.
      trainable: trained parameters by path, float32.
      opt_state: the optimiser's.
    """

    step: Int[Array, ""]
    trainable: Flat
    opt_state: optax.OptState


jax.tree_util.register_dataclass(
    State, data_fields=["step", "trainable", "opt_state"], meta_fields=[]
)


@dataclass(frozen=True)
class Model:
    """A bridge with its parameters, split in two.

    Attributes:
      config: with the hub commits that were resolved.
      trainable, frozen: parameters by path; together all of them.
      groups: the optimiser group of every trained parameter.
    """

    config: Config
    bridge: Bridge
    tokenizers: Tokenizers
    trainable: Flat
    frozen: Flat
    groups: dict[str, str]


def merge(trainable: Flat, frozen: Flat) -> Params:
    """The parameter tree that the bridge takes."""
    nested = traverse_util.unflatten_dict({**frozen, **trainable}, sep="/")
    return {"fusion": {}, **nested}


def count(flat: Flat) -> int:
    """Number of scalars in a flat tree."""
    return sum(x.size for x in flat.values())


@dataclass(frozen=True)
class Plan:
    """A bridge and where its parameters will lie; nothing is read or made.

    Attributes:
      bridge: the model.
      params: shape, dtype and sharding of every parameter by path.
      groups: the optimiser group of every trained one.
    """

    bridge: Bridge
    params: dict[str, jax.ShapeDtypeStruct]
    groups: dict[str, str]

    @property
    def trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What trains, by path."""
        return {path: leaf for path, leaf in self.params.items() if path in self.groups}

    @property
    def frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What does not, by path."""
        return {path: leaf for path, leaf in self.params.items() if path not in self.groups}


def plan_model(
    config: Config, shapes: dict[str, MT5Config | DecoderConfig], mesh: Mesh
) -> Plan:
    """The bridge between two towers of these shapes on a mesh.

    Raises:
      InputError: whatever is wrong with names, patterns or the mesh.
    """
    platform = mesh.devices.flat[0].platform
    bridge = make_bridge(config, shapes["encoder"], shapes["decoder"], platform)
    for role, shape in shapes.items():
        if shape.num_heads % mesh.shape["tensor"]:
            raise InputError(f"mesh.tensor is {mesh.shape['tensor']}, which does not divide the "
                             f"{shape.num_heads} heads of the {role}; set mesh.tensor to a "
                             "divisor, and mesh.fsdp to the rest of the devices")
    every = ("encoder", "fusion", "projector", "decoder")
    params = describe(lambda: bridge.init(jax.random.key(0), every), mesh)
    groups = group_of_each(params, config.optimizer.groups)
    if config.fusion.backward == "second_pass" and any(p.startswith("encoder/") for p in groups):
        raise InputError(
            "fusion.backward='second_pass' gives the encoder no gradient, but "
            "optimizer.groups train part of it; use fusion.backward='stack'"
        )
    # What trains is float32 whatever its tower's dtype.
    params |= {path: params[path].update(dtype=jnp.float32) for path in groups}
    return Plan(bridge, params, groups)


def load_model(
    config: Config, mesh: Mesh, begin: Callable[[Bridge, Tokenizers], None] = lambda *_: None
) -> Model:
    """Reads both towers, starts fusion and projector, and puts all of it on the mesh.

    Args:
      begin: is called before weights are read, with what tokenizing takes.

    Raises:
      InputError: whatever is wrong with names, files, shapes, tokenizers or patterns.
    """
    paths, config = find_towers(config)
    shapes = read_shapes(paths)
    tokenizers = load_tokenizers(config, paths, shapes)
    if config.data.bos is None:  # which it is now, it stays
        config = replace(config, data=replace(config.data, bos=adds_bos(tokenizers.decoder)))
    plan = plan_model(config, shapes, mesh)
    begin(plan.bridge, tokenizers)
    flat = initialise_own(plan, config.train.seed)
    for role in ROLES:
        prefix = f"{role}/"
        wanted = {name.removeprefix(prefix): leaf for name, leaf in plan.params.items()
                  if name.startswith(prefix)}
        read = load_params(paths[role], table(shapes[role]), wanted)
        flat |= {prefix + name: x for name, x in read.items()}
    return Model(
        config, plan.bridge, tokenizers,
        trainable={path: flat[path] for path in flat if path in plan.groups},
        frozen={path: flat[path] for path in flat if path not in plan.groups},
        groups=plan.groups,
    )


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
    """Parameters with those of another run in the place of the ones of their names.

    Raises:
      InputError: a parameter that is not among them or has another shape.
    """
    for path, array in trained.items():
        if path not in current or current[path].shape != array.shape:
            have = list(current[path].shape) if path in current else "no such parameter"
            raise InputError(
                f"{source} does not fit this config: '{path}' is {list(array.shape)} there, "
                f"{have} here"
            )
    placed = {
        path: jax.device_put(array.astype(current[path].dtype), current[path].sharding)
        for path, array in trained.items()
    }
    return current | placed


# What `attention='auto'` is on each platform.
KERNEL_OF = {"cpu": "plain", "gpu": "cudnn", "cuda": "cudnn", "tpu": "pallas"}


def kernel_for(role: str, asked: str, platform: str | None = None) -> str:
    """The attention of a tower on a platform, jax's own by default.

    Raises:
      InputError: an unknown one, or one for another platform.
    """
    platform = platform or jax.default_backend()
    own = KERNEL_OF.get(platform, "plain")
    if choose("attention", asked, ATTENTIONS) == "auto":
        return own
    if asked not in ("plain", own):
        raise InputError(f"{role}.attention is '{asked}', which is not for {platform}; set it to "
                         "auto or plain")
    return asked


@lru_cache  # said once
def _say_plain(
    role: str, asked: str, head_dim: int, dtype: jnp.dtype, cap: float | None, dropout: bool
) -> None:
    """Says where a kernel that was asked for by name does not run."""
    if asked in ("auto", "plain"):
        return
    why = why_plain(asked, head_dim, dtype, cap)
    if why is not None:
        logger.warning("%s.attention is '%s', but plain attention runs: %s", role, asked, why)
        return
    some = ["batches whose rows do not divide by the mesh"]
    some += ["batches of an odd length"] if asked == "cudnn" else []
    some += ["training with dropout"] if dropout else []
    logger.info("%s.attention is '%s'; plain attention runs for %s", role, asked,
                " and ".join(some))


def make_bridge(config: Config, encoder, decoder, platform: str | None = None) -> Bridge:
    """The bridge of a config over towers of these shapes.

    Args:
      platform: of the devices it is for; defaults to jax's.

    Raises:
      InputError: unknown names, or a layer that the encoder does not have.
    """
    fusion, layers = config.fusion, encoder.num_layers
    choose("fusion", fusion.name, FUSIONS)
    if not 1 <= fusion.layer <= layers:  # a slip under every fusion, though only `layer` reads it
        raise InputError(f"fusion.layer is {fusion.layer}, the encoder has layers 1 to {layers}")
    dtypes = [jnp.dtype(choose("dtype", tower.dtype, DTYPES))
              for tower in (config.encoder, config.decoder)]
    remats = [choose("remat", tower.remat, REMATS) for tower in (config.encoder, config.decoder)]
    kernels = [kernel_for(role, getattr(config, role).attention, platform) for role in ROLES]
    caps = (None, decoder.attn_cap)
    for role, shape, dtype, cap in zip(ROLES, (encoder, decoder), dtypes, caps, strict=True):
        _say_plain(role, getattr(config, role).attention, shape.head_dim, dtype, cap,
                   role == "encoder" and config.encoder.dropout > 0)
    return Bridge(
        MT5Encoder(encoder, dtypes[0], config.encoder.dropout, remats[0], kernels[0]),
        Decoder(decoder, dtypes[1], remats[1], kernels[1]),
        _make_projector(config, decoder.d_model),
        fusion.name, fusion.layer, fusion.dropout, fusion.d_ff, fusion.noise,
        choose("fusion.backward", fusion.backward, BACKWARDS),
    )


def plain(bridge: Bridge) -> Bridge:
    """The same function with nothing computed twice and no kernels, for counting its FLOPs."""
    return replace(
        bridge, backward="stack",
        encoder=replace(bridge.encoder, remat="none", attention="plain"),
        decoder=replace(bridge.decoder, remat="none", attention="plain"),
    )


def _make_projector(config: Config, width: int) -> Projector | Resampler:
    c = config.projector
    if choose("projector", c.name, PROJECTORS) != "resampler":
        return Projector(c.name, width, c.end_std, c.d_ff)
    if config.data.pack:
        raise InputError("projector 'resampler' reads whole rows: set data.pack=False")
    return Resampler(width, c.end_std, c.latents, dropout=c.dropout)


def find_towers(config: Config) -> tuple[dict[str, Path], Config]:
    """Both checkpoint directories, and the config with the commits that hub ids resolved to."""
    paths = {}
    for role in ROLES:
        tower = getattr(config, role)
        paths[role], commit = resolve(tower.checkpoint, tower.revision)
        check_version(paths[role])
        config = replace(config, **{role: replace(tower, revision=commit or tower.revision)})
    return paths, config


def read_shapes(paths: dict[str, Path]) -> dict[str, MT5Config | DecoderConfig]:
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
    return Tokenizers(encoder, decoder, turn, ends, config.data.target_eos, config.data.bos)


def describe(init: Callable[[], Params], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding, by path, of the boxed parameters that `init` makes; makes none."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    flat = {
        "/".join(str(key.key) for key in path): box
        for path, box in jax.tree_util.tree_leaves_with_path(jax.eval_shape(init), is_leaf=is_box)
    }
    unnamed = [path for path, box in flat.items() if not is_box(box)]
    if unnamed:
        raise AssertionError(f"parameters without logical axis names: {unnamed}")
    specs = {path: fitting_spec(box.names, box.value.shape, mesh) for path, box in flat.items()}
    whole = {
        f"{name} ({size})" for path, box in flat.items() if box.value.size * 4 > SAID_BYTES
        for name, size, axis in zip(box.names, box.value.shape, specs[path], strict=True)
        if name is not None and spec([name])[0] != axis
    }
    if whole:
        logger.warning("held whole, as mesh %s does not divide them: %s",
                       dict(mesh.shape), ", ".join(sorted(whole)))
    return {
        path: jax.ShapeDtypeStruct(box.value.shape, box.value.dtype,
                                   sharding=NamedSharding(mesh, specs[path]))
        for path, box in flat.items()
    }


def initialise_own(plan: Plan, seed: int) -> Flat:
    """Fusion and projector as a run of this seed starts them."""
    return initialise(lambda: plan.bridge.init(jax.random.key(seed)), plan.params)


def initialise(init: Callable[[], Params], places: dict[str, jax.ShapeDtypeStruct]) -> Flat:
    """Fresh parameters by path, made where they belong."""

    def flat():
        return traverse_util.flatten_dict(nn.unbox(init()), sep="/")

    out = {path: places[path].sharding for path in jax.eval_shape(flat)}
    return jax.jit(flat, out_shardings=out)()
