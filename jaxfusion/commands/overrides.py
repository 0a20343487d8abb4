"""Fields on the command line, as `--config.train.steps=100`: each has to name one of the config."""

import re
import runpy
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from jaxfusion.errors import InputError, near_match
from jaxfusion.fields import JOBS

GROUP = (dict, ConfigDict)


def check_overrides(argv: list[str]) -> None:
    """Checks the names of all fields that a command line sets, not their values.

    A config that cannot be read is left to whoever reads it next, and says why.

    Raises:
      InputError: a flag names no field, or sets a whole group of them.
    """
    fields = [found for word in argv[1:] if (found := re.fullmatch(
        r"(--?(?:no)?config\.([^=]*))=?.*", word, re.DOTALL))]
    config = _read(argv) if fields else None
    if not isinstance(config, GROUP):
        return
    for field in fields:
        _check(field[1], field[2], config, JOBS.get(str(config.get("job", "bridge"))))


def _read(argv: list[str]) -> Any:
    """What the file of `--config` gives; None where it gives nothing."""
    given = [re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL) for word in argv]
    places = [i for i, found in enumerate(given) if found]
    if not places:
        return None
    value = given[places[0]][1]
    value = " ".join(argv[places[0] + 1 :][:1]) if value is None else value
    file, colon, words = value.partition(":")
    try:
        return runpy.run_path(file)["get_config"](*[words] * bool(colon))
    except Exception:
        return None


def _check(flag: str, path: str, at: Any, hint: Any) -> None:
    """Goes from the config to the field. `hint` is the type of `at`; None where any value goes."""
    try:
        first, *parts = config_path.split(path)
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{flag}: '{path}' names no field; expected a name such as train.steps, "
                         "or sweep[0].name for what is inside an entry") from None
    name, outer = "config", at
    for part in (first, *parts):
        outer = at
        at = _inside(flag, name, at, part, hint)
        hint = _type_below(hint, part)
        name = f"{name}.{part}" if isinstance(part, str) else f"{name}[{part}]"
    if isinstance(outer, list | tuple):
        how = (f"a field of it, as --{name}.name=…" if isinstance(at, GROUP) else
               f"all entries together, as --{name.rpartition('[')[0]}=…")
        raise InputError(f"{flag}: an entry is not set alone; set {how}")
    if is_dataclass(hint) and isinstance(at, GROUP):
        raise InputError(f"{flag}: a group of fields, and those that are not given would lose what "
                         "the config file says; set them one by one, as "
                         f"--{name}.{next(iter(at), 'name')}=…")


def _inside(flag: str, name: str, at: Any, part: Any, hint: Any) -> Any:
    """What `at` has under a name or at a place."""
    if isinstance(at, GROUP):
        if part in at:
            return at[part]
        every = get_type_hints(hint) if is_dataclass(hint) else {part: None}
        more = ("its fields are in jaxfusion/fields.py" if every.keys() <= set(at) else
                "the command line sets only fields that the config file has there")
        raise InputError(f"{flag}: the config has no field '{part}'"
                         f"{near_match(str(part), map(str, at))}; {more}")
    if isinstance(at, list | tuple):
        if isinstance(part, int) and -len(at) <= part < len(at):
            return at[part]
        expected = (f"expected one from {name}[0] to {name}[{len(at) - 1}]"
                    if at and isinstance(at[0], GROUP) else f"set all together, as --{name}=…")
        raise InputError(f"{flag}: no such entry of {name}, which has {len(at)}; {expected}")
    raise InputError(f"{flag}: {name} is {at!r:.60}, which has no field '{part}'")


def _type_below(hint: Any, part: Any) -> Any:
    if is_dataclass(hint):
        return get_type_hints(hint).get(part)
    return (get_args(hint) or (None,))[-1]
