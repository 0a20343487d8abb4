"""Fields on the command line, as `--config.train.steps=100`: each has to name one of the config."""

import ast
import re
import sys
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from jaxfusion.errors import InputError, near_match
from jaxfusion.fields import JOBS

GROUP = (dict, ConfigDict)


class CheckedParser(flags.ArgumentParser):
    """Runs a config file as ml_collections' parser does, and checks what the command line sets in
    the config that it gives: both at once, as a file may do more than return a config."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, path: str) -> Any:
        """The config; raises InputError as `check_overrides`."""
        config = self.parser.parse(path)
        check_overrides(sys.argv, config)
        return config

    def flag_type(self) -> str:
        """What the flag is, for help."""
        return self.parser.flag_type()


def check_overrides(argv: list[str], config: Any) -> None:
    """Checks the names of all fields that a command line sets in a config; of their values, only
    that several texts are not taken for one.

    Args:
      config: what a file gave; anything but a group of fields is left to whoever reads it next.

    Raises:
      InputError: a flag names no field, sets a whole group of them, or several texts as one.
    """
    if not isinstance(config, GROUP):
        return
    for word in argv[1:]:
        if found := re.fullmatch(r"(--?(?:no)?config\.([^=]*))=?(.*)", word, re.DOTALL):
            flag, path, value = found.groups()
            hint = _check(flag, path, config, JOBS.get(str(config.get("job", "bridge"))))
            if "," in value and hint == tuple[str, ...] and not _is_literal(value):
                listed = ", ".join(repr(x.strip()) for x in value.split(","))
                raise InputError(f"{flag}={value}: would be one text with a comma in it; for "
                                 f"several write {flag}=\"({listed})\"")


def _is_literal(value: str) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return False
    return True


def _check(flag: str, path: str, at: Any, hint: Any) -> Any:
    """Goes from the config to the field, and returns its type. `hint` is the type of `at`; None
    where any value goes."""
    parts = _parts(path)
    if not parts:
        raise InputError(f"{flag}: '{path}' names no field; expected a name such as train.steps, "
                         "or sweep[0].name for what is inside an entry")
    name, outer = "config", at
    for part in parts:
        outer = at
        at = _inside(flag, name, at, part, hint)
        hint = _type_below(hint, part)
        name = f"{name}.{part}" if isinstance(part, str) else f"{name}[{part}]"
    if isinstance(outer, list | tuple):
        how = (f"a field of it, as --{name}.name=…" if isinstance(at, GROUP) else
               f"all entries together, as --{name.rpartition('[')[0]}=…")
        raise InputError(f"{flag}: an entry is not set alone; set {how}")
    in_an_entry = any(isinstance(part, int) for part in parts)  # what it changes, by group
    if isinstance(at, GROUP) and (is_dataclass(hint) or in_an_entry):
        raise InputError(f"{flag}: a group of fields, and those that are not given would lose what "
                         "the config file says; set them one by one, as "
                         f"--{name}.{next(iter(at), 'name')}=…")
    return hint


def _parts(path: str) -> list[str | int]:
    """The names and numbers in a path; empty if it is malformed."""
    try:
        return list(config_path.split(path))
    except (ValueError, AttributeError, TypeError):
        return []


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
