"""Files and directories that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxfusion.errors import InputError


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
