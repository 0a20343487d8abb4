"""What a field of a config may hold; `config.check` says what it does not."""

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from jaxfusion.errors import InputError, choose

MOST = 10**9  # of any count: what is larger is a slip


def one_of(what: str, options: tuple[str, ...]) -> AfterValidator:
    """A text that is one of the options; the near match is named."""
    return AfterValidator(lambda name: choose(what, name, options))


def _axis(size: int) -> int:
    if size != -1 and not 1 <= size <= MOST:
        raise InputError("expected 1 or more, or -1 for what is left")
    return size


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"not a regular expression: {error}") from None
    return text


def _distinct(what: str) -> Callable[[tuple], tuple]:
    def check(values: tuple) -> tuple:
        if len(set(values)) < len(values):
            raise InputError(f"has a {what} twice")
        return values

    return check


Count = Annotated[int, Field(ge=1, le=MOST)]
RowCount = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
Above0 = Annotated[float, Field(gt=0, le=1e9)]
Axis = Annotated[int, AfterValidator(_axis)]
Text = Annotated[str, Field(min_length=1)]
Regex = Annotated[str, AfterValidator(_pattern)]
Lengths = Annotated[tuple[Count, ...], Field(min_length=1)]
Patterns = Annotated[tuple[Regex, ...], Field(min_length=1)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Seeds = Annotated[tuple[Seed, ...], AfterValidator(_distinct("seed"))]


class Schema:
    """What all groups of fields share: no other fields, no text in the place of a number."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
