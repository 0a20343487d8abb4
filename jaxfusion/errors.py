"""The one error that users see: one line with what was expected, what was given and the fix."""

import difflib
import re
from collections.abc import Iterable

# Characters that would break the line, and surrogates, which cannot be printed.
BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MOST_CHARACTERS = 300  # of a library's message or of a list of names


class InputError(ValueError):
    """Invalid user input. The scripts print its text alone, without a traceback.

    The text is always one line, whatever names and values it contains.
    """

    def __init__(self, text: str):
        super().__init__(BREAKS.sub(lambda match: ascii(match[0])[1:-1], text))


class Stopped(Exception):
    """SIGTERM was received: the run is saved, and the same command resumes it."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return cut(next(iter(str(error).splitlines()), type(error).__name__))


def cut(text: str) -> str:
    """A text truncated to the length of a line."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"


def listed(names: Iterable[str]) -> str:
    """Comma-separated names, truncated to the length of a line."""
    return cut(", ".join(map(str, names)))


def near_match(name: str, options: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the option closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def choose(what: str, name: str, options: Iterable[str]) -> str:
    """`name`, if it is one of `options`; otherwise raises InputError with the closest match."""
    options = list(options)
    if name not in options:
        raise InputError(
            f"unknown {what} '{name:.80}'{near_match(name, options)}; known: {', '.join(options)}"
        )
    return name
