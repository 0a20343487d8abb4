"""Fields of a `config.json`, read with their types and ranges.

Each function raises InputError, with the file and the field, for another value.
"""

from typing import Any

from jaxfusion.errors import InputError

LARGEST = 10_000_000  # of any count: a larger one is damage and would exhaust memory
MOST = 1e30  # of any other number: fits float32


def required_count(json: dict[str, Any], name: str, where: str) -> int:
    """A required count."""
    if json.get(name) is None:
        raise InputError(f"{where}: field '{name}' is missing")
    return count(json, name, None, where)


def count(
    json: dict[str, Any], name: str, default: int | None, where: str, least: int = 1
) -> int | None:
    """A count from `least` to `LARGEST`; the default if it is missing."""
    value = json.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= LARGEST:
        raise InputError(f"{where}: {name} is {value!r:.80}, expected an integer from {least} to "
                         f"{LARGEST:,}")
    return value


def number(
    json: dict[str, Any], name: str, where: str, default: float | None = None
) -> float:
    """A number above 0; the default, if there is one, if it is missing."""
    value = json.get(name)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value <= MOST:
        raise InputError(f"{where}: {name} is {value!r:.80}, expected a number above 0, at most "
                         f"{MOST:.0e}")
    return float(value)


def flag(json: dict[str, Any], name: str, where: str, default: bool = False) -> bool:
    """A boolean; the default if it is missing."""
    value = json.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{where}: {name} is {value!r:.80}, expected true or false")
    return value


def group(json: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A group of fields; empty if it is missing."""
    value = json.get(name)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: {name} is {value!r:.80}, expected a JSON object")
    return value or {}
