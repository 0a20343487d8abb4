"""Configs by name: `jaxfusion configs` lists them, `--config NAME[:words]` takes one."""

import ast
import re
import sys
from types import ModuleType

from jaxfusion.cli import refuse_words, run_main
from jaxfusion.errors import InputError, choose
from jaxfusion.files import shipped


def names() -> list[str]:
    """What `--config` takes, besides paths."""
    return [x.stem for x in sorted(shipped("configs").glob("*.py")) if x.stem != "common"]


def list_configs() -> str:
    """Every config of this project, with the first line of what it says of itself."""
    files = {name: shipped("configs") / f"{name}.py" for name in names()}
    width = max(map(len, files))
    return "\n".join(
        f"{name:{width}}  {ast.get_docstring(ast.parse(file.read_text('utf-8'))).splitlines()[0]}"
        for name, file in files.items())


def with_paths(argv: list[str]) -> list[str]:
    """A command line with the file of a config in place of its name: `--config xnli_paper:last` and
    `--config=xnli_paper:last` become paths. What has a slash or ends in .py is a path already.

    Raises:
      InputError: no config has that name.
    """
    out, follows = [], False
    for word in argv:
        flag, equals, value = re.fullmatch(r"(--?config)?(=)?(.*)", word, re.DOTALL).groups()
        if follows:
            word = _path(word)
        elif flag and equals:
            word = f"{flag}={_path(value)}"
        follows = bool(flag and not equals and not value) and not follows
        out.append(word)
    return out


def _path(config: str) -> str:
    name, colon, words = config.partition(":")
    if not re.fullmatch(r"[\w-]+", name) or name.startswith("-"):
        return config
    try:
        found = shipped("configs") / f"{choose('config', name, names())}.py"
    except InputError as error:
        raise InputError(f"{error}; a file of your own is given by its path, which ends in "
                         ".py") from None
    return f"{found}{colon}{words}"


def offer_common() -> None:
    """Makes `configs.common`, which files of configs/ import, importable from any directory."""
    try:
        import configs
    except ImportError:
        configs = sys.modules["configs"] = ModuleType("configs")
    places = list(getattr(configs, "__path__", []))
    if str(shipped("configs")) not in places:  # last: a user's own go first
        configs.__path__ = [*places, str(shipped("configs"))]


def main(argv: list[str]) -> None:
    """Prints the list."""
    refuse_words(argv)
    print(list_configs())


def run() -> None:
    """The command `jaxfusion configs`."""
    run_main(main, __doc__)
