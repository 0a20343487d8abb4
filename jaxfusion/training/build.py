"""From a config to a model's plan: modules, and shape, dtype and sharding of every parameter."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfusion.errors import InputError
from jaxfusion.fields import ROLES, Config
from jaxfusion.nn import quantised
from jaxfusion.nn.aligner import Aligner
from jaxfusion.nn.attention import why_plain
from jaxfusion.nn.bridge import OWN, Bridge, Params
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import Encoder, EncoderConfig
from jaxfusion.nn.projector import Projector, Resampler
from jaxfusion.sharding.rules import fitting_spec, spec
from jaxfusion.training.optimizer import group_of_each
from jaxfusion.training.state import Flat

logger = logging.getLogger(__name__)
REPORTED_BYTES = 1 << 20  # of a parameter in float32: smaller ones are replicated without a warning


@dataclass(frozen=True)
class Plan:
    """A bridge and the placement of its parameters; nothing is read or computed.

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
    config: Config, shapes: dict[str, EncoderConfig | DecoderConfig], mesh: Mesh
) -> Plan:
    """The bridge between two towers of these shapes on a mesh.

    Raises:
      InputError: whatever is wrong with names, patterns or the mesh.
    """
    platform = mesh.devices.flat[0].platform
    bridge = make_bridge(config, shapes["encoder"], shapes["decoder"], platform)
    _check_lengths(config, shapes["encoder"])
    for role, shape in shapes.items():
        if shape.num_heads % mesh.shape["tensor"]:
            raise InputError(f"mesh.tensor is {mesh.shape['tensor']}, which does not divide the "
                             f"{shape.num_heads} heads of the {role}; set mesh.tensor to a "
                             "divisor, and mesh.fsdp to the rest of the devices")
    formats = {role: getattr(config, role).dtype for role in ROLES}
    params = describe(lambda: bridge.init(jax.random.key(0), (*ROLES, *OWN)), mesh, formats)
    groups = group_of_each(params, config.optimizer.groups)
    _check_frozen(groups, formats)
    if config.aligner.name != "none" and not any(p.startswith("aligner/") for p in groups):
        raise InputError("aligner.name is set, but no group of optimizer.groups trains it; add the "
                         "pattern 'aligner/.*' to one")
    if config.fusion.backward == "second_pass" and any(p.startswith("encoder/") for p in groups):
        raise InputError(
            "fusion.backward='second_pass' gives the encoder no gradient, but "
            "optimizer.groups train part of it; use fusion.backward='stack'"
        )
    # What trains is float32 whatever its tower's dtype.
    params |= {path: params[path].update(dtype=jnp.float32) for path in groups}
    return Plan(bridge, params, groups)


def _check_frozen(groups: dict[str, str], formats: dict[str, str]) -> None:
    """Raises InputError for a quantised tower of which something trains."""
    for path, group in groups.items():
        role = path.split("/")[0]
        if formats.get(role) in quantised.BITS:
            raise InputError(f"{role}.dtype is '{formats[role]}', but optimizer.groups.{group} "
                             f"trains '{path}'; set {role}.dtype to bfloat16 or float32")


def _check_lengths(config: Config, encoder: EncoderConfig) -> None:
    """Raises InputError for texts longer than the encoder's table of positions."""
    for name in ("data", "eval"):
        longest = getattr(config, name).max_encoder_tokens
        if encoder.max_length is not None and longest > encoder.max_length:
            raise InputError(f"{name}.max_encoder_tokens is {longest:,}, but the encoder's table "
                             f"of positions holds {encoder.max_length:,} tokens; set it to "
                             f"{encoder.max_length} or lower")


# What `attention='auto'` is on each platform.
KERNEL_OF = {"cpu": "plain", "gpu": "cudnn", "cuda": "cudnn", "tpu": "pallas"}


def kernel_for(role: str, asked: str, platform: str | None = None) -> str:
    """The attention of a tower on a platform, jax's own by default.

    Raises:
      InputError: it is for another platform.
    """
    platform = platform or jax.default_backend()
    own = KERNEL_OF.get(platform, "plain")
    if asked == "auto":
        return own
    if asked not in ("plain", own):
        raise InputError(f"{role}.attention is '{asked}', which is not for {platform}; set it to "
                         "auto or plain")
    return asked


@lru_cache  # logged once
def _log_plain(
    role: str, asked: str, head_dim: int, dtype: jnp.dtype, cap: float | None = None,
    dropout: bool = False,
) -> None:
    """Warns where a kernel that was asked for by name does not run."""
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
      InputError: a layer that the encoder does not have, or a kernel for another platform.
    """
    fusion, layers = config.fusion, encoder.num_layers
    if not 1 <= fusion.layer <= layers:  # a slip under every fusion, though only `layer` reads it
        raise InputError(f"fusion.layer is {fusion.layer}, the encoder has layers 1 to {layers}")
    first, second = config.encoder, config.decoder
    encoder_dtype, decoder_dtype = (
        quantised.dtype_of_activations(tower.dtype) for tower in (first, second))
    _log_plain("encoder", first.attention, encoder.head_dim, encoder_dtype,
               dropout=first.dropout > 0)
    padding = config.aligner.recipe == "paper_code"
    _log_plain("decoder", second.attention, decoder.head_dim, decoder_dtype, decoder.attn_cap)
    return Bridge(
        Encoder(encoder, encoder_dtype, first.dropout, first.remat,
                # The states of padding are the same in plain attention alone.
                "plain" if padding else kernel_for("encoder", first.attention, platform)),
        Decoder(decoder, decoder_dtype, second.remat,
                kernel_for("decoder", second.attention, platform)),
        _make_projector(config, decoder.d_model),
        fusion.name, fusion.layer, fusion.dropout, fusion.d_ff, fusion.noise, fusion.backward,
        _make_aligner(config, decoder), padding,
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
    if c.name != "resampler":
        return Projector(c.name, width, c.end_std, c.d_ff)
    if config.data.pack:
        raise InputError("projector 'resampler' needs one example per row: set data.pack=False")
    return Resampler(width, c.end_std, c.latents, dropout=c.dropout)


def _make_aligner(config: Config, decoder: DecoderConfig) -> Aligner | None:
    if config.aligner.name == "none":
        return None
    if config.aligner.recipe == "paper_code" and config.data.pack:
        raise InputError("aligner.recipe='paper_code' would read the other examples of a row: set "
                         "data.pack=False")
    return Aligner(config.aligner.name, decoder.num_layers, decoder.d_model)


def describe(
    init: Callable[[], Params], mesh: Mesh, formats: Mapping[str, str] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding, by path, of the boxed parameters that `init` makes; makes none.

    Args:
      formats: dtype of parts by their name; in `int8` and `int4` a part has integers and scales.
    """
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    flat = {
        "/".join(str(key.key) for key in path): box
        for path, box in jax.tree_util.tree_leaves_with_path(jax.eval_shape(init), is_leaf=is_box)
    }
    unnamed = [path for path, box in flat.items() if not is_box(box)]
    if unnamed:
        raise AssertionError(f"parameters without logical axis names: {unnamed}")
    leaves = {path: (box.names, box.value.shape, box.value.dtype) for path, box in flat.items()}
    for path, (names, shape, _) in list(leaves.items()):
        dtype = (formats or {}).get(path.split("/")[0])
        if dtype in quantised.BITS and quantised.is_quantised(path):
            integers, sizes, kept = quantised.layout(path, names, shape, dtype)
            leaves[path] = names, shape, integers
            leaves[quantised.scale_path(path)] = kept, sizes, jnp.dtype("float32")
    specs = {path: fitting_spec(names, shape, mesh) for path, (names, shape, _) in leaves.items()}
    _warn_of_replicated(leaves, specs, mesh)
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, specs[path]))
        for path, (_, shape, dtype) in leaves.items()
    }


def _warn_of_replicated(leaves, specs: dict[str, PartitionSpec], mesh: Mesh) -> None:
    """Warns of large parameters' axes that the mesh does not divide."""
    replicated = {
        f"{name} ({size})" for path, (names, shape, _) in leaves.items()
        if math.prod(shape) * 4 > REPORTED_BYTES
        for name, size, axis in zip(names, shape, specs[path], strict=True)
        if name is not None and spec([name])[0] != axis
    }
    if replicated:
        logger.warning("replicated, as mesh %s does not divide them: %s",
                       dict(mesh.shape), ", ".join(sorted(replicated)))


def initialise_own(plan: Plan, seed: int) -> Flat:
    """The bridge's own parts as a run of this seed starts them."""
    return initialise(lambda: plan.bridge.init(jax.random.key(seed)), plan.params)


def initialise(init: Callable[[], Params], places: dict[str, jax.ShapeDtypeStruct]) -> Flat:
    """Fresh parameters by path, created with their shardings."""

    def flat():
        return traverse_util.flatten_dict(nn.unbox(init()), sep="/")

    out = {path: places[path].sharding for path in jax.eval_shape(flat)}
    return jax.jit(flat, out_shardings=out)()
