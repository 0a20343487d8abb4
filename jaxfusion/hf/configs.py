"""`config.json` of a checkpoint → our config of its tower. transformers 4 and 5 spell it apart."""

from typing import Any

from jaxfusion.errors import InputError
from jaxfusion.nn.decoder import DecoderConfig, LinearScaling, Llama3Scaling
from jaxfusion.nn.mt5 import MT5Config

ENCODER_FAMILIES = ("mt5", "umt5", "t5")
DECODER_FAMILIES = ("llama",)


def encoder_config(json: dict[str, Any], where: str) -> MT5Config:
    """The shape of an mT5, umT5 or T5 v1.1 encoder.

    Raises:
      InputError: another family, or a feed-forward that these families do not have.
    """
    _check_family(json, ENCODER_FAMILIES, "encoder", where)
    activation = json.get("feed_forward_proj", "relu")
    if activation != "gated-gelu":
        raise InputError(
            f"{where}: feed_forward_proj is '{activation}', supported is 'gated-gelu' "
            "(mT5, umT5, T5 v1.1)"
        )
    return MT5Config(
        vocab_size=_field(json, "vocab_size", where),
        d_model=_field(json, "d_model", where),
        d_ff=_field(json, "d_ff", where),
        num_layers=_field(json, "num_layers", where),
        num_heads=_field(json, "num_heads", where),
        head_dim=_field(json, "d_kv", where),
        num_buckets=json.get("relative_attention_num_buckets", 32),
        max_distance=json.get("relative_attention_max_distance", 128),
        norm_eps=json.get("layer_norm_epsilon", 1e-6),
        bias_per_layer=json["model_type"] == "umt5",
    )


def decoder_config(json: dict[str, Any], where: str) -> DecoderConfig:
    """The shape of a Llama-family LLM.

    Raises:
      InputError: another family, or a feature that the decoder does not have.
    """
    _check_family(json, DECODER_FAMILIES, "decoder", where)
    only = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for feature, plain in only.items():
        if json.get(feature, plain) != plain:
            raise InputError(
                f"{where}: {feature} is {json[feature]!r}, supported is {plain!r}"
            )
    heads, width = _field(json, "num_attention_heads", where), _field(json, "hidden_size", where)
    theta, scaling = _rope(json, where)
    return DecoderConfig(
        vocab_size=_field(json, "vocab_size", where),
        d_model=width,
        d_ff=_field(json, "intermediate_size", where),
        num_layers=_field(json, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=json.get("num_key_value_heads") or heads,
        head_dim=json.get("head_dim") or width // heads,
        norm_eps=json.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=json.get("tie_word_embeddings", False),
    )


def encoder_json(config: MT5Config) -> dict[str, Any]:
    """The `config.json` of an encoder; `encoder_config` reads it back."""
    umt5 = config.bias_per_layer
    return {
        "model_type": "umt5" if umt5 else "mt5",
        "architectures": ["UMT5EncoderModel" if umt5 else "MT5EncoderModel"],
        "vocab_size": config.vocab_size, "d_model": config.d_model, "d_ff": config.d_ff,
        "num_layers": config.num_layers, "num_heads": config.num_heads, "d_kv": config.head_dim,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False, "dropout_rate": 0.1, "pad_token_id": 0, "eos_token_id": 1,
    }


def decoder_json(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a Llama-family LLM; `decoder_config` reads it back."""
    scaling = None
    if isinstance(config.rope_scaling, LinearScaling):
        scaling = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    elif config.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3", "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_length,
        }
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "intermediate_size": config.d_ff, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_scaling": scaling, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 131072,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rope(json: dict[str, Any], where: str):
    """RoPE base and scaling from either spelling (`rope_parameters`, or theta and scaling)."""
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", json.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(float(rope["factor"]))
    if kind == "llama3":
        return theta, Llama3Scaling(
            float(rope["factor"]), float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]), int(rope["original_max_position_embeddings"]),
        )
    raise InputError(
        f"{where}: rope_type '{kind}' is not supported; known: default, linear, llama3"
    )


def _check_family(json, families, role, where) -> None:
    family = json.get("model_type")
    if family not in families:
        raise InputError(
            f"{where}: model_type '{family}' is not supported as {role}; "
            f"known: {', '.join(families)}"
        )


def _field(json: dict[str, Any], name: str, where: str) -> int:
    if name not in json:
        raise InputError(f"{where}: field '{name}' is missing")
    return json[name]
