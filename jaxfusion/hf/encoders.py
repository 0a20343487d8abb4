"""An encoder's `config.json` → our config and back, in the spelling of transformers 4 or 5."""

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
from jaxfusion.nn.encoder import EncoderConfig
from jaxfusion.nn.rope import Rope

# transformers' names of activations -> ours, and back.
ACTIVATIONS_BY_NAME = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                       "relu": "relu", "silu": "silu", "swish": "silu"}
NAME_OF_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


def encoder_config(json: dict[str, Any], where: str) -> EncoderConfig:
    """The shape and features of an encoder, with its family's defaults in transformers.

    Raises:
      InputError: unsupported family or feature, or a field that is missing, has the wrong type or
        is out of range.
    """
    check_family(json, "encoder", where)
    read = {"bert": _bert, "xlm-roberta": _bert, "m2m_100": _m2m100, "modernbert": _modernbert}
    shape = read.get(json["model_type"], _t5)(json, where)
    check_shape(shape, where)
    return shape


def encoder_json(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` of an encoder alone; the inverse of `encoder_config`."""
    write = {"mt5": _t5_json, "umt5": _t5_json, "bert": _bert_json, "xlm-roberta": _bert_json,
             "m2m_100": _m2m100_json, "modernbert": _modernbert_json}
    return {"model_type": config.family, "vocab_size": config.vocab_size,
            "is_encoder_decoder": False, **write[config.family](config)}


def _t5(json: dict[str, Any], where: str) -> EncoderConfig:
    """T5 v1.1, mT5 and umT5."""
    # transformers' default for a missing field.
    activation = json.get("feed_forward_proj", "relu" if json["model_type"] == "t5"
                          else "gated-gelu")
    if activation != "gated-gelu":
        raise InputError(
            f"{where}: feed_forward_proj is {activation!r:.80}, expected 'gated-gelu' "
            "(mT5, umT5, T5 v1.1)"
        )
    if json.get("dense_act_fn", "gelu_new") != "gelu_new":  # transformers lets it win
        raise InputError(f"{where}: dense_act_fn is {json['dense_act_fn']!r:.80}, expected "
                         "'gelu_new'")
    umt5 = json["model_type"] == "umt5"
    return EncoderConfig(
        vocab_size=required_count(json, "vocab_size", where),
        d_model=required_count(json, "d_model", where),
        d_ff=required_count(json, "d_ff", where),
        num_layers=required_count(json, "num_layers", where),
        num_heads=required_count(json, "num_heads", where),
        head_dim=required_count(json, "d_kv", where),
        **_buckets(json, where),
        norm_eps=number(json, "layer_norm_epsilon", where, 1e-6),
        bias_per_layer=umt5, family="umt5" if umt5 else "mt5",
    )


def _buckets(json: dict[str, Any], where: str) -> dict[str, int]:
    """T5's relative positions: half of the buckets for each direction; half of those for exact
    distances, the others logarithmic up to the maximum distance."""
    names = [f"relative_attention_{x}" for x in ("num_buckets", "max_distance")]
    buckets, distance = count(json, names[0], 32, where), count(json, names[1], 128, where)
    if buckets < 4:
        raise InputError(f"{where}: {names[0]} is {buckets}, expected 4 or more")
    if distance <= (exact := buckets // 2 // 2):
        raise InputError(f"{where}: {names[1]} is {distance}, expected more than the {exact} exact "
                         f"distances of {names[0]} = {buckets}")
    return {"num_buckets": buckets, "max_distance": distance}


def _t5_json(c: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel" if c.bias_per_layer else "MT5EncoderModel"],
        "d_model": c.d_model, "d_ff": c.d_ff, "num_layers": c.num_layers,
        "num_heads": c.num_heads, "d_kv": c.head_dim,
        "relative_attention_num_buckets": c.num_buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.norm_eps, "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1, "pad_token_id": 0, "eos_token_id": 1,
    }


def _bert(json: dict[str, Any], where: str) -> EncoderConfig:
    """BERT and XLM-R: they differ in how they count positions."""
    kind = json.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise InputError(f"{where}: position_embedding_type is {kind!r:.80}, expected 'absolute'")
    bert = json["model_type"] == "bert"
    first = 0 if bert else count(json, "pad_token_id", 1, where, least=0) + 1
    rows = count(json, "max_position_embeddings", 512, where)
    if rows <= first:
        raise InputError(f"{where}: max_position_embeddings is {rows}, expected more than {first}")
    return EncoderConfig(
        **_sizes(json, where), d_ff=required_count(json, "intermediate_size", where),
        norm_eps=number(json, "layer_norm_eps", where, 1e-12),
        family=json["model_type"], positions="learned", max_length=rows - first,
        first_position=first, counts_padding=bert,
        token_types=count(json, "type_vocab_size", 2, where),
        norm="layer", bias=True, post_norm=True, embed_norm=True, final_norm=False,
        activation=chosen(json, "hidden_act", ACTIVATIONS_BY_NAME, where), gated=False,
        attn_scale=None,
    )


def _bert_json(c: EncoderConfig) -> dict[str, Any]:
    kind = "BertModel" if c.family == "bert" else "XLMRobertaModel"
    return {
        "architectures": [kind], **_sizes_json(c), "intermediate_size": c.d_ff,
        "layer_norm_eps": c.norm_eps, "hidden_act": NAME_OF_ACTIVATION[c.activation],
        "max_position_embeddings": c.first_position + c.max_length,
        "type_vocab_size": c.token_types, "pad_token_id": max(c.first_position - 1, 0),
    }


def _m2m100(json: dict[str, Any], where: str) -> EncoderConfig:
    """The encoder of M2M100 and NLLB."""
    width = required_count(json, "d_model", where)
    if width < 4:  # the slowest sinusoid needs a second one
        raise InputError(f"{where}: d_model is {width}, expected 4 or more")
    heads = required_count(json, "encoder_attention_heads", where)
    return EncoderConfig(
        vocab_size=required_count(json, "vocab_size", where), d_model=width,
        d_ff=required_count(json, "encoder_ffn_dim", where),
        num_layers=required_count(json, "encoder_layers", where),
        num_heads=heads, head_dim=_head_dim(width, heads, where), norm_eps=1e-5,
        family="m2m_100", positions="sinusoidal",
        first_position=count(json, "pad_token_id", 1, where, least=0) + 1,
        norm="layer", bias=True, activation=chosen(
            json, "activation_function", ACTIVATIONS_BY_NAME, where, "relu"),
        gated=False, attn_scale=None,
        embed_scale=width**0.5 if flag(json, "scale_embedding", where, True) else 1.0,
    )


def _m2m100_json(c: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["M2M100Encoder"], "d_model": c.d_model, "encoder_ffn_dim": c.d_ff,
        "encoder_layers": c.num_layers, "encoder_attention_heads": c.num_heads,
        "activation_function": NAME_OF_ACTIVATION[c.activation],
        "scale_embedding": c.embed_scale != 1.0,
        "pad_token_id": c.first_position - 1, "encoder_layerdrop": 0.0,
    }


def _modernbert(json: dict[str, Any], where: str) -> EncoderConfig:
    """ModernBERT (mmBERT): two of three blocks have a window."""
    for name in ("attention_bias", "mlp_bias", "norm_bias"):
        if flag(json, name, where):
            raise InputError(f"{where}: {name} is true, which is not supported for modernbert")
    sizes = _sizes(json, where)
    period = count(json, "global_attn_every_n_layers", 3, where)
    local = local_layers(json, sizes["num_layers"], where) or [
        i % period != 0 for i in range(sizes["num_layers"])]
    window = count(json, "local_attention", 128, where) // 2 + 1
    if sizes["head_dim"] % 2:
        raise InputError(f"{where}: heads have {sizes['head_dim']} dimensions, expected an even "
                         "number, since rotary embeddings rotate pairs")
    return EncoderConfig(
        **sizes, d_ff=required_count(json, "intermediate_size", where),
        norm_eps=number(json, "norm_eps", where, 1e-5),
        family="modernbert", positions="rotary",
        rope=_rope(json, "full_attention", "global_rope_theta", 160_000.0, where),
        local_rope=_rope(json, "sliding_attention", "local_rope_theta", 10_000.0, where),
        windows=tuple(window if is_local else None for is_local in local) if any(local) else (),
        norm="layer", embed_norm=True, first_norm=False,
        activation=chosen(json, "hidden_activation", ACTIVATIONS_BY_NAME, where), attn_scale=None,
    )


def _rope(json: dict[str, Any], kind: str, field: str, default: float, where: str) -> Rope:
    """RoPE of one kind of layer: `rope_parameters` in transformers 5, `field` in 4."""
    if json.get("rope_scaling"):
        raise InputError(f"{where}: rope_scaling is {json['rope_scaling']!r:.80}, which is not "
                         "supported for modernbert")
    rope = group(json, "rope_parameters", where)
    if unknown := rope.keys() - {"full_attention", "sliding_attention"}:
        raise InputError(f"{where}: rope_parameters has {', '.join(sorted(unknown))}, expected "
                         "full_attention and sliding_attention")
    rope = group(rope, kind, where)
    if (form := rope.get("rope_type", "default")) != "default":
        raise InputError(f"{where}: rope_type {form!r:.80} is not supported for modernbert, "
                         "expected default")
    if "rope_theta" in rope:
        return Rope(number(rope, "rope_theta", where))
    return Rope(number(json, field, where, None if field in json else default))


def _modernbert_json(c: EncoderConfig) -> dict[str, Any]:
    window = next((w for w in c.windows if w), None)
    return {
        "architectures": ["ModernBertModel"], **_sizes_json(c), "intermediate_size": c.d_ff,
        "norm_eps": c.norm_eps, "hidden_activation": NAME_OF_ACTIVATION[c.activation],
        "layer_types": ["sliding_attention" if w else "full_attention"
                        for w in c.windows or (None,) * c.num_layers],
        "global_attn_every_n_layers": _period(c),
        "local_attention": 128 if window is None else 2 * (window - 1),
        "global_rope_theta": c.rope.theta, "local_rope_theta": c.local_rope.theta,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": c.rope.theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": c.local_rope.theta}},
        "pad_token_id": 0, "reference_compile": False,
    }


def _period(c: EncoderConfig) -> int:
    """How many layers there are from one without a window to the next, for transformers 4."""
    return next((i for i, w in enumerate(c.windows) if i and w is None),
                c.num_layers if c.windows else 1)


def _sizes(json: dict[str, Any], where: str) -> dict[str, int]:
    width = required_count(json, "hidden_size", where)
    heads = required_count(json, "num_attention_heads", where)
    return {"vocab_size": required_count(json, "vocab_size", where), "d_model": width,
            "num_layers": required_count(json, "num_hidden_layers", where),
            "num_heads": heads, "head_dim": _head_dim(width, heads, where)}


def _sizes_json(c: EncoderConfig) -> dict[str, Any]:
    return {"hidden_size": c.d_model, "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads}


def _head_dim(width: int, heads: int, where: str) -> int:
    if width % heads:
        raise InputError(f"{where}: width {width} is not divisible by {heads} attention heads")
    return width // heads
