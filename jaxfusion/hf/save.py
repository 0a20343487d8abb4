"""Parameter trees → Hugging Face directories."""

import json
import shutil
from collections.abc import Container, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxfusion.errors import InputError
from jaxfusion.hf.decoders import decoder_json
from jaxfusion.hf.encoders import encoder_json
from jaxfusion.hf.load import INDEX, SINGLE, open_tensors
from jaxfusion.hf.tables import TRANSFORMS, Table, tower_table
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.encoder import EncoderConfig

SHARD_BYTES = 5_000_000_000


def to_tensors(rows: Table, params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The Hugging Face tensors of a parameter tree, by name."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for theirs, parts in groupby(rows.rows, key=lambda row: row.theirs):
        parts = list(parts)
        arrays = [np.asarray(flat[row.ours]) for row in parts]
        to_theirs = TRANSFORMS[parts[0].transform].to_theirs
        if not parts[0].stacked:
            yield theirs, to_theirs(arrays[0])
            continue
        for i, layers in enumerate(zip(*arrays, strict=True)):
            if i < parts[0].first:
                continue
            tensors = [to_theirs(layer) for layer in layers]
            yield theirs.format(i=i), tensors[0] if len(parts) == 1 else np.concatenate(tensors)


def write_tower(
    out: Path, config: EncoderConfig | DecoderConfig, params: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `config.json` and the weights of one tower into an existing directory."""
    to_json = encoder_json if isinstance(config, EncoderConfig) else decoder_json
    (out / "config.json").write_text(json.dumps(to_json(config), indent=2), "utf-8")
    write_shards(out, to_tensors(tower_table(config), params), shard_bytes)


def usual_names(rows: Table, layers: int) -> dict[str, tuple[str, ...]]:
    """The tensors of a tower: usual name -> all possible names."""
    return {names[0]: names for row in rows.rows for names in row.names(layers)}


def tower_names(rows: Table, layers: int, files: Container[str]) -> dict[str, str]:
    """The tensors of a tower: usual name -> name in `files`.

    Raises:
      InputError: tensors are missing; the message lists all.
    """
    usual = usual_names(rows, layers)
    stored = {name: next((x for x in names if x in files), None) for name, names in usual.items()}
    if missing := [name for name, stored_name in stored.items() if stored_name is None]:
        raise InputError(f"tensors are missing: {', '.join(missing)}")
    return stored


def tower_tensors(
    source: Path, names: dict[str, str], replaced: dict[str, np.ndarray], dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one tower of a checkpoint, one by one.

    Args:
      names: its tensors: usual name -> name in `source`.
      replaced: tensors to use instead of the source's, in the source's dtype.
      dtype: of all tensors; None keeps the dtype of each.
    """
    files = open_tensors(source)
    for name, stored_name in names.items():
        tensor = files.read(stored_name)
        new_dtype = jnp.dtype(dtype) if dtype else tensor.dtype
        yield name, replaced.get(name, tensor).astype(new_dtype, copy=False)


def copy_tower(
    source: Path, out: Path, config: dict[str, Any], names: dict[str, str],
    replaced: dict[str, np.ndarray], dtype: str | None,
) -> None:
    """Writes one tower of a checkpoint to its own directory; see `tower_tensors`.

    Args:
      config: its `config.json`.
    """
    out.mkdir(exist_ok=True)
    write_shards(out, tower_tensors(source, names, replaced, dtype))
    # Where some releases of transformers noted the directory that the model was loaded from.
    config = {name: x for name, x in config.items() if name != "_name_or_path"}
    if dtype is not None:
        config |= {"torch_dtype": dtype, "dtype": dtype}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")


def write_tokenizer(out: Path, tokenizer) -> None:
    """Writes a tokenizer that transformers 4 and 5 read alike; exports have the same function."""
    from jaxfusion.hf import tokenization_jaxfusion  # imports transformers, which takes seconds

    tokenization_jaxfusion.write_tokenizer(out, tokenizer)


def write_shards(
    out: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors as `model.safetensors`, or as shards with an index if they are too large."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        # Contiguous on purpose: `save_file` writes a transposed array's buffer in memory order.
        arrays = {name: np.asarray(array, order="C") for name, array in pending.items()}
        try:
            save_file(arrays, out / f"shard-{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:  # for example, a full disk
            raise InputError(f"{out} cannot be written: {error}") from None
        shards.append(list(pending))
        pending.clear()

    for name, array in tensors:
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > shard_bytes:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (out / "shard-0").rename(out / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"shard-{i}").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
