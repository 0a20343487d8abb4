"""Hugging Face directories → parameter trees. Only safetensors are read."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives NumPy the bfloat16 that safetensors returns)
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open

from jaxfusion.errors import InputError
from jaxfusion.files import read_object
from jaxfusion.hf.decoders import decoder_config
from jaxfusion.hf.encoders import encoder_config
from jaxfusion.hf.hub import convert_hint
from jaxfusion.hf.tables import TRANSFORMS, Entry, Index, Table
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.encoder import EncoderConfig
from jaxfusion.nn.quantised import is_quantised, quantise, scale_path, scales_of

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
logger = logging.getLogger(__name__)
FLOATS = ("F32", "BF16", "F16", "F64")  # safetensors' names
SHOWN_BYTES = 1 << 28  # checkpoints from this size on show a progress bar


def read_config(path: Path) -> dict[str, Any]:
    """The directory's `config.json`.

    Raises:
      InputError: it is missing or not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path} is not a checkpoint: config.json is missing")
    return read_object(file)


def read_shape(role: str, path: Path) -> EncoderConfig | DecoderConfig:
    """The shape of a tower, from the `config.json` of its directory.

    If an LLM's config ties the head to the embeddings but the weights have a different head, the
    weights win, as in transformers 5 (4 follows the config).

    Raises:
      InputError: as in `encoder_config`, `decoder_config` and `open_tensors`.
    """
    json, where = read_config(path), f"{path}/config.json"
    if role == "encoder":
        return encoder_config(json, where)
    shape = decoder_config(json, where)
    if not shape.tie_embeddings:
        return shape
    tensors, (head, table) = open_tensors(path), ("lm_head.weight", "model.embed_tokens.weight")
    if not {head, table} <= tensors.files.keys():
        return shape
    if np.array_equal(tensors.read(head), tensors.read(table)):
        return shape
    logger.warning("%s: config.json ties the head to the embeddings, but %s differs from %s: "
                   "using the separate head, as in transformers 5", path, head, table)
    return replace(shape, tie_embeddings=False)


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a directory by name, read lazily."""

    path: Path
    files: dict[str, str]  # tensor name -> file name

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A tensor, or a block of it.

        Raises:
          InputError: it has integers (a quantized checkpoint), NaN or infinity.
        """
        file = self.path / self.files[name]
        with safe_open(file, framework="numpy") as opened:
            stored = opened.get_slice(name)
            if stored.get_dtype() not in FLOATS:
                raise InputError(f"{file}: {name} has type {stored.get_dtype()}, expected one of "
                                 f"{', '.join(FLOATS)}: quantized checkpoints are not supported, "
                                 "use the original")
            block = stored[index] if index else opened.get_tensor(name)
        if not np.isfinite(block).all():
            raise InputError(f"{file}: {name} has NaN or infinity; the checkpoint is damaged, "
                             "download it again")
        return block

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the files' headers."""
        return {name: tuple(stored.get_shape()) for name, stored in self._slices()}

    def middle_rows(self) -> dict[str, np.ndarray]:
        """The middle row of every tensor of floats that has rows, as it is stored."""
        middles = ((name, stored, shape[0] // 2) for name, stored in self._slices()
                   if (shape := stored.get_shape()) and shape[0] and stored.get_dtype() in FLOATS)
        return {name: stored[row : row + 1] for name, stored, row in middles}

    def _slices(self) -> Iterator[tuple[str, Any]]:
        """Every tensor, unread; each file is opened once."""
        for file_name in sorted(set(self.files.values())):
            with safe_open(self.path / file_name, framework="numpy") as file:
                present = set(file.keys())
                for name in (n for n, f in self.files.items() if f == file_name and n in present):
                    yield name, file.get_slice(name)


def open_tensors(path: Path) -> TensorFiles:
    """Finds the tensors of a directory: a single file, or shards with an index.

    Raises:
      InputError: there are only pickles, a shard is missing, or a file is damaged.
    """
    if (path / SINGLE).is_file():  # transformers prefers it if both exist
        files = dict.fromkeys(_keys(path / SINGLE), SINGLE)
        if (path / INDEX).is_file():
            logger.warning("%s has both %s and %s: reading the first, as in transformers", path,
                           SINGLE, INDEX)
    elif (path / INDEX).is_file():
        files = read_weight_map(path / INDEX)
    elif any((path / name).is_file() for name in PICKLES):
        raise InputError(convert_hint(str(path), "has a pickle checkpoint", path.name))
    else:
        raise InputError(f"{path} is an incomplete checkpoint: {SINGLE} (or {INDEX}) is missing")
    keys = {file: set(_keys(path / file)) for file in sorted(set(files.values()))}
    if absent := [name for name, file in files.items() if name not in keys[file]]:
        raise InputError(f"{path / INDEX} is damaged: {absent[0]:.80} is missing from "
                         f"{files[absent[0]]}")
    return TensorFiles(path, files)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
      InputError: the index is damaged, or names files that are missing or outside the directory.
    """
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(
            isinstance(x, str) for x in files.values()):
        raise InputError(f"{index} is damaged: weight_map is not a JSON object of file names")
    outside = [file for file in files.values() if not file or Path(file).name != file]
    if outside:
        raise InputError(f"{index} points to {outside[0]!r:.80}, expected names of files in the "
                         "same directory")
    # os.path.isfile accepts invalid names, unlike Path.is_file.
    missing = sorted({x for x in files.values() if not os.path.isfile(index.with_name(x))})
    if missing:
        names = ", ".join(f"{name:.80}" for name in missing)
        raise InputError(f"{index.parent} is an incomplete checkpoint: {names} missing")
    return files


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or truncated{_sizes(file)}: {error}") from None


def _sizes(file: Path) -> str:
    """The actual and expected size of a safetensors file, if its header can be read."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, 100_000_000)))
            ends = [x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError):
            return ""
    expected = 8 + length + max(ends, default=0)
    return f" ({file.stat().st_size:,} bytes, expected {expected:,})"


def load_params(
    path: Path, table: Table, specs: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads a tower's parameters, each shard directly from the file to its devices.

    Host memory holds at most one parameter's shard for one device at a time.

    Args:
      path: the directory.
      table: rows of its family.
      specs: by path in the tree: shape (stacked along blocks), dtype and sharding. Weights in int8
        or int4 have a scale beside them, and are quantised as they are read.

    Raises:
      InputError: tensors are missing, unused, have another shape or NaN; the message lists all.
    """
    tensors = open_tensors(path)
    _check_shapes(path, table, specs, tensors.shapes())
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in specs.values())
    columns = (TextColumn(f"{path.name}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    params = {}
    with Progress(*columns, disable=total < SHOWN_BYTES) as progress:
        task = progress.add_task("", total=total)
        for row in table.rows:
            leaf, scale = specs[row.ours], specs.get(scale_path(row.ours))
            if is_quantised(row.ours) and scale is not None:
                params[row.ours], params[scale_path(row.ours)] = _read_quantised(
                    row, leaf, scale, tensors)
            else:
                params[row.ours] = _read_row(row, leaf, tensors)
            progress.advance(task, math.prod(leaf.shape) * leaf.dtype.itemsize)
    return params


def _read_row(row: Entry, leaf: jax.ShapeDtypeStruct, tensors: TensorFiles) -> jax.Array:
    """One parameter of ours, with its dtype and sharding."""

    def shard(index: Index) -> list[np.ndarray]:
        out = np.empty(_size(index, leaf.shape), leaf.dtype)
        blocks = _blocks(row, leaf.shape, index, tensors)
        for slot, block in zip(out if row.stacked else out[None], blocks, strict=True):
            slot[...] = block
        return [out]

    return _placed([leaf], shard)[0]


def _read_quantised(
    row: Entry, leaf: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct, tensors: TensorFiles
) -> list[jax.Array]:
    """The integers and scales of one parameter. A block is quantised together with all that shares
    its scales, so that every mesh has the same integers."""
    shared = [n != m for n, m in zip(leaf.shape, scale.shape, strict=True)]
    lead = 1 if row.stacked else 0  # the axis of layers, which a block does not have

    def widened(index: Index) -> Index:
        return tuple(slice(None) if s else cut for s, cut in zip(shared, index, strict=True))

    def within(index: Index) -> Index:
        return tuple(cut if s else slice(None) for s, cut in zip(shared, index, strict=True))

    def shard(*indices: Index) -> list[np.ndarray]:
        out = [np.empty(_size(index, x.shape), x.dtype)
               for index, x in zip(indices, (leaf, scale), strict=True)]
        sizes = _size(widened(indices[1]), scale.shape)[lead:]
        blocks = _blocks(row, leaf.shape, widened(indices[0]), tensors)
        for slots, block in zip(zip(*out, strict=True) if row.stacked else [out], blocks,
                                strict=True):
            quantised = quantise(block, sizes, leaf.dtype)
            for slot, new, index in zip(slots, quantised, indices, strict=True):
                slot[...] = new[within(index)[lead:]]
        return out

    return _placed([leaf, scale], shard)


def _blocks(
    row: Entry, shape: tuple[int, ...], index: Index, tensors: TensorFiles
) -> Iterator[np.ndarray]:
    """A block of one parameter, layer by layer; all of it at once if the row is not stacked."""
    transform = TRANSFORMS[row.transform]
    names = [None] * row.first + [next(name for name in options if name in tensors.files)
                                  for options in row.names(shape[0])]
    layers = slice(0, 1)
    if row.stacked:
        layers, index, shape = index[0], index[1:], shape[1:]
    theirs = _at(row, transform.their_index(index, shape), transform.their_shape(shape))
    for name in names[layers]:
        size = _size(index, shape)
        yield np.ones(size) if name is None else transform.to_ours(
            tensors.read(name, theirs), size)


def _size(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a block."""
    return tuple(len(range(*cut.indices(n))) for cut, n in zip(index, shape, strict=True))


def _placed(
    leaves: list[jax.ShapeDtypeStruct], shard: Callable[..., list[np.ndarray]]
) -> list[jax.Array]:
    """Arrays on their devices; `shard(*indices)` makes one block of each.

    Device by device: jax.make_array_from_callback would read the shards of all devices first.
    """
    places = [leaf.sharding.addressable_devices_indices_map(leaf.shape) for leaf in leaves]
    arrays, last, blocks = [[] for _ in leaves], None, []
    for device in sorted(places[0], key=lambda x: str([place[x] for place in places])):
        indices = [place[device] for place in places]
        if str(indices) != last:  # read a block once for all devices that hold it
            last, blocks = str(indices), shard(*indices)
        for made, block in zip(arrays, blocks, strict=True):
            made.append(jax.device_put(block, device))
    return [jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, made)
            for leaf, made in zip(leaves, arrays, strict=True)]


def _at(row: Entry, index: Index, shape: tuple[int, ...]) -> Index:
    """The index with explicit bounds, relative to the full tensor if the row is a part."""
    bounds = [cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True)]
    if row.part is not None:
        bounds[0] = tuple(row.part[0] + bound for bound in bounds[0])
    return tuple(slice(*bound) for bound in bounds)


def _check_shapes(path: Path, table: Table, specs: dict[str, Any], shapes: dict[str, Any]) -> None:
    """Raises InputError with all missing, unused and mis-shaped tensors; each leaf needs a row."""
    if {row.ours for row in table.rows} != specs.keys() - scales_of(specs):
        raise AssertionError("the table and the parameter tree disagree")
    problems, used = {"missing": [], "mis-shaped": [], "unused": []}, set()
    for row in table.rows:
        shape = specs[row.ours].shape
        layers, shape = (shape[0], shape[1:]) if row.stacked else (1, shape)
        theirs = tuple(TRANSFORMS[row.transform].their_shape(shape))
        if row.part is not None:
            theirs = (row.part[2], *theirs[1:])
        for names in row.names(layers):
            present = [name for name in names if name in shapes]
            used.update(present)
            if not present and names[0] not in problems["missing"]:
                problems["missing"].append(names[0])
            problems["mis-shaped"] += [
                f"{name} is {list(shapes[name])}, expected {list(theirs)}"
                for name in present  # reported once, for the first of several parts
                if shapes[name] != theirs and (row.part is None or row.part[0] == 0)
            ]
    problems["unused"] = sorted(
        name for name in shapes if name not in used and not table.ignores(name)
    )
    if any(problems.values()):
        lines = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        raise InputError(f"{path} does not match its config.json; {'; '.join(lines)}")
