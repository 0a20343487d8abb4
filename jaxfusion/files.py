"""Files and directories that are whole or not there."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxfusion.errors import InputError, first_line


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
      InputError: the file is missing, not UTF-8, or not JSON.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(f"{file} is not JSON ({why})") from None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds; errors as of `read_json`, and where it is another value.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise InputError(f"{file} is not a JSON object but a {type(found).__name__}")
    return found


def write_whole(file: Path, text: str) -> None:
    """Writes a text file that appears, or takes its new content, all at once."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, "utf-8")
    partial.rename(file)


@contextmanager
def new_directory(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory that appears under its name only when the block ends well.

    Args:
      overwrite: it takes the place of what is there once it is whole.

    Raises:
      InputError: the name is taken by something other than an empty directory.
    """
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not overwrite:
        raise InputError(f"{out} is not empty; give another directory or remove it")
    if taken and not out.is_dir():
        raise InputError(f"{out} is a file; give the name of a directory")
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not out.exists():
        partial.rename(out)
        return
    old = out.rename(out.with_name(f".{out.name}.old-{os.getpid()}"))
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
