"""GGUF files → Hugging Face directories.

The `gguf` package reads the file, restores quantised blocks and knows the names of tensors, which
go to disk one shard at a time.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxfusion.errors import InputError, first_line, listed
from jaxfusion.files import new_directory
from jaxfusion.hf.decoders import decoder_json
from jaxfusion.hf.gguf_config import FAMILIES, ROPE_TENSORS, Metadata, gguf_decoder
from jaxfusion.hf.gguf_tokenizer import end_tokens, gguf_tokenizer
from jaxfusion.hf.save import write_shards, write_tokenizer
from jaxfusion.hf.tables import TRANSFORMS, tower_table
from jaxfusion.nn.decoder import Decoder, DecoderConfig

MAGIC = b"GGUF"
ENCODERS = ("t5", "t5encoder", "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "neo-bert",
            "modern-bert", "eurobert", "gemma-embedding")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# The dtypes of files that quantise nothing; all others are restored to float32.
STORED = {"F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 2_000_000_000


def is_gguf(file: Path) -> bool:
    """Whether a path names a GGUF file, or a file with its magic bytes."""
    if not file.is_file():
        return file.suffix.lower() == ".gguf" and not file.is_dir()
    if file.suffix.lower() == ".gguf":
        return True
    with file.open("rb") as opened:
        return opened.read(4) == MAGIC


def convert_gguf(
    file: Path, out: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the LLM in a GGUF file as a checkpoint to the new directory `out`.

    Args:
      dtype: of all tensors. None loses nothing: float16 and bfloat16 stay, the rest is float32.

    Raises:
      InputError: not a GGUF file, a damaged one, an unsupported model, or `out` is not empty.
    """
    meta, tensors = _read(file)
    _check_kind(meta)
    shapes = {name: tuple(int(n) for n in reversed(x.shape)) for name, x in tensors.items()}
    config, remarks = gguf_decoder(meta, shapes, lambda name: _values(meta.file, tensors[name]))
    names = _match(meta, config, shapes)
    tokenizer, more = gguf_tokenizer(meta, config.vocab_size)
    used = [tensors[name] for name in names.values()]
    for tensor in {x.tensor_type: x for x in used}.values():  # an unknown type fails at once
        _values(meta.file, tensor._replace(data=tensor.data[:1]))
    kept, rounded = _dtypes(used, dtype), []
    with new_directory(Path(out)) as partial:
        restored = _restore(meta, config, {x: tensors[name] for x, name in names.items()}, dtype,
                            rounded)
        write_shards(partial, restored, shard_bytes)
        _write_configs(partial, config, tokenizer, kept.most_common(1)[0][0], end_tokens(meta))
        write_tokenizer(partial, tokenizer)
    for line in _report(used, dtype, rounded, remarks + more, meta.unused()):
        print(line, flush=True)


def _read(file: Path) -> tuple[Metadata, dict[str, Any]]:
    """A file's metadata, and its tensors by GGUF's name, mapped to memory."""
    from gguf import GGUFEndian, GGUFReader

    if not file.is_file():
        raise InputError(f"{file} is not a file")
    with file.open("rb") as opened:
        if (start := opened.read(4)) != MAGIC:
            raise InputError(f"{file} is not a GGUF file: it begins with {start!r}, expected "
                             f"{MAGIC!r}")
    try:
        reader = GGUFReader(file)
        fields = {key: x.contents() for key, x in reader.fields.items()}
    except Exception as error:  # whatever the reader stumbles over
        size = f"{file.stat().st_size:,} bytes"
        raise InputError(f"{file} cannot be read: it is damaged, truncated ({size}) or of an "
                         f"unknown version or type: {first_line(error)}") from None
    if reader.endianess != GGUFEndian.LITTLE:  # dequantize would give other numbers
        raise InputError(f"{file} is a big-endian GGUF file, which is not supported")
    return Metadata(file, fields), {x.name: x for x in reader.tensors}


def _check_kind(meta: Metadata) -> None:
    """Raises InputError unless the file is a whole decoder of a known family."""
    known = f"known: {', '.join(FAMILIES)} (Mistral's files say llama)"
    family, kind = meta.architecture, meta.get("general.type", str, "model")
    if kind != "model":
        raise InputError(f"{meta.file} holds no model but a part of one: {kind!r:.80}")
    if family in ENCODERS:
        raise InputError(f"{meta.file} is an encoder ({family}); only decoders are read from GGUF "
                         f"files, {known}")
    if family not in FAMILIES:
        raise InputError(f"{meta.file}: architecture {family!r:.80} is not supported; {known}")
    if (parts := meta.get("split.count", int, 1)) > 1:
        raise InputError(f"{meta.file} is one of {parts} parts; merge them with llama.cpp's "
                         "`llama-gguf-split --merge FIRST_PART OUT.gguf`")


def _match(
    meta: Metadata, config: DecoderConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """GGUF's name of each of the model's tensors.

    Raises:
      InputError: tensors are missing, unused or have another shape; the message lists all.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == meta.architecture)
    theirs = get_tensor_name_map(number, config.num_layers)
    expected = _shapes(config)
    names = {name: theirs.get_name(name, (".weight", ".bias")) or name for name in expected}
    problems = {
        "missing": [x for x in names.values() if x not in shapes],
        "unused": sorted(set(shapes) - {*names.values(), *ROPE_TENSORS}),
        "mis-shaped": [f"{x} is {list(shapes[x])}, expected {list(expected[name])}"
                       for name, x in names.items() if x in shapes and shapes[x] != expected[name]],
    }
    if any(problems.values()):
        lines = [f"{kind}: {listed(x)}" for kind, x in problems.items() if x]
        raise InputError(f"{meta.file}: its tensors are not those of {config.family} with its "
                         f"metadata; {'; '.join(lines)}")
    return names


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder's Hugging Face tensors."""
    def init():
        tokens = jnp.zeros((1, 2), jnp.int32)
        return Decoder(config).init(jax.random.key(0), tokens, tokens, tokens, method="score")

    specs = traverse_util.flatten_dict(nn.unbox(jax.eval_shape(init)["params"]), sep="/")
    shapes = {}
    for row in tower_table(config).rows:
        shape = specs[row.ours].shape
        shape = TRANSFORMS[row.transform].their_shape(shape[1:] if row.stacked else shape)
        if row.part is not None:
            shape = (row.part[2], *shape[1:])
        for i in range(config.num_layers if row.stacked else 1):
            shapes[row.theirs.format(i=i)] = tuple(shape)
    return shapes


def _dtypes(tensors: list[Any], dtype: str | None) -> Counter[str]:
    """How many numbers are written in which dtype."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[_dtype_of(tensor, dtype)] += tensor.n_elements
    return sizes


def _dtype_of(tensor: Any, dtype: str | None) -> str:
    """The dtype asked for, or the one that keeps every value."""
    return dtype or STORED.get(tensor.tensor_type.name, "float32")


def _restore(
    meta: Metadata, config: DecoderConfig, tensors: dict[str, Any], dtype: str | None,
    rounded: list[str],
) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors one by one; adds the names of those that `dtype` changes to `rounded`."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, tensor in tensors.items():
        values, projection = _values(meta.file, tensor), name.split(".")[-2]
        if meta.architecture == "llama" and projection in heads:
            values = _halves(values, heads[projection])
        if config.norm_offset and projection.endswith("norm"):
            values = values - np.float32(config.norm_offset)  # GGUF adds it
        stored = values.astype(DTYPES[_dtype_of(tensor, dtype)], copy=False)
        if stored.dtype != np.float32 and not np.array_equal(stored.astype(np.float32), values):
            rounded.append(name)
            if not np.isfinite(stored.astype(np.float32)).all():
                raise InputError(f"{meta.file}: {tensor.name} has values beyond {dtype}; use "
                                 "--dtype bfloat16 or float32")
        yield name, stored


def _values(file: Path, tensor: Any) -> np.ndarray:
    """A tensor's values in float32."""
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except Exception as error:  # the package raises no class of its own
        kind = tensor.tensor_type.name
        raise InputError(f"{file}: {tensor.name} has type {kind}, which cannot be read: "
                         f"{first_line(error)}") from None
    if values.dtype != np.float32 or not np.isfinite(values).all():
        raise InputError(f"{file}: {tensor.name} has NaN or infinity; the file is damaged")
    return values


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in the order of Hugging Face.

    RoPE turns two dimensions of a head together: neighbours in llama.cpp's Llama, one of each half
    in Hugging Face's.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_configs(
    out: Path, config: DecoderConfig, tokenizer: Any, dtype: str, ends: list[int]
) -> None:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    content = {**decoder_json(config), **ids, "torch_dtype": dtype, "dtype": dtype}
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    ends = ends or [tokenizer.eos_token_id]
    ids = {**ids, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    (out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", "utf-8")


def _report(
    tensors: list[Any], dtype: str | None, rounded: list[str], remarks: list[str], unused: list[str]
) -> Iterator[str]:
    """What was written, what of the original is lost, and what the file left open."""
    kinds = Counter(x.tensor_type.name for x in tensors)
    quantised = {kind: n for kind, n in kinds.items() if kind not in (*STORED, "F32")}
    if quantised:
        what = ", ".join(f"{n} {kind}" for kind, n in sorted(quantised.items()))
        yield (f"{sum(quantised.values())} of {len(tensors)} tensors were quantised ({what}): "
               "values are those of the file, not the original's")
    written = Counter(_dtype_of(x, dtype) for x in tensors)
    half = "; --dtype bfloat16 halves the size and rounds" if quantised and dtype is None else ""
    yield (f"{len(tensors)} tensors are written: "
           f"{', '.join(f'{n} {name}' for name, n in written.most_common())}; "
           + (f"{len(rounded)} were rounded" if rounded else f"every value is kept{half}"))
    yield from remarks
    if unused:
        yield f"fields of the file that were not used: {listed(unused)}"
