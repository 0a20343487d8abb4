"""The metadata of a GGUF file → our tower config."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxfusion.errors import InputError
from jaxfusion.hf.decoders import PERIODS, decoder_config, decoder_json
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.rope import LinearScaling, Llama3Scaling, LongScaling, Rope

# GGUF's architecture -> family. Mistral's files say llama.
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
            "gemma3": "gemma3_text", "phi3": "phi3"}
# The largest model of each generation scales its scores by another width, which no field says.
# llama.cpp knows it by its number of layers, too.
GEMMA_LAYERS = {"gemma2": (26, 42, 46), "gemma3_text": (18, 26, 34, 48, 62)}
# Factors of RoPE's frequencies, which converters store as tensors.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
SCALES = ("logit_scale", "residual_scale", "embedding_scale",
          "attention.clamp_kqv", "attention.max_alibi_bias", "expert_count")
LLAMA3_LENGTH = 8192  # every published Llama 3 was trained on it before its frequencies changed
_REQUIRED = object()


@dataclass
class Metadata:
    """The fields of a GGUF file; notes which of them were read."""

    file: Path
    fields: dict[str, Any]
    used: set[str] = field(default_factory=set)

    @property
    def architecture(self) -> str:
        """GGUF's name of the family."""
        return self.get("general.architecture", str)

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A field, checked for its type.

        Raises:
          InputError: it is missing and has no default, or has another type.
        """
        self.used.add(key)
        value = self.fields.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            problem = "is missing" if value is None else f"is {value!r:.80}"
            raise InputError(f"{self.file}: {key} {problem}, expected {kind.__name__}")
        # A float32's shortest decimal: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind is float else value

    def of_model(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A field of the architecture, as in `get`."""
        return self.get(f"{self.architecture}.{key}", kind, default)

    def unused(self) -> list[str]:
        """The fields of the architecture that nothing read."""
        return sorted(key for key in self.fields
                      if key.startswith(f"{self.architecture}.") and key not in self.used)


def gguf_decoder(
    meta: Metadata, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> tuple[DecoderConfig, list[str]]:
    """The shape of the LLM in a GGUF file, and remarks on what the file does not say.

    Args:
      shapes: of its tensors, as in PyTorch. read: gives one of `ROPE_TENSORS`.

    Raises:
      InputError: a field is missing or out of range, or a feature is not supported.
    """
    family, width = FAMILIES[meta.architecture], meta.of_model("embedding_length", int)
    layers, heads = meta.of_model("block_count", int), meta.of_model("attention.head_count", int)
    if min(width, layers, heads) < 1:
        raise InputError(f"{meta.file}: {layers} blocks of width {width} with {heads} heads, "
                         "expected 1 or more of each")
    head_dim = _head_dim(meta, width, heads)
    windows = _windows(meta, family, layers)
    _check_features(meta, head_dim)
    if windows and family == "llama":
        family = "mistral"  # the same layers with a window
    if "token_embd.weight" not in shapes:
        raise InputError(f"{meta.file} has no token_embd.weight, the table of embeddings")
    features, remarks = (_gemma(meta, family, layers, width, heads, head_dim)
                         if family in PERIODS else ({}, []))
    config = DecoderConfig(
        vocab_size=shapes["token_embd.weight"][0], d_model=width,
        d_ff=meta.of_model("feed_forward_length", int), num_layers=layers, num_heads=heads,
        num_kv_heads=meta.of_model("attention.head_count_kv", int, heads), head_dim=head_dim,
        norm_eps=meta.of_model("attention.layer_norm_rms_epsilon", float),
        rope=_rope(meta, family, head_dim, shapes, read),
        tie_embeddings="output.weight" not in shapes, family=family,
        max_length=meta.of_model("context_length", int), qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3_text"), windows=windows, **features)
    meta.of_model("vocab_size", int, None)  # the table's rows count
    checked = decoder_config(decoder_json(config), str(meta.file))
    if checked != config:
        raise AssertionError(f"config.json changes {config} to {checked}")
    return config, remarks + _unsaid(meta, config)


def _head_dim(meta: Metadata, width: int, heads: int) -> int:
    size = meta.of_model("attention.key_length", int, width // heads)
    values = meta.of_model("attention.value_length", int, size)
    if values != size or size < 1:
        raise InputError(f"{meta.file}: keys have {size} dimensions and values {values}, which is "
                         "not supported")
    return size


def _check_features(meta: Metadata, head_dim: int) -> None:
    """Raises InputError for a feature that other models of the same architecture have."""
    if not meta.of_model("attention.causal", bool, True):
        raise InputError(f"{meta.file}: its attention is not causal: it is an encoder")
    scale, usual = meta.of_model("attention.scale", float, 0.0), head_dim**-0.5
    if scale and not math.isclose(scale, usual, rel_tol=1e-4):
        raise InputError(f"{meta.file}: {meta.architecture}.attention.scale is {scale:g}, expected "
                         f"{usual:g}")
    for key in SCALES:
        if (value := meta.of_model(key, float, 0.0)) not in (0, 1):
            raise InputError(f"{meta.file}: {meta.architecture}.{key} is {value:g}, which is not "
                             "supported")


def _unsaid(meta: Metadata, config: DecoderConfig) -> list[str]:
    """What old files do not say, and what is taken instead."""
    remarks = []
    name = meta.get("general.name", str, "").lower()
    if config.family == "llama" and "mistral" in name:
        remarks.append("GGUF does not say whether a Mistral has a window (7B v0.1 has one of 4,096 "
                       "tokens): taking none")
    if config.family == "phi3" and "phi3.attention.sliding_window" not in meta.fields:
        remarks.append("the file does not say whether attention has a window: taking none")
    if meta.architecture == "llama" and config.rope == Rope(5e5) and config.max_length == 131_072:
        remarks.append("the file looks like Llama 3.1 or later but has no rope_freqs.weight, like "
                       "the first conversions: its frequencies are not those of the original")
    return remarks


def _windows(meta: Metadata, family: str, layers: int) -> tuple[int | None, ...]:
    # Gemma's first files do not say it.
    usual = {"gemma2": 4096, "gemma3_text": _REQUIRED}.get(family, 0)
    window = meta.of_model("attention.sliding_window", int, usual)
    if not window:
        return ()
    if family in ("qwen2", "qwen3"):
        raise InputError(f"{meta.file}: {meta.architecture}.attention.sliding_window is {window}, "
                         "but GGUF does not say which layers of a Qwen have a window")
    key = "attention.sliding_window_pattern"
    if isinstance(meta.fields.get(f"{meta.architecture}.{key}"), list):
        local = meta.of_model(key, list)
        if len(local) != layers:
            raise InputError(f"{meta.file}: {meta.architecture}.{key} has {len(local)} entries, "
                             f"expected {layers}")
    else:
        period = meta.of_model(key, int, PERIODS.get(family, 0))
        local = [not period or (i + 1) % period != 0 for i in range(layers)]
    return tuple(window if x else None for x in local) if any(local) else ()


def _gemma(
    meta: Metadata, family: str, layers: int, width: int, heads: int, head_dim: int
) -> tuple[dict[str, Any], list[str]]:
    """What only Gemma 2 and 3 have."""
    second, remarks = family == "gemma2", []
    largest = layers == GEMMA_LAYERS[family][-1]
    scaled_by = width // heads if largest else head_dim
    if layers not in GEMMA_LAYERS[family]:
        remarks.append(f"GGUF does not say by what Gemma's attention scores are scaled, and no "
                       f"published Gemma has {layers} layers: taking head_dim, {head_dim}")
    features = {
        "activation": "gelu_tanh", "embed_scale": width**0.5, "norm_offset": 1.0,
        "post_norms": True, "attn_scale": scaled_by**-0.5,
        "attn_cap": meta.of_model("attn_logit_softcapping", float, 50.0 if second else None),
        "logit_cap": meta.of_model("final_logit_softcapping", float, 30.0 if second else None),
    }
    if not second:
        features["local_rope"] = Rope(meta.of_model("rope.freq_base_swa", float, 10_000.0))
    return features, remarks


def _rope(meta: Metadata, family: str, head_dim: int, shapes, read) -> Rope:
    default = 1_000_000.0 if family == "gemma3_text" else 10_000.0
    theta = meta.of_model("rope.freq_base", float, default)
    rotated = meta.of_model("rope.dimension_count", int, head_dim)
    if rotated != head_dim and family != "phi3":
        raise InputError(f"{meta.file}: {rotated} of {head_dim} dimensions of a head are rotated, "
                         f"which is not supported for {family}")
    kind = meta.of_model("rope.scaling.type", str, None)
    factor = meta.of_model("rope.scaling.factor", float,
                           meta.of_model("rope.scale_linear", float, 1.0))
    present = [name for name in ROPE_TENSORS if name in shapes]
    if kind not in (None, "none", "linear", "longrope"):
        raise InputError(f"{meta.file}: RoPE scaling {kind!r:.80} is not supported; known: none, "
                         "linear, longrope, and Llama 3's")
    if family == "phi3" and {*ROPE_TENSORS[1:]} <= set(present):
        scaling = _long_scaling(meta, read)
    elif family in ("llama", "mistral") and present == ["rope_freqs.weight"]:
        scaling = _llama3_scaling(meta, theta, rotated, read("rope_freqs.weight"))
    elif present or kind == "longrope":
        raise InputError(f"{meta.file}: {' and '.join(present) or 'longrope without its factors'} "
                         f"for {family}, which is not supported")
    else:
        scaling = LinearScaling(factor) if factor != 1 and kind != "none" else None
    return Rope(theta, scaling, rotated / head_dim)


def _long_scaling(meta: Metadata, read) -> LongScaling:
    """Phi-3's LongRoPE, whose divisors are tensors."""
    short, long = (tuple(float(str(x)) for x in read(name)) for name in ROPE_TENSORS[1:])
    original = meta.of_model("rope.scaling.original_context_length", int)
    stretch = meta.of_model("context_length", int) / max(original, 1)
    usual = (math.sqrt(1 + math.log(stretch) / math.log(original))
             if stretch > 1 and original > 1 else 1.0)
    magnitude = meta.of_model("rope.scaling.attn_factor", float, usual)
    return LongScaling(short, long, original,
                       usual if math.isclose(magnitude, usual, rel_tol=1e-6) else magnitude)


def _llama3_scaling(
    meta: Metadata, theta: float, rotated: int, divisors: np.ndarray
) -> Llama3Scaling | None:
    """The settings of Llama 3.1 and later that give these divisors of the frequencies.

    GGUF has the divisors but not the settings. Published models differ in the factor alone, which
    is the largest divisor.

    Raises:
      InputError: those settings give other divisors.
    """
    factor = float(divisors.max())
    if factor == 1:
        return None
    length = meta.of_model("rope.scaling.original_context_length", int, LLAMA3_LENGTH)
    scaling = Llama3Scaling(factor, 1.0, 4.0, length)
    frequencies = theta ** -(np.arange(0, rotated, 2) / rotated)
    turns = length * frequencies / (2 * math.pi)
    kept = np.clip((turns - scaling.low_freq_factor)
                   / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{meta.file}: rope_freqs.weight does not have the frequencies of Llama 3 "
                         f"with factor {factor:g}; other changes of them are not supported")
    return scaling
