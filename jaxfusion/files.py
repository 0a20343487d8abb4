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
      overwrite: it takes the place of what is there, in the same moment.

    Raises:
      InputError: the name is taken by something other than an empty directory.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give another directory or remove it")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        old = out.rename(out.with_name(f".{out.name}.old-{os.getpid()}"))
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
