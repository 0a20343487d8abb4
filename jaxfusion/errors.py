"""The one error that users see: a line that says what was got, wanted, and how to mend it."""

import difflib
import re
from collections.abc import Iterable

# What would break a line, or could not be printed at all: halves of characters.
BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MOST_CHARACTERS = 300  # of a library's message, or of names in a row


class InputError(ValueError):
    """Something the user gave is wrong. The scripts print its text alone, without a traceback.

    Whatever names and values of others stand in the text, it is one line.
    """

    def __init__(self, text: str):
        super().__init__(BREAKS.sub(lambda found: ascii(found[0])[1:-1], text))


class Stopped(Exception):
    """SIGTERM came: the run is saved, and the same command goes on with it."""

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its name where it has none."""
    return cut(next(iter(str(error).splitlines()), type(error).__name__))


def cut(text: str) -> str:
    """So much of a text as a line can take."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"


def listed(names: Iterable[str]) -> str:
    """Names apart by commas, so many as a line can take."""
    return cut(", ".join(map(str, names)))


def near_match(name: str, options: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the option closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def choose(what: str, name: str, options: Iterable[str]) -> str:
    """`name`, if it is one of `options`; raises InputError with the near match if not."""
    options = list(options)
    if name not in options:
        raise InputError(
            f"unknown {what} '{name:.80}'{near_match(name, options)}; known: {', '.join(options)}"
        )
    return name
