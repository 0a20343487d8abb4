"""An LLM's `config.json` → our config and back, in the spelling of transformers 4 or 5."""

import math
from typing import Any

from jaxfusion.errors import InputError
from jaxfusion.hf.json_fields import (
    check_family,
    check_shape,
    chosen,
    count,
    flag,
    group,
    local_layers,
    number,
    required_count,
)
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.rope import LinearScaling, Llama3Scaling, LongScaling, Rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
}
# transformers' defaults for fields missing from config.json; in other families the number of kv
# heads defaults to the number of heads.
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16, "gemma2": 4, "gemma3_text": 4}
HEAD_DIMS = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
WINDOWS = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096, "gemma2": 4096, "gemma3_text": 4096}
PERIODS = {"gemma2": 2, "gemma3_text": 6}  # one of this many layers has no window


def decoder_config(json: dict[str, Any], where: str) -> DecoderConfig:
    """The shape and features of an LLM, with its family's defaults in transformers.

    Raises:
      InputError: unsupported family or feature, or a field that is missing, has the wrong type or
        is out of range.
    """
    check_family(json, "decoder", where)
    shape = _decoder_config(json, where)
    check_shape(shape, where, shape.num_kv_heads)
    _check_rope(shape, where)
    return shape


def _check_rope(shape: DecoderConfig, where: str) -> None:
    if shape.head_dim % 2 or not shape.head_dim:
        raise InputError(f"{where}: head_dim is {shape.head_dim}, expected an even number, since "
                         "rotary embeddings rotate pairs")
    for rope in filter(None, (shape.rope, shape.local_rope)):
        rotated = int(shape.head_dim * rope.partial)
        if rotated % 2 or not rotated:
            raise InputError(f"{where}: partial_rotary_factor {rope.partial} rotates {rotated} of "
                             f"head_dim {shape.head_dim}, expected an even number above 0")
        if isinstance(rope.scaling, LongScaling):
            lengths = {len(rope.scaling.short), len(rope.scaling.long)}
            if lengths != {rotated // 2}:
                raise InputError(f"{where}: short_factor and long_factor have "
                                 f"{' and '.join(map(str, sorted(lengths)))} numbers, expected "
                                 f"{rotated // 2}: one for each rotated pair")


def _decoder_config(json: dict[str, Any], where: str) -> DecoderConfig:
    family = json["model_type"]
    for feature in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if flag(json, feature, where):
            raise InputError(f"{where}: {feature} is true, which is not supported for {family}")
    heads = required_count(json, "num_attention_heads", where)
    width = required_count(json, "hidden_size", where)
    layers = required_count(json, "num_hidden_layers", where)
    gemma = family.startswith("gemma")
    rope, local_rope = _ropes(json, where)
    return DecoderConfig(
        vocab_size=required_count(json, "vocab_size", where),
        d_model=width,
        d_ff=required_count(json, "intermediate_size", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=count(json, "num_key_value_heads", None if "num_key_value_heads" in json
                            else KV_HEADS.get(family), where) or heads,
        head_dim=count(json, "head_dim", HEAD_DIMS.get(family), where) or width // heads,
        norm_eps=number(json, "rms_norm_eps", where, 1e-5 if family == "phi3" else 1e-6),
        rope=rope,
        tie_embeddings=flag(json, "tie_word_embeddings", where, gemma),
        family=family,
        max_length=count(json, "max_position_embeddings", 131_072, where),
        activation=_activation(json, where),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3_text"),
        windows=_windows(json, layers, where),
        local_rope=local_rope,
        **(_gemma_features(json, family, width, where) if gemma else {}),
    )


def _activation(json: dict[str, Any], where: str) -> str:
    """Gemma 1 reads `hidden_act`, 2 and 3 read `hidden_activation`, in transformers 4 and 5."""
    family = json["model_type"]
    if family.startswith("gemma"):
        field, names = "hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
        if family == "gemma":  # its first configs say gelu but mean the tanh form
            field, names = "hidden_act", dict.fromkeys(names, "gelu_tanh")
    else:
        field, names = "hidden_act", {"silu": "silu"}
    return chosen(json, field, names, where)


def _cap(json: dict[str, Any], name: str, default: float, where: str) -> float | None:
    """A soft cap of logits: Gemma 2 has one by default, Gemma 3 does not."""
    if name not in json and json["model_type"] == "gemma2":
        return default
    return None if json.get(name) is None else number(json, name, where)


def _gemma_features(json: dict[str, Any], family: str, width: int, where: str) -> dict[str, Any]:
    features = {"embed_scale": width**0.5, "norm_offset": 1.0}
    if family == "gemma":
        return features
    return {
        **features, "post_norms": True,
        "attn_scale": count(json, "query_pre_attn_scalar", 256, where) ** -0.5,
        "attn_cap": _cap(json, "attn_logit_softcapping", 50.0, where),
        "logit_cap": _cap(json, "final_logit_softcapping", 30.0, where),
    }


def _windows(json: dict[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    """The attention window of each layer; empty if no layer has one."""
    family = json["model_type"]
    window = count(json, "sliding_window", None if "sliding_window" in json
                    else WINDOWS.get(family), where)
    if family in ("qwen2", "qwen3") and not flag(
            json, "use_sliding_window", where):
        window = None
    if window is None or family not in ("mistral", "phi3", *PERIODS, "qwen2", "qwen3"):
        return ()
    local = local_layers(json, layers, where) or _local_by_family(json, layers, where)
    return tuple(window if is_local else None for is_local in local) if any(local) else ()


def _local_by_family(json: dict[str, Any], layers: int, where: str) -> list[bool]:
    """Which layers have a window, where `layer_types` does not say."""
    family = json["model_type"]
    if family in PERIODS:
        period = count(json, "sliding_window_pattern", PERIODS[family], where)
        return [(i + 1) % period != 0 for i in range(layers)]
    if family in ("qwen2", "qwen3"):
        first = count(json, "max_window_layers", 28, where, least=0)
        return [i >= first for i in range(layers)]
    return [True] * layers


def decoder_json(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of an LLM for transformers 4 and 5; the inverse of `decoder_config`."""
    family = config.family
    json = {
        "model_type": family, "architectures": [ARCHITECTURES[family]],
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "intermediate_size": config.d_ff, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps, "attention_bias": False,
        "max_position_embeddings": config.max_length, "rope_theta": config.rope.theta,
        "rope_scaling": _scaling_json(config), "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": None,  # a family's default may be outside the vocabulary
    }
    window = next((w for w in config.windows if w), None)
    if family == "llama":
        json["mlp_bias"] = False
    else:
        json["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        json["use_sliding_window"] = window is not None
        # Without layer_types, windows begin at this layer.
        json["max_window_layers"] = sum(w is None for w in config.windows)
    if family == "phi3":
        json["partial_rotary_factor"] = config.rope.partial
        if isinstance(config.rope.scaling, LongScaling):
            json["original_max_position_embeddings"] = config.rope.scaling.original_length
    act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    json["hidden_activation" if family in PERIODS else "hidden_act"] = act
    if config.windows and family in (*PERIODS, "qwen2", "qwen3"):
        json["layer_types"] = ["sliding_attention" if w else "full_attention"
                               for w in config.windows]
    if family in PERIODS:
        json |= {"query_pre_attn_scalar": round(config.attn_scale**-2),
                 "attn_logit_softcapping": config.attn_cap,
                 "final_logit_softcapping": config.logit_cap}
    if config.local_rope is not None:
        json["rope_local_base_freq"] = config.local_rope.theta
    return json


def _scaling_json(config: DecoderConfig) -> dict[str, Any] | None:
    match config.rope.scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case LongScaling(short, long, length, magnitude):
            # Phi-3 in transformers 4 allows only these three here; the length is at the top level.
            json = {"type": "longrope", "short_factor": list(short), "long_factor": list(long)}
            if config.family != "phi3":
                json["original_max_position_embeddings"] = length
            if magnitude != _magnitude(config.max_length, length):
                json["attention_factor"] = magnitude
            return json
        case Llama3Scaling(factor, low, high, length):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                    "high_freq_factor": high, "original_max_position_embeddings": length}


def _ropes(json: dict[str, Any], where: str) -> tuple[Rope, Rope | None]:
    """RoPE of the layers, and of layers with a window if different, from any spelling.

    transformers 5 has `rope_parameters` (by layer type for Gemma 3), 4 has `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    new = group(json, "rope_parameters", where)
    if "full_attention" in new:
        local = {"rope_theta": 10_000.0, **group(new, "sliding_attention", where)}
        return (_rope(json, group(new, "full_attention", where), where),
                _rope(json, local, where))
    rope = _rope(json, new or group(json, "rope_scaling", where), where)
    if json["model_type"] != "gemma3_text":
        return rope, None
    return rope, Rope(number(json, "rope_local_base_freq", where, 10_000.0))


def _rope(json: dict[str, Any], rope: dict[str, Any], where: str) -> Rope:
    default = 1_000_000.0 if json["model_type"] == "gemma3_text" else 10_000.0
    rope = {name: value for name, value in rope.items() if value is not None}
    either = {**json, **rope}  # some fields are outside the group in one version, inside in another
    theta = number(either, "rope_theta", where, default)
    partial = number(either, "partial_rotary_factor", where, 1.0)
    if partial > 1:
        raise InputError(f"{where}: partial_rotary_factor is {partial}, expected at most 1")
    kind = rope.get("rope_type", rope.get("type"))
    where_in = f"{where}, rotary embedding"
    plain = kind is None and rope.keys() <= {"rope_theta", "partial_rotary_factor"}
    if plain or kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(number(rope, "factor", where_in))
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = Llama3Scaling(*(number(rope, name, where_in) for name in names),
                                required_count(rope, "original_max_position_embeddings", where_in))
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise InputError(f"{where}: low_freq_factor {scaling.low_freq_factor} is not below "
                             f"high_freq_factor {scaling.high_freq_factor}")
    elif kind in ("longrope", "su"):
        length = required_count(either, "original_max_position_embeddings", where)
        if length < 2:
            raise InputError(f"{where}: original_max_position_embeddings is {length}, expected 2 "
                             "or more")
        magnitude = _magnitude(required_count(json, "max_position_embeddings", where), length)
        scaling = LongScaling(
            _factors(rope, "short_factor", where_in), _factors(rope, "long_factor", where_in),
            length, number(rope, "attention_factor", where_in, magnitude),
        )
    else:
        raise InputError(
            f"{where}: rope_type {kind!r:.80} is not supported; known: default, linear, llama3, "
            "longrope"
        )
    return Rope(theta, scaling, partial)


def _factors(rope: dict[str, Any], name: str, where: str) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: {name} is {values!r:.80}, expected a list of numbers")
    return tuple(number({name: value}, name, where) for value in values)


def _magnitude(length: int, original: int) -> float:
    """LongRoPE's sqrt(1 + ln s / ln L), with s = length / L and the original length L."""
    stretch = length / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
