"""Inputs of `:debug` configs: checkpoints and rows, created on first use and cached."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

from jaxfusion.config import first_stage, variants
from jaxfusion.data.pocket.lexicon import VERSION as WORLD
from jaxfusion.data.pocket.world import (
    write_parallel,
    write_tasks,
    write_texts,
    write_translations,
)
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError, choose
from jaxfusion.fields import CompareConfig, Config, Job, LensRunConfig, PretrainConfig
from jaxfusion.files import cache_dir, new_directory
from jaxfusion.miniatures.checkpoints import SIZES, write_checkpoints
from jaxfusion.miniatures.text import write_rows

MADE = "made:"
# Sizes of the pocket world by the name after `made:`, as shares of its texts and training rows.
WORLDS = {"pocket": 1.0, "pocket_tenth": 0.1, "pocket_debug": 0.01}
ROWS = {"train": 300, "dev": 60, "test": 60}
# Part of the directories' names, so that other versions are not reused.
VERSION = 1


def make_inputs(config: Job) -> Job:
    """The config with `made:SIZE` checkpoints, `made:rows` and `made:pocket` as directories.

    They are created if missing, below `$JAXFUSION_CACHE` (default `~/.cache/jaxfusion`).
    """
    cache = cache_dir()
    if isinstance(config, CompareConfig):
        return _comparison_inputs(config)
    if isinstance(config, LensRunConfig):
        return _lens_inputs(config, cache)
    if isinstance(config, Config) and config.first.get("data", {}).get("path"):
        made = make_inputs(first_stage(config)).data.path
        config = replace(config, first={
            **config.first, "data": {**config.first["data"], "path": made}})
    if config.data.path and config.data.path.startswith(f"{MADE}pocket"):
        if isinstance(config, PretrainConfig):
            path = _world(config.data.path, "texts", write_texts, cache)
        elif config.data.task == "pocket_translation":
            path = _world(config.data.path, "translations", write_translations, cache)
        else:
            path = _world(config.data.path, "tasks", write_tasks, cache) / config.data.task
        config = replace(config, data=replace(config.data, path=str(path)))
    if isinstance(config, PretrainConfig):
        return config
    for role in ("encoder", "decoder"):
        config = replace(config, **{role: _tower(config, role, cache)})
    if config.data.path == f"{MADE}rows":
        task = get_task(config.data.task, config.tasks)
        # Two configs may define different tasks with the same name.
        own = config.tasks.get(config.data.task, "") and (
            f"-{crc32(repr(config.tasks[config.data.task]).encode()):x}")
        rows = cache / f"rows-{config.data.task}{own}-v{VERSION}"
        _make(rows, lambda out: _write_rows(out, task))
        config = replace(config, data=replace(config.data, path=str(rows)))
    return config


def _comparison_inputs(config: CompareConfig) -> CompareConfig:
    """Those of the base, and of first stages that variants have of their own."""
    config, made = replace(config, base=make_inputs(config.base)), []
    for fields, run in zip(config.variants, variants(config).values(), strict=True):
        own = fields.get("first") and {"first": make_inputs(run).first}
        made.append({**fields, **(own or {})})
    return replace(config, variants=tuple(made))


def _lens_inputs(config: LensRunConfig, cache: Path) -> LensRunConfig:
    data = config.data
    if data.path.startswith(f"{MADE}pocket"):
        prompts = _world(data.path, "parallel", write_parallel, cache) / "parallel.jsonl"
        data = replace(data, path=str(prompts))
    if data.task_path and data.task_path.startswith(f"{MADE}pocket"):
        tasks = _world(data.task_path, "tasks", write_tasks, cache)
        data = replace(data, task_path=str(tasks / "{task}"))
    config = replace(config, data=data)
    return replace(config, decoder=_tower(config, "decoder", cache))


def _tower(config: Job, role: str, cache: Path):
    """A tower's fields, with `made:SIZE` replaced by a directory."""
    tower = getattr(config, role)
    if not tower.checkpoint.startswith(MADE):
        return tower
    size = choose("checkpoint size", tower.checkpoint.removeprefix(MADE), SIZES)
    towers = cache / f"{size}-v{VERSION}"
    _make(towers, lambda out: write_checkpoints(out, size))
    return replace(tower, checkpoint=str(towers / role))


def _world(path: str, part: str, write: Callable[[Path, float], None], cache: Path) -> Path:
    """The directory of the world's texts, tasks or parallel prompts."""
    size = choose("pocket world", path.removeprefix(MADE), WORLDS)
    out = cache / f"{size}-{part}-v{WORLD}"

    def write_new(out: Path) -> None:
        with new_directory(out) as partial:
            write(partial, WORLDS[size])

    _make(out, write_new)
    return out


def _write_rows(out: Path, task: Task) -> None:
    with new_directory(out) as partial:
        write_rows(partial, task, rows=ROWS)


def _make(out: Path, make: Callable[[Path], None]) -> None:
    if out.is_dir():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(out)
    except (OSError, InputError):
        if not out.is_dir():  # another process may have created it meanwhile
            raise
