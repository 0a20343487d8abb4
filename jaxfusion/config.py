"""What a run is: every field of a config, its default, and its meaning.

A file in `configs/` starts from `default_config()`, a ConfigDict, and sets what differs; the
command line overrides fields of that; `from_config_dict` turns the result into the dataclasses
below and refuses what they do not know. No jax here: configs are read before jax starts.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from jaxfusion.errors import InputError, choose, near_match

FUSIONS = ("last", "layer", "global_softmax", "transformer_softmax")
BACKWARDS = ("stack", "second_pass")
PROJECTORS = ("linear", "ffn")
SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "full")


@dataclass(frozen=True)
class EncoderConfig:
    """The multilingual encoder."""

    checkpoint: str = "google/mt5-large"  # a directory, or a hub id
    revision: str | None = None  # of a hub id; kept as a commit in the workdir once resolved
    dtype: str = "float32"  # of the frozen weights and activations: float32 or bfloat16
    dropout: float = 0.0  # 0.1 is what the papers' runs had by accident of `model.train()`
    added_tokens: tuple[str, ...] = ()  # LangBridge adds whitespace tokens to the tokenizer


@dataclass(frozen=True)
class DecoderConfig:
    """The English-centric LLM."""

    checkpoint: str = "meta-llama/Llama-3.2-1B-Instruct"
    revision: str | None = None
    dtype: str = "float32"
    remat: str = "none"  # what the backward pass recomputes: none, dots (keep products), full


@dataclass(frozen=True)
class FusionConfig:
    """How the encoder's layers become one feature per token."""

    name: str = "transformer_softmax"  # last, layer, global_softmax, transformer_softmax
    layer: int = 1  # of `layer`: 1 … L, as Hugging Face numbers states
    dropout: float = 0.1  # of `transformer_softmax`
    d_ff: int = 2048  # of `transformer_softmax`
    backward: str = "stack"  # of `global_softmax`: stack (keep states), second_pass (recompute)


@dataclass(frozen=True)
class ProjectorConfig:
    """From the encoder's width to the decoder's."""

    name: str = "linear"  # linear, ffn
    end_std: float = 0.0  # the end vector's start: 0 (2508.09091) or N(0, 1) (LangBridge)


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    task: str = "xnli"
    path: str | None = None  # a directory with the task's files; none: the task's hub dataset
    language: str = "en"  # of training and development
    # What follows the prefix, in the LLM's own tokens: nothing, a fixed instruction, or '{query}'
    # (the whole encoder prompt again: MindMerger's augmentation).
    text_prompt: str = ""
    max_encoder_tokens: int = 200  # longer examples are cut, counted and reported
    max_decoder_tokens: int = 200  # of text prompt, and of target with its EOS
    buckets: tuple[int, ...] = (32, 64, 96, 128, 160, 200)  # encoder lengths that get compiled
    pack: bool = False  # several short examples in a row, told apart by masks and positions
    train_rows: int | None = None  # a seeded subset of the training rows
    balanced: bool = False  # draw that subset with the same number from every class
    dev_rows: int | None = None  # the first so many development rows


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that train, by pattern of their path, and how fast."""

    patterns: tuple[str, ...] = ("(fusion|projector)/.*",)
    learning_rate: float = 3e-5
    weight_decay: float = 3e-7


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. What matches no group's pattern is frozen."""

    groups: dict[str, GroupConfig] = field(default_factory=lambda: {"bridge": GroupConfig()})
    b1: float = 0.8
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    schedule: str = "cosine"  # cosine (to 0) or constant, after the warm-up
    warmup_fraction: float = 0.05  # of all steps


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is written when."""

    batch_size: int = 8
    epochs: int = 3
    steps: int | None = None  # in place of epochs
    seed: int = 0
    init_from: str | None = None  # workdir whose trained part this run starts with
    log_every: int = 10
    eval_every: int = 1000  # steps between scores on the development split
    checkpoint_every: int = 1000


@dataclass(frozen=True)
class EvalConfig:
    """What is scored after training, and during it on the development split."""

    tasks: tuple[str, ...] = ()  # empty: the training task
    languages: tuple[str, ...] = ()  # empty: all languages of each task
    batch_size: int = 32
    max_encoder_tokens: int = 512
    max_decoder_tokens: int = 512
    max_new_tokens: int = 16  # of greedy decoding


@dataclass(frozen=True)
class MeshConfig:
    """Device counts along the mesh axes; one of them may be -1 and is filled in."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Config:
    """One run."""

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    fusion: FusionConfig = FusionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()


# May differ when a run is resumed, besides a larger number of steps.
FREE_ON_RESUME = ("mesh", "encoder.dtype", "decoder.dtype", "train.log_every")


def default_config() -> ml_collections.ConfigDict:
    """All defaults as an unlocked ConfigDict, with placeholders where the default is None."""
    return _to_config_dict(Config())


def finish(config: ml_collections.ConfigDict, arg: str | None) -> ml_collections.ConfigDict:
    """The locked config after its argument, as in `--config configs/NAME.py:arg`.

    `debug` shrinks the run to a size that a CPU does in seconds, on checkpoints and rows made for
    it; a fusion's name sets that fusion; a comma joins them.

    Raises:
      InputError: another argument.
    """
    for word in arg.split(",") if arg else ():
        if choose("config argument", word, ("debug", *FUSIONS)) == "debug":
            _debug(config)
        else:
            config.fusion.name = word
    return config.lock()


def _debug(config: ml_collections.ConfigDict) -> None:
    """The same run at a size that a CPU does in seconds, on checkpoints and rows made for it."""
    config.encoder.checkpoint = config.decoder.checkpoint = "made:tiny"
    config.encoder.dtype = config.decoder.dtype = "float32"
    config.data.path = "made:rows"
    config.data.train_rows = config.data.dev_rows = None
    config.data.balanced = False
    config.data.max_encoder_tokens = config.eval.max_encoder_tokens = 128
    config.data.buckets = (128,)
    config.data.max_decoder_tokens = config.eval.max_decoder_tokens = 128
    config.fusion.d_ff = 64
    config.train.batch_size = config.eval.batch_size = 8
    for group in config.optimizer.groups.values():
        group.learning_rate = 1e-2
    config.train.steps = 200
    config.train.log_every = 20
    config.train.eval_every = config.train.checkpoint_every = 100
    config.eval.tasks = config.eval.languages = ()


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """The dataclass form of a resolved ConfigDict.

    Raises:
      InputError: an unknown field (with the near match), or a value of the wrong type.
    """
    run = _from_dict(Config, config.to_dict(), "")
    check(run)
    return run


# Fields that count something, and so are 1 or more (or left out).
COUNTS = (
    "data.max_encoder_tokens", "data.max_decoder_tokens", "data.train_rows", "data.dev_rows",
    "train.batch_size", "train.epochs", "train.steps", "train.log_every", "train.eval_every",
    "train.checkpoint_every", "eval.batch_size", "eval.max_encoder_tokens",
    "eval.max_decoder_tokens", "eval.max_new_tokens",
)


def check(config: Config) -> None:
    """Raises InputError for a value that no run can have."""
    flat = _flat(dataclasses.asdict(config))
    for name in COUNTS:
        if flat[name] is not None and flat[name] < 1:
            raise InputError(f"config field '{name}' is {flat[name]}, wanted 1 or more")
    if not 0 <= config.optimizer.warmup_fraction < 1:
        raise InputError(
            f"config field 'optimizer.warmup_fraction' is {config.optimizer.warmup_fraction}, "
            "wanted at least 0 and less than 1"
        )
    if config.data.balanced and config.data.train_rows is None:
        raise InputError("data.balanced needs data.train_rows: how many rows to draw")


def save(config: Config, file: Path) -> None:
    """Writes the config as JSON."""
    text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
    partial = file.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.rename(file)


def load(file: Path) -> Config:
    """Reads a config that `save` wrote.

    Raises:
      InputError: there is none, or it has fields that this version does not know.
    """
    if not file.is_file():
        raise InputError(f"{file.parent} is no workdir of a run: {file.name} is missing")
    try:
        return _from_dict(Config, json.loads(file.read_text("utf-8")), "")
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is no JSON: {error}") from None


def changed(old: Config, new: Config) -> list[str]:
    """Fields that differ and must not on resume, as `name: old -> new`."""
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name) and not _may_change(name, before, after)
    ]


def _may_change(name: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    if name in ("train.steps", "train.epochs"):  # a larger one, counted the same way
        return None not in (before[name], after[name]) and after[name] > before[name]
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {
            f"{prefix}{name}": value
        }
    return flat


def _to_config_dict(config: Any) -> ml_collections.ConfigDict:
    out = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(config))
    for name, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config)):
        if dataclasses.is_dataclass(value):
            value = _to_config_dict(value)
        elif isinstance(value, dict):
            value = ml_collections.ConfigDict({k: _to_config_dict(v) for k, v in value.items()})
        elif value is None:
            value = config_dict.placeholder(typing.get_args(hints[name])[0])
        setattr(out, name, value)
    return out


def _from_dict(kind: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise InputError(
                f"unknown config field '{where}{name}'{near_match(name, hints)}; "
                f"known: {', '.join(hints)}"
            )
    return kind(**{name: _value(hints[name], v, f"{where}{name}") for name, v in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the field's type; ints serve as floats and lists as tuples."""
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, f"{where}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return {k: _from_dict(args[1], v, f"{where}.{k}.") for k, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(args[0], v, where) for v in value)
    if origin is types.UnionType:
        return None if value is None else _value(args[0], value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"config field '{where}' is {value!r}, wanted a value of type {hint}")
    return value
