"""The command `jaxfusion`: trains, scores, exports and serves from any directory."""

import sys
from importlib import import_module
from importlib.metadata import version

from jaxfusion.errors import InputError, choose

# Each is a module of this room with a function `run`, which finds its flags in sys.argv.
COMMANDS = {
    "train": "trains what a config says",
    "eval": "scores runs, compares them, reports, and answers questions",
    "export": "writes a run in Hugging Face format",
    "serve": "serves a run: a page, and an API for OpenAI's clients",
    "configs": "lists this project's configs",
    "completion": "prints a script that completes commands in bash, zsh or fish",
}


def usage() -> str:
    """All commands, with a line on each."""
    width = max(map(len, COMMANDS))
    return "\n".join([
        "jaxfusion COMMAND [flags]; the flags of a command: jaxfusion COMMAND --help", "",
        *(f"  {name:{width}}  {about}" for name, about in COMMANDS.items())])


def main() -> None:
    """Runs the command that the first word names."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(version("jaxfusion"))
    else:
        try:
            choose("command", name, COMMANDS)
        except InputError as error:
            sys.exit(f"error: {error}")
        sys.argv = [f"jaxfusion {name}", *words]
        import_module(f"jaxfusion.commands.{name}").run()
