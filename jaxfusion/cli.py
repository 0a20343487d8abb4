"""What the scripts share: plain messages, and errors as one line."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from jaxfusion.errors import InputError, Stopped, cut


def set_up_logging() -> None:
    """This project's messages as plain lines on stderr; what fails in a library is raised, and said
    once."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    # That PyTorch is missing: nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.unraisablehook = _say_unraisable
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jaxfusion")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _say_unraisable(unraisable) -> None:
    # Of a checkpoint that cannot be read the first error is raised; further reads end later.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def take_device_memory() -> None:
    """Lets jax have most of a GPU's memory; by itself it takes three quarters. Before its import.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def end_on_sigterm() -> None:
    """From now on SIGTERM ends the process with status 75, wherever no run saves on it."""
    def end(*_) -> None:
        print("stopped by SIGTERM, with nothing to save; the same command starts again, or goes "
              "on from what is saved", file=sys.stderr, flush=True)
        os._exit(Stopped.EXIT_CODE)  # an exception might be swallowed in a callback

    signal.signal(signal.SIGTERM, end)


def refuse_words(argv: list[str]) -> None:
    """Raises InputError if words without dashes stand on the command line."""
    if len(argv) > 1:
        raise InputError(f"'{argv[1]}' is no flag; flags begin with --")


def local_path(text: str) -> Path:
    """The path of a directory or file.

    Raises:
      InputError: it is an address in a cloud, or a name that no file can have.
    """
    if "://" in text:
        raise InputError(f"{text} is an address, wanted a path: mount the bucket, as with gcsfuse "
                         "(docs/scaling.md), and give the place where it is mounted")
    try:
        Path(text).exists()
    except OSError as error:
        raise InputError(f"'{text:.80}' cannot be a path here: {error.strerror}") from None
    return Path(text)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs a script; what the user gave wrong ends it with one line and exit status 1, SIGTERM
    with status 75 once all is saved."""
    try:
        app.run(main, flags_parser=_parse_flags)
    except InputError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(Stopped.EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:  # a full disk, a place that may not be written
        sys.exit(f"error: {error}")


def _parse_flags(argv: list[str]) -> list[str]:
    """The words that are no flags. Config files run while flags are parsed; so do overrides."""
    try:
        return flags.FLAGS(argv)
    except InputError:
        raise
    except Exception as error:  # whatever a config file raises
        first = error
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, InputError):  # which the libraries wrap
            raise InputError(str(first)) from None
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        if text.strip("\"'").isidentifier():  # ml_collections' own KeyError
            name = text.strip("\"'")
            text = f"the config has no field '{name}'; its fields are in jaxfusion/fields.py"
        if "Traceback" in text:  # a config file that fails: where and how it did is the last line
            text = text.strip().splitlines()[-1]
        raise InputError(cut(" ".join(text.split()))) from None
