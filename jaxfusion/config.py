"""From a file in `configs/` and the command line to a run's config, and to JSON and back.

A file starts from `default_config()`, a ConfigDict, and sets what differs; the command line
overrides its fields; `from_config_dict` turns the result into the dataclasses of `fields.py`
and refuses what they do not know. No jax here: configs are read before jax starts.
"""

import dataclasses
import json
import re
import typing
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict
from pydantic import TypeAdapter, ValidationError

from jaxfusion.errors import InputError, choose, first_line, listed, near_match
from jaxfusion.fields import (
    DTYPES,
    JOBS,
    CompareConfig,
    Config,
    DataConfig,
    Job,
    LensRunConfig,
)
from jaxfusion.files import read_json, write_checked

CONFIG_FILE = "config.json"  # of a workdir
EVERY = "all"  # as `data.language`: the languages of the task, unless one has that name
FIRST = "first"  # where a workdir has its run's first stage
# Fields that a run resolves, or that had a number where they are open now.
OPEN = ("data.bos", "eval.max_new_tokens")
# May differ when a run is resumed, besides a larger number of steps.
FREE_ON_RESUME = ("mesh", "encoder.dtype", "decoder.dtype", "encoder.remat", "decoder.remat",
                  "encoder.keep_states", "encoder.attention", "decoder.attention",
                  "train.accumulate", "train.log_every", "data.dev_patience", "logging")


def default_config(job: str = "bridge") -> ml_collections.ConfigDict:
    """All defaults of a job as an unlocked ConfigDict, with placeholders where one is None."""
    return _to_config_dict(JOBS[job]())


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

    Raises:
      InputError: an unknown field, or a value of the wrong type or out of range.
    """
    job = values.get("job", "bridge")
    return _validated(JOBS[choose("job", str(job), JOBS)], {**values, "job": str(job)}, "")


def _validated(kind: type, values: Any, where: str) -> Any:
    """The values as a dataclass of fields; `where` prefixes their names in messages."""
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"config{where and f' {where}'}: {first_line(error)}") from None
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise InputError(_said(kind, error.errors()[0], where)) from None


@lru_cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _said(kind: type, error: dict[str, Any], where: str) -> str:
    """One line on what is wrong with a field."""
    *outer, name = [str(part) for part in error["loc"]] or [""]
    path = where + ".".join([*outer, name])
    if error["type"] == "unexpected_keyword_argument":
        hints = typing.get_type_hints(kind)
        for part in outer:
            hints = _inner(hints[part])
        return (f"unknown config field '{path}'{near_match(name, hints)}; "
                f"known: {', '.join(hints)}")
    if error["type"] == "value_error":  # one of this project's own messages
        said = str(error["ctx"]["error"])
        if said.startswith("unknown"):
            return said
    else:
        bounds = {name: int(x) if isinstance(x, float) and x.is_integer() else x
                  for name, x in error.get("ctx", {}).items()}
        expected = EXPECTED.get(error["type"], error["msg"]).format(**bounds)
        said = f"expected {expected}"
    return f"config field '{path}' is {error['input']!r:.80}, {said}"


# By pydantic's name of an error.
EXPECTED = {
    "int_type": "a whole number", "float_type": "a number", "string_type": "a text in quotes",
    "bool_type": "True or False", "tuple_type": "a tuple", "dict_type": "a dictionary",
    "dataclass_type": "a group of fields", "finite_number": "a finite number",
    "int_parsing_size": "a smaller whole number", "greater_than_equal": "{ge:,} or more",
    "greater_than": "more than {gt:,}", "less_than_equal": "{le:,} or less",
    "less_than": "less than {lt:,}", "string_too_short": "a text that is not empty",
    "too_short": "one entry or more",
}


def _inner(hint: Any) -> dict[str, Any]:
    """Names and types below a field."""
    if dataclasses.is_dataclass(hint):
        return typing.get_type_hints(hint)
    args = typing.get_args(hint)
    return defaultdict(lambda: args[-1]) if args else {}


def variants(config: CompareConfig) -> dict[str, Config]:
    """The config of each variant.

    Raises:
      InputError: no variant, or fields that a bridge does not have.
    """
    if not config.variants:
        raise InputError("a comparison needs at least one variant in config.variants")
    return _each("variants", config.variants, dataclasses.asdict(config.base), Config)


def run_folders(config: CompareConfig) -> dict[str, list[Path]]:
    """Where below its workdir a comparison keeps the runs of each variant, seed by seed."""
    seeds = [(f"seed_{seed}",) for seed in config.seeds] or [()]
    return {str(fields["name"]): [Path(directory_name(fields["name"]), *seed) for seed in seeds]
            for fields in config.variants}


def stage_before(config: Config, workdir: Path) -> Path | None:
    """The workdir of the stage that a run starts from, if it has one."""
    if config.first:
        return workdir / FIRST
    return None if config.train.init_from is None else Path(config.train.init_from)


def first_stage(config: Config) -> Config:
    """The config of the stage that `config.first` describes.

    Raises:
      InputError: fields that a bridge does not have.
    """
    values = json.loads(json.dumps({**dataclasses.asdict(config), "first": {}, "seeds": ()}))
    _override(values, config.first, "first")
    if values["first"] or values["seeds"] or values["train"]["init_from"]:
        raise InputError("config.first is one stage that starts from nothing, with the run's seed: "
                         "leave first, seeds and train.init_from out of it")
    return _validated(Config, values, "first.")


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
        _override(values, fields, f"{name}.{entry}")
        found[entry] = _validated(kind, values, f"{name}.{entry}.")
        check(found[entry])
    return found


def directory_name(variant: str) -> str:
    """Where a comparison keeps a variant: `layer 3` -> `layer_3`."""
    return re.sub(r"\W+", "_", variant)


def _override(values: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    """Sets nested fields; None in the place of a group of fields leaves the group out.

    Raises:
      InputError: an empty group, which changes nothing where one may expect it to remove all.
    """
    for name, value in fields.items():
        if values.get(name) and value == {}:
            raise InputError(f"config field '{where}.{name}' is {{}}, expected the fields that "
                             "differ, or None for the defaults")
        if isinstance(values.get(name), dict) and value is None:
            del values[name]
        elif isinstance(values.get(name), dict) and isinstance(value, dict):
            _override(values[name], value, f"{where}.{name}")
        else:
            values[name] = value


def check(config: Job) -> None:
    """Raises InputError for a value that no run can have."""
    _validated(type(config), dataclasses.asdict(config), "")
    if isinstance(config, CompareConfig):
        variants(config)  # checks each of them
        return
    if isinstance(config, Config) and config.first:
        if config.train.init_from is not None:
            raise InputError("config.first and train.init_from both name a stage before this one; "
                             "set one of them")
        check(first_stage(config))
    if isinstance(config, LensRunConfig) and config.decoder.dtype not in DTYPES:
        raise InputError(f"decoder.dtype is '{config.decoder.dtype}', which Lens cannot move; set "
                         "decoder.dtype to bfloat16 or float32")
    open_axes = [f"mesh.{x}" for x, size in dataclasses.asdict(config.mesh).items() if size == -1]
    if len(open_axes) > 1:
        raise InputError(f"{' and '.join(open_axes)} are -1, expected one of them at most: it is "
                         "filled in from the number of devices")
    total, query = (getattr(config.data, f"max_{x}_tokens", None) for x in ("total", "encoder"))
    if total is not None and total <= query + 1:
        raise InputError(f"data.max_total_tokens is {total}, expected more than "
                         f"data.max_encoder_tokens = {query} and BOS: no room is left for a target")
    if isinstance(config, Config):
        _check_development(config.data)
    for name in ("balanced", "streaming"):
        if getattr(config.data, name, False) and config.data.train_rows is None:
            raise InputError(f"data.{name} needs data.train_rows: how many rows to draw")


def _check_development(data: DataConfig) -> None:
    """Raises InputError if no language, or two, are what decides the best checkpoint."""
    languages = data.dev_languages or (data.language,)
    if len(set(languages)) < len(languages):
        raise InputError(f"data.dev_languages names a language twice: {listed(languages)}")
    if languages == (EVERY,):
        return  # which these are only the task knows
    if data.dev_decides not in ("mean", *languages):
        raise InputError(f"data.dev_decides is '{data.dev_decides}', expected mean, or a language "
                         f"of development: {listed(languages)}")


def save(config: Job, file: Path) -> None:
    """Writes the config as JSON."""
    write_checked(file, json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False))


def load(file: Path) -> Job:
    """Reads a config that `save` wrote.

    Raises:
      InputError: there is none, it is damaged, or it has fields that this version does not know.
    """
    if not file.is_file():
        raise InputError(f"{file.parent} is not a workdir of a run: {file.name} is missing")
    values = read_json(file, "put back a copy of it, or start again with another --workdir")
    try:
        return from_json(_with_bos(values))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (TypeError, AttributeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{file} is not a config of a run: {first_line(error)}") from None


def _with_bos(values: dict[str, Any]) -> dict[str, Any]:
    """A run's config with what was so before the field `data.bos` was there: BOS wherever the
    tokenizer names one."""
    for part in (values, values.get("base")):
        if isinstance(part, dict) and isinstance(part.get("data"), dict) and (
                part.get("job", "bridge") in ("bridge", "lens")):
            part["data"].setdefault("bos", True)
    return values


def changed(old: Job, new: Job) -> list[str]:
    """Fields that differ and must not on resume, as `name: old -> new`."""
    before, after = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name) and not _may_change(name, before, after)
    ]


def _may_change(name: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    old, new = before.get(name), after.get(name)
    name = name.removeprefix("base.")
    if name in OPEN:  # left open now, it is what it was
        return new is None
    if name in ("train.steps", "train.epochs"):  # a larger one, counted the same way
        return None not in (old, new) and new > old
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's fields by their full names, as `train.batch_size`."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {
            f"{prefix}{name}": value
        }
    return found


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
