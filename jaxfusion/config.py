"""From a file in `configs/` and the command line to a run's config, and to JSON and back.

A file starts from `default_config()`, a ConfigDict, and sets what differs; the command line
overrides fields of that; `from_config_dict` turns the result into the dataclasses of `fields.py`
and refuses what they do not know. No jax here: configs are read before jax starts.
"""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from jaxfusion.errors import InputError, choose, near_match
from jaxfusion.fields import (
    FUSIONS,
    JOBS,
    CompareConfig,
    Config,
    EvalConfig,
    Job,
    LensRunConfig,
    PretrainConfig,
)
from jaxfusion.files import write_whole

CONFIG_FILE = "config.json"  # of a workdir
# May differ when a run is resumed, besides a larger number of steps.
FREE_ON_RESUME = ("mesh", "encoder.dtype", "decoder.dtype", "encoder.remat", "decoder.remat",
                  "encoder.attention", "decoder.attention", "train.accumulate", "train.log_every")


def default_config(job: str = "bridge") -> ml_collections.ConfigDict:
    """All defaults of a job as an unlocked ConfigDict, with placeholders where one is None."""
    return _to_config_dict(JOBS[job]())


def published_lens(checkpoint: str) -> ml_collections.ConfigDict:
    """Lens (arXiv:2410.04407) of an instruct LLM in English and Chinese, as its authors ship it for
    Llama-3-8B-Instruct, beside the baselines that train nothing; for a config file to finish."""
    config = default_config("lens")
    config.decoder.checkpoint, config.decoder.dtype = checkpoint, "bfloat16"
    config.data.path = "prompts.jsonl"
    config.data.central, config.data.targets = "en", ("zh",)
    config.data.task_rows = 2000
    config.eval.tasks = ("xcopa", "xstorycloze", "xwinograd", "mmmlu")
    config.sweep = (
        {"name": "steering", "lens": {"method": "steering"}},
        {"name": "disentangle", "lens": {"method": "disentangle"}},
        {"name": "Lens"},
    )
    return config


def finish(config: ml_collections.ConfigDict, arg: str | None) -> ml_collections.ConfigDict:
    """The locked config after its argument, as in `--config configs/NAME.py:arg`.

    `debug` shrinks the run to a size that a CPU does in seconds, on checkpoints and rows made for
    it; a fusion's name sets that fusion; `compare` makes a comparison of the three fusions of the
    papers out of a bridge; `multilingual` gives Lens the six targets of its paper, `paper_code` the
    recipe of its authors' code; a comma joins them.

    Raises:
      InputError: another argument.
    """
    words = sorted(arg.split(",") if arg else [], key="debug".__eq__)  # which goes last
    known = ("debug", *OTHER_WORDS.get(config.job, ()))
    for word in words:
        if choose("config argument", word, known) in FUSIONS:
            config.fusion.name = word
        elif word == "debug" and config.job == "pretrain":
            _debug_pretraining(config)
        elif word == "debug" and config.job == "lens":
            _debug_lens(config)
        elif word == "multilingual":
            config.data.targets = ("zh", "ja", "ko", "ar", "bn", "sw")
        elif word == "paper_code":
            config.lens.recipe = word
        elif word == "debug":
            _debug(config if config.job == "bridge" else config.base)
    return (_comparison(config) if "compare" in words else config).lock()


OTHER_WORDS = {"bridge": ("compare", *FUSIONS), "lens": ("multilingual", "paper_code")}


def _comparison(base: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The three fusions of the papers under one config."""
    config = default_config("compare")
    config.base = base
    config.variants = tuple(
        {"name": name, "fusion": {"name": name}}
        for name in ("last", "global_softmax", "transformer_softmax")
    )
    return config


def _debug(config: ml_collections.ConfigDict) -> None:
    """The same run at a size that a CPU does in seconds, on checkpoints and rows made for it."""
    config.encoder.checkpoint = config.decoder.checkpoint = "made:tiny"
    config.encoder.dtype = config.decoder.dtype = "float32"
    config.data.path = "made:rows"
    config.data.train_rows = config.data.dev_rows = None
    config.data.balanced = config.data.streaming = False
    config.data.revision = None
    config.data.max_encoder_tokens = config.eval.max_encoder_tokens = 128
    config.data.buckets = (128,)
    config.data.max_decoder_tokens = config.eval.max_decoder_tokens = 128
    config.fusion.d_ff = 64
    config.train.batch_size = config.eval.batch_size = 8
    config.train.accumulate = 1
    for group in config.optimizer.groups.values():
        group.learning_rate = 1e-2
    config.train.steps = 200
    config.train.log_every = 20
    config.train.eval_every = config.train.checkpoint_every = 100
    config.eval.tasks = config.eval.languages = ()


def _debug_pretraining(config: ml_collections.ConfigDict) -> None:
    """A tower of a few thousand parameters on a hundredth of the pocket world's text."""
    config.data.path, config.data.pivot = "made:pocket_debug", "en"
    config.data.languages = ("en",) if config.data.languages else ()
    config.data.buckets = (config.data.max_tokens,)
    config.data.dev_rows = 16
    config.tower.d_model = config.tower.d_ff = 32
    config.tower.num_layers = config.tower.num_heads = 2
    config.tower.head_dim = 16
    config.train.batch_size = 8
    config.train.steps = 20
    config.train.log_every = config.train.eval_every = config.train.checkpoint_every = 10


def _debug_lens(config: ml_collections.ConfigDict) -> None:
    """The same run on a tiny LLM and made rows of the pocket world."""
    config.decoder.checkpoint = "made:tiny"
    config.decoder.dtype = "float32"
    config.data.path = "made:pocket_debug"
    config.data.central, config.data.targets = "en", ("latn_a", "deva")
    config.data.chat_template = False
    config.data.columns = ml_collections.ConfigDict()
    config.data.probe_rows = config.data.rows = 40
    config.data.perplexity_rows = config.data.reply_rows = 0
    config.data.max_tokens, config.data.buckets = 128, (128,)
    config.lens.blocks, config.lens.recipe = 1, "default"
    config.lens.loss_layers = config.lens.layers = ()
    config.train.batch_size = config.eval.batch_size = 8
    config.train.steps, config.train.log_every = 5, 1
    config.train.eval_every = config.train.checkpoint_every = 5
    config.eval.tasks, config.data.task_rows = ("pocket_nli",), 12
    config.data.task_path, config.data.answer = "made:pocket_debug", "answer"
    config.eval.languages = ()


def from_config_dict(config: ml_collections.ConfigDict) -> Job:
    """The dataclass form of a resolved ConfigDict.

    Raises:
      InputError: an unknown field (with the near match), or a value of the wrong type.
    """
    run = from_json(config.to_dict())
    check(run)
    return run


def from_json(values: dict[str, Any]) -> Job:
    """The config of a run's JSON; fields that it lacks, as those of later versions, have defaults.
    """
    return _from_dict(JOBS[choose("job", values.get("job", "bridge"), JOBS)], values, "")


# Fields that count something, and so are 1 or more (or left out).
COUNTS = (
    "data.max_encoder_tokens", "data.max_decoder_tokens", "data.train_rows", "data.dev_rows",
    "train.batch_size", "train.accumulate", "train.epochs", "train.steps", "train.log_every",
    "train.eval_every", "train.checkpoint_every", "eval.batch_size", "eval.max_encoder_tokens",
    "eval.max_decoder_tokens", "eval.max_new_tokens", "data.max_tokens", "tower.d_model",
    "tower.d_ff", "tower.num_layers", "tower.num_heads", "tower.head_dim", "tower.vocab_size",
    "rows", "data.rows", "data.probe_rows", "lens.blocks", "lens.rank", "data.task_rows",
)


def variants(config: CompareConfig) -> dict[str, Config]:
    """The config of each variant.

    Raises:
      InputError: no variant, or fields that a bridge does not have.
    """
    if not config.variants:
        raise InputError("a comparison needs at least one variant in config.variants")
    return _each("variants", config.variants, dataclasses.asdict(config.base), Config)


def one_by_seeds(config: Config) -> CompareConfig:
    """A bridge that is trained with several seeds, as a comparison of one variant."""
    return CompareConfig(base=dataclasses.replace(config, seeds=()), seeds=config.seeds,
                         variants=({"name": config.fusion.name},))


def sweep(config: LensRunConfig) -> dict[str, LensRunConfig]:
    """The config of each run of a sweep.

    Raises:
      InputError: names that make the same directory, or fields that such a run does not have.
    """
    return _each("sweep", config.sweep, {**dataclasses.asdict(config), "sweep": ()}, LensRunConfig)


def _each(name: str, entries, base: dict[str, Any], kind: type) -> dict[str, Any]:
    """A config of every entry: `base` with the entry's fields, by the entry's name."""
    places = [directory_name(str(fields.get("name", ""))) for fields in entries]
    if len(set(places)) < len(places) or "" in places:
        raise InputError(f"the names in config.{name} must make different directories, got "
                         f"{places}")
    found = {}
    for fields in entries:
        fields = dict(fields)
        entry = str(fields.pop("name"))
        values = json.loads(json.dumps(base))
        _override(values, fields)
        found[entry] = _from_dict(kind, values, f"{name}.{entry}.")
        check(found[entry])
    return found


def directory_name(variant: str) -> str:
    """Where a comparison keeps a variant: `layer 3` -> `layer_3`."""
    return re.sub(r"\W+", "_", variant)


def _override(values: dict[str, Any], fields: dict[str, Any]) -> None:
    """Sets nested fields; None in the place of a group of fields leaves the group out."""
    for name, value in fields.items():
        if isinstance(values.get(name), dict) and value is None:
            del values[name]
        elif isinstance(values.get(name), dict) and isinstance(value, dict):
            _override(values[name], value)
        else:
            values[name] = value


def check(config: Job) -> None:
    """Raises InputError for a value that no run can have."""
    flat = _flat(dataclasses.asdict(config))
    for name in COUNTS:
        if flat.get(name) is not None and flat[name] < 1:
            raise InputError(f"config field '{name}' is {flat[name]}, wanted 1 or more")
    for name in ("data.perplexity_rows", "data.reply_rows"):
        if flat.get(name, 0) < 0:
            raise InputError(f"config field '{name}' is {flat[name]}, wanted 0 or more")
    if isinstance(config, CompareConfig):
        variants(config)  # checks each of them
        return
    if not isinstance(config, PretrainConfig):
        check_decoding(config.eval)
    if not 0 <= config.optimizer.warmup_fraction < 1:
        raise InputError(
            f"config field 'optimizer.warmup_fraction' is {config.optimizer.warmup_fraction}, "
            "wanted at least 0 and less than 1"
        )
    for name in ("data.balanced", "data.streaming"):
        if flat.get(name) and flat["data.train_rows"] is None:
            raise InputError(f"{name} needs data.train_rows: how many rows to draw")


def check_decoding(config: EvalConfig) -> None:
    """Raises InputError for settings by which no token can be chosen."""
    for name, value, wanted, right in (
        ("temperature", config.temperature, "0 or more", config.temperature >= 0),
        ("top_p", config.top_p, "above 0 and at most 1", 0 < config.top_p <= 1),
        ("stop", config.stop, "texts that are not empty", all(config.stop)),
    ):
        if not right:
            raise InputError(f"config field 'eval.{name}' is {value!r}, wanted {wanted}")


def save(config: Job, file: Path) -> None:
    """Writes the config as JSON."""
    write_whole(file, json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False))


def load(file: Path) -> Job:
    """Reads a config that `save` wrote.

    Raises:
      InputError: there is none, or it has fields that this version does not know.
    """
    if not file.is_file():
        raise InputError(f"{file.parent} is no workdir of a run: {file.name} is missing")
    try:
        return from_json(json.loads(file.read_text("utf-8")))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is no JSON: {error}") from None


def changed(old: Job, new: Job) -> list[str]:
    """Fields that differ and must not on resume, as `name: old -> new`."""
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name) and not _may_change(name, before, after)
    ]


def _may_change(name: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    old, new = before.get(name), after.get(name)
    name = name.removeprefix("base.")
    if name in ("train.steps", "train.epochs"):  # a larger one, counted the same way
        return None not in (old, new) and new > old
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
            value = ml_collections.ConfigDict({
                k: _to_config_dict(v) if dataclasses.is_dataclass(v) else v
                for k, v in value.items()
            })
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
        return {k: _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:  # as JSON has it, so that what is read again is the same
        return json.loads(json.dumps(value))
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(args[0], v, where) for v in value)
    if origin is types.UnionType:
        return None if value is None else _value(args[0], value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"config field '{where}' is {value!r}, wanted a value of type {hint}")
    return value
