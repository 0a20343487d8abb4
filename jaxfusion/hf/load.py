"""Hugging Face directories → parameter trees. Only safetensors are read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives NumPy the bfloat16 that safetensors hands over)
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from jaxfusion.errors import InputError
from jaxfusion.hf.hub import convert_hint
from jaxfusion.hf.tables import TRANSFORMS, Row, Table

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(path: Path) -> dict[str, Any]:
    """The directory's `config.json`.

    Raises:
      InputError: it is missing or no JSON.
    """
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path} is no checkpoint: config.json is missing")
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from None


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a directory by name; bytes are read when asked for."""

    path: Path
    files: dict[str, str]  # tensor name -> file name

    def read(self, name: str) -> np.ndarray:
        with safe_open(self.path / self.files[name], framework="numpy") as file:
            return file.get_tensor(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the files' headers."""
        found = {}
        for file_name in sorted(set(self.files.values())):
            with safe_open(self.path / file_name, framework="numpy") as file:
                held = set(file.keys())
                for name in (n for n, f in self.files.items() if f == file_name and n in held):
                    found[name] = tuple(file.get_slice(name).get_shape())
        return found


def open_tensors(path: Path) -> TensorFiles:
    """Finds the tensors of a directory, single file or sharded with an index.

    Raises:
      InputError: only pickles are there, a shard is missing, or a file is damaged.
    """
    if (path / INDEX).is_file():
        try:
            files = json.loads((path / INDEX).read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise InputError(f"{path / INDEX} is damaged: {error}") from None
        missing = sorted({file for file in files.values() if not (path / file).is_file()})
        if missing:
            raise InputError(f"{path} is half a checkpoint: {', '.join(missing)} missing")
    elif (path / SINGLE).is_file():
        files = dict.fromkeys(_keys(path / SINGLE), SINGLE)
    elif any((path / name).is_file() for name in PICKLES):
        raise InputError(convert_hint(str(path), "holds a pickle checkpoint", path.name))
    else:
        raise InputError(f"{path} is half a checkpoint: {SINGLE} (or {INDEX}) is missing")
    for file in sorted(set(files.values())):
        _keys(path / file)
    return TensorFiles(path, files)


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or cut short: {error}") from None


def load_params(
    path: Path,
    table: Table,
    abstract: dict[str, Any],
    place: Callable[[str, np.ndarray], jax.Array],
) -> dict[str, Any]:
    """Reads a tower's parameters.

    Args:
      path: the directory.
      table: rows of its family.
      abstract: the parameter tree with shapes (stacked along blocks) and the wanted dtypes.
      place: puts a finished array, named by its path in the tree, on the devices.

    Raises:
      InputError: tensors missing, unused or of another shape, all named at once.
    """
    tensors = open_tensors(path)
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    _check(path, table, wanted, tensors.shapes())
    params = {}
    for row in table.rows:
        leaf = wanted[row.ours]
        params[row.ours] = place(row.ours, _read_row(row, leaf, tensors))
    return traverse_util.unflatten_dict(params, sep="/")


def _names(row: Row, layers: int) -> list[tuple[str, ...]]:
    """The possible names of each tensor a row stacks (one tensor if it stacks none)."""
    if not row.stacked:
        return [(row.theirs, *row.also)]
    return [(row.theirs.format(i=i),) for i in range(layers)]


def _read_row(row: Row, leaf, tensors: TensorFiles) -> np.ndarray:
    """One parameter of ours, in its dtype."""
    to_ours = TRANSFORMS[row.transform].to_ours
    out = np.empty(leaf.shape, leaf.dtype)
    slots = out if row.stacked else out[None]
    for slot, names in zip(slots, _names(row, len(slots)), strict=True):
        name = next(name for name in names if name in tensors.files)
        slot[...] = to_ours(tensors.read(name), slot.shape)
    return out


def _check(path: Path, table: Table, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises with every missing, unused and mis-shaped tensor; one row must serve each leaf."""
    if {row.ours for row in table.rows} != set(wanted):
        raise AssertionError("the table and the parameter tree disagree")
    problems, used = {"missing": [], "mis-shaped": [], "unused": []}, set()
    for row in table.rows:
        shape = wanted[row.ours].shape
        layers, shape = (shape[0], shape[1:]) if row.stacked else (1, shape)
        theirs = tuple(TRANSFORMS[row.transform].their_shape(shape))
        for names in _names(row, layers):
            present = [name for name in names if name in found]
            used.update(present)
            if not present:
                problems["missing"].append(names[0])
            problems["mis-shaped"] += [
                f"{name} is {list(found[name])}, wanted {list(theirs)}"
                for name in present if found[name] != theirs
            ]
    problems["unused"] = sorted(
        name for name in found if name not in used and not table.ignores(name)
    )
    if any(problems.values()):
        lines = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        raise InputError(f"{path} does not fit its config.json; {'; '.join(lines)}")
