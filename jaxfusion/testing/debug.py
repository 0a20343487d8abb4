"""What a config's `:debug` runs on: checkpoints and rows made on first use, kept in a cache."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jaxfusion.config import Config
from jaxfusion.data.tasks import get_task
from jaxfusion.errors import choose
from jaxfusion.hf.save import new_directory
from jaxfusion.testing.checkpoints import SIZES, write_checkpoints
from jaxfusion.testing.text import write_rows

MADE = "made:"
ROWS = {"train": 300, "dev": 60, "test": 60}
# Part of the directories' names, so that those of another version are left alone.
VERSION = 1


def make_inputs(config: Config) -> Config:
    """The config with `made:SIZE` checkpoints and `made:rows` replaced by directories.

    They are made where they do not exist yet, below `$JAXFUSION_CACHE` (default
    `~/.cache/jaxfusion`).
    """
    cache = Path(os.environ.get("JAXFUSION_CACHE", Path.home() / ".cache" / "jaxfusion"))
    for role in ("encoder", "decoder"):
        tower = getattr(config, role)
        if tower.checkpoint.startswith(MADE):
            size = choose("checkpoint size", tower.checkpoint.removeprefix(MADE), SIZES)
            towers = cache / f"{size}-v{VERSION}"
            _make(towers, lambda out, size=size: write_checkpoints(out, size))
            tower = replace(tower, checkpoint=str(towers / role))
            config = replace(config, **{role: tower})
    if config.data.path == f"{MADE}rows":
        rows = cache / f"rows-{config.data.task}-v{VERSION}"
        _make(rows, lambda out: _write_rows(out, config.data.task))
        config = replace(config, data=replace(config.data, path=str(rows)))
    return config


def _write_rows(out: Path, task: str) -> None:
    with new_directory(out) as partial:
        write_rows(partial, get_task(task), rows=ROWS)


def _make(out: Path, make: Callable[[Path], None]) -> None:
    if out.is_dir():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(out)
    except OSError:
        if not out.is_dir():  # another process may have made it meanwhile
            raise
