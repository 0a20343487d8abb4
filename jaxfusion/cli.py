"""Script helpers: logging, one-line errors, exit codes."""

import logging
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from jaxfusion.errors import InputError, Stopped, cut
from jaxfusion.files import cache_dir

# What a flag's value has to be, by what Python says of another.
WANTED = {
    "invalid literal for int()": "a whole number", "could not convert string to float": "a number",
    "Non-boolean argument": "true or false", "Failed to parse": "a dictionary such as {'a': 1}",
    "Error while parsing string": "a tuple such as 1,2 or 'a','b'",
}
Groups = dict[str, tuple[flags.FlagHolder, ...]]  # of flags, by their heading in --help


def set_up_logging() -> None:
    """Logs jaxfusion's messages as plain lines on stderr and silences libraries, whose errors are
    raised anyway."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    # The warning that PyTorch is missing: nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.unraisablehook = _say_unraisable
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jaxfusion")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _say_unraisable(unraisable) -> None:
    # If a checkpoint cannot be read, its first error is raised; other pending reads end later.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def set_up_jax() -> None:
    """Lets jax use most of a GPU's memory (default: 75%), and keep compiled programs in the user's
    cache, so that a second start compiles nothing. Call it before jax is imported.

    The cache of programs holds 2 GiB; the oldest ones go. jax's own variables override all of this:
    `JAX_COMPILATION_CACHE_DIR` moves the programs, `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir() / "compiled" / _processor())
        # Not in a directory of the user's own: jax cannot limit one that it filled without a limit.
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    devices = Path("/dev")  # where a TPU would be: accel0 up to v4, vfio/0 from v5e on
    if not (any(devices.glob("accel*")) or (devices / "vfio").is_dir()):
        keep_libtpu_quiet()


def keep_libtpu_quiet() -> None:
    """On a machine without a TPU, libtpu asks a cloud's metadata server about it at every start of
    jax, and complains of the answer. These variables, which give the answer, prevent both."""
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8",
                        "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(name, value)


def _processor() -> str:
    """A name of this machine's kind of processor: homes are shared by several, and programs made
    for one may not run on another."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.M) if (
        info.is_file()) else None
    return f"{platform.machine()}-{zlib.crc32(flags[1].encode() if flags else b''):08x}"


def end_on_sigterm() -> None:
    """Makes SIGTERM exit with status 75 from now on, unless a run catches it to save."""
    def end(*_) -> None:
        print("stopped by SIGTERM, with nothing to save; the same command starts again, or resumes "
              "from the last save", file=sys.stderr, flush=True)
        os._exit(Stopped.EXIT_CODE)  # an exception might be swallowed in a callback

    signal.signal(signal.SIGTERM, end)


def refuse_words(argv: list[str]) -> None:
    """Raises InputError if the command line has positional arguments."""
    if len(argv) > 1:
        raise InputError(f"'{argv[1]}' is not a flag; flags begin with --")


def local_path(text: str) -> Path:
    """The path of a directory or file.

    Raises:
      InputError: it is a cloud address, or not a valid file name.
    """
    if "://" in text:
        raise InputError(f"{text} is an address, expected a path: mount the bucket, for example "
                         "with gcsfuse (docs/scaling.md), and give the mounted path")
    try:
        Path(text).exists()
    except OSError as error:
        raise InputError(f"'{text:.80}' cannot be a path here: {error.strerror}") from None
    return Path(text)


def typed(command: str) -> str:
    """How a command is typed here: `python eval.py`, or `jaxfusion eval` outside of the
    repository."""
    return f"python {command}.py" if Path(f"{command}.py").is_file() else f"jaxfusion {command}"


def run_main(
    main: Callable[[list[str]], None],
    about: str,
    own: flags.FlagValues | None = None,
    groups: Groups | None = None,
    read: Callable[[list[str]], list[str]] = list,
) -> None:
    """Runs a command; an InputError exits with one line and status 1, SIGTERM with status 75 once
    everything is saved.

    Args:
      about: what `--help` says, with the flags of `groups` under their headings.
      own: the command's flags; those of libraries are none.
      read: the command line as it is parsed, from what was typed.
    """
    own = flags.FlagValues() if own is None else own
    try:
        app.run(main, flags_parser=lambda argv: parse_flags(
            argv, own, help_text(about, own, groups or {}), read))
    except InputError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(Stopped.EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head` has read what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, missing write permission
        sys.exit(f"error: {error}")


def help_text(about: str, own: flags.FlagValues, groups: Groups) -> str:
    """What a command does, and its flags under their headings; what takes a value ends in `=`."""
    form = {name: f"--{name}" + ("" if own[name].boolean else "=") for name in own}
    width = max(map(len, form.values()), default=0) + 4
    room = max(min(shutil.get_terminal_size().columns, 100) - width, 20)
    lines = [about.strip()]
    for heading, group in groups.items():
        lines += ["", f"{heading}:"]
        for holder in group:
            first, *more = textwrap.wrap(own[holder.name].help, room)
            lines += [f"  {form[holder.name]:{width - 2}}{first}", *(" " * width + x for x in more)]
    return "\n".join(lines)


def parse_flags(
    argv: list[str], own: flags.FlagValues, about: str,
    read: Callable[[list[str]], list[str]] = list,
) -> list[str]:
    """The positional arguments. Parsing flags runs config files and applies overrides.

    Raises:
      InputError: a flag or a config is wrong.
      SystemExit: help was asked for, and printed.
    """
    if {"--help", "-h"} & set(argv[1:]):
        print(about)
        sys.exit(0)
    flags.FLAGS(argv[:1])  # libraries' have their defaults
    try:
        sys.argv = read(argv)  # where ml_collections looks for the fields that are set
        return own(sys.argv)
    except InputError:
        raise
    except Exception as error:  # whatever a config file raises
        first = error
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, InputError):  # wrapped by the libraries
            raise InputError(str(first)) from None
        text = _plainly(str(error))
        if isinstance(first, AttributeError) and first.name == "get_config":
            text = "the file of --config has no function get_config: it is not a config"
        if isinstance(first, KeyError):
            text = _unknown_field(str(first.args[0]), str(error)) if _of_config(first) else (
                f"the file of --config fails with {type(error).__name__}: {error}")
        if "Traceback" in text:  # a config file failed: the last line has the error
            text = text.strip().splitlines()[-1]
        raise InputError(cut(" ".join(text.split()))) from None


def _plainly(text: str) -> str:
    """What absl says of flags that are required and missing, or whose value is of the wrong type,
    in plain words."""
    missing = re.findall(r"flag (--\w+)=None: Flag --\w+ must have a value", text)
    if missing:
        return f"missing: {', '.join(missing)}; --help says what they are"
    found = re.fullmatch(r"flag (--\S+?=.*?): (.*)", text, re.DOTALL)
    expected = found and next((x for sign, x in WANTED.items() if sign in found[2]), None)
    return f"{found[1]}: expected {expected}" if expected else text


def _of_config(error: KeyError) -> bool:
    """Whether a config looked for the key, and not a dictionary of a config file."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("ml_collections.")


def _unknown_field(name: str, said: str) -> str:
    """What is wrong with a config file that sets a field that the config has not."""
    meant = re.search(r'Did you mean "(\w+)"', said)
    near = f" (did you mean '{meant[1]}'?)" if meant else ""
    return (f"--config: the config has no field '{name}'{near}; its fields are in "
            "jaxfusion/fields.py")
