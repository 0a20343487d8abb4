"""Converts a pickle checkpoint or a GGUF file: `python -m jaxfusion.hf.convert SRC OUT`.

SRC is a directory with `pytorch_model.bin` (or shards and an index), a hub id, or a GGUF file of an
LLM. Needs the extra `convert` (PyTorch, gguf). Tensors are unpickled with `weights_only=True`, one
shard at a time, memory-mapped if the file format allows it.
"""

import argparse
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

from jaxfusion.errors import InputError, first_line
from jaxfusion.files import new_directory
from jaxfusion.hf.gguf import DTYPES, convert_gguf, is_gguf
from jaxfusion.hf.hub import NOT_WEIGHTS, find_files
from jaxfusion.hf.load import INDEX, PICKLES, SINGLE, read_weight_map


def convert(
    source: str, out: Path, revision: str | None = None, dtype: str | None = None
) -> None:
    """Writes the checkpoint `source` as safetensors to the new directory `out`.

    Args:
      dtype: of a GGUF file's tensors; None keeps every value.

    Raises:
      InputError: no pickle, a shard that is missing or unreadable, or `out` is not empty; for a
        GGUF file as in `convert_gguf`.
    """
    if is_gguf(Path(source).expanduser()):
        return convert_gguf(Path(source).expanduser(), out, dtype)
    if dtype is not None:
        raise InputError(f"--dtype is for GGUF files; {source} keeps the dtypes of its pickles")
    path = find_files(source, [*NOT_WEIGHTS, "pytorch_model*"], revision)
    shards = _shards(path)
    with new_directory(Path(out)) as partial:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards):
            numbered = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE if len(shards) == 1 else numbered
            names = _convert_shard(path / shard, partial / file)
            weight_map |= dict.fromkeys(names, file)
            print(f"{shard} -> {file}: {len(names)} tensors", flush=True)
        if len(shards) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
        for pattern in NOT_WEIGHTS:
            for file in path.glob(pattern):
                shutil.copyfile(file, partial / file.name)


def _shards(path: Path) -> list[str]:
    single, index = PICKLES
    if (path / index).is_file():
        shards = sorted(set(read_weight_map(path / index).values()))
    elif (path / single).is_file():
        shards = [single]
    elif files := sorted(path.glob("*.gguf")):
        raise InputError(f"{path} has neither {single} nor {index}, but GGUF files: give one of "
                         f"them, such as {files[0]}")
    else:
        raise InputError(f"{path} has neither {single} nor {index}: nothing to convert")
    return shards


def _convert_shard(source: Path, out: Path) -> list[str]:
    """Writes one shard and returns its tensors' names; aliases of a tensor are written once."""
    import torch
    from safetensors.torch import save_file

    tensors = _unpickle(source)
    unique: dict[str, torch.Tensor] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        storage = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if storage in seen:
            print(f"{name} is the same tensor as {seen[storage]}: skipped", flush=True)
            continue
        seen[storage] = name
        unique[name] = tensor.contiguous().clone()
    save_file(unique, out, metadata={"format": "pt"})
    return list(unique)


def _unpickle(source: Path) -> dict[str, Any]:
    """Tensors by name. A training checkpoint may nest them in a dictionary, as MindMerger's does in
    `model_state_dict`."""
    import torch

    load = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            content = torch.load(source, mmap=True, **load)
        except RuntimeError:  # written before PyTorch 1.6: a format that cannot be mapped
            content = torch.load(source, **load)
    except pickle.UnpicklingError:  # PyTorch's own message suggests loading it unsafely
        raise InputError(f"{source} cannot be read: it is damaged, or has more than tensors, which "
                         "could run code; use safetensors, or the state dict alone") from None
    except Exception as error:
        raise InputError(f"{source} cannot be read: {first_line(error)}") from None
    nested = [x for x in content.values() if _are_tensors(x)] if isinstance(content, dict) else []
    if len(nested) == 1 and not _are_tensors(content):
        content = nested[0]
    if not _are_tensors(content):
        raise InputError(f"{source} has a {type(content).__name__} without named tensors; expected "
                         "a state dict, alone or as the only one in a dictionary")
    return content


def _are_tensors(value: Any) -> bool:
    import torch

    return isinstance(value, dict) and bool(value) and all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in value.items())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SRC", help="directory, hub id or GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of a GGUF file's tensors (default: "
                        "what keeps every value; quantised ones become float32)")
    args = parser.parse_args()
    try:
        convert(args.source, args.out, args.revision, args.dtype)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install 'jaxfusion[convert]'")


if __name__ == "__main__":
    main()
